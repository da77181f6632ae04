"""Input checks, the options that every loss has, and the reductions.

Checks that read tensor values cannot run while `torch.compile` traces: there a target that is no node gives NaN. On
CUDA they become device-side assertions: a synchronisation per step would cost more than the loss.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._kernels import upcast
from hier_losses.graph import LabelGraph

Reduction = Literal["mean", "sum", "none"]
Levels = Literal["ragged", "extended"]
LevelReduction = Literal["sum", "mean"]
PerLevel = float | Sequence[float] | Tensor
Target = Tensor | Sequence[str]

IGNORE = -100
"""The target that stands for no label unless told otherwise, as in `torch.nn.functional.cross_entropy`."""


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_reduction(reduction: str) -> None:
    """Raise a ValueError unless `reduction` is known."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))


def check_taxonomy(tax: object, or_graph: bool = False) -> None:
    """Raise a TypeError unless `tax` is a taxonomy, or a label graph where one is allowed."""
    if not isinstance(tax, (Tree, LabelGraph) if or_graph else Tree):
        allowed = "a Taxonomy or a LabelGraph" if or_graph else "a Taxonomy"
        raise TypeError(f"tax must be {allowed}, got {type(tax).__name__}")


def check_finite(name: str, value: float) -> None:
    """Raise a ValueError for a setting that is not finite."""
    if not abs(value) < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")


def check_scores(name: str, values: Tensor, width: int) -> Tensor:
    """Check for a floating (B, width, ...) tensor and return it as (samples, width) in at least float32."""
    if not isinstance(values, Tensor):
        hint = "; cat_levels of the taxonomy joins one tensor per level" if isinstance(values, (list, tuple)) else ""
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}{hint}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {values.dtype}")
    if values.ndim < 2 or values.shape[1] != width:
        raise ValueError(f"{name} must have shape (batch, {width}), got {tuple(values.shape)}")
    values = upcast(values)
    return values if values.ndim == 2 else values.movedim(1, -1).reshape(-1, width)


def check_matrix(name: str, values: Tensor, width: int) -> Tensor:
    """Check for a floating (B, width) tensor and return it in at least float32."""
    if isinstance(values, Tensor) and values.is_floating_point() and values.ndim != 2:
        raise ValueError(f"{name} must have shape (batch, {width}), got {tuple(values.shape)}")
    return check_scores(name, values, width)


