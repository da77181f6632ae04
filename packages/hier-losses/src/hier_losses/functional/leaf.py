"""Losses on leaf logits that grade a wrong leaf by how far from the target it branches off.

Reference: Bertinetto et al. (2020, "Making Better Mistakes", hierarchical cross-entropy and soft labels).
"""

import math
from typing import Any

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
from hier_losses.functional._kernels import REACH, can_look, finite, log_above, safe_logsumexp


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
    bins = _RingLogSumExp.apply(logits, leaf_runs(target, tax), _depth_first(tax))
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
    weight = _rings_to_runs(torch.exp(-beta * height.to(logits.dtype) / farthest))
    runs = leaf_runs(target, tax)
    weight = weight / (weight * runs).sum(1, keepdim=True)
    lse, sums = _LogSumExpAndRuns.apply(logits, runs, _depth_first(tax))
    # An empty run has no weight to multiply; its sum is 0.
    loss = lse - torch.where(runs > 0, weight * sums, 0.0).sum(1)
    return samples.by_class().reduce(loss, reduction)


def _depth_first(tax: Tree) -> Tensor | None:
    """Columns of the leaves in depth-first order, None where they are in it."""
    return None if tax.leaves_in_order else tax.leaf_start[tax.leaf].argsort()


def leaf_runs(target: Tensor, tax: Tree) -> Tensor:
    """Lengths, in depth-first order of the leaves, of the runs of leaves with one common ancestor, (B, 2D + 1) int64.

    The ancestor of run r with the target lies at depth r; past the middle, at depth 2D - r. The subtrees on the path
    are nested intervals, so the runs lie between their ends. Below a shallow target all runs are empty.
    """
    path = tax.paths[target]
    node = path.clamp(min=0)
    past = tax.leaf_start[target][:, None] + 1
    start = torch.where(path >= 0, tax.leaf_start[node], past)
    stop = torch.where(path >= 0, tax.leaf_start[node] + tax.n_leaves[node], past)
    first, last = torch.zeros_like(past), torch.full_like(past, tax.num_leaves)
    return torch.cat([first, start, stop.flip(1), last], 1).diff(dim=1)


def _rings_to_runs(rings: Tensor) -> Tensor:
    """Values per depth of the common ancestor, (B, D + 1), as values per run, (B, 2D + 1)."""
    return torch.cat([rings, rings[:, :-1].flip(1)], 1)


def _spread_runs(values: Tensor, runs: Tensor, num_leaves: int) -> Tensor:
    """Give every leaf, in depth-first order, the value of its run: (B, 2D + 1) -> (B, K)."""
    rows = values.shape[0]
    flat = values.reshape(-1).repeat_interleave(runs.reshape(-1), output_size=rows * num_leaves)
    return flat.view(rows, num_leaves)


def _run_sums(values: Tensor, runs: Tensor) -> Tensor:
    """Sum of the values of each run, (B, K) -> (B, 2D + 1)."""
    if can_look(values):
        return torch.segment_reduce(values.reshape(-1), "sum", lengths=runs.reshape(-1), unsafe=True).view(runs.shape)
    number = torch.arange(runs.shape[1], device=runs.device).expand(len(runs), -1)
    index = _spread_runs(number, runs, values.shape[1])
    return values.new_zeros(runs.shape).scatter_add(1, index, values)


class _LogSumExpAndRuns(torch.autograd.Function):
    """Log-sum-exp of the row and sum of each run of leaves, whose gradients are written as one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, runs: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        values = logits if order is None else logits.index_select(1, order)
        return logits.logsumexp(1), _run_sums(values, runs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        logits, runs, order = inputs
        ctx.save_for_backward(logits, runs, order, output[0])

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, grad_sums: Tensor) -> tuple[Tensor, None, None]:
        logits, runs, order, lse = ctx.saved_tensors
        spread = _spread_runs(grad_sums, runs, logits.shape[1])
        if order is not None:
            spread = spread.index_select(1, order.argsort())
        shift, scale = finite(lse)[:, None], grad_lse[:, None]
        if not torch.is_grad_enabled() and can_look(logits, grad_lse, grad_sums):
            return (logits - shift).exp_().mul_(scale).add_(spread), None, None
        return torch.addcmul(spread, (logits - shift).exp(), scale), None, None


class _RingLogSumExp(torch.autograd.Function):
    """Log-sum-exp of the leaves of each ring around the target, (B, K) -> (B, D + 1); -inf for empty rings.

    On a CPU it usually takes one exp against the largest logit of the row and a sum over each run. Where a ring is so
    far below that logit that its exponentials vanish, each ring is shifted by its own largest logit instead.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, runs: Tensor, order: Tensor | None) -> Tensor:
        values = logits if order is None else logits.index_select(1, order)
        if values.numel() and can_look(values):
            peak = values.amax(1, keepdim=True)
            sums = _runs_to_rings(_run_sums((values - peak).exp_(), runs))
            if ((sums > math.exp(-REACH)) | (_runs_to_rings(runs) == 0)).all():
                return sums.log_().add_(peak)
        num = runs.shape[1] // 2 + 1
        ring = _rings_to_runs(torch.arange(num, device=runs.device).expand(len(runs), -1))
        index = _spread_runs(ring, runs, values.shape[1])
        if values.is_cuda:
            # Adding by index would make the last bits vary from run to run there.
            return torch.stack([safe_logsumexp(torch.where(index == b, values, -torch.inf)) for b in range(num)], 1)
        peak = values.new_full((values.shape[0], num), -torch.inf).scatter_reduce(1, index, values, "amax")
        scaled = (values - finite(peak).gather(1, index)).exp()
        return log_above(peak, torch.zeros_like(peak).scatter_add(1, index, scaled))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        logits, runs, order = inputs
        ctx.save_for_backward(logits, runs, order, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, runs, order, rings = ctx.saved_tensors
        values = logits if order is None else logits.index_select(1, order)
        width, found = values.shape[1], None
        if values.numel() and not torch.is_grad_enabled() and can_look(values, grad):
            peak = values.amax(1, keepdim=True)
            empty = rings == -torch.inf
            if ((rings > peak - REACH) | empty).all():
                scale = torch.where(empty, 0.0, (peak - rings).exp() * grad)
                found = (values - peak).exp_().mul_(_spread_runs(_rings_to_runs(scale), runs, width))
        if found is None:
            shift = _spread_runs(_rings_to_runs(finite(rings)), runs, width)
            found = (values - shift).exp() * _spread_runs(_rings_to_runs(grad), runs, width)
        return found if order is None else found.index_select(1, order.argsort()), None, None


def _runs_to_rings(runs: Tensor) -> Tensor:
    """Add up the two runs of each ring, (B, 2D + 1) -> (B, D + 1)."""
    middle = runs.shape[1] // 2
    return torch.cat([runs[:, :middle] + runs[:, middle + 1 :].flip(1), runs[:, middle : middle + 1]], 1)
