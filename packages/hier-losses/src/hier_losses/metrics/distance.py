"""Metrics of tree distance: mistake severity, average distance and precision at rank k, path length.

References: Bertinetto et al. 2020, "Making Better Mistakes" (average hierarchical distance of the mistakes and at k);
Barz and Denzler 2019, "Hierarchy-based Image Embeddings for Semantic Image Retrieval" (hierarchical precision at k and
its mean over ranks); Garg et al. 2022, "Learning Hierarchy Aware Features for Reducing Mistake Severity".
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses.functional._inputs import IGNORE
from hier_losses.metrics._counts import (
    PathCounts,
    judged_node,
    lowest_common_ancestor,
    node_distance,
    ratio,
)
from hier_losses.path_ops import end_of_paths
from hier_losses.taxonomy import Taxonomy


def max_leaf_distance(tax: Taxonomy) -> int:
    """Return d_max, the largest d = h(LCA) over pairs of leaves: the height of the highest branching node.

    Args:
        tax: the taxonomy.

    Returns:
        An integer in [0, D]; 0 for a single leaf, below D where the virtual root has one child.
    """
    branching = tax.group_size > 1
    height = torch.cat([tax.height.new_tensor([tax.root_height]), tax.height])
    return int(torch.where(branching, height, 0).max())


def _distance(paths: Tensor, target: Tensor, tax: Taxonomy) -> Tensor:
    """Distance of the end of each path (B, k, D) to its target."""
    return node_distance(judged_node(end_of_paths(paths), target, tax), target, tax)


class MistakeSeverityCounts(PathCounts):
    """The counts behind `MistakeSeverity`."""

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy) -> dict[str, Tensor]:
        distance = _distance(paths, target, tax)[:, 0]
        return {"distance": distance, "mistakes": distance > 0}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy) -> Tensor:
        return ratio(sums["distance"], sums["mistakes"])


def mistake_severity(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    r"""Mean of $d(\hat y, y) = h(LCA)$ over the samples with $\hat y \ne y$, the end of the predicted path.

    It falls when a model adds easy near misses to its mistakes, so a worse model can score better: always print top-1
    accuracy and `average_hierarchical_distance` beside it.

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids.
        tax: the taxonomy.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [1, D]; NaN without mistakes.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range.
    """
    return MistakeSeverityCounts.evaluate(pred_paths, target, tax, ignore_index=ignore_index)


class AverageHierarchicalDistanceCounts(PathCounts):
    """The counts behind `AverageHierarchicalDistance`."""

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy, k: int) -> dict[str, Tensor]:
        distance = _distance(paths, target, tax)
        return {"distance": distance.sum(1), "total": torch.ones_like(distance).sum(1)}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy, k: int) -> Tensor:
        return ratio(sums["distance"], sums["total"])


def average_hierarchical_distance(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, k: int = 1, *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    r"""Mean over all samples of $\frac{1}{k} \sum_{j \le k} d(\hat y_j, y)$, with $d = h(LCA)$.

    Args:
        pred_paths: (B, k', D) paths ranked by score with k' >= k, see `top_k_paths`; (B, D) for k = 1.
        target: (B,) node ids.
        tax: the taxonomy.
        k: number of predictions that count.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, D]; for k = 1 equal to (1 - accuracy) times `mistake_severity`. NaN for an empty batch.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range, k out of [1, K], too few ranks.
    """
    return AverageHierarchicalDistanceCounts.evaluate(pred_paths, target, tax, k=k, ignore_index=ignore_index)


class HierarchicalPrecisionAtKCounts(PathCounts):
    """The counts behind `HierarchicalPrecisionAtK`."""

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy, k: int, over_ranks: bool) -> dict[str, Tensor]:
        scale = max(max_leaf_distance(tax), 1)
        got = (1 - _distance(paths, target, tax).double() / scale).clamp(min=0).cumsum(1)
        precision = got / _best_similarity(target, tax, k, scale)
        value = precision.mean(1) if over_ranks else precision[:, -1]
        return {"precision": value, "total": torch.ones_like(target)}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy, k: int, over_ranks: bool) -> Tensor:
        return ratio(sums["precision"], sums["total"])


def _best_similarity(target: Tensor, tax: Taxonomy, k: int, scale: int) -> Tensor:
    """Largest possible sum of similarities over 1..k different leaves, (B, k)."""
    path = tax.paths[target]
    known, node = path >= 0, path.clamp(min=0)
    # n_l leaves lie within distance h_l, so the best j leaves include min(j, n_l) of them.
    within = torch.cat([torch.full_like(path[:, :1], tax.num_leaves), torch.where(known, tax.n_leaves[node], 0)], 1)
    height = torch.cat([torch.full_like(path[:, :1], tax.root_height), torch.where(known, tax.height[node], 0)], 1)
    # The leaves below a partial label are all right.
    is_target = torch.cat([torch.zeros_like(known[:, :1]), known & (path == target[:, None])], 1)
    similarity = (1 - torch.where(is_target, 0, height).double() / scale).clamp(min=0)
    rank = torch.arange(1, k + 1, device=target.device)
    taken = torch.minimum(within[:, :, None], rank)
    taken = taken - torch.cat([taken[:, 1:], torch.zeros_like(taken[:, :1])], 1)
    return (similarity[:, :, None] * taken).sum(1)


def hierarchical_precision_at_k(
    pred_paths: Tensor,
    target: Tensor,
    tax: Taxonomy,
    k: int = 1,
    *,
    over_ranks: bool = False,
    ignore_index: int = IGNORE,
) -> Float[Tensor, ""]:
    r"""Mean of $hP@k = \sum_{j \le k} sim(\hat y_j, y) / \max \sum_{j \le k} sim$, with $sim = 1 - d / d_{max}$.

    The best k different leaves are found from the leaf counts along the path of y, without sorting.

    Args:
        pred_paths: (B, k', D) paths of different leaves ranked by score with k' >= k; (B, D) for k = 1.
        target: (B,) node ids.
        tax: the taxonomy.
        k: number of predictions that count.
        over_ranks: return $hmAP@k = \frac{1}{k} \sum_{j \le k} hP@j$ instead.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, 1]; NaN for an empty batch.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range, k out of [1, K], too few ranks.
    """
    return HierarchicalPrecisionAtKCounts.evaluate(
        pred_paths, target, tax, k=k, over_ranks=over_ranks, ignore_index=ignore_index
    )


class EdgeDistanceCounts(PathCounts):
    """The counts behind `EdgeDistance`."""

    @staticmethod
    def _samples(paths: Tensor, target: Tensor, tax: Taxonomy) -> dict[str, Tensor]:
        node = judged_node(end_of_paths(paths[:, 0]), target, tax)
        _, shared = lowest_common_ancestor(node, target, tax)
        depth = torch.where(node >= 0, tax.depth[node.clamp(min=0)], 0)
        edges = depth + tax.depth[target] - 2 * shared
        return {"edges": edges, "total": torch.ones_like(target)}

    @staticmethod
    def _value(sums: dict[str, Tensor], tax: Taxonomy) -> Tensor:
        return ratio(sums["edges"], sums["total"])


def edge_distance(
    pred_paths: Tensor, target: Tensor, tax: Taxonomy, *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    r"""Mean of $depth(\hat y) + depth(y) - 2\, depth(LCA)$, the edges between the end of the path and the target.

    Args:
        pred_paths: (B, D) padded or extended paths.
        target: (B,) node ids.
        tax: the taxonomy.
        ignore_index: the target that stands for no label; such samples are left out.

    Returns:
        A value in [0, 2 D]; NaN for an empty batch.

    Raises:
        ValueError: wrong shape or dtype, an entry out of range.
    """
    return EdgeDistanceCounts.evaluate(pred_paths, target, tax, ignore_index=ignore_index)
