"""A penalty that couples each level's distribution to the one below it (ours; Jensen-Shannon after Lin 1991)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._inputs import Reduction, check_choice, check_reduction, read_samples
from hier_losses.functional._kernels import finite, safe_logaddexp, safe_logsumexp
from hier_losses.functional._terms import shallow_logsumexp
from hier_losses.functional.tree_ops import group_logsumexp


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
    scores = logits.split(tax.level_sizes, 1)
    shallow = shallow_logsumexp(logits, tax)
    lse = safe_logaddexp(torch.stack([safe_logsumexp(level) for level in scores], 1), shallow)
    lse = finite(lse)  # a level whose classes all have logit -inf
    below = torch.where(tax.leaf_index >= 0, logits, group_logsumexp(logits, tax)[:, 1:]).split(tax.level_sizes, 1)
    # All leaves above a level have one ratio p / s, so they count as a single class and the cost stays O(B N).
    pooled = shallow > -torch.inf
    total = logits[:, :0].sum(1)  # 0 that carries the graph, for a tree of one level
    for level in range(tax.num_levels - 1):
        here, there = lse[:, level, None], lse[:, level + 1, None]
        total = total + _divergence(scores[level] - here, below[level] - there, kind).sum(1)
        some = pooled[:, level, None]
        mass = torch.where(some, shallow[:, level, None], here)
        # Without leaves above, both arguments are 0, and so is the divergence.
        atom = _divergence(mass - here, torch.where(some, mass - there, 0.0), kind)
        total = total + torch.where(some, atom, 0.0).squeeze(1)
    return total / max(tax.num_levels - 1, 1)


def _divergence(log_p: Tensor, log_s: Tensor, kind: str) -> Tensor:
    """Summands of KL(p || s) or JSD(p, s)."""
    # Finite stand-ins for -inf, a class without mass: the summands are products of the form 0 * log 0.
    nothing = log_p.new_tensor(torch.finfo(log_p.dtype).min / 4)
    log_p = torch.where(log_p == -torch.inf, nothing, log_p)
    if kind == "kl":
        log_s = torch.where((log_s == -torch.inf) & (log_p == nothing), nothing, log_s)
        return log_p.exp() * (log_p - log_s)
    log_s = torch.where(log_s == -torch.inf, nothing, log_s)
    # log p - log m = log 2 + logsigmoid(log p - log s) for the mean m: finite and cheap where p and s underflow.
    gap = log_p - log_s
    above, below = torch.nn.functional.logsigmoid(gap), torch.nn.functional.logsigmoid(-gap)
    return (log_p.exp() * (above + math.log(2)) + log_s.exp() * (below + math.log(2))) / 2
