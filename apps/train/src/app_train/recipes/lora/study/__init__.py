"""Recipe `lora-study`: the experiments behind docs/results/hier-lora.md, on emoji and on few-shot CIFAR-100.

    hier train lora-study --data DIR               all of it; the same command goes on from what is there
    hier train lora-study --data DIR --minutes 9   stop after nine minutes
    hier train lora-study --estimate               print the plan and its cost, run nothing
    hier page lora runs/lora-study docs/results/hier-lora.md

Most runs train the image head alone on cached features (seconds each); the `towers` runs train LoRA layers too.
Learning rates are chosen on validation pictures before anything reads the test pictures.
"""

import json
import time
from pathlib import Path

from app_data.store.atomic import write_json
from app_data.store.sealed import read_sealed, write_sealed
from app_eval.measure.cells import finished
from app_eval.measure.paths import per_picture
from app_eval.measure.results import save_outcome
from app_train.core.config import StageConfig, config_hash
from app_train.core.errors import RunError
from app_train.core.run_folder import Run
from app_train.recipes.lora.settings import LITE0, StudyConfig
from app_train.recipes.lora.study.data import CIFAR_SIZE, EMOJI_SIZE, StudyData, load_study_data
from app_train.recipes.lora.study.plan import RATES, Trial, estimate, plan, tuning_plan
from app_train.recipes.lora.study.runs import Bank, carry_out
from app_train.recipes.lora.task import load_base

RESULT = "run.json"
# Kinds of runs that no learning rate of the tuning is for.
UNTUNED = ("fixed", "frozen")


def run(config: StudyConfig) -> dict:
    """Run what is missing; returns counts of finished and missing runs."""
    names = [name for name in config.only if name == "emoji" or config.data is not None]
    trials = [*tuning_plan(names), *plan(names, config.seeds, config.few)]
    known = {trial.experiment for trial in trials}
    unknown = sorted(set(config.experiments) - known)
    if unknown:
        raise RunError(f"--experiments names {unknown[0]!r}; the experiments are {', '.join(sorted(known))}")
    if config.experiments:
        chosen = [t for t in trials if t.experiment in config.experiments]
        tuned = any(t.kind not in UNTUNED for t in chosen)
        trials = [t for t in trials if t in chosen or (tuned and t.experiment == "tuning")]
    missing = [trial for trial in trials if finished(config.out / trial.folder, {}, RESULT) is None]
    print(f"{len(missing)} of {len(trials)} runs are missing:\n{estimate(missing)}", flush=True)  # noqa: T201
    if config.estimate:
        return {"missing": len(missing), "runs": len(trials)}
    start = time.monotonic()
    grows = ("seeds", "few", "minutes", "estimate", "experiments", "only", "data")
    with Run("lora-study", config, grows, processes=False) as run:
        run.claim("see data.json of each data set")
        bank = _bank(config, run, names)
        for number, trial in enumerate(missing):
            run.check()
            if config.minutes is not None and time.monotonic() - start > 60 * config.minutes:
                print(f"stopped after {config.minutes:g} minutes; the same command goes on", flush=True)  # noqa: T201
                return {"missing": len(missing) - number, "runs": len(trials)}
            _carry_out(trial, bank, config)
        result = run.finish({"missing": 0, "runs": len(trials)})
        run.seal()
    print(f"all done; page: hier page lora {config.out} PAGE.md")  # noqa: T201
    return result


def _bank(config: StudyConfig, run: Run, names: list[str]) -> Bank:
    base = load_base(LITE0)
    data = {name: load_study_data(name, base, config.data, config.cache_dir) for name in names}
    for name, chosen in data.items():
        _describe(config.out / name / "data.json", chosen)
    return Bank(base, data, StageConfig(epochs=config.epochs, batch_size=config.batch_size), run)


def _describe(path: Path, data: StudyData) -> None:
    """What the page says about a data set; also refuses to mix two versions of the data in one folder."""
    identity, tax = f"{data.train.pictures.fingerprint}-{data.test.pictures.fingerprint}", data.taxonomy
    if path.exists() and (known := read_sealed(path).get("fingerprint")) != identity:
        raise RunError(f"{path} belongs to other data ({known} -> {identity}); choose another folder with --out")
    write_sealed(
        path,
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


def _carry_out(one: Trial, bank: Bank, config: StudyConfig) -> None:
    folder = config.out / one.folder
    folder.mkdir(parents=True, exist_ok=True)
    rate = one.options.get("rate") or (RATES[0] if one.kind in UNTUNED else _chosen(config.out, one.data, one.rate_of))
    started, cpu = time.monotonic(), time.process_time()
    work = bank
    if one.experiment == "tuning":
        work = Bank(bank.base, {one.data: bank.data[one.data].validation()}, bank.head, bank.run)
        work._models, work._fresh = bank._models, bank._fresh
    if one.kind == "towers":
        one.options["folder"] = str(folder)
    outcomes = carry_out(one, work, rate)
    for name, (result, facts) in outcomes.items():
        (folder / name).mkdir(exist_ok=True)
        save_outcome(folder / name, result)
        write_json(folder / name / "facts.json", facts)
    seconds = {"wall": round(time.monotonic() - started, 1), "cpu": round(time.process_time() - cpu, 1)}
    tax = bank.data[one.data].taxonomy
    first = next(iter(outcomes.values()))[0]
    ahd = None
    if "leaves" not in one.options:
        top, bottom = per_picture(first, tax, "bottom_up")["ahd"]
        ahd = float(top.sum() / bottom.sum())
    options = {k: v for k, v in one.options.items() if k != "folder"}
    content = {
        "format": 1, "experiment": one.experiment, "data": one.data, "row": one.row, "seed": one.seed, "kind": one.kind,
        "loss": one.loss.model_dump(), "rate": rate, "options": options, "parts": list(outcomes), "seconds": seconds,
        "ahd": ahd, "config": config_hash(one.loss, epochs=config.epochs, batch=config.batch_size, rate=rate),
    }  # fmt: skip
    write_sealed(folder / RESULT, content, beside=True)
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
