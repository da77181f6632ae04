r"""InfoNCE on hyperbolic distances, with backends that never hold the N x M score matrix.

References: van den Oord et al., "Representation learning with contrastive predictive coding", 2018, eq. 4; Radford et
al., "Learning transferable visual models from natural language supervision", 2021 (both directions); Desai et al.,
"Hyperbolic image-text representations", ICML 2023, section 3.2 (minus the Lorentz distance as the logit).
"""

import functools
import importlib.util
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hyper_geom import _gather, _info_nce_chunked, lorentz, poincare
from hyper_geom import _numerics as nm
from hyper_geom._pairwise import polar_dist
from hyper_geom._polar import POLAR, max_radius

_BACKENDS = ("auto", "eager", "chunked", "triton")
_MODELS = {"lorentz": lorentz, "poincare": poincare}
_INPUTS = ("points", "tangent0")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def distance_info_nce(
    x: Tensor,
    y: Tensor,
    *,
    c: float | Tensor = 1.0,
    logit_scale: float | Tensor,
    labels: Tensor | None = None,
    symmetric: bool = True,
    model: str = "lorentz",
    inputs: str = "points",
    chunk_size: int | None = None,
    backend: str = "auto",
    group: Any = None,
) -> Float[Tensor, ""]:
    r"""Contrastive loss whose logits are minus the scaled distances.

    l_ij = -logit_scale dist(x_i, y_j); rows: mean_i [log sum_j exp(l_ij) - l_i,labels(i)]; columns: the same down each
    column, for its own positive. The result is the rows' term, or the mean of both if `symmetric`.

    Every backend takes the positives' distances from the elementwise `dist`, because the matrix product that gives all
    the others cannot resolve the very pairs that training pulls together.

    Args:
        x: points `(n d)`, or tangent vectors at the origin.
        y: points `(m d)`, or tangent vectors at the origin.
        c: curvature parameter.
        logit_scale: factor on the distances (an inverse temperature), > 0.
        labels: int64 `(n)`, the row of y that is the positive of each row of x; 0..n-1 by default. With `group` they
            index this rank's own y.
        symmetric: average both directions; labels must then be a permutation.
        model: "lorentz" or "poincare".
        inputs: "points", or "tangent0" for v standing for exp_map0(v), which is then never formed.
        chunk_size: rows scored at a time by the backends "chunked" and "triton"; by default what 64 MB hold.
        backend: "eager" holds the score matrix; "chunked" and "triton" (CUDA) do not and compute it twice; "auto" takes
            triton on CUDA where it is installed, else eager for matrices up to 64 MB, else chunked.
        group: processes whose rows are negatives too. Each rank scores its own rows and columns, and the mean of the
            ranks' losses is the loss of one process that holds all rows in rank order.

    Returns:
        The loss, a scalar >= 0 in fp64 if any input is fp64, else fp32; 0 for an empty batch.

    Raises:
        ValueError: a shape, an option, a label, or a Python number is out of range; unequal row counts across ranks.
        TypeError: x or y is not floating.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(distance_info_nce(x, y, logit_scale=1.0).item(), 5)
    1.10248
    """
    for name, value, choices in (
        ("model", model, _MODELS),
        ("inputs", inputs, _INPUTS),
        ("backend", backend, _BACKENDS),
    ):
        nm.check_choice(name, value, choices)
    _check_pair(x, y)
    tensors = {"x": x, "y": y} | {n: t for n, t in (("c", c), ("logit_scale", logit_scale)) if isinstance(t, Tensor)}
    dtype = nm.compute_dtype(tensors)
    c = nm.curvature_tensor(c, dtype, x.device)
    logit_scale = _scale_tensor(logit_scale, dtype, x.device)
    labels = _check_labels(labels, x, y, symmetric)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if backend == "triton":
        _check_triton(x, dtype)
    if backend == "eager" and chunk_size is not None:
        warnings.warn("chunk_size has no effect with backend='eager'", stacklevel=2)

    options = {"c": c, "scale": logit_scale, "dtype": dtype, "model": model, "inputs": inputs}
    options |= {"backend": backend, "chunk_size": chunk_size}
    with nm.full_precision(x.device):
        if group is None:
            return _loss(x, y, labels, symmetric=symmetric, **options)
        _gather.check_equal_shapes(x, y, group)
        rank = dist.get_rank(group)
        every_y = _gather.gather_rows(y, group)
        rows = _loss(x, every_y, labels + rank * y.shape[0], symmetric=False, **options)
        if not symmetric:
            return rows
        # This rank's columns are the rows of the transposed problem.
        every_x = _gather.gather_rows(x, group)
        return (rows + _loss(y, every_x, labels.argsort() + rank * x.shape[0], symmetric=False, **options)) / 2


