"""Sums, maxima and log-sum-exps over subtrees, ancestors and sibling groups in O(B N) time and memory.

No (N, N) matrix is built: subtree operations sweep the levels upwards, ancestor sums sweep them downwards. The sweeps
use `index_add`, which is deterministic on a CPU always and on CUDA under `torch.use_deterministic_algorithms(True)`.
The two sums are each other's gradient. The conditional softmax over sibling groups follows Redmon and Farhadi (2017,
"YOLO9000", section 4).
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._inputs import require
from hier_losses.functional._kernels import (
    REACH,
    can_look,
    finite,
    log_above,
    segment_logsumexp,
    segment_max,
    upcast,
)


def subtree_sum(values: Num[Tensor, "*batch nodes"], tax: Tree) -> Num[Tensor, "*batch nodes"]:
    r"""Sum over descendants-or-self, $s_v = x_v + \sum_{u: parent(u) = v} s_u$.

    Args:
        values: one value per node; half precision is summed and returned in float32.
        tax: the tree.

    Returns:
        Shape (..., N).

    Raises:
        ValueError: the last dimension is not N.
    """
    tax = tax.to(values.device)
    rows = _check(values, tax).reshape(-1, tax.num_nodes)
    return _SubtreeSum.apply(rows, tax.parent, tax.level_sizes).view(values.shape)


def subtree_logsumexp(values: Float[Tensor, "*batch nodes"], tax: Tree) -> Float[Tensor, "*batch nodes"]:
    r"""Log-sum-exp over descendants-or-self, stable at each node on its own scale.

    With -inf at internal nodes (see `leaves_to_nodes`) it is the log of the leaf mass below each node; a subtree
    whose values are all -inf gives -inf and a zero gradient.

    Args:
        values: one value per node.
        tax: the tree.

    Returns:
        Shape (..., N).

    Raises:
        ValueError: the last dimension is not N.
    """
    levels, parents, shape = _columns(values, tax)
    for level in range(tax.num_levels - 1, 0, -1):
        levels[level - 1] = segment_logsumexp(levels[level], parents[level], levels[level - 1])
    return _rows(levels, shape)


def subtree_max(values: Float[Tensor, "*batch nodes"], tax: Tree) -> Float[Tensor, "*batch nodes"]:
    r"""Maximum over descendants-or-self; ties share the gradient.

    Args:
        values: one value per node.
        tax: the tree.

    Returns:
        Shape (..., N).

    Raises:
        ValueError: the last dimension is not N.
    """
    levels, parents, shape = _columns(values, tax)
    for level in range(tax.num_levels - 1, 0, -1):
        levels[level - 1] = segment_max(levels[level], parents[level], levels[level - 1])
    return _rows(levels, shape)


def ancestor_sum(values: Num[Tensor, "*batch nodes"], tax: Tree) -> Num[Tensor, "*batch nodes"]:
    r"""Sum over ancestors-or-self, $s_v = x_v + s_{parent(v)}$; turns conditional log-probabilities into joint ones.

    Args:
        values: one value per node; half precision is summed and returned in float32.
        tax: the tree.

    Returns:
        Shape (..., N).

    Raises:
        ValueError: the last dimension is not N.
    """
    tax = tax.to(values.device)
    rows = _check(values, tax).reshape(-1, tax.num_nodes)
    return _AncestorSum.apply(rows, tax.parent, tax.level_sizes).view(values.shape)


def group_logsumexp(values: Float[Tensor, "*batch nodes"], tax: Tree) -> Float[Tensor, "*batch groups"]:
    r"""Log-sum-exp over each sibling group.

    Args:
        values: one value per node.
        tax: the tree.

    Returns:
        Shape (..., N + 1): entry 0 for the top nodes, entry v + 1 for the children of node v, -inf below a leaf.

    Raises:
        ValueError: the last dimension is not N.
    """
    tax = tax.to(values.device)
    rows = _check(values, tax).reshape(-1, tax.num_nodes)
    groups = inner_logsumexp(rows, tax)
    # No group hangs below the last level.
    groups = torch.nn.functional.pad(groups, (0, tax.level_sizes[-1]), value=-torch.inf)
    return groups.view(*values.shape[:-1], tax.num_nodes + 1)


def inner_logsumexp(rows: Float[Tensor, "batch nodes"], tax: Tree) -> Float[Tensor, "batch groups"]:
    """The entries of `group_logsumexp` for the root and the nodes above the last level."""
    return _GroupLogSumExp.apply(rows, tax.parent, tax.level_sizes)


def conditional_log_softmax(logits: Float[Tensor, "*batch nodes"], tax: Tree) -> Float[Tensor, "*batch nodes"]:
    r"""Log-softmax within each sibling group, $\log P(v \mid parent(v))$.

    Args:
        logits: one logit per node.
        tax: the tree.

    Returns:
        Shape (..., N), at most 0; `ancestor_sum` of it is $\log P(v)$.

    Raises:
        ValueError: the last dimension is not N.
    """
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating, got {logits.dtype}")
    tax = tax.to(logits.device)
    return upcast(logits) - group_logsumexp(logits, tax).index_select(-1, tax.parent + 1)


def leaves_to_nodes(
    leaf_values: Float[Tensor, "*batch leaves"], tax: Tree, fill: float = 0.0
) -> Float[Tensor, "*batch nodes"]:
    r"""Place one value per leaf at its node and `fill` at internal nodes.

    Args:
        leaf_values: values in the order of `tax.leaf`.
        tax: the tree.
        fill: 0 before `subtree_sum`, -inf before `subtree_logsumexp` and `subtree_max`.

    Returns:
        Shape (..., N).

    Raises:
        ValueError: the last dimension is not K.
    """
    if not leaf_values.ndim or leaf_values.shape[-1] != tax.num_leaves:
        raise ValueError(f"leaf_values must have {tax.num_leaves} columns, got shape {tuple(leaf_values.shape)}")
    tax = tax.to(leaf_values.device)
    if tax.leaves_on_one_level:
        return torch.nn.functional.pad(leaf_values, (tax.num_nodes - tax.num_leaves, 0), value=fill)
    placed = leaf_values.index_select(-1, tax.leaf_index.clamp(min=0))
    return torch.where(tax.leaf_index >= 0, placed, fill)


def lca_depth(a: Int[Tensor, "*#batch"], b: Int[Tensor, "*#batch"], tax: Tree) -> Int[Tensor, "*batch"]:
    r"""Depth of the lowest common ancestor-or-self of two nodes.

    Args:
        a: node ids.
        b: node ids, broadcast against `a`.
        tax: the tree.

    Returns:
        Integers in [0, D]; 0 where only the virtual root is common.

    Raises:
        ValueError: a or b holds other numbers than node ids, or shapes do not broadcast.
    """
    tax = tax.to(a.device)
    _check_nodes(a, b, tax)
    return path_lca_depth(tax.paths[a], tax.paths[b])


def path_lca_depth(a: Int[Tensor, "*#batch levels"], b: Int[Tensor, "*#batch levels"]) -> Int[Tensor, "*batch"]:
    r"""Number of leading levels on which two padded paths agree, $\sum_l \prod_{j \le l} [a_j = b_j \ge 0]$.

    Counting equal entries instead would be wrong for paths whose nodes are no chain of the tree.

    Args:
        a: node ids per level, -1 where there is none.
        b: the same, broadcast against `a`.

    Returns:
        Integers in [0, D].
    """
    _check_joint(a, b)
    return ((a == b) & (a >= 0)).long().cumprod(-1).sum(-1)


def lca_height(a: Int[Tensor, "*#batch"], b: Int[Tensor, "*#batch"], tax: Tree) -> Int[Tensor, "*batch"]:
    r"""Height of the lowest common ancestor, the distance d(a, b) of mistake severity; 0 where a = b.

    Args:
        a: node ids.
        b: node ids, broadcast against `a`.
        tax: the tree.

    Returns:
        Integers in [0, D]; D where only the virtual root is common.

    Raises:
        ValueError: as `lca_depth`.
    """
    tax = tax.to(a.device)
    depth = lca_depth(a, b, tax)
    node = tax.paths[a.expand(depth.shape)].gather(-1, (depth - 1).clamp(min=0)[..., None]).squeeze(-1)
    height = torch.where(depth > 0, tax.height[node], tax.root_height)
    return torch.where(a == b, 0, height)


def _check_joint(a: Tensor, b: Tensor) -> None:
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(f"a and b must broadcast, got shapes {tuple(a.shape)} and {tuple(b.shape)}") from None


def _check_nodes(a: Tensor, b: Tensor, tax: Tree) -> None:
    for name, nodes in (("a", a), ("b", b)):
        if nodes.is_floating_point() or nodes.dtype == torch.bool:
            raise ValueError(f"{name} must hold integer node ids, got {nodes.dtype}")
        flat = nodes.flatten()
        require(
            (flat >= 0) & (flat < tax.num_nodes),
            lambda row, name=name, flat=flat: f"{name} must lie in [0, {tax.num_nodes}), got {int(flat[row])}",  # type: ignore[misc]
        )


def _check(values: Tensor, tax: Tree) -> Tensor:
    if values.ndim == 0 or values.shape[-1] != tax.num_nodes:
        raise ValueError(f"values must have {tax.num_nodes} columns, got shape {tuple(values.shape)}")
    return upcast(values)


def _columns(values: Tensor, tax: Tree) -> tuple[list[Tensor], list[Tensor], torch.Size]:
    """Split into one (C_l, rows) tensor per level, and each node's parent counted within the level above."""
    tax = tax.to(values.device)
    columns = _check(values, tax).reshape(-1, tax.num_nodes).T.contiguous()
    return list(columns.split(tax.level_sizes)), _parents(tax.parent, tax.level_sizes), values.shape


