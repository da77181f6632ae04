"""The weighted sum of tree-path KL, HiSCE, level cross-entropy and parent-child consistency, sharing one pass.

Reference: "Hierarchy-Aware Fine-Tuning of Vision-Language Models" (2025, arXiv 2512.21529) for the first two.
"""

from jaxtyping import Float
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._inputs import (
    IGNORE,
    PerLevel,
    Reduction,
    Target,
    check_choice,
    check_reduction,
    over_levels,
    over_mixtures,
    read_samples,
)
from hier_losses.functional._terms import level_terms
from hier_losses.functional.consistency import parent_child_consistency
from hier_losses.functional.level import balanced, smoothed_nll
from hier_losses.functional.path import path_kl


@over_mixtures
def hierarchy_aware_parts(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    tax: Tree,
    *,
    alpha: float = 1.0,
    lam: float = 1.0,
    ce_weight: float = 0.0,
    consistency_weight: float = 0.0,
    eps: PerLevel = 0.1,
    softmax_over: str = "auto",
    level_weights: PerLevel | None = None,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> dict[str, Tensor]:
    r"""Return the parts of `hierarchy_aware_loss` before weighting, and their weighted sum.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B, ...) integer node ids, internal nodes included; class names; or (B, N, ...) shares of nodes.
        tax: the tree.
        alpha: weight of TP-KL.
        lam: weight of HiSCE, summed over levels; HiSCE contains the cross-entropy.
        ce_weight: weight of a further level cross-entropy, summed over levels.
        consistency_weight: weight of the parent-child penalty (JSD).
        eps: HiSCE's smoothing, a number or D numbers in [0, 1).
        softmax_over: "auto", "all" or "valid", see `tp_kl`.
        level_weights: number or D numbers, at least 0: shares of the path in TP-KL, factors of the levels in HiSCE and
            in the cross-entropy.
        ignore_index: the target that stands for no label; such samples count nowhere, but for the consistency.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0, as in `tp_kl` (by target) and in `hisce` (by the class of each level).
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        "total", and of "tp_kl", "hisce", "ce", "consistency" those whose weight is not 0 (others are not computed).

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer, a negative weight, an eps outside [0, 1).
    """
    weights = {"tp_kl": alpha, "hisce": lam, "ce": ce_weight, "consistency": consistency_weight}
    check_weights(alpha, lam, ce_weight, consistency_weight)
    check_choice("softmax_over", softmax_over, ("auto", "all", "valid"))
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
    weight = samples.class_weights
    terms = level_terms(samples.logits, samples.target, samples.tax, siblings=bool(lam), class_weights=weight)

    def reduced(loss: Tensor) -> Tensor:
        if reduction == "mean":
            loss = balanced(loss, terms, samples)
        return samples.reduce(over_levels(loss, terms.valid, level_weights, "sum"), reduction)

    parts = {}
    if alpha:
        loss = path_kl(terms, samples.target, samples.tax, softmax_over, level_weights)
        parts["tp_kl"] = samples.by_class().reduce(loss, reduction)
    if lam:
        parts["hisce"] = reduced(smoothed_nll(terms, eps, weight))
    if ce_weight:
        parts["ce"] = reduced(terms.nll if weight is None else terms.nll * weight[terms.path])
    if consistency_weight:
        parts["consistency"] = parent_child_consistency(logits, tax, sample_weight=sample_weight, reduction=reduction)
    # With all weights 0 the total must still carry the graph.
    weighted = [weights[name] * part for name, part in parts.items()]
    total = samples.reduce(0.0 * terms.nll[:, 0], reduction) if not weighted else weighted[0]
    for part in weighted[1:]:
        total = total + part
    return {"total": total, **parts}


def hierarchy_aware_loss(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    tax: Tree,
    *,
    alpha: float = 1.0,
    lam: float = 1.0,
    ce_weight: float = 0.0,
    consistency_weight: float = 0.0,
    eps: PerLevel = 0.1,
    softmax_over: str = "auto",
    level_weights: PerLevel | None = None,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""$ce\_weight \sum_l CE_l + \alpha\,TPKL + \lambda\,HiSCE + consistency\_weight\,PC$.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B, ...) integer node ids, internal nodes included; class names; or (B, N, ...) shares of nodes.
        tax: the tree.
        alpha: weight of TP-KL.
        lam: weight of HiSCE.
        ce_weight: weight of a further level cross-entropy.
        consistency_weight: weight of the parent-child penalty.
        eps: HiSCE's smoothing.
        softmax_over: "auto", "all" or "valid", see `tp_kl`.
        level_weights: number or D numbers, at least 0: shares of the path in TP-KL, factors of the levels in HiSCE and
            in the cross-entropy.
        ignore_index: the target that stands for no label; such samples count nowhere, but for the consistency.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0, as in `tp_kl` (by target) and in `hisce` (by the class of each level).
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none".

    Raises:
        ValueError: as `hierarchy_aware_parts`.
    """
    return hierarchy_aware_parts(
        logits,
        target,
        tax,
        alpha=alpha,
        lam=lam,
        ce_weight=ce_weight,
        consistency_weight=consistency_weight,
        eps=eps,
        softmax_over=softmax_over,
        level_weights=level_weights,
        ignore_index=ignore_index,
        classes=classes,
        class_weights=class_weights,
        sample_weight=sample_weight,
        reduction=reduction,
    )["total"]


def check_weights(alpha: float, lam: float, ce_weight: float, consistency_weight: float) -> None:
    """Raise a ValueError for a weight that is negative or not finite."""
    named = {"alpha": alpha, "lam": lam, "ce_weight": ce_weight, "consistency_weight": consistency_weight}
    for name, weight in named.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must lie in [0, inf), got {weight}")
