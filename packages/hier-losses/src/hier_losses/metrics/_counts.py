"""What scores need besides torchmetrics: checks of inputs, the reading of partial labels, and counts sample by sample.

Partial labels: a target at an internal node says nothing about the levels below it. Levels below it are masked, and a
prediction that reaches further down is judged at the depth of the target.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from hier_losses.functional._inputs import IGNORE, check_choice, check_target, require
from hier_losses.functional.tree_ops import path_lca_depth
from hier_losses.path_ops import extend_paths, paths_of
from hier_losses.taxonomy import Taxonomy

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class PathCounts:
    """Two pure functions that make a score of predicted paths against target nodes.

    `_samples` counts each sample of a batch, `_value` turns their sums into the result. `PathMetric` adds the sums up over batches and
    processes, the function of a score (`evaluate`) takes those of one batch, and `path_scores` hands out the counts themselves.
    """

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
