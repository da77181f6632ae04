"""Hierarchical precision, recall and F-score on the sets of nodes along the paths.

Reference: Kiritchenko et al. 2006, "Learning and Evaluation in the Presence of Class Hierarchies".
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses.functional._inputs import IGNORE
from hier_losses.metrics._base import PathMetric
from hier_losses.metrics._counts import extended_pair, ratio
from hier_losses.taxonomy import Taxonomy


class HierarchicalPRF(PathMetric):
    """Hierarchical precision, recall and F-score, see `hierarchical_prf`."""

    def __init__(
        self,
        tax: Taxonomy,
        average: str = "micro",
        beta: float = 1.0,
        *,
        validate_args: bool = True,
        **kwargs: Any,
    ):
        """See `hierarchical_prf` for `average` and `beta` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs, average=average, beta=beta)

    @staticmethod
    def _check(tax: Taxonomy, average: str, beta: float) -> None:
        PathMetric._check(tax, average=average)
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must lie in [0, inf), got {beta}")

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy, average: str, beta: float) -> dict[str, Tensor]:
        pred, truth, known = extended_pair(paths, target, tax)
        # An inconsistent path may name a leaf on several levels, not always in a row; it is one element of the set.
        earlier = torch.ones(2 * [tax.num_levels], dtype=torch.bool, device=pred.device).tril(-1)
        repeated = ((pred[:, :, None] == pred[:, None, :]) & earlier).any(2)
        element = known & (pred >= 0) & ~repeated
        hit = element & (pred[:, :, None] == truth[:, None, :]).any(2)
        hits, predicted, true = hit.sum(1), element.sum(1), tax.depth[target]
        if average == "micro":
            return {"hits": hits, "predicted": predicted, "true": true}
        precision, recall = ratio(hits, predicted, 1.0), ratio(hits, true)
        f_score = _f_score(precision, recall, beta)
        return {"precision": precision, "recall": recall, "f": f_score, "total": torch.ones_like(target)}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy, average: str, beta: float) -> dict[str, Tensor]:
        if average == "macro":
            mean = {name: ratio(sums[name], sums["total"]) for name in ("precision", "recall", "f")}
            return {f"hierarchical_{name}": value for name, value in mean.items()}
        recall = ratio(sums["hits"], sums["true"])
        precision = torch.where(recall.isnan(), torch.nan, ratio(sums["hits"], sums["predicted"], 1.0))
        f_score = _f_score(precision, recall, beta)
        return {"hierarchical_precision": precision, "hierarchical_recall": recall, "hierarchical_f": f_score}


def _f_score(precision: Tensor, recall: Tensor, beta: float) -> Tensor:
    below = beta**2 * precision + recall
    value = (1 + beta**2) * precision * recall / torch.where(below == 0, 1.0, below)
    return torch.where(below == 0, 0.0, value)


def hierarchical_prf(
    pred_paths: Tensor,
    target: Tensor,
    tax: Taxonomy,
    average: str = "micro",
    beta: float = 1.0,
    *,
    ignore_index: int = IGNORE,
) -> dict[str, Float[Tensor, ""]]:
    r"""Overlap of the predicted and the true sets of nodes, virtual root excluded.

    $hP = |H \cap G| / |H|$, $hR = |H \cap G| / |G|$, $hF_\beta = (1 + \beta^2) hP\, hR / (\beta^2 hP + hR)$. Nodes
    below the level of a partial label do not count. A prediction of the root alone has hP = 1 and hR = 0.

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids.
        tax: the taxonomy.
        average: "micro" (sizes are summed over samples first) or "macro" (the three values are averaged over samples).
        beta: weight of the recall, >= 0.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        `hierarchical_precision`, `hierarchical_recall` and `hierarchical_f` in [0, 1]; NaN for an empty batch.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range, unknown average, negative beta.
    """
    return HierarchicalPRF.evaluate(pred_paths, target, tax, average=average, beta=beta, ignore_index=ignore_index)