def _loss(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    *,
    symmetric: bool,
    c: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    model: str,
    inputs: str,
    backend: str,
    chunk_size: int | None,
) -> Tensor:
    if x.shape[0] == 0:
        return (x.sum() + y.sum()).to(dtype) * 0.0
    if backend == "auto":
        backend = _choose_backend(x, y, dtype, chunk_size)
    k = c.sqrt()
    # The Triton kernel multiplies bf16 vectors as they are: their products are exact in fp32.
    raw = backend == "triton" and x.dtype == y.dtype == torch.bfloat16
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    px, py = (POLAR[model, inputs](v, k) for v in ((x, y) if raw else (wide_x, wide_y)))
    positive_dist = functools.partial(_elementwise_dist, model, inputs)
    if backend == "eager":
        positive = -scale * positive_dist(wide_x, wide_y[labels], c)
        return _eager_loss(-(scale / k) * polar_dist(px, py), positive, labels, symmetric)
    positive = -scale * _info_nce_chunked.positive_dist(positive_dist, wide_x, wide_y, c, labels)
    row_lse, column_lse = _lse_backend(backend)(px, py, scale / k, labels, columns=symmetric, chunk_size=chunk_size)
    loss = (torch.logaddexp(row_lse, positive) - positive).mean()
    if symmetric:
        loss = (loss + (torch.logaddexp(column_lse[labels], positive) - positive).mean()) / 2
    return loss


def _eager_loss(logits: Tensor, positive: Tensor, labels: Tensor, symmetric: bool) -> Tensor:
    logits = logits.scatter(1, labels.unsqueeze(1), positive.unsqueeze(1))
    loss = F.cross_entropy(logits, labels)
    return (loss + F.cross_entropy(logits.mT, labels.argsort())) / 2 if symmetric else loss


