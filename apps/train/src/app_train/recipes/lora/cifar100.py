"""Recipe `cifar100-fewshot`: 20 pictures per class of CIFAR-100 under the WordNet tree of ProTeCt; runs offline.

    python apps/train cifar100-fewshot --data DIR                  (cifar100_fewshot.tar.gz and trees/cifar100.json)
    python apps/train cifar100-fewshot --data DIR --shots 5 --seeds 3

Two pictures per class calibrate the probabilities of the saved models and are not trained on.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from app_data.read.labelled import Decoding
from app_data.sets.cifar100 import load_cifar100_fewshot, take_shots
from app_train.core.config import FitConfig, Frozen, HeadStageConfig, StageConfig, claim_folder
from app_train.core.errors import RunError
from app_train.core.interrupt import StopFlag
from app_train.recipes.lora.compare import Comparison, compare
from app_train.recipes.lora.rows import Bench, frozen_features, load_base, make_accelerator

RowName = Literal["leaf_ce", "level_ce", "tp_kl", "hisce", "both", "both_consistency"]


class CifarFit(FitConfig):
    """The head alone for twenty epochs, then one epoch with LoRA."""

    head: HeadStageConfig = HeadStageConfig(epochs=20, lr=1e-2, batch_size=256)
    """The projection alone, on frozen picture features that are computed once."""
    lora: StageConfig = StageConfig(epochs=1)
    """The projection and the LoRA layers, on the pictures."""


class CifarConfig(Frozen):
    """Few-shot CIFAR-100 under the WordNet tree of ProTeCt."""

    data: Path | None = None
    """Folder with cifar100_fewshot.tar.gz and trees/cifar100.json (required)."""
    tree: Path | None = None
    """The tree, if it stands elsewhere."""
    out: Path = Path("runs/cifar100-fewshot")
    """Run folder; the same command goes on from what it holds."""
    model: str = "pip:lite0-minilm"
    """Locator of the base model."""
    template: str = "a picture of {}."
    """Prompt for each node."""
    rows: tuple[RowName, ...] = ("leaf_ce", "level_ce", "tp_kl", "hisce", "both")
    """Losses to train with."""
    shots: int = Field(18, ge=1)
    """Training pictures per class."""
    calibration_shots: int = Field(2, ge=1)
    """Pictures per class that calibrate the probabilities."""
    test_shots: int = Field(50, ge=1)
    """Test pictures per class."""
    size: int = Field(64, ge=32)
    """Height and width of the pictures in pixels (the originals have 32)."""
    seeds: int = Field(1, ge=1)
    """Seeds 0 .. seeds-1, one after the other."""
    fit: CifarFit = CifarFit()
    cache_dir: Path | None = None
    """Where decoded pictures are kept; the user's cache folder if not given."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


def run(config: CifarConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.data is None:
        raise RunError("--data is missing: name the folder with cifar100_fewshot.tar.gz and trees/cifar100.json")
    accelerator = make_accelerator(config.fit)
    with StopFlag() as stop:
        decoding = Decoding(size=config.size, cache_dir=config.cache_dir)
        everything, test, cuts = load_cifar100_fewshot(config.data, config.tree, decoding)
        held_out, rest = take_shots(everything, config.calibration_shots)
        val, train = everything.select(held_out), everything.select(rest)
        train = train.select(take_shots(train, config.shots)[0])
        test = test.select(take_shots(test, config.test_shots)[0])
        if accelerator.is_main_process:
            claim_folder(config.out, config, f"{train.fingerprint}-{test.fingerprint}", ignored=("seeds", "rows"))
        accelerator.wait_for_everyone()
        text = None if config.fit.towers == "vision" else "chunked"
        bench = Bench(
            load_base(config.model), train, test, None, cuts, config.template, stop, accelerator, config.tensorboard,
            text=text, val=val,
        )  # fmt: skip
        bench = bench.with_features(frozen_features(bench, train, "frozen features"))
        plan = Comparison(
            "cifar100-fewshot", config.out, config.rows, config.seeds,
            title="Few-shot CIFAR-100",
            lead=f"{config.model}, {len(train)} training and {len(test)} test pictures, the WordNet tree and 25 cuts of ProTeCt. Seed 0.",
            facts={"base model": config.model, "calibrated on": f"{len(val)} held-out pictures"},
        )  # fmt: skip
        return compare(bench, plan, lambda row: config.fit, config.model)
