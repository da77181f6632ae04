"""`hier eval blip MODEL --data DATA --out DIR`: any BLIP-2 on captioned pictures, comparable with any other.

Reference: Li et al., "BLIP-2", ICML 2023, sections 4.2 and 4.4 (captions by beam search; retrieval, 128 candidates re-ranked).
The same command goes on from what is done, see `app_eval.ask.benchmark_tables`.
"""

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app_data.sets.captions import CaptionedFile
from app_data.sets.coco import find_captions
from app_data.store.atomic import write_json
from app_data.store.cache import fingerprint
from app_data.store.digests import content_digests
from app_data.store.errors import DataError
from app_data.weights.blip2.files import stages, weight_files
from app_eval.ask.benchmark_tables import CAPTIONS, RETRIEVAL, Tables, kept_json, read_table
from app_eval.ask.settings import EvalBlip
from app_eval.measure.image_text import (
    caption_scores,
    full_radius_report,
    radius_controls,
    radius_scores,
    recall_scores,
)
from app_eval.measure.interval import Interval, Score, difference_of, interval_of, resamples, verdict

SETTINGS, RESULT = "settings.json", "result.json"
_STAGE = {"retrieval": "stage1", "radius": "stage1", "captions": "stage2"}
# The table of a task's numbers, a row for each picture; the radius comes out of the pass over the pictures for retrieval.
_TABLE = {"retrieval": RETRIEVAL, "radius": RETRIEVAL, "captions": CAPTIONS}
ABSENT = "SPICE and METEOR are absent: they need Java."


