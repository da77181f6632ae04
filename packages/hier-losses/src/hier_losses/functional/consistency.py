"""A penalty that couples each level's distribution to the one below it (ours; Jensen-Shannon after Lin 1991)."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._inputs import Reduction, check_choice, check_reduction, read_samples
from hier_losses.functional._kernels import finite, safe_logaddexp, safe_logsumexp
from hier_losses.functional._terms import shallow_logsumexp
from hier_losses.functional.tree_ops import inner_logsumexp


def parent_child_consistency(
    logits: Float[Tensor, "batch nodes *rest"],
    tax: Tree,
    *,
    kind: str = "jsd",
    margin: float = 0.0,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Disagreement between each level and the level below it, summed up to parents; needs no labels.

    $p^l$ is the softmax over level l and the leaves above it, $s^l_v = \sum_u p^{l+1}_u$ over the children u of v, or
    over v itself if it is a leaf. The penalty is the mean over l < D of $JSD(p^l, s^l)$ or $KL(p^l \| s^l)$, in log
    space; it is 0 where all levels are marginals of one distribution over leaves. `hinge` is for independent sigmoids:
    the mean over edges of $relu(\sigma(z_{child}) - \sigma(z_{parent}) + margin)$.

    Args:
        logits: one logit per node; half precision is computed in float32.
        tax: the tree.
        kind: "jsd", "kl" or "hinge".
        margin: by how much a parent must lead, in [-1, 1]; for "hinge" only.
        sample_weight: (B, ...) at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; up to rounding "jsd" lies in [0, log 2], "kl" is at least 0, and all are 0 for a
        tree of one level.

    Raises:
        ValueError: a wrong width, an unknown kind, a margin outside its range or without "hinge".

    >>> from hier_losses.taxonomy import Taxonomy
    >>> tax = Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])
    >>> z = torch.tensor([[0.5, 0.5, 0.25, 0.25]]).log()
    >>> abs(parent_child_consistency(z, tax).item()) < 1e-6
    True
    """
    check_choice("kind", kind, ("jsd", "kl", "hinge"))
    check_reduction(reduction)
    if not -1 <= margin <= 1:
        raise ValueError(f"margin must lie in [-1, 1], got {margin}")
    if margin and kind != "hinge":
        raise ValueError(f"margin must be 0 unless kind is 'hinge', got {margin} with {kind!r}")
    samples = read_samples("logits", logits, None, tax, sample_weight=sample_weight)
    logits, tax = samples.logits, samples.tax
    if kind == "hinge":
        prob = logits.sigmoid().T
        excess = torch.relu(prob.index_select(0, tax.edge_child) - prob.index_select(0, tax.edge_parent) + margin)
        return samples.reduce(excess.sum(0) / max(tax.edge_child.shape[0], 1), reduction)
    return samples.reduce(_between_levels(logits, tax, kind), reduction)


def _between_levels(logits: Tensor, tax: Tree, kind: str) -> Tensor:
    """Mean divergence over the pairs of neighbouring levels, (B,)."""
    inner = tax.num_nodes - tax.level_sizes[-1]
    groups = inner_logsumexp(logits, tax)
    # A level is the union of its sibling groups: only `inner_logsumexp` passes over all nodes.
    per_level = [groups[:, 0]] + [safe_logsumexp(level) for level in groups[:, 1:].split(tax.level_sizes[:-1], 1)]
    if tax.num_levels == 1:
        return groups[:, 0] * 0.0  # 0 that carries the graph
    shallow = shallow_logsumexp(logits, tax)
    lse = finite(safe_logaddexp(torch.stack(per_level, 1), shallow))  # where all classes of a level have logit -inf
    upper = logits[:, :inner]
    below = groups[:, 1:]
    if not tax.leaves_on_one_level:
        below = torch.where(tax.leaf_index[:inner] >= 0, upper, below)
    divergence = _JensenShannon.apply if kind == "jsd" else _kl
    # All leaves above a level have one ratio p / s, so they count as a single class and the cost stays O(B N).
    pooled = shallow > -torch.inf
    total = logits.new_zeros(logits.shape[0])
    pairs = zip(upper.split(tax.level_sizes[:-1], 1), below.split(tax.level_sizes[:-1], 1), strict=True)
    for level, (score, marginal) in enumerate(pairs):
        here, there = lse[:, level, None], lse[:, level + 1, None]
        total = total + divergence(score - here, marginal - there)[0]
        if tax.leaves_on_one_level:
            continue
        some = pooled[:, level, None]
        mass = torch.where(some, shallow[:, level, None], here)
        # Without leaves above, both arguments are 0, and so is the divergence.
        atom = divergence(mass - here, torch.where(some, mass - there, 0.0))[0]
        total = total + torch.where(some[:, 0], atom, 0.0)
    return total / (tax.num_levels - 1)


def _kl(log_p: Tensor, log_s: Tensor) -> tuple[Tensor]:
    """KL(p || s), (B, C) -> (B,)."""
    # A finite stand-in for -inf, a class without mass: the summands are products of the form 0 * log 0.
    nothing = log_p.new_tensor(torch.finfo(log_p.dtype).min / 4)
    log_p = torch.where(log_p == -torch.inf, nothing, log_p)
    log_s = torch.where((log_s == -torch.inf) & (log_p == nothing), nothing, log_s)
    return ((log_p.exp() * (log_p - log_s)).sum(1),)


class _JensenShannon(torch.autograd.Function):
    r"""JSD(p, s) from log p and log s, (B, C) -> (B,), and twice its summands.

    The derivative in log p is its summand, $\frac{p}{2} \log\frac{p}{m}$ with m the mean, and the same in s.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_p: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, s = _js_summands(log_p, log_s)
        return (p.sum(1) + s.sum(1)) / 2, p, s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        log_p, log_s, p, s = ctx.saved_tensors
        if torch.is_grad_enabled():
            p, s = _js_summands(log_p, log_s)
        half = grad[:, None] / 2
        return half * p, half * s


def _js_summands(log_p: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    nothing = torch.finfo(log_p.dtype).min / 4
    log_p, log_s = log_p.clamp(min=nothing), log_s.clamp(min=nothing)
    # log p - log m = log 2 + logsigmoid(log p - log s): finite and cheap where p and s underflow.
    gap = log_p - log_s
    above = torch.nn.functional.logsigmoid(gap) + math.log(2)
    return log_p.exp() * above, log_s.exp() * (above - gap)
