"""Losses on conditional and subtree probabilities of node logits.

References: Redmon and Farhadi (2017, "YOLO9000", section 4, softmax per sibling group); Cultrera di Montesano et al.
(2026, "Improving atlas-scale single-cell annotation models with hierarchical cross-entropy loss", Nature Computational
Science); Deng et al. (2014, "Large-Scale Object Classification Using Label Relation Graphs", eq. 2) and Chen et al.
(2022, "Label Relation Graphs Enhanced Hierarchical Residual Network", CVPR, the probabilistic loss).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._inputs import (
    IGNORE,
    Reduction,
    Target,
    check_choice,
    check_finite,
    check_reduction,
    over_mixtures,
    read_samples,
)
from hier_losses.functional._kernels import can_look, safe_logsumexp
from hier_losses.functional._terms import group_lse, group_mean, nll_over, over_sibling_groups
from hier_losses.functional.tree_ops import ancestor_sum
from hier_losses.graph import LabelGraph


@over_mixtures
def conditional_softmax_nll(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    tax: Tree,
    *,
    discount: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Negative log-likelihood of the path when each sibling group has a softmax of its own.

    $\sum_{l \le L} e^{-\gamma (l-1)}\,[lse(group(v_l)) - z_{v_l}]$, $\gamma$ the discount; for 0 it is $-\log P(y)$, and the leaf
    probabilities sum to 1. Only the groups on the path are read. A lone child has probability 1 and no gradient.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B, ...) integer node ids, an internal one is the likelihood of its subtree; class names; or (B, N, ...) shares of nodes.
        tax: the tree.
        discount: how fast the levels below the first lose weight, finite.
        label_smoothing: share in [0, 1) of each level's target that is spread evenly over the sibling group.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; a sample weighs as much as its target, as in torch the mean divides by the sum.
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; at least 0.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer, a setting outside its range.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> tax = Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])
    >>> round(conditional_softmax_nll(torch.zeros(1, 4), torch.tensor([1]), tax).item(), 4)  # log 2
    0.6931
    """
    check_reduction(reduction)
    check_finite("discount", discount)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    samples = read_samples(
        "logits",
        logits,
        target,
        tax,
        ignore_index=ignore_index,
        classes=classes,
        class_weights=class_weights,
        sample_weight=sample_weight,
    )
    logits, target, tax = samples.logits, samples.target, samples.tax
    path = tax.paths[target]
    valid, path = path >= 0, path.clamp(min=0)
    nll = over_sibling_groups(logits, path, tax, group_lse) - logits.gather(1, path)
    if label_smoothing:
        nll = nll + label_smoothing * (logits.gather(1, path) - over_sibling_groups(logits, path, tax, group_mean))
    step = torch.exp(-discount * torch.arange(tax.num_levels, device=logits.device, dtype=logits.dtype))
    return samples.by_class().reduce(torch.where(valid, nll * step, 0.0).sum(1), reduction)


@over_mixtures
def hce(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    graph: Tree | LabelGraph,
    *,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Hierarchical cross-entropy: the softmax mass of the target and everything below it.

    $HCE = lse(z) - lse_{u \preceq y}(z_u)$ over node logits, without the constant that the published code adds inside
    the logarithm. For a leaf of a tree it is the cross-entropy over all nodes.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B, ...) integer node ids, internal nodes included; class names; or (B, N, ...) shares of nodes.
        graph: a tree, or a label graph with several parents per node, where each descendant counts once.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; a sample weighs as much as its target, as in torch the mean divides by the sum.
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; at least 0.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer.
    """
    check_reduction(reduction)
    samples = read_samples(
        "logits",
        logits,
        target,
        graph,
        ignore_index=ignore_index,
        classes=classes,
        class_weights=class_weights,
        sample_weight=sample_weight,
    )
    logits, target, graph = samples.logits, samples.target, samples.tax
    whole, mass = _log_masses(logits, target, graph)
    return samples.by_class().reduce(whole - mass, reduction)


@over_mixtures
def hrn_tree_loss(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    tax: Tree,
    *,
    activation: str = "sigmoid",
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Negative log marginal of a node over the legal label sets of a tree.

    A legal set is empty or a path from the top, so $Z = 1 + \sum_v e^{s_v}$, $s_v = \sum_{u \succeq v} f_u$ summed over
    ancestors-or-self, and $P(y) = \sum_{v \preceq y} e^{s_v} / Z$. The hierarchical residual network uses
    $f = \sigma(z)$ and adds a leaf cross-entropy where the label is a leaf; label relation graphs use f = z.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B, ...) integer node ids, internal nodes included; class names; or (B, N, ...) shares of nodes.
        tax: the tree.
        activation: "sigmoid" (Chen et al. 2022) or "identity" (Deng et al. 2014).
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; a sample weighs as much as its target, as in torch the mean divides by the sum.
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; at least 0. With "sigmoid" it cannot reach 0: potentials are below 1.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer, an unknown activation.
    """
    check_choice("activation", activation, ("sigmoid", "identity"))
    check_reduction(reduction)
    samples = read_samples(
        "logits",
        logits,
        target,
        tax,
        ignore_index=ignore_index,
        classes=classes,
        class_weights=class_weights,
        sample_weight=sample_weight,
    )
    logits, target, tax = samples.logits, samples.target, samples.tax
    whole, mass = _log_masses(ancestor_sum(logits.sigmoid() if activation == "sigmoid" else logits, tax), target, tax)
    return samples.by_class().reduce(torch.logaddexp(whole, torch.zeros_like(whole)) - mass, reduction)


def _log_masses(scores: Tensor, target: Tensor, graph: Tree | LabelGraph) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of all scores, and of those at and below each target, (B,) each."""
    whole, own = nll_over(scores, target)
    if isinstance(graph, Tree) and can_look(scores, target) and bool((graph.leaf_index[target] >= 0).all()):
        return whole, own  # nothing stands below leaves
    return whole, safe_logsumexp(torch.where(descendant_mask(target, graph), scores, -torch.inf))


def descendant_mask(target: Tensor, graph: Tree | LabelGraph) -> Tensor:
    """Mark the descendants-or-self of each target, (B, N) bool."""
    if isinstance(graph, Tree):
        # Leaf intervals nest, and a lone chain shares its interval: the depth tells its nodes apart.
        start = graph.leaf_start[target][:, None]
        inside = (graph.leaf_start >= start) & (graph.leaf_start < start + graph.n_leaves[target][:, None])
        return inside & (graph.depth >= graph.depth[target][:, None])
    hit = (graph.descendant_row[:, None] == target).int()
    return hit.new_zeros(graph.num_nodes, len(target)).index_add(0, graph.descendant, hit).T > 0
