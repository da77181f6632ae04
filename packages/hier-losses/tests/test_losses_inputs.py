"""Bad input, the module forms, devices."""

import copy
import pickle

import pytest
import torch

from hier_losses import functional as F
from hier_losses import losses as L
from hier_losses.graph import LabelGraph

NODE = [F.level_cross_entropy, F.semantic_softmax, F.hisce, F.tp_kl, F.conditional_softmax_nll, F.hce, F.hrn_tree_loss]
NODE += [F.hierarchy_aware_loss, F.hierarchy_aware_parts]
LEAF = [F.hxe, F.soft_label_ce]


def width(function, tax):
    return tax.num_leaves if function in LEAF else tax.num_nodes


@pytest.mark.parametrize("function", NODE + LEAF)
def test_wrong_logits(function, t11):
    target = torch.tensor([2, 7])
    right = width(function, t11)
    with pytest.raises(ValueError, match=rf"logits must have shape \(batch, {right}\), got \(2, {right + 1}\)"):
        function(torch.zeros(2, right + 1), target, t11)


@pytest.mark.parametrize("function", NODE + LEAF)
def test_wrong_target(function, t11):
    logits = torch.zeros(2, width(function, t11))
    for target, text in (
        ([2, 11], r"target must lie in \[0, 11\), got 11 at row 1"),
        ([-1, 2], r"target must lie in \[0, 11\), got -1 at row 0"),
        ([2], r"target must have shape \(2,\), one node id per sample, got \(1,\)"),
        ([[2, 7], [2, 7]], r"got \(2, 2\)"),
        ([2.0, 7.0], r"integer node ids in \[0, 11\), got dtype torch.float32"),
        ([True, False], r"got dtype torch.bool"),
    ):
        with pytest.raises(ValueError, match=text):
            function(logits, torch.tensor(target), t11)