def _elementwise_dist(model: str, inputs: str, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    geometry = _MODELS[model]
    if inputs == "points":
        return geometry.dist(x, y, c=c)
    limit = max_radius(model, x.dtype)
    x, y = (geometry.clip_tangent0(v, limit, c=c) for v in (x, y))
    return geometry.tangent0_dist(x, y, c=c)


def _choose_backend(x: Tensor, y: Tensor, dtype: torch.dtype, chunk_size: int | None) -> str:
    if x.is_cuda and _HAS_TRITON and dtype == torch.float32:
        return "triton"
    num_bytes = x.shape[0] * y.shape[0] * (8 if dtype == torch.float64 else 4)
    return "eager" if chunk_size is None and num_bytes <= _info_nce_chunked.SLAB_BYTES else "chunked"


def _lse_backend(backend: str):
    if backend == "chunked":
        return _info_nce_chunked.lse
    # Imported on use: triton is large, and not everywhere.
    from hyper_geom import _info_nce_triton

    return _info_nce_triton.lse


def _check_triton(x: Tensor, dtype: torch.dtype) -> None:
    if not _HAS_TRITON:
        raise ValueError("backend must be 'auto', 'eager' or 'chunked' where triton is not installed, got 'triton'")
    from hyper_geom import _info_nce_triton

    if not (x.is_cuda or _info_nce_triton.RUNS_ON_CPU):
        raise ValueError(f"backend 'triton' needs x on a CUDA device, got {x.device}")
    if dtype != torch.float32:
        raise ValueError(f"backend 'triton' computes in float32 and takes no {dtype} input")


def _check_pair(x: Tensor, y: Tensor) -> None:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.ndim != 2:
            raise ValueError(f"{name} must have shape (num, dim), got {tuple(value.shape)}")
    nm.check_vectors({"x": x, "y": y}, matrices=True)


def _scale_tensor(logit_scale: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(logit_scale, Tensor):
        return torch.full((), nm.check_positive("logit_scale", logit_scale), dtype=dtype, device=device)
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must have one element, got shape {tuple(logit_scale.shape)}")
    return logit_scale.reshape(()).to(dtype)


def _check_labels(labels: Tensor | None, x: Tensor, y: Tensor, symmetric: bool) -> Tensor:
    num, num_targets = x.shape[0], y.shape[0]
    if symmetric and num != num_targets:
        raise ValueError(f"symmetric=True needs as many rows of x as of y, got {num} and {num_targets}")
    if labels is None:
        if num > num_targets:
            raise ValueError(f"labels are needed where x has more rows than y, got {num} and {num_targets}")
        return torch.arange(num, device=x.device)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be an int64 tensor, got {labels.dtype}")
    if labels.shape != (num,):
        raise ValueError(f"labels must have shape ({num},), got {tuple(labels.shape)}")
    if labels.device != x.device:
        raise ValueError(f"all tensors must be on one device, got labels on {labels.device}, x on {x.device}")
    # Values are read on CPU only, where that costs no synchronisation, and not while a graph is traced.
    if labels.device.type == "cpu" and num > 0 and not torch.compiler.is_compiling():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= num_targets:
            raise ValueError(f"labels must lie in 0..{num_targets - 1}, got {low}..{high}")
        if symmetric and labels.unique().numel() != num:
            raise ValueError("labels must be a permutation where symmetric=True, got a repeated value")
    return labels


class DistanceInfoNCE(nn.Module):
    """`distance_info_nce` with its options fixed; c and logit_scale stay with the model that learns them.

    Args:
        symmetric: average both directions.
        model: "lorentz" or "poincare".
        inputs: "points" or "tangent0".
        chunk_size: rows scored at a time by the backends "chunked" and "triton".
        backend: "auto", "eager", "chunked" or "triton".
        group: processes whose rows are negatives too.

    Raises:
        ValueError: model, inputs or backend is unknown.

    >>> loss = DistanceInfoNCE(inputs="tangent0")
    >>> round(loss(torch.eye(3), torch.eye(3), logit_scale=10.0).item(), 6)
    0.0
    """

    def __init__(
        self,
        *,
        symmetric: bool = True,
        model: str = "lorentz",
        inputs: str = "points",
        chunk_size: int | None = None,
        backend: str = "auto",
        group: Any = None,
    ) -> None:
        super().__init__()
        self.symmetric, self.chunk_size, self.group = symmetric, chunk_size, group
        self.model = nm.check_choice("model", model, _MODELS)
        self.inputs = nm.check_choice("inputs", inputs, _INPUTS)
        self.backend = nm.check_choice("backend", backend, _BACKENDS)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        c: float | Tensor = 1.0,
        logit_scale: float | Tensor,
        labels: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of one batch; arguments as in `distance_info_nce`."""
        return distance_info_nce(
            x,
            y,
            c=c,
            logit_scale=logit_scale,
            labels=labels,
            symmetric=self.symmetric,
            model=self.model,
            inputs=self.inputs,
            chunk_size=self.chunk_size,
            backend=self.backend,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """The options."""
        names = ("symmetric", "model", "inputs", "chunk_size", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
