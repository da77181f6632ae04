"""The usual way to a Lorentz distance, the peer of both scripts that measure distances."""

import torch


def acosh_dist(x: torch.Tensor, y: torch.Tensor, c: float = 1.0) -> torch.Tensor:
    """All Lorentz distances the usual way (Desai et al., ICML 2023, eq. 1 and 4): acosh of the clamped inner product."""
    x_time = (1 / c + (x * x).sum(-1, keepdim=True)).sqrt()
    y_time = (1 / c + (y * y).sum(-1, keepdim=True)).sqrt()
    inner = x @ y.mT - x_time * y_time.mT
    return torch.acosh((-c * inner).clamp(min=1 + 1e-8)) / c**0.5
