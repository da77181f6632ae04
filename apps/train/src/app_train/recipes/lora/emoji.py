"""Recipe `emoji`: learn emoji from two artists, name those of an artist never seen.

    nox -s train                     one seed
    nox -s train -- --seeds 5        five seeds; feeds docs/results/first-light.md
    nox -s train -- --tune           the trials behind the settings; they leave out a training artist, never read the test artist

Rows: controls (zero-shot, nearest neighbour, logistic regression, linear discriminant analysis); free heads, TreeLDA and the
product of both with neighbours on frozen features, each on the tree, on a shuffled tree and on a star; LoRA with four losses, and
TreeLDA on the features of a LoRA tower. What the product is made of is chosen on the artist that the fold leaves out.
"""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app_data.read.pictures import PictureSet
from app_data.sets.emoji import load_emoji, validation_split
from app_data.sets.emoji_artists import CREDITS
from app_data.store.atomic import write_json
from app_eval.measure.cells import finished
from app_eval.measure.embed import tower_features
from app_train.core.errors import RunError
from app_train.core.run_folder import Run
from app_train.recipes.lora.classifiers import TREES, Classifiers, Features, centred
from app_train.recipes.lora.compare import Line, Story, compare, read_back, trained_lines, zero_shot_line
from app_train.recipes.lora.frozen import HEADLINE, ON, FrozenRows, Loaded, headline, named, node_scores
from app_train.recipes.lora.losses import ROWS
from app_train.recipes.lora.settings import (
    FEATURE_SIZES,
    HEAD_TRIALS,
    LITE0,
    TRIALS,
    EmojiConfig,
    FitConfig,
    HeadsConfig,
)
from app_train.recipes.lora.task import Task, cuts_for, load_base, prompts_of, store_row, train_row
from hier_lora import HierLoraCLIP

TEMPLATE = "a picture of {}."
TEST_ARTIST = "twemoji"
# The LoRA row whose tower feeds TreeLDA.
LORA_FEATURES = "leaf_ce"


