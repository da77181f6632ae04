"""Tree operations against Python loops."""

import pytest
import torch

from hier_losses import functional as F
from hier_losses.taxonomy import Taxonomy


def paths(tax):
    return [[u for u in row if u >= 0] for row in tax.paths.tolist()]


def reference(tax, values, kind):
    path, out = paths(tax), torch.empty_like(values)
    for v in range(tax.num_nodes):
        if kind == "ancestor_sum":
            out[..., v] = sum(values[..., u] for u in path[v])
            continue
        below = values[..., [u for u in range(tax.num_nodes) if v in path[u]]]
        out[..., v] = {"subtree_sum": below.sum(-1), "subtree_max": below.amax(-1)}.get(kind, below.logsumexp(-1))
    return out


@pytest.mark.parametrize("op", ["subtree_sum", "subtree_max", "subtree_logsumexp", "ancestor_sum"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_sweeps(random_tree, close, op, shape):
    for seed in range(5):
        tax = random_tree(seed)
        values = 10 * torch.randn(*shape, tax.num_nodes, dtype=torch.float64)
        close(getattr(F, op)(values, tax), reference(tax, values, op))


def test_groups(random_tree, close):
    tax = random_tree(5)
    values = torch.randn(3, tax.num_nodes, dtype=torch.float64)
    expected = torch.full((3, tax.num_nodes + 1), -torch.inf, dtype=torch.float64)
    for parent in range(-1, tax.num_nodes):
        members = [v for v in range(tax.num_nodes) if tax.parent[v] == parent]
        if members:
            expected[:, parent + 1] = values[:, members].logsumexp(1)
    close(F.group_logsumexp(values, tax), expected)
    close(F.conditional_log_softmax(values, tax), values - expected[:, tax.parent + 1])


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("gap", [0.0, 60.0, 80.0, 5000.0])
def test_groups_far_below_their_level(even, gap, t11, close):
    """The short way shifts by the largest logit of a level; from e^-69 on each group has its own shift."""
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "w"), ("c", "q")]) if even else t11
    values = torch.randn(3, tax.num_nodes, dtype=torch.float64)
    values[1, tax.parent == 0] -= gap
    expected = torch.full((3, tax.num_nodes + 1), -torch.inf, dtype=torch.float64)
    for up in set(tax.parent.tolist()):
        expected[:, up + 1] = values[:, tax.parent == up].logsumexp(1)
    close(F.group_logsumexp(values, tax), expected)
    single = F.group_logsumexp(values.float(), tax)
    close(single, expected, rtol=1e-5, atol=1e-5)
    full = tax.group_size > 0
    leaf = values.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: F.group_logsumexp(z, tax)[:, full], leaf, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(lambda z: F.group_logsumexp(z, tax)[:, full], leaf)
    assert torch.autograd.gradgradcheck(lambda z: F.subtree_sum(F.ancestor_sum(z, tax).square(), tax), leaf)


@pytest.mark.parametrize("target", [[2, 3, 4], [0, 1, 3]])
def test_losses_with_short_ways_on_an_even_tree(target, close):
    """The tree whose leaves end on one level, whole and beside a shallow leaf without mass."""
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z")])
    ragged = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("c",)])
    columns = [0, 1, 3, 4, 5]
    z = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    wide = torch.full((3, 6), -torch.inf, dtype=torch.float64).index_copy(1, torch.tensor(columns), z)
    y = torch.tensor(target)
    moved = torch.tensor(columns)[y]
    for kind in ("jsd", "kl"):
        close(F.parent_child_consistency(z, tax, kind=kind), F.parent_child_consistency(wide, ragged, kind=kind))
    close(F.hce(z, y, tax), F.hce(wide, moved, ragged))
    close(
        F.hrn_tree_loss(z, y, tax, activation="identity"), F.hrn_tree_loss(wide, moved, ragged, activation="identity")
    )
    losses = (
        lambda z: F.parent_child_consistency(z, tax),
        lambda z: F.hrn_tree_loss(z, y, tax),
        lambda z: F.hce(z, y, tax),
    )
    for loss in losses:
        assert torch.autograd.gradcheck(loss, z)
        assert torch.autograd.gradgradcheck(loss, z)


