"""Intervals of means and of differences, and the one rule that turns them into a word.

Percentile bootstrap over items (Efron, 1979); Student's t over seeds, of paired differences or of two groups (Welch, 1947).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WORDS = ("better", "worse", "undecided", "not run")

Pair = tuple[np.ndarray, np.ndarray]
# How often each picture is drawn (resamples, pictures) -> value of a score in each resample.
Score = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def read(cls, stored: Sequence[float | None] | None) -> "Interval | None":
        """From [value, low, high] in a JSON file, where an undefined number is null; None if it was not measured."""
        return None if stored is None else cls(*(math.nan if x is None else x for x in stored))

    def __neg__(self) -> "Interval":
        return Interval(-self.value, -self.high, -self.low)

    def times(self, factor: float) -> "Interval":
        """In another unit, such as percent; the factor is above 0."""
        return Interval(factor * self.value, factor * self.low, factor * self.high)

    def as_json(self) -> list[float]:
        """[value, low, high], rounded to six digits."""
        return [round(x, 6) for x in (self.value, self.low, self.high)]


def verdict(
    items: Interval | None, seeds: Interval | None, lower_is_better: bool = False, premise: str = "better"
) -> str:
    """What a difference to another row is called, on every results page.

    Better or worse where every interval at hand lies on one side of 0; the bounds of a score that is undefined decide nothing.

    Args:
        items: of the difference, over test items; None if it was not measured item by item.
        seeds: of the difference, over seeds; None if nothing in the rows depends on a seed, or it was not kept.
        lower_is_better: for scores such as distances.
        premise: the word of what must hold before anything is ranked, such as that the plain row beats the untrained one.

    Returns:
        One of `WORDS`; "not run" where there is no interval at all.

    >>> verdict(Interval(0.2, 0.1, 0.3), Interval(0.2, 0.05, 0.35))
    'better'
    >>> verdict(Interval(0.2, 0.1, 0.3), Interval(0.2, -0.05, 0.45))
    'undecided'
    """
    known = [interval for interval in (items, seeds) if interval is not None]
    if not known:
        return "not run"
    if premise != "better":
        return "undecided"
    if all(interval.low > 0 for interval in known):
        return "worse" if lower_is_better else "better"
    if all(interval.high < 0 for interval in known):
        return "better" if lower_is_better else "worse"
    return "undecided"


def over_seeds(differences: Sequence[float]) -> Interval:
    """Mean of the differences, one for each seed, and its interval by Student's t; of one seed it has no bounds."""
    value, num = float(np.mean(differences)), len(differences)
    if num < 2:
        return Interval(value, -math.inf, math.inf)
    half = _quantile(num - 1) * float(np.std(differences, ddof=1)) / math.sqrt(num)
    return Interval(value, value - half, value + half)


def unpaired(ours: tuple[float, float | None, int], other: tuple[float, float | None, int]) -> Interval:
    """Difference of two means that were not paired, by Welch's t: wider than the paired one where pairs go together.

    Args:
        ours: mean, standard deviation (None if unknown, 0 if nothing varies) and number.
        other: the same of the other.
    """
    value, deviations = ours[0] - other[0], (ours[1], other[1])
    if None in deviations:
        return Interval(value, -math.inf, math.inf)
    parts = [(sd**2 / num, num) for _, sd, num in (ours, other) if sd]
    variance = sum(part for part, _ in parts)
    if not variance:
        return Interval(value, value, value)
    freedom = variance**2 / sum(part**2 / (num - 1) for part, num in parts)
    half = _quantile(freedom) * math.sqrt(variance)
    return Interval(value, value - half, value + half)


def _quantile(freedom: float) -> float:
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    return float(stdtrit(freedom, 0.975))


def resamples(num_pictures: int, num: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each picture is drawn in each bootstrap resample, (num, num_pictures)."""
    generator = np.random.default_rng([seed, num_pictures])
    return generator.multinomial(num_pictures, np.full(num_pictures, 1 / num_pictures), size=num).astype(np.float64)


def bootstrap(scores: Mapping[str, Pair], counts: np.ndarray) -> dict[str, Interval]:
    """Percentile intervals of all scores over the same resamples."""
    return {name: _interval(_value(pair), _drawn(pair, counts)) for name, pair in scores.items()}


def paired_difference(ours: Sequence[Pair], other: Sequence[Pair], counts: np.ndarray) -> Interval:
    """Mean over seeds of the difference of one score, and its interval over pictures.

    Pictures are paired across rows and seeds: every resample draws the same pictures for all of them.

    Args:
        ours: one pair of per-picture sums for each seed.
        other: the same for the row to compare with.
        counts: see `resamples`.
    """
    value = np.mean([_value(a) - _value(b) for a, b in zip(ours, other, strict=True)])
    return _interval(
        value, np.mean([_drawn(a, counts) - _drawn(b, counts) for a, b in zip(ours, other, strict=True)], axis=0)
    )


def mean_over_seeds(pairs: Sequence[Pair], counts: np.ndarray) -> Interval:
    """Mean over seeds of one score, and its interval over pictures."""
    return _interval(np.mean([_value(p) for p in pairs]), np.mean([_drawn(p, counts) for p in pairs], axis=0))


def ratio(pair: Pair) -> Score:
    """The score that divides two sums over pictures; NaN where the lower one is 0."""
    return lambda counts: _drawn(pair, counts)


def interval_of(score: Score, counts: np.ndarray) -> Interval:
    """Value of any score on all pictures, and its percentile interval over the resamples."""
    return _interval(float(score(np.ones((1, counts.shape[1])))[0]), score(counts))


def difference_of(ours: Score, other: Score, counts: np.ndarray) -> Interval:
    """Difference of two scores, the same pictures drawn for both."""
    return interval_of(lambda drawn: ours(drawn) - other(drawn), counts)


def _value(pair: Pair) -> float:
    total = pair[1].sum()
    return float(pair[0].sum() / total) if total else float("nan")


def _drawn(pair: Pair, counts: np.ndarray) -> np.ndarray:
    bottom = counts @ pair[1]
    return np.divide(counts @ pair[0], bottom, out=np.full(len(counts), np.nan), where=bottom > 0)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    known = drawn[np.isfinite(drawn)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (float("nan"), float("nan"))
    return Interval(float(value), float(low), float(high))
