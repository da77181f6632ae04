"""Concatenation of every rank's embeddings, with a gradient.

The gradient of a rank's slice is the sum over ranks of their gradients for it, so averaging parameter gradients over
ranks, as DistributedDataParallel does, gives the gradient of the mean of the ranks' losses.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hyper_geom._once import once_differentiable


def gather_rows(x: Tensor, group: Any) -> Tensor:
    """Rows of all ranks in rank order, (world * n, d); every rank must hold the same shape."""
    return _GatherRows.apply(x, group)


def check_equal_shapes(x: Tensor, y: Tensor, group: Any) -> None:
    """Raise ValueError, on every rank, unless all ranks hold as many rows of x and of y."""
    mine = torch.tensor([x.shape[0], y.shape[0]], device=x.device)
    shapes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, mine, group=group)
    counts = [tuple(shape.tolist()) for shape in shapes]
    if len(set(counts)) > 1:
        raise ValueError(f"x and y must have the same number of rows on every rank, got (n, m) = {counts}")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.num_rows = group, x.shape[0]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # all_reduce and slice, not reduce_scatter, which not every backend has.
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.num_rows
        return total[start : start + ctx.num_rows], None
