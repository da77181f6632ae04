"""Argument checks that several modules share."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def check_positive(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a number, or every entry of a tensor, is finite and > 0.

    The values of a tensor are not read while torch.compile traces.
    """
    if isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            return
        if bool(((value > 0) & torch.isfinite(value)).all()):
            return
        value = value.detach().tolist()
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return
    raise ValueError(f"{name} must be finite and > 0, got {value}")


def check_single(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a tensor has one element."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")


def check_joint(**values: float | Tensor) -> None:
    """Raise ValueError unless all tensors broadcast."""
    shapes = [tuple(value.shape) for value in values.values() if isinstance(value, Tensor)]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(f"{', '.join(values)} must broadcast, got shapes {', '.join(map(str, shapes))}") from None


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return a value that is one of the choices; else ValueError."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def check_width(name: str, value: Tensor, width: int) -> None:
    """Raise ValueError unless the last dimension has this width."""
    if value.shape[-1] != width:
        raise ValueError(f"{name} must have width {width}, got shape {tuple(value.shape)}")
