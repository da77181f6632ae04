"""Recipe `folder`: fine-tune a dual encoder on your own folder of pictures with your own taxonomy.

    hier train folder --data DIR --taxonomy FILE
    hier predict runs/folder PICTURE...

Without `--taxonomy` the nested folders are the taxonomy. Test pictures score the zero-shot model and the trained one;
validation pictures, where there are any, calibrate its probabilities.
"""

import json

from app_data.read.folder import load_folder
from app_data.read.pictures import PictureSet
from app_data.store.atomic import write_text
from app_train.core.errors import RunError
from app_train.core.run_folder import Run
from app_train.recipes.lora.compare import Line, Story, compare, read_back, zero_shot_line
from app_train.recipes.lora.losses import LOSSES
from app_train.recipes.lora.settings import FolderConfig
from app_train.recipes.lora.task import Task, check_template, cuts_for, load_base, train_row


def run(config: FolderConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.data is None:
        raise RunError("--data is missing: name the folder of pictures")
    if not any(getattr(config.loss, name) for name in LOSSES):
        raise RunError("all weights of --loss are 0: nothing would be trained")
    check_template(config.template)
    with Run("folder", config, mixed_precision=config.fit.mixed_precision) as run:
        parts = load_folder(
            config.data,
            config.taxonomy,
            listing=config.listing,
            size=config.size,
            seed=config.seed,
            cache_dir=config.cache_dir,
            max_bad_fraction=config.max_bad_fraction,
        )
        if "train" not in parts:
            raise RunError(f"{config.data} has no train/ folder beside {', '.join(f'{p}/' for p in parts)}: add one")
        train, test = parts["train"], parts.get("test", parts.get("val"))
        if test is None or len(test) == 0:
            raise RunError(f"{config.data} leaves no picture to test on: add pictures or a test/ folder")
        run.claim(train.fingerprint)
        if run.main:
            _list_skipped(run, parts)
        if (known := read_back(run)) is not None:
            return known
        val = parts["val"] if "test" in parts and "val" in parts else None
        base = load_base(config.model)
        task = Task(run, base, train, test, cuts_for(train.taxonomy), config.template, val=val).with_features()

        def trained(folder, seed):
            facts = run.facts("trained", config.seed)
            return train_row(task, "training", config.loss, config.fit, folder, config.seed, facts)

        story = Story(
            title=f"{config.data.name}: {len(train)} training pictures",
            lead=f"{config.model}, fine-tuned; scores on {len(test)} pictures that were not trained on.",
            facts={
                "skipped files": str(len(train.skipped)),
                "probabilities": "not calibrated" if val is None else f"calibrated on {len(val)} held-out pictures",
            },
            compared=("zero_shot", "trained"),
            hint=f"predict: hier predict {config.out} PICTURE...",
        )
        return compare(task, [zero_shot_line(task), Line("trained", "trained", trained)], 1, story)


def _list_skipped(run: Run, parts: dict[str, PictureSet]) -> None:
    skipped = {(s.path, s.reason) for part in parts.values() for s in part.skipped}
    lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in sorted(skipped)]
    write_text(run.out / "skipped.jsonl", "".join(lines))
    if skipped:
        print(f"{len(skipped)} files could not be read: see {run.out / 'skipped.jsonl'}")  # noqa: T201
