"""Tree cuts: random sets of nodes that cover every leaf exactly once, and the losses over them.

Reference: Wu, Ho, Vasconcelos 2024, "ProTeCt: Prompt Tuning for Taxonomic Open Set Classification" (arXiv 2306.02240):
random tree cuts, the tree-cut and node-centric losses, mean tree-cut accuracy over 25 cuts.
"""

import math
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._cuts import TreeCut, TreeCuts
from hier_losses.functional._inputs import IGNORE, Target, check_reduction, read_samples
from hier_losses.functional._terms import group_lse, over_sibling_groups
from hier_losses.functional.tree_ops import ancestor_sum
from hier_losses.taxonomy import Taxonomy

__all__ = [
    "TreeCut",
    "TreeCuts",
    "count_cuts",
    "cut_at",
    "node_classification_loss",
    "sample_cut",
    "sample_cuts",
    "treecut_loss",
]

# Draws before a rate counts as exhausted; at T = 25 only tiny trees and rates near 0 or 1 get there.
_TRIES = 64


def sample_cut(tax: Taxonomy, p: float = 0.1, generator: torch.Generator | None = None) -> TreeCut:
    """Draw a cut: from the root down, each internal node is expanded with probability 1 - p and kept otherwise.

    Args:
        tax: the taxonomy.
        p: probability of keeping an internal node instead of its children, in [0, 1]; 0 gives the leaves, 1 the top
            nodes.
        generator: source of randomness on the CPU, torch's own if None.

    Returns:
        The cut, on the device of the taxonomy.

    Raises:
        ValueError: p out of range.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    kept = torch.rand(tax.num_nodes, generator=generator, dtype=torch.float64).to(tax.device) < p
    kept = (kept | (tax.leaf_index >= 0)).long()
    # A kept node is a member if no ancestor is kept; one draw per node is as good as one per visited node.
    return TreeCut(tax, ((ancestor_sum(kept, tax) == 1) & (kept == 1)).nonzero().squeeze(1))


def sample_cuts(
    tax: Taxonomy,
    rates: Sequence[float] = (0.9, 0.7, 0.5, 0.3, 0.1),
    per_rate: int = 5,
    seed: int = 100,
) -> TreeCuts:
    """Draw different cuts for evaluation, `per_rate` of them at each rate p.

    A cut that was drawn before is drawn again. Where a rate hardly yields new cuts (p near 0 or 1, small trees) the
    rest is taken uniformly from all cuts, so that the search always ends.

    Args:
        tax: the taxonomy.
        rates: values of p, see `sample_cut`.
        per_rate: number of cuts for each rate.
        seed: seed of the drawing.

    Returns:
        `len(rates) * per_rate` cuts, all different as sets of nodes.

    Raises:
        ValueError: a rate out of range, more cuts than the tree has.
    """
    total, counts = len(rates) * per_rate, _cut_counts(tax)
    if per_rate < 1 or not rates:
        raise ValueError(
            f"rates and per_rate must ask for at least one cut, got {len(rates)} rates, per_rate={per_rate}"
        )
    if total > counts[0]:
        raise ValueError(f"rates and per_rate ask for {total} different cuts, the tree has {counts[0]}")
    generator = torch.Generator().manual_seed(seed)
    uniform = random.Random(seed)
    cuts: dict[tuple[int, ...], TreeCut] = {}
    for rate in rates:
        for _ in range(per_rate):
            for _ in range(_TRIES):
                cut = sample_cut(tax, rate, generator)
                if tuple(cut.nodes.tolist()) not in cuts:
                    break
            else:
                index = uniform.randrange(counts[0])
                while tuple((cut := _cut_at(tax, index, counts)).nodes.tolist()) in cuts:
                    index = (index + 1) % counts[0]
            cuts[tuple(cut.nodes.tolist())] = cut
    return TreeCuts(tax, cuts.values())


def count_cuts(tax: Taxonomy) -> int:
    """Count the cuts: f(leaf) = 1, f(v) = 1 + product of f over the children, the product alone at the root.

    Args:
        tax: the taxonomy.

    Returns:
        An exact integer, of thousands of digits for large trees.

    >>> count_cuts(Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)]))
    2
    """
    return _cut_counts(tax)[0]


def cut_at(tax: Taxonomy, index: int) -> TreeCut:
    """Return the cut with a given number; `range(count_cuts(tax))` goes through all of them.

    Args:
        tax: the taxonomy.
        index: number in [0, count_cuts(tax)).

    Raises:
        ValueError: index out of range.
    """
    counts = _cut_counts(tax)
    if not 0 <= index < counts[0]:
        raise ValueError(f"index must lie in [0, {counts[0]}), got {index}")
    return _cut_at(tax, index, counts)


def _cut_counts(tax: Taxonomy) -> list[int]:
    """Number of cuts of the tree (entry 0) and of each subtree (entry v + 1)."""
    start, size = tax.group_start.tolist(), tax.group_size.tolist()
    counts = [1] * (tax.num_nodes + 1)
    for group in range(tax.num_nodes, -1, -1):
        if size[group]:
            product = math.prod(counts[start[group] + 1 : start[group] + size[group] + 1])
            counts[group] = product + (group > 0)
    return counts


def _cut_at(tax: Taxonomy, index: int, counts: list[int]) -> TreeCut:
    start, size = tax.group_start.tolist(), tax.group_size.tolist()
    nodes, stack = [], [(0, index)]
    while stack:
        group, index = stack.pop()
        if group and index == 0:
            nodes.append(group - 1)
            continue
        index -= group > 0
        for child in range(start[group], start[group] + size[group]):
            index, digit = divmod(index, counts[child + 1])
            stack.append((child + 1, digit))
    return TreeCut(tax, nodes)


def treecut_loss(
    logits: Float[Tensor, "batch nodes *rest"],
    cut: TreeCut,
    target: Target,
    *,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy over the members of a cut, $lse_{u \in cut} z_u - z_{m(y)}$, with m(y) the member above y.

    Args:
        logits: one logit per node.
        cut: the cut, from `sample_cut`.
        target: (B, ...) node ids or class names; samples whose (partial) label lies above the cut are left out.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; a sample weighs as much as its member of the cut, and the mean divides by the sum.
        sample_weight: weights in the shape of the targets, at least 0; the mean divides by their sum.
        reduction: "mean" over the samples that count, "sum" or "none" (0 where left out).

    Returns:
        A scalar, or (B, ...) for "none"; at least 0.

    Raises:
        ValueError: wrong width, target out of range or not integers, unknown reduction.
    """
    check_reduction(reduction)
    samples = read_samples(
        "logits",
        logits,
        target,
        cut.tax,
        ignore_index=ignore_index,
        classes=classes,
        class_weights=class_weights,
        sample_weight=sample_weight,
    )
    cut = cut.to(samples.logits.device)
    label = cut.member[samples.target]
    known, label = label >= 0, label.clamp(min=0)
    scores = samples.logits.index_select(1, cut.nodes)
    loss = scores.logsumexp(1) - scores.gather(1, label[:, None]).squeeze(1)
    samples = samples._replace(target=cut.nodes[label], kept=samples.kept & known)
    return samples.by_class().reduce(loss, reduction)


