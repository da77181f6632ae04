"""Scores sample by sample: what an interval over samples, a paired difference or a breakdown by group is made from.

Each score is a ratio of two sums over samples, the form that a bootstrap over samples (Efron 1979) resamples as pairs.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._cuts import TreeCuts
from hier_losses.functional._inputs import IGNORE, check_matrix, check_target
from hier_losses.metrics._counts import PathCounts, check_paths, ratio
from hier_losses.metrics.cuts import checked_cuts, hca_samples, mta_samples
from hier_losses.metrics.distance import AverageHierarchicalDistanceCounts, EdgeDistanceCounts, MistakeSeverityCounts
from hier_losses.metrics.paths import FullPathAccuracyCounts, LeafAccuracyCounts, LevelAccuracyCounts, TICECounts
from hier_losses.taxonomy import Taxonomy

_PATH_METRICS: dict[str, tuple[type[PathCounts], dict]] = {
    "leaf_accuracy": (LeafAccuracyCounts, {"average": "micro"}),
    "full_path_accuracy": (FullPathAccuracyCounts, {}),
    "tice": (TICECounts, {}),
    "mistake_severity": (MistakeSeverityCounts, {}),
    "average_hierarchical_distance": (AverageHierarchicalDistanceCounts, {"k": 1}),
    "edge_distance": (EdgeDistanceCounts, {}),
    "level_accuracy": (LevelAccuracyCounts, {}),
}


class SampleScore(NamedTuple):
    """One score of every sample as a ratio of sums.

    Attributes:
        numerator: (B,) float64, (B, D) for one value per level.
        denominator: of the same shape; 0 where the sample does not count.
    """

    numerator: Tensor
    denominator: Tensor

    @property
    def value(self) -> Tensor:
        """The metric over all samples, float64; NaN where none counts."""
        return ratio(self.numerator.sum(0), self.denominator.sum(0))


def path_scores(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, *, ignore_index: int = IGNORE
) -> dict[str, SampleScore]:
    r"""Score decoded paths sample by sample.

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids, internal ones for partial labels.
        tax: the taxonomy.
        ignore_index: the target that stands for no label; such samples count nowhere.

    Returns:
        `leaf_accuracy`, `full_path_accuracy`, `tice`, `mistake_severity`, `average_hierarchical_distance` (at rank 1),
        `edge_distance` of (B,) samples and `level_accuracy` of (B, D), top level first. The `value` of each is what
        the function of that name returns.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> scores = path_scores(torch.tensor([[0, 2], [1, 1], [1, 1]]), torch.tensor([3, 1, 2]), tax)
    >>> scores["mistake_severity"].numerator.tolist(), scores["mistake_severity"].denominator.tolist()
    ([1.0, 0.0, 2.0], [1.0, 0.0, 1.0])
    >>> scores["mistake_severity"].value.item(), scores["level_accuracy"].value.shape
    (1.5, torch.Size([2]))
    """
    tax = tax.to(pred_paths.device)
    paths, node = check_paths(pred_paths, target, tax, ignore_index=ignore_index)
    kept = target.long() != ignore_index
    found = {}
    for name, (metric, settings) in _PATH_METRICS.items():
        found[name] = _spread(metric._samples(paths, node, tax, **settings), kept)
    return found


def logit_scores(
    logits: Float[Tensor, "batch nodes"],
    target: Tensor,
    tax: Taxonomy,
    cuts: TreeCuts | None = None,
    *,
    ignore_index: int = IGNORE,
) -> dict[str, SampleScore]:
    r"""Score node logits sample by sample.

    Args:
        logits: one score per node.
        target: (B,) node ids.
        tax: the taxonomy.
        cuts: the cuts of `mta`, which is left out without them.
        ignore_index: the target that stands for no label; such samples count nowhere.

    Returns:
        `hca`, and with cuts `mta`, whose denominator is the number of cuts that have an answer; (B,) samples. The
        `value` of each is what the function of that name returns.

    Raises:
        ValueError: wrong width, target out of range or not integers, cuts of another taxonomy.
    """
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    node = check_target(target, logits.shape[0], tax, ignore_index=ignore_index)
    kept = node != ignore_index
    rows, node = logits[kept], node[kept]
    found = {"hca": _spread(hca_samples(rows, node, tax), kept)}
    if cuts is not None:
        marks = mta_samples(rows, node, checked_cuts(cuts, tax))
        found["mta"] = _spread({name: part.sum(1) for name, part in marks.items()}, kept)
    return found


def _spread(counts: dict[str, Tensor], kept: Tensor) -> SampleScore:
    """Put the counts of the labelled samples back into their rows, zeros into the others."""
    numerator, denominator = (
        part.new_zeros((len(kept), *part.shape[1:]), dtype=torch.float64).index_put((kept,), part.double())
        for part in counts.values()
    )
    return SampleScore(numerator, denominator)
