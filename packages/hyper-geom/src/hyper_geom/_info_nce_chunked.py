"""Row and column log-sum-exps of -scale * distance in slabs of rows, so that no N x M matrix is ever held.

Forward keeps the running sums, backward computes every slab again (the recomputation of Chen et al., "Training deep nets
with sublinear memory cost", 2016, applied to the score matrix).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyper_geom import _cpu
from hyper_geom._kernel import make_kernel
from hyper_geom._pairwise import (
    dist_from_haversine,
    half_difference,
    haversine_grad,
    haversine_product,
    matmul_noise,
    polar_dist,
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
    return _chunked_lse(*x, *y, scale, labels, columns, chunk_size)


def slab_rows(columns: Tensor, num_buffers: int) -> Any:
    """Rows of a slab whose buffers together take 64 MB, as an int; a tensor while torch.jit.trace counts in tensors."""
    return max(1, SLAB_BYTES // (num_buffers * columns.element_size() * max(1, columns.numel())))


def _lse_forward(*args: Any) -> tuple[Tensor, Tensor]:
    x, y, (scale, labels, columns, chunk_size) = Polar(*args[:4]), Polar(*args[4:8]), args[8:]
    if _cpu.serves(*args[:9]):
        return _cpu.lse(x, y, scale, labels, columns, chunk_size)
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
    return row_lse, column_lse


def _lse_backward(inputs: list, outputs: tuple, grads: tuple) -> tuple[Tensor | None, ...]:
    (*parts, scale, labels, columns, chunk_size), (row_lse, column_lse), (grad_row, grad_column) = (
        inputs,
        outputs,
        grads,
    )
    x, y = Polar(*parts[:4]), Polar(*parts[4:])
    none = (None, None)
    if _cpu.serves(*parts, scale):
        held = (row_lse, column_lse), (grad_row, grad_column)
        found = _cpu.lse_grad(x, y, scale, labels, *held, chunk_size, matmul_noise(scale))
        return *found[:2], *none, *found[2:4], *none, found[4].to(scale.dtype), None, *none
    grad_x, grad_y = torch.empty_like(x.vector), torch.zeros_like(y.vector)
    grad_r, grad_s = torch.empty_like(x.radius), torch.zeros_like(y.radius)
    grad_scale = torch.zeros_like(scale, dtype=torch.float64)
    for start in range(0, len(row_lse), chunk_size):
        rows = slice(start, min(start + chunk_size, len(row_lse)))
        slab = x.rows(rows.start, rows.stop)
        product = haversine_product(slab, y)
        dist = _dist(slab, y, product)
        logits = dist * -scale
        share = (logits - row_lse[rows, None]).exp_().mul_(grad_row[rows, None])
        if columns:
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
    return grad_x, grad_r, *none, grad_y, grad_s, *none, grad_scale.to(scale.dtype), None, *none


def _lse_plain(*args: Any) -> tuple[Tensor, Tensor]:
    """On the whole matrix. A row of its positive alone sums to a stand-in for log 0 that has a derivative."""
    x, y, (scale, labels, columns, _) = Polar(*args[:4]), Polar(*args[4:8]), args[8:]
    logits = (-scale * polar_dist(x, y)).scatter(1, labels.unsqueeze(1), torch.finfo(x.radius.dtype).min)
    return logits.logsumexp(1), logits.logsumexp(0) if columns else y.radius[:0]


# Saves the inputs and the n + m results.
_chunked_lse = make_kernel(_lse_plain, _lse_forward, _lse_backward, saved=(0, 1), batched=False)


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
    return _positive_dist(dist, x, y, c, labels)


def _positive_forward(dist: Callable, x: Tensor, y: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    blocks = zip(x.split(_block_rows(x)), labels.split(_block_rows(x)), strict=True)
    return torch.cat([dist(block, y[targets], c) for block, targets in blocks])


def _positive_backward(inputs: list, outputs: tuple, grads: tuple) -> tuple[Tensor | None, ...]:
    (dist, x, y, c, labels), (grad,) = inputs, grads
    grad_x, grad_y, grad_c = torch.empty_like(x), torch.zeros_like(y), torch.zeros_like(c)
    for start in range(0, len(x), _block_rows(x)):
        rows = slice(start, start + _block_rows(x))
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in (x[rows], y[labels[rows]], c)]
            part = torch.autograd.grad(dist(*leaves), leaves, grad[rows])
        grad_x[rows] = part[0]
        grad_y.index_add_(0, labels[rows], part[1])
        grad_c += part[2]
    return None, grad_x, grad_y, grad_c, None


def _positive_plain(dist: Callable, x: Tensor, y: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    return dist(x, y[labels], c)


_positive_dist = make_kernel(_positive_plain, _positive_forward, _positive_backward, batched=False)


def _dist(x: Polar, y: Polar, product: Tensor) -> Tensor:
    return dist_from_haversine(half_difference(x.radius, y.radius).square_().add_(product))
