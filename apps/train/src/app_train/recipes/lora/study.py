"""Recipe `lora-study`: the experiments behind docs/results/hier-lora.md, on emoji and on few-shot CIFAR-100.

    python apps/train lora-study --data DIR               all of it; the same command goes on from what is there
    python apps/train lora-study --data DIR --minutes 9   stop after nine minutes
    python apps/train lora-study --estimate               print the plan and its cost, run nothing
    python apps/eval lora-page runs/lora-study docs/results/hier-lora.md

Most runs train the image head alone on cached features (seconds each); the `towers` runs train LoRA layers too.
Learning rates are chosen on validation pictures before anything reads the test pictures.
"""

import json
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from app_eval.measure.paths import per_picture
from app_eval.measure.results import save_outcome, write_json
from app_train.core.config import Frozen, claim_folder, config_hash
from app_train.core.errors import Interrupted, RunError
from app_train.core.interrupt import StopFlag
from app_train.recipes.lora.heads import HeadFit
from app_train.recipes.lora.rows import load_base
from app_train.recipes.lora.study_data import CIFAR_SIZE, EMOJI_SIZE, StudyData, load_study_data
from app_train.recipes.lora.study_plan import RATES, ROWS, Run, estimate, plan, tuning_plan
from app_train.recipes.lora.study_runs import Bank, carry_out

LOCATOR = "pip:lite0-minilm"
RESULT = "run.json"

DataName = Literal["emoji", "cifar100"]


class StudyConfig(Frozen):
    """The experiments of the hier-lora results page."""

    out: Path = Path("runs/lora-study")
    """Study folder; the same command goes on from what it holds."""
    data: Path | None = None
    """Folder of the few-shot CIFAR-100 set (cifar100_fewshot.tar.gz and trees/cifar100.json); without it emoji alone."""
    only: tuple[DataName, ...] = ("emoji", "cifar100")
    """Data sets to use."""
    experiments: tuple[str, ...] = ()
    """Experiments to run, such as main or update; all if not given."""
    seeds: int = Field(5, ge=1)
    """Seeds of the main table."""
    few: int = Field(2, ge=1)
    """Seeds of all other experiments."""
    epochs: int = Field(20, ge=1)
    """Epochs of the head."""
    batch_size: int = Field(256, ge=1)
    """Pictures per step of the head."""
    minutes: float | None = Field(None, gt=0)
    """Start no run after so many minutes."""
    estimate: bool = False
    """Print the plan and its cost, and run nothing."""
    cache_dir: Path | None = None
    """Where decoded pictures are kept; the user's cache folder if not given."""


def run(config: StudyConfig) -> dict:
    """Run what is missing; returns counts of finished and missing runs."""
    names = [name for name in config.only if name == "emoji" or config.data is not None]
    runs = [*tuning_plan(names), *plan(names, config.seeds, config.few)]
    known = {run.experiment for run in runs}
    unknown = sorted(set(config.experiments) - known)
    if unknown:
        raise RunError(f"--experiments names {unknown[0]!r}; the experiments are {', '.join(sorted(known))}")
    if config.experiments:
        runs = [run for run in runs if run.experiment in config.experiments or run.experiment == "tuning"]
    missing = [run for run in runs if not (config.out / run.folder / RESULT).exists()]
    print(f"{len(missing)} of {len(runs)} runs are missing:\n{estimate(missing)}", flush=True)  # noqa: T201
    if config.estimate:
        return {"missing": len(missing), "runs": len(runs)}
    start = time.monotonic()
    with StopFlag() as stop:
        bank = _bank(config, names, stop)
        for number, one in enumerate(missing):
            if stop.exit_status is not None:
                raise Interrupted(stop.exit_status)
            if config.minutes is not None and time.monotonic() - start > 60 * config.minutes:
                print(f"stopped after {config.minutes:g} minutes; the same command goes on", flush=True)  # noqa: T201
                return {"missing": len(missing) - number, "runs": len(runs)}
            _carry_out(one, bank, config)
    print(f"all done; page: python apps/eval lora-page {config.out} PAGE.md")  # noqa: T201
    return {"missing": 0, "runs": len(runs)}