def _parents(parent: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Each node's parent, counted within the level above; -1 on the first level."""
    found, first = [], 0
    for level, above in enumerate(parent.split(sizes)):
        found.append(above - first)
        first += sizes[level - 1] if level else 0
    return found


def _rows(levels: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat(levels).T.contiguous().view(shape)


class _AncestorSum(torch.autograd.Function):
    """Sum over ancestors-or-self of (rows, N) values, without turning them into columns."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, parent: Tensor, sizes: tuple[int, ...]) -> Tensor:
        parents = _parents(parent, sizes)
        if can_look(values):
            # One buffer: fresh memory costs more here than the sums.
            found = values.clone()
            levels = list(found.split(sizes, 1))
            for level in range(1, len(sizes)):
                levels[level].add_(levels[level - 1].index_select(1, parents[level]))
            return found
        levels = list(values.split(sizes, 1))
        for level in range(1, len(sizes)):
            levels[level] = levels[level] + levels[level - 1].index_select(1, parents[level])
        return torch.cat(levels, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, parent, ctx.sizes = inputs
        ctx.save_for_backward(parent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (parent,) = ctx.saved_tensors
        return _SubtreeSum.apply(grad, parent, ctx.sizes), None, None


class _SubtreeSum(torch.autograd.Function):
    """Sum over descendants-or-self of (rows, N) values, without turning them into columns."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, parent: Tensor, sizes: tuple[int, ...]) -> Tensor:
        parents = _parents(parent, sizes)
        if can_look(values):
            found = values.clone()
            levels = list(found.split(sizes, 1))
            for level in range(len(sizes) - 1, 0, -1):
                levels[level - 1].index_add_(1, parents[level], levels[level])
            return found
        levels = list(values.split(sizes, 1))
        for level in range(len(sizes) - 1, 0, -1):
            levels[level - 1] = levels[level - 1].index_add(1, parents[level], levels[level])
        return torch.cat(levels, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, parent, ctx.sizes = inputs
        ctx.save_for_backward(parent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (parent,) = ctx.saved_tensors
        return _AncestorSum.apply(grad, parent, ctx.sizes), None, None


class _GroupLogSumExp(torch.autograd.Function):
    """Log-sum-exp of the sibling groups below the root and each node above the last level.

    On a CPU it usually takes one exp against the largest logit of each level. Where a group lies so far below it that
    its exponentials vanish, every group is shifted by its own largest logit instead.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, parent: Tensor, sizes: tuple[int, ...]) -> Tensor:
        num, group = values.shape[1] - sizes[-1] + 1, parent + 1
        if values.numel() and can_look(values):
            sums, peaks = [], []
            above = 1  # the virtual root
            for level, rank in zip(values.split(sizes, 1), _parents(parent, sizes), strict=True):
                peaks.append(finite(level.amax(1, keepdim=True)))
                each = (level - peaks[-1]).exp_()
                sums.append(each.new_zeros(len(each), above).index_add_(1, rank.clamp(min=0), each))
                above = level.shape[1]
            full = torch.zeros(num, dtype=torch.bool).index_fill_(0, group, True)
            total = torch.cat(sums, 1)
            if not full.all():
                total.masked_fill_(~full, 1.0)  # the logarithm of 0 takes ten times longer than others
            if (total > math.exp(-REACH)).all():
                for part, peak in zip(total.log_().split([1, *sizes[:-1]], 1), peaks, strict=True):
                    part.add_(peak)
                return total if full.all() else total.masked_fill_(~full, -torch.inf)
        columns = values.T.contiguous()
        peak = segment_max(columns, group, columns.new_full((num, columns.shape[1]), -torch.inf))
        total = torch.zeros_like(peak).index_add(0, group, (columns - finite(peak)[group]).exp())
        return log_above(peak, total).T.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        values, parent, _ = inputs
        ctx.save_for_backward(values, parent, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, parent, groups = ctx.saved_tensors
        shift = finite(groups).index_select(1, parent + 1)
        if not torch.is_grad_enabled() and can_look(values, grad):
            torch.sub(values, shift, out=shift)
            return shift.exp_().mul_(grad.index_select(1, parent + 1)), None, None
        return (values - shift).exp() * grad.index_select(1, parent + 1), None, None