def test_leaves_to_nodes_and_leaf_mass(t11, close):
    leaf = torch.randn(2, 7, dtype=torch.float64)
    spread = F.leaves_to_nodes(leaf, t11, -torch.inf)
    assert torch.equal(spread[:, t11.leaf], leaf)
    assert (spread[:, [0, 1, 3, 6]] == -torch.inf).all()
    mass = F.subtree_logsumexp(spread, t11)
    close(mass.exp(), F.subtree_sum(F.leaves_to_nodes(leaf.exp(), t11), t11))


def test_log_sum_exp_of_nothing_has_no_gradient(t11):
    values = torch.full((1, 11), -torch.inf)
    values[0, 2] = 1.0
    values.requires_grad_()
    out = F.subtree_logsumexp(values, t11)
    assert out[0, 0] == -torch.inf
    out[:, 2].sum().backward()
    assert torch.equal(values.grad.nonzero(), torch.tensor([[0, 2]]))


def test_integer_sums_stay_integers(t11):
    ones = torch.ones(11, dtype=torch.int64)
    assert torch.equal(F.ancestor_sum(ones, t11), t11.depth)
    leaves = (t11.leaf_index >= 0).long()
    assert torch.equal(F.subtree_sum(leaves, t11), t11.n_leaves)


def test_half_precision_sums_in_float32(t11):
    values = torch.randn(11).bfloat16()
    assert F.subtree_sum(values, t11).dtype == torch.float32


def test_lca(random_tree):
    for seed in range(5):
        tax = random_tree(seed)
        path, ids = paths(tax), torch.arange(tax.num_nodes)
        depth = F.lca_depth(ids[:, None], ids, tax)
        height = F.lca_height(ids[:, None], ids, tax)
        for a in range(tax.num_nodes):
            for b in range(tax.num_nodes):
                common = [u for u in path[a] if u in path[b]]
                assert depth[a, b] == len(common)
                expected = int(tax.height[common[-1]]) if common else tax.root_height
                assert height[a, b] == (0 if a == b else expected)
        assert torch.equal(depth.diagonal(), tax.depth)


def test_lca_of_inconsistent_paths_stops_at_the_first_difference():
    a = torch.tensor([[0, 3, 7], [0, -1, -1], [0, 3, 7]])
    b = torch.tensor([[1, 3, 7], [0, -1, -1], [0, 4, 7]])
    assert F.path_lca_depth(a, b).tolist() == [0, 1, 1]


@pytest.mark.parametrize("function", [F.lca_depth, F.lca_height])
@pytest.mark.parametrize(("a", "b", "named"), [([0, 99], [0], "a"), ([0], [1, -1], "b")])
def test_only_nodes_have_a_common_ancestor(function, a, b, named, t11):
    """-1 would wrap around to the last leaf, and a number beyond the tree is no index."""
    with pytest.raises(ValueError, match=rf"^{named} must lie in \[0, {t11.num_nodes}\), got (99|-1)"):
        function(torch.tensor(a), torch.tensor(b), t11)


def test_wrong_width(t11):
    for op in (F.subtree_sum, F.subtree_max, F.subtree_logsumexp, F.ancestor_sum, F.group_logsumexp, F.mcm):
        with pytest.raises(ValueError, match=r"11 columns, got shape \(2, 10\)"):
            op(torch.zeros(2, 10), t11)
    with pytest.raises(ValueError, match=r"7 columns, got shape \(2, 11\)"):
        F.leaves_to_nodes(torch.zeros(2, 11), t11)


def test_one_node():
    tax = Taxonomy(["a"], [-1])
    values = torch.tensor([[2.0]])
    for op in (F.subtree_sum, F.subtree_max, F.subtree_logsumexp, F.ancestor_sum):
        assert op(values, tax).tolist() == [[2.0]]
