"""Recipes on the data sets of the papers, with real CLIP weights: `cub`, `aircraft`, `butterfly`, `inaturalist`.

    python apps/train cub --data CUB_200_2011 --hierarchy cub_hierarchy.csv
    python apps/train aircraft --data fgvc-aircraft-2013b/data
    python apps/train butterfly --data Butterfly200
    python apps/train inaturalist --data inat2021 --text sampled

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

from pathlib import Path
from typing import Literal

from pydantic import Field

from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet
from app_data.read.splits import stratified_split
from app_data.sets.papers import load_aircraft, load_butterfly200, load_cub200, load_inaturalist
from app_train.core.config import FitConfig, Frozen, StageConfig, claim_folder
from app_train.core.errors import RunError
from app_train.core.interrupt import StopFlag
from app_train.recipes.lora.compare import Comparison, compare
from app_train.recipes.lora.rows import Bench, cuts_for, frozen_features, load_base, make_accelerator

RowName = Literal["leaf_ce", "level_ce", "tp_kl", "hisce", "both", "both_consistency"]


class ClipFit(FitConfig):
    """LoRA of rank 16 on queries and values of both towers."""

    lora: StageConfig = StageConfig(epochs=5, lr=2e-4, batch_size=64, weight_decay=0.01)
    """The LoRA layers, on the pictures."""
    rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    towers: Literal["vision", "text", "both"] = "both"
    save_every: int = Field(200, ge=1)
    """Steps between two checkpoints."""


class PaperConfig(Frozen):
    """Settings that all data sets share."""

    data: Path | None = None
    """Folder of the unpacked release (required)."""
    out: Path = Path("runs/paper")
    """Run folder; the same command goes on from what it holds."""
    model: str = "hf:openai/clip-vit-base-patch32"
    """Locator of the base model."""
    template: str = "a photo of a {}."
    """Prompt for each node."""
    rows: tuple[RowName, ...] = ("leaf_ce", "both")
    """Losses to train with."""
    seeds: int = Field(1, ge=1)
    """Seeds 0 .. seeds-1, one after the other."""
    text: Literal["live", "chunked", "sampled"] = "chunked"
    """How prompts become features while the text tower trains; ignored with --fit.towers vision, whose text is cached."""
    size: int = Field(224, ge=32)
    """Height and width of the decoded pictures in pixels."""
    fit: ClipFit = ClipFit()
    cache_dir: Path | None = None
    """Where decoded pictures are kept; the user's cache folder if not given."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


class CubConfig(PaperConfig):
    """CUB-200-2011 (Wah et al., 2011): order > family > species."""

    out: Path = Path("runs/cub")
    template: str = "a photo of a {}, a bird."
    hierarchy: Path | None = None
    """CSV with the columns order, family, species (required: the data set has no taxonomy of its own)."""


class AircraftConfig(PaperConfig):
    """FGVC-Aircraft (Maji et al., 2013): manufacturer > family > variant."""

    out: Path = Path("runs/aircraft")
    template: str = "a photo of a {}, an aircraft."


class ButterflyConfig(PaperConfig):
    """Butterfly-200 (Chen et al., 2018): family > subfamily > genus > species."""

    out: Path = Path("runs/butterfly")
    template: str = "a photo of a {}, a butterfly."


class InaturalistConfig(PaperConfig):
    """iNaturalist 2021 (Van Horn et al., 2021): seven levels, 10,000 species, 16,343 nodes."""

    out: Path = Path("runs/inaturalist")
    text: Literal["live", "chunked", "sampled"] = "sampled"
    """How prompts become features while the text tower trains."""


def run_cub(config: CubConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.hierarchy is None:
        raise RunError("--hierarchy is missing: name a CSV with the columns order, family, species")
    return _run("cub", config, lambda root, d: load_cub200(root, config.hierarchy, decoding=d))


def run_aircraft(config: AircraftConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    return _run("aircraft", config, load_aircraft)


def run_butterfly(config: ButterflyConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    return _run("butterfly", config, lambda root, d: load_butterfly200(root, decoding=d))


def run_inaturalist(config: InaturalistConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`; its released validation part is the test part here."""
    return _run("inaturalist", config, load_inaturalist)


def _run(name: str, config: PaperConfig, load) -> dict:
    if config.data is None:
        raise RunError("--data is missing: name the folder of the unpacked release")
    accelerator = make_accelerator(config.fit)
    with StopFlag() as stop:
        train, val, test = three_parts(load(config.data, Decoding(size=config.size, cache_dir=config.cache_dir)))
        if accelerator.is_main_process:
            claim_folder(config.out, config, train.fingerprint, ignored=("seeds", "rows"))
        accelerator.wait_for_everyone()
        bench = Bench(
            load_base(config.model), train, test, None, cuts_for(train.taxonomy), config.template, stop, accelerator,
            config.tensorboard, text=None if config.fit.towers == "vision" else config.text, val=val,
        )  # fmt: skip
        bench = bench.with_features(frozen_features(bench, train, "frozen features"))
        tax = train.taxonomy
        plan = Comparison(
            name, config.out, config.rows, config.seeds,
            title=f"{name}: {len(train)} training pictures",
            lead=f"{config.model}, {tax.num_leaves} leaves, {tax.num_nodes} nodes; scores on {len(test)} test pictures. Seed 0.",
            facts={"base model": config.model, "calibrated on": f"{len(val)} held-out pictures"},
        )  # fmt: skip
        return compare(bench, plan, lambda row: config.fit, config.model)


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
