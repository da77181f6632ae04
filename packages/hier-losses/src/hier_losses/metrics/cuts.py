"""Metrics of consistency over a whole tree: hierarchical consistent accuracy and mean tree-cut accuracy.

Reference: Wu, Ho, Vasconcelos 2024, "ProTeCt: Prompt Tuning for Taxonomic Open Set Classification" (arXiv 2306.02240).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._cuts import TreeCuts
from hier_losses.functional._inputs import IGNORE, check_matrix, check_target
from hier_losses.functional._terms import over_sibling_groups
from hier_losses.metrics._counts import ratio
from hier_losses.taxonomy import Taxonomy


def hca(
    logits: Float[Tensor, "batch nodes"], target: Tensor, tax: Taxonomy, *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    r"""Share of samples that are right at the leaves and in every choice among siblings on the way.

    $\mathrm{mean}\; 1[\arg\max_{leaves} z = y] \prod_{u} 1[\arg\max_{children(u)} z \in path(y)]$, u the virtual root
    and the internal nodes of path(y). Some papers ask for the argmax of whole levels instead and report other numbers.
    For a partial label the best leaf has to lie at or below y, and u ends above y.

    Args:
        logits: one score per node.
        target: (B,) node ids.
        tax: the taxonomy.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, 1], at most the leaf accuracy; NaN for an empty batch.

    Raises:
        ValueError: wrong width, target out of range or not integers.
    """
    sums = total(hca_samples(*labelled(logits, target, tax, True, ignore_index), tax))
    return ratio(sums["correct"], sums["total"])


def mta(
    logits: Float[Tensor, "batch nodes"],
    target: Tensor,
    tax: Taxonomy,
    cuts: TreeCuts,
    *,
    per_cut: bool = False,
    ignore_index: int = IGNORE,
) -> Float[Tensor, "*cuts"]:
    r"""Mean over cuts and samples of $1[\arg\max_{u \in cut} z_u = m(y)]$, m(y) the member at or above y.

    A partial label that lies above a cut is left out there. A cut close to the root is easy: print
    `mta_majority_baseline` beside it.

    Args:
        logits: one score per node.
        target: (B,) node ids.
        tax: the taxonomy.
        cuts: the cuts, from `sample_cuts` or `TreeCuts.from_text_cuts`.
        per_cut: return one accuracy per cut instead of the mean.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, 1], or (T,) of them; equal to the leaf accuracy for the cut of all leaves. NaN without samples.

    Raises:
        ValueError: wrong width, target out of range or not integers, cuts of another taxonomy.
    """
    return mta_value(
        total(mta_samples(*labelled(logits, target, tax, True, ignore_index), checked_cuts(cuts, tax))), per_cut
    )


def mta_majority_baseline(target: Tensor, cuts: TreeCuts, reference: Tensor | None = None) -> Float[Tensor, ""]:
    """Return the mean tree-cut accuracy of always answering the most frequent member of each cut.

    Args:
        target: (B,) node ids of the evaluated samples.
        cuts: the cuts.
        reference: (R,) node ids whose majority is taken, the training targets; the evaluated ones if None, which gives
            the best that any constant answer can reach.

    Returns:
        A value in [0, 1]; NaN without samples.

    Raises:
        ValueError: target or reference out of range or not integers.
    """
    target = check_target(target, target.shape[0], cuts.tax)
    reference = target if reference is None else check_target(reference, reference.shape[0], cuts.tax)
    hits, totals = [], []
    for cut in cuts.to(target.device):
        seen = cut.member[reference]
        majority = torch.bincount(seen[seen >= 0], minlength=len(cut)).argmax()
        label = cut.member[target]
        hits.append((label == majority).sum())
        totals.append((label >= 0).sum())
    return ratio(torch.stack(hits).sum(), torch.stack(totals).sum())


def labelled(logits: Tensor, target: Tensor, tax: Taxonomy, validate: bool, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the scores and int64 targets of what is labelled."""
    logits = check_matrix("logits", logits, tax.num_nodes)
    if validate:
        target = check_target(target, logits.shape[0], tax.to(target.device), ignore_index=ignore_index)
    kept = target != ignore_index
    return logits[kept], target[kept].long()


def checked_cuts(cuts: TreeCuts, tax: Taxonomy) -> TreeCuts:
    """Return cuts of this taxonomy; raise for anything else."""
    if not isinstance(cuts, TreeCuts):
        raise TypeError(f"cuts must be TreeCuts, got {type(cuts).__name__}; see sample_cuts")
    if cuts.tax != tax:
        raise ValueError(
            f"cuts must belong to tax of {tax.num_nodes} nodes, got cuts of another tree of {cuts.tax.num_nodes} nodes"
        )
    return cuts


def hca_samples(logits: Tensor, target: Tensor, tax: Taxonomy) -> dict[str, Tensor]:
    """Mark for each sample whether every choice is right."""
    tax = tax.to(logits.device)
    path = tax.paths[target]
    node = path.clamp(min=0)
    local = ((over_sibling_groups(logits, node, tax, _best_member) == path) | (path < 0)).all(1)
    leaf = tax.leaf[logits.index_select(1, tax.leaf).argmax(1)]
    at_depth = tax.paths[leaf].gather(1, (tax.depth[target] - 1)[:, None]).squeeze(1)
    return {"correct": local & (at_depth == target), "total": torch.ones_like(local)}


def _best_member(values: Tensor, node: Tensor, member: Tensor, own: Tensor) -> Tensor:
    """Best node of a sibling group, the smaller id among equals, none where scores are NaN."""
    best = torch.where(member, values, -torch.inf).amax(-1, keepdim=True)
    return torch.where(member & (values == best), node, torch.iinfo(torch.int64).max).amin(-1)


def mta_samples(logits: Tensor, target: Tensor, cuts: TreeCuts) -> dict[str, Tensor]:
    """Mark for each sample and cut, (B, T), whether the answer is right and whether there is one."""
    correct, total = [], []
    for cut in cuts.to(logits.device):
        label = cut.member[target]
        correct.append(logits.index_select(1, cut.nodes).argmax(1) == label)
        total.append(label >= 0)
    return {"correct": torch.stack(correct, 1), "total": torch.stack(total, 1)}


def total(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum the marks over samples."""
    return {name: part.sum(0) for name, part in samples.items()}


def mta_value(sums: dict[str, Tensor], per_cut: bool) -> Tensor:
    """Accuracy of each cut, or over all of them."""
    if per_cut:
        return ratio(sums["correct"], sums["total"])
    return ratio(sums["correct"].sum(), sums["total"].sum())
