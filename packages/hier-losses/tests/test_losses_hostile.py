"""What users pass by mistake or by surprise: other types, other devices, transforms, graphs in place of trees."""

import math

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from hier_losses import functional as F
from hier_losses import losses as L
from hier_losses import metrics as M
from hier_losses.graph import LabelGraph
from hier_losses.taxonomy import Taxonomy
from hier_losses.treecuts import TreeCuts, sample_cuts

NODE = [
    F.level_cross_entropy,
    F.semantic_softmax,
    F.hisce,
    F.tp_kl,
    F.conditional_softmax_nll,
    F.hce,
    F.hrn_tree_loss,
    F.hierarchy_aware_loss,
]
LEAF = [F.hxe, F.soft_label_ce]


def inputs(function, tax, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    width = tax.num_leaves if function in LEAF else tax.num_nodes
    target = tax.leaf[torch.randint(tax.num_leaves, (batch,), generator=generator)]
    return torch.randn(batch, width, generator=generator, dtype=dtype), target


@pytest.mark.parametrize("function", NODE + LEAF)
def test_arrays_and_lists_are_named(function, t11, request):
    if request.config.getoption("--jaxtyping-packages", default=None):
        pytest.skip("the hook refuses other types first")
    z, y = inputs(function, t11)
    with pytest.raises(TypeError, match=r"logits must be a tensor, got ndarray"):
        function(z.numpy(), y, t11)
    with pytest.raises(TypeError, match=r"target must be a tensor, got list"):
        function(z, y.tolist(), t11)


def test_a_list_is_no_taxonomy(t11, request):
    if request.config.getoption("--jaxtyping-packages", default=None):
        pytest.skip("the hook refuses other types first")
    paths = t11.to_paths()
    for build in (L.HierarchyAwareLoss, L.HXE, L.MCLoss, L.ParentChildConsistency, L.MCM, M.FullPathAccuracy, M.HCA):
        with pytest.raises(TypeError, match=r"tax must be a Taxonomy.*, got list"):
            build(paths)
    graph = LabelGraph.from_taxonomy(t11)
    for build in (L.HierarchyAwareLoss, L.HXE, L.ParentChildConsistency, M.FullPathAccuracy, M.HCA):
        with pytest.raises(TypeError, match=r"tax must be a Taxonomy, got LabelGraph"):
            build(graph)


def test_wrong_types_of_metric_settings(t11, request):
    if request.config.getoption("--jaxtyping-packages", default=None):
        pytest.skip("the hook refuses other types first")
    with pytest.raises(TypeError, match=r"k must be an integer, got 1.5"):
        M.AverageHierarchicalDistance(t11, k=1.5)
    with pytest.raises(TypeError, match=r"cuts must be TreeCuts, got list"):
        M.MTA(t11, [[0, 1, 2]])
    assert M.MTA(t11, TreeCuts(t11, [[0, 1, 2]])).compute is not None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_settings_must_be_finite(t11, value):
    z, y = inputs(F.tp_kl, t11)
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        F.tp_kl(z, y, t11, temperature=value)
    with pytest.raises(ValueError, match=r"focal_gamma must be at least 0 and finite"):
        F.level_cross_entropy(z, y, t11, focal_gamma=value)


@pytest.mark.parametrize("function", NODE + LEAF)
def test_meta_tensors_have_shapes(function, t11):
    z, y = inputs(function, t11)
    assert function(z.to("meta"), y.to("meta"), t11).shape == ()
    assert function(z.to("meta"), y.to("meta"), t11, reduction="none").shape == (3,)


@pytest.mark.parametrize("function", NODE + LEAF)
def test_function_transforms(function, t11):
    z, y = inputs(function, t11)

    def loss(row, target):
        return function(row[None], target[None], t11)

    # Values of targets cannot be checked inside vmap, so they stay outside of it.
    per_sample = torch.stack([torch.func.grad(loss)(row, target) for row, target in zip(z, y, strict=True)])
    batched = torch.func.vmap(torch.func.grad(lambda row: function(row[None], y[:1], t11)))(z)
    torch.testing.assert_close(batched[0], per_sample[0])
    leaf = z.clone().requires_grad_()
    (whole,) = torch.autograd.grad(function(leaf, y, t11, reduction="sum"), leaf)
    torch.testing.assert_close(per_sample, whole)


@pytest.mark.parametrize("kind", ["jsd", "kl", "hinge"])
def test_consistency_of_a_flat_tree_is_zero_with_a_graph(kind):
    tax = Taxonomy(list("abc"), [-1] * 3)
    z = torch.randn(2, 3, requires_grad=True)
    loss = F.parent_child_consistency(z, tax, kind=kind)
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros(2, 3))


