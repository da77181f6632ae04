"""Triton kernels of the fused InfoNCE: one tile of scores from vectors to log-sum-exps, or to gradient weights.

A side is a float32 array (5, num): stretch, sinh r, exp(r/2) - 1, exp(-r/2)/2 and coth r; with it the haversine form
of `hyper_geom._pairwise` needs one logarithm and three square roots an entry.
"""

from typing import no_type_check

import triton
import triton.language as tl

# no_type_check: a type-checking import hook must leave the source of a kernel alone.


@triton.jit
@no_type_check
def _side(side, index, num, part: tl.constexpr):
    return tl.load(side + part * num + index, mask=index < num, other=0.0)


# Triton swaps kernels for Python functions when its interpreter is on; they then run on CPU tensors too.
INTERPRETED = tl.constexpr(not isinstance(_side, triton.runtime.JITFunction))


@triton.jit
@no_type_check
def _dot_tile(
    x, y, rows, cols, num_rows, num_cols, dim, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    x_rows = x + rows[:, None].to(tl.int64) * dim
    y_cols = y + cols[None, :].to(tl.int64) * dim
    for start in range(0, dim, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a = tl.load(x_rows + depth[None, :], mask=(rows[:, None] < num_rows) & (depth[None, :] < dim), other=0.0)
        b = tl.load(y_cols + depth[:, None], mask=(cols[None, :] < num_cols) & (depth[:, None] < dim), other=0.0)
        if INTERPRETED:  # whose dot reads the bits of bf16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
@no_type_check
def _haversine(dot, x_side, y_side, rows, cols, num_rows, num_cols):
    """The product part of h, sinh((r-s)/2), and h."""
    product = dot * (-0.5 * _side(x_side, rows, num_rows, 0))[:, None] * _side(y_side, cols, num_cols, 0)[None, :]
    product += (0.5 * _side(x_side, rows, num_rows, 1))[:, None] * _side(y_side, cols, num_cols, 1)[None, :]
    product = tl.maximum(product, 0.0)
    half = _side(x_side, rows, num_rows, 2)[:, None] - _side(y_side, cols, num_cols, 2)[None, :]
    half *= _side(x_side, rows, num_rows, 3)[:, None] + _side(y_side, cols, num_cols, 3)[None, :]
    return product, half, half * half + product


@triton.jit
@no_type_check
def _dist(h):
    """2 asinh(sqrt h) as log1p(t), corrected for the rounding of 1 + t."""
    root = tl.sqrt(h)
    t = 2.0 * root * (root + tl.sqrt(1.0 + h))
    v = 1.0 + t
    return tl.log(v) + (t - (v - 1.0)) / v


@triton.jit
@no_type_check
def lse_kernel(
    x, x_side, y, y_side, scale, labels, row_out, col_out, num_rows, num_cols, dim, tiles_per_split,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of a block of rows against a run of column tiles: `row_out` (splits, n), `col_out` (row blocks, m)."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    label = tl.load(labels + rows, mask=rows < num_rows, other=-1)
    factor = tl.load(scale)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        cols = tile * COLS + tl.arange(0, COLS)
        dot = _dot_tile(x, y, rows, cols, num_rows, num_cols, dim, ROWS, COLS, DEPTH, PRECISION)
        _, _, h = _haversine(dot, x_side, y_side, rows, cols, num_rows, num_cols)
        keep = (rows < num_rows)[:, None] & (cols < num_cols)[None, :] & (cols[None, :] != label[:, None])
        logits = tl.where(keep, -factor * _dist(h), float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # A row without entries so far has peak -inf, and -inf - -inf would be NaN.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
        peak = higher
        if COLUMNS:
            top = tl.max(logits, 0)
            finite_top = tl.where(top == float("-inf"), 0.0, top)
            column = finite_top + tl.log(tl.sum(tl.exp(logits - finite_top[None, :]), 0))
            tl.store(col_out + block.to(tl.int64) * num_cols + cols, column, mask=cols < num_cols)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(row_out + split.to(tl.int64) * num_rows + rows, finite + tl.log(total), mask=rows < num_rows)


@triton.jit
@no_type_check
def grad_kernel(
    x, x_side, y, y_side, scale, labels, row_lse, col_lse, row_grad, col_grad, weight, row_out, col_out, scale_out,
    num_rows, num_cols, dim, noise, tiny,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `haversine_grad`: weights (n, m), and its sums for the radii and for the scale."""
    block, tile = tl.program_id(0), tl.program_id(1)
    rows, cols = block * ROWS + tl.arange(0, ROWS), tile * COLS + tl.arange(0, COLS)
    in_rows, in_cols = rows < num_rows, cols < num_cols
    dot = _dot_tile(x, y, rows, cols, num_rows, num_cols, dim, ROWS, COLS, DEPTH, PRECISION)
    product, half, h = _haversine(dot, x_side, y_side, rows, cols, num_rows, num_cols)
    dist = _dist(h)

    factor = tl.load(scale)
    label = tl.load(labels + rows, mask=in_rows, other=-1)
    keep = in_rows[:, None] & in_cols[None, :] & (cols[None, :] != label[:, None])
    row_peak = tl.load(row_lse + rows, mask=in_rows, other=0.0)
    share = tl.exp(-factor * dist - row_peak[:, None]) * tl.load(row_grad + rows, mask=in_rows, other=0.0)[:, None]
    if COLUMNS:
        col_peak = tl.load(col_lse + cols, mask=in_cols, other=0.0)
        share += tl.exp(-factor * dist - col_peak[None, :]) * tl.load(col_grad + cols, mask=in_cols, other=0.0)[None, :]
    # After the exponentials, which overflow where a row has no entry but its positive.
    share = tl.where(keep, share, 0.0)
    num_tiles = tl.num_programs(1)
    tl.store(scale_out + block * num_tiles + tile, -tl.sum(tl.sum(tl.where(keep, share * dist, 0.0), 1), 0))

    x_sinh, y_sinh = _side(x_side, rows, num_rows, 1), _side(y_side, cols, num_cols, 1)
    guarded = h + noise * x_sinh[:, None] * y_sinh[None, :]
    guarded = tl.where(guarded < tiny, tiny, guarded)
    # Two square roots: (h+F) (1+h) overflows from r = 22 on.
    slope = -factor * share / (tl.sqrt(guarded) * tl.sqrt(1.0 + h))
    angular, radial = slope * product, slope * half * tl.sqrt(1.0 + half * half)
    row_sum = tl.sum(angular, 1) * _side(x_side, rows, num_rows, 4) + tl.sum(radial, 1)
    col_sum = tl.sum(angular, 0) * _side(y_side, cols, num_cols, 4) - tl.sum(radial, 0)
    tl.store(row_out + tile.to(tl.int64) * num_rows + rows, row_sum, mask=in_rows)
    tl.store(col_out + block.to(tl.int64) * num_cols + cols, col_sum, mask=in_cols)
    slope *= (-0.5 * _side(x_side, rows, num_rows, 0))[:, None] * _side(y_side, cols, num_cols, 0)[None, :]
    place = rows[:, None].to(tl.int64) * num_cols + cols[None, :]
    tl.store(weight + place, slope.to(weight.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])