def check_target(
    target: Target,
    shape: int | Sequence[int],
    tax: Tree | LabelGraph,
    leaf_only: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    """Check for integer node ids of a shape, of leaves if `leaf_only`, and return them as flat int64.

    Entries equal to `ignore_index` pass and stay as they are.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    target = as_numbers("target", target, tax.num_nodes, tax)
    if target.shape != shape:
        hint = ""
        if target.ndim == 2 and len(shape) == 1 and isinstance(tax, Tree) and target.shape[1] <= tax.num_levels:
            hint = "; node_ids of the taxonomy turns one label per level into node ids"
        raise ValueError(f"target must have shape {shape}, one node id per sample, got {tuple(target.shape)}{hint}")
    target = target.long().flatten()
    if torch.compiler.is_compiling():
        return target
    free = target == ignore_index if ignore_index is not None else torch.zeros_like(target, dtype=torch.bool)
    inside = (target >= 0) & (target < tax.num_nodes)
    require(inside | free, lambda row: f"target must lie in [0, {tax.num_nodes}), got {int(target[row])} at row {row}")
    if leaf_only:
        assert isinstance(tax, Tree)  # only losses on leaf logits ask for it
        require(
            (tax.leaf_index[torch.where(inside, target, 0)] >= 0) | free,
            lambda row: (
                f"target must be a leaf for a loss on leaf logits, got internal node {int(target[row])} "
                f"({tax.names[int(target[row])]!r}) at row {row}"
            ),
        )
    return target


def as_numbers(name: str, target: Target, limit: int, tax: Tree | LabelGraph) -> Tensor:
    """Return integer numbers as they are, and class names as node ids."""
    if isinstance(target, (list, tuple)) and target and all(isinstance(item, str) for item in target):
        return torch.tensor([tax.index(item) for item in target], device=tax.device)
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"{name} must hold integer node ids in [0, {limit}), got dtype {target.dtype}")
    return target


def require(holds: Tensor, message: Callable[[int], str]) -> None:
    """Raise ValueError(message(row)) for the first row that does not hold; on CUDA an assertion without a sync."""
    if torch.compiler.is_compiling() or holds.is_meta:
        return
    if holds.is_cuda:
        torch._assert_async(holds.all(), "an input value is out of its allowed range; run on the CPU for its row")
    elif not holds.all():
        raise ValueError(message(int((~holds).nonzero()[0, 0])))


class Samples(NamedTuple):
    """A batch as the losses read it: one row per sample, whatever the shape of the input.

    Attributes:
        logits: (S, width) at least float32.
        target: (S,) int64 node ids; some leaf where there is no label.
        tax: the tree or graph, on the device of the logits.
        kept: (S,) bool, whether there is a label.
        weight: (S,) weight of each sample, or None for ones.
        shape: the shape that "none" returns.
        class_weights: (N,) or None.
    """

    logits: Tensor
    target: Tensor
    tax: Any
    kept: Tensor
    weight: Tensor | None
    shape: torch.Size
    class_weights: Tensor | None

    def by_class(self) -> "Samples":
        """Weigh each sample by the class of its target, for losses without a term per level."""
        if self.class_weights is None:
            return self
        weight = self.class_weights[self.target]
        return self._replace(weight=weight if self.weight is None else self.weight * weight)

    def reduce(self, loss: Tensor, reduction: str) -> Tensor:
        """Reduce a (S,) loss; the mean over no label is 0 and keeps the graph."""
        if self.weight is not None:
            loss = loss * self.weight
        loss = torch.where(self.kept, loss, 0.0)
        if reduction == "none":
            return loss.view(self.shape)
        if reduction == "sum":
            return loss.sum()
        if self.weight is None:
            return loss.sum() / self.kept.sum().clamp(min=1)
        mass = torch.where(self.kept, self.weight, 0.0).sum()
        return loss.sum() / torch.where(mass > 0, mass, 1.0)


def read_samples(
    name: str,
    logits: Tensor,
    target: Target | None,
    tax: Any,
    *,
    leaf_only: bool = False,
    ignore_index: int = IGNORE,
    classes: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Samples:
    """Check and flatten the inputs of a loss; without target every sample counts."""
    rows = check_scores(name, logits, tax.num_leaves if leaf_only else tax.num_nodes)
    tax = tax.to(rows.device)
    shape = torch.Size((logits.shape[0], *logits.shape[2:]))
    if target is None:
        node, kept = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device), None
    else:
        if classes is not None:
            target = _class_nodes(target, classes, tax, ignore_index)
        node = check_target(target, shape, tax, leaf_only, ignore_index).to(rows.device)
        kept = node != ignore_index
    weight = None
    if sample_weight is not None:
        if sample_weight.shape != shape:
            raise ValueError(f"sample_weight must have shape {tuple(shape)}, got {tuple(sample_weight.shape)}")
        weight = sample_weight.to(rows).flatten()
        require(weight >= 0, lambda row: f"sample_weight must be at least 0, got {float(sample_weight.flatten()[row])}")
    if class_weights is not None:
        class_weights = check_class_weights(class_weights, rows, tax.num_nodes)
    if kept is None:
        kept = torch.ones_like(node, dtype=torch.bool)
    else:
        if torch.compiler.is_compiling():
            # Negative ids would wrap and train on a wrong class; no error can be raised from a compiled graph.
            sound = (node >= 0) & (node < tax.num_nodes)
            if leaf_only:
                sound = sound & (tax.leaf_index[torch.where(sound, node, 0)] >= 0)
            rows = rows * torch.where(sound | ~kept, 1.0, torch.nan).to(rows.dtype)[:, None]
            node = torch.where(sound & kept, node, _any_leaf(tax))
        else:
            node = torch.where(kept, node, _any_leaf(tax))
    return Samples(rows, node, tax, kept, weight, shape, class_weights)


Loss = TypeVar("Loss", bound=Callable[..., Any])


def over_mixtures(function: Loss) -> Loss:
    """Let a loss take (B, N, ...) shares of target nodes: it is then the mean over targets drawn from them.

    Only shares above 0 cost anything: two per sample for mixup or CutMix.
    """

    @functools.wraps(function)
    def wrapped(logits: Tensor, target: Any, *args: Any, **options: Any) -> Any:
        if not (isinstance(target, Tensor) and target.is_floating_point() and target.ndim >= 2):
            return function(logits, target, *args, **options)
        return _mixture(function, logits, target, *args, **options)

    return wrapped  # type: ignore[return-value]


def _mixture(function: Callable[..., Any], logits: Tensor, shares: Tensor, tax: Any, **options: Any) -> Any:
    widths = tax.num_nodes, logits.shape[1] if logits.ndim > 1 else 0
    shape = (logits.shape[0], *logits.shape[2:])
    if (
        shares.shape[1] not in widths
        or (shares.shape[0], *shares.shape[2:]) != shape
        or options.get("classes") is not None
    ):
        raise ValueError(
            f"target must hold integer node ids of shape {shape}, or shares of shape "
            f"{(shape[0], widths[0], *shape[1:])} without classes, got {shares.dtype} {tuple(shares.shape)}"
        )
    reduction = options.pop("reduction", "mean")
    check_reduction(reduction)
    probs = check_scores("target", shares, shares.shape[1])
    total = probs.sum(1)
    # A row without any share has no label.
    sound = (probs >= 0).all(1) & (((total - 1).abs() < 1e-3) | (total == 0))
    require(sound, lambda row: f"target row {row} must hold shares of at least 0 that sum to 1, or to 0 for no label")
    row, node = probs.nonzero(as_tuple=True)
    weight = probs[row, node]
    if shares.shape[1] != tax.num_nodes:
        node = tax.leaf.to(node.device)[node]
    given = options.pop("sample_weight", None)
    if given is not None:
        weight = weight * given.flatten()[row]
    rows = check_scores("logits", logits, logits.shape[1])[row]
    if reduction != "none":
        return function(rows, node, tax, sample_weight=weight, reduction=reduction, **options)
    found = function(rows, node, tax, sample_weight=weight, reduction="none", **options)

    def gathered(loss: Tensor) -> Tensor:
        return loss.new_zeros(len(probs)).index_add(0, row, loss).view(shape)

    return {name: gathered(part) for name, part in found.items()} if isinstance(found, dict) else gathered(found)


def _any_leaf(tax: Tree | LabelGraph) -> Tensor | int:
    return tax.leaf[0] if isinstance(tax, Tree) else 0


def _class_nodes(target: Target, classes: Tensor, tax: Tree | LabelGraph, ignore_index: int) -> Tensor:
    """Turn class numbers into node ids; what is ignored stays."""
    target = as_numbers("target", target, len(classes), tax)
    node = check_target(classes, classes.shape, tax).to(target.device)
    target = target.long()
    inside = (target >= 0) & (target < len(node))
    require(
        (inside | (target == ignore_index)).flatten(),
        lambda row: f"target must lie in [0, {len(node)}), one of the classes, got {int(target.flatten()[row])}",
    )
    # Compiled, a number outside becomes -1 - N, which is neither a node nor ignored.
    wrong = torch.where(target == ignore_index, target, -1 - tax.num_nodes)
    return torch.where(inside, node[torch.where(inside, target, 0)], wrong)


def check_class_weights(weights: Tensor, like: Tensor, num_nodes: int, name: str = "class_weights") -> Tensor:
    """Return (N,) weights in the dtype and on the device of the logits."""
    weights = weights.to(like)
    if weights.shape != (num_nodes,):
        raise ValueError(f"{name} must have shape ({num_nodes},), got {tuple(weights.shape)}")
    require(weights >= 0, lambda row: f"{name} must be at least 0, got {float(weights[row])} for node {row}")
    return weights


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
