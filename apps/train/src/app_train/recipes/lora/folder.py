"""Recipe `lora`: fine-tune a dual encoder on your own folder of pictures with your own taxonomy.

    python apps/train lora --data.images DIR --data.taxonomy FILE
    python apps/eval predict RUN PICTURE...

Without `--data.taxonomy` the nested folders are the taxonomy. Test pictures score the zero-shot model and the trained one;
validation pictures, where there are any, calibrate its probabilities.
"""

import json
from pathlib import Path

from accelerate import Accelerator
from pydantic import Field

from app_data.read.folder import load_folder
from app_data.read.pictures import PictureSet
from app_eval.measure.results import load_outcome, text_table, write_json
from app_eval.show.report import ReportContent, write_report
from app_train.core.config import FitConfig, Frozen, LossConfig, claim_folder, config_hash
from app_train.core.errors import RunError
from app_train.core.interrupt import StopFlag
from app_train.core.records import read_records
from app_train.recipes.lora.rows import (
    Bench,
    build_model,
    cuts_for,
    finished,
    frozen_features,
    load_base,
    make_accelerator,
    score_row,
    train_row,
)


class FolderConfig(Frozen):
    """Where the pictures and the taxonomy are."""

    images: Path | None = None
    """Folder of pictures (required)."""
    taxonomy: Path | None = None
    """CSV or JSON tree; the nested folders themselves if not given."""
    listing: Path | None = None
    """CSV with the header path,leaf in place of class folders."""
    size: int = Field(128, ge=32)
    """Height and width of the pictures in pixels."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Budget of unreadable files, as a share; ten are always allowed."""
    cache_dir: Path | None = None
    """Where decoded pictures are kept; the user's cache folder if not given."""


class LoraConfig(Frozen):
    """Fine-tune on your own folder of pictures with your own taxonomy."""

    data: FolderConfig = FolderConfig()
    out: Path = Path("runs/lora")
    """Run folder; the same command goes on from what it holds."""
    model: str = "pip:lite0-minilm"
    """Locator of the base model."""
    template: str = "a picture of {}."
    """Prompt for each node."""
    loss: LossConfig = LossConfig(level=1)
    fit: FitConfig = FitConfig()
    seed: int = Field(0, ge=0)
    """Seed of the split, the order of the data and the LoRA layers."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


def run(config: LoraConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.data.images is None:
        raise RunError("--data.images is missing: name the folder of pictures")
    if not any(config.loss.model_dump(exclude={"eps"}).values()):
        raise RunError("all weights of --loss are 0: nothing would be trained")
    accelerator = make_accelerator(config.fit)
    with StopFlag() as stop:
        parts = load_folder(
            config.data.images,
            config.data.taxonomy,
            listing=config.data.listing,
            size=config.data.size,
            seed=config.seed,
            cache_dir=config.data.cache_dir,
            max_bad_fraction=config.data.max_bad_fraction,
        )
        if "train" not in parts:
            raise RunError(
                f"{config.data.images} has no train/ folder beside {', '.join(f'{p}/' for p in parts)}: add one"
            )
        train, test = parts["train"], parts.get("test", parts.get("val"))
        if test is None or len(test) == 0:
            raise RunError(f"{config.data.images} leaves no picture to test on: add pictures or a test/ folder")
        if accelerator.is_main_process:
            claim_folder(config.out, config, train.fingerprint)
            _list_skipped(config.out, parts)
        accelerator.wait_for_everyone()
        val = parts["val"] if "test" in parts and "val" in parts else None
        return _train_and_score(config, train, val, test, stop, accelerator)


def _list_skipped(out: Path, parts: dict[str, PictureSet]) -> None:
    skipped = {(s.path, s.reason) for part in parts.values() for s in part.skipped}
    lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in sorted(skipped)]
    (out / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    if skipped:
        print(f"{len(skipped)} files could not be read: see {out / 'skipped.jsonl'}")  # noqa: T201


def _train_and_score(
    config: LoraConfig,
    train: PictureSet,
    val: PictureSet | None,
    test: PictureSet,
    stop: StopFlag,
    accelerator: Accelerator,
) -> dict:
    base = load_base(config.model)
    cuts = cuts_for(train.taxonomy)
    bench = Bench(base, train, test, None, cuts, config.template, stop, accelerator, config.tensorboard, val=val)
    bench = bench.with_features(frozen_features(bench, train, "frozen features"))
    hashed = config_hash(config.fit, loss=config.loss.model_dump(), model=config.model, template=config.template)
    rows = {}
    if accelerator.is_main_process:
        facts = {"recipe": "lora", "row": "zero_shot", "data": train.fingerprint, "config": hashed}
        folder = config.out / "zero_shot"
        folder.mkdir(parents=True, exist_ok=True)
        known = finished(folder, facts)
        rows["zero-shot"] = known or score_row(
            bench, build_model(bench, None, config.seed), folder, seed=config.seed, facts=facts
        )
    facts = {"recipe": "lora", "row": "trained", "data": train.fingerprint, "config": hashed}
    rows["trained"] = train_row(bench, "training", config.loss, config.fit, config.out / "trained", config.seed, facts)
    if not accelerator.is_main_process:
        return {}
    outcomes = {"zero-shot": load_outcome(config.out / "zero_shot"), "trained": load_outcome(config.out / "trained")}
    write_report(
        config.out / "report.html",
        ReportContent(
            title=f"{config.data.images.name}: {len(train)} training pictures",
            lead=f"{config.model}, fine-tuned; scores on {len(test)} pictures that were not trained on.",
            rows=rows,
            outcomes=outcomes,
            records={"trained": read_records(config.out / "trained" / "metrics.jsonl")},
            test=test,
            compared=("zero-shot", "trained"),
            facts={
                "data": train.fingerprint,
                "skipped files": str(len(train.skipped)),
                "probabilities": "not calibrated" if val is None else f"calibrated on {len(val)} held-out pictures",
                "settings": "config.resolved.yaml",
            },
        ),
    )
    result = {"format": 1, "recipe": "lora", "data": train.fingerprint, "n": len(test), "rows": rows}
    write_json(config.out / "result.json", result)
    print(text_table(rows))  # noqa: T201
    print(f"\nreport: {config.out / 'report.html'}")  # noqa: T201
    print(f"predict: python apps/eval predict {config.out} PICTURE...")  # noqa: T201
    return result
