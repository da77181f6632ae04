"""Scores picture by picture agree with the metrics of hier-losses; intervals and paired differences behave."""

import numpy as np
import pytest
import torch

from app_eval.measure.interval import bootstrap, mean_over_seeds, paired_difference, resamples
from app_eval.measure.paths import DECODERS, outcome, per_picture
from app_eval.measure.results import load_outcome, save_row, text_table
from hier_losses import Taxonomy, metrics
from hier_losses.treecuts import sample_cuts


@pytest.fixture(scope="module")
def case():
    tax = Taxonomy.from_paths(
        [("a", "b", "x"), ("a", "b", "y"), ("a", "c", "z"), ("d", "e"), ("d", "f", "u"), ("d", "f", "v")]
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, tax.num_nodes, generator=generator, dtype=torch.float64)
    target = tax.leaf[torch.randint(tax.num_leaves, (60,), generator=generator)]
    cuts = sample_cuts(tax, rates=(0.5,), per_rate=4)
    return tax, logits, target, cuts, outcome(logits, target.numpy(), tax, cuts)


@pytest.mark.parametrize("decoder", list(DECODERS))
def test_means_are_the_metrics(case, decoder):
    tax, logits, target, cuts, found = case
    paths = torch.from_numpy(found.paths[decoder])
    values = {name: top.sum() / bottom.sum() for name, (top, bottom) in per_picture(found, tax, decoder).items()}
    expected = {
        "leaf": metrics.leaf_accuracy(paths, target, tax),
        "fpa": metrics.full_path_accuracy(paths, target, tax),
        "tice": metrics.tice(paths, tax),
        "severity": metrics.mistake_severity(paths, target, tax),
        "ahd": metrics.average_hierarchical_distance(paths, target, tax),
        "hca": metrics.hca(logits, target, tax),
        "mta": metrics.mta(logits, target, tax, cuts),
    }
    levels = metrics.level_accuracy(paths, target, tax)
    expected |= {f"level_{i + 1}": levels[i] for i in range(tax.num_levels)}
    assert values == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-12)


def test_intervals_hold_the_value_and_shrink(case):
    tax, *_, found = case
    scores = per_picture(found, tax, "bottom_up")
    wide = bootstrap(scores, resamples(60))["leaf"]
    many = {name: (np.tile(a, 16), np.tile(b, 16)) for name, (a, b) in scores.items()}
    narrow = bootstrap(many, resamples(960))["leaf"]
    assert wide.low < wide.value < wide.high
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.15)


def test_resamples_keep_the_number_of_pictures():
    counts = resamples(10, num=50)
    assert (counts.sum(1) == 10).all()
    assert np.array_equal(counts, resamples(10, num=50))


def test_a_paired_difference_is_sharper_than_two_intervals():
    draw = np.random.default_rng(0)
    base = draw.random(400) < 0.5
    better = base | (draw.random(400) < 0.05)
    one = np.ones(400)
    ours, other = [(better.astype(float), one)], [(base.astype(float), one)]
    counts = resamples(400)
    found = paired_difference(ours, other, counts)
    assert found.value == pytest.approx(better.mean() - base.mean())
    assert found.low > 0
    assert found.high - found.low < 0.5 * (mean_over_seeds(ours, counts).high - mean_over_seeds(ours, counts).low)
    same = paired_difference(other, other, counts)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_no_mistake_gives_no_severity(case):
    tax, _, target, cuts, _ = case
    sure = torch.nn.functional.one_hot(target, tax.num_nodes).double() * 9
    found = outcome(sure, target.numpy(), tax, cuts)
    severity = bootstrap(per_picture(found, tax, "bottom_up"), resamples(60))["severity"]
    assert np.isnan(severity.value)


def test_rows_are_stored_and_read_back(case, tmp_path):
    tax, _, _, cuts, found = case
    result = save_row(tmp_path, found, tax, cuts, row="r", seed=0)
    again = load_outcome(tmp_path)
    for name in DECODERS:
        assert np.array_equal(again.paths[name], found.paths[name])
    assert np.array_equal(again.hca, found.hca)
    assert result["format"] == 1
    assert result["n"] == 60
    assert 0 < result["mta_majority"] <= 1
    table = text_table({"a row": result})
    assert "a row" in table
    assert f"{result['scores']['bottom_up']['fpa'][0]:.3f}" in table
