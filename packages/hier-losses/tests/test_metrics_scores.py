"""Metrics of node scores (consistency over the tree, tree cuts, several labels) against slow references and laws."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from hier_losses import metrics as M
from hier_losses.decoding import bottom_up
from hier_losses.probabilities import leaf_to_node_logits
from hier_losses.taxonomy import Taxonomy
from hier_losses.treecuts import TreeCuts, count_cuts, cut_at, sample_cuts

SEEDS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def oracles():
    spec = importlib.util.spec_from_file_location("metric_oracles", Path(__file__).with_name("_metric_oracles.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[*SEEDS, "flat", "one", "chain"])
def case(request, random_tree, oracles):
    """A tree, its reference, scores that favour the truth, and targets of every depth."""
    if request.param == "flat":
        tax = Taxonomy.from_paths([(name,) for name in "abcd"])
    elif request.param == "one":
        tax = Taxonomy.from_paths([("a",)])
    elif request.param == "chain":
        tax = Taxonomy.from_paths([tuple(f"c{i}" for i in range(18)), ("c0", "side"), ("top",)])
    else:
        tax = random_tree(request.param, num_nodes=14)
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(tax.num_nodes, (60,), generator=generator)
    logits = torch.randn(60, tax.num_nodes, dtype=torch.float64, generator=generator)
    on_path = tax.paths[target]
    logits.scatter_add_(1, on_path.clamp(min=0), 1.5 * (on_path >= 0).double())
    return tax, oracles.Slow(tax), logits, target


def in_batches(metric, logits, target):
    for low, high in ((0, 1), (1, 1), (1, 20), (20, len(target))):
        metric.update(logits[low:high], target[low:high])
    return metric.compute()


@pytest.fixture
def z11():
    return torch.sin(torch.arange(11, dtype=torch.float64) + 1)[None]


def test_t11_hca_and_cut_hits(t11, z11):
    cuts = TreeCuts(t11, [cut_at(t11, i) for i in range(9)])
    hits = {v: round(9 * M.mta(z11, torch.tensor([v]), t11, cuts).item()) for v in (7, 9, 2)}
    assert hits == {7: 5, 9: 3, 2: 1}
    # x is the best leaf but b beats a; b11 wins every local choice but is not the best leaf.
    assert M.hca(z11, torch.tensor([7]), t11) == 0
    assert M.hca(z11, torch.tensor([9]), t11) == 0
    z11[0, 9] = 2.0
    assert M.hca(z11, torch.tensor([9]), t11) == 1


def test_hca(case, oracles, close):
    tax, slow, logits, target = case
    value = M.hca(logits, target, tax)
    close(value, oracles.hca(slow, logits.tolist(), target.tolist()))
    close(in_batches(M.HCA(tax), logits, target), value)
    leaf_target = tax.leaf[torch.arange(60) % tax.num_leaves]
    assert M.hca(logits, leaf_target, tax) <= M.leaf_accuracy(bottom_up(logits, tax), leaf_target, tax)


def test_hca_with_ties_takes_the_smaller_id(case, oracles, close):
    tax, slow, _, target = case
    zeros = torch.zeros(60, tax.num_nodes)
    close(M.hca(zeros, target, tax), oracles.hca(slow, zeros.tolist(), target.tolist()))


def test_mta(case, oracles, close):
    tax, slow, logits, target = case
    total = min(count_cuts(tax), 9)
    cuts = TreeCuts(tax, [cut_at(tax, i) for i in range(total)])
    expected = oracles.mta(slow, logits.tolist(), target.tolist(), cuts.node_ids)
    close(M.mta(logits, target, tax, cuts), expected)
    close(in_batches(M.MTA(tax, cuts), logits, target), expected)
    per_cut = [oracles.mta(slow, logits.tolist(), target.tolist(), [nodes]) for nodes in cuts.node_ids]
    close(M.mta(logits, target, tax, cuts, per_cut=True), per_cut)
    close(in_batches(M.MTA(tax, cuts, per_cut=True), logits, target), torch.tensor(per_cut).squeeze(), rtol=1e-6)


def test_mta_of_the_leaf_cut_is_leaf_accuracy(case, close):
    tax, _, logits, _ = case
    target = tax.leaf[torch.arange(60) % tax.num_leaves]
    accuracy = M.leaf_accuracy(bottom_up(logits, tax), target, tax)
    close(M.mta(logits, target, tax, TreeCuts(tax, [tax.leaf])), accuracy)


def test_consistent_leaf_scores_pass_every_cut_that_they_should(case, close):
    """Marginals of a sharp leaf distribution win every cut and every choice."""
    tax, _, _, _ = case
    target = tax.leaf[torch.arange(60) % tax.num_leaves]
    leaf_logits = torch.zeros(60, tax.num_leaves, dtype=torch.float64)
    leaf_logits[torch.arange(60), tax.leaf_index[target]] = 10.0
    logits = leaf_to_node_logits(leaf_logits, tax)
    cuts = TreeCuts(tax, [cut_at(tax, i) for i in range(min(count_cuts(tax), 9))])
    close(M.mta(logits, target, tax, cuts), 1.0)
    close(M.hca(logits, target, tax), 1.0)


def test_majority_baseline(t11, close):
    cuts = TreeCuts(t11, [[0, 1, 2], [1, 2, 3, 4, 5]])
    train = torch.tensor([7, 7, 8, 2, 9, 9, 10, 10, 10])
    test = torch.tensor([7, 4, 9, 0])
    # Cut one: b wins on train (5 of 9), right for 1 of 4. Cut two: b again, right for 1 of 3 (a lies above the cut).
    close(M.mta_majority_baseline(test, cuts, train), 2 / 7)
    # The best constant answers: a (3 of 4), then any of the three members (1 of 3).
    close(M.mta_majority_baseline(test, cuts), 4 / 7)
    # Labels above a cut have no say in it: on cut two a1 wins (2 of 3), not b, its first member.
    above = torch.tensor([0, 0, 0, 7, 8, 9])
    close(M.mta_majority_baseline(torch.tensor([7, 9]), TreeCuts(t11, [[1, 2, 3, 4, 5]]), above), 1 / 2)
    close(M.mta_majority_baseline(torch.tensor([9, 10]), TreeCuts(t11, [[1, 2, 3, 4, 5]]), above), 0.0)
    constant = torch.zeros(4, 11)
    constant[:, 1] = 1
    close(M.mta(constant, test, t11, cuts), 2 / 7)
    assert M.mta_majority_baseline(test[:0], cuts).isnan()
    with pytest.raises(ValueError, match="target must lie in"):
        M.mta_majority_baseline(torch.tensor([11]), cuts)
    with pytest.raises(ValueError, match="target must hold integer"):
        M.mta_majority_baseline(test, cuts, train.float())


def closed_labels(tax, num, seed):
    chosen = torch.rand(num, tax.num_nodes, generator=torch.Generator().manual_seed(seed)) < 1.5 / tax.num_nodes
    labels = chosen.clone()
    for row, node in chosen.nonzero().tolist():
        labels[row, [v for v in tax.paths[node].tolist() if v >= 0]] = True
    return labels


def test_auroc(case, oracles, close):
    tax, _, logits, _ = case
    # A coarse grid makes ties, which count one half.
    logits = (logits * 2).round() / 2
    labels = closed_labels(tax, 60, seed=1)
    expected = [oracles.auroc(logits[:, v].tolist(), labels[:, v].tolist()) for v in range(tax.num_nodes)]
    value = M.node_auroc(logits, labels, tax, average="none")
    close(value, expected)
    close(M.node_auroc(logits, labels, tax), torch.tensor(expected, dtype=torch.float64).nanmean())
    close(in_batches(M.NodeAUROC(tax), logits, labels), value.nanmean())
    close(in_batches(M.NodeAUROC(tax, average="none"), logits, labels.long()), value.squeeze())


def test_one_class_nodes_are_skipped(t11):
    labels = torch.zeros(4, 11, dtype=torch.bool)
    labels[:2, [0, 3]] = True
    labels[:, 1] = True
    logits = torch.arange(44.0).view(4, 11)
    value = M.node_auroc(logits, labels, t11, average="none")
    assert value.isnan().tolist() == [v not in (0, 3) for v in range(11)]
    assert value[[0, 3]].tolist() == [0.0, 0.0]
    assert M.node_auroc(logits, labels, t11) == 0
    for num_bins in (None, 64):
        metric = M.NodeAUROC(t11, num_bins=num_bins)
        metric.update(logits / 16, labels)
        assert metric.compute() == 0


def test_binned_auroc(case, close):
    tax, _, logits, _ = case
    labels = closed_labels(tax, 60, seed=2)
    # Scores on the middle of the bins: nothing is lost by binning.
    centres = ((logits.sigmoid() * 32).floor() + 0.5) / 32
    on_grid = centres.logit()
    metric = M.NodeAUROC(tax, average="none", num_bins=32)
    close(in_batches(metric, on_grid, labels), M.node_auroc(on_grid, labels, tax, average="none").squeeze())
    assert all(getattr(metric, name).dtype == torch.int64 for name in metric._defaults)
    fine = in_batches(M.NodeAUROC(tax, num_bins=4096), logits, labels)
    torch.testing.assert_close(fine, M.node_auroc(logits, labels, tax), rtol=0, atol=5e-3, equal_nan=True)


def test_t11_violations(t11, z11):
    assert M.violation_rate(z11, t11).item() == 2 / 8


@pytest.mark.parametrize("margin", [0.0, 0.5, -0.3])
def test_violations(case, margin, oracles, close):
    tax, slow, logits, target = case
    value = M.violation_rate(logits, tax, margin)
    close(value, oracles.violations(slow, logits.tolist(), margin))
    close(in_batches(M.ViolationRate(tax, margin), logits, target), value)
    metric = M.ViolationRate(tax, margin)
    metric.update(logits)
    close(metric.compute(), value)


def test_marginals_never_violate(case):
    tax, _, logits, _ = case
    value = M.violation_rate(leaf_to_node_logits(logits[:, tax.leaf], tax), tax, margin=1e-12)
    assert value == 0 or (tax.num_levels == 1 and value.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision(t11, dtype, close):
    logits = (torch.randperm(220, generator=torch.Generator().manual_seed(0)) % 97 / 8).view(20, 11)
    target = torch.arange(20) % 11
    cuts = sample_cuts(t11, per_rate=1)
    labels = closed_labels(t11, 20, seed=0)
    for call in (
        lambda z: M.hca(z, target, t11),
        lambda z: M.mta(z, target, t11, cuts),
        lambda z: M.node_auroc(z, labels, t11),
        lambda z: M.violation_rate(z, t11),
    ):
        close(call(logits.to(dtype)), call(logits.double()))


def test_empty_batch_is_nan(t11):
    logits, target = torch.zeros(0, 11), torch.zeros(0, dtype=torch.int64)
    cuts = sample_cuts(t11, per_rate=1)
    assert M.hca(logits, target, t11).isnan()
    assert M.mta(logits, target, t11, cuts).isnan()
    assert M.node_auroc(logits, logits, t11).isnan()
    assert M.violation_rate(logits, t11).isnan()


def test_bad_input(t11, random_tree):
    good, target = torch.zeros(2, 11), torch.tensor([7, 9])
    cuts = sample_cuts(t11, per_rate=1)
    calls = [lambda z, y: M.hca(z, y, t11), lambda z, y: M.mta(z, y, t11, cuts), M.HCA(t11).update]
    for call in calls:
        with pytest.raises(ValueError, match=r"logits must have shape \(batch, 11\)"):
            call(torch.zeros(2, 7), target)
        with pytest.raises(ValueError, match=r"target must lie in \[0, 11\), got 11"):
            call(good, torch.tensor([7, 11]))
        with pytest.raises(ValueError, match="target must hold integer"):
            call(good, target.float())
    with pytest.raises(ValueError, match=r"logits must have shape \(batch, 11\)"):
        M.violation_rate(torch.zeros(2, 7), t11)
    other = random_tree(0)
    with pytest.raises(ValueError, match="cuts must belong to tax"):
        M.MTA(other, cuts)
    with pytest.raises(ValueError, match="cuts must belong to tax"):
        M.mta(torch.zeros(1, other.num_nodes), target[:1], other, cuts)


def test_bad_labels(t11):
    logits, labels = torch.zeros(2, 11), torch.zeros(2, 11)
    labels[1, [0, 3]] = 1
    for call in (lambda y: M.node_auroc(logits, y, t11), lambda y: M.NodeAUROC(t11).update(logits, y)):
        with pytest.raises(ValueError, match=r"multi_hot must have shape \(2, 11\), got \(2, 10\)"):
            call(labels[:, :10])
        with pytest.raises(ValueError, match="multi_hot must hold 0 and 1, row 1 does not"):
            call(labels * 0.5)
        open_below = labels.clone()
        open_below[1, 0] = 0
        with pytest.raises(ValueError, match="multi_hot row 1 is not closed upwards"):
            call(open_below)
        with pytest.raises(ValueError, match="logits must have shape"):
            M.node_auroc(logits[:, :7], labels, t11)
    with pytest.raises(ValueError, match="average must be one of"):
        M.NodeAUROC(t11, average="micro")
    with pytest.raises(ValueError, match="average must be one of"):
        M.node_auroc(logits, labels, t11, average="micro")
    with pytest.raises(ValueError, match="num_bins must be at least 2"):
        M.NodeAUROC(t11, num_bins=1)


def test_nan_scores_are_never_consistent(t11):
    assert M.hca(torch.full((3, 11), math.nan), torch.tensor([7, 9, 2]), t11) == 0
