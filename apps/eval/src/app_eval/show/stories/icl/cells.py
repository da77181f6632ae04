"""Bits of the cells that `hier eval icl` keeps for a trained icl-mini, and what is claimed of them."""

from collections.abc import Mapping

import numpy as np

from app_eval.ask.demonstration_task import UNSEEDED
from app_eval.measure.interval import Interval, mean_over_seeds, over_seeds, resamples
from app_eval.show.page import Claim

__all__ = ["bits", "claim", "difference", "mean"]

Cell = tuple[str, int, str]


def bits(task: Mapping, selector: str, k: int, calibration: str = "none") -> np.ndarray | None:
    """1 where a query was answered rightly, (seeds, queries); None if it was not run. A "vote" needs no language model."""
    cells = [c for c in task["cells"] if (c["selector"], c["k"]) == (selector, k)]
    found = [one for c in cells if (one := c.get("vote") if calibration == "vote" else c["right"].get(calibration))]
    return np.array([[float(b) for b in one] for one in found]) if found else None


def mean(values: np.ndarray | None) -> Interval | None:
    """Percent of right answers (seeds, items), seeds averaged first, and its interval over items."""
    if values is None:
        return None
    averaged = values.mean(0)
    return mean_over_seeds([(averaged, np.ones(len(averaged)))], resamples(len(averaged))).times(100)


def difference(text: str, a: np.ndarray | None, b: np.ndarray | None, seeded: bool) -> Claim:
    """Two ways to do the same items, (seeds, items) each; over seeds only where a choice depends on the seed."""
    if a is None or b is None:
        return Claim(text, None, None, digits=1)
    seeds = None
    if seeded:
        # What has no chance in it stands against every seed; runs that were cut short are compared on the seeds both have.
        pairs = zip(a, b, strict=False) if min(len(a), len(b)) > 1 else ((x, y) for x in a for y in b)
        seeds = over_seeds([100 * (x.mean() - y.mean()) for x, y in pairs])
    return Claim(text, mean(np.atleast_2d(a.mean(0) - b.mean(0))), seeds, digits=1)


def claim(text: str, task: Mapping, ours: Cell, other: Cell) -> Claim:
    """Two ways to answer the same queries."""
    return difference(text, bits(task, *ours), bits(task, *other), not {ours[0], other[0]} <= set(UNSEEDED))
