"""Distance of two tangent vectors at the origin in log-space polar coordinates, for any radius.

References: Ratcliffe, "Foundations of Hyperbolic Manifolds", 2006, theorem 3.5.3 (law of cosines, here in haversine
form); the logarithmic evaluation and its derivative are ours.
"""

import math

import torch
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom._kernel import make_kernel

# exp of half of it is 0 in fp32 and fp64.
_LOG_OF_0 = -2000.0


def _log_sinh(x: Tensor) -> Tensor:
    """Log of sinh(x) for x >= 0; -inf at 0."""
    return x + (-(-2 * x).expm1()).log() - math.log(2)


def _log_cosh(x: Tensor) -> Tensor:
    return x + (-2 * x).exp().log1p() - math.log(2)


def _direct(g: Tensor, a: Tensor, b: Tensor, s: Tensor, direct: Tensor) -> Tensor:
    """A in range, where it is exact to rounding and its logarithm has an error of eps |log A|."""
    sinh_a, sinh_b = torch.where(direct, a, 0.0).sinh(), torch.where(direct, b, 0.0).sinh()
    return torch.where(direct, g / 2, 0.0).sinh().square() + (sinh_a * s) * (sinh_b * s)


def _asinh_of_exp(y: Tensor) -> Tensor:
    large = y > 0
    up, down = torch.where(large, y, 0.0), torch.where(large, 0.0, y)
    return torch.where(large, up + (1 + (-2 * up).exp()).sqrt().log1p(), down.exp().asinh())


def _half_log(g: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Half the log of A. logaddexp keeps -inf (coincident points) and needs no threshold."""
    return torch.logaddexp(2 * _log_sinh(g.abs() / 2), 2 * s.log() + _log_sinh(a) + _log_sinh(b)) / 2


def _forward(g: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    y = _half_log(g, a, b, s)
    direct = a + b < 60
    return torch.where(direct, nm.asinh_sq(_direct(g, a, b, s, direct)), _asinh_of_exp(y).square()), y


def _backward(inputs: list, outputs: tuple, grads: tuple) -> tuple[Tensor, ...]:
    (g, a, b, s), (phi_sq, y), (grad,) = inputs, outputs, grads
    phi = phi_sq.sqrt()
    limit = math.log(torch.finfo(y.dtype).max) - 1
    # d phi^2 / dA = phi / sqrt(A (1+A)), in logs; it tends to 1 as A does to 0.
    softplus = torch.logaddexp(torch.zeros_like(y), 2 * y)
    slope = torch.where(phi == 0, 0.0, torch.where(phi == 0, 1.0, phi).log() - y - softplus / 2)
    log_a, log_b, log_s = _log_sinh(a), _log_sinh(b), s.log()
    terms = (
        0.5 * g.sign() * (slope + _log_sinh(g.abs())).clamp(max=limit).exp(),
        (slope + _log_cosh(a) + log_b + 2 * log_s).clamp(max=limit).exp(),
        (slope + log_a + _log_cosh(b) + 2 * log_s).clamp(max=limit).exp(),
        2 * (slope + log_a + log_b + log_s).clamp(max=limit).exp(),
    )
    return tuple(grad * term for term in terms)


def _plain(g: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    direct = a + b < 60
    near = nm.asinh_sq(_direct(g, a, b, s, direct))
    # What is not taken, and a log of 0, gets a finite stand-in: its derivative would be NaN.
    absent = direct | (g == 0)
    log_g = torch.where(absent, _LOG_OF_0, 2 * _log_sinh(torch.where(absent, 1.0, g.abs() / 2)))
    absent = direct | (s == 0) | (a <= 0) | (b <= 0)
    safe_s, safe_a, safe_b = (torch.where(absent, 1.0, x) for x in (s, a, b))
    log_s = torch.where(absent, _LOG_OF_0, 2 * safe_s.log() + _log_sinh(safe_a) + _log_sinh(safe_b))
    return torch.where(direct, near, _asinh_of_exp(torch.logaddexp(log_g, log_s) / 2).square())


# phi^2 with sinh^2(phi) = A = sinh^2(g/2) + sinh(a) sinh(b) s^2, as a function of (g, a, b, s).
_half_angle_sq = make_kernel(_plain, _forward, _backward, num_kept=1, saved=(0, 1))


def tangent0_half_angle_sq(u: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """(k d / 2)^2 for d the distance of exp_map0(u) and exp_map0(v).

    |u|-|v| and uhat-vhat are formed from u-v, which is exact for close vectors; from the norms they would cancel.
    """
    delta = u - v
    u_norm, v_norm = nm.norm(u), nm.norm(v)
    gap = nm.safe_div(nm.dot(delta, u + v), u_norm + v_norm)
    v_hat = nm.safe_div(v, v_norm.unsqueeze(-1))
    # Where u is 0 its radius removes this term; any finite value will do.
    half_chord = nm.safe_div(nm.norm(delta - gap.unsqueeze(-1) * v_hat), 2 * u_norm)
    k = c.sqrt()
    return _half_angle_sq(k * gap, k * u_norm, k * v_norm, half_chord)
