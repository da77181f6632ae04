"""The options that every loss has, against torch's cross-entropy on flat trees and against loops on deep ones."""

import math

import pytest
import torch

from hier_losses import functional as F
from hier_losses import losses as L
from hier_losses.taxonomy import Taxonomy

CE = torch.nn.functional.cross_entropy
NODE = {
    "level_ce": F.level_cross_entropy,
    "extended": lambda z, y, t, **k: F.level_cross_entropy(z, y, t, levels="extended", label_smoothing=0.1, **k),
    "semantic": F.semantic_softmax,
    "hisce": F.hisce,
    "tp_kl": F.tp_kl,
    "tp_kl_smooth": lambda z, y, t, **k: F.tp_kl(z, y, t, label_smoothing=0.1, **k),
    "conditional": lambda z, y, t, **k: F.conditional_softmax_nll(z, y, t, label_smoothing=0.1, **k),
    "hce": F.hce,
    "hrn": F.hrn_tree_loss,
    "headline": lambda z, y, t, **k: F.hierarchy_aware_loss(z, y, t, ce_weight=0.5, **k),
}
LEAF = {"hxe": F.hxe, "soft": F.soft_label_ce}
ALL = {**NODE, **LEAF}


def inputs(name, tax, batch=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = tax.num_leaves if name in LEAF else tax.num_nodes
    pool = tax.leaf if name in LEAF else torch.arange(tax.num_nodes)
    target = pool[torch.randint(len(pool), (batch,), generator=generator)]
    return torch.randn(batch, width, generator=generator, dtype=torch.float64), target


def flat(num=5):
    return Taxonomy.from_paths([(f"c{i}",) for i in range(num)])


@pytest.fixture
def even():
    """Three levels, all leaves on the last one."""
    return Taxonomy.synthetic((2, 4, 9), seed=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
def test_ignored_samples_count_nowhere(name, ignore_index, t11, close):
    z, y = inputs(name, t11)
    options = {} if ignore_index == -100 else {"ignore_index": ignore_index}
    y = torch.where(y == 7, 8, y)
    y[[1, 4]] = ignore_index
    kept = y != ignore_index
    for reduction in ("mean", "sum"):
        ours, other = z.clone().requires_grad_(), z[kept].clone().requires_grad_()
        a = ALL[name](ours, y, t11, reduction=reduction, **options)
        b = ALL[name](other, y[kept], t11, reduction=reduction)
        a.backward()
        b.backward()
        close(a, b)
        close(ours.grad[kept], other.grad)
        assert not ours.grad[~kept].any()
    loss = ALL[name](z, y, t11, reduction="none", **options)
    assert not loss[~kept].any()
    everything = z.clone().requires_grad_()
    nothing = ALL[name](everything, torch.full_like(y, ignore_index), t11, **options)
    nothing.backward()
    assert nothing == 0
    assert not everything.grad.any()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sample_weights_count_samples(name, reduction, t11, close):
    z, y = inputs(name, t11)
    times = torch.tensor([1, 0, 3, 2, 1, 1])
    again = torch.arange(6).repeat_interleave(times)
    ours = ALL[name](z, y, t11, sample_weight=times.double(), reduction=reduction)
    close(ours, ALL[name](z[again], y[again], t11, reduction=reduction))
    close(ALL[name](z, y, t11, sample_weight=torch.zeros(6), reduction=reduction), 0.0)


@pytest.mark.parametrize("name", ALL)
def test_class_weights_are_those_of_torch_on_a_flat_tree(name, close):
    """With one level all of these are the cross-entropy up to a smoothing over classes or the HRN background class."""
    tax, weight = flat(), torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1], dtype=torch.float64)
    z, y = inputs(name, tax)
    y[2] = -100
    single = ALL[name](z, y, tax, reduction="none")
    if name in ("level_ce", "semantic", "tp_kl", "hce", "hxe"):
        for reduction in ("mean", "sum", "none"):
            reference = CE(z, y, weight=weight, reduction=reduction)
            scale = math.exp(0.1) if name == "hxe" else 1.0  # its first level is discounted too
            close(scale * ALL[name](z, y, tax, class_weights=weight, reduction=reduction), reference)
        return
    if name in ("extended", "hisce"):
        smoothing = 0.1 if name == "extended" else 0.1 * 5 / 4  # HiSCE spares the class itself
        z[:, 0] = -1.0
        reference = CE(z, y, weight=weight, label_smoothing=smoothing)
        close(ALL[name](z, y, tax, class_weights=weight), reference)
        return
    if name == "headline":
        return
    share = torch.where(y >= 0, weight[y.clamp(min=0)], 0.0)
    close(ALL[name](z, y, tax, class_weights=weight), (single * share).sum() / share.sum())


