"""Identities, bounds, gradients and numerical limits of the losses."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hier_losses import functional as F
from hier_losses import losses as L
from hier_losses.graph import LabelGraph
from hier_losses.taxonomy import Taxonomy

NODE_LOSSES = {
    "level_ce": F.level_cross_entropy,
    "level_ce_extended": lambda z, y, tax, **k: F.level_cross_entropy(z, y, tax, levels="extended", **k),
    "level_ce_options": lambda z, y, tax, **k: F.level_cross_entropy(
        z, y, tax, label_smoothing=0.1, class_weights=torch.ones(tax.num_nodes), level_reduction="mean", **k
    ),
    "focal": lambda z, y, tax, **k: F.level_cross_entropy(z, y, tax, focal_gamma=1.5, **k),
    "semantic_softmax": F.semantic_softmax,
    "hisce": F.hisce,
    "hisce_extended": lambda z, y, tax, **k: F.hisce(z, y, tax, levels="extended", **k),
    "tp_kl": F.tp_kl,
    "tp_kl_valid": lambda z, y, tax, **k: F.tp_kl(z, y, tax, softmax_over="valid", temperature=0.5, **k),
    "tp_kl_probs": lambda z, y, tax, **k: F.tp_kl(z, None, tax, target_probs=F.path_probs(y, tax), **k),
    "conditional": F.conditional_softmax_nll,
    "hce": F.hce,
    "hce_graph": lambda z, y, tax, **k: F.hce(z, y, LabelGraph.from_taxonomy(tax), **k),
    "hrn": F.hrn_tree_loss,
    "total": lambda z, y, tax, **k: F.hierarchy_aware_loss(z, y, tax, ce_weight=0.5, consistency_weight=2.0, **k),
    "jsd": lambda z, y, tax, **k: F.parent_child_consistency(z, tax, **k),
    "kl": lambda z, y, tax, **k: F.parent_child_consistency(z, tax, kind="kl", **k),
    "hinge": lambda z, y, tax, **k: F.parent_child_consistency(z, tax, kind="hinge", margin=0.3, **k),
    "mc_loss": lambda z, y, tax, **k: F.mc_loss(z, one_hot_closed(y, tax), tax, **k),
    "mc_loss_graph": lambda z, y, tax, **k: F.mc_loss(z, one_hot_closed(y, tax), LabelGraph.from_taxonomy(tax), **k),
}
LEAF_LOSSES = {
    "hxe": F.hxe,
    "hxe_tree": lambda z, y, tax, **k: F.hxe(z, y, tax, discount=0.4, normalize="tree", **k),
    "soft": F.soft_label_ce,
}
ALL = {**NODE_LOSSES, **LEAF_LOSSES}


def one_hot_closed(y, tax):
    return F.mcm(torch.zeros(len(y), tax.num_nodes, device=y.device).scatter(1, y[:, None].long(), 1.0), tax)


def inputs(name, tax, batch=4, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    leaf = name in LEAF_LOSSES
    width = tax.num_leaves if leaf else tax.num_nodes
    target = torch.randint(width, (batch,), generator=generator)
    logits = scale * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), tax.leaf[target] if leaf else target


def chain():
    return Taxonomy([f"c{i}" for i in range(18)] + ["side"], [*range(-1, 17), 3])


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name, t11, random_tree):
    for tax in (t11, random_tree(3, 14), chain(), Taxonomy(["a"], [-1])):
        logits, target = inputs(name, tax)
        assert gradcheck(lambda z, y=target, t=tax: ALL[name](z, y, t, reduction="none"), (logits,), atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_second_derivatives(name, t11):
    # t11 has lone children, shallow leaves and an empty bin below b: log-sum-exps of nothing must not leave NaN behind.
    logits, target = inputs(name, t11, batch=3, seed=2)
    assert gradgradcheck(lambda z: ALL[name](z, target, t11), (logits,), atol=1e-6)


@pytest.mark.parametrize("op", ["subtree_sum", "subtree_logsumexp", "ancestor_sum", "conditional_log_softmax", "mcm"])
def test_gradcheck_of_tree_operations(op, t11):
    values = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: getattr(F, op)(x, t11), (values,))


@pytest.mark.parametrize("name", ALL)
def test_empty_batch_is_zero_with_a_graph(name, t11):
    logits, target = inputs(name, t11, batch=0)
    loss = ALL[name](logits, target, t11)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.shape == logits.shape
    assert ALL[name](logits, target, t11, reduction="sum").item() == 0
    assert ALL[name](logits, target, t11, reduction="none").shape[0] == 0


@pytest.mark.parametrize("name", ALL)
def test_reductions_agree_and_samples_are_independent(name, t11, close):
    logits, target = inputs(name, t11, batch=5)
    each = ALL[name](logits, target, t11, reduction="none")
    close(ALL[name](logits, target, t11), each.mean())
    close(ALL[name](logits, target, t11, reduction="sum"), each.sum())
    close(ALL[name](logits[2:3], target[2:3], t11, reduction="none")[0], each[2])
    close(ALL[name](logits[2:3], target[2:3].int(), t11), each[2].mean())


@pytest.mark.parametrize("name", ALL)
def test_nan_propagates_and_stays_in_its_row(name, t11):
    logits, target = inputs(name, t11)
    column = int(t11.leaf_index[target[1]]) if name in LEAF_LOSSES else int(target[1])
    with torch.no_grad():
        logits[1, column] = torch.nan
    each = ALL[name](logits, target, t11, reduction="none").flatten(1) if name.startswith("mc") else None
    each = ALL[name](logits, target, t11, reduction="none") if each is None else each.sum(1)
    assert each.isnan().tolist() == [False, True, False, False]
    assert ALL[name](logits, target, t11).isnan()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_float32_stays_close_to_float64(name, scale, close):
    tax = Taxonomy.synthetic((3, 20, 150, 800), lone_child_rate=0.1, seed=0)
    logits, target = inputs(name, tax, scale=scale, dtype=torch.float32)
    wide = logits.detach().double().requires_grad_()
    loss, reference = ALL[name](logits, target, tax), ALL[name](wide, target, tax)
    assert loss.dtype == torch.float32
    close(loss, reference, rtol=3e-6, atol=3e-6)
    loss.backward()
    reference.backward()
    close(logits.grad, wide.grad, rtol=1e-3, atol=1e-6 * max(scale, 3))


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name, close):
    tax = Taxonomy.synthetic((3, 20, 150, 800), lone_child_rate=0.1, seed=0)
    for dtype in (torch.bfloat16, torch.float16):
        logits, target = inputs(name, tax, dtype=dtype)
        loss = ALL[name](logits, target, tax)
        assert loss.dtype == torch.float32
        close(loss, ALL[name](logits.detach().double(), target, tax), rtol=1e-5)
        loss.backward()
        assert logits.grad.dtype == dtype
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name, t11):
    logits, target = inputs(name, t11, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ALL[name](logits, target, t11)
    assert torch.equal(inside, ALL[name](logits, target, t11))


def test_long_log_sum_exp_in_bfloat16_autocast(close):
    # 16,343 nodes, as many as iNat21: summed in bfloat16 the path's terms would be lost.
    tax = Taxonomy.synthetic((3, 13, 51, 273, 1103, 4900, 10000), lone_child_rate=0.3175, seed=0)
    head = torch.nn.Linear(8, tax.num_nodes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
        loss = F.tp_kl(logits, tax.leaf[:2], tax)
    assert logits.dtype == torch.bfloat16
    close(loss, F.tp_kl(logits.double(), tax.leaf[:2], tax), rtol=1e-6)


def test_flat_tree_gives_cross_entropy(close):
    tax = Taxonomy(list("abcde"), [-1] * 5)
    z, y = inputs("tp_kl", tax, batch=7)
    reference = torch.nn.functional.cross_entropy(z, y)
    for loss in (F.tp_kl, F.level_cross_entropy, F.conditional_softmax_nll, F.hce, F.semantic_softmax):
        close(loss(z, y, tax), reference)
    close(F.hxe(z, y, tax, discount=0.0), reference)
    ours = F.level_cross_entropy(z, y, tax, label_smoothing=0.3)
    close(ours, torch.nn.functional.cross_entropy(z, y, label_smoothing=0.3))
    weight = torch.arange(1, 6, dtype=torch.float64)
    ours = F.level_cross_entropy(z, y, tax, label_smoothing=0.3, class_weights=weight, reduction="none")
    close(ours, torch.nn.functional.cross_entropy(z, y, weight, label_smoothing=0.3, reduction="none"))
    close(F.parent_child_consistency(z, tax), 0.0)


def test_tp_kl_identity_and_bounds(random_tree, close):
    tax = random_tree(2)
    z, y = inputs("tp_kl", tax, batch=9)
    ce = F.level_cross_entropy(z, y, tax, level_reduction="mean", reduction="none")
    level_mass = torch.stack([part.logsumexp(1) for part in z.split(tax.level_sizes, 1)], 1).log_softmax(1)
    length = tax.depth[y]
    share = (torch.arange(tax.num_levels) < length[:, None]) / length[:, None].double()
    balance = torch.xlogy(share, share).sum(1) - (share * level_mass).sum(1)
    loss = F.tp_kl(z, y, tax, softmax_over="all", reduction="none")
    close(loss, ce + balance)
    assert (loss >= ce).all()
    zero = F.tp_kl(torch.zeros_like(z), y, tax, softmax_over="all", reduction="none")
    close(zero, math.log(tax.num_nodes) - length.double().log())


def test_tp_kl_gradient_is_softmax_minus_path(t11, close):
    z, y = inputs("tp_kl", t11, batch=3)
    (grad,) = torch.autograd.grad(F.tp_kl(z, y, t11, softmax_over="all"), z)
    close(grad, (z.softmax(1) - F.path_probs(y, t11).double()) / 3, rtol=1e-6, atol=1e-8)


def test_shift_invariance(t11, close):
    z, y = inputs("tp_kl", t11, batch=6)
    per_level = torch.tensor([0.7, -1.0, 2.0], dtype=torch.float64)[t11.depth - 1]
    for loss in (F.tp_kl, F.hisce):
        close(loss(z + 5, y, t11), loss(z, y, t11))
    close(F.hisce(z + per_level, y, t11), F.hisce(z, y, t11))
    assert abs(F.tp_kl(z + per_level, y, t11) - F.tp_kl(z, y, t11)) > 1e-2


def test_tp_kl_does_not_see_parents(close):
    # Same levels and path nodes, other parents: only losses that couple parent and child may change.
    tax = Taxonomy.from_edges([("a", "x"), ("a", "y"), ("b", "u"), ("b", "v")])
    swapped = Taxonomy.from_edges([("a", "x"), ("a", "v"), ("b", "u"), ("b", "y")])
    z = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = z.new_empty(3, 6)
    other[:, swapped.indices(tax.names)] = z
    y, y_other = tax.indices("xux"), swapped.indices("xux")
    close(F.tp_kl(z, y, tax), F.tp_kl(other, y_other, swapped))
    assert abs(F.parent_child_consistency(z, tax) - F.parent_child_consistency(other, swapped)) > 1e-4
    assert abs(F.hisce(z, y, tax) - F.hisce(other, y_other, swapped)) > 1e-4


def test_target_probs(t11, close):
    z, y = inputs("tp_kl", t11, batch=5)
    probs = F.path_probs(y, t11).double()
    probs = probs / probs.sum(1, keepdim=True)
    hard = F.tp_kl(z, y, t11, softmax_over="all")
    close(F.tp_kl(z, None, t11, target_probs=probs), hard, rtol=1e-6)
    close(
        F.tp_kl(z, None, t11, target_probs=probs, softmax_over="valid"), F.tp_kl(z, y, t11, softmax_over="valid"), 1e-6
    )
    mixed = 0.3 * probs + 0.7 * probs.flip(0)
    ours = F.tp_kl(z, None, t11, target_probs=mixed, reduction="none")
    reference = torch.nn.functional.kl_div(z.log_softmax(1), mixed, reduction="none").sum(1)
    close(ours, reference, rtol=1e-6)
    close(L.TPKL(t11)(z, target_probs=mixed), ours.mean())


def test_hisce_limits(random_tree, close):
    for seed in range(3):
        tax = random_tree(seed)
        z, y = inputs("hisce", tax, batch=6)
        close(F.hisce(z, y, tax, eps=0.0), F.level_cross_entropy(z, y, tax))
        (grad,) = torch.autograd.grad(F.hisce(z, y, tax, eps=0.3), z)
        close(torch.stack([g.sum() for g in grad.split(tax.level_sizes, 1)]), torch.zeros(tax.num_levels), atol=1e-12)
        # The minimum over logits is the entropy of the smoothed rows: put their logarithms in.
        best, size = torch.full_like(z, -200.0), tax.n_siblings
        reference = torch.zeros(6, dtype=torch.float64)
        for row, node in enumerate(y.tolist()):
            for v in [u for u in tax.paths[node].tolist() if u >= 0]:
                count = int(size[v])
                group = (tax.parent == tax.parent[v]).nonzero()[:, 0]
                best[row, group] = math.log(0.2 / count) if count else 0.0
                best[row, v] = math.log(0.8) if count else 0.0
                if count:
                    reference[row] -= 0.8 * math.log(0.8) + 0.2 * math.log(0.2 / count)
        close(F.hisce(best, y, tax, eps=0.2, reduction="none"), reference, atol=1e-9)
        assert (F.hisce(z, y, tax, eps=0.2, reduction="none") >= reference - 1e-12).all()


def test_leaf_losses_reach_leaf_cross_entropy(random_tree, close):
    tax = random_tree(1)
    z, y = inputs("hxe", tax, batch=6)
    reference = torch.nn.functional.cross_entropy(z, tax.leaf_index[y])
    close(F.hxe(z, y, tax, discount=0.0), reference)
    close(F.soft_label_ce(z, y, tax, beta=1e5), reference)


def test_hxe_keeps_edges_that_underflow():
    # exp(-300) is 0 in float32; the published loss drops such edges and their gradient.
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    z = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    y = tax.indices(["x"])
    z.data = z.data[:, [2, 1, 0]]
    loss = F.hxe(z, y, tax, discount=0.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(z, tax.leaf_index[y]))
    assert loss > 100
    loss.backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0.9


def test_conditional_leaf_probabilities_sum_to_one(random_tree, close):
    tax = random_tree(4)
    z = torch.randn(2, tax.num_nodes, dtype=torch.float64)
    log_p = F.ancestor_sum(F.conditional_log_softmax(z, tax), tax)
    close(log_p[:, tax.leaf].exp().sum(1), torch.ones(2))
    y = torch.tensor([int(tax.leaf[0]), 0])
    close(F.conditional_softmax_nll(z, y, tax, reduction="none"), -log_p.gather(1, y[:, None])[:, 0])


def test_consistency_is_zero_for_marginals_of_one_distribution(random_tree, close):
    for seed in range(4):
        tax = random_tree(seed)
        leaf = torch.randn(3, tax.num_leaves, dtype=torch.float64)
        z = F.subtree_logsumexp(F.leaves_to_nodes(leaf, tax, -torch.inf), tax)
        for kind in ("jsd", "kl"):
            close(F.parent_child_consistency(z, tax, kind=kind), 0.0, atol=1e-12)
    jsd = F.parent_child_consistency(50 * torch.randn(20, tax.num_nodes), tax, reduction="none")
    assert ((jsd > -1e-6) & (jsd <= math.log(2) + 1e-6)).all()


def test_lone_children_have_no_sibling_terms_and_no_nan():
    tax = Taxonomy.from_paths([("a", "b", "c")])
    z = torch.randn(1, 3, requires_grad=True)
    for loss in (F.hisce, F.conditional_softmax_nll):
        value = loss(z, torch.tensor([2]), tax)
        assert value.item() == 0
        (grad,) = torch.autograd.grad(value, z)
        assert torch.equal(grad, torch.zeros(1, 3))


def test_large_logits_stay_finite(t11):
    for name, function in ALL.items():
        logits, target = inputs(name, t11, scale=1e4, dtype=torch.float32)
        loss = function(logits, target, t11)
        loss.backward()
        assert loss.isfinite(), name
        assert logits.grad.isfinite().all(), name


def test_sample_without_weighted_levels(t11):
    z = torch.randn(2, 11, requires_grad=True)
    y = torch.tensor([2, 7])
    assert F.tp_kl(z, y, t11, level_weights=(0.0, 0.0, 1.0), reduction="none")[0] == 0
    loss = F.level_cross_entropy(z, y, t11, level_weights=(0.0, 0.0, 1.0), level_reduction="mean", reduction="none")
    assert loss[0] == 0
    loss.sum().backward()
    assert z.grad.isfinite().all()


def test_focal_gradient_is_finite_where_the_target_is_certain(t11):
    z = torch.zeros(1, 11)
    z[0, [0, 3, 7]] = 200.0
    z.requires_grad_()
    F.level_cross_entropy(z, torch.tensor([7]), t11, focal_gamma=0.5).backward()
    assert z.grad.isfinite().all()


def test_total_is_the_weighted_sum_of_its_parts(t11, close):
    z, y = inputs("total", t11)
    loss = L.HierarchyAwareLoss(t11, alpha=0.5, lam=2.0, ce_weight=3.0, consistency_weight=4.0, eps=(0.0, 0.1, 0.2))
    parts = loss.parts(z, y)
    close(parts["tp_kl"], F.tp_kl(z, y, t11))
    close(parts["hisce"], F.hisce(z, y, t11, eps=(0.0, 0.1, 0.2)))
    close(parts["ce"], F.level_cross_entropy(z, y, t11))
    close(parts["consistency"], F.parent_child_consistency(z, t11))
    expected = 0.5 * parts["tp_kl"] + 2 * parts["hisce"] + 3 * parts["ce"] + 4 * parts["consistency"]
    close(parts["total"], expected)
    close(loss(z, y), expected)
    default = L.HierarchyAwareLoss(t11)
    assert set(default.parts(z, y)) == {"total", "tp_kl", "hisce"}
    nothing = L.HierarchyAwareLoss(t11, alpha=0.0, lam=0.0)(z, y)
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))
