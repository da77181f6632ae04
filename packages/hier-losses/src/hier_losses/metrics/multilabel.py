"""Metrics for several labels per sample: area under the ROC curve per node, and violations of the hierarchy.

References: Fawcett 2006, "An introduction to ROC analysis" (the area as a rank statistic, ties count one half);
Giunchiglia and Lukasiewicz 2020, "Coherent Hierarchical Multi-Label Classification Networks" (hierarchy violations).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from hier_losses.functional._inputs import check_choice, check_matrix, require
from hier_losses.graph import LabelGraph
from hier_losses.metrics._base import HierarchicalMetric
from hier_losses.metrics._counts import ratio
from hier_losses.taxonomy import Taxonomy


class NodeAUROC(HierarchicalMetric):
    """Area under the ROC curve of each node, see `node_auroc`.

    The exact area needs all scores: they are kept, in float32, and gathered from all processes. With `num_bins` it is
    computed from histograms of the sigmoid instead, whose size does not grow with the data.
    """

    takes_graphs = True
    auroc_scores: list[Tensor]
    auroc_labels: list[Tensor]

    def __init__(
        self,
        tax: Taxonomy | LabelGraph,
        average: str = "macro",
        num_bins: int | None = None,
        *,
        validate_args: bool = True,
        **kwargs: Any,
    ):
        """Register the states.

        Args:
            tax: the taxonomy or label graph.
            average: see `node_auroc`.
            num_bins: number of equal bins of the sigmoid of the logits, at least 2; None for the exact area.
            validate_args: see `HierarchicalMetric`.
            **kwargs: options of `torchmetrics.Metric`.

        Raises:
            ValueError: unknown average, too few bins.
        """
        check_choice("average", average, ("macro", "none"))
        if num_bins is not None and num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {num_bins}")
        super().__init__(tax, validate_args=validate_args, **kwargs)
        self.average, self.num_bins = average, num_bins
        if num_bins is None:
            # Flat lists, so that the empty list of a process without data can be gathered with the others.
            self.add_state("auroc_scores", [], dist_reduce_fx="cat")
            self.add_state("auroc_labels", [], dist_reduce_fx="cat")
        else:
            zero = torch.zeros(tax.num_nodes, num_bins, dtype=torch.int64)
            self.add_sums({"positive": zero, "negative": zero.clone()}, average, num_bins)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, N) one score per node; with `num_bins` before the sigmoid.
            target: (B, N) 0/1 labels, closed upwards: an ancestor of a positive node is positive.

        Raises:
            ValueError: wrong shapes, NaN, labels other than 0 and 1 or not closed upwards.
        """
        logits, labels = _checked(logits, target, self.tax, self.validate_args)
        if self.num_bins is None:
            self.auroc_scores.append(logits.float().flatten())
            # The same dtype as the scores: a process without data sends an empty tensor of the default dtype.
            self.auroc_labels.append(labels.float().flatten())
            return
        bins = (logits.sigmoid() * self.num_bins).long().clamp(0, self.num_bins - 1)
        cell = bins + torch.arange(self.tax.num_nodes, device=logits.device) * self.num_bins
        shape = (self.tax.num_nodes, self.num_bins)
        kept = {"positive": labels, "negative": ~labels}
        self.add({k: torch.bincount(cell[m], minlength=shape[0] * shape[1]).view(shape) for k, m in kept.items()})

    def compute(self) -> Float[Tensor, "*nodes"]:
        """Return the value over all samples so far; NaN where a node has one class only."""
        if self.num_bins is not None:
            area = _binned_area(**self.totals())
        else:
            scores, labels = (_joined(state, self.device) for state in (self.auroc_scores, self.auroc_labels))
            area = _exact_area(scores.view(-1, self.tax.num_nodes), labels.view(-1, self.tax.num_nodes) > 0)
        return area.nanmean() if self.average == "macro" else area


def node_auroc(
    logits: Float[Tensor, "batch nodes"], multi_hot: Tensor, tax: Taxonomy | LabelGraph, average: str = "macro"
) -> Float[Tensor, "*nodes"]:
    r"""Probability that a positive sample of a node scores above a negative one, ties counting one half.

    $(\sum_{positive} rank - P(P+1)/2) / (P \cdot M)$ with mid-ranks, P positive and M negative samples.

    Args:
        logits: one score per node; any increasing function of them gives the same.
        multi_hot: (B, N) 0/1 labels, closed upwards.
        tax: the taxonomy or label graph.
        average: "macro" (the mean of the nodes with both classes) or "none".

    Returns:
        A value in [0, 1], or (N,) of them; NaN where only one class occurs.

    Raises:
        ValueError: wrong shapes, NaN, labels other than 0 and 1 or not closed upwards, unknown average.
    """
    check_choice("average", average, ("macro", "none"))
    area = _exact_area(*_checked(logits, multi_hot, tax, True))
    return area.nanmean() if average == "macro" else area


