"""Metrics of whole paths: full-path accuracy, tree inconsistency, accuracy per level and at the leaves.

References: Park et al. 2025, "Visually Consistent Hierarchical Image Classification
Segmentations" (H-CAST, ICLR 2025): full-path accuracy, tree-based inconsistency error rate, weighted average precision.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses.functional._inputs import IGNORE, check_choice
from hier_losses.metrics._counts import PathCounts, extended_pair, ratio
from hier_losses.path_ops import end_of_paths, extend_paths
from hier_losses.taxonomy import Taxonomy


class FullPathAccuracyCounts(PathCounts):
    """The counts behind `FullPathAccuracy`."""

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy) -> dict[str, Tensor]:
        pred, truth, known = extended_pair(paths, target, tax)
        return {"correct": ((pred == truth) | ~known).all(1), "total": known[:, 0]}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy) -> Tensor:
        return ratio(sums["correct"], sums["total"])


def full_path_accuracy(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    r"""Share of samples with $h_l = g_l$ on every level of the extended paths (those above a partial label).

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids.
        tax: the taxonomy.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, 1], at most the accuracy of each level and, over leaf targets, at most 1 - TICE; NaN for an empty
        batch.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range.
    """
    return FullPathAccuracyCounts.evaluate(pred_paths, target, tax, ignore_index=ignore_index)


class TICECounts(PathCounts):
    """The counts behind `TICE`."""

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy) -> dict[str, Tensor]:
        pred = extend_paths(paths[:, 0], tax)
        above, below = pred[:, :-1], pred[:, 1:]
        step = (above == below) | ((above >= 0) & (above == tax.parent[below.clamp(min=0)]))
        broken = ((below >= 0) & ~step).any(1)
        return {"broken": broken, "total": torch.ones_like(broken)}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy) -> Tensor:
        return ratio(sums["broken"], sums["total"])


def tice(pred_paths: Tensor, tax: Taxonomy) -> Float[Tensor, ""]:
    r"""Tree-based inconsistency error: share of samples with some $h_{l-1} \notin \{parent(h_l), h_l\}$.

    The truth plays no part. A path that stops at an internal node is consistent.

    Args:
        pred_paths: (B, D) padded or extended paths.
        tax: the taxonomy.

    Returns:
        A value in [0, 1]; 0 by construction for every decoder but `level_argmax`; NaN for an empty batch.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z")])
    >>> tice(torch.tensor([[0, 2], [1, 2]]), tax).item()
    0.5
    """
    return TICECounts.evaluate(pred_paths, pred_paths.new_zeros(pred_paths.shape[:1], dtype=torch.int64), tax)


class LevelAccuracyCounts(PathCounts):
    """The counts behind `LevelAccuracy`."""

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy) -> dict[str, Tensor]:
        pred, truth, known = extended_pair(paths, target, tax)
        return {"correct": (pred == truth) & known, "total": known}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy) -> Tensor:
        return ratio(sums["correct"], sums["total"])


def level_accuracy(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, *, ignore_index: int = IGNORE
) -> Float[Tensor, " depth"]:
    r"""Share of $h_l = g_l$ on each level of the extended paths, among the samples known on that level.

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids.
        tax: the taxonomy.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        One value in [0, 1] per level, top level first; NaN where no sample is known.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range.
    """
    return LevelAccuracyCounts.evaluate(pred_paths, target, tax, ignore_index=ignore_index)


class LeafAccuracyCounts(PathCounts):
    """The counts behind `LeafAccuracy`."""

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy, average: str) -> dict[str, Tensor]:
        known = tax.leaf_index[target] >= 0
        return {"correct": (end_of_paths(paths[:, 0]) == target) & known, "total": known}

    @classmethod
    def _sums(cls, paths: Tensor, target: Tensor, tax: Taxonomy, average: str) -> dict[str, Tensor]:
        if average == "micro":
            return super()._sums(paths, target, tax, average=average)
        leaf, marks = tax.leaf_index[target], cls._samples(paths, target, tax, average)
        return {name: torch.bincount(leaf[mark], minlength=tax.num_leaves) for name, mark in marks.items()}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy, average: str) -> Tensor:
        return ratio(sums["correct"], sums["total"]).nanmean()


def leaf_accuracy(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, average: str = "micro", *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    """Share of samples whose deepest predicted node is the target leaf; partial labels are left out.

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids.
        tax: the taxonomy.
        average: "micro" over samples, or "macro": the mean, over leaves that occur as target, of their accuracy.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, 1]; NaN if no target is a leaf.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range, unknown average.
    """
    return LeafAccuracyCounts.evaluate(pred_paths, target, tax, average=average, ignore_index=ignore_index)


class WeightedAveragePrecisionCounts(PathCounts):
    """The counts behind `WeightedAveragePrecision`."""

    @staticmethod
    def _check(tax: Taxonomy, per_level: str) -> None:
        check_choice("per_level", per_level, ("precision", "accuracy"))

    @staticmethod
    def _sums(paths: Tensor, target: Tensor, tax: Taxonomy, per_level: str) -> dict[str, Tensor]:
        pred, truth, known = extended_pair(paths, target, tax)
        if per_level == "accuracy":
            return {"correct": ((pred == truth) & known).sum(0), "total": known.sum(0)}
        # An internal node on a lower level than its own is no class there: the prediction abstains.
        slot = torch.arange(tax.num_levels, device=pred.device)
        node = pred.clamp(min=0)
        predicted = known & (pred >= 0) & ((tax.depth[node] == slot + 1) | (tax.leaf_index[node] >= 0))
        shape = (tax.num_levels, tax.num_nodes)
        cells = {"correct": predicted & (pred == truth), "predicted": predicted, "total": known}
        nodes = {"correct": truth, "predicted": pred, "total": truth}
        return {
            name: torch.bincount((nodes[name] + slot * shape[1])[cell], minlength=shape[0] * shape[1]).view(shape)
            for name, cell in cells.items()
        }

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy, per_level: str) -> Tensor:
        if per_level == "accuracy":
            level = ratio(sums["correct"], sums["total"])
        else:
            precision = ratio(sums["correct"], sums["predicted"], 0.0)
            seen = (sums["predicted"] + sums["total"]) > 0
            level = ratio(torch.where(seen, precision, 0.0).sum(1), seen.sum(1))
        sizes = torch.tensor(tax.level_sizes, dtype=torch.float64, device=level.device)
        return ratio((sizes * level.nan_to_num(0.0)).sum(), (sizes * ~level.isnan()).sum())


def weighted_average_precision(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, per_level: str = "precision", *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    r"""Mean of the levels weighted by their numbers of nodes, $\sum_l \frac{C_l}{\sum_m C_m} P_l$.

    $P_l$ is the macro precision over the classes of the extended level with tp + fp + fn > 0 (0 for a class that is
    never predicted), or the accuracy of the level. Levels without a known sample are left out.

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids.
        tax: the taxonomy.
        per_level: "precision" or "accuracy".
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, 1]; NaN for an empty batch.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range, unknown per_level.
    """
    return WeightedAveragePrecisionCounts.evaluate(
        pred_paths, target, tax, per_level=per_level, ignore_index=ignore_index
    )
