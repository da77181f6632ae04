"""Tree-path KL: one softmax over all nodes of the tree against the uniform distribution on the target's path.

References: "Hierarchy-Aware Fine-Tuning of Vision-Language Models" (2025, arXiv 2512.21529); for hard labels it equals
the tree-path KL loss of Park et al. (2025, "Visually Consistent Hierarchical Image Classification", H-CAST).
"""

import torch
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
    check_scores,
    check_target,
    over_mixtures,
    per_level,
    read_samples,
    require,
)
from hier_losses.functional._kernels import safe_logsumexp
from hier_losses.functional._terms import LevelTerms, level_terms


@over_mixtures
def tp_kl(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target | None,
    tax: Tree,
    *,
    softmax_over: str = "auto",
    temperature: float = 1.0,
    level_weights: PerLevel | None = None,
    label_smoothing: PerLevel = 0.0,
    target_probs: Tensor | None = None,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""KL divergence from the target's path to the softmax over all nodes.

    $TPKL = lse(z) - \sum_l p_l z_{v_l} + \sum_l p_l \log p_l$ with $p_l = 1/L$, or $p_l \propto w_l$ with level
    weights; z is divided by the temperature first. Gradient: softmax minus target. It equals
    $\sum_l p_l CE_l + KL(p \| \pi)$, $\pi_l = e^{lse_l - lse}$: cross-entropies per level plus a term that balances the
    levels. Nothing in it couples a child to its parent; `parent_child_consistency` does.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B, ...) integer node ids, internal nodes included; class names; or (B, N, ...) shares of nodes; None
            with `target_probs`.
        tax: the tree.
        softmax_over: "all" nodes; the "valid" levels, down to the target's own; "auto" is "all" for leaves and
            "valid" for internal targets, whose lower levels are unknown rather than absent.
        temperature: positive divisor of the logits.
        level_weights: number or D numbers, at least 0. A sample whose levels all weigh 0 has loss 0.
        label_smoothing: number or D numbers in [0, 1), the share of each level's mass spread evenly over that level.
        target_probs: (B, N, ...) distribution over nodes instead of `target`, see `path_probs`; "auto" is then "all", and
            "valid" reaches down to the deepest level with mass.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; a sample weighs as much as its target, as in torch the mean divides by the sum.
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B, ...) for "none"; at least 0, up to rounding.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer, both or neither of target and
            target_probs, rows of target_probs that are no distributions, a setting outside its range.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> tax = Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])
    >>> round(tp_kl(torch.zeros(1, 4), torch.tensor([2]), tax).item(), 4)  # log 4 - log 2
    0.6931
    """
    check_choice("softmax_over", softmax_over, ("auto", "all", "valid"))
    check_reduction(reduction)
    check_temperature(temperature)
    if target is not None and target_probs is not None:
        raise ValueError("give either target or target_probs, got both")
    if target_probs is not None and level_weights is not None:
        raise ValueError(f"level_weights must be None with target_probs, which holds them, got {level_weights}")
    if target is None and target_probs is None:
        raise ValueError("give either target or target_probs, got neither")
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
    wanted = logits.shape
    logits, tax = samples.logits / temperature, samples.tax
    smooth = not (isinstance(label_smoothing, (int, float)) and label_smoothing == 0)
    if target_probs is not None:
        if smooth or class_weights is not None:
            raise ValueError("label_smoothing and class_weights go with target, not with target_probs")
        if target_probs.shape != wanted:
            raise ValueError(f"target_probs must have shape {tuple(wanted)}, got {tuple(target_probs.shape)}")
        probs = check_scores("target_probs", target_probs, tax.num_nodes).to(logits.dtype)
        require((probs >= 0).all(1), lambda row: f"target_probs must be at least 0, row {row} is not")
        total = probs.sum(1)
        require(
            (total - 1).abs() < 1e-3, lambda row: f"target_probs rows must sum to 1, row {row} sums to {total[row]}"
        )
        return samples.reduce(_kl_to_probs(logits, probs, tax, softmax_over), reduction)
    if smooth:
        probs = _path_shares(samples.target, tax, label_smoothing, level_weights, logits)
        whole = (softmax_over == "all") | ((softmax_over == "auto") & (tax.leaf_index[samples.target] >= 0))
        deepest = torch.where(whole, tax.num_levels, tax.depth[samples.target])
        loss = torch.where(probs.sum(1) > 0, _kl_to_probs(logits, probs, tax, softmax_over, deepest), 0.0)
    else:
        terms = level_terms(logits, samples.target, tax)
        loss = path_kl(terms, samples.target, tax, softmax_over, level_weights)
    return samples.by_class().reduce(loss, reduction)


def path_kl(
    terms: LevelTerms, target: Tensor, tax: Tree, softmax_over: str = "auto", level_weights: PerLevel | None = None
) -> Tensor:
    """TP-KL per sample, (B,), from the terms of the ragged levels."""
    share = terms.valid.to(terms.lse.dtype)
    if level_weights is not None:
        share = share * per_level("level_weights", level_weights, terms.lse, tax.num_levels)
    mass = share.sum(1, keepdim=True)
    share = share / torch.where(mass > 0, mass, 1.0)
    deepest = tax.depth[target]
    if softmax_over != "valid":
        whole = softmax_over == "all"
        deepest = torch.where((tax.leaf_index[target] >= 0) | whole, tax.num_levels, deepest)
    score = torch.where(share > 0, share * terms.score, 0.0).sum(1)
    loss = _lse_down_to(terms.lse, deepest) - score + torch.xlogy(share, share).sum(1)
    return torch.where(mass[:, 0] > 0, loss, 0.0)


def path_probs(
    target: Tensor, tax: Tree, *, label_smoothing: PerLevel = 0.0, level_weights: PerLevel | None = None
) -> Float[Tensor, "batch nodes"]:
    r"""Targets for `tp_kl(target_probs=...)`: mass 1/L, or $\propto w_l$, on each level of the path.

    Convex combinations of rows (mixup) stay distributions.

    Args:
        target: (B,) integer node ids.
        tax: the tree.
        label_smoothing: number or D numbers in [0, 1), the share of each level's mass spread evenly over that level.
        level_weights: number or D numbers, at least 0.

    Returns:
        (B, N) float32, rows sum to 1.

    Raises:
        ValueError: a target outside [0, N) or not integer, a setting outside its range, weights that are 0 on all
            levels of a target.
    """
    if target.ndim != 1:
        raise ValueError(f"target must have shape (batch,), got {tuple(target.shape)}")
    tax = tax.to(target.device)
    target = check_target(target, target.shape[0], tax)
    like = torch.zeros(1, tax.num_nodes, device=target.device)
    shares = _path_shares(target, tax, label_smoothing, level_weights, like)
    known = shares.sum(1) > 0
    require(known, lambda row: f"level_weights must be positive on a level of each target, row {row} has none")
    return shares


def _path_shares(
    target: Tensor, tax: Tree, label_smoothing: PerLevel, level_weights: PerLevel | None, logits: Tensor
) -> Tensor:
    """Rows of `path_probs`, 0 where all weights are; classes whose logit is -inf take no share of the smoothing."""
    path = tax.paths[target]
    share = (path >= 0).to(logits.dtype)
    if level_weights is not None:
        share = share * per_level("level_weights", level_weights, logits, tax.num_levels)
    mass = share.sum(1, keepdim=True)
    share = share / torch.where(mass > 0, mass, 1.0)
    smooth = per_level("label_smoothing", label_smoothing, logits, tax.num_levels, below=1.0)
    hard = torch.zeros(len(target), tax.num_nodes, dtype=logits.dtype, device=target.device)
    hard = hard.scatter_add(1, path.clamp(min=0), share * (1 - smooth))
    alive = (logits != -torch.inf).to(logits.dtype)
    sizes = torch.stack([level.sum(1) for level in alive.split(tax.level_sizes, 1)], 1)
    return hard + alive * (share * smooth / sizes.clamp(min=1))[:, tax.depth - 1]


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless the temperature is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _kl_to_probs(logits: Tensor, probs: Tensor, tax: Tree, softmax_over: str, deepest: Tensor | None = None) -> Tensor:
    lse = torch.stack([level.logsumexp(1) for level in logits.split(tax.level_sizes, 1)], 1)
    if deepest is None:
        deepest = torch.full_like(probs[:, 0], tax.num_levels, dtype=torch.int64)
        if softmax_over == "valid":
            deepest = torch.where(probs > 0, tax.depth, 0).amax(1)
    score = torch.where(probs > 0, probs * logits, 0.0).sum(1)
    return _lse_down_to(lse, deepest) - score + torch.xlogy(probs, probs).sum(1)


def _lse_down_to(lse: Tensor, deepest: Tensor) -> Tensor:
    level = torch.arange(1, lse.shape[1] + 1, device=lse.device)
    return safe_logsumexp(torch.where(level <= deepest[:, None], lse, -torch.inf))
