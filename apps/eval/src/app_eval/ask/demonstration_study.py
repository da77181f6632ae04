"""Selection and calibration judged by a small language model that reads the demonstrations (recipe `icl-mini`).

Easy-VQA: questions about test pictures, demonstrations from the training part. Emoji: names that never trained, demonstrations by
two artists for the pictures of a third. An answer counts as right if it is the likeliest of the closed set. Of a model that was
trained on a taxonomy: questions at three levels, answered in the model's own words.
"""

import functools
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from app_data.store.atomic import write_json
from app_data.store.errors import DataError
from app_data.weights.llava import IclMini, Shown, load_icl_mini
from app_eval.ask.demonstration_task import (
    BLIND,
    CURVATURES,
    MU,
    OURS,
    UNSEEDED,
    ZERO,
    Task,
    easy_vqa_tasks,
    emoji_task,
)
from app_eval.ask.level_task import LevelTask, level_task
from app_eval.ask.pool import TrainLift
from app_eval.ask.settings import EvalIcl
from app_eval.measure.answers import AnswerReader, ExactReader
from app_eval.measure.interval import resamples
from hyper_icl import (
    DemoSelection,
    knn_vote,
)

__all__ = ["read_cell", "run_icl_study", "summary"]

FORMAT = 1
KS = (4, 2, 8)  # the middle one first, should the study be cut short
SEEDS, SELECTION_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4)
# Of the calibration. Chosen among four on 50 questions it was noise: the candidates differed by two answers.
STRENGTH = 1.0
CALIBRATED_K = 4  # calibration is tried at one K: three ways at every K would double the cost
_BATCH = 25


def read_cell(
    reader: AnswerReader | ExactReader,
    task: Task,
    found: DemoSelection | None,
    biases: dict[str, Tensor | None],
    blind: bool = False,
    before: dict[str, str] | None = None,
    keep: Callable[[dict[str, str]], None] = lambda right: None,
) -> dict[str, str]:
    """Which queries are answered rightly, as a string of 0 and 1 for each way of weighing the demonstrations.

    Args:
        reader: Of the task's answers.
        task: Pool and queries.
        found: The demonstrations; None for none.
        biases: See `AnswerReader.read`.
        blind: Show the mean picture in place of the query's.
        before: What an earlier call found before it was stopped.
        keep: Called with what is known after every batch.
    """
    right = dict(before or dict.fromkeys(biases, ""))
    mean = reader.model.llava.model.vision_tower.mean
    for start in range(len(next(iter(right.values()))), len(task.query), _BATCH):
        rows = range(start, min(start + _BATCH, len(task.query)))
        queries = [task.query[i] for i in rows]
        if blind:
            queries = [Shown(mean, shown.question, shown.answer) for shown in queries]
        demos = [[] if found is None else [task.pool[j] for j in found.ids[i].tolist()] for i in rows]
        batch = {name: None if bias is None else bias[rows.start : rows.stop] for name, bias in biases.items()}
        for name, found_right in reader.right(demos, queries, batch).items():
            right[name] += "".join(str(int(one)) for one in found_right)
        keep(right)
    return right


def _share(bits: str) -> float:
    return round(bits.count("1") / len(bits), 4)


def _cells(tasks: Sequence[Task], seeds: Sequence[int], ks: Sequence[int]) -> list[tuple[Task, str, int, int]]:
    """(task, selector, seed, K), so ordered that a run cut short holds whole comparisons: by seed, then K, then task."""
    cells = [(task, name, seeds[0], 0) for task in tasks for name in (ZERO, BLIND)]
    for seed in seeds:
        for k in ks:
            for task in tasks:
                names = [name for name in task.selectors() if seed == seeds[0] or name not in UNSEEDED]
                cells += [(task, name, seed, k) for name in names]
    return cells