def run(config: EvalBlip) -> int:
    """The command."""
    for name, least in (("limit", 1), ("rerank", 0), ("batch_size", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise DataError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    files = _files(config)
    found = stages(config.model, config.base)
    tasks = _tasks(config, found, files)
    settings = {
        "format": 1,
        "data": _data(files, config.cache_dir),
        "n": len(files),
        "rerank": config.rerank,
        "dtype": config.dtype or "that of the files",
        "models": {stage: _identity([path, config.base], config.cache_dir) for stage, path in found.items()},
    }
    _claim(config.out, settings)
    other = None if config.against is None else _other(config.against, settings)
    work = Tables(config, files, found)
    for name, make in ((RETRIEVAL, work.retrieval), (CAPTIONS, work.captions)):
        if name in {_TABLE[task] for task in tasks} and not (config.out / name).exists():
            make()
    shutil.rmtree(config.out / "parts", ignore_errors=True)
    result = _result(config, settings, tasks, [file.style for file in files], other)
    write_json(config.out / RESULT, result)
    print(_page(result))  # noqa: T201
    return 0


def _files(config: EvalBlip) -> list[CaptionedFile]:
    files = find_captions(config.data, config.pictures, split=config.split, cache_dir=config.cache_dir)[: config.limit]
    if len({file.id for file in files}) < len(files):
        raise DataError("two pictures have the same id: give each its own")
    missing = [file for file in files if not file.path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} pictures do not exist, the first is {missing[0].path}: --pictures names their folder"
        )
    return files


def _tasks(config: EvalBlip, found: Mapping[str, Path], files: Sequence[CaptionedFile]) -> tuple[str, ...]:
    able = [task for task, stage in _STAGE.items() if stage in found]
    wrong = [task for task in config.tasks if task not in able]
    if wrong:
        raise DataError(f"{config.model} is a model for {' and '.join(able)}, not for {wrong[0]}")
    tasks = config.tasks or tuple(able)
    bare = sum(not file.captions for file in files)
    if bare and tasks != ("captions",):
        raise DataError(
            f"{bare} of {len(files)} pictures have no caption (those of a test server have none): only --tasks captions can be run"
        )
    return tasks


def _data(files: Sequence[CaptionedFile], cache_dir: Path | None) -> str:
    digests = content_digests([file.path for file in files], cache_dir)
    rows = [[f.id, f.style, f.captions, digest] for f, digest in zip(files, digests, strict=True)]
    return fingerprint({"captioned": rows})


def _identity(paths: Sequence[Path | None], cache_dir: Path | None) -> str:
    files = [file for path in paths if path is not None for file in weight_files(path)]
    return fingerprint({"model": [[f.name, d] for f, d in zip(files, content_digests(files, cache_dir), strict=True)]})


def _claim(out: Path, settings: dict) -> None:
    """The folder for these settings; a file of other settings is left alone."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out must name a folder, {out} is a file")
    known = kept_json(out / SETTINGS)
    done = out.exists() and any(path.name != SETTINGS for path in out.iterdir())
    if known is None and done:
        raise DataError(f"{out} is not empty and holds no evaluation: choose another folder with --out")
    changed = [name for name in settings if known is not None and known.get(name) != settings[name]]
    if changed and done:
        raise DataError(
            f"{out} holds an evaluation of other settings ({', '.join(changed)}): choose another folder with --out, or delete it"
        )
    if known is None or changed:  # where nothing is computed yet, a corrected command may go on
        write_json(out / SETTINGS, settings)


def _other(folder: Path, settings: dict) -> Path:
    """The other evaluation, if it was made on the same pictures and captions."""
    known = kept_json(folder / SETTINGS)
    if known is None or not (folder / RESULT).exists():
        raise DataError(f"--against {folder} holds no finished evaluation: name the --out of one")
    if known.get("data") != settings["data"]:
        raise DataError(f"--against {folder} was made on other pictures or captions: run it on these")
    return folder


def _scores(folder: Path, tasks: Sequence[str], styles: Sequence[str]) -> dict[str, Score]:
    """The scores of an evaluation, as functions of how often each picture is drawn."""
    found: dict[str, Score] = {}
    for task in tasks:
        path = folder / _TABLE[task]
        table = {name: value.numpy() for name, value in read_table(path).items()} if path.exists() else {}
        if table and task == "captions":
            found |= caption_scores(table, styles)
        elif table:
            found |= recall_scores(table) if task == "retrieval" else {**radius_scores(table), **_controlled(table)}
    return found


def _controlled(table: Mapping[str, np.ndarray]) -> dict[str, Score]:
    return {f"AUROC of errors by {title}": score for title, score in radius_controls(table).items()}


def _result(
    config: EvalBlip, settings: dict, tasks: Sequence[str], styles: Sequence[str], other: Path | None
) -> dict[str, Any]:
    counts = resamples(settings["n"])
    scores = _scores(config.out, tasks, styles)
    result: dict[str, Any] = {
        **settings,
        "model": str(config.model),
        "tasks": list(tasks),
        "absent": ["SPICE", "METEOR"] if "captions" in tasks else [],
        "scores": {name: _numbers(interval_of(score, counts)) for name, score in scores.items()},
    }
    if "radius" in tasks:
        table = {name: value.numpy() for name, value in read_table(config.out / _TABLE["radius"]).items()}
        (own,) = radius_scores(table).values()
        result["radius_minus"] = {
            title: _difference(own, score, counts) for title, score in radius_controls(table).items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is constant, such as the length of a single caption
            result["radius"] = _defined(full_radius_report(table, float(table["c"][0])))
    if other is not None:
        theirs = _scores(other, tasks, styles)
        shared = {name: score for name, score in scores.items() if name in theirs}
        result["against"] = {
            "model": kept_json(other / RESULT)["model"],
            "scores": {name: _numbers(interval_of(theirs[name], counts)) for name in shared},
            "differences": {name: _difference(score, theirs[name], counts) for name, score in shared.items()},
        }
    return result


def _numbers(interval: Interval) -> list[float | None]:
    return _defined(interval.as_json())


def _difference(ours: Score, other: Score, counts: np.ndarray) -> dict[str, Any]:
    found = difference_of(ours, other, counts)
    return {"interval": _numbers(found), "word": verdict(found, None)}


def _defined(value: Any) -> Any:
    """The same with None for what is not a number, as JSON has it."""
    if isinstance(value, dict):
        return {key: _defined(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(result: Mapping[str, Any]) -> str:
    """The numbers as one Markdown table."""
    against = result.get("against")
    heads = ["score", result["model"], *([against["model"], "difference", "word"] if against else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, numbers in result["scores"].items():
        digits = 3 if "AUROC" in name else 2
        cells = [name, _cell(numbers, digits)]
        if against and name in against["scores"]:
            difference = against["differences"][name]
            cells += [_cell(against["scores"][name], digits), _cell(difference["interval"], digits), difference["word"]]
        lines.append("| " + " | ".join([*cells, *[""] * (len(heads) - len(cells))]) + " |")
    lines.append(f"\n{result['n']} pictures; 95 % intervals by bootstrap over them.")
    for title, found in result.get("radius_minus", {}).items():
        lines.append(f"The radius against {title}: {_cell(found['interval'], 3)}, {found['word']}.")
    return "\n".join([*lines, *([ABSENT] if result["absent"] else [])])


def _cell(numbers: Sequence[float | None], digits: int) -> str:
    value, low, high = ("undefined" if x is None else f"{x:.{digits}f}" for x in numbers)
    return f"{value} [{low}, {high}]"
