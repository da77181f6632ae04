"""What the metrics share: sum-reduced states, input checks, and the reading of partial labels.

Partial labels: a target at an internal node says nothing about the levels below it. Levels below it are masked, and a
prediction that reaches further down is judged at the depth of the target.
"""

import re
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from hier_losses._fingerprint import fingerprint
from hier_losses.functional._inputs import IGNORE, check_choice, check_target, check_taxonomy, require
from hier_losses.functional.tree_ops import path_lca_depth
from hier_losses.graph import LabelGraph
from hier_losses.path_ops import extend_paths, paths_of
from hier_losses.taxonomy import Taxonomy

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


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


class PathMetric(HierarchicalMetric):
    """A metric of predicted paths against target nodes.

    A metric consists of two pure functions: `_samples` counts each sample of a batch, `_value` turns their sums into
    the result. The class adds the sums up over batches and processes, its functional twin (`evaluate`) takes those of
    one batch, and `path_scores` hands out the counts themselves.
    """

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

    @classmethod
    def evaluate(
        cls, pred_paths: Tensor, target: Tensor, tax: Taxonomy, *, ignore_index: int = IGNORE, **settings: Any
    ) -> Any:
        """Return the value of one batch without building a metric."""
        cls._check(tax, **settings)
        tax = tax.to(pred_paths.device)
        paths, target = check_paths(pred_paths, target, tax, settings.get("k", 1), ignore_index=ignore_index)
        return cls._value(cls._sums(paths, target, tax, **settings), tax, **settings)

    @staticmethod
    def _check(tax: Taxonomy, *_: Any, **settings: Any) -> None:
        """Raise a ValueError for a setting out of range."""
        if "k" in settings and not isinstance(settings["k"], int):
            raise TypeError(f"k must be an integer, got {settings['k']!r}")
        if "k" in settings and not 1 <= settings["k"] <= tax.num_leaves:
            raise ValueError(f"k must lie in [1, {tax.num_leaves}], got {settings['k']}")
        if "average" in settings:
            check_choice("average", settings["average"], ("micro", "macro"))

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy, *_: Any, **settings: Any) -> dict[str, Tensor]:
        """Count each of (B, k, D) paths, (B, ...); of two counts the first is divided by the second."""
        raise NotImplementedError

    @classmethod
    def _sums(cls, paths: Tensor, target: Tensor, tax: Taxonomy, *_: Any, **settings: Any) -> dict[str, Tensor]:
        """Count a batch of (B, k, D) paths."""
        return {name: part.sum(0) for name, part in cls._samples(paths, target, tax, **settings).items()}

    @staticmethod
    @abstractmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy, *_: Any, **settings: Any) -> Tensor | dict[str, Tensor]:
        """Turn counts into the result."""


def check_paths(
    pred_paths: Tensor,
    target: Tensor,
    tax: Taxonomy,
    num_ranks: int = 1,
    validate: bool = True,
    ignore_index: int = IGNORE,
) -> tuple[Tensor, Tensor]:
    """Check predictions and targets; return the first (B, num_ranks, D) paths and int64 targets of what is labelled."""
    levels = tax.num_levels
    if pred_paths.dtype not in _INTEGERS:
        raise ValueError(f"pred_paths must hold integer node ids, got dtype {pred_paths.dtype}")
    if pred_paths.ndim not in (2, 3) or pred_paths.shape[-1] != levels:
        raise ValueError(
            f"pred_paths must have shape (batch, {levels}) or (batch, ranks, {levels}), got {tuple(pred_paths.shape)}"
        )
    ranked = pred_paths.long() if pred_paths.ndim == 3 else pred_paths.long()[:, None]
    if ranked.shape[1] < num_ranks:
        raise ValueError(f"pred_paths must hold at least k={num_ranks} ranked paths, got {tuple(pred_paths.shape)}")
    if validate:
        target = check_target(target, ranked.shape[0], tax, ignore_index=ignore_index)
        inside = ((ranked >= -1) & (ranked < tax.num_nodes)).flatten(1).all(1)
        require(inside, lambda row: f"pred_paths must lie in [-1, {tax.num_nodes}), row {row} does not")
        deep = tax.depth[ranked.clamp(0, tax.num_nodes - 1)] > torch.arange(1, levels + 1, device=ranked.device)
        fits = ~(deep & (ranked >= 0)).flatten(1).any(1)
        require(fits, lambda row: f"pred_paths row {row} has a node above its level: {pred_paths[row].tolist()}")
    kept = target != ignore_index
    return ranked[kept, :num_ranks], target[kept].long()


def extended_pair(paths: Tensor, target: Tensor, tax: Taxonomy) -> tuple[Tensor, Tensor, Tensor]:
    """Return the extended best path, the extended true path and the mask of known levels, all (B, D)."""
    truth = extend_paths(tax.paths[target], tax)
    return extend_paths(paths[:, 0], tax), truth, truth >= 0


def judged_node(node: Tensor, target: Tensor, tax: Taxonomy) -> Tensor:
    """Cut predictions at the depth of a partial label; `node` is (B,) or (B, k) with -1 for the root."""
    target = target.view(-1, *[1] * (node.ndim - 1)).expand_as(node)
    partial = tax.leaf_index[target] < 0
    at_depth = paths_of(node, tax).gather(-1, (tax.depth[target] - 1)[..., None]).squeeze(-1)
    return torch.where(partial & (at_depth >= 0), at_depth, node)


def lowest_common_ancestor(node: Tensor, target: Tensor, tax: Taxonomy) -> tuple[Tensor, Tensor]:
    """Return id (-1: root) and depth of the lowest common ancestor-or-self of nodes (-1: root) and targets."""
    target = target.view(-1, *[1] * (node.ndim - 1)).expand_as(node)
    paths = tax.paths[target]
    depth = path_lca_depth(paths_of(node, tax), paths)
    ancestor = paths.gather(-1, (depth - 1).clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(depth > 0, ancestor, -1), depth


def node_distance(node: Tensor, target: Tensor, tax: Taxonomy) -> Tensor:
    """Return d = h(LCA), 0 where the nodes are equal, in int64."""
    ancestor, _ = lowest_common_ancestor(node, target, tax)
    height = torch.where(ancestor >= 0, tax.height[ancestor.clamp(min=0)], tax.root_height)
    return torch.where(node == target.view(-1, *[1] * (node.ndim - 1)), 0, height)


def ratio(numerator: Tensor, denominator: Tensor, empty: float = torch.nan) -> Tensor:
    """Divide in float64; `empty` where the denominator is 0."""
    return torch.where(denominator > 0, numerator.double() / denominator.double(), empty)