def summary(task: dict) -> list[dict]:
    """Rows of the table: accuracy and differences with 95 % intervals over the queries, paired, seeds averaged first.

    Args:
        task: The JSON of one task with its "cells".

    Returns:
        Rows {"selector", "k", "calibration", "seeds", "accuracy", "to_zero_shot", "to_uncalibrated", "to_random", "to_ours",
        "vote", "to_vote", "kinds"}; intervals are [value, low, high].
    """
    grouped: dict[tuple, list[str]] = {}
    votes: dict[tuple, list[str]] = {}
    for cell in task["cells"]:
        for calibration, bits in cell["right"].items():
            grouped.setdefault((cell["selector"], cell["k"], calibration), []).append(bits)
        if cell.get("vote"):
            votes.setdefault((cell["selector"], cell["k"]), []).append(cell["vote"])
    if not grouped:
        return []
    mean = {key: np.array([[int(b) for b in bits] for bits in all_bits]).mean(0) for key, all_bits in grouped.items()}
    num = len(next(iter(mean.values())))
    counts = resamples(num) / num
    kinds = np.array(task["kinds"])

    def interval(values: np.ndarray) -> list[float]:
        low, high = np.percentile(counts @ values, (2.5, 97.5))
        return [round(float(x), 4) for x in (values.mean(), low, high)]

    rows = []
    for (selector, k, calibration), values in mean.items():
        row = {
            "selector": selector,
            "k": k,
            "calibration": calibration,
            "seeds": len(grouped[selector, k, calibration]),
        }
        row["accuracy"] = interval(values)
        references = {
            "to_zero_shot": (ZERO, 0, "none"),
            "to_uncalibrated": (selector, k, "none"),
            "to_random": ("random", k, calibration),
            "to_ours": (OURS, k, calibration),
        }
        for name, other in references.items():
            if other in mean and other != (selector, k, calibration):
                row[name] = interval(values - mean[other])
        if calibration == "none" and (selector, k) in votes:
            vote = np.array([[int(b) for b in bits] for bits in votes[selector, k]]).mean(0)
            row["vote"], row["to_vote"] = interval(vote), interval(values - vote)
        row["kinds"] = {kind: round(float(values[kinds == kind].mean()), 4) for kind in dict.fromkeys(task["kinds"])}
        rows.append(row)
    return rows