def test_class_weights_of_an_even_tree_are_a_loop_over_levels(even, close):
    z, _ = inputs("level_ce", even)
    y = even.leaf[torch.tensor([0, 3, 8, 2, 2, 5])]
    weight = torch.rand(even.num_nodes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path, total = even.paths[y], 0.0
    for level, part in enumerate(z.split(even.level_sizes, 1)):
        first = int(even.level_ptr[level])
        total = total + CE(part, path[:, level] - first, weight=weight[first : first + part.shape[1]])
    close(F.level_cross_entropy(z, y, even, class_weights=weight), total)
    parts = F.hierarchy_aware_parts(z, y, even, ce_weight=1.0, class_weights=weight, level_weights=(1.0, 2.0, 0.5))
    close(parts["hisce"], F.hisce(z, y, even, class_weights=weight, level_weights=(1.0, 2.0, 0.5)))
    close(parts["ce"], F.level_cross_entropy(z, y, even, class_weights=weight, level_weights=(1.0, 2.0, 0.5)))
    close(parts["tp_kl"], F.tp_kl(z, y, even, class_weights=weight, level_weights=(1.0, 2.0, 0.5)))
    close(parts["total"], parts["tp_kl"] + parts["hisce"] + parts["ce"])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_weighted_hisce_is_a_loop(seed, wide, random_tree, close):
    """The two ways to read siblings, padded and level by level, against the smoothed rows written out."""
    tax = Taxonomy([f"n{i}" for i in range(9)], [-1] * 4 + [0] * 5) if wide else random_tree(seed)
    z, y = inputs("hisce", tax, seed=seed)
    weight = torch.rand(tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    reference = []
    for row, target in zip(z, y.tolist(), strict=True):
        total = 0.0
        for level, v in enumerate(v for v in tax.paths[target].tolist() if v >= 0):
            low, high = int(tax.level_ptr[level]), int(tax.level_ptr[level + 1])
            log_p = row - row[low:high].logsumexp(0)
            others = [s for s in range(low, high) if s != v and tax.parent[s] == tax.parent[v]]
            share = {v: 0.8, **{s: 0.2 / len(others) for s in others}} if others else {v: 1.0}
            total -= sum(share[s] * weight[s] * log_p[s] for s in share)
        reference.append(total)
    ours = F.hisce(z, y, tax, eps=0.2, class_weights=weight, reduction="none")
    close(ours, torch.stack(reference))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shares_of_nodes_are_a_mean_over_targets(name, reduction, t11, close):
    z, one = inputs(name, t11)
    _, two = inputs(name, t11, seed=1)
    lam = torch.tensor([0.3, 1.0, 0.5, 0.9, 0.7, 0.0], dtype=torch.float64)
    shares = torch.zeros(6, t11.num_nodes, dtype=torch.float64)
    shares = shares.scatter_add(1, one[:, None], lam[:, None]).scatter_add(1, two[:, None], 1 - lam[:, None])
    ours = ALL[name](z, shares, t11, reduction=reduction)
    single = lam * ALL[name](z, one, t11, reduction="none") + (1 - lam) * ALL[name](z, two, t11, reduction="none")
    close(ours, {"mean": single.mean(), "sum": single.sum(), "none": single}[reduction])
    if name in LEAF:
        close(ALL[name](z, shares[:, t11.leaf], t11, reduction=reduction), ours)
    shares[3] = 0  # no label
    kept = torch.arange(6) != 3
    close(ALL[name](z, shares, t11), single[kept].mean())


def test_shares_of_a_flat_tree_are_probabilities_of_torch(close):
    tax = flat()
    z, _ = inputs("level_ce", tax)
    shares = torch.rand(6, 5, dtype=torch.float64)
    shares = shares / shares.sum(1, keepdim=True)
    close(F.level_cross_entropy(z, shares, tax), CE(z, shares))
    close(F.hxe(z, shares, tax), CE(z, shares) * math.exp(-0.1))
    parts = F.hierarchy_aware_parts(z, shares, tax, reduction="none")
    close(parts["tp_kl"], CE(z, shares, reduction="none"))
    for wrong in (shares * 2, shares - 0.3):
        with pytest.raises(ValueError, match="target row 0 must hold shares of at least 0 that sum to 1"):
            F.hce(z, wrong, tax)
    with pytest.raises(ValueError, match=r"integer node ids of shape \(6,\), or shares of shape \(6, 5\)"):
        F.hce(z, shares[:, :4], tax)


@pytest.mark.parametrize("name", ALL)
def test_pixels(name, t11, close):
    z, y = inputs(name, t11, 24)
    y[5] = -100
    picture, labels = z.view(2, 3, 4, -1).movedim(-1, 1), y.view(2, 3, 4)
    for reduction in ("mean", "none"):
        ours = ALL[name](picture, labels, t11, reduction=reduction)
        close(ours, ALL[name](z, y, t11, reduction=reduction).view(ours.shape))
    weight = torch.rand(24, dtype=torch.float64)
    ours = ALL[name](picture, labels, t11, sample_weight=weight.view(2, 3, 4))
    close(ours, ALL[name](z, y, t11, sample_weight=weight))
    with pytest.raises(ValueError, match=r"target must have shape \(2, 3, 4\), one node id per sample, got \(24,\)"):
        ALL[name](picture, y, t11)


def test_pixels_of_a_flat_tree_and_of_the_penalty(t11, close):
    tax = flat()
    z, y = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randint(5, (2, 3, 4))
    y[0, 1, 2] = -100
    close(F.level_cross_entropy(z, y, tax, label_smoothing=0.2), CE(z, y, label_smoothing=0.2))
    close(L.LevelCrossEntropy(tax, ignore_index=3)(z, y.clamp(min=0)), CE(z, y.clamp(min=0), ignore_index=3))
    rows = torch.randn(6, 11, dtype=torch.float64)
    picture = rows.view(2, 3, 11).movedim(-1, 1)
    close(F.parent_child_consistency(picture, t11), F.parent_child_consistency(rows, t11))
    weight = torch.rand(6, dtype=torch.float64)
    single = F.parent_child_consistency(rows, t11, reduction="none")
    close(F.parent_child_consistency(rows, t11, sample_weight=weight), (single * weight).sum() / weight.sum())


def test_classes_and_names_as_targets(t11, close):
    z, _ = inputs("hce", t11)
    names = ["y", "c", "b12", "x", "a3", "x"]
    classes = t11.indices(["x", "y", "a2", "a3", "b11", "b12", "c"])  # in the order of a data set
    numbers = torch.tensor([1, 6, 5, 0, 3, 0])
    for name, loss in ALL.items():
        rows = z[:, t11.leaf] if name in LEAF else z
        reference = loss(rows, t11.indices(names), t11)
        close(loss(rows, names, t11), reference)
        close(loss(rows, numbers, t11, classes=classes), reference)
    numbers[2] = -100
    close(F.hce(z, numbers, t11, classes=classes), F.hce(z[numbers >= 0], numbers[numbers >= 0], t11, classes=classes))
    close(L.HCE(t11, classes=classes)(z, numbers), F.hce(z, numbers, t11, classes=classes))
    with pytest.raises(ValueError, match=r"target must lie in \[0, 7\), one of the classes, got 7"):
        F.hce(z, numbers + 1, t11, classes=classes)
    with pytest.raises(ValueError, match="no node is named 'cat'"):
        F.hce(z[:1], ["cat"], t11)


def test_errors_name_the_way_out(t11, request):
    y = torch.tensor([2, 7])
    with pytest.raises(ValueError, match=r"got \(2, 3\); node_ids of the taxonomy turns one label per level"):
        F.hce(torch.zeros(2, 11), torch.zeros(2, 3, dtype=torch.int64), t11)
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(2,\), got \(3,\)"):
        F.hce(torch.zeros(2, 11), y, t11, sample_weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"sample_weight must be at least 0, got -1.0"):
        F.hce(torch.zeros(2, 11), y, t11, sample_weight=-torch.ones(2))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1.0"):
        F.conditional_softmax_nll(torch.zeros(2, 11), y, t11, label_smoothing=1.0)
    if request.config.getoption("--jaxtyping-packages", default=None):
        return  # the hook refuses other types first
    with pytest.raises(TypeError, match=r"logits must be a tensor, got list; cat_levels of the taxonomy joins"):
        F.hce([torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4)], y, t11)


def pruned(tax, node):
    """The tree without a leaf, and the columns that are left."""
    update = tax.prune([node])
    return update.taxonomy, update.new_to_old, update.old_to_new


@pytest.mark.parametrize("name", [n for n in NODE if n not in ("semantic", "hrn")])
def test_a_masked_class_is_no_class(name, t11, close):
    tax, columns, new = pruned(t11, t11.index("a3"))
    z, y = inputs(name, t11)
    y[y == t11.index("a3")] = 7
    z[:, t11.index("a3")] = -math.inf
    ours = z.clone().requires_grad_()
    loss = ALL[name](ours, y, t11, reduction="none")
    close(loss, ALL[name](z[:, columns], new[y], tax, reduction="none"))
    loss.sum().backward()
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["jsd", "kl", "hinge"])
@pytest.mark.parametrize("masked", [["a3"], ["x", "y"], ["a", "a1", "a2", "a3", "x", "y"], ["a1"]])
def test_masked_classes_in_the_penalty(kind, masked, t11, close):
    z, _ = inputs("hce", t11)
    z[:, t11.indices(masked)] = -math.inf
    ours = z.clone().requires_grad_()
    loss = F.parent_child_consistency(ours, t11, kind=kind)
    loss.backward()
    infinite = kind == "kl" and masked == ["x", "y"]  # a1 has mass that none of its children can have
    assert loss == math.inf if infinite else loss.isfinite()
    assert infinite or ours.grad.isfinite().all()
    if kind != "hinge" and masked == ["a3"]:
        tax, columns, _ = pruned(t11, t11.index("a3"))
        close(loss, F.parent_child_consistency(z[:, columns], tax, kind=kind))