@pytest.mark.parametrize("function", LEAF)
def test_internal_target_of_a_leaf_loss(function, t11):
    with pytest.raises(ValueError, match=r"target must be a leaf .* internal node 3 \('a1'\) at row 1"):
        function(torch.zeros(2, 7), torch.tensor([2, 3]), t11)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda z, y, t: F.level_cross_entropy(z, y, t, levels="all"), r"levels must be one of 'ragged', 'extended'"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, level_reduction="max"), r"level_reduction must be one of"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, reduction="avg"), r"reduction must be one of .* got 'avg'"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, level_weights=(1.0, -1.0, 1.0)), r"\[0, inf\), got -1.0"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, level_weights=(1.0, 1.0)), r"one entry per level \(3\)"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, label_smoothing=1.0), r"label_smoothing must lie in \[0, 1"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, focal_gamma=-1.0), r"focal_gamma must be at least 0"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, focal_gamma=1.0, label_smoothing=0.1), r"must be 0 with focal"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, class_weights=torch.ones(3)), r"shape \(11,\), got \(3,\)"),
        (lambda z, y, t: F.level_cross_entropy(z, y, t, class_weights=-torch.ones(11)), r"got -1.0 for node 0"),
        (lambda z, y, t: F.semantic_softmax(z, y, t, max_weight=0.5), r"max_weight must be at least 1, got 0.5"),
        (lambda z, y, t: F.hisce(z, y, t, eps=1.0), r"eps must lie in \[0, 1.*\), got 1.0"),
        (lambda z, y, t: F.hisce(z, y, t, eps=-0.1), r"eps must lie in \[0, 1.*\), got -0.1"),
        (lambda z, y, t: F.hisce(z, y, t, eps=(0.1, float("nan"), 0.1)), r"eps must lie in \[0, 1.*\), got nan"),
        (lambda z, y, t: F.hisce(z, y, t, levels="x"), r"levels must be one of"),
        (lambda z, y, t: F.hisce(z, y, t, level_reduction="x"), r"level_reduction must be one of"),
        (lambda z, y, t: F.tp_kl(z, y, t, softmax_over="some"), r"softmax_over must be one of 'auto', 'all', 'valid'"),
        (lambda z, y, t: F.tp_kl(z, y, t, temperature=0.0), r"temperature must be positive and finite, got 0.0"),
        (lambda z, y, t: F.tp_kl(z, y, t, temperature=-1.0), r"temperature must be positive and finite, got -1.0"),
        (lambda z, y, t: F.tp_kl(z, None, t), r"either target or target_probs, got neither"),
        (lambda z, y, t: F.tp_kl(z, y, t, target_probs=z), r"either target or target_probs, got both"),
        (lambda z, y, t: F.tp_kl(z, None, t, target_probs=z[:1]), r"target_probs must have shape \(2, 11\)"),
        (lambda z, y, t: F.tp_kl(z, None, t, target_probs=z), r"rows must sum to 1, row 0 sums to 0"),
        (lambda z, y, t: F.tp_kl(z, None, t, target_probs=z - 1), r"target_probs must be at least 0, row 0"),
        (
            lambda z, y, t: F.tp_kl(z, None, t, target_probs=z + 1 / 11, level_weights=(1.0, 1.0, 1.0)),
            r"level_weights must be None with target_probs",
        ),
        (lambda z, y, t: F.path_probs(y, t, level_weights=(0.0, 1.0, 1.0)), r"positive on a level .* row 0 has none"),
        (lambda z, y, t: F.path_probs(y[None], t), r"target must have shape \(batch,\), got \(1, 2\)"),
        (
            lambda z, y, t: F.conditional_softmax_nll(z, y, t, discount=float("inf")),
            r"discount must be finite, got inf",
        ),
        (lambda z, y, t: F.hrn_tree_loss(z, y, t, activation="relu"), r"activation must be one of"),
        (lambda z, y, t: F.hxe(z[:, :7], y, t, discount=float("nan")), r"discount must be finite, got nan"),
        (lambda z, y, t: F.hxe(z[:, :7], y, t, normalize="x"), r"normalize must be one of 'none', 'tree'"),
        (lambda z, y, t: F.soft_label_ce(z[:, :7], y, t, beta=-1.0), r"beta must lie in \[0, inf\), got -1.0"),
        (lambda z, y, t: F.hierarchy_aware_loss(z, y, t, alpha=-1.0), r"alpha must lie in \[0, inf\), got -1.0"),
        (lambda z, y, t: F.hierarchy_aware_loss(z, y, t, lam=-1.0), r"lam must lie"),
        (lambda z, y, t: F.hierarchy_aware_loss(z, y, t, ce_weight=-1.0), r"ce_weight must lie"),
        (lambda z, y, t: F.hierarchy_aware_loss(z, y, t, consistency_weight=-1.0), r"consistency_weight must lie"),
        (lambda z, y, t: F.hierarchy_aware_loss(z, y, t, softmax_over="x"), r"softmax_over must be one of"),
        (lambda z, y, t: F.parent_child_consistency(z, t, kind="l2"), r"kind must be one of 'jsd', 'kl', 'hinge'"),
        (lambda z, y, t: F.parent_child_consistency(z, t, kind="hinge", margin=2.0), r"margin must lie in \[-1, 1\]"),
        (lambda z, y, t: F.parent_child_consistency(z, t, margin=0.1), r"margin must be 0 unless kind is 'hinge'"),
        (lambda z, y, t: F.parent_child_consistency(z[:, 1:], t), r"shape \(batch, 11\), got \(2, 10\)"),
    ],
)
def test_bad_settings(t11, call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.zeros(2, 11), torch.tensor([2, 7]), t11)


def test_bad_multi_hot(t11):
    z = torch.zeros(2, 11)
    labels = torch.zeros(2, 11)
    labels[1, [0, 7]] = 1
    for graph in (t11, LabelGraph.from_taxonomy(t11)):
        with pytest.raises(ValueError, match=r"row 1 has node 7 \('x'\) without its parent 3 \('a1'\)"):
            F.mc_loss(z, labels, graph)
        with pytest.raises(ValueError, match=r"multi_hot must hold 0 and 1, row 0 does not"):
            F.mc_loss(z, labels + 0.5, graph)
        with pytest.raises(ValueError, match=r"multi_hot must have shape \(2, 11\), got \(11,\)"):
            F.mc_loss(z, labels[0], graph)
        for mask in (torch.ones(2, dtype=torch.bool), torch.ones(2, 11)):
            with pytest.raises(ValueError, match=r"mask must be bool of shape \(2, 11\) or \(11,\)"):
                F.mc_loss(z, torch.zeros(2, 11), graph, mask)
    with pytest.raises(ValueError, match=r"scores must have 11 columns, got shape \(2, 10\)"):
        F.mcm(torch.zeros(2, 10), LabelGraph.from_taxonomy(t11))


