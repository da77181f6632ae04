"""Recipe `folder`: the best classifier that can be had from your own folder of pictures and your own taxonomy.

    hier train folder --data DIR --taxonomy FILE
    hier train folder --data DIR --lora                 LoRA fine-tuning as well
    hier train folder --data DIR --lora --from-run RUN  going on from an earlier run's, after pictures or classes came
    hier train folder --data aircraft:DIR               a released data set of `app_data.sets.DATA`, with its own split
    hier predict runs/folder PATH...

Without `--taxonomy` the nested folders are the taxonomy. Features of the frozen tower are computed once. Controls, heads, TreeLDA
and their product are fitted to the training pictures; the product is chosen on the validation pictures, or on five folds of the
training pictures where there are none, and saved for `hier predict`. The test pictures only score.
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch

from app_data.read.check import examine
from app_data.read.folder import find_pictures, load_found
from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet, allow_megapixels
from app_data.read.splits import stratified_split
from app_data.sets import load_named, split_name
from app_data.store.atomic import write_text
from app_data.store.errors import DataError
from app_eval.ask.frozen import FrozenClassifier
from app_eval.ask.predict import find_adapter
from app_eval.measure.cells import finished
from app_eval.measure.embed import node_logits, run_batches, tower_features
from app_eval.measure.paths import outcome
from app_eval.measure.results import summarise
from app_train.core.errors import RunError
from app_train.core.run_folder import Run
from app_train.recipes.lora.classifiers import Classifiers, Features
from app_train.recipes.lora.compare import Line, Story, compare, read_back, zero_shot_line
from app_train.recipes.lora.frozen import HEADLINE, FrozenRows, Loaded, headline
from app_train.recipes.lora.losses import LOSSES
from app_train.recipes.lora.settings import FolderConfig
from app_train.recipes.lora.task import Task, check_template, cuts_for, load_base, prompts_of, say_time, train_row
from hier_lora import HierLoraCLIP
from hier_losses.decoding import bottom_up
from hier_losses.metrics import average_hierarchical_distance

FOLDS, TRAINED = 5, "trained"


def run(config: FolderConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.data is None:
        raise RunError("--data is missing: name the folder of pictures")
    if not any(getattr(config.loss, name) for name in LOSSES):
        raise RunError("all weights of --loss are 0: nothing would be trained")
    check_template(config.template)
    if config.from_run is not None and not config.lora:
        raise RunError("--from-run goes with --lora: heads and closed forms are fitted anew in seconds")
    start = None if config.from_run is None else find_adapter(config.from_run)
    with Run("folder", config, mixed_precision=config.fit.mixed_precision) as run:
        parts = _read(config, run)
        if "train" not in parts:
            raise RunError(f"{config.data} has no train/ folder beside {', '.join(f'{p}/' for p in parts)}: add one")
        train, test = parts["train"], parts.get("test", parts.get("val"))
        if test is None or len(test) == 0:
            raise RunError(f"{config.data} leaves no picture to test on: add pictures or a test/ folder")
        known = np.isin(test.targets, _leaves(train).targets)
        unseen, test = _leaves(test.select(~known)), test.select(known)
        if len(test) == 0:
            raise RunError(f"no test picture of {config.data} has a class that training has: mend the split")
        run.claim(train.fingerprint)
        if run.main:
            _list_skipped(run, parts)
        if (known := read_back(run)) is not None:
            return known
        val = parts["val"] if "test" in parts and "val" in parts else None
        if val is not None:
            val = val.select(np.isin(val.targets, _leaves(train).targets))
        base = load_base(config.model)
        task = Task(run, base, train, test, cuts_for(train.taxonomy), config.template, val=val, start=start)
        if config.lora:
            task = task.with_features()
        rows = FrozenRows(task, lambda: _load(config, task), config.model, config.size)
        lines = [zero_shot_line(task), *rows.lines()]
        if config.lora:

            def trained(folder: Path, seed: int) -> dict:
                facts = run.facts(TRAINED, config.seed)
                if finished(folder, facts) is None and not (folder / "adapter").exists():
                    say_time(task, config.fit)
                return train_row(task, "training", config.loss, config.fit, folder, config.seed, facts)

            lines.append(Line(TRAINED, "LoRA", trained))
        chosen_on = f"{FOLDS} folds of the training pictures" if val is None else f"{len(val)} validation pictures"
        story = Story(
            title=f"{config.data.name}: {len(train)} training pictures",
            lead=f"{config.model} at {config.size} px; scores on {len(test)} pictures that nothing was fitted to.",
            facts={"skipped files": str(len(train.skipped)), "the product is chosen on": chosen_on},
            compared=("neighbour", HEADLINE),
            tables=HEADLINE,
            hint="predict: hier predict {run} PATH...",
        )

        def more() -> dict:
            chosen = _choose(task) if config.lora else {"row": HEADLINE}
            return {"headline": headline(task), "chosen": chosen, **_apart(task, unseen)}

        return compare(task, lines, 1, story, more)


def _choose(task: Task) -> dict:
    """Which of product and LoRA `hier predict` asks: the one with the lower AHD on the validation pictures.

    The product's weights were chosen on the same pictures, which flatters it: LoRA must be clearly better to be taken.
    """
    if task.val is None or not len(task.val):
        why = "LoRA has seen every picture that could choose it"
        print(f"{why}: hier predict asks the product; give a val part, or name the adapter")  # noqa: T201
        return {"row": HEADLINE}
    folder, tax = task.run.out / "seed-0", task.train.taxonomy
    ours = FrozenClassifier.load(folder / HEADLINE / "model").product.settings.ahd
    model = HierLoraCLIP.from_pretrained(folder / TRAINED / "adapter", copy.deepcopy(task.base).cpu())
    model.to(task.run.device)
    logits = node_logits(model, task.val, label="LoRA on the validation pictures", check=task.run.check)
    found = bottom_up(logits, tax)
    ahd = {
        HEADLINE: ours,
        TRAINED: float(average_hierarchical_distance(found, torch.from_numpy(task.val.targets), tax)),
    }
    return {"row": min(ahd, key=ahd.__getitem__), "ahd": ahd}


def _read(config: FolderConfig, run: Run) -> dict[str, PictureSet]:
    """The parts; first what was found is said, and what would spoil the result stops."""
    allow_megapixels(config.max_megapixels)
    decoding = Decoding(config.size, cache_dir=config.cache_dir, max_bad_fraction=config.max_bad_fraction)
    name, root = split_name(config.data)
    if name:
        if config.listing or config.listing_columns:
            raise DataError(f"--listing is not used for {config.data}: a release has its own lists")
        return load_named(name, root, decoding, config.taxonomy)
    found = find_pictures(
        config.data, config.taxonomy,
        listing=config.listing, listing_columns=config.listing_columns, outside=config.outside,
    )  # fmt: skip
    report = examine(found, cache_dir=config.cache_dir, max_bad_fraction=config.max_bad_fraction)
    if report.stops:
        raise DataError(f"{'; '.join(report.stops)} (hier check {config.data} shows all)")
    if run.main:
        for line in [*report.notes, *(f"warning: {text}" for text in report.warnings)]:
            print(line)  # noqa: T201
    return load_found(found, decoding, seed=config.seed, allow_empty_classes=True)


def _leaves(pictures: PictureSet) -> PictureSet:
    """The pictures whose class is a leaf: partial labels train LoRA, but nothing is fitted to them or scored on them."""
    return pictures.select((pictures.taxonomy.leaf_index[torch.from_numpy(pictures.targets)] >= 0).numpy())


def _apart(task: Task, unseen: PictureSet) -> dict:
    """How the product does on test pictures of classes that training lacks, by the best leaf."""
    if not len(unseen):
        return {}
    model = FrozenClassifier.load(task.run.out / "seed-0" / HEADLINE / "model")
    logits = run_batches(unseen, lambda batch: model.logits(batch.permute(0, 2, 3, 1).numpy()), "unseen classes")
    scores = summarise(outcome(logits, unseen.targets, unseen.taxonomy, task.cuts), unseen.taxonomy)["bottom_up"]
    return {"unseen": {"n": len(unseen), "classes": sorted(set(unseen.names)), "scores": scores}}


def _load(config: FolderConfig, task: Task) -> Loaded:
    base = task.base.to(task.run.device, memory_format=torch.channels_last)

    def features(part: PictureSet) -> torch.Tensor:
        return tower_features(base, part, "frozen features", config.cache_dir, task.run.check).cpu()

    train = features(task.train)
    mean, fitted = train.mean(0), _leaves(task.train)
    whole = torch.from_numpy(np.isin(task.train.targets, fitted.targets))
    everything = Features(train[whole] - mean, torch.from_numpy(fitted.targets))
    if task.val is not None and len(task.val):
        folds = [(everything, Features(features(task.val) - mean, torch.from_numpy(task.val.targets)))]
    else:
        folds = _folds(fitted, everything, config.seed)
    classifiers = Classifiers(task.train.taxonomy, everything, folds, config.heads, prompts_of(task))
    return Loaded(classifiers, mean, features(task.test) - mean)


def _folds(train: PictureSet, everything: Features, seed: int) -> list[tuple[Features, Features]]:
    """Five pairs of pictures to fit and to judge; every class is spread over them as evenly as it can be."""
    shares = {str(number): 1 / FOLDS for number in range(FOLDS)}
    parts = stratified_split(train.targets, train.files, shares, seed)
    folds = []
    for held in parts.values():
        kept = np.setdiff1d(np.arange(len(train)), held)
        if len(held) and len(kept):
            pair = (torch.from_numpy(kept), torch.from_numpy(np.asarray(held)))
            folds.append(tuple(Features(everything.x[rows], everything.target[rows]) for rows in pair))
    return folds


def _list_skipped(run: Run, parts: dict[str, PictureSet]) -> None:
    skipped = {(s.path, s.reason) for part in parts.values() for s in part.skipped}
    lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in sorted(skipped)]
    write_text(run.out / "skipped.jsonl", "".join(lines))
    if skipped:
        print(f"{len(skipped)} files could not be read: see {run.out / 'skipped.jsonl'}")  # noqa: T201
