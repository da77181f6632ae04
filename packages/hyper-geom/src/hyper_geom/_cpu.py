"""The pairwise and contrastive kernels in one pass on the CPU, compiled on request from `_cpu_kernels.cpp`.

Reference: the haversine form and its guarded gradient are those of `hyper_geom._pairwise`; here each row goes through
them once while it lies in the first cache, where whole-matrix operations read and write the matrix a dozen times.
"""

import ctypes
import functools
import hashlib
import sys
import warnings
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyper_geom._polar import Polar, side

_SOURCE = Path(__file__).with_name("_cpu_kernels.cpp")
# Products rounded one by one, as in the eager form; -ffast-math would drop the corrections of log1p.
_FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
# The capability is part of the library's name: torch's cache may be shared by machines with different processors.
_CAPABILITIES = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
_TINY = torch.finfo(torch.float32).tiny
# Rows of a backward's buffer: below a thousand the matrix products lose speed.
_ROWS = 1024
_POINTER = c_void_p
_SIDES = [_POINTER, c_int64, _POINTER]
_SIGNATURES = {
    "hyper_geom_dist": [_POINTER, _POINTER, *_SIDES, c_int64, c_int64, c_float, c_int32, c_int32],
    "hyper_geom_grad": [
        *[_POINTER] * 3, *_SIDES, c_int64, c_int64, c_float, c_float, c_float, _POINTER, _POINTER, c_int32
    ],
    "hyper_geom_lse": [
        _POINTER, *_SIDES, c_float, _POINTER, c_int64, c_int64, _POINTER, _POINTER, _POINTER, c_int32
    ],
    "hyper_geom_lse_grad": [
        _POINTER, *_SIDES, c_float, _POINTER, c_int64, c_int64, *[_POINTER] * 4, c_float, c_float, *[_POINTER] * 3, c_int32
    ],
    "hyper_geom_pairs": [_POINTER, _POINTER, _POINTER, c_int64, _POINTER, c_int64, c_int64, c_int32],
    "hyper_geom_pairs_grad": [_POINTER, _POINTER, _POINTER, c_int64, *[_POINTER] * 4, c_int64, c_int64, c_int32],
    "hyper_geom_tangential": [*[_POINTER] * 3, c_int64, c_int64, c_int32],
}  # fmt: skip
_library: Any = None


def build_cpu_kernels() -> bool:
    """Compile (the first time on this machine) and use the one-pass CPU kernels of `dist`, `pairwise_dist` and the loss.

    They are those of `lorentz.dist`, both models' `pairwise_dist` and the chunked `distance_info_nce`.
    They serve float32 on the CPU outside `torch.compile`; everything else keeps the eager form, whose values they match
    to rounding. The library lies in torch's extension cache and is compiled once for each kind of processor.

    Returns:
        Whether the kernels are in use; False with one warning where they cannot be compiled, and the eager form stays.
    """
    global _library
    if _library is None:
        _library = _load()
    return _library is not None


@functools.cache
def _load() -> Any:
    capability = torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256(_SOURCE.read_bytes() + repr(_FLAGS).encode()).hexdigest()[:12]
    name = f"hyper_geom_cpu_{capability.lower()}_{digest}".replace(" ", "_")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    try:
        from torch.utils.cpp_extension import load

        load(
            name,
            [str(_SOURCE)],
            extra_cflags=[*_FLAGS, *_CAPABILITIES.get(capability, []), *openmp],
            extra_ldflags=openmp,
            with_cuda=False,
            is_python_module=False,
        )
        library = ctypes.CDLL(next(path for path in torch.ops.loaded_libraries if name in path))
    except Exception as error:  # no compiler, no ninja, a read-only cache: the eager form serves
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(f"hyper_geom keeps its eager CPU form: {type(error).__name__}: {reason}", stacklevel=3)
        return None
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = None
    return library