class ViolationRate(HierarchicalMetric):
    """Share of edges whose child outscores its parent, see `violation_rate`. `update` takes a target and ignores it."""

    higher_is_better = False
    takes_graphs = True

    def __init__(self, tax: Taxonomy | LabelGraph, margin: float = 0.0, *, validate_args: bool = True, **kwargs: Any):
        """See `violation_rate` for `margin` and `HierarchicalMetric` for the rest."""
        super().__init__(tax, validate_args=validate_args, **kwargs)
        self.margin = margin
        zero = torch.tensor(0)
        self.add_sums({"violations": zero, "edges": zero.clone()}, margin)

    def update(self, logits: Tensor, target: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (B, N) one score per node.
            target: not used; there so that the metric fits into a `MetricCollection`.

        Raises:
            ValueError: wrong width.
        """
        self.add(_violation_sums(logits, self.tax, self.margin))

    def compute(self) -> Float[Tensor, ""]:
        """Return the value over all samples so far; NaN without samples or edges."""
        sums = self.totals()
        return ratio(sums["violations"], sums["edges"])


def violation_rate(
    logits: Float[Tensor, "batch nodes"], tax: Taxonomy | LabelGraph, margin: float = 0.0
) -> Float[Tensor, ""]:
    r"""Mean over samples and parent-child edges of $1[s_{child} > s_{parent} + margin]$; an edge with NaN counts as 1.

    Args:
        logits: one score per node, compared as they are: for a margin in probability pass their sigmoid.
        tax: the taxonomy or label graph.
        margin: how far a child may outscore its parent.

    Returns:
        A value in [0, 1]; NaN for an empty batch or where there is no edge.

    Raises:
        ValueError: wrong width.
    """
    sums = _violation_sums(logits, tax, margin)
    return ratio(sums["violations"], sums["edges"])


def _checked(logits: Tensor, multi_hot: Tensor, tax: Taxonomy | LabelGraph, validate: bool) -> tuple[Tensor, Tensor]:
    logits = check_matrix("logits", logits, tax.num_nodes)
    if multi_hot.shape != logits.shape:
        raise ValueError(f"multi_hot must have shape {tuple(logits.shape)}, got {tuple(multi_hot.shape)}")
    labels = multi_hot > 0
    if validate:
        binary = ((multi_hot == 0) | (multi_hot == 1)).all(1)
        require(binary, lambda row: f"multi_hot must hold 0 and 1, row {row} does not")
        ranked = ~logits.isnan().any(1)
        require(ranked, lambda row: f"logits must hold numbers to rank by, row {row} has NaN")
        tax = tax.to(labels.device)
        closed = (~labels[:, tax.edge_child] | labels[:, tax.edge_parent]).all(1)
        require(closed, lambda row: f"multi_hot row {row} is not closed upwards: a positive node has a negative parent")
    return logits, labels


def _joined(state: Tensor | list[Tensor], device: torch.device) -> Tensor:
    # dim_zero_cat refuses an empty list, which is what a metric without updates holds.
    return dim_zero_cat(state) if len(state) else torch.zeros(0, device=device)


def _exact_area(scores: Tensor, labels: Tensor) -> Tensor:
    ordered = scores.T.contiguous()
    ascending = ordered.sort(1).values
    low, high = (torch.searchsorted(ascending, ordered, right=right) for right in (False, True))
    rank = (low + high + 1).double() / 2
    positive = labels.T
    num, others = positive.sum(1), (~positive).sum(1)
    above = torch.where(positive, rank, 0.0).sum(1) - num.double() * (num + 1).double() / 2
    return ratio(above, num * others)


def _binned_area(positive: Tensor, negative: Tensor) -> Tensor:
    below = negative.cumsum(1) - negative
    pairs = (positive * (2 * below + negative)).sum(1)
    return ratio(pairs, 2 * positive.sum(1) * negative.sum(1))


def _violation_sums(logits: Tensor, tax: Taxonomy | LabelGraph, margin: float) -> dict[str, Tensor]:
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    violated = ~(logits.index_select(1, tax.edge_child) <= logits.index_select(1, tax.edge_parent) + margin)
    return {"violations": violated.sum(), "edges": torch.tensor(violated.numel(), device=logits.device)}
