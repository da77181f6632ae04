"""Losses on leaf logits that grade a wrong leaf by how far from the target it branches off.

Reference: Bertinetto et al. (2020, "Making Better Mistakes", hierarchical cross-entropy and soft labels).
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
from hier_losses.functional._kernels import log_above, safe_logsumexp


@over_mixtures
def hxe(
    leaf_logits: Float[Tensor, "batch leaves *rest"],
    target: Target,
    tax: Tree,
    *,
    discount: float = 0.1,
    normalize: str = "none",
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Hierarchical cross-entropy over leaf logits: conditional log-likelihoods along the path, discounted by depth.

    $HXE = \sum_{l=1}^{L} e^{-\gamma l}\,[lse(v_{l-1}) - lse(v_l)]$ with subtree log-sum-exps and $v_0$ the root. The
    weight is that of the published code; the paper writes it by height. Each bracket is computed as
    $\log(1 + e^{odds})$, so it keeps its value where the conditional probability rounds to 0 or to 1.

    Args:
        leaf_logits: one logit per leaf, in the order of `tax.leaf`; half precision is computed in float32.
        target: (B, ...) integer node ids of leaves; class names; or (B, N or K, ...) shares of nodes or leaves.
        tax: the tree.
        discount: $\gamma$, how fast the levels lose weight, finite; 0 gives the leaf cross-entropy.
        normalize: "none", or "tree" to divide by $1 + \sum_v e^{-\gamma depth(v)}$ over all nodes, as published.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; a sample weighs as much as its target, as in torch the mean divides by the sum.
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; at least 0.

    Raises:
        ValueError: a wrong width, a target that is no leaf or not integer, a setting outside its range.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> tax = Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])
    >>> round(hxe(torch.zeros(1, 3), torch.tensor([2]), tax, discount=0.0).item(), 4)  # log 3
    1.0986
    """
    check_choice("normalize", normalize, ("none", "tree"))
    check_reduction(reduction)
    check_finite("discount", discount)
    samples = read_samples(
        "leaf_logits",
        leaf_logits,
        target,
        tax,
        leaf_only=True,
        ignore_index=ignore_index,
        classes=classes,
        class_weights=class_weights,
        sample_weight=sample_weight,
    )
    logits, target, tax = samples.logits, samples.target, samples.tax
    bins = _BinLogSumExp.apply(logits, leaf_lca_depth(target, tax), tax.num_levels + 1)
    level = torch.arange(tax.num_levels + 1, device=logits.device)
    within = safe_logsumexp(torch.where(level >= level[:, None], bins[:, None], -torch.inf))
    valid = level[1:] <= tax.depth[target][:, None]
    below = torch.where(valid, within[:, 1:], 0.0)
    odds = torch.where(valid, bins[:, :-1], -torch.inf) - below
    # log(1 + e^x) to double precision; that of torch.logaddexp has a second derivative of NaN at -inf.
    loss = torch.nn.functional.softplus(odds, threshold=40)
    loss = (loss * torch.exp(-discount * level[1:].to(logits.dtype))).sum(1)
    if normalize == "tree":
        loss = loss / (1 + torch.exp(-discount * tax.depth.to(logits.dtype)).sum())
    return samples.by_class().reduce(loss, reduction)


@over_mixtures
def soft_label_ce(
    leaf_logits: Float[Tensor, "batch leaves *rest"],
    target: Target,
    tax: Tree,
    *,
    beta: float = 10.0,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy with targets $\propto e^{-\beta d(k, y) / d_{max}}$, d the height of the lowest common ancestor.

    The (K, K) matrix of targets is not built: a leaf's weight depends only on the depth at which it leaves the path.
    $d_{max}$ is the largest d over pairs of leaves. Gradient: softmax minus soft target (the published code averages
    over classes too, which makes it K times smaller).

    Args:
        leaf_logits: one logit per leaf, in the order of `tax.leaf`; half precision is computed in float32.
        target: (B, ...) integer node ids of leaves; class names; or (B, N or K, ...) shares of nodes or leaves.
        tax: the tree.
        beta: sharpness, at least 0 and finite; 0 gives the uniform target, large values the leaf cross-entropy.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; a sample weighs as much as its target, as in torch the mean divides by the sum.
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; at least the entropy of the soft target.

    Raises:
        ValueError: a wrong width, a target that is no leaf or not integer, a beta outside its range.
    """
    check_reduction(reduction)
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must lie in [0, inf), got {beta}")
    samples = read_samples(
        "leaf_logits",
        leaf_logits,
        target,
        tax,
        leaf_only=True,
        ignore_index=ignore_index,
        classes=classes,
        class_weights=class_weights,
        sample_weight=sample_weight,
    )
    logits, target, tax = samples.logits, samples.target, samples.tax
    branching = torch.where(tax.group_size[1:] > 1, tax.height, 0).amax()
    farthest = torch.where(tax.group_size[0] > 1, tax.root_height, branching).clamp(min=1)
    path = tax.paths[target]
    height = torch.where(path >= 0, tax.height[path.clamp(min=0)], 0)
    height = torch.nn.functional.pad(height, (1, 0), value=tax.root_height)
    weight = torch.exp(-beta * height.to(logits.dtype) / farthest).gather(1, leaf_lca_depth(target, tax))
    weight = weight / weight.sum(1, keepdim=True)
    return samples.by_class().reduce(logits.logsumexp(1) - (weight * logits).sum(1), reduction)


def leaf_lca_depth(target: Tensor, tax: Tree) -> Tensor:
    """Depth of the lowest common ancestor of each target with every leaf, (B, K) int64, from O(B (K + D)) work.

    In depth-first order the leaves below each path node are an interval: mark both ends, then add up.
    """
    path = tax.paths[target]
    start = tax.leaf_start[path.clamp(min=0)]
    stop = start + tax.n_leaves[path.clamp(min=0)]
    step = (path >= 0).int()
    marks = step.new_zeros(path.shape[0], tax.num_leaves + 1)
    marks = marks.scatter_add(1, start, step).scatter_add(1, stop, -step)
    marks = marks.cumsum(1, dtype=torch.int32)
    return marks.index_select(1, tax.leaf_start[tax.leaf]).long()


class _BinLogSumExp(torch.autograd.Function):
    """Log-sum-exp of the values of each bin, (B, K) -> (B, bins); -inf for empty bins.

    A function of its own because the gradient needs one exp of what is at hand, and because the backward pass of a
    gather would add by index.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, index: Tensor, num_bins: int) -> Tensor:
        if values.is_cuda:
            # Adding by index would make the last bits vary from run to run there.
            bins = range(num_bins)
            return torch.stack([safe_logsumexp(torch.where(index == b, values, -torch.inf)) for b in bins], 1)
        peak = values.new_full((values.shape[0], num_bins), -torch.inf).scatter_reduce(1, index, values, "amax")
        scaled = (values - peak.gather(1, index)).exp()
        return log_above(peak, torch.zeros_like(peak).scatter_add(1, index, scaled))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        values, index, _ = inputs
        ctx.save_for_backward(values, index, output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        values, index, bins = ctx.saved_tensors
        return (values - bins.gather(1, index)).exp() * grad.gather(1, index), None, None