def serves(*tensors: Tensor) -> bool:
    """Whether the compiled kernels can take these tensors: real float32 memory on the CPU, and something in it."""
    return (
        _library is not None
        and not torch.compiler.is_compiling()
        and all(
            type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
            for x in tensors
        )
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _matrices(x: Tensor) -> Tensor:
    """(*b n d) as (b n d) in one piece."""
    return x.reshape(-1, *x.shape[-2:]).contiguous()


def pairs(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """Distances (*b) of Lorentz points (*b d), c (*b); computed in double and rounded once."""
    x, y = x.contiguous(), y.contiguous()
    found, (c, step) = x.new_empty(x.shape[:-1]), _each(c)
    _library.hyper_geom_pairs(
        x.data_ptr(), y.data_ptr(), c.data_ptr(), step, found.data_ptr(), found.numel(), x.shape[-1],
        torch.get_num_threads(),
    )  # fmt: skip
    return found


def pairs_grad(x: Tensor, y: Tensor, c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and c."""
    x, y, grad, (one, step) = x.contiguous(), y.contiguous(), grad.contiguous(), _each(c)
    found = torch.empty_like(x), torch.empty_like(y), torch.empty_like(grad)
    _library.hyper_geom_pairs_grad(
        x.data_ptr(), y.data_ptr(), one.data_ptr(), step, grad.data_ptr(), *(v.data_ptr() for v in found), grad.numel(),
        x.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    return found


def _each(c: Tensor) -> tuple[Tensor, int]:
    """C's memory and the step between its entries: 0 for one number expanded."""
    return (c, 0) if not any(c.stride()) else (c.contiguous(), 1)


def dist(x: Polar, y: Polar, keep: bool, unit: float) -> tuple[Tensor, Tensor]:
    """`unit` times k times the distances (*b n m), and the product part of h, empty unless `keep`."""
    batch, (n, m) = x.vector.shape[:-2], (x.vector.shape[-2], y.vector.shape[-2])
    dot = x.vector @ y.vector.mT
    found = torch.empty_like(dot) if keep else dot
    sides = (side(x).reshape(5, -1, n), side(y).reshape(5, -1, m).movedim(1, 0).contiguous())
    step, threads = sides[0][0].numel(), torch.get_num_threads()
    sizes = n * m
    for i, y_side in enumerate(sides[1]):
        _library.hyper_geom_dist(
            dot.data_ptr() + 4 * i * sizes, found.data_ptr() + 4 * i * sizes, sides[0][0, i].data_ptr(), step,
            y_side.data_ptr(), n, m, unit, keep, threads,
        )  # fmt: skip
    return found, dot if keep else dot.new_empty((*batch, 0, 0))


def dist_grad(
    x: Polar, y: Polar, product: Tensor, grad: Tensor, noise: float, unit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x's vectors and radii, and of y's."""
    (n, m), threads = product.shape[-2:], torch.get_num_threads()
    grad_x, grad_y = torch.empty_like(x.vector, memory_format=torch.contiguous_format), torch.zeros_like(y.vector)
    grad_y = grad_y.contiguous()
    grad_r, grad_s = torch.empty_like(x.radius).contiguous(), torch.empty_like(y.radius).contiguous()
    vectors = [_matrices(v) for v in (x.vector, y.vector, grad_x, grad_y, product, grad)]
    x_sides, y_sides = (side(v).reshape(5, -1, v.radius.shape[-1]).movedim(1, 0).contiguous() for v in (x, y))
    weight = product.new_empty(min(_ROWS, n), m)
    for i, (a, b, into_a, into_b, part, given) in enumerate(zip(*vectors, strict=True)):
        x_side, y_side, row_sum = x_sides[i], y_sides[i], grad_r.view(-1, n)[i]
        columns = part.new_zeros(threads, m)
        for start in range(0, n, _ROWS):
            rows = slice(start, min(start + _ROWS, n))
            slab = weight[: rows.stop - start]
            _library.hyper_geom_grad(
                part[rows].data_ptr(), given[rows].data_ptr(), slab.data_ptr(), x_side[0, rows].data_ptr(), n,
                y_side.data_ptr(), len(slab), m, noise, _TINY, unit, row_sum[rows].data_ptr(), columns.data_ptr(), threads,
            )  # fmt: skip
            torch.mm(slab, b, out=into_a[rows])
            into_b.addmm_(slab.mT, a[rows])
        grad_s.view(-1, m)[i] = columns.sum(0)
    for points, vector, into in ((x, vectors[0], vectors[2]), (y, vectors[1], vectors[3])):
        _tangential(points, vector, into)
    return grad_x, grad_r, grad_y, grad_s


def _tangential(points: Polar, vector: Tensor, grad: Tensor) -> None:
    inverse = points.inverse_norm().contiguous()
    _library.hyper_geom_tangential(
        grad.data_ptr(), vector.data_ptr(), inverse.data_ptr(), inverse.numel(), grad.shape[-1], torch.get_num_threads()
    )


def lse(x: Polar, y: Polar, scale: Tensor, labels: Tensor, columns: bool, chunk_size: int) -> tuple[Tensor, Tensor]:
    """`hyper_geom._info_nce_chunked.lse`, the forward alone."""
    (n, m), threads = (len(x.radius), len(y.radius)), torch.get_num_threads()
    x_side, y_side, labels, factor = side(x), side(y), labels.contiguous(), scale.item()
    row_lse = x_side.new_empty(n)
    column_lse = y_side.new_full((m if columns else 0,), -torch.inf)
    logits = x_side.new_empty(min(chunk_size, n), m)
    for start in range(0, n, chunk_size):
        rows = slice(start, min(start + chunk_size, n))
        slab = logits[: rows.stop - start]
        torch.mm(x.vector[rows], y.vector.mT, out=slab)
        peak = slab.new_full((threads, m), -torch.inf) if columns else None
        total = slab.new_zeros(threads, m) if columns else None
        _library.hyper_geom_lse(
            slab.data_ptr(), x_side[0, rows].data_ptr(), n, y_side.data_ptr(), factor, labels[rows].data_ptr(),
            len(slab), m, row_lse[rows].data_ptr(), _pointer(peak), _pointer(total), threads,
        )  # fmt: skip
        if peak is not None and total is not None:
            column_lse = torch.logaddexp(column_lse, (peak + total.log()).logsumexp(0))
    return row_lse, column_lse


def lse_grad(
    x: Polar, y: Polar, scale: Tensor, labels: Tensor, lses: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor],
    chunk_size: int, noise: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x's vectors and radii, of y's, and of the scale."""
    (n, m), threads = (len(x.radius), len(y.radius)), torch.get_num_threads()
    x_side, y_side, labels, factor = side(x), side(y), labels.contiguous(), scale.item()
    a, b = x.vector.contiguous(), y.vector.contiguous()
    grad_x, grad_y = torch.empty_like(a), torch.zeros_like(b)
    grad_r, by_row, columns = x_side.new_empty(n), x_side.new_empty(n), y_side.new_zeros(threads, m)
    row_lse, column_lse = lses
    row_grad, column_grad = (grad.contiguous() for grad in grads)
    buffer = x_side.new_empty(min(chunk_size, n), m)
    for start in range(0, n, chunk_size):
        rows = slice(start, min(start + chunk_size, n))
        slab = buffer[: rows.stop - start]
        torch.mm(a[rows], b.mT, out=slab)
        _library.hyper_geom_lse_grad(
            slab.data_ptr(), x_side[0, rows].data_ptr(), n, y_side.data_ptr(), factor, labels[rows].data_ptr(),
            len(slab), m, row_lse[rows].data_ptr(), column_lse.data_ptr() if len(column_lse) else None,
            row_grad[rows].data_ptr(), column_grad.data_ptr(), noise, _TINY, grad_r[rows].data_ptr(),
            columns.data_ptr(), by_row[rows].data_ptr(), threads,
        )  # fmt: skip
        torch.mm(slab, b, out=grad_x[rows])
        grad_y.addmm_(slab.mT, a[rows])
    for points, vector, into in ((x, a, grad_x), (y, b, grad_y)):
        _tangential(points, vector, into)
    return grad_x, grad_r, grad_y, columns.sum(0), by_row.double().sum()
