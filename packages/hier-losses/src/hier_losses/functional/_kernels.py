"""Segment kernels in column layout (nodes first, samples last), where index_add runs several times faster on a CPU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Exponentials above e^-69 = 1e-30 are far from the end of single precision.
REACH = 69.0


def upcast(values: Tensor) -> Tensor:
    """Return half and bfloat16 tensors as float32: a bfloat16 log-sum-exp over 16,000 nodes loses whole terms."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def safe_logsumexp(values: Tensor, dim: int = -1) -> Tensor:
    """Log-sum-exp that gives -inf with zero gradients where every value is -inf."""
    if values.shape[dim] == 0:
        return values.sum(dim) - torch.inf
    peak = values.detach().amax(dim, keepdim=True)
    return log_above(peak.squeeze(dim), (values - finite(peak)).exp().sum(dim))


def finite(peak: Tensor) -> Tensor:
    """Replace -inf by the lowest number, so that -inf minus it is -inf and not NaN; `where` is ten times slower."""
    return peak.clamp(min=torch.finfo(peak.dtype).min)


def log_above(peak: Tensor, total: Tensor) -> Tensor:
    """Return peak + log(total) for a total scaled by the peak, which is at least 1, or 0 if there is nothing to sum."""
    # The bound lies between the two, because the gradient of a clamp at its bound is not the full one.
    return total.clamp(min=0.5).log() + peak


def safe_logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Log of the sum of two exponentials; the second derivative of torch's own is NaN where one of them is -inf."""
    return safe_logsumexp(torch.stack(torch.broadcast_tensors(a, b), -1))


def segment_max(values: Tensor, index: Int[Tensor, " rows"], initial: Tensor) -> Tensor:
    """Largest of `initial[s]` and the rows `values[i]` with `index[i] == s`."""
    return initial.scatter_reduce(0, index[:, None].expand_as(values), values, "amax")


def segment_logsumexp(
    values: Float[Tensor, "rows batch"], index: Int[Tensor, " rows"], initial: Float[Tensor, "segments batch"]
) -> Float[Tensor, "segments batch"]:
    """Log-sum-exp of `initial[s]` and the rows `values[i]` with `index[i] == s`; -inf for segments without any."""
    peak = segment_max(values.detach(), index, initial.detach())
    shift = finite(peak)
    return log_above(peak, (initial - shift).exp().index_add(0, index, (values - shift[index]).exp()))


def can_look(*tensors: Tensor) -> bool:
    """Whether code may branch on values and write in place: on a CPU, neither compiled nor under `torch.func.vmap`."""
    if torch.compiler.is_compiling() or any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    try:
        return all(not tensor.flatten()[:0].any() for tensor in tensors)
    except RuntimeError:  # vmap refuses to turn a value into a bool
        return False
