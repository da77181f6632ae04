"""Input checks and reductions shared by the losses.

Checks that read tensor values are skipped while `torch.compile` traces. On CUDA they become device-side assertions:
a synchronisation per step would cost more than the loss.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._kernels import upcast
from hier_losses.graph import LabelGraph

Reduction = Literal["mean", "sum", "none"]
Levels = Literal["ragged", "extended"]
LevelReduction = Literal["sum", "mean"]
PerLevel = float | Sequence[float] | Tensor


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_taxonomy(tax: object, or_graph: bool = False) -> None:
    """Raise a TypeError unless `tax` is a taxonomy, or a label graph where one is allowed."""
    if not isinstance(tax, (Tree, LabelGraph) if or_graph else Tree):
        allowed = "a Taxonomy or a LabelGraph" if or_graph else "a Taxonomy"
        raise TypeError(f"tax must be {allowed}, got {type(tax).__name__}")


def check_matrix(name: str, values: Tensor, width: int) -> Tensor:
    """Check for a floating (B, width) tensor and return it in at least float32."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {values.dtype}")
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(f"{name} must have shape (batch, {width}), got {tuple(values.shape)}")
    return upcast(values)


def check_target(target: Tensor, batch: int, tax: Tree | LabelGraph, leaf_only: bool = False) -> Tensor:
    """Check for (B,) integer node ids, of leaves if `leaf_only`, and return them as int64."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integer node ids in [0, {tax.num_nodes}), got dtype {target.dtype}")
    if target.shape != (batch,):
        raise ValueError(f"target must have shape ({batch},), one node id per sample, got {tuple(target.shape)}")
    target = target.long()
    if torch.compiler.is_compiling():
        return target
    inside = (target >= 0) & (target < tax.num_nodes)
    require(inside, lambda row: f"target must lie in [0, {tax.num_nodes}), got {int(target[row])} at row {row}")
    if leaf_only:
        assert isinstance(tax, Tree)  # only losses on leaf logits ask for it
        require(
            tax.leaf_index[target] >= 0,
            lambda row: (
                f"target must be a leaf for a loss on leaf logits, got internal node {int(target[row])} "
                f"({tax.names[int(target[row])]!r}) at row {row}"
            ),
        )
    return target


def require(holds: Tensor, message) -> None:
    """Raise ValueError(message(row)) for the first row that does not hold; on CUDA an assertion without a sync."""
    if torch.compiler.is_compiling() or holds.is_meta:
        return
    if holds.is_cuda:
        torch._assert_async(holds.all(), "an input value is out of its allowed range; run on the CPU for its row")
    elif not holds.all():
        raise ValueError(message(int((~holds).nonzero()[0, 0])))


def per_level(name: str, value: PerLevel, like: Tensor, num_levels: int, below: float | None = None) -> Tensor:
    """Return a float, a sequence or a (D,) tensor as a (D,) tensor with entries in [0, below)."""
    levels = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if levels.ndim == 0:
        levels = levels.expand(num_levels)
    if levels.shape != (num_levels,):
        raise ValueError(
            f"{name} must be a number or have one entry per level ({num_levels}), got {tuple(levels.shape)}"
        )
    limit = torch.inf if below is None else below
    text = f"{name} must lie in [0, {'inf' if below is None else below})"
    require((levels >= 0) & (levels < limit), lambda row: f"{text}, got {float(levels[row])}")
    return levels


def over_levels(terms: Tensor, valid: Tensor, weights: PerLevel | None, reduction: str) -> Tensor:
    """Weighted sum or weighted mean over the valid levels, (B, D) -> (B,)."""
    if weights is None:
        share = valid.to(terms.dtype)
    else:
        share = valid * per_level("level_weights", weights, terms, terms.shape[1])
    total = torch.where(valid, terms * share, 0.0).sum(1)
    if reduction == "sum":
        return total
    mass = share.sum(1)
    return total / torch.where(mass > 0, mass, 1.0)


def reduce_batch(loss: Tensor, reduction: str) -> Tensor:
    """Reduce a (B,) loss; the mean of an empty batch is 0 and keeps the graph."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / max(loss.shape[0], 1)


def check_reduction(reduction: str) -> None:
    """Raise a ValueError unless `reduction` is known."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
