"""Angles by atan2 and asin with bounded derivatives, shared by both models.

References: Ganea, Becigneul and Hofmann, "Hyperbolic entailment cones for learning hierarchical embeddings", ICML 2018,
eq. 23-28 (the angle by acos, which loses half the digits near 0 and pi; the forms here are ours).
"""

import torch
from torch import Tensor

from hyper_geom import _numerics as nm

# 1 - u^2 below this is treated as this in the derivative of asin, which bounds it by 100.
_ASIN_GUARD = 1e-4


def guarded_asin(u: Tensor) -> Tensor:
    """asin(u) for u in (0, 1], with derivative 1/sqrt(max(1 - u^2, 1e-4))."""
    steep = (1 - u) * (1 + u) < _ASIN_GUARD
    value = torch.where(steep, u.detach(), u).asin()
    # Adds 0 to the value and the bounded slope to the gradient.
    return value + torch.where(steep, (u - u.detach()) / _ASIN_GUARD**0.5, 0.0)


def angle(sine: Tensor, cosine: Tensor) -> Tensor:
    """atan2(sine, cosine); 0 with gradient 0 where both are 0."""
    none = (sine == 0) & (cosine == 0)
    return torch.where(none, 0.0, torch.atan2(sine, torch.where(none, 1.0, cosine)))


def asinh_difference(a: Tensor, b: Tensor, a_less_b: Tensor) -> Tensor:
    """asinh(a) - asinh(b) for b >= 0, given a - b to full relative precision.

    log1p((a-b)(1 + (a+b)/(a0+b0))/(b+b0)) with a0 = sqrt(1+a^2); for a <= 0 the direct difference does not cancel.
    """
    same_side = a > 0
    a_pos = torch.where(same_side, a, b)
    a0, b0 = (1 + a_pos * a_pos).sqrt(), (1 + b * b).sqrt()
    near = (torch.where(same_side, a_less_b, 0.0) * (1 + (a_pos + b) / (a0 + b0)) / (b + b0)).log1p()
    return torch.where(same_side, near, torch.where(same_side, 0.0, a).asinh() - b.asinh())


def matmul_angle(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """Exterior angle of every Lorentz apex x `(*b n d)` to every y `(*b m d)`."""
    k = c.sqrt().unsqueeze(-1)
    x_norm, y_norm = nm.norm(x), nm.norm(y)
    n, m = (k * x_norm).unsqueeze(-1), (k * y_norm).unsqueeze(-2)
    x_hat, y_hat = nm.safe_div(x, x_norm.unsqueeze(-1)), nm.safe_div(y, y_norm.unsqueeze(-1))
    # 1 - cos in [0, 2], so that rounding never gives sin^2 < 0.
    versine = (1 - x_hat @ y_hat.mT).clamp(0, 2)
    t = m * nm.safe_sqrt(versine * (2 - versine))
    mu = (1 + t * t).sqrt()
    return angle(t, mu * ((m * (1 - versine) / mu).asinh() - n.asinh()).sinh())