def run_icl_study(
    run: Path,
    path: Path,
    train_lift: TrainLift,
    *,
    quick: bool = False,
    num_queries: int = 200,
    seeds: Sequence[int] = SEEDS,
    emoji: bool = True,
    cache_dir: Path | None = None,
    make_tasks: Callable[[IclMini], list[Task]] | None = None,
    language: tuple | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Run the study and write its JSON after every cell; the same call goes on from what the file holds.

    Args:
        run: A finished run of `icl-mini`.
        path: The file.
        train_lift: Trains a lift on features and classes.
        quick: Tiny sizes: does it run.
        num_queries: Of each task.
        seeds: Of random demonstrations and of the lift.
        emoji: Also name emoji; a file that was begun without them takes them up.
        cache_dir: Where pictures and features are kept.
        make_tasks: Gives tasks; the real ones if None.
        language: Language model and tokenizer; SmolLM2-135M if None.
        log: Called with a line for every cell.

    Raises:
        DataError: Nothing trained lies there, or the file holds something else.
        MissingAssetError: A package is not installed.
    """
    model = load_icl_mini(run, language)
    levels = model.card.get("questions") == "taxonomy"
    num_queries, ks = (min(num_queries, 6), (2,)) if quick else (num_queries, KS[:1] if levels else KS)
    seeds = tuple(seeds)[:1] if quick else tuple(seeds)
    settings = {
        "format": FORMAT,
        "study": "icl-taxonomy" if levels else "icl-mini",
        "quick": quick,
        "model": model.card,
        "num_queries": num_queries,
        "seeds": list(seeds),
        "ks": list(ks),
        "mu": MU,
    }
    result = _resumed(path, settings)
    if make_tasks is None:
        size, lift = model.card["size"], functools.partial(train_lift, steps=5 if quick else 150)
        if levels:
            tasks: list[Task] = [level_task(size, cache_dir, lift)]
        else:
            tasks = [easy_vqa_tasks(size, cache_dir, 60 if quick else 4000, num_queries, lift)[0]]
        if emoji and model.card.get("emoji_answers_held_out"):
            tasks.append(emoji_task(model, size, cache_dir, num_queries, lift))
    else:
        tasks = make_tasks(model)
    begun, before = time.monotonic(), result.get("seconds", 0)

    def save() -> None:
        result["seconds"] = before + round(time.monotonic() - begun)
        scale = 20 if sys.platform == "darwin" else 10
        result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> scale
        for content in result["tasks"]:
            content["rows"] = summary(content)
        write_json(path, result)

    def keep(partial: dict) -> None:
        result["partial"] = partial
        write_json(path, result)

    result.setdefault("lambda", {kind: {"lambda": STRENGTH} for kind in CURVATURES})
    strength = {kind: result["lambda"][kind]["lambda"] for kind in CURVATURES}
    contents, readers = {}, {}
    for at, task in enumerate(tasks):
        content = next((t for t in result["tasks"] if t["name"] == task.name), None)
        if content is None:
            content = {
                "name": task.name,
                "num_pool": len(task.pool),
                "num_queries": len(task.query),
                "num_answers": len(task.answers),
                "selectors": list(task.selectors()),
                "kinds": list(task.query.kinds),
                "cells": [],
            }
            result["tasks"].append(content)
        if isinstance(task, LevelTask):
            # Without a model every query is cheap; the model reads the first of them.
            if "selection" not in content:
                content["selection"] = task.judged(SEEDS[:1] if quick else SELECTION_SEEDS, ks[0])
                save()
                log(f"{task.name}: {len(content['selection']['cells'])} selections judged without a model")
            tasks[at] = task = task.first(num_queries)
            content |= {"num_queries": len(task.query), "kinds": list(task.query.kinds)}
        contents[task.name], readers[task.name] = content, task.reader(model)
    for task, selector, seed, k in _cells(tasks, seeds, ks):
        cells = contents[task.name]["cells"]
        if not any((c["selector"], c["seed"], c["k"]) == (selector, seed, k) for c in cells):
            partial = result.get("partial", {})
            cells.append(_cell(readers[task.name], task, selector, seed, k, strength, partial, keep))
            result.pop("partial", None)
            save()
            log(f"{task.name}: {selector}, seed {seed}, K {k}: {_said(cells[-1])}")
    result["complete"] = True
    save()
    return result


def _cell(
    reader: AnswerReader | ExactReader,
    task: Task,
    selector: str,
    seed: int,
    k: int,
    strength: dict[str, float],
    partial: dict,
    keep: Callable[[dict], None],
) -> dict:
    """One cell; goes on from `partial` if that is of this cell, and hands what it knows to `keep` after every batch."""
    cell: dict = {"selector": selector, "seed": seed, "k": k}
    of = {"task": task.name, **cell}
    more = {
        "before": partial["right"] if partial.get("of") == of else None,
        "keep": lambda right: keep({"of": of, "right": right}),
    }
    if k == 0:
        return {**cell, "right": read_cell(reader, task, None, {"none": None}, selector == BLIND, **more)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = task.choose(selector, k, seed)
    biases: dict[str, Tensor | None] = {"none": None}
    if k == CALIBRATED_K and isinstance(reader, AnswerReader):
        biases |= {kind: task.bias(kind, found, seed, lam) for kind, lam in strength.items()}
    cell["right"] = read_cell(reader, task, found, biases, **more)
    voted = knn_vote(found, task.pool.answers)
    cell["vote"] = "".join(str(int(v == a)) for v, a in zip(voted, task.query.answers, strict=True))
    if selector.startswith("anchors"):
        cell["certified"] = bool(found.certified.all())
    return cell


def _said(cell: dict) -> str:
    return ", ".join(f"{name} {_share(bits):.3f}" for name, bits in cell["right"].items())


def _resumed(path: Path, settings: dict) -> dict:
    """What the file holds, or a new result; a file of other settings is left alone."""
    fresh = {**settings, "complete": False, "tasks": []}
    if not path.exists():
        return fresh
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is no JSON ({error}): delete it, or give another file") from error
    different = sorted(key for key, value in settings.items() if known.get(key) != value)
    if different:
        raise DataError(f"{path} holds another study ({', '.join(different)} differ): delete it, or give another file")
    return known


def run(config: EvalIcl, train_lift: TrainLift) -> int:
    """`hier eval icl` on a trained icl-mini, without --preset and --data."""
    queries = 200 if config.queries is None else config.queries
    if queries < 2:
        raise DataError(f"queries must be at least 2, got {queries}")
    if config.out is None:
        raise DataError("--out is missing: give a JSON file for the numbers")
    run_icl_study(
        Path(config.model),
        config.out,
        train_lift,
        quick=config.quick,
        num_queries=queries,
        emoji=config.emoji,
        log=_line,
    )
    return 0


def _line(text: str) -> None:
    print(text, flush=True)  # noqa: T201
