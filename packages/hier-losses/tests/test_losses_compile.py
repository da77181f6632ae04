"""torch.compile(fullgraph=True) gives the eager loss and gradient."""

import pytest
import torch

from hier_losses import functional as F
from hier_losses import losses as L
from hier_losses import treecuts
from hier_losses.graph import LabelGraph
from hier_losses.taxonomy import Taxonomy

pytestmark = pytest.mark.compile


def closed(y, tax):
    return F.mcm(torch.zeros(len(y), tax.num_nodes).scatter(1, y[:, None], 1.0), tax)


NODE = {
    "level_ce": F.level_cross_entropy,
    "level_ce_options": lambda z, y, t: F.level_cross_entropy(
        z,
        y,
        t,
        levels="extended",
        level_reduction="mean",
        level_weights=(1.0, 2.0, 3.0),
        label_smoothing=(0.1, 0.2, 0.3),
    ),
    "class_weights": lambda z, y, t: F.level_cross_entropy(z, y, t, class_weights=torch.ones(11), focal_gamma=2.0),
    "semantic_softmax": F.semantic_softmax,
    "hisce": lambda z, y, t: F.hisce(z, y, t, eps=(0.1, 0.2, 0.3)),
    "hisce_extended": lambda z, y, t: F.hisce(z, y, t, levels="extended", reduction="none").sum(),
    "tp_kl": lambda z, y, t: F.tp_kl(z, y, t, level_weights=(1.0, 2.0, 3.0), temperature=0.5),
    "tp_kl_probs": lambda z, y, t: F.tp_kl(z, None, t, target_probs=F.path_probs(y, t, label_smoothing=0.1)),
    "conditional": F.conditional_softmax_nll,
    "hce": F.hce,
    "hrn": F.hrn_tree_loss,
    "jsd": lambda z, y, t: F.parent_child_consistency(z, t),
    "kl": lambda z, y, t: F.parent_child_consistency(z, t, kind="kl"),
    "hrn_identity": lambda z, y, t: F.hrn_tree_loss(z, y, t, activation="identity", ignore_index=3),
    "headline": lambda z, y, t: F.hierarchy_aware_loss(z, y, t, ignore_index=3),
    "node_classification": lambda z, y, t: treecuts.node_classification_loss(z, y, t, class_weights=torch.ones(11)),
    "hinge": lambda z, y, t: F.parent_child_consistency(z, t, kind="hinge", margin=0.1),
    "mc_loss": lambda z, y, t: F.mc_loss(z, closed(y, t), t, torch.arange(11) > 1),
    "parts": lambda z, y, t: sum(F.hierarchy_aware_parts(z, y, t, ce_weight=1.0, consistency_weight=1.0).values()),
    "sweeps": lambda z, y, t: (F.subtree_sum(z, t) * F.conditional_log_softmax(z, t)).sum(),
    "lca": lambda z, y, t: (F.lca_depth(y, y.flip(0), t) * F.lca_height(y, y.flip(0), t) * z.sum(1)).sum(),
}
LEAF = {
    "hxe": lambda z, y, t: F.hxe(z, y, t, normalize="tree"),
    "soft": F.soft_label_ce,
}


