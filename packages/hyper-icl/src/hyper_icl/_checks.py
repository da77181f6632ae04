"""Argument checks that several modules share; no reference, plain preconditions."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def check_positive(name: str, value: float) -> float:
    """Return a number that is finite and > 0; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return float(value)


def check_count(name: str, value: int, low: int = 1) -> int:
    """Return an integer that is at least `low`; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
    return value


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return a value that is one of the choices; else ValueError."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def check_rows(name: str, rows: Tensor, *, dim: int | None = None) -> Tensor:
    """Return a finite floating matrix (n, d), d >= 1 and equal to `dim` if given; else ValueError."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.ndim != 2 or rows.shape[1] == 0:
        what = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"{name} must be a floating tensor of shape (n, d) with d >= 1, got {what}")
    if dim is not None and rows.shape[1] != dim:
        raise ValueError(f"{name} must have rows of length {dim}, got {rows.shape[1]}")
    # In parts, for pools that live in a file.
    bad = sum(int((~torch.isfinite(part)).sum()) for part in rows.split(1 << 15))
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} entries that are not")
    return rows


def check_groups(name: str, groups: Tensor | None, num: int) -> Tensor | None:
    """Return int64 (num,) or None; else ValueError."""
    if groups is None:
        return None
    if groups.dtype != torch.int64 or groups.shape != (num,):
        raise ValueError(f"{name} must be int64 of shape ({num},), got {groups.dtype} of shape {tuple(groups.shape)}")
    return groups