def _bank(config: StudyConfig, names: list[str], stop: StopFlag) -> Bank:
    base = load_base(LOCATOR)
    data = {name: load_study_data(name, base, config.out / "features", config.data, config.cache_dir) for name in names}
    identity = {name: f"{d.train.pictures.fingerprint}-{d.test.pictures.fingerprint}" for name, d in data.items()}
    for name, found in data.items():
        _describe(config.out / name, config, found, identity[name])
    return Bank(base, data, HeadFit(config.epochs, config.batch_size), stop)


def _describe(folder: Path, config: StudyConfig, data: StudyData, identity: str) -> None:
    """What the page says about a data set; also refuses to mix two versions of the data in one folder."""
    settings = config.model_copy(update={"out": folder})
    free = ("seeds", "few", "minutes", "estimate", "experiments", "only", "cache_dir", "out", "data")
    claim_folder(folder, settings, identity, ignored=free)
    tax = data.taxonomy
    write_json(
        folder / "data.json",
        {
            "name": data.name,
            "fingerprint": identity,
            "train": len(data.train.targets),
            "test": len(data.test.targets),
            "pixels": EMOJI_SIZE if data.name == "emoji" else CIFAR_SIZE,
            "levels": list(tax.level_sizes),
            "leaves": tax.num_leaves,
            "tree": tax.to_json(),
        },
    )


def _carry_out(one: Run, bank: Bank, config: StudyConfig) -> None:
    folder = config.out / one.folder
    folder.mkdir(parents=True, exist_ok=True)
    rate = one.options.get("rate") or (RATES[0] if one.kind == "fixed" else _chosen(config.out, one.data, one.rate_of))
    started, cpu = time.monotonic(), time.process_time()
    work = bank
    if one.experiment == "tuning":
        work = Bank(bank.base, {one.data: bank.data[one.data].validation()}, bank.head, bank.stop)
        work._models, work._fresh = bank._models, bank._fresh
    if one.kind == "towers":
        one.options["folder"] = str(folder)
    found = carry_out(one, work, rate)
    for name, (result, facts) in found.items():
        (folder / name).mkdir(exist_ok=True)
        save_outcome(folder / name, result)
        write_json(folder / name / "facts.json", facts)
    seconds = {"wall": round(time.monotonic() - started, 1), "cpu": round(time.process_time() - cpu, 1)}
    tax = bank.data[one.data].taxonomy
    first = next(iter(found.values()))[0]
    ahd = None
    if "leaves" not in one.options:
        top, bottom = per_picture(first, tax, "bottom_up")["ahd"]
        ahd = float(top.sum() / bottom.sum())
    options = {k: v for k, v in one.options.items() if k != "folder"}
    content = {
        "format": 1, "experiment": one.experiment, "data": one.data, "row": one.row, "seed": one.seed, "kind": one.kind,
        "loss": one.loss.model_dump(), "rate": rate, "options": options, "parts": list(found), "seconds": seconds,
        "ahd": ahd, "config": config_hash(one.loss, epochs=config.epochs, batch=config.batch_size, rate=rate),
    }  # fmt: skip
    write_json(folder / RESULT, content)
    print(f"{one.folder}: AHD@1 {ahd if ahd is None else round(ahd, 4)}, {seconds['cpu']:.0f} s CPU", flush=True)  # noqa: T201


def _chosen(out: Path, data: str, row: str) -> float:
    """The learning rate with the least AHD@1 on validation.

    Raises:
        RunError: if a tuning run is missing.
    """
    trials = []
    for rate in RATES:
        path = out / "tuning" / data / f"{row}-{rate:g}" / "seed-0" / RESULT
        if not path.exists():
            raise RunError(f"{path} is missing: run the experiment tuning first")
        trials.append((json.loads(path.read_text(encoding="utf-8"))["ahd"], rate))
    return min(trials)[1]


__all__ = ["ROWS", "StudyConfig", "run"]
