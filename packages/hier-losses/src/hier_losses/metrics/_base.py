"""What the torchmetrics classes share: states that are sums, and the update of path metrics."""

import re
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from hier_losses._fingerprint import fingerprint
from hier_losses.functional._inputs import IGNORE, check_taxonomy
from hier_losses.graph import LabelGraph
from hier_losses.metrics._counts import PathCounts, check_paths
from hier_losses.taxonomy import Taxonomy


class HierarchicalMetric(Metric):
    """A torchmetrics metric over a taxonomy whose states are sums (int64 counts, float64 ratios).

    Sums are exact under any split of the samples over processes, empty shares included.

    Args:
        tax: the taxonomy; the metrics of several labels per sample take a label graph as well.
        validate_args: check the values of the inputs, which costs a pass over them.
        ignore_index: the target that stands for no label; such samples are left out.
        **kwargs: options of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    takes_graphs = False
    tax: Any  # a Taxonomy, or a LabelGraph where `takes_graphs` says so

    def __init__(
        self, tax: Taxonomy | LabelGraph, *, validate_args: bool = True, ignore_index: int = IGNORE, **kwargs: Any
    ):
        """Keep the taxonomy; subclasses then call `add_sums`."""
        check_taxonomy(tax, self.takes_graphs)
        super().__init__(**kwargs)
        self.tax = tax
        self.validate_args = validate_args
        self.ignore_index = ignore_index
        self._names: dict[str, str] = {}

    def add_sums(self, zeros: dict[str, Tensor], *settings: object) -> None:
        """Register the states.

        A `MetricCollection` merges metrics whose states have equal names and, after the first batch, equal values; it
        then updates only one of them. A batch where two metrics agree by chance would silently tie them together, so
        the names carry the class, its settings and the taxonomy.

        Args:
            zeros: initial value of each sum.
            *settings: constructor arguments that change what is counted.
        """
        tag = "_".join([type(self).__name__, *map(str, settings), str(self.ignore_index), fingerprint(self.tax)])
        for name, zero in zeros.items():
            self._names[name] = re.sub(r"\W", "_", f"{name}_{tag}")
            # A metric starts on the CPU, wherever its taxonomy is; `.to(device)` moves the states.
            self.add_state(self._names[name], zero.cpu(), dist_reduce_fx="sum")

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of a batch to the states."""
        for name, value in sums.items():
            setattr(self, self._names[name], getattr(self, self._names[name]) + value)

    def totals(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return {name: getattr(self, state) for name, state in self._names.items()}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or a list of values, as every torchmetrics metric does; needs matplotlib.

        Args:
            val: results of `forward` or `compute`, the current value if None.
            ax: a matplotlib axis.

        Returns:
            Figure and axis.
        """
        return self._plot(val, ax)


class PathMetric(PathCounts, HierarchicalMetric):
    """A metric of predicted paths against target nodes, made from the two functions of `PathCounts`."""

    def __init__(self, tax: Taxonomy, *, validate_args: bool = True, metric_options: dict[str, Any], **settings: Any):
        """Check the settings and register the sums of an empty batch as initial states."""
        check_taxonomy(tax)
        self._check(tax, **settings)
        super().__init__(tax, validate_args=validate_args, **metric_options)
        self.settings = settings
        paths = tax.paths[:0, None].expand(0, settings.get("k", 1), -1)
        self.add_sums(self._sums(paths, tax.leaf[:0], tax, **settings), *settings.values())

    def update(self, pred_paths: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            pred_paths: (B, D) padded or extended paths, or (B, k, D) paths ranked by score.
            target: (B,) node ids, internal ones for partial labels; those equal to `ignore_index` are left out.

        Raises:
            ValueError: wrong shape or dtype, an entry out of range, too few ranks.
        """
        tax = self.tax.to(pred_paths.device)
        ranks = self.settings.get("k", 1)
        paths, target = check_paths(pred_paths, target, tax, ranks, self.validate_args, self.ignore_index)
        self.add(self._sums(paths, target, tax, **self.settings))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the value over all samples so far; NaN where no sample counts."""
        return self._value(self.totals(), self.tax, **self.settings)
