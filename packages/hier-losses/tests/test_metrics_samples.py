"""Scores per sample against the metrics on batches of one, and samples without a label in every metric."""

import math

import pytest
import torch
from torchmetrics import MetricCollection

from hier_losses import decoding
from hier_losses import metrics as M
from hier_losses.treecuts import sample_cuts

PATH = {
    "leaf_accuracy": M.leaf_accuracy,
    "full_path_accuracy": M.full_path_accuracy,
    "tice": lambda p, y, t: M.tice(p, t),
    "mistake_severity": M.mistake_severity,
    "average_hierarchical_distance": M.average_hierarchical_distance,
    "edge_distance": M.edge_distance,
    "level_accuracy": M.level_accuracy,
}
CLASSES = [
    M.LeafAccuracy,
    lambda t, **k: M.LeafAccuracy(t, average="macro", **k),
    M.FullPathAccuracy,
    M.TICE,
    M.MistakeSeverity,
    M.AverageHierarchicalDistance,
    M.EdgeDistance,
    M.LevelAccuracy,
    M.WeightedAveragePrecision,
    M.HierarchicalPrecisionAtK,
    M.HierarchicalPRF,
    M.LCAMetrics,
]


def batch(tax, num=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, tax.num_nodes, generator=generator)
    target = torch.randint(tax.num_nodes, (num,), generator=generator)
    return logits, decoding.level_argmax(logits, tax), target


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_path_scores_are_the_metrics_of_single_samples(seed, random_tree, close):
    tax = random_tree(seed)
    _, paths, target = batch(tax)
    scores = M.path_scores(paths, target, tax)
    assert set(scores) == set(PATH)
    for name, function in PATH.items():
        top, bottom = scores[name]
        assert top.dtype == bottom.dtype == torch.float64
        assert top.shape == bottom.shape == ((40, tax.num_levels) if name == "level_accuracy" else (40,))
        single = torch.stack([function(p[None], y[None], tax) for p, y in zip(paths, target, strict=True)])
        close(torch.where(bottom > 0, top / bottom, math.nan), single)
        close(scores[name].value, function(paths, target, tax))


@pytest.mark.parametrize("seed", [0, 1])
def test_logit_scores_are_the_metrics_of_single_samples(seed, random_tree, close):
    tax = random_tree(seed)
    logits, _, target = batch(tax)
    cuts = sample_cuts(tax, rates=(0.5,), per_rate=3)
    scores = M.logit_scores(logits, target, tax, cuts)
    single = [M.hca(z[None], y[None], tax) for z, y in zip(logits, target, strict=True)]
    close(scores["hca"].numerator, torch.stack(single))
    single = [M.mta(z[None], y[None], tax, cuts) for z, y in zip(logits, target, strict=True)]
    top, bottom = scores["mta"]
    close(torch.where(bottom > 0, top / bottom, math.nan), torch.stack(single))
    close(scores["mta"].value, M.mta(logits, target, tax, cuts))
    assert set(M.logit_scores(logits, target, tax)) == {"hca"}


def test_severity_and_distance_share_their_numerator(t11):
    _, paths, target = batch(t11)
    scores = M.path_scores(paths, target, t11)
    severity, distance = scores["mistake_severity"], scores["average_hierarchical_distance"]
    assert torch.equal(severity.numerator, distance.numerator)
    assert torch.equal(severity.denominator, (severity.numerator > 0).double())
    assert torch.equal(distance.denominator, torch.ones(40, dtype=torch.float64))


@pytest.mark.parametrize("num", [0, 1])
def test_small_batches(num, t11):
    logits, paths, target = batch(t11, num)
    for score in {**M.path_scores(paths, target, t11), **M.logit_scores(logits, target, t11)}.values():
        assert len(score.numerator) == len(score.denominator) == num
        assert score.value.isnan().all() or num


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_samples_count_nowhere(ignore_index, t11, close):
    logits, paths, target = batch(t11)
    target[::3] = ignore_index
    kept = target != ignore_index
    options = {} if ignore_index == -100 else {"ignore_index": ignore_index}
    scores = M.path_scores(paths, target, t11, **options) | M.logit_scores(logits, target, t11, **options)
    for score in scores.values():
        assert not score.denominator[~kept].any()
        assert not score.numerator[~kept].any()
    some = M.path_scores(paths[kept], target[kept], t11) | M.logit_scores(logits[kept], target[kept], t11)
    for name, score in scores.items():
        close(score.value, some[name].value)
    for build in CLASSES:
        ours, other = build(t11, **options), build(t11)
        ours.update(paths, target)
        other.update(paths[kept], target[kept])
        ours, other = ours.compute(), other.compute()
        for name in other if isinstance(other, dict) else [None]:
            close(ours if name is None else ours[name], other if name is None else other[name])
    for function in (f for name, f in PATH.items() if name != "tice"):
        close(function(paths, target, t11, **options), function(paths[kept], target[kept], t11))
    cuts = sample_cuts(t11, rates=(0.5,), per_rate=3)
    close(M.mta(logits, target, t11, cuts, **options), M.mta(logits[kept], target[kept], t11, cuts))
    for ours, other in ((M.HCA(t11, **options), M.HCA(t11)), (M.MTA(t11, cuts, **options), M.MTA(t11, cuts))):
        ours.update(logits, target)
        other.update(logits[kept], target[kept])
        close(ours.compute(), other.compute())


def test_two_ways_to_ignore_stay_apart_in_a_collection(t11):
    together = MetricCollection({"a": M.FullPathAccuracy(t11), "b": M.FullPathAccuracy(t11, ignore_index=2)})
    together.update(torch.tensor([[0, 3, 7]]), torch.tensor([7]))
    together.update(torch.tensor([[0, 3, 7]]), torch.tensor([2]))
    found = together.compute()
    assert (found["a"].item(), found["b"].item()) == (0.5, 1.0)


def test_rows_of_errors_count_ignored_samples(t11):
    paths = torch.tensor([[0, 3, 7]]).expand(3, -1)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 11\), got -1 at row 2"):
        M.path_scores(paths, torch.tensor([-100, 7, -1]), t11)
    with pytest.raises(ValueError, match=r"pred_paths must have shape"):
        M.path_scores(paths[:, :2], torch.tensor([7, 7, 7]), t11)
    with pytest.raises(ValueError, match=r"got -1 at row 0"):
        M.logit_scores(torch.zeros(1, 11), torch.tensor([-1]), t11)
