"""Recipes on the data sets of the papers, with real CLIP weights: `cub`, `aircraft`, `butterfly`, `inaturalist`.

    hier train cub --data CUB_200_2011 --hierarchy cub_hierarchy.csv
    hier train aircraft --data fgvc-aircraft-2013b/data
    hier train butterfly --data Butterfly200
    hier train inaturalist --data inat2021 --text sampled

The weights come through a locator (`--model`), by default OpenAI's CLIP ViT-B/32 from the Hugging Face hub; nothing here
downloads the data. The costs below are estimates from counts of pictures and weights, not measurements: LoRA on both towers
of ViT-B/32 at batch 64 in bf16 on one 24 GB GPU, 300 pictures a second through training, five epochs.

| recipe | pictures | nodes | GPU memory | time for one row and seed |
|---|---|---|---|---|
| cub | 5,994 + 5,794 | 251 | 6 GB | 2 minutes |
| aircraft | 3,334 + 3,333 + 3,333 | 200 | 6 GB | 1 minute |
| butterfly | 5,135 + 5,135 + 15,009 | 344 | 6 GB | 2 minutes |
| inaturalist | 2,686,843 + 100,000 (500,000 in train_mini) | 16,343 | 8 GB (sampled text) | 12 hours (2.5 with train_mini) |
"""

from dataclasses import replace
from pathlib import Path

from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet
from app_data.read.splits import stratified_split
from app_data.sets import load_named
from app_train.core.errors import RunError
from app_train.core.run_folder import Run
from app_train.recipes.lora.compare import Story, compare, read_back, trained_lines, zero_shot_line
from app_train.recipes.lora.settings import (
    AircraftConfig,
    ButterflyConfig,
    CifarConfig,
    CubConfig,
    InaturalistConfig,
    PaperConfig,
)
from app_train.recipes.lora.task import Task, check_template, cuts_for, load_base


def run_cub(config: CubConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.hierarchy is None:
        raise RunError("--hierarchy is missing: name a CSV with the columns order, family, species")
    return _run("cub", config, config.hierarchy)


def run_aircraft(config: AircraftConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    return _run("aircraft", config)


def run_butterfly(config: ButterflyConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    return _run("butterfly", config)


def run_inaturalist(config: InaturalistConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`; its released validation part is the test part here."""
    return _run("inaturalist", config)


def _run(name: str, config: PaperConfig, hierarchy: Path | None = None) -> dict:
    if config.data is None:
        raise RunError("--data is missing: name the folder of the unpacked release")
    check_template(config.template)
    with Run(name, config, mixed_precision=config.fit.mixed_precision) as run:
        decoding = Decoding(size=config.size, cache_dir=config.cache_dir)
        train, val, test = three_parts(load_named(name, config.data, decoding, hierarchy))
        run.claim(train.fingerprint)
        if (known := read_back(run)) is not None:
            return known
        tax = train.taxonomy
        lead = f"{tax.num_leaves} leaves, {tax.num_nodes} nodes; scores on {len(test)} test pictures"
        task = Task(
            run, load_base(config.model), train, test, cuts_for(tax), config.template, text=config.text, val=val
        )
        return fine_tuned(task, config, f"{name}: {len(train)} training pictures", lead)


def fine_tuned(task: Task, config: PaperConfig | CifarConfig, title: str, lead: str) -> dict:
    """Every loss of the settings beside zero-shot, calibrated on the validation pictures."""
    if config.fit.towers == "vision":
        task = replace(task, text=None)
    task = task.with_features()
    story = Story(
        title=title,
        lead=f"{config.model}, {lead}. Seed 0.",
        hint="adapters: {run}/seed-*/<row>/adapter",
        facts={"base model": config.model, "calibrated on": f"{len(task.val)} held-out pictures"},
        compared=[row for row in ("zero_shot", *config.rows) if row in ("leaf_ce", config.rows[-1])],
    )
    lines = [zero_shot_line(task), *trained_lines(task, config.rows, lambda row: config.fit)]
    return compare(task, lines, config.seeds, story)


def three_parts(parts: dict[str, PictureSet]) -> tuple[PictureSet, PictureSet, PictureSet]:
    """Train, validation and test pictures; a release without one of them gives a tenth of its training pictures.

    Raises:
        RunError: if there is nothing to train or to test on.
    """
    train, val, test = parts.get("train"), parts.get("val"), parts.get("test")
    if test is None:
        val, test = None, val
    if train is None or test is None or not len(train) or not len(test):
        found = ", ".join(f"{part}: {len(pictures)}" for part, pictures in parts.items())
        raise RunError(f"the data needs pictures to train and to test on, got {found}")
    if val is None or not len(val):
        split = stratified_split(train.targets, train.files, {"train": 0.9, "val": 0.1}, seed=0)
        train, val = train.select(split["train"]), train.select(split["val"])
    return train, val, test