def same(compiled, eager, logits):
    results = []
    for function in (compiled, eager):
        z = logits.clone().requires_grad_()
        loss = function(z)
        loss.backward()
        results.append((loss.detach(), z.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)


def compile_full(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize("name", [*NODE, *LEAF])
def test_one_graph_for_changing_batch_sizes(name, t11):
    function, width = {**NODE, **LEAF}[name], 7 if name in LEAF else 11
    compiled = compile_full(lambda z, y: function(z, y, t11), dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for targets in ([2, 7, 9, 5], [2, 7, 8, 10, 4, 9, 9] if name in LEAF else [2, 7, 3, 10, 0, 6, 9]):
        y = torch.tensor(targets)
        logits = torch.randn(len(y), width, generator=generator)
        same(lambda z, y=y: compiled(z, y), lambda z, y=y: function(z, y, t11), logits)


def test_every_node_loss_is_there():
    """A loss that is added later stands in NODE or LEAF too, which the test above goes through."""
    named = {
        "level_cross_entropy",
        "tp_kl",
        "hisce",
        "semantic_softmax",
        "conditional_softmax_nll",
        "hce",
        "hrn_tree_loss",
    }
    named |= {
        "hierarchy_aware_loss",
        "hierarchy_aware_parts",
        "parent_child_consistency",
        "mc_loss",
        "hxe",
        "soft_label_ce",
    }
    no_losses = {"mcm", "path_probs", "semantic_softmax_weights", "lca_depth", "lca_height", "leaves_to_nodes"}
    no_losses |= {"path_lca_depth", "ancestor_sum", "subtree_sum", "subtree_max", "subtree_logsumexp"}
    no_losses |= {"group_logsumexp", "conditional_log_softmax"}
    assert set(F.__all__) - no_losses == named


@pytest.mark.parametrize("name", ["hrn", "jsd", "kl", "conditional", "headline"])
def test_leaves_on_one_level(name):
    """These take shorter ways on such trees."""
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z")])
    compiled = compile_full(lambda z, y: NODE[name](z, y, tax), dynamic=True)
    for y in (torch.tensor([2, 3]), torch.tensor([4, 0, 2, 1])):
        same(lambda z, y=y: compiled(z, y), lambda z, y=y: NODE[name](z, y, tax), torch.randn(len(y), 5))


def test_graph_losses(t11):
    graph, y = LabelGraph.from_taxonomy(t11), torch.tensor([2, 7, 3, 10])
    labels, logits = closed(y, t11), torch.randn(4, 11)
    same(compile_full(lambda z: F.hce(z, y, graph)), lambda z: F.hce(z, y, graph), logits)
    same(compile_full(lambda z: F.mc_loss(z, labels, graph)), lambda z: F.mc_loss(z, labels, graph), logits)


def test_modules_and_changing_batch_sizes(t11):
    loss = L.HierarchyAwareLoss(t11, consistency_weight=0.5, ce_weight=1.0, eps=(0.0, 0.1, 0.2))
    compiled = compile_full(loss, dynamic=True)
    for batch in (4, 7, 12):
        y = torch.arange(batch) % 11
        same(lambda z, y=y: compiled(z, y), lambda z, y=y: loss(z, y), torch.randn(batch, 11))


def test_autocast(t11):
    y = torch.tensor([2, 7, 3, 10])
    logits = torch.randn(4, 11)

    def step(z):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.hierarchy_aware_loss(z.bfloat16(), y, t11)

    same(compile_full(step), step, logits)


@pytest.mark.parametrize("function", [F.level_cross_entropy, F.hisce, F.tp_kl, F.hce, F.hrn_tree_loss, F.hxe])
def test_negative_targets_never_wrap(function, t11):
    """-100 counts nowhere; another number that is no node cannot raise from a graph and gives NaN."""
    compiled = compile_full(lambda z, y: function(z, y, t11))
    z = torch.randn(3, 7 if function is F.hxe else 11)
    y = torch.tensor([2, -100, 7])
    torch.testing.assert_close(compiled(z, y), function(z[[0, 2]], y[[0, 2]], t11))
    for wrong in (-1, 11, *([3] if function is F.hxe else [])):
        leaf = z.clone().requires_grad_()
        loss = compiled(leaf, torch.tensor([2, wrong, 7]))
        loss.backward()
        assert loss.isnan()
        assert leaf.grad[1].isnan().all()


def test_options(t11):
    weight, classes = torch.arange(11.0), t11.leaf.flip(0)
    y = torch.tensor([0, -100, 5, 6])

    def loss(z):
        return F.hierarchy_aware_loss(z, y, t11, classes=classes, class_weights=weight, sample_weight=weight[:4] + 1)

    same(compile_full(loss), loss, torch.randn(4, 11))
    compiled = compile_full(lambda z, y: F.hce(z, y, t11, classes=classes))
    assert compiled(torch.randn(2, 11), torch.tensor([7, 0])).isnan()
