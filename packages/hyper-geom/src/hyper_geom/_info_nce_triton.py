"""The log-sum-exps of `_info_nce_chunked` on CUDA: scores stay in registers, gradients go through slabs of weights.

Forward is one kernel. Backward recomputes a slab of scores and turns it into weights in one kernel, then multiplies the
slab with both sides' vectors; a slab takes 32 MB, so nothing of size N x M exists.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from hyper_geom._info_nce_chunked import project_rows, slab_rows
from hyper_geom._info_nce_kernels import INTERPRETED, grad_kernel, lse_kernel
from hyper_geom._pairwise import fp32_precision, tangential
from hyper_geom._polar import Polar, side

# Tensor cores truncate after every step of 8 or 16 products, where an FMA rounds.
_NOISE = {"ieee": 3.0 * 2.0**-23, "tf32x3": 8.0 * 2.0**-23, "tf32": 2.0**-11}
_TINY = torch.finfo(torch.float32).tiny
_COLS, _DEPTH = 64, 32
# A slab of 32 MB stays in the second-level cache of a large GPU between the kernel that fills it and its two products.
_NUM_BUFFERS = 2
# Enough programs to fill a large GPU when there are few rows.
_NUM_PROGRAMS = 512


RUNS_ON_CPU = bool(INTERPRETED.value)


def lse(
    x: Polar, y: Polar, scale: Tensor, labels: Tensor, *, columns: bool, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """As `hyper_geom._info_nce_chunked.lse`, in float32; `chunk_size` is the number of rows of a backward slab."""
    if chunk_size is None:
        chunk_size = slab_rows(y.radius, _NUM_BUFFERS)
    return _lse(*x, *y, scale, labels, columns, chunk_size)


@torch.library.custom_op("hyper_geom::info_nce_lse", mutates_args=())
def _lse(
    x: Tensor, r: Tensor, x_sinh: Tensor, x_stretch: Tensor, y: Tensor, s: Tensor, y_sinh: Tensor, y_stretch: Tensor,
    scale: Tensor, labels: Tensor, columns: bool, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (num_rows, dim), num_cols = x.shape, y.shape[0]
    block = _block_rows(num_rows)
    num_blocks, num_tiles = triton.cdiv(num_rows, block), triton.cdiv(num_cols, _COLS)
    per_split = triton.cdiv(num_tiles, min(num_tiles, triton.cdiv(_NUM_PROGRAMS, num_blocks)))
    num_splits = triton.cdiv(num_tiles, per_split)
    row_parts = r.new_empty(num_splits, num_rows)
    col_parts = r.new_empty((num_blocks, num_cols) if columns else (1, 0))
    x_side, y_side = side(Polar(x, r, x_sinh, x_stretch)), side(Polar(y, s, y_sinh, y_stretch))
    lse_kernel[(num_blocks, num_splits)](
        x.contiguous(), x_side, y.contiguous(), y_side, scale, labels.contiguous(), row_parts, col_parts,
        num_rows, num_cols, dim, per_split,
        COLUMNS=columns, ROWS=block, COLS=_COLS, DEPTH=_DEPTH, PRECISION=_precision(x), num_warps=8,
    )  # fmt: skip
    return row_parts.logsumexp(0), col_parts.logsumexp(0)


@_lse.register_fake
def _lse_fake(x: Tensor, r: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    s, columns = args[3], args[8]
    return torch.empty_like(r), s.new_empty(s.shape if columns else (0,))


@torch.library.custom_op("hyper_geom::info_nce_lse_grad", mutates_args=())
def _lse_grad(
    x: Tensor, r: Tensor, x_sinh: Tensor, x_stretch: Tensor, y: Tensor, s: Tensor, y_sinh: Tensor, y_stretch: Tensor,
    scale: Tensor, labels: Tensor, row_lse: Tensor, col_lse: Tensor, row_grad: Tensor, col_grad: Tensor,
    columns: bool, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, y = x.contiguous(), y.contiguous()
    px, py = Polar(x, r, x_sinh, x_stretch), Polar(y, s, y_sinh, y_stretch)
    precision, dim, num_cols = _precision(x), x.shape[1], y.shape[0]
    num_tiles = triton.cdiv(num_cols, _COLS)
    y_side = side(py)
    grad_x, grad_y = torch.empty_like(x), y.new_zeros(y.shape, dtype=torch.float32)
    grad_r, grad_s = torch.empty_like(r), torch.zeros_like(s)
    grad_scale = torch.zeros_like(scale, dtype=torch.float64)
    # One slab is reused, in the inputs' dtype so that its products with them run on tensor cores.
    slab = x.new_empty(min(chunk_size, x.shape[0]), num_cols)
    for start in range(0, x.shape[0], chunk_size):
        rows = slice(start, min(start + chunk_size, x.shape[0]))
        num_rows = rows.stop - rows.start
        block = _block_rows(num_rows)
        num_blocks = triton.cdiv(num_rows, block)
        weight = slab[:num_rows]
        row_parts, col_parts = r.new_empty(num_tiles, num_rows), r.new_empty(num_blocks, num_cols)
        scale_parts = r.new_empty(num_blocks, num_tiles)
        part = px.rows(rows.start, rows.stop)
        grad_kernel[(num_blocks, num_tiles)](
            part.vector, side(part), y, y_side, scale, labels[rows].contiguous(), row_lse[rows], col_lse,
            row_grad[rows].contiguous(), col_grad.contiguous(), weight, row_parts, col_parts, scale_parts,
            num_rows, num_cols, dim, _NOISE[precision], _TINY,
            COLUMNS=columns, ROWS=block, COLS=_COLS, DEPTH=_DEPTH, PRECISION=precision, num_warps=8,
        )  # fmt: skip
        grad_r[rows], grad_s = row_parts.sum(0), grad_s + col_parts.sum(0)
        grad_scale += scale_parts.sum(dtype=torch.float64)
        grad_x[rows] = tangential(part, _matmul(weight, y))
        if weight.dtype == torch.float32:
            grad_y.addmm_(weight.mT, part.vector)
        else:
            grad_y += _matmul(weight.mT, part.vector)
    project_rows(py, grad_y)
    return grad_x, grad_r, grad_y.to(y.dtype), grad_s, grad_scale.to(scale.dtype)


@_lse_grad.register_fake
def _lse_grad_fake(x: Tensor, r: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, s, scale = args[2], args[3], args[6]
    return x.new_empty(x.shape), torch.empty_like(r), y.new_empty(y.shape), torch.empty_like(s), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.columns, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, row_grad: Tensor, col_grad: Tensor) -> tuple[Tensor | None, ...]:
    # Backward may be called under autocast, where the products would run in half precision.
    with torch.autocast(row_grad.device.type, enabled=False):
        grads = _lse_grad(*ctx.saved_tensors, row_grad, col_grad, ctx.columns, ctx.chunk_size)
    grad_x, grad_r, grad_y, grad_s, grad_scale = grads
    return grad_x, grad_r, None, None, grad_y, grad_s, None, None, grad_scale, None, None, None


_lse.register_autograd(_backward, setup_context=_setup_context)


def _block_rows(num_rows: int) -> int:
    # A tensor-core tile has at least 16 rows.
    return min(128, max(16, triton.next_power_of_2(num_rows)))


def _precision(x: Tensor) -> str:
    """How float32 tiles are multiplied; three TF32 products give full precision at a third of the TF32 rate."""
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "ieee"
    return "tf32" if x.dtype == torch.float32 and fp32_precision("cuda") == "tf32" else "tf32x3"


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product in float32, from bf16 without a float32 copy where this PyTorch can."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and torch.__version__ >= (2, 8):  # type: ignore[operator]
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
