"""The losses against slow float64 references on random ragged trees, and the table of the eleven-node tree."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hier_losses import functional as F
from hier_losses.graph import LabelGraph
from hier_losses.taxonomy import Taxonomy

SEEDS = range(8)
TABLE = {
    7: (1.227095, 1.204021, 3.687649, 2.620416, 1.694358, 1.017366, 0.558641, 0.079308, 1.330055),
    10: (1.396339, 1.373265, 4.115998, 1.821650, 3.683707, 3.006714, 1.910929, 0.271285, 2.846335),
    2: (2.542596, 1.642929, 1.569503, 1.642929, 2.542596, 1.865604, 1.382073, 0.196206, 1.902364),
    3: (1.948235, 1.481424, 2.980711, 2.174804, 1.142839),
}


@pytest.fixture(scope="module")
def oracles():
    spec = importlib.util.spec_from_file_location("loss_oracles", Path(__file__).with_name("_loss_oracles.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[*SEEDS, "chain", "flat", "one", "wide"])
def case(request, random_tree, oracles):
    """A tree, its reference, node logits (N, N) and every node as a target."""
    if request.param == "chain":
        tax = Taxonomy([f"c{i}" for i in range(18)] + ["side"], [*range(-1, 17), 3])
    elif request.param == "flat":
        tax = Taxonomy(list("abcd"), [-1] * 4)
    elif request.param == "one":
        tax = Taxonomy(["a"], [-1])
    elif request.param == "wide":
        tax = Taxonomy.synthetic((3, 9, 30), seed=1)
    else:
        tax = random_tree(request.param)
    logits = 3 * torch.randn(
        tax.num_nodes, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    return tax, oracles.Brute(tax.parent.tolist()), logits, torch.arange(tax.num_nodes)


def rows(logits, target):
    return zip(logits.tolist(), target.tolist(), strict=True)


def level_weights(tax):
    return [0.5 + level % 3 for level in range(tax.num_levels)]


def fold(terms, weights, mean):
    total = sum(weights[level - 1] * term for level, term in terms.items())
    return total / sum(weights[level - 1] for level in terms) if mean else total


@pytest.mark.parametrize("node", TABLE)
def test_table_of_eleven_nodes(t11, close, node):
    z, y = torch.sin(torch.arange(11, dtype=torch.float64) + 1)[None], torch.tensor([node])
    ours = [
        F.tp_kl(z, y, t11, softmax_over="all"),
        F.level_cross_entropy(z, y, t11, level_reduction="mean"),
        F.hisce(z, y, t11, eps=0.1),
        F.conditional_softmax_nll(z, y, t11),
        F.hce(z, y, t11),
    ]
    if t11.leaf_index[node] >= 0:
        leaf = z[:, t11.leaf]
        ours += [
            F.hxe(leaf, y, t11, discount=0.0),
            F.hxe(leaf, y, t11, discount=0.3),
            F.hxe(leaf, y, t11, discount=0.3, normalize="tree"),
            F.soft_label_ce(leaf, y, t11, beta=4.0),
        ]
    close(torch.stack(ours), TABLE[node], rtol=0, atol=1e-6)


def test_valid_softmax_and_penalties_of_eleven_nodes(t11, close):
    z = torch.sin(torch.arange(11, dtype=torch.float64) + 1)[None]
    close(F.tp_kl(z, torch.tensor([2]), t11, softmax_over="valid"), 1.642929, rtol=0, atol=1e-6)
    close(F.tp_kl(z, torch.tensor([3]), t11), 1.514924, rtol=0, atol=1e-6)
    close(F.parent_child_consistency(z, t11), (0.002303 + 0.139223) / 2, rtol=0, atol=1e-6)
    close(F.parent_child_consistency(z, t11, kind="hinge"), 0.086484, rtol=0, atol=1e-6)
    close(F.parent_child_consistency(z, t11, kind="hinge", margin=0.1), 0.117200, rtol=0, atol=1e-6)
    multi_hot = F.mcm(torch.zeros(1, 11).index_fill(1, torch.tensor([7, 10]), 1.0), t11)
    assert multi_hot.nonzero()[:, 1].tolist() == [0, 1, 3, 6, 7, 10]
    close(F.mc_loss(z, multi_hot, t11), 0.549964, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("levels", ["ragged", "extended"])
def test_level_cross_entropy(case, close, levels, mean):
    tax, brute, z, y = case
    weights, smoothing = level_weights(tax), [0.1 * (level % 4) for level in range(tax.num_levels)]
    class_weights = [0.2 + node % 5 for node in range(tax.num_nodes)]
    settings = {"levels": levels, "level_reduction": "mean" if mean else "sum", "reduction": "none"}
    extended = levels == "extended"
    reference = [fold(brute.level_ce(x, v, extended), weights, mean) for x, v in rows(z, y)]
    close(F.level_cross_entropy(z, y, tax, level_weights=weights, **settings), reference)
    reference = [fold(brute.level_ce(x, v, extended, smoothing, class_weights), weights, mean) for x, v in rows(z, y)]
    ours = F.level_cross_entropy(
        z,
        y,
        tax,
        level_weights=torch.tensor(weights),
        label_smoothing=smoothing,
        class_weights=torch.tensor(class_weights, dtype=torch.float64),
        **settings,
    )
    close(ours, reference, rtol=1e-6)
    reference = [fold(brute.level_ce(x, v, extended, gamma=2.0), [1.0] * tax.num_levels, mean) for x, v in rows(z, y)]
    close(F.level_cross_entropy(z, y, tax, focal_gamma=2.0, **settings), reference)


@pytest.mark.parametrize("levels", ["ragged", "extended"])
def test_hisce(case, close, levels):
    tax, brute, z, y = case
    eps = [0.05 + 0.1 * (level % 5) for level in range(tax.num_levels)]
    ones = [1.0] * tax.num_levels
    reference = [fold(brute.hisce(x, v, eps, levels == "extended"), ones, False) for x, v in rows(z, y)]
    close(F.hisce(z, y, tax, eps=torch.tensor(eps, dtype=torch.float64), levels=levels, reduction="none"), reference)
    weights = level_weights(tax)
    reference = [fold(brute.hisce(x, v, [0.1] * 99, levels == "extended"), weights, True) for x, v in rows(z, y)]
    ours = F.hisce(z, y, tax, levels=levels, level_weights=weights, level_reduction="mean", reduction="none")
    close(ours, reference)


def test_hisce_on_deep_narrow_trees_reads_padded_groups(oracles, close):
    # D * largest group < N: the gather is used; the trees of `case` mostly take the masks.
    tax = Taxonomy.synthetic((4, 8, 16, 24, 30), seed=3)
    assert tax.num_levels * tax.max_group_size < tax.num_nodes
    brute = oracles.Brute(tax.parent.tolist())
    z = torch.randn(tax.num_nodes, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(tax.num_nodes)
    reference = [sum(brute.hisce(x, v, [0.2] * 5).values()) for x, v in rows(z, y)]
    close(F.hisce(z, y, tax, eps=0.2, reduction="none"), reference)
    reference = [brute.conditional(x, v) for x, v in rows(z, y)]
    close(F.conditional_softmax_nll(z, y, tax, reduction="none"), reference)


def test_tp_kl(case, close):
    tax, brute, z, y = case
    reference = [brute.tp_kl(x, v) for x, v in rows(z, y)]
    close(F.tp_kl(z, y, tax, softmax_over="all", reduction="none"), reference)
    valid = [brute.tp_kl(x, v, valid=True) for x, v in rows(z, y)]
    close(F.tp_kl(z, y, tax, softmax_over="valid", reduction="none"), valid)
    auto = [reference[v] if v in brute.leaves else valid[v] for v in y.tolist()]
    close(F.tp_kl(z, y, tax, reduction="none"), auto)
    weights = level_weights(tax)
    reference = [brute.tp_kl([i / 0.3 for i in x], v, weights=weights) for x, v in rows(z, y)]
    ours = F.tp_kl(z, y, tax, softmax_over="all", temperature=0.3, level_weights=weights, reduction="none")
    close(ours, reference)


def test_conditional_softmax_nll(case, close):
    tax, brute, z, y = case
    for alpha in (0.0, 0.4):
        reference = [brute.conditional(x, v, alpha) for x, v in rows(z, y)]
        close(F.conditional_softmax_nll(z, y, tax, discount=alpha, reduction="none"), reference)


def test_hce_on_trees_and_their_graphs(case, close):
    tax, brute, z, y = case
    reference = [brute.hce(x, v) for x, v in rows(z, y)]
    close(F.hce(z, y, tax, reduction="none"), reference)
    close(F.hce(z, y, LabelGraph.from_taxonomy(tax), reduction="none"), reference)


def test_hxe(case, close):
    tax, brute, z, _ = case
    leaf, z = tax.leaf, z[: tax.num_leaves, : tax.num_leaves]
    for alpha, normalize in ((0.0, "none"), (0.3, "none"), (0.3, "tree"), (-0.2, "none")):
        reference = [brute.hxe(x, v, alpha, normalize == "tree") for x, v in rows(z, leaf)]
        close(F.hxe(z, leaf, tax, discount=alpha, normalize=normalize, reduction="none"), reference, rtol=1e-12)


def test_soft_label_ce(case, close):
    tax, brute, z, _ = case
    leaf, z = tax.leaf, z[: tax.num_leaves, : tax.num_leaves]
    for beta in (0.0, 4.0, 30.0):
        reference = [brute.soft(x, v, beta) for x, v in rows(z, leaf)]
        close(F.soft_label_ce(z, leaf, tax, beta=beta, reduction="none"), reference, rtol=1e-12)


def test_soft_label_distance_is_over_leaf_pairs(close, oracles):
    # One top node: no pair of leaves meets at the virtual root, so the largest distance is below its height.
    tax = Taxonomy.from_paths([("r", "a", "x"), ("r", "a", "y"), ("r", "b")])
    z = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    brute = oracles.Brute(tax.parent.tolist())
    close(F.soft_label_ce(z, tax.leaf[1:2], tax, beta=3.0), brute.soft(z[0].tolist(), int(tax.leaf[1]), 3.0))


def test_parent_child_consistency(case, close):
    tax, brute, z, _ = case
    for kind in ("jsd", "kl"):
        reference = [brute.consistency(x, kind) for x in z.tolist()]
        close(F.parent_child_consistency(z, tax, kind=kind, reduction="none"), reference, rtol=1e-7)
    for margin in (0.0, 0.25):
        reference = [brute.hinge(x, margin) for x in z.tolist()]
        close(F.parent_child_consistency(z, tax, kind="hinge", margin=margin, reduction="none"), reference)


def test_mc_loss_on_trees(case, close, oracles):
    tax, brute, z, _ = case
    seeds = torch.rand(z.shape, generator=torch.Generator().manual_seed(3)) < 0.2
    labels = F.mcm(seeds.double(), tax)
    below = [brute.below(v) for v in range(tax.num_nodes)]
    close(F.mcm(z, tax), [[max(x[u] for u in below[v]) for v in range(tax.num_nodes)] for x in z.tolist()], rtol=0)
    close(labels, [[max(x[u] for u in below[v]) for v in range(tax.num_nodes)] for x in seeds.tolist()], rtol=0)
    reference = [oracles.mc_loss(x, y, below) for x, y in zip(z.tolist(), labels.tolist(), strict=True)]
    close(F.mc_loss(z, labels, tax, reduction="none"), reference, rtol=1e-7)
    close(F.mc_loss(z, labels, tax), torch.tensor(reference, dtype=torch.float64).mean(), rtol=1e-7)
    close(F.mc_loss(z, labels.bool(), LabelGraph.from_taxonomy(tax), reduction="none"), reference, rtol=1e-7)
    mask = torch.rand(z.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    kept = torch.tensor(reference, dtype=torch.float64)[mask]
    close(F.mc_loss(z, labels, tax, mask), kept.sum() / max(len(kept), 1), rtol=1e-7)
    close(F.mc_loss(z, labels, tax, mask, reduction="sum"), kept.sum(), rtol=1e-7)


def test_losses_on_a_graph_with_two_ways_to_a_node(close, oracles):
    graph = LabelGraph.from_edges([("r", "a"), ("r", "b"), ("a", "x"), ("b", "x"), ("x", "y"), ("r", "y"), ("b", "w")])
    below = [[] for _ in range(graph.num_nodes)]
    for v in range(graph.num_nodes):
        for u in range(graph.num_nodes):
            stack = [u]
            while stack:
                node = stack.pop()
                if node == v and u not in below[v]:
                    below[v].append(u)
                edges = zip(graph.edge_parent.tolist(), graph.edge_child.tolist(), strict=True)
                stack += [p for p, c in edges if c == node]
    z = torch.randn(6, graph.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6)
    reference = [oracles.lse(x) - oracles.lse(x[u] for u in below[v]) for x, v in rows(z, y)]
    close(F.hce(z, y, graph, reduction="none"), reference)
    labels = F.mcm(torch.eye(6), graph)
    close(labels, [[float(u in below[v]) for v in range(6)] for u in range(6)], rtol=0)
    reference = [oracles.mc_loss(x, y, below) for x, y in zip(z.tolist(), labels.tolist(), strict=True)]
    close(F.mc_loss(z, labels, graph, reduction="none"), reference, rtol=1e-7)


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_hrn_tree_loss_against_all_label_sets(t11, oracles, close, activation):
    for tax in (t11, Taxonomy(list("abcdef"), [-1, 0, 1, 1, 3, -1])):
        brute = oracles.Brute(tax.parent.tolist())
        z = 2 * torch.randn(
            tax.num_nodes, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
        )
        y = torch.arange(tax.num_nodes)
        f = z.sigmoid() if activation == "sigmoid" else z
        reference = [brute.hrn(x, v) for x, v in rows(f, y)]
        close(F.hrn_tree_loss(z, y, tax, activation=activation, reduction="none"), reference)


def test_semantic_softmax(case, close):
    tax, brute, z, y = case
    deeper = [sum(d >= level for d in brute.depth) for level in range(1, tax.num_levels + 1)]
    weights = [min(tax.num_nodes / count, 5.0) for count in deeper]
    close(F.semantic_softmax_weights(tax, 5.0), weights, rtol=1e-6)
    smooth = [0.2] * tax.num_levels
    reference = [fold(brute.level_ce(x, v, smoothing=smooth), weights, False) for x, v in rows(z, y)]
    ours = F.semantic_softmax(z, y, tax, max_weight=5.0, label_smoothing=0.2, reduction="none")
    close(ours, reference, rtol=1e-6)


def test_path_probs(case, close):
    tax, brute, _, y = case
    weights, smooth = level_weights(tax), [0.1 * (level % 4) for level in range(tax.num_levels)]
    reference = torch.zeros(tax.num_nodes, tax.num_nodes, dtype=torch.float64)
    for v in y.tolist():
        total = sum(weights[: brute.depth[v]])
        for level, node in enumerate(brute.paths[v], 1):
            mass = weights[level - 1] / total
            reference[v, node] += mass * (1 - smooth[level - 1])
            for other in brute.classes(level, False):
                reference[v, other] += mass * smooth[level - 1] / len(brute.classes(level, False))
    close(F.path_probs(y, tax, label_smoothing=smooth, level_weights=weights), reference, rtol=1e-5, atol=1e-7)
