"""Row and column log-sum-exps of -scale * distance in slabs of rows, so that no N x M matrix is ever held.

Forward keeps the running sums, backward computes every slab again (the recomputation of Chen et al., "Training deep nets
with sublinear memory cost", 2016, applied to the score matrix).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyper_geom._once import once_differentiable
from hyper_geom._pairwise import (
    dist_from_haversine,
    half_difference,
    haversine_grad,
    haversine_product,
    tangential,
)
from hyper_geom._polar import Polar

SLAB_BYTES = 64 * 2**20
# Elements at a time (4 MB) where an elementwise step would hold several copies of a whole side.
_BLOCK = 2**20
# The backward of a slab holds six buffers of its size.
_NUM_BUFFERS = 6


def lse(
    x: Polar, y: Polar, scale: Tensor, labels: Tensor, *, columns: bool, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of -scale * k dist over each row and each column, without the entries (i, labels[i]).

    Returns:
        Rows `(n)`, and columns `(m)` or, if not wanted, `(0)`; -inf where nothing is left to sum.
    """
    if chunk_size is None:
        chunk_size = slab_rows(y.radius, _NUM_BUFFERS)
    return _ChunkedLSE.apply(*x, *y, scale, labels, columns, chunk_size)


def slab_rows(columns: Tensor, num_buffers: int) -> int:
    """Rows of a slab whose buffers together take 64 MB."""
    return max(1, SLAB_BYTES // (num_buffers * columns.element_size() * max(1, columns.numel())))


class _ChunkedLSE(torch.autograd.Function):
    """Saves the inputs and the n + m results."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, y, (scale, labels, columns, chunk_size) = Polar(*args[:4]), Polar(*args[4:8]), args[8:]
        row_lse = torch.empty_like(x.radius)
        column_lse = torch.full_like(y.radius if columns else y.radius[:0], -torch.inf)
        for start in range(0, len(row_lse), chunk_size):
            stop = min(start + chunk_size, len(row_lse))
            slab = x.rows(start, stop)
            dist = _dist(slab, y, haversine_product(slab, y))
            logits = dist.mul_(-scale).scatter_(1, labels[start:stop, None], -torch.inf)
            row_lse[start:stop] = logits.logsumexp(1)
            if columns:
                column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
        ctx.save_for_backward(*args[:10], row_lse, column_lse)
        ctx.columns, ctx.chunk_size = columns, chunk_size
        return row_lse, column_lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_row: Tensor, grad_column: Tensor) -> tuple[Tensor | None, ...]:
        *parts, scale, labels, row_lse, column_lse = ctx.saved_tensors
        x, y = Polar(*parts[:4]), Polar(*parts[4:])
        grad_x, grad_y = torch.empty_like(x.vector), torch.zeros_like(y.vector)
        grad_r, grad_s = torch.empty_like(x.radius), torch.zeros_like(y.radius)
        grad_scale = torch.zeros_like(scale, dtype=torch.float64)
        # Backward may be called under autocast, where the products would run in half precision.
        with torch.autocast(grad_row.device.type, enabled=False):
            for start in range(0, len(row_lse), ctx.chunk_size):
                rows = slice(start, min(start + ctx.chunk_size, len(row_lse)))
                slab = x.rows(rows.start, rows.stop)
                product = haversine_product(slab, y)
                dist = _dist(slab, y, product)
                logits = dist * -scale
                share = (logits - row_lse[rows, None]).exp_().mul_(grad_row[rows, None])
                if ctx.columns:
                    share.add_(logits.sub_(column_lse).exp_().mul_(grad_column))
                # After the exponentials: a row or column of positives alone has -inf - -inf there.
                share.scatter_(1, labels[rows, None], 0.0)
                del logits
                grad_scale -= dist.mul_(share).sum().double()
                del dist
                weight, grad_r[rows], column_sum = haversine_grad(slab, y, product, share.mul_(-scale))
                grad_x[rows] = tangential(slab, weight @ y.vector)
                grad_y.addmm_(weight.mT, slab.vector)
                grad_s += column_sum
            project_rows(y, grad_y)
        none = (None, None)
        return grad_x, grad_r, *none, grad_y, grad_s, *none, grad_scale.to(scale.dtype), None, *none


def _block_rows(x: Tensor) -> int:
    return max(1, _BLOCK // x.shape[1])


def project_rows(x: Polar, grad: Tensor) -> None:
    """`tangential` in place, a block of rows at a time."""
    size = _block_rows(grad)
    for start in range(0, len(grad), size):
        rows = slice(start, min(start + size, len(grad)))
        grad[rows] = tangential(x.rows(rows.start, rows.stop), grad[rows])


def positive_dist(
    dist: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, y: Tensor, c: Tensor, labels: Tensor
) -> Tensor:
    """dist(x, y[labels], c) without what autograd would keep of it, some ten copies of x."""
    if torch.compiler.is_compiling():  # which cannot trace autograd inside a backward
        return dist(x, y[labels], c)
    return _PositiveDist.apply(dist, x, y, c, labels)


class _PositiveDist(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dist: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, y: Tensor, c: Tensor, labels: Tensor
    ) -> Tensor:
        ctx.dist = dist
        ctx.save_for_backward(x, y, c, labels)
        blocks = zip(x.split(_block_rows(x)), labels.split(_block_rows(x)), strict=True)
        return torch.cat([dist(block, y[targets], c) for block, targets in blocks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, c, labels = ctx.saved_tensors
        grad_x, grad_y, grad_c = torch.empty_like(x), torch.zeros_like(y), torch.zeros_like(c)
        for start in range(0, len(x), _block_rows(x)):
            rows = slice(start, start + _block_rows(x))
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                leaves = [v.detach().requires_grad_() for v in (x[rows], y[labels[rows]], c)]
                part = torch.autograd.grad(ctx.dist(*leaves), leaves, grad[rows])
            grad_x[rows] = part[0]
            grad_y.index_add_(0, labels[rows], part[1])
            grad_c += part[2]
        return None, grad_x, grad_y, grad_c, None


def _dist(x: Polar, y: Polar, product: Tensor) -> Tensor:
    return dist_from_haversine(half_difference(x.radius, y.radius).square_().add_(product))
