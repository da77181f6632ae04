"""What each level gets right: accuracy at rank k, macro precision, recall and F1, and calibration, level by level.

References: Guo et al. 2017, "On Calibration of Modern Neural Networks" (expected calibration error over equal bins);
macro averages as in scikit-learn, over the classes that occur or are predicted.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses.functional._inputs import IGNORE, check_matrix, check_target
from hier_losses.metrics._base import HierarchicalMetric, PathMetric
from hier_losses.metrics._counts import ratio
from hier_losses.metrics.paths import WeightedAveragePrecisionCounts
from hier_losses.path_ops import end_of_paths, extend_paths
from hier_losses.probabilities import extended_level
from hier_losses.taxonomy import Taxonomy

PRF = ("precision", "recall", "f1")


class TopKAccuracy(PathMetric):
    """Share of samples whose leaf is among the first k predictions, see `top_k_accuracy`."""

    def __init__(self, tax: Taxonomy, k: int = 5, *, validate_args: bool = True, **kwargs: Any):
        """See `top_k_accuracy` for `k` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs, k=k)

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy, k: int) -> dict[str, Tensor]:
        known = tax.leaf_index[target] >= 0
        return {"correct": (end_of_paths(paths) == target[:, None]).any(1) & known, "total": known}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy, k: int) -> Tensor:
        return ratio(sums["correct"], sums["total"])


def top_k_accuracy(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, k: int = 5, *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    """Share of samples whose target leaf ends one of the first k paths; partial labels are left out.

    Args:
        pred_paths: (B, k', D) paths ranked by score with k' >= k, see `top_k_paths`; (B, D) for k = 1.
        target: (B,) node ids.
        tax: the taxonomy.
        k: number of predictions that count.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, 1], equal to the leaf accuracy for k = 1; NaN if no target is a leaf.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range, k out of [1, K], too few ranks.
    """
    return TopKAccuracy.evaluate(pred_paths, target, tax, k=k, ignore_index=ignore_index)


class LevelPRF(PathMetric):
    """Macro precision, recall and F1 of every level as named scalars, `precision_1` for the top; see `level_prf`."""

    def __init__(self, tax: Taxonomy, *, validate_args: bool = True, **kwargs: Any):
        """See `HierarchicalMetric` for the arguments."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs)

    @classmethod
    def _sums(cls, paths: Tensor, target: Tensor, tax: Taxonomy) -> dict[str, Tensor]:
        return WeightedAveragePrecisionCounts._sums(paths, target, tax, "precision")

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy) -> dict[str, Tensor]:
        table = class_table(sums)
        seen = (sums["predicted"] + sums["total"]) > 0
        found: dict[str, Tensor] = {}
        for name in PRF:
            mean = ratio(torch.where(seen, table[name], 0.0).sum(1), seen.sum(1))
            found |= {f"{name}_{level + 1}": value for level, value in enumerate(mean)}
        return found


def level_prf(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, *, ignore_index: int = IGNORE
) -> dict[str, Float[Tensor, " depth"]]:
    r"""Macro precision, recall and F1 of each level of the extended paths.

    The mean runs over the classes of the level with tp + fp + fn > 0; a class that is never predicted has precision 0,
    one that never occurs recall 0.

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids.
        tax: the taxonomy.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        `precision`, `recall` and `f1`, one value in [0, 1] per level, top level first; NaN where no sample is known.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range.
    """
    found = LevelPRF.evaluate(pred_paths, target, tax, ignore_index=ignore_index)
    return {name: torch.stack([found[f"{name}_{i + 1}"] for i in range(tax.num_levels)]) for name in PRF}


def class_table(counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Precision, recall and F1 of each class from its counts, 0 where the divisor is."""
    return {
        "precision": ratio(counts["correct"], counts["predicted"], 0.0),
        "recall": ratio(counts["correct"], counts["total"], 0.0),
        "f1": ratio(2 * counts["correct"], counts["predicted"] + counts["total"], 0.0),
    }


class LevelCalibration(HierarchicalMetric):
    """Expected calibration error of every level as named scalars, `ece_1` for the top; see `level_calibration`."""

    higher_is_better = False

    def __init__(self, tax: Taxonomy, num_bins: int = 15, *, validate_args: bool = True, **kwargs: Any):
        """See `level_calibration` for `num_bins` and `HierarchicalMetric` for the rest."""
        _check_bins(num_bins)
        super().__init__(tax, validate_args=validate_args, **kwargs)
        self.num_bins = num_bins
        zero = torch.zeros(tax.num_levels, num_bins)
        sums = {"confidence": zero.double(), "correct": zero.long(), "total": zero.long()}
        self.add_sums(sums, num_bins)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, N) one score per node.
            target: (B,) node ids.

        Raises:
            ValueError: wrong width, target out of range or not integers.
        """
        self.add(_bins(logits, target, self.tax, self.num_bins, self.validate_args, self.ignore_index))

    def compute(self) -> dict[str, Tensor]:
        """Return the values over all samples so far; NaN without samples."""
        return {f"ece_{level + 1}": value for level, value in enumerate(_gap(self.totals()))}


def level_calibration(
    logits: Float[Tensor, "batch nodes"],
    target: Tensor,
    tax: Taxonomy,
    num_bins: int = 15,
    *,
    ignore_index: int = IGNORE,
) -> Float[Tensor, " depth"]:
    r"""Expected calibration error of the softmax over each extended level.

    $\sum_b \frac{n_b}{n} |acc_b - conf_b|$ over equal bins of the largest probability; partial labels count on the
    levels they know.

    Args:
        logits: one score per node.
        target: (B,) node ids.
        tax: the taxonomy.
        num_bins: number of bins of [0, 1], at least 1.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        One value in [0, 1] per level, top level first; NaN where no sample is known.

    Raises:
        ValueError: wrong width, target out of range or not integers, too few bins.
    """
    _check_bins(num_bins)
    return _gap(_bins(logits, target, tax, num_bins, True, ignore_index))


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")


def _bins(
    logits: Tensor, target: Tensor, tax: Taxonomy, num_bins: int, validate: bool, ignore_index: int
) -> dict[str, Tensor]:
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    if validate:
        target = check_target(target, logits.shape[0], tax, ignore_index=ignore_index)
    kept = target != ignore_index
    logits, target = logits[kept], target[kept].long()
    truth = extend_paths(tax.paths[target], tax)
    found: dict[str, list[Tensor]] = {"confidence": [], "correct": [], "total": []}
    for level in range(tax.num_levels):
        nodes = extended_level(tax, level + 1)
        known = truth[:, level] >= 0
        confidence, best = logits[known].index_select(1, nodes).double().softmax(1).max(1)
        # NaN where a logit is infinite: it spoils the number, not the place.
        cell = (confidence.nan_to_num(0.0) * num_bins).long().clamp(max=num_bins - 1)
        zero = torch.zeros(num_bins, dtype=torch.float64, device=logits.device)
        right = nodes[best] == truth[known, level]
        found["confidence"].append(zero.index_add(0, cell, confidence))
        found["correct"].append(torch.bincount(cell[right], minlength=num_bins))
        found["total"].append(torch.bincount(cell, minlength=num_bins))
    return {name: torch.stack(parts) for name, parts in found.items()}


def _gap(sums: dict[str, Tensor]) -> Tensor:
    return ratio((sums["correct"].double() - sums["confidence"]).abs().sum(1), sums["total"].sum(1))
