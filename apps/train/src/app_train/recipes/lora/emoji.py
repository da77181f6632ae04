"""Recipe `emoji`: fine-tune Lite0 + MiniLM on emoji by two artists, test on an artist never seen.

    nox -s train                     one seed
    nox -s train -- --seeds 3        three seeds; feeds docs/results/first-light.md
    nox -s train -- --tune           the validation trials behind the learning rates below

Rows: picture nearest neighbour (control), zero-shot, LoRA with each of four losses. Validation withholds the pictures of
15 % of the leaves, which stay candidate labels; the final runs train on all; the test artist is used for final scores only.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from app_data.read.pictures import PictureSet
from app_data.sets.emoji import CREDITS, load_emoji, validation_split
from app_data.store.atomic import write_json
from app_eval.measure.embed import neighbour_logits
from app_train.core.run_folder import Run, finished
from app_train.recipes.lora.compare import Line, Story, compare, read_back, trained_lines, zero_shot_line
from app_train.recipes.lora.losses import ROWS
from app_train.recipes.lora.settings import LITE0, TRIALS, EmojiConfig, FitConfig
from app_train.recipes.lora.task import Task, cuts_for, frozen_features, load_base, store_row, train_row

TEMPLATE = "a picture of {}."
TEST_ARTIST = "twemoji"


def run(config: EmojiConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.tune:
        config = config.model_copy(update={"out": config.out.with_name(f"{config.out.name}-tune")})
    with Run("emoji", config, mixed_precision=config.fit.mixed_precision) as run:
        train = _limited(load_emoji(config.artists, size=config.size, cache_dir=config.cache_dir), config.limit)
        if config.tune:
            return _tune(config, run, train)
        test = _limited(load_emoji((TEST_ARTIST,), size=config.size, cache_dir=config.cache_dir), config.limit)
        run.claim(f"{train.fingerprint}-{test.fingerprint}")
        if (known := read_back(run)) is not None:
            return known
        task = _task(config, run, train, test)
        lines = [
            Line("neighbour", "picture nearest neighbour", partial(_neighbour, task), everywhere=False),
            zero_shot_line(task),
            *trained_lines(task, config.rows, partial(_fit_config, config), prefix="LoRA + "),
        ]
        story = Story(
            title="Emoji: an artist never seen",
            lead=(
                f"EfficientNet-Lite0 and MiniLM, tuned on emoji by {', '.join(config.artists)}, tested on {len(test)} pictures by "
                f"{TEST_ARTIST}, centred on their own mean (no label is used). Seed 0 is shown."
            ),
            facts={"base model": LITE0},
            compared=[row for row in config.rows if row in ("leaf_ce", config.rows[-1])] or ["zero_shot"],
            credits=CREDITS,
            hint=f"adapters: {config.out}/seed-*/<row>/adapter",
        )
        return compare(task, lines, config.seeds, story)


def _limited(data: PictureSet, limit: int | None) -> PictureSet:
    if limit is None:
        return data
    leaves = data.taxonomy.leaf.numpy()
    kept = leaves[np.linspace(0, len(leaves) - 1, min(limit, len(leaves))).round().astype(int)]
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


def _neighbour(task: Task, folder: Path, seed: int) -> dict:
    """The control that uses pictures alone."""
    facts = task.run.facts("neighbour", seed)
    known = finished(folder, facts)
    if known is not None:
        return known
    features = frozen_features(task, task.test, "frozen features of the test pictures")
    targets = torch.from_numpy(task.train.targets)
    return store_row(task, neighbour_logits(task.features, targets, features, task.test.taxonomy), folder, facts)


def _tune(config: EmojiConfig, run: Run, train: PictureSet) -> dict:
    """All trials of all rows on the withheld leaves; nothing here reads the test artist."""
    known, withheld = validation_split(train, seed=0)
    run.claim(f"{train.fingerprint}-validation")
    task = _task(config, run, train.select(known), train.select(withheld))
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
    content = run.finish({"trials": table, "chosen": {r: [t["head"], t["lora"]] for r, t in chosen.items()}})
    write_json(run.out / "tuning.json", content)
    print(content["chosen"])  # noqa: T201
    return content
