"""The torchmetrics classes of the scores in `paths`, `distance` and `cuts`, which do without torchmetrics: it is slow to import."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._cuts import TreeCuts
from hier_losses.metrics._base import HierarchicalMetric, PathMetric
from hier_losses.metrics._counts import ratio
from hier_losses.metrics.cuts import checked_cuts, hca_samples, labelled, mta_samples, mta_value, total
from hier_losses.metrics.distance import (
    AverageHierarchicalDistanceCounts,
    EdgeDistanceCounts,
    HierarchicalPrecisionAtKCounts,
    MistakeSeverityCounts,
)
from hier_losses.metrics.paths import (
    FullPathAccuracyCounts,
    LeafAccuracyCounts,
    LevelAccuracyCounts,
    TICECounts,
    WeightedAveragePrecisionCounts,
)
from hier_losses.taxonomy import Taxonomy


class FullPathAccuracy(FullPathAccuracyCounts, PathMetric):
    """Share of samples whose path is right on every level, see `full_path_accuracy`.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> metric = FullPathAccuracy(tax)
    >>> metric.update(torch.tensor([[0, 2], [1, 1]]), torch.tensor([3, 1]))
    >>> metric.compute().item()
    0.5
    """

    def __init__(self, tax: Taxonomy, *, validate_args: bool = True, **kwargs: Any):
        """See `HierarchicalMetric` for the arguments."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs)


class TICE(TICECounts, PathMetric):
    """Share of predicted paths that are no path of the tree, see `tice`. `update` takes a target and ignores it."""

    higher_is_better = False

    def __init__(self, tax: Taxonomy, *, validate_args: bool = True, **kwargs: Any):
        """See `HierarchicalMetric` for the arguments."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs)


class LevelAccuracy(LevelAccuracyCounts, PathMetric):
    """Accuracy of every level, see `level_accuracy`.

    With `as_dict` the result is one named scalar per level, `level_accuracy_1` for the top: the form that loggers and
    a `MetricCollection` take.
    """

    def __init__(self, tax: Taxonomy, as_dict: bool = False, *, validate_args: bool = True, **kwargs: Any):
        """Keep `as_dict`; see `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs)
        self.as_dict = as_dict

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the values over all samples so far; NaN where no sample counts."""
        value = super().compute()
        if not self.as_dict or isinstance(value, dict):
            return value
        return {f"level_accuracy_{level + 1}": part for level, part in enumerate(value)}


class LeafAccuracy(LeafAccuracyCounts, PathMetric):
    """Accuracy at the leaves, see `leaf_accuracy`."""

    def __init__(self, tax: Taxonomy, average: str = "micro", *, validate_args: bool = True, **kwargs: Any):
        """See `leaf_accuracy` for `average` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs, average=average)


class WeightedAveragePrecision(WeightedAveragePrecisionCounts, PathMetric):
    """Precision per level, weighted by the size of the level, see `weighted_average_precision`."""

    def __init__(self, tax: Taxonomy, per_level: str = "precision", *, validate_args: bool = True, **kwargs: Any):
        """See `weighted_average_precision` for `per_level` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs, per_level=per_level)


class MistakeSeverity(MistakeSeverityCounts, PathMetric):
    """Mean distance over the mistakes, see `mistake_severity`. Print accuracy and average distance beside it."""

    higher_is_better = False
    plot_upper_bound = None

    def __init__(self, tax: Taxonomy, *, validate_args: bool = True, **kwargs: Any):
        """See `HierarchicalMetric` for the arguments."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs)


class AverageHierarchicalDistance(AverageHierarchicalDistanceCounts, PathMetric):
    """Mean distance of the first k predictions, see `average_hierarchical_distance`."""

    higher_is_better = False
    plot_upper_bound = None

    def __init__(self, tax: Taxonomy, k: int = 1, *, validate_args: bool = True, **kwargs: Any):
        """See `average_hierarchical_distance` for `k` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs, k=k)


class HierarchicalPrecisionAtK(HierarchicalPrecisionAtKCounts, PathMetric):
    """Similarity of the first k predictions relative to the best k, see `hierarchical_precision_at_k`."""

    def __init__(
        self, tax: Taxonomy, k: int = 1, *, over_ranks: bool = False, validate_args: bool = True, **kwargs: Any
    ):
        """See `hierarchical_precision_at_k` for `k` and `over_ranks` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs, k=k, over_ranks=over_ranks)


class EdgeDistance(EdgeDistanceCounts, PathMetric):
    """Mean number of edges between prediction and target, see `edge_distance`."""

    higher_is_better = False
    plot_upper_bound = None

    def __init__(self, tax: Taxonomy, *, validate_args: bool = True, **kwargs: Any):
        """See `HierarchicalMetric` for the arguments."""
        super().__init__(tax, validate_args=validate_args, metric_options=kwargs)


class HCA(HierarchicalMetric):
    """Hierarchical consistent accuracy, see `hca`."""

    def __init__(self, tax: Taxonomy, *, validate_args: bool = True, **kwargs: Any):
        """See `HierarchicalMetric` for the arguments."""
        super().__init__(tax, validate_args=validate_args, **kwargs)
        zero = torch.tensor(0)
        self.add_sums({"correct": zero, "total": zero.clone()})

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, N) one score per node.
            target: (B,) node ids.

        Raises:
            ValueError: wrong width, target out of range or not integers.
        """
        self.add(
            total(hca_samples(*labelled(logits, target, self.tax, self.validate_args, self.ignore_index), self.tax))
        )

    def compute(self) -> Float[Tensor, ""]:
        """Return the value over all samples so far; NaN without samples."""
        sums = self.totals()
        return ratio(sums["correct"], sums["total"])


class MTA(HierarchicalMetric):
    """Mean tree-cut accuracy, see `mta`."""

    def __init__(
        self, tax: Taxonomy, cuts: TreeCuts, *, per_cut: bool = False, validate_args: bool = True, **kwargs: Any
    ):
        """See `mta` for `cuts` and `per_cut` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, **kwargs)
        self.cuts = checked_cuts(cuts, tax)
        self.per_cut = per_cut
        zero = torch.zeros(len(cuts), dtype=torch.int64)
        self.add_sums({"correct": zero, "total": zero.clone()}, per_cut, hash(tuple(map(tuple, cuts.node_ids))))

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, N) one score per node.
            target: (B,) node ids.

        Raises:
            ValueError: wrong width, target out of range or not integers.
        """
        self.add(
            total(mta_samples(*labelled(logits, target, self.tax, self.validate_args, self.ignore_index), self.cuts))
        )

    def compute(self) -> Float[Tensor, "*cuts"]:
        """Return the value over all samples so far; NaN without samples."""
        return mta_value(self.totals(), self.per_cut)
