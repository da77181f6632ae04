"""Path metrics against slow references, their laws, partial labels and bad input."""

import importlib.util
import itertools
import math
import random
from pathlib import Path

import pytest
import torch

from hier_losses import metrics as M
from hier_losses.decoding import bottom_up, joint_path, level_argmax, threshold, top_down, top_k_paths
from hier_losses.path_ops import extend_paths, paths_of
from hier_losses.taxonomy import Taxonomy

SEEDS = [0, 1, 2, 3, 4]
PRF = ("hierarchical_precision", "hierarchical_recall", "hierarchical_f")
LCA = ("lca_precision", "lca_recall", "lca_f1", "lca_distance", "lca_excess", "lca_deficient")


@pytest.fixture(scope="module")
def oracles():
    spec = importlib.util.spec_from_file_location("metric_oracles", Path(__file__).with_name("_metric_oracles.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[*SEEDS, "flat", "one", "chain", "equal"])
def case(request, random_tree, oracles):
    """A tree, its reference, 40 rows of every kind and their targets."""
    if request.param == "flat":
        tax = Taxonomy.from_paths([(name,) for name in "abcd"])
    elif request.param == "one":
        tax = Taxonomy.from_paths([("a",)])
    elif request.param == "chain":
        tax = Taxonomy.from_paths([tuple(f"c{i}" for i in range(18)), ("c0", "side"), ("c0", "c1", "other")])
    elif request.param == "equal":
        tax = Taxonomy.synthetic((2, 5, 12), seed=0)
    else:
        tax = random_tree(request.param)
    slow = oracles.Slow(tax)
    rows, targets = oracles.random_rows(slow, random.Random(str(request.param)), 40)
    return tax, slow, rows, targets


@pytest.fixture
def planes():
    """Boeing > 737 > {800, 900}, Airbus > A320 > {200, neo}, four samples as one label per level."""
    tax = Taxonomy.from_paths(
        [("Boeing", "737", "800"), ("Boeing", "737", "900"), ("Airbus", "A320", "200"), ("Airbus", "A320", "neo")]
    )
    first = tax.level_ptr[:3]
    target = tax.node_ids(torch.tensor([[0, 0, 0], [1, 1, 2], [0, 0, 1], [1, 1, 3]]))
    pred = torch.tensor([[0, 0, 1], [1, 1, 2], [0, 0, 1], [1, 1, 0]]) + first
    return tax, pred, target


def both(metric_class, function, tax, pred, target, *settings, **options):
    """Value of the function, checked to equal the class over uneven batches."""
    value = function(pred, target, tax, *settings, **options)
    metric = metric_class(tax, *settings, **options)
    cuts = [0, 1, 1, len(target) // 3, len(target)]
    for low, high in itertools.pairwise(cuts):
        metric.update(pred[low:high], target[low:high])
    # torchmetrics turns every tensor of one element into a scalar.
    expected = value.squeeze() if isinstance(value, torch.Tensor) else value
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    return value


def test_worked_example(planes):
    tax, pred, target = planes
    assert M.full_path_accuracy(pred, target, tax).item() == 0.5
    assert M.tice(pred, tax).item() == 0.25
    assert M.leaf_accuracy(pred, target, tax).item() == 0.5
    assert M.level_accuracy(pred, target, tax).tolist() == [1.0, 1.0, 0.5]
    assert M.weighted_average_precision(pred, target, tax).item() == 0.6875
    assert M.weighted_average_precision(pred, target, tax, per_level="accuracy").item() == 0.75
    assert M.mistake_severity(pred, target, tax).item() == 2
    assert M.average_hierarchical_distance(pred, target, tax).item() == 1
    prf = M.hierarchical_prf(pred, target, tax)
    assert [prf[name].item() for name in PRF] == pytest.approx([10 / 12] * 3)
    crossed = torch.tensor([[0, 1, 0], [1, 0, 3]]) + tax.level_ptr[:3]
    assert M.tice(crossed, tax).item() == 1


def test_t11_level_argmax_is_inconsistent(t11):
    z = torch.sin(torch.arange(11, dtype=torch.float64) + 1)[None]
    assert M.tice(level_argmax(z, t11), t11).item() == 1


def test_full_path_accuracy(case, oracles, close):
    tax, slow, rows, targets = case
    pred, target = torch.tensor(rows), torch.tensor(targets)
    value = both(M.FullPathAccuracy, M.full_path_accuracy, tax, pred, target)
    close(value, oracles.full_path_accuracy(slow, rows, targets))


def test_tice(case, oracles, close):
    tax, slow, rows, targets = case
    pred, target = torch.tensor(rows), torch.tensor(targets)
    value = both(M.TICE, lambda p, t, tax: M.tice(p, tax), tax, pred, target)
    close(value, oracles.tice(slow, rows, targets))


def test_level_accuracy(case, oracles, close):
    tax, slow, rows, targets = case
    pred, target = torch.tensor(rows), torch.tensor(targets)
    value = both(M.LevelAccuracy, M.level_accuracy, tax, pred, target)
    assert value.shape == (tax.num_levels,)
    close(value, oracles.level_accuracy(slow, rows, targets))


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_leaf_accuracy(case, average, oracles, close):
    tax, slow, rows, targets = case
    pred, target = torch.tensor(rows), torch.tensor(targets)
    value = both(M.LeafAccuracy, M.leaf_accuracy, tax, pred, target, average)
    close(value, oracles.leaf_accuracy(slow, rows, targets, average))


@pytest.mark.parametrize("per_level", ["precision", "accuracy"])
def test_weighted_average_precision(case, per_level, oracles, close):
    tax, slow, rows, targets = case
    pred, target = torch.tensor(rows), torch.tensor(targets)
    value = both(M.WeightedAveragePrecision, M.weighted_average_precision, tax, pred, target, per_level)
    close(value, oracles.weighted_average_precision(slow, rows, targets, per_level))


def test_distances(case, oracles, close):
    tax, slow, rows, targets = case
    pred, target = torch.tensor(rows), torch.tensor(targets)
    close(both(M.MistakeSeverity, M.mistake_severity, tax, pred, target), oracles.mistake_severity(slow, rows, targets))
    close(both(M.EdgeDistance, M.edge_distance, tax, pred, target), oracles.edge_distance(slow, rows, targets))
    ahd = both(M.AverageHierarchicalDistance, M.average_hierarchical_distance, tax, pred, target)
    close(ahd, oracles.average_hierarchical_distance(slow, [[row] for row in rows], targets, 1))
    assert M.max_leaf_distance(tax) == slow.d_max()


@pytest.mark.parametrize("k", [1, 2, 5, "all"])
def test_metrics_at_k(case, k, oracles, close):
    tax, slow, _, targets = case
    k = min(k, tax.num_leaves) if k != "all" else tax.num_leaves
    rng = random.Random(k)
    ranked = [[slow.pad(leaf) for leaf in rng.sample(slow.leaves, len(slow.leaves))] for _ in targets]
    pred, target = torch.tensor(ranked), torch.tensor(targets)
    ahd = both(M.AverageHierarchicalDistance, M.average_hierarchical_distance, tax, pred, target, k)
    close(ahd, oracles.average_hierarchical_distance(slow, ranked, targets, k))
    for over_ranks in (False, True):
        value = both(
            M.HierarchicalPrecisionAtK, M.hierarchical_precision_at_k, tax, pred, target, k, over_ranks=over_ranks
        )
        close(value, oracles.hierarchical_precision(slow, ranked, targets, k, over_ranks))
        assert 0 <= value <= 1 + 1e-12


def test_precision_of_internal_predictions(case, oracles, close):
    tax, slow, rows, targets = case
    value = M.hierarchical_precision_at_k(torch.tensor(rows), torch.tensor(targets), tax)
    close(value, oracles.hierarchical_precision(slow, [[row] for row in rows], targets, 1, False))


def test_best_ranking_has_precision_one(case, close):
    tax, slow, _, _ = case
    ranked = [[slow.pad(k) for k in sorted(slow.leaves, key=lambda k, t=t: slow.distance(k, t))] for t in slow.leaves]
    for k in range(1, tax.num_leaves + 1):
        value = M.hierarchical_precision_at_k(torch.tensor(ranked), tax.leaf, tax, k, over_ranks=True)
        close(value, 1.0)


@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0, 0.0])
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_prf(case, average, beta, oracles, close):
    tax, slow, rows, targets = case
    pred, target = torch.tensor(rows), torch.tensor(targets)
    value = both(M.HierarchicalPRF, M.hierarchical_prf, tax, pred, target, average, beta)
    assert tuple(value) == PRF
    close(torch.stack([value[name] for name in PRF]), oracles.prf(slow, rows, targets, average, beta))


def test_prf_counts_a_repeated_leaf_once(t11):
    # c is a shallow leaf: an inconsistent path can name it before and after a2.
    value = M.hierarchical_prf(torch.tensor([[2, 4, 2]]), torch.tensor([2]), t11)
    assert value["hierarchical_precision"].item() == 0.5
    assert value["hierarchical_recall"].item() == 1


@pytest.mark.parametrize("value", ["depth", "info"])
def test_lca(case, value, oracles, close):
    tax, slow, rows, targets = case
    pred, target = torch.tensor(rows), torch.tensor(targets)
    result = both(M.LCAMetrics, M.lca_metrics, tax, pred, target, value)
    assert tuple(result) == LCA
    close(torch.stack([result[name] for name in LCA]), oracles.lca(slow, rows, targets, value))


def random_logits(tax, num, seed=0):
    return torch.randn(num, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_laws_of_level_argmax(case, close):
    tax, _, _, _ = case
    logits = random_logits(tax, 300)
    target = tax.leaf[torch.arange(300) % tax.num_leaves]
    # Sharpened towards the truth, so that some paths are right.
    logits[torch.arange(300), target] += 2
    pred = level_argmax(logits, tax)
    fpa, tice = M.full_path_accuracy(pred, target, tax), M.tice(pred, tax)
    assert fpa <= M.level_accuracy(pred, target, tax).min() + 1e-12
    assert fpa <= 1 - tice + 1e-12
    steps = (pred[:, :-1] == pred[:, 1:]) | (pred[:, :-1] == tax.parent[pred[:, 1:]])
    right = (pred[:, -1] == target) & steps.all(1)
    close(fpa, right.double().mean())


def test_laws_of_bottom_up(case, close):
    tax, _, _, _ = case
    logits = random_logits(tax, 200)
    target = tax.leaf[torch.arange(200) % tax.num_leaves]
    pred = bottom_up(logits, tax)
    accuracy = M.leaf_accuracy(pred, target, tax)
    assert M.tice(pred, tax) == 0
    close(M.full_path_accuracy(pred, target, tax), accuracy)
    severity = M.mistake_severity(pred, target, tax)
    expected = 0.0 if accuracy == 1 else (1 - accuracy) * severity
    close(M.average_hierarchical_distance(pred, target, tax), expected)


def test_every_consistent_decoder_has_tice_zero(case):
    tax, _, _, _ = case
    logits = random_logits(tax, 100)
    for pred in (bottom_up(logits, tax), top_down(logits, tax), joint_path(logits, tax), threshold(logits, tax, 0.3)):
        assert M.tice(pred, tax) == 0
        assert M.tice(extend_paths(pred, tax), tax) == 0


def test_consistent_paths_of_equal_depth(close):
    tax = Taxonomy.synthetic((3, 7, 20), seed=4)
    target = tax.leaf[torch.randint(20, (64,), generator=torch.Generator().manual_seed(0))]
    pred = bottom_up(random_logits(tax, 64), tax)
    shared = (pred == tax.paths[target]).long().cumprod(1).sum(1).double()
    for average in ("micro", "macro"):
        for value in M.hierarchical_prf(pred, target, tax, average).values():
            close(value, (shared / 3).mean())


def test_padded_and_extended_paths_score_the_same(case):
    tax, _, _, targets = case
    padded = paths_of(tax.leaf[torch.arange(40) % tax.num_leaves], tax)
    target = torch.tensor(targets)
    functions = [M.full_path_accuracy, M.level_accuracy, M.leaf_accuracy, M.weighted_average_precision]
    functions += [
        M.mistake_severity,
        M.average_hierarchical_distance,
        M.edge_distance,
        M.hierarchical_prf,
        M.lca_metrics,
    ]
    for function in functions:
        ours, other = function(padded, target, tax), function(extend_paths(padded, tax), target, tax)
        torch.testing.assert_close(ours, other, rtol=0, atol=0, equal_nan=True)


def test_partial_labels_are_masked_below(t11):
    # y under a1, labelled a only: everything below a is unknown.
    pred, target = paths_of(torch.tensor([8]), t11), torch.tensor([0])
    assert M.full_path_accuracy(pred, target, t11) == 1
    assert M.level_accuracy(pred, target, t11).tolist()[0] == 1
    assert M.level_accuracy(pred, target, t11)[1:].isnan().all()
    assert M.leaf_accuracy(pred, target, t11).isnan()
    assert M.average_hierarchical_distance(pred, target, t11) == 0
    assert M.edge_distance(pred, target, t11) == 0
    assert M.mistake_severity(pred, target, t11).isnan()
    assert M.hierarchical_prf(pred, target, t11)["hierarchical_f"] == 1
    assert M.lca_metrics(pred, target, t11)["lca_f1"] == 1


def test_the_root_as_prediction(t11):
    pred, target = torch.full((1, 3), -1), torch.tensor([7])
    assert M.tice(pred, t11) == 0
    assert M.full_path_accuracy(pred, target, t11) == 0
    assert M.average_hierarchical_distance(pred, target, t11) == 3
    assert M.edge_distance(pred, target, t11) == 3
    assert M.hierarchical_prf(pred, target, t11)["hierarchical_precision"] == 1
    assert M.lca_metrics(pred, target, t11)["lca_precision"] == 1
    assert M.lca_metrics(pred, target, t11)["lca_recall"] == 0


def test_a_repeated_internal_node_abstains(t11):
    # a again on level 2, where it is no class: precision there is that of the other sample alone.
    target = torch.tensor([7, 9])
    for row in ([0, 0, -1], [0, -1, -1], [0, 0, 0]):
        pred = torch.tensor([row, [1, 6, 9]])
        # Level 1: a and b right. Levels 2 and 3: one class right, one never predicted.
        expected = (3 * 1.0 + 4 * 0.5 + 4 * 0.5) / 11
        assert M.weighted_average_precision(pred, target, t11).item() == pytest.approx(expected)
    # Were a a class of level 2, its only prediction would be a false positive there for c as well.
    pred = torch.tensor([[0, 0, -1], [2, 2, 2]])
    value = M.weighted_average_precision(pred, torch.tensor([2, 2]), t11)
    # Level 1: c right once of once, a wrong. Below: c alone.
    assert value.item() == pytest.approx((3 * 0.5 + 4 * 1.0 + 4 * 1.0) / 11)


def test_rows_with_holes_are_inconsistent(t11):
    rows = torch.tensor([[-1, 3, 7], [0, -1, 7], [-1, 0, 3], [0, 3, -1], [2, -1, -1], [2, -1, 2], [0, 0, -1]])
    broken = [M.tice(row[None], t11).item() for row in rows]
    assert broken == [1, 1, 1, 0, 0, 0, 0]


def test_ranked_paths_count_with_their_first(t11):
    logits = random_logits(t11, 9)
    ranked, target = top_k_paths(logits, t11, 3), torch.arange(9)
    for function in (M.full_path_accuracy, M.mistake_severity, M.edge_distance, M.leaf_accuracy):
        torch.testing.assert_close(function(ranked, target, t11), function(ranked[:, 0], target, t11), equal_nan=True)
    assert M.tice(ranked, t11) == M.tice(ranked[:, 0], t11)


def test_empty_batch_is_nan(t11):
    pred, target = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    functions = [M.full_path_accuracy, M.leaf_accuracy, M.weighted_average_precision, M.mistake_severity]
    functions += [M.average_hierarchical_distance, M.hierarchical_precision_at_k, M.edge_distance]
    for function in functions:
        assert function(pred, target, t11).isnan()
    assert M.tice(pred, t11).isnan()
    assert M.level_accuracy(pred, target, t11).isnan().all()
    for average in ("micro", "macro"):
        assert all(v.isnan() for v in M.hierarchical_prf(pred, target, t11, average).values())
    assert all(v.isnan() for v in M.lca_metrics(pred, target, t11).values())


def test_bad_paths(t11):
    good, target = torch.tensor([[0, 3, 7], [1, 6, 9]]), torch.tensor([7, 9])
    metric = M.FullPathAccuracy(t11)
    for call in (lambda p, t: M.full_path_accuracy(p, t, t11), metric.update, lambda p, t: M.edge_distance(p, t, t11)):
        with pytest.raises(ValueError, match="pred_paths must hold integer node ids"):
            call(good.float(), target)
        with pytest.raises(ValueError, match=r"pred_paths must have shape \(batch, 3\)"):
            call(good[:, :2], target)
        with pytest.raises(ValueError, match=r"pred_paths must lie in \[-1, 11\), row 1 does not"):
            call(torch.tensor([[0, 3, 7], [1, 6, 11]]), target)
        with pytest.raises(ValueError, match=r"pred_paths must lie in \[-1, 11\), row 0 does not"):
            call(torch.tensor([[0, 3, -2], [1, 6, 9]]), target)
        with pytest.raises(ValueError, match="row 0 has a node above its level"):
            call(torch.tensor([[3, 3, 7], [1, 6, 9]]), target)
        with pytest.raises(ValueError, match=r"target must lie in \[0, 11\), got 11 at row 1"):
            call(good, torch.tensor([7, 11]))
        with pytest.raises(ValueError, match=r"target must lie in \[0, 11\), got -1"):
            call(good, torch.tensor([-1, 7]))
        with pytest.raises(ValueError, match="target must hold integer node ids"):
            call(good, target.float())
        with pytest.raises(ValueError, match="target must have shape"):
            call(good, target[:1])


def test_bad_settings(t11):
    pred, target = torch.tensor([[0, 3, 7]]), torch.tensor([7])
    for k in (0, 8):
        for build in (M.AverageHierarchicalDistance, M.HierarchicalPrecisionAtK):
            with pytest.raises(ValueError, match=rf"k must lie in \[1, 7\], got {k}"):
                build(t11, k)
        with pytest.raises(ValueError, match=r"k must lie in \[1, 7\]"):
            M.average_hierarchical_distance(pred, target, t11, k)
    with pytest.raises(ValueError, match="at least k=2 ranked paths"):
        M.average_hierarchical_distance(pred, target, t11, 2)
    with pytest.raises(ValueError, match="average must be one of"):
        M.LeafAccuracy(t11, "weighted")
    with pytest.raises(ValueError, match="average must be one of"):
        M.hierarchical_prf(pred, target, t11, "weighted")
    with pytest.raises(ValueError, match="per_level must be one of"):
        M.WeightedAveragePrecision(t11, "recall")
    with pytest.raises(ValueError, match="value must be one of"):
        M.LCAMetrics(t11, "height")
    for beta in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta must lie in"):
            M.HierarchicalPRF(t11, beta=beta)