MODULES = [
    (L.LevelCrossEntropy, F.level_cross_entropy, {"levels": "extended", "level_weights": [1.0, 2.0, 3.0]}),
    (L.LevelCrossEntropy, F.level_cross_entropy, {"class_weights": torch.arange(11.0), "level_reduction": "mean"}),
    (L.SemanticSoftmax, F.semantic_softmax, {"max_weight": 2.0}),
    (L.HiSCE, F.hisce, {"eps": (0.1, 0.2, 0.3), "levels": "extended"}),
    (L.TPKL, F.tp_kl, {"softmax_over": "all", "temperature": 0.5, "level_weights": (1.0, 2.0, 3.0)}),
    (L.HierarchyAwareLoss, F.hierarchy_aware_loss, {"alpha": 0.5, "consistency_weight": 1.0, "eps": 0.2}),
    (L.ConditionalSoftmaxNLL, F.conditional_softmax_nll, {"discount": 0.5}),
    (L.HCE, F.hce, {"reduction": "sum"}),
    (L.HRNTreeLoss, F.hrn_tree_loss, {"activation": "identity"}),
    (L.HXE, F.hxe, {"discount": 0.5, "normalize": "tree"}),
    (L.SoftLabelCE, F.soft_label_ce, {"beta": 3.0, "reduction": "none"}),
]


@pytest.mark.parametrize(("module", "function", "settings"), MODULES)
def test_modules_call_their_functions(t11, module, function, settings):
    target = torch.tensor([2, 7, 9])
    logits = torch.randn(3, width(function, t11))
    loss = module(t11, **settings)
    expected = function(logits, target, t11, **settings)
    for copied in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(copied(logits, target), expected)
    assert next(iter(settings)) in repr(loss)
    assert not list(loss.parameters())
    assert not loss.state_dict()


def test_modules_with_other_arguments(t11):
    z = torch.randn(2, 11)
    labels = F.mcm(torch.zeros(2, 11).index_fill(1, torch.tensor([7]), 1.0), t11)
    mask = torch.arange(11) > 2
    assert torch.equal(
        L.MCLoss(t11, reduction="sum")(z, labels, mask), F.mc_loss(z, labels, t11, mask, reduction="sum")
    )
    assert torch.equal(L.MCM(t11)(z), F.mcm(z, t11))
    penalty = L.ParentChildConsistency(t11, kind="hinge", margin=0.2)
    assert torch.equal(penalty(z), F.parent_child_consistency(z, t11, kind="hinge", margin=0.2))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda t: L.HiSCE(t, eps=1.5), "eps"),
        (lambda t: L.TPKL(t, temperature=0.0), "temperature"),
        (lambda t: L.HierarchyAwareLoss(t, alpha=-1.0), "alpha"),
        (lambda t: L.HierarchyAwareLoss(t, eps=1.0), "eps"),
        (lambda t: L.SoftLabelCE(t, beta=-1.0), "beta"),
        (lambda t: L.ParentChildConsistency(t, kind="x"), "kind"),
        (lambda t: L.MCLoss(t, reduction="x"), "reduction"),
        (lambda t: L.LevelCrossEntropy(t, level_weights=(1.0,)), "level_weights"),
    ],
)
def test_modules_check_settings_on_construction(t11, build, text):
    with pytest.raises(ValueError, match=text):
        build(t11)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("module", "function", "settings"), MODULES)
def test_cuda_equals_cpu_and_repeats_exactly(t11, module, function, settings):
    target = torch.tensor([2, 7, 9]).repeat(50)
    logits = torch.randn(150, width(function, t11), dtype=torch.float64)
    loss = module(t11, **settings).cuda()
    runs = []
    for _ in range(3):
        z = logits.cuda().requires_grad_()
        value = loss(z, target.cuda()).sum()
        value.backward()
        runs.append((value.detach().cpu(), z.grad.cpu()))
    torch.testing.assert_close(runs[0][0], function(logits, target, t11, **settings).sum())
    if not settings.get("consistency_weight") and module is not L.HRNTreeLoss:
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