# What gradcheck calls for batched gradients in torch 2.6.
@pytest.mark.filterwarnings("ignore:Please use .torch.vmap:FutureWarning")
@pytest.mark.parametrize("wide", [False, True])
def test_the_shared_pass_has_every_derivative(wide, t11):
    tax = flat(6) if wide else t11
    z, y = inputs("headline", tax, 3)
    weight = torch.rand(tax.num_nodes, dtype=torch.float64)

    def loss(z):
        parts = F.hierarchy_aware_parts(z, y, tax, ce_weight=1.0, class_weights=weight, reduction="none")
        return parts["tp_kl"], parts["hisce"], parts["ce"]

    z = z.requires_grad_()
    assert torch.autograd.gradcheck(loss, z, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, z, check_batched_grad=True)


def test_multi_hot_options_exist_in_modules(t11):
    z = torch.zeros(2, 11)
    loss = L.HierarchyAwareLoss(t11, level_weights=(1.0, 2.0, 3.0), ignore_index=-1, class_weights=torch.ones(11))
    assert loss.settings["level_weights"] == (1.0, 2.0, 3.0)
    assert "class_weights" in dict(loss.named_buffers())
    assert loss(z, torch.tensor([-1, 7]), sample_weight=torch.ones(2)).isfinite()
    with pytest.raises(TypeError, match="ignore"):
        L.HXE(t11, ignored=3)