def node_classification_loss(
    logits: Float[Tensor, "batch nodes *rest"],
    target: Target,
    tax: Taxonomy,
    skip_single_child: bool = True,
    *,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Float[Tensor, ""]:
    r"""Mean over internal nodes of the mean cross-entropy over their children.

    $\frac{1}{|U|} \sum_{u \in U} \frac{1}{|B_u|} \sum_{b \in B_u} (lse_{c: parent(c) = u} z_c - z_{c_u(y_b)})$, where
    $B_u$ are the samples strictly below u and U the virtual root and the internal nodes with such samples. Weights make
    each inner mean a weighted one, divided by its sum of weights.

    Args:
        logits: one logit per node.
        target: (B, ...) node ids or class names; a partial label counts at its proper ancestors.
        tax: the taxonomy.
        skip_single_child: leave nodes with one child out of U; their cross-entropy is 0.
        ignore_index: the target that stands for no label; such samples count nowhere.
        classes: (C,) node ids; with them the target holds class numbers in [0, C) instead of node ids.
        class_weights: (N,) at least 0; below u a sample weighs as much as the child of u above it.
        sample_weight: weights in the shape of the targets, at least 0.

    Returns:
        A scalar >= 0; 0 for an empty batch.

    Raises:
        ValueError: wrong width, target out of range or not integers.
    """
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
    logits, tax = samples.logits, samples.tax
    path = tax.paths[samples.target]
    counted, path = (path >= 0) & samples.kept[:, None], path.clamp(min=0)
    if skip_single_child:
        counted = counted & (tax.n_siblings[path] > 0)
    terms = over_sibling_groups(logits, path, tax, group_lse) - logits.gather(1, path)
    group = tax.parent[path] + 1
    weight = counted.to(logits.dtype)
    if samples.weight is not None:
        weight = weight * samples.weight[:, None]
    if samples.class_weights is not None:
        weight = weight * samples.class_weights[path]
    mass = logits.new_zeros(tax.num_nodes + 1).index_add(0, group.flatten(), weight.flatten())
    mean = torch.where(weight > 0, terms * weight, 0.0) / torch.where(mass > 0, mass, 1.0)[group]
    return mean.sum() / (mass > 0).sum().clamp(min=1)
