"""InfoNCE with several positives, masks, soft targets, queries and factors, whole or in slabs of rows.

References: Khosla et al., "Supervised contrastive learning", NeurIPS 2020, eq. 2 (several positives, the sum outside the
logarithm); Gu et al., "Learning mixed-curvature representations in products of model spaces", ICLR 2019 (the product
metric sqrt(sum_k d_k^2)).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom import lorentz, poincare
from hyper_geom._info_nce_chunked import SLAB_BYTES
from hyper_geom._kernel import make_kernel
from hyper_geom._pairwise import polar_dist
from hyper_geom._polar import POLAR, max_radius

MODELS = {"lorentz": lorentz, "poincare": poincare}
# A slab's logits, their share of softmax, both targets, and what autograd keeps of the distance.
_NUM_BUFFERS = 12


class Setting(NamedTuple):
    """What does not vary over rows."""

    model: str
    inputs: str
    queries: str | None  # "max" or "mean" over the queries of a row of x
    smoothing: float
    columns: int  # how many columns are classified too: 0, or all but the extra negatives


def elementwise_dist(model: str, inputs: str, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """Distance of each x to its y, points or tangent vectors."""
    geometry = MODELS[model]
    if inputs == "points":
        return geometry.dist(x, y, c=c)
    limit = max_radius(model, x.dtype)
    x, y = (geometry.clip_tangent0(v, limit, c=c) for v in (x, y))
    return geometry.tangent0_dist(x, y, c=c)


def distances(x: Tensor, y: Tensor, c: Tensor, labels: Tensor | None, setting: Setting) -> Tensor:
    """Distances (n m) of rows (*k n *q d) to columns (*k m d), those of positives (n p) from the elementwise `dist`."""
    factors = c.ndim == 1
    lead, rest = (x.shape[:1], x.shape[1:]) if factors else (x.shape[:0], x.shape)
    num, dim = rest[0], rest[-1]
    num_queries = rest[1] if len(rest) == 3 else 1
    x = x.reshape(*lead, num, num_queries, dim)
    k = c.sqrt().unsqueeze(-1)
    polar = POLAR[setting.model, setting.inputs]
    found = polar_dist(polar(x.flatten(-3, -2), k), polar(y, k)) / k.unsqueeze(-1)
    found = found.unflatten(-2, (num, num_queries))  # (*k n q m)
    if labels is not None and found.numel():
        index = torch.where(labels < 0, labels[:, :1], labels).clamp(min=0)
        curvature = c[:, None, None, None] if factors else c
        partner = y[..., index, :].unsqueeze(-3)
        exact = elementwise_dist(setting.model, setting.inputs, x.unsqueeze(-2), partner, curvature)
        index = index.unsqueeze(1).expand(exact.shape[-3:]).expand(exact.shape)
        # A filler repeats its row's first positive without a gradient of its own; a row of fillers keeps what it has.
        filler = (labels < 0).unsqueeze(1)
        exact = torch.where(filler, torch.where(filler[..., :1], found.gather(-1, index), exact.detach()), exact)
        found = found.scatter(-1, index, exact)
    if factors:
        found = nm.safe_sqrt(found.square().sum(0))
    return found.amin(1) if setting.queries != "mean" else found.mean(1)


def raw_targets(labels: Tensor, targets: Tensor | None, num_columns: Any, dtype: torch.dtype) -> Tensor:
    """E (n m): 1 for each label, or the given weights, 0 for extra negatives. torch.jit.trace counts columns in tensors."""
    if targets is not None:
        return torch.nn.functional.pad(targets.to(dtype), (0, num_columns - targets.shape[1]))
    found = torch.zeros(labels.shape[0], num_columns + 1, dtype=dtype, device=labels.device)
    return found.scatter(1, torch.where(labels < 0, num_columns, labels), 1.0)[:, :num_columns]


def normalised(raw: Tensor, total: Tensor, keep: Tensor | None, smoothing: float, dim: int) -> Tensor:
    """(1-s) E/sum(E) + s/count over kept entries; all 0 where nothing is positive."""
    found = nm.safe_div(raw, total)
    if smoothing:
        even = (
            1 / max(1, raw.shape[dim])
            if keep is None
            else keep.to(raw.dtype) / keep.sum(dim, keepdim=True).clamp(min=1)
        )
        found = torch.where(total > 0, (1 - smoothing) * found + smoothing * even, 0.0)
    return found


def keep_positives(mask: Tensor | None, raw: Tensor) -> Tensor | None:
    """The mask with extra negatives and all positives kept."""
    if mask is None:
        return None
    return torch.nn.functional.pad(mask, (0, raw.shape[1] - mask.shape[1]), value=True) | (raw > 0)


def cross_entropy(logits: Tensor, target: Tensor, dim: int) -> Tensor:
    """-sum T log softmax along a dimension; entries of -inf count as absent."""
    shares = logits.log_softmax(dim)
    return -torch.where(target > 0, target * torch.where(target > 0, shares, 0.0), 0.0).sum(dim)


def _plain(
    x: Tensor, y: Tensor, c: Tensor, scale: Tensor, labels: Tensor, targets: Tensor | None, mask: Tensor | None,
    setting: Setting, chunk_size: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses of the rows (n) and of the columns (m), on the whole matrix."""
    logits = -scale * distances(x, y, c, labels, setting)
    raw = raw_targets(labels, targets, y.shape[-2], logits.dtype)
    keep = keep_positives(mask, raw)
    if keep is not None:
        logits = logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
    rows = cross_entropy(logits, normalised(raw, raw.sum(1, keepdim=True), keep, setting.smoothing, 1), 1)
    m = setting.columns
    if not m:
        return rows, rows.new_zeros(0)
    raw, keep = raw[:, :m], None if keep is None else keep[:, :m]
    target = normalised(raw, raw.sum(0, keepdim=True), keep, setting.smoothing, 0)
    return rows, cross_entropy(logits[:, :m], target, 0)