def multi_label(tax):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, tax.num_nodes, generator=generator, dtype=torch.float64)
    one_hot = torch.zeros(6, tax.num_nodes, dtype=torch.float64)
    one_hot = one_hot.scatter(1, torch.randint(tax.num_nodes, (6, 1), generator=generator), 1.0)
    return z, F.mcm(one_hot, tax)


def test_multi_label_weights_are_those_of_torch(close):
    tax = flat(11)  # without edges the loss is binary cross-entropy
    z, labels = multi_label(tax)
    weight, sample = torch.rand(11, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    mask = torch.arange(11) != 3
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    close(F.mc_loss(z, labels, tax, pos_weight=weight), bce(z, labels, pos_weight=weight))
    single = bce(z, labels, pos_weight=weight, reduction="none")
    close(F.mc_loss(z, labels, tax, pos_weight=weight, reduction="none"), single)
    rows = (single * sample[:, None])[:, mask].sum() / (sample.sum() * 10)
    close(F.mc_loss(z, labels, tax, mask, pos_weight=weight, sample_weight=sample), rows)
    module = L.MCLoss(tax, pos_weight=weight)
    assert "pos_weight" in dict(module.named_buffers())
    close(module(z, labels, mask, sample_weight=sample), rows)
    with pytest.raises(ValueError, match=r"pos_weight must have shape \(11,\), got \(3,\)"):
        F.mc_loss(z, labels, tax, pos_weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"pos_weight must be at least 0, got -1.0 for node 0"):
        F.mc_loss(z, labels, tax, pos_weight=-torch.ones(11))


def test_multi_label_pixels(t11, close):
    z, labels = multi_label(t11)
    mask = torch.rand(6, 11) > 0.3
    weight = torch.rand(11, dtype=torch.float64)
    as_picture = lambda rows: rows.view(2, 3, 11).movedim(-1, 1)  # noqa: E731
    for reduction in ("mean", "none"):
        ours = F.mc_loss(
            as_picture(z), as_picture(labels), t11, as_picture(mask), pos_weight=weight, reduction=reduction
        )
        rows = F.mc_loss(z, labels, t11, mask, pos_weight=weight, reduction=reduction)
        close(ours, rows if reduction == "mean" else as_picture(rows))