def diamond():
    edges = [("pet", "dog"), ("canine", "dog"), ("dog", "puppy"), ("pet", "cat")]
    return LabelGraph.from_edges(edges)


def graph_labels(graph, num=30):
    generator = torch.Generator().manual_seed(2)
    one_hot = torch.zeros(num, graph.num_nodes).scatter(
        1, torch.randint(graph.num_nodes, (num, 1), generator=generator), 1.0
    )
    return torch.randn(num, graph.num_nodes, generator=generator), F.mcm(one_hot, graph)


def test_multi_label_metrics_on_a_graph(close):
    graph = diamond()
    scores, labels = graph_labels(graph)
    together = MetricCollection(
        {
            "exact": M.NodeAUROC(graph),
            "nodes": M.NodeAUROC(graph, average="none"),
            "binned": M.NodeAUROC(graph, num_bins=512),
            "violations": M.ViolationRate(graph, 0.25),
        }
    )
    for part in torch.arange(30).split(7):
        together.update(scores[part], labels[part])
    found = together.compute()
    edges = list(zip(graph.edge_parent.tolist(), graph.edge_child.tolist(), strict=True))
    pairs = [row[child] > row[parent] + 0.25 for row in scores.tolist() for parent, child in edges]
    close(found["violations"], sum(pairs) / len(pairs))
    close(M.violation_rate(scores, graph, 0.25), found["violations"])
    areas = []
    for node in range(graph.num_nodes):
        high = [s[node] for s, y in zip(scores.tolist(), labels.tolist(), strict=True) if y[node]]
        low = [s[node] for s, y in zip(scores.tolist(), labels.tolist(), strict=True) if not y[node]]
        areas.append(sum((a > b) + (a == b) / 2 for a in high for b in low) / (len(high) * len(low)))
    close(found["nodes"], areas)
    close(found["exact"], sum(areas) / len(areas))
    close(found["binned"], sum(areas) / len(areas), rtol=0, atol=0.02)


def test_a_graph_and_its_taxonomy_agree(t11, close):
    graph = LabelGraph.from_taxonomy(t11)
    scores, labels = graph_labels(graph)
    close(M.violation_rate(scores, graph), M.violation_rate(scores, t11))
    close(M.node_auroc(scores, labels, graph), M.node_auroc(scores, labels, t11))


def test_two_graphs_stay_apart_in_a_collection():
    nodes = ["a", "b", "c"]
    one = LabelGraph.from_edges([("a", "b"), ("a", "c")], nodes=nodes)
    two = LabelGraph.from_edges([("b", "a"), ("a", "c")], nodes=nodes)
    together = MetricCollection({"one": M.ViolationRate(one), "two": M.ViolationRate(two)})
    for row in ([2.0, 2.0, 0.0], [0.0, 1.0, 0.0]):  # no violation in either, then one in the first
        together.update(torch.tensor([row]))
    found = together.compute()
    assert (found["one"].item(), found["two"].item()) == (1 / 4, 0)


def test_nan_scores_are_no_coherent_ones(t11):
    scores, labels = graph_labels(LabelGraph.from_taxonomy(t11), num=2)
    nan = torch.full_like(scores, math.nan)
    assert M.violation_rate(nan, t11) == 1
    for call in (lambda z: M.node_auroc(z, labels, t11), lambda z: M.NodeAUROC(t11).update(z, labels)):
        scores[1, 4] = math.nan
        with pytest.raises(ValueError, match="logits must hold numbers to rank by, row 1 has NaN"):
            call(scores)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_modules_inside_a_model_survive_saving(t11, batch, tmp_path):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, t11.num_nodes)
            self.loss = L.LevelCrossEntropy(t11, class_weights=torch.arange(11.0) + 1)

        def forward(self, x, y):
            return self.loss(self.head(x), y)

    model, other = Classifier(), Classifier()
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x, y = torch.randn(batch, 4), t11.leaf[torch.arange(batch) % t11.num_leaves]
    torch.testing.assert_close(model(x, y), other(x, y))


def test_numpy_integers_are_node_ids(t11):
    assert t11.path_of(np.int64(7)) == ("a", "a1", "x")
    assert t11.prune(np.array([7])).taxonomy.num_nodes == 10


def test_sample_cuts_of_a_deep_chain_says_how_many_exist():
    chain = Taxonomy([f"c{i}" for i in range(18)], list(range(-1, 17)))
    with pytest.raises(ValueError, match="ask for 25 different cuts, the tree has 18"):
        sample_cuts(chain)
