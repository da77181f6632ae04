"""The one verdict rule, and intervals over seeds against scipy's tests."""

import math

import numpy as np
import pytest
from scipy import stats

from app_eval.measure.interval import WORDS, Interval, over_seeds, unpaired, verdict

UP, DOWN, OPEN = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1), Interval(0.1, -0.1, 0.3)
UNKNOWN, ONE_SEED = Interval(math.nan, math.nan, math.nan), over_seeds([0.4])


@pytest.mark.parametrize(
    ("items", "seeds", "word"),
    [
        (UP, UP, "better"), (DOWN, DOWN, "worse"), (UP, None, "better"), (None, DOWN, "worse"), (None, None, "not run"),
        (UP, OPEN, "undecided"), (OPEN, UP, "undecided"), (UP, DOWN, "undecided"), (UP, UNKNOWN, "undecided"), (UNKNOWN, None, "undecided"),
        (UP, ONE_SEED, "undecided"), (Interval(0.0, 0.0, 0.0), None, "undecided"), (Interval(0.1, 0.0, 0.2), None, "undecided"),
    ],
)  # fmt: skip
def test_every_interval_must_exclude_zero_on_the_same_side(items, seeds, word):
    assert verdict(items, seeds) == word
    turned = {"better": "worse", "worse": "better"}.get(word, word)
    assert verdict(items, seeds, lower_is_better=True) == turned
    assert verdict(items and -items, seeds and -seeds) == turned
    assert word in WORDS


@pytest.mark.parametrize("premise", ["worse", "undecided", "not run"])
def test_nothing_is_ranked_where_the_premise_is_not_better(premise):
    assert verdict(UP, UP, premise=premise) == "undecided"
    assert verdict(None, None, premise=premise) == "not run"


def test_over_seeds_is_the_paired_t_interval():
    differences = np.random.default_rng(0).normal(0.3, 1, 7)
    found, expected = over_seeds(differences), stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(differences.mean())
    assert (ONE_SEED.value, ONE_SEED.low, ONE_SEED.high) == (0.4, -math.inf, math.inf)


def test_unpaired_is_welchs_interval():
    draw = np.random.default_rng(1)
    a, b = draw.normal(1, 1, 5), draw.normal(0, 3, 9)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = unpaired((a.mean(), a.std(ddof=1), 5), (b.mean(), b.std(ddof=1), 9))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    still = unpaired((a.mean(), a.std(ddof=1), 5), (0.5, 0.0, 1))  # a row without chance adds no variance
    assert (still.low, still.high) == pytest.approx(
        tuple(stats.ttest_1samp(a, 0.5).confidence_interval(0.95) - np.float64(0.5))
    )
    assert unpaired((0.5, 0.0, 3), (0.2, 0.0, 1)) == Interval(0.3, 0.3, 0.3)
    assert unpaired((0.5, None, 1), (0.2, 0.1, 3)).low == -math.inf


def test_stored_intervals_are_read_back():
    assert Interval.read(None) is None
    assert math.isnan(Interval.read([None, None, None]).value)
    assert Interval.read(UP.as_json()) == UP
    assert UP.times(100) == Interval(20, 10, 30)
