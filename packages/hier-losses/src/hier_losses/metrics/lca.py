"""Metrics of what the lowest common ancestor of prediction and truth still tells.

References: Kosmopoulos et al. 2015, "Evaluation measures for hierarchical classification" (LCA precision and recall);
Valmadre 2022, "Hierarchical classification at multiple operating points" (values by depth and by information).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses.functional._inputs import IGNORE, check_choice
from hier_losses.metrics._base import PathMetric
from hier_losses.metrics._counts import judged_node, lowest_common_ancestor, ratio
from hier_losses.path_ops import end_of_paths
from hier_losses.taxonomy import Taxonomy

_NAMES = ("precision", "recall", "f1", "distance", "excess", "deficient")


class LCAMetrics(PathMetric):
    """Precision, recall, F1, distance, excess and deficiency at the common ancestor, see `lca_metrics`."""

    plot_upper_bound = None

    def __init__(self, tax: Taxonomy, value: str = "depth", *, validate_args: bool = True, **kwargs: Any):
        """See `lca_metrics` for `value` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs, value=value)

    @staticmethod
    def _check(tax: Taxonomy, value: str) -> None:
        check_choice("value", value, ("depth", "info"))

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy, value: str) -> dict[str, Tensor]:
        node = judged_node(end_of_paths(paths[:, 0]), target, tax)
        ancestor, _ = lowest_common_ancestor(node, target, tax)
        if value == "depth":
            table = tax.depth.double()
        else:
            table = -(tax.n_leaves.double() / tax.num_leaves).log2()
        shared, predicted, true = (
            torch.where(nodes >= 0, table[nodes.clamp(min=0)], 0.0) for nodes in (ancestor, node, target)
        )
        precision, recall = ratio(shared, predicted, 1.0), ratio(shared, true, 1.0)
        # Nothing shared, though there was something to share, is 0 and not the 0/0 of two worthless nodes.
        f1 = ratio(2 * precision * recall, precision + recall, 0.0)
        parts = (precision, recall, f1, true + predicted - 2 * shared, predicted - shared, true - shared)
        return dict(zip(_NAMES, parts, strict=True)) | {"total": torch.ones_like(target)}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy, value: str) -> dict[str, Tensor]:
        return {f"lca_{name}": ratio(sums[name], sums["total"]) for name in _NAMES}


def lca_metrics(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, value: str = "depth", *, ignore_index: int = IGNORE
) -> dict[str, Float[Tensor, ""]]:
    r"""Means over samples of ratios of the value v of the prediction h, the truth g and their common ancestor.

    Precision $v(lca) / v(h)$, recall $v(lca) / v(g)$, F1 of the two, distance $v(g) + v(h) - 2 v(lca)$, excess
    $v(h) - v(lca)$, deficiency $v(g) - v(lca)$; 0/0 counts as 1. v is the depth, or the information
    $-\log_2(n(v) / K)$, which is 0 at the root and makes a lone child worth nothing more than its parent.

    Args:
        pred_paths: (B, D) padded or extended paths; their deepest node is the prediction.
        target: (B,) node ids.
        tax: the taxonomy.
        value: "depth" or "info".
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        `lca_precision`, `lca_recall`, `lca_f1` in [0, 1]; `lca_distance`, `lca_excess`, `lca_deficient` >= 0 in levels
        or bits. NaN for an empty batch.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range, unknown value.
    """
    return LCAMetrics.evaluate(pred_paths, target, tax, value=value, ignore_index=ignore_index)
