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

from hyper_geom import _gather, _info_nce_chunked
from hyper_geom import _info_nce_general as general
from hyper_geom import _numerics as nm
from hyper_geom._pairwise import polar_dist
from hyper_geom._polar import POLAR

_BACKENDS = ("auto", "eager", "chunked", "triton")
_MODELS = general.MODELS
_INPUTS = ("points", "tangent0")
_QUERIES = ("max", "mean")
_REDUCTIONS = ("mean", "none")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def distance_info_nce(
    x: Tensor,
    y: Tensor,
    *,
    c: float | Tensor = 1.0,
    logit_scale: float | Tensor,
    labels: Tensor | None = None,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    negatives: Tensor | None = None,
    queries: str = "max",
    symmetric: bool = True,
    reduction: str = "mean",
    model: str = "lorentz",
    inputs: str = "points",
    chunk_size: int | None = None,
    backend: str = "auto",
    group: Any = None,
) -> Float[Tensor, "..."]:
    r"""Contrastive loss whose logits are minus the scaled distances.

    l_ij = -logit_scale dist(x_i, y_j); rows: -sum_j T_ij log softmax_j(l_ij) with targets T that sum to 1, one positive
    by default; columns: the same down each column. The result is the rows' term, or the mean of both if `symmetric`.

    Every backend takes the positives' distances from the elementwise `dist`, because the matrix product that gives all
    the others cannot resolve the very pairs that training pulls together.

    Args:
        x: points `(n d)`, or tangent vectors at the origin; `(n q d)` for rows of several queries, and with a leading
            dimension `k` for a product of k spaces, whose distance is sqrt(sum_k d_k^2).
        y: points `(m d)`, or tangent vectors at the origin; `(k m d)` for a product.
        c: curvature parameter; `(k)` for a product.
        logit_scale: factor on the distances (an inverse temperature), > 0.
        labels: int64 `(n)` or `(n p)`, the rows of y that are positives of each row of x, -1 for none; 0..n-1 by default.
            With `group` they index this rank's own y.
        targets: weights >= 0 or booleans `(n m)`, normalised along rows and columns; E_ij = 1 at the labels by default.
        mask: True `(n m)` where y_j may be a negative of x_i; positives stay.
        label_smoothing: share of each target that is spread over all that is kept, in [0, 1).
        weights: `(n)` >= 0, of the rows in the mean.
        negatives: further rows of y's kind `(q d)`, against which only rows are scored, such as a queue.
        queries: "max" takes each row's most similar query, "mean" the mean distance of its queries.
        symmetric: average both directions; the (first) labels must then be a permutation.
        reduction: "mean", or "none" for `(n)`: each row's loss, averaged with that of its positive's column.
        model: "lorentz" or "poincare".
        inputs: "points", or "tangent0" for v standing for exp_map0(v), which is then never formed.
        chunk_size: rows scored at a time by the backends "chunked" and "triton"; by default what 64 MB hold.
        backend: "eager" holds the score matrix; "chunked" and "triton" (CUDA) do not and compute it twice; "auto" takes
            triton on CUDA where it is installed, else eager for matrices up to 64 MB, else chunked. Triton knows one
            positive a row and the mean alone.
        group: processes whose rows are negatives too. Each rank scores its own rows and columns, and the mean of the
            ranks' losses is the loss of one process that holds all rows in rank order. `targets` and `mask` then have a
            column for every rank's y, and `symmetric` must be False where anything but `labels` `(n)` is given.

    Returns:
        The loss, >= 0, in fp64 if any input is fp64, else fp32; 0 for an empty batch. Rows without a positive do not
        count. No gradient goes to `targets` and `weights`.

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
        ("queries", queries, _QUERIES),
        ("reduction", reduction, _REDUCTIONS),
    ):
        nm.check_choice(name, value, choices)
    x, y, c, logit_scale, dtype = _prepared(x, y, c, logit_scale)
    factors = c.ndim
    if negatives is not None:
        _check_negatives(negatives, y)
    labels = _check_labels(labels, x, y, factors, symmetric)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if backend == "triton":
        _check_triton(x, dtype)
    if backend == "eager" and chunk_size is not None:
        warnings.warn("chunk_size has no effect with backend='eager'", stacklevel=2)
    extras = {"targets": targets, "mask": mask, "weights": weights, "negatives": negatives}
    extended = factors or x.ndim > 2 or labels.ndim == 2 or reduction == "none" or label_smoothing != 0
    if extended or any(value is not None for value in extras.values()):
        if backend == "triton":
            raise ValueError("backend 'triton' takes x (n d), labels (n) and no further option")
        settings = (model, inputs, queries, label_smoothing, symmetric, reduction, backend, chunk_size, group)
        with nm.full_precision(x.device):
            return _general_loss(x.to(dtype), y.to(dtype), c, logit_scale, labels, extras, *settings)

    options: dict[str, Any] = {"c": c, "scale": logit_scale, "dtype": dtype, "model": model, "inputs": inputs}
    options.update(backend=backend, chunk_size=chunk_size)
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


def distance_logits(
    x: Tensor,
    y: Tensor,
    *,
    c: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    labels: Tensor | None = None,
    queries: str = "max",
    model: str = "lorentz",
    inputs: str = "points",
) -> Float[Tensor, "n m"]:
    """The logits of `distance_info_nce`, for losses that need the matrix itself.

    -logit_scale dist(x_i, y_j)

    Args:
        x: as in `distance_info_nce`.
        y: as in `distance_info_nce`.
        c: as in `distance_info_nce`.
        logit_scale: as in `distance_info_nce`.
        labels: int64 `(n)` or `(n p)`: entries to take from the elementwise `dist`, -1 for none; none by default.
        queries: as in `distance_info_nce`.
        model: as in `distance_info_nce`.
        inputs: as in `distance_info_nce`.

    Returns:
        Logits `(n m)`, at most 0.

    Raises:
        ValueError: a shape, an option or a Python number is out of range.
        TypeError: x or y is not floating.

    >>> distance_logits(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    tensor([[-0.0000, -0.8814]])
    """
    for name, value, choices in (
        ("model", model, _MODELS),
        ("inputs", inputs, _INPUTS),
        ("queries", queries, _QUERIES),
    ):
        nm.check_choice(name, value, choices)
    x, y, c, logit_scale, dtype = _prepared(x, y, c, logit_scale)
    if labels is not None:
        labels = _check_labels(labels, x, y, c.ndim, False)
        labels = labels if labels.ndim == 2 else labels.unsqueeze(1)
    setting = general.Setting(model, inputs, queries, 0.0, 0)
    with nm.full_precision(x.device):
        return -logit_scale * general.distances(x.to(dtype), y.to(dtype), c, labels, setting)


def info_nce(
    logits: Float[Tensor, "n m"],
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy of each row of any logits with one or several positives; one direction of `distance_info_nce`.

    -sum_j T_ij log softmax_j(l_ij), T = (1-s) E/rowsum(E) + s/kept

    Args:
        logits: scores `(n m)`.
        targets: E, weights >= 0 or booleans `(n m)`.
        mask: True where an entry may be a negative; positives stay.
        label_smoothing: s in [0, 1).
        weights: `(n)` >= 0, of the rows in the mean.
        reduction: "mean" or "none".

    Returns:
        A scalar, or `(n)`; 0 for an empty batch. Rows without a positive do not count.

    Raises:
        ValueError: a shape or an option is out of range.

    >>> info_nce(torch.zeros(2, 4), torch.eye(2, 4))
    tensor(1.3863)
    """
    nm.check_choice("reduction", reduction, _REDUCTIONS)
    _check_general(logits.shape, targets, mask, label_smoothing, weights)
    raw = targets.detach().to(logits.dtype)
    total, keep = raw.sum(1, keepdim=True), general.keep_positives(mask, raw)
    if keep is not None:
        logits = logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
    losses = general.cross_entropy(logits, general.normalised(raw, total, keep, label_smoothing, 1), 1)
    return _reduced(losses, total.squeeze(1) > 0, weights, reduction)


def _prepared(
    x: Tensor, y: Tensor, c: float | Tensor, logit_scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    factors = isinstance(c, Tensor) and c.ndim == 1 and c.numel() > 1
    _check_pair(x, y, int(factors))
    scales = {n: t for n, t in (("c", c), ("logit_scale", logit_scale)) if isinstance(t, Tensor)}
    tensors = {"x": x, "y": y, **scales}
    dtype = nm.compute_dtype(tensors)
    c = nm.curvature_tensor(c, dtype, x.device, leading=x.shape[:1] if factors else ())
    return x, y, c, _scale_tensor(logit_scale, dtype, x.device), dtype


def _general_loss(
    x: Tensor, y: Tensor, c: Tensor, scale: Tensor, labels: Tensor, extras: dict[str, Tensor | None],
    model: str, inputs: str, queries: str, label_smoothing: float, symmetric: bool, reduction: str,
    backend: str, chunk_size: int | None, group: Any,
) -> Tensor:  # fmt: skip
    targets, mask, weights, negatives = extras.values()
    labels = labels if labels.ndim == 2 else labels.unsqueeze(1)
    num_columns = y.shape[-2]
    if group is not None:
        if symmetric:
            raise ValueError(
                "symmetric must be False with `group` and options beyond labels (n): call once a direction"
            )
        labels = torch.where(labels < 0, labels, labels + dist.get_rank(group) * num_columns)
        y = _gather.gather_rows(y.transpose(0, -2), group).transpose(0, -2)
        num_columns = y.shape[-2]
    _check_general((labels.shape[0], num_columns), targets, mask, label_smoothing, weights)
    if negatives is not None:
        y = torch.cat([y, negatives.to(y.dtype)], dim=-2)
    if labels.shape[0] == 0:
        return (x.sum() + y.sum()) * 0.0 if reduction == "mean" else x.sum(dim=tuple(range(1, x.ndim)))
    chunk = general.slab_rows(x, y, c) if chunk_size is None else chunk_size
    setting = general.Setting(model, inputs, queries, label_smoothing, num_columns if symmetric else 0)
    targets = None if targets is None else targets.detach()
    small = chunk_size is None and chunk * general._NUM_BUFFERS >= labels.shape[0]
    # A graph cannot hold the autograd inside the slabs' backward.
    eager = backend == "eager" or torch.compiler.is_compiling() or (backend == "auto" and small)
    losses = (general.whole if eager else general.in_slabs)(x, y, c, scale, labels, targets, mask, setting, chunk)
    rows, columns = losses
    positive = labels[:, 0] >= 0 if targets is None else (targets > 0).any(1)
    if symmetric:
        rows = (rows + columns[labels[:, 0]]) / 2
    return _reduced(rows, positive, weights, reduction)


def _reduced(losses: Tensor, positive: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return losses if weights is None else losses * weights.detach()
    weight = positive.to(losses.dtype) if weights is None else positive * weights.detach().to(losses.dtype)
    return nm.safe_div((losses * weight).sum(), weight.sum())


def _check_general(
    shape: tuple, targets: Tensor | None, mask: Tensor | None, smoothing: float, weights: Tensor | None
) -> None:
    num, num_columns = shape
    for name, value in (("targets", targets), ("mask", mask)):
        if value is not None and value.shape != (num, num_columns):
            raise ValueError(f"{name} must have shape ({num}, {num_columns}), got {tuple(value.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    if weights is not None and weights.shape != (num,):
        raise ValueError(f"weights must have shape ({num},), got {tuple(weights.shape)}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {smoothing}")


def _check_negatives(negatives: Tensor, y: Tensor) -> None:
    if negatives.ndim != y.ndim or negatives.shape[-1] != y.shape[-1] or negatives.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"negatives must be of y's kind {tuple(y.shape)}, got shape {tuple(negatives.shape)}")


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
    positive_dist = functools.partial(general.elementwise_dist, model, inputs)
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


def _check_pair(x: Tensor, y: Tensor, factors: int) -> None:
    for name, value, most in (("x", x, 3), ("y", y, 2)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if not 2 <= value.ndim - factors <= most:
            raise ValueError(f"{name} must have shape (num, dim), got {tuple(value.shape)}")
    if x.shape[-1] != y.shape[-1] or x.shape[-1] == 0 or x.shape[:factors] != y.shape[:factors]:
        raise ValueError(f"the last dimension must be equal and at least 1, got x {tuple(x.shape)}, y {tuple(y.shape)}")


def _scale_tensor(logit_scale: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(logit_scale, Tensor):
        return torch.full((), nm.check_positive("logit_scale", logit_scale), dtype=dtype, device=device)
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must have one element, got shape {tuple(logit_scale.shape)}")
    return logit_scale.reshape(()).to(dtype)


def _check_labels(labels: Tensor | None, x: Tensor, y: Tensor, rows: int, symmetric: bool) -> Tensor:
    num, num_targets, device = x.shape[rows], y.shape[rows], x.device
    if symmetric and num != num_targets:
        raise ValueError(f"symmetric=True needs as many rows of x as of y, got {num} and {num_targets}")
    if labels is None:
        if num > num_targets:
            raise ValueError(f"labels are needed where x has more rows than y, got {num} and {num_targets}")
        return torch.arange(num, device=device)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be an int64 tensor, got {labels.dtype}")
    if labels.ndim not in (1, 2) or labels.shape[0] != num or labels.numel() < num:
        raise ValueError(f"labels must have shape ({num},) or ({num}, p), got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"all tensors must be on one device, got labels on {labels.device}, x on {device}")
    # Values are read on CPU only, where that costs no synchronisation, and not while a graph is traced.
    if labels.device.type == "cpu" and num > 0:
        if not nm.known((labels >= -1) & (labels < num_targets), unread=True):
            low, high = (int(value) for value in labels.aminmax())
            raise ValueError(f"labels must lie in 0..{num_targets - 1}, or be -1 for none, got {low}..{high}")
        first = labels if labels.ndim == 1 else labels[:, 0]
        if symmetric and not nm.known(first.sort().values == torch.arange(num, device=device), unread=True):
            raise ValueError("labels must be a permutation where symmetric=True, got a repeated value")
        if labels.ndim == 1 and not nm.known(labels >= 0, unread=True):
            return labels.unsqueeze(1)
    return labels


class DistanceInfoNCE(nn.Module):
    """`distance_info_nce` with its options fixed; c and logit_scale stay with the model that learns them.

    Args:
        symmetric: average both directions.
        label_smoothing: share of each target that is spread.
        queries: "max" or "mean" over the queries of a row.
        reduction: "mean" or "none".
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
        label_smoothing: float = 0.0,
        queries: str = "max",
        reduction: str = "mean",
        model: str = "lorentz",
        inputs: str = "points",
        chunk_size: int | None = None,
        backend: str = "auto",
        group: Any = None,
    ) -> None:
        super().__init__()
        self.symmetric, self.chunk_size, self.group = symmetric, chunk_size, group
        self.label_smoothing = label_smoothing
        self.queries = nm.check_choice("queries", queries, _QUERIES)
        self.reduction = nm.check_choice("reduction", reduction, _REDUCTIONS)
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
        **extras: Tensor | None,
    ) -> Float[Tensor, "..."]:
        """The loss of one batch; arguments, `targets`, `mask`, `weights` and `negatives` too, as in `distance_info_nce`."""
        return distance_info_nce(
            x,
            y,
            c=c,
            logit_scale=logit_scale,
            labels=labels,
            **extras,
            label_smoothing=self.label_smoothing,
            queries=self.queries,
            reduction=self.reduction,
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