def run(config: EmojiConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if len(config.artists) < 2:
        raise RunError(
            f"--artists must name at least two: the first is left out to choose, got {' '.join(config.artists)}"
        )
    if config.tune:
        config = config.model_copy(update={"out": config.out.with_name(f"{config.out.name}-tune")})
    with Run("emoji", config, mixed_precision=config.fit.mixed_precision) as run:
        train = _pictures(config, config.artists, config.size)
        if config.tune:
            return _tune(config, run, train)
        test = _pictures(config, (TEST_ARTIST,), config.size)
        run.claim(f"{train.fingerprint}-{test.fingerprint}-{config.feature_size}")
        if (known := read_back(run)) is not None:
            return known
        task = _task(config, run, train, test)
        rows = FrozenRows(task, lambda: _load(config, task), LITE0, config.feature_size)
        lines = [zero_shot_line(task), *rows.lines()]
        lines += trained_lines(task, config.rows, partial(_fit_config, config), prefix=f"LoRA at {config.size} px + ")
        if LORA_FEATURES in config.rows:
            lines += [_lora_line(task, tree) for tree in TREES]
        story = Story(
            title="Emoji: an artist never seen",
            lead=(
                f"Learnt from emoji by {', '.join(config.artists)}; tested on {len(test)} pictures by {TEST_ARTIST}, centred on their "
                "own mean (no label is used). Seed 0 is shown."
            ),
            hint="adapters: {run}/seed-*/<row>/adapter",
            facts={"base model": LITE0, "size of the frozen features": f"{config.feature_size} px"},
            compared=("neighbour", HEADLINE),
            credits=CREDITS,
        )
        return compare(task, lines, config.seeds, story, lambda: {"headline": headline(task)})


def _pictures(config: EmojiConfig, artists: tuple[str, ...], size: int) -> PictureSet:
    data = load_emoji(artists, size=size, cache_dir=config.cache_dir)
    if config.limit is None:
        return data
    leaves = data.taxonomy.leaf.numpy()
    kept = leaves[np.linspace(0, len(leaves) - 1, min(config.limit, len(leaves))).round().astype(int)]
    return data.select(np.isin(data.targets, kept))


def _task(config: EmojiConfig, run: Run, train: PictureSet, test: PictureSet) -> Task:
    base = load_base(LITE0)
    base.dropout.p = config.dropout
    return Task(run, base, train, test, cuts_for(train.taxonomy), TEMPLATE, centred=True).with_features()


def _fit_config(config: EmojiConfig, row: str, lr: tuple[float, float] | None = None) -> FitConfig:
    fit = config.fit
    head, lora = lr or config.lr.get(row, (fit.head.lr, fit.lora.lr))
    stages = {"head": fit.head.model_copy(update={"lr": head}), "lora": fit.lora.model_copy(update={"lr": lora})}
    return fit.model_copy(update=stages)


def _load(config: EmojiConfig, task: Task) -> Loaded:
    size = config.feature_size
    classifiers, features = _classifiers(config, task, config.heads, size)
    new = _features(config, task, _pictures(config, (TEST_ARTIST,), size), size)
    mean = features.mean(0)
    return Loaded(classifiers, mean, new - new.mean(0), new - mean)


def _classifiers(config: EmojiConfig, task: Task, heads: HeadsConfig, size: int) -> tuple[Classifiers, Tensor]:
    """Classifiers on the training pictures at a size of their own, and the features; the first artist is left out to choose."""
    pictures = _pictures(config, config.artists, size)
    features = _features(config, task, pictures, size)
    styles, target = np.array(pictures.styles), torch.from_numpy(pictures.targets)
    out = styles == config.artists[0]
    parts = [torch.from_numpy(np.flatnonzero(rows)) for rows in (~out, out)]
    fold = tuple(Features(centred(features[rows], styles[rows.numpy()]), target[rows]) for rows in parts)
    everything = Features(centred(features, styles), target)
    return Classifiers(pictures.taxonomy, everything, [fold], heads, prompts_of(task)), features


def _features(config: EmojiConfig, task: Task, pictures: PictureSet, size: int) -> Tensor:
    base = task.base.to(task.run.device, memory_format=torch.channels_last)
    label = f"frozen features at {size} px"
    return tower_features(base, pictures, label, config.cache_dir, task.run.check).cpu()


def _lora_line(task: Task, tree: str) -> Line:
    """TreeLDA on the features of the tower that the row `LORA_FEATURES` has tuned."""
    title = "TreeLDA on LoRA features" + ON[tree]
    return Line(named("lora_lda", tree), title, partial(_lora_lda, task, tree), everywhere=False)


def _lora_lda(task: Task, tree: str, folder: Path, seed: int) -> dict:
    facts = task.run.facts(named("lora_lda", tree), seed)
    if (known := finished(folder, facts)) is not None:
        return known
    train, test = _lora_features(task, folder.parent / LORA_FEATURES)
    data = Features(centred(train, np.array(task.train.styles)), torch.from_numpy(task.train.targets))
    every = Classifiers(task.train.taxonomy, data, [], task.run.config.heads).on(tree)
    together, alone = (
        node_scores(every.log_prob("tree_lda", test - mean), task.test.taxonomy)
        for mean in (test.mean(0), train.mean(0))
    )
    return store_row(task, together, folder, facts, single=alone)


def _lora_features(task: Task, row: Path) -> tuple[Tensor, Tensor]:
    """Features of the tuned tower for training and test pictures, kept beside the adapter until the run is sealed."""
    model = HierLoraCLIP.from_pretrained(row / "adapter", copy.deepcopy(task.base).cpu()).merge_and_unload().eval()
    base = model.to(task.run.device, memory_format=torch.channels_last).dual_encoder
    label = "features of the LoRA tower"
    return tuple(
        tower_features(base, part, label, task.run.config.cache_dir, task.run.check) for part in (task.train, task.test)
    )


def _tune(config: EmojiConfig, run: Run, train: PictureSet) -> dict:
    """All trials: size and settings of heads on the artist left out, rates of LoRA on withheld leaves."""
    known, withheld = validation_split(train, seed=0)
    run.claim(f"{train.fingerprint}-validation")
    task = _task(config, run, train.select(known), train.select(withheld))
    frozen = [_frozen_trial(config, task, size, *settings) for size in FEATURE_SIZES for settings in HEAD_TRIALS]
    table: dict[str, list[dict]] = {}
    for row in config.rows:
        for head, lora in TRIALS:
            fit, name = _fit_config(config, row, (head, lora)), f"{row}-{head}-{lora}"
            facts = run.facts(name, 0, fit=fit.model_dump(mode="json"))
            result = train_row(task, name, ROWS[row].loss, fit, run.out / name, 0, facts)
            scores = {d: {s: v[0] for s, v in result["scores"][d].items()} for d in result["scores"]}
            trial = {"head": head, "lora": lora, "ahd": scores["bottom_up"]["ahd"], "scores": scores}
            table.setdefault(row, []).append(trial)
    chosen = {row: min(trials, key=lambda t: t["ahd"]) for row, trials in table.items()}
    rates = {r: [t["head"], t["lora"]] for r, t in chosen.items()}
    best = min(frozen, key=lambda trial: trial["ahd"])
    content = run.finish({"frozen": frozen, "trials": table, "chosen": rates, "chosen_frozen": best})
    write_json(run.out / "tuning.json", content)
    print(rates, best, sep="\n")  # noqa: T201
    return content


def _frozen_trial(config: EmojiConfig, task: Task, size: int, epochs: int, dropout: float) -> dict:
    """Scores of the product on the artist left out, mean of three seeds."""
    heads = config.heads.model_copy(update={"epochs": epochs, "dropout": dropout})
    classifiers, _ = _classifiers(config, task, heads, size)
    found = [classifiers.chosen("tree", seed) for seed in range(3)]
    leaf, ahd = (float(np.mean([getattr(settings, name) for settings in found])) for name in ("leaf", "ahd"))
    return {"size": size, "epochs": epochs, "dropout": dropout, "leaf": leaf, "ahd": ahd}