whole = _plain


def _slabs(num: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, num)) for start in range(0, num, chunk_size)]


def _slab_targets(args: tuple, rows: slice, totals: tuple) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows' targets, the columns' targets and the kept entries of one slab."""
    _, y, c, _, labels, targets, mask, setting, _ = args
    raw = raw_targets(labels[rows], None if targets is None else targets[rows], y.shape[-2], c.dtype)
    keep = keep_positives(None if mask is None else mask[rows], raw)
    row = normalised(raw, raw.sum(1, keepdim=True), keep, setting.smoothing, 1)
    total, count = totals
    found = nm.safe_div(raw[:, : setting.columns], total)
    if setting.smoothing and setting.columns:
        even = (1.0 if keep is None else keep[:, : setting.columns].to(raw.dtype)) / count
        found = torch.where(total > 0, (1 - setting.smoothing) * found + setting.smoothing * even, 0.0)
    return row, found, keep


def _totals(args: tuple) -> tuple[Tensor, Tensor]:
    """Sum of E and number of kept entries in each column."""
    x, y, c, _, labels, targets, mask, setting, chunk_size = args
    total = torch.zeros(setting.columns, dtype=c.dtype, device=x.device)
    count = torch.zeros_like(total)
    for rows in _slabs(labels.shape[0], chunk_size):
        raw = raw_targets(labels[rows], None if targets is None else targets[rows], y.shape[-2], c.dtype)
        keep = keep_positives(None if mask is None else mask[rows], raw)
        total += raw[:, : setting.columns].sum(0)
        count += (torch.ones_like(raw) if keep is None else keep)[:, : setting.columns].sum(0)
    return total, count.clamp(min=1)


def _rows(x: Tensor, rows: slice, c: Tensor) -> Tensor:
    return x[:, rows] if c.ndim == 1 else x[rows]


def _forward(*args):
    x, y, c, scale, labels, _, _, setting, chunk_size = args
    totals = _totals(args)
    row_loss, row_lse = (torch.empty(labels.shape[0], dtype=c.dtype, device=x.device) for _ in range(2))
    column_lse = torch.full((setting.columns,), -torch.inf, dtype=c.dtype, device=x.device)
    column_dot = torch.zeros_like(column_lse)
    for rows in _slabs(labels.shape[0], chunk_size):
        logits = -scale * distances(_rows(x, rows, c), y, c, labels[rows], setting)
        row_target, column_target, keep = _slab_targets(args, rows, totals)
        if keep is not None:
            logits = logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
        row_lse[rows] = logits.logsumexp(1)
        row_loss[rows] = (row_target * (row_lse[rows, None] - logits).where(row_target > 0, 0.0)).sum(1)
        mine = logits[:, : setting.columns]
        column_lse = torch.logaddexp(column_lse, mine.logsumexp(0))
        column_dot += (column_target * mine.where(column_target > 0, 0.0)).sum(0)
    # The targets of a column sum to 1, or to 0 where nothing is positive.
    return row_loss, torch.where(totals[0] > 0, column_lse, 0.0) - column_dot, row_lse, column_lse


def _backward(inputs: list, outputs: tuple, grads: tuple) -> tuple:
    x, y, c, scale, labels, _, _, setting, chunk_size = inputs
    (row_lse, column_lse), (grad_row, grad_column) = outputs, grads
    totals = _totals(tuple(inputs))
    total = [torch.zeros_like(v) for v in (x, y, c, scale)]
    for rows in _slabs(labels.shape[0], chunk_size):
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in (_rows(x, rows, c), y, c, scale)]
            part_x, part_y, part_c, part_scale = leaves
            logits = -part_scale * distances(part_x, part_y, part_c, labels[rows], setting)
        with torch.no_grad():
            row_target, column_target, keep = _slab_targets(tuple(inputs), rows, totals)
            held = logits if keep is None else logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
            share = (held - row_lse[rows, None]).exp() * (row_target.sum(1, keepdim=True) > 0) - row_target
            share *= grad_row[rows, None]
            if setting.columns:
                mine = (held[:, : setting.columns] - column_lse).exp() * (totals[0] > 0) - column_target
                share[:, : setting.columns] += mine * grad_column
        parts = torch.autograd.grad(logits, leaves, share)
        _rows(total[0], rows, c).copy_(parts[0])
        for into, part in zip(total[1:], parts[1:], strict=True):
            into += part
    return (*total, None, None, None, None, None)


in_slabs = make_kernel(_plain, _forward, _backward, num_kept=2, saved=(2, 3), batched=False)


def slab_rows(x: Tensor, y: Tensor, c: Tensor) -> Any:
    """Rows of a slab whose buffers together take 64 MB, as an int; a tensor while torch.jit.trace counts in tensors."""
    per_row = x[..., 0].numel() // max(1, x.shape[1] if c.ndim == 1 else x.shape[0])
    return max(1, SLAB_BYTES // (_NUM_BUFFERS * c.element_size() * max(1, per_row * y.shape[-2])))
