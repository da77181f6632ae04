"""Losses with one softmax per level: level cross-entropy, its semantic-softmax weighting, and HiSCE.

References: Lin et al. (2017, "Focal Loss", eq. 4); Ridnik et al. (2021, "ImageNet-21K Pretraining for the Masses",
semantic softmax); "Hierarchy-Aware Fine-Tuning of Vision-Language Models" (2025, arXiv 2512.21529, HiSCE).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._inputs import (
    IGNORE,
    LevelReduction,
    Levels,
    PerLevel,
    Reduction,
    Samples,
    Target,
    check_choice,
    check_reduction,
    over_levels,
    over_mixtures,
    per_level,
    read_samples,
)
from hier_losses.functional._terms import LevelTerms, level_terms, shallow_sum


@over_mixtures
def level_cross_entropy(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    tax: Tree,
    *,
    levels: Levels | str = "ragged",
    level_reduction: LevelReduction | str = "sum",
    level_weights: PerLevel | None = None,
    label_smoothing: PerLevel = 0.0,
    focal_gamma: float = 0.0,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy with one softmax per level, $\sum_l w_l\,[lse_l(z) - z_{v_l}]$ over the path $v_1..v_L$.

    `ragged` has a term for each level of the target's path. `extended` adds every shallower leaf to the classes of a
    level, which then partition the leaves, and repeats a leaf target down to level D. Levels below an internal target
    (a partial label) have no term in either.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B, ...) integer node ids, internal nodes included; class names; or (B, N, ...) shares of nodes.
        tax: the tree.
        levels: "ragged" or "extended".
        level_reduction: weighted "sum" or weighted "mean" over the levels that have a term.
        level_weights: number or D numbers, at least 0.
        label_smoothing: number or D numbers in [0, 1), spread evenly over the classes of the level.
        focal_gamma: exponent of (1 - p) in the focal loss, at least 0; not together with label smoothing.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; each class's share of a level's term is multiplied by its weight. As in torch,
            the mean of a level divides by the sum of the weights of its targets (relative to their number).
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; at least 0.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer, a setting outside its range.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> tax = Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])
    >>> round(level_cross_entropy(torch.zeros(1, 4), torch.tensor([2]), tax).item(), 4)  # log 2 + log 2
    1.3863
    """
    check_choice("levels", levels, ("ragged", "extended"))
    check_choice("level_reduction", level_reduction, ("sum", "mean"))
    check_reduction(reduction)
    if not 0 <= focal_gamma < float("inf"):
        raise ValueError(f"focal_gamma must be at least 0 and finite, got {focal_gamma}")
    smooth = not (isinstance(label_smoothing, (int, float)) and label_smoothing == 0)
    if smooth and focal_gamma:
        raise ValueError(f"label_smoothing must be 0 with focal_gamma {focal_gamma}, got {label_smoothing}")
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
    terms = level_terms(logits, target, tax, levels)
    loss, weight = terms.nll, samples.class_weights
    if weight is not None:
        loss = loss * weight[terms.path]
    if smooth:
        share = per_level("label_smoothing", label_smoothing, logits, tax.num_levels, below=1.0)
        loss = (1 - share) * loss + share * _uniform_nll(terms, weight, tax, levels)
    if focal_gamma:
        # -expm1 keeps 1 - p exact near p = 1; the clamp keeps the gradient of a power below 1 finite there.
        miss = -torch.expm1(-terms.nll)
        loss = loss * miss.clamp(min=torch.finfo(loss.dtype).tiny) ** focal_gamma
    if reduction == "mean":
        loss = balanced(loss, terms, samples)
    return samples.reduce(over_levels(loss, terms.valid, level_weights, level_reduction), reduction)


def balanced(loss: Tensor, terms: LevelTerms, samples: Samples) -> Tensor:
    """Divide the terms of each level by the mean class weight of its targets, so that the batch mean is torch's."""
    if samples.class_weights is None:
        return loss
    present = (terms.valid & samples.kept[:, None]).to(loss.dtype)
    if samples.weight is not None:
        present = present * samples.weight[:, None]
    mass = (present * samples.class_weights[terms.path]).sum(0)
    return loss * (present.sum(0) / torch.where(mass > 0, mass, 1.0))


def semantic_softmax_weights(tax: Tree, max_weight: float = 20.0) -> Float[Tensor, " levels"]:
    r"""Level weights of semantic softmax, $w_l = \min(N / \sum_{j \ge l} C_j, w_{max})$.

    With about equally many samples per node, a label on level j gives a term on every level up to j, so level l has
    terms in the proportion $\sum_{j \ge l} C_j / N$ of the samples; the weights undo that. The bound 20 is that of the
    authors' published code, which leaves out the deepest level; here all levels count.

    Args:
        tax: the tree.
        max_weight: bound of the weights.

    Returns:
        (D,) float32, not decreasing, in [1, max_weight].

    Raises:
        ValueError: `max_weight` below 1.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> semantic_softmax_weights(Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])).tolist()
    [1.0, 2.0]
    """
    if not max_weight >= 1:
        raise ValueError(f"max_weight must be at least 1, got {max_weight}")
    weights, below = [], tax.num_nodes
    for size in tax.level_sizes:
        weights.append(min(tax.num_nodes / below, max_weight))
        below -= size
    return torch.tensor(weights, device=tax.device)


