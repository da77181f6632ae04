"""The cells of a results table: scores item by item, kept in folders; what the seeds of a row give together; its Markdown.

A cell is one row under one seed. Its folder holds `scores.safetensors` and, written last, `result.json`: a command that was stopped
computes only what has none. Rows are compared by paired differences over items (bootstrap) and over seeds (Student's t).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from app_data.store.atomic import new_file
from app_data.store.errors import DataError
from app_data.store.sealed import read_sealed, seal_broken, write_sealed
from app_eval.measure.interval import (
    Interval,
    Pair,
    mean_over_seeds,
    over_seeds,
    paired_difference,
    resamples,
    verdict,
)

RESULT = "result.json"
_FILE = "scores.safetensors"

Scores = Mapping[str, np.ndarray]
Parts = Mapping[str, Scores]


def keep(folder: Path, parts: Parts, facts: Mapping[str, object]) -> dict:
    """Write the scores of every item and, last, `result.json`; returns the latter's content."""
    with new_file(folder / _FILE) as temporary:
        save_file({f"{part}.{score}": v for part, found in parts.items() for score, v in found.items()}, temporary)
    scores = {part: {score: float(v.mean()) for score, v in found.items()} for part, found in parts.items()}
    return write_sealed(folder / RESULT, {**facts, "scores": scores}, beside=True)


def kept(folder: Path) -> Parts:
    """The scores of every item of a finished cell."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, values in load_file(folder / _FILE).items():
        part, _, score = name.partition(".")
        parts.setdefault(part, {})[score] = values
    return parts


def finished(folder: Path, facts: Mapping[str, object], name: str = RESULT) -> dict | None:
    """The stored result of a finished row; None if it is not finished.

    Raises:
        DataError: if a file of the row is damaged or missing, or the row belongs to other settings.
    """
    path = folder / name
    if not path.exists():
        return None
    result = read_sealed(path)
    if broken := seal_broken(path):
        raise DataError(f"{folder / broken} is damaged or missing; delete {folder} and run the same command again")
    different = sorted(k for k, v in facts.items() if result.get(k) != v)
    if different:
        raise DataError(
            f"{path} belongs to another run ({', '.join(different)} differ); choose another folder with --out"
        )
    return result


def _pairs(by_seed: Sequence[Scores], score: str) -> list[Pair]:
    return [(found[score], np.ones(len(found[score]))) for found in by_seed]


def means(by_seed: Sequence[Scores], scores: Sequence[str]) -> dict[str, Interval]:
    """Mean over seeds of every score, with its bootstrap interval over the items."""
    counts = resamples(len(by_seed[0][scores[0]]), num=1000)
    return {score: mean_over_seeds(_pairs(by_seed, score), counts) for score in scores}


def differences(ours: Sequence[Scores], other: Sequence[Scores], scores: Sequence[str]) -> dict[str, Interval]:
    """Paired difference of every score, mean over seeds, with its bootstrap interval over the items."""
    counts = resamples(len(ours[0][scores[0]]), num=1000)
    return {s: paired_difference(_pairs(ours, s), _pairs(other, s), counts) for s in scores}


def summary(own: Sequence[Scores], scores: Sequence[str]) -> dict[str, dict]:
    """Of every score the mean over seeds with its interval, and the standard deviation over seeds."""
    return {
        s: {"mean": interval.as_json(), "deviation": deviation([float(x[s].mean()) for x in own])}
        for s, interval in means(own, scores).items()
    }


def against(
    ours: Sequence[Scores], other: Sequence[Scores], scores: Sequence[str], seeded: bool = True
) -> dict[str, dict]:
    """The difference of two rows: items are paired, and so are seeds.

    Args:
        ours: of each seed.
        other: of the row to compare with.
        scores: which ones.
        seeded: whether a seed changes either row; else items alone decide.
    """
    items = differences(ours, other, scores)
    seeds = [{s: float(a[s].mean() - b[s].mean()) for s in scores} for a, b in zip(ours, other, strict=True)]
    return {s: judged(items[s], [x[s] for x in seeds] if seeded else ()) for s in scores}


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None of one seed."""
    return round(float(np.std(values, ddof=1)), 6) if len(values) > 1 else None


def judged(items: Interval | None, seeds: Sequence[float]) -> dict:
    """A difference over items and over seeds (none where nothing depends on a seed), as JSON, with its word."""
    over = over_seeds(seeds) if seeds else None  # of one seed it has no bounds, and decides nothing
    shown = {"items": items, "seeds": over if len(seeds) > 1 else None}
    return {name: None if v is None else v.as_json() for name, v in shown.items()} | {"word": verdict(items, over)}


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cell_value(found: Mapping | None) -> str:
    """A mean in percent, with its deviation over seeds."""
    if found is None:
        return ""
    spread = found["deviation"]
    return f"{100 * found['mean'][0]:.2f}" + ("" if spread is None else f" +- {100 * spread:.2f}")


def cell_difference(found: Mapping | None) -> str:
    """A difference in percent: its intervals and its word."""
    if found is None:
        return ""
    shown = [found[name] for name in ("items", "seeds") if found[name] is not None]
    if not shown:
        return found["word"]
    value = 100 * shown[0][0]
    return (
        f"{value:+.2f} " + "; ".join(f"[{100 * lo:+.2f}, {100 * hi:+.2f}]" for _, lo, hi in shown) + f" {found['word']}"
    )