def semantic_softmax(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    tax: Tree,
    *,
    max_weight: float = 20.0,
    label_smoothing: PerLevel = 0.0,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Level cross-entropy with the weights of `semantic_softmax_weights`, $\sum_l w_l CE_l$ over the target's levels.

    Args:
        logits: one logit per node.
        target: (B, ...) integer node ids, internal nodes included; class names; or (B, N, ...) shares of nodes.
        tax: the tree.
        max_weight: bound of the weights.
        label_smoothing: number or D numbers in [0, 1).
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; each class's share of a level's term is multiplied by its weight. As in torch,
            the mean of a level divides by the sum of the weights of its targets (relative to their number).
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; at least 0.

    Raises:
        ValueError: as `level_cross_entropy`.
    """
    weights = semantic_softmax_weights(tax, max_weight)
    return level_cross_entropy(
        logits,
        target,
        tax,
        level_weights=weights,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        classes=classes,
        class_weights=class_weights,
        sample_weight=sample_weight,
        reduction=reduction,
    )


@over_mixtures
def hisce(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    tax: Tree,
    *,
    eps: PerLevel = 0.1,
    levels: Levels | str = "ragged",
    level_reduction: LevelReduction | str = "sum",
    level_weights: PerLevel | None = None,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Hierarchy-sibling smoothed cross-entropy: each level's target gives the share eps to the siblings.

    The target row has $1-\epsilon$ on the class and $\epsilon/|S|$ on each sibling, S the siblings without the class;
    a lone child keeps all the mass (the printed formula divides by 0 there). In closed form, without any matrix,
    $HiSCE_l = CE_l + \epsilon_l\,(z_{v_l} - mean_{s \in S(v_l)} z_s)$. With `levels="extended"`, below its own level a
    repeated leaf shares with those siblings that are leaves, the ones that are classes of that level.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B, ...) integer node ids, internal nodes included; class names; or (B, N, ...) shares of nodes.
        tax: the tree.
        eps: number or D numbers in [0, 1).
        levels: "ragged" or "extended", as in `level_cross_entropy`.
        level_reduction: weighted "sum" or weighted "mean" over the levels that have a term.
        level_weights: number or D numbers, at least 0.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; each class's share of a level's term is multiplied by its weight. As in torch,
            the mean of a level divides by the sum of the weights of its targets (relative to their number).
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; per level at least the entropy of the smoothed target.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer, a setting outside its range.
    """
    check_choice("levels", levels, ("ragged", "extended"))
    check_choice("level_reduction", level_reduction, ("sum", "mean"))
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
    terms = level_terms(logits, target, tax, levels, siblings=True, class_weights=samples.class_weights)
    loss = smoothed_nll(terms, eps, samples.class_weights)
    if reduction == "mean":
        loss = balanced(loss, terms, samples)
    return samples.reduce(over_levels(loss, terms.valid, level_weights, level_reduction), reduction)


def smoothed_nll(terms: LevelTerms, eps: PerLevel, class_weights: Tensor | None = None) -> Tensor:
    """HiSCE per level, (B, D), from terms with siblings; meaningless where not valid."""
    assert terms.others is not None
    total, mass, count = terms.others
    share = per_level("eps", eps, terms.logits, terms.lse.shape[1], below=1.0)
    if class_weights is None:
        mean = torch.where(count > 0, total / count.clamp(min=1), terms.score)
        return terms.nll + share * (terms.score - mean)
    own = class_weights[terms.path] * terms.nll
    spread = (mass * terms.lse - total) / count.clamp(min=1)
    return torch.where(count > 0, (1 - share) * own + share * spread, own)


def _uniform_nll(terms: LevelTerms, weight: Tensor | None, tax: Tree, levels: str) -> Tensor:
    """Mean over the classes of each level of their (weighted) negative log-likelihoods, (B, D)."""
    # A class with logit -inf is no class.
    alive = (terms.logits != -torch.inf).to(terms.logits.dtype)
    weight = alive if weight is None else weight * alive
    weighted = weight * torch.where(alive > 0, terms.logits, 0.0)
    count, mass, score = (_level_sum(values, tax) for values in (alive, weight, weighted))
    if levels == "extended":
        count, mass = count + shallow_sum(alive, tax), mass + shallow_sum(weight, tax)
        score = score + shallow_sum(weighted, tax)
    return (terms.lse * mass - score) / count.clamp(min=1)


def _level_sum(values: Tensor, tax: Tree) -> Tensor:
    return torch.stack([level.sum(1) for level in values.split(tax.level_sizes, 1)], 1)
