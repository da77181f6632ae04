"""Polar description of one side of a pairwise kernel, shared by both models and by tangent-space inputs.

A point is a direction and r = k * dist(origin, point), so one kernel serves the Lorentz model, the Poincare ball and
tangent vectors at the origin: every map between the three keeps directions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyper_geom._numerics import MAX_RADIUS, max_ball_norm, norm, safe_div, tame


class Polar(NamedTuple):
    """Points as `vector` (its direction alone counts), `radius` r, `sinh` = sinh r and `stretch` = sinh(r) / |vector|.

    `vector` and `radius` carry gradients, independently: a kernel hands `vector` only its tangential part
    stretch (I - e e^T) dL/d(sinh(r) e), and everything radial goes through `radius`. At the origin e = 0, so the whole
    of it arrives there and a point that starts at 0 still moves.
    """

    vector: Tensor  # (*b n d)
    radius: Tensor  # (*b n)
    sinh: Tensor  # (*b n), no gradient: asinh(sinh) rounds, so both are kept
    stretch: Tensor  # (*b n), no gradient

    def inverse_norm(self) -> Tensor:
        """1/|vector|, 0 for a zero vector."""
        return safe_div(self.stretch, self.sinh)

    def rows(self, start: int, stop: int) -> "Polar":
        """The points start..stop of an unbatched description."""
        return Polar(*(part[start:stop] for part in self))


def max_radius(model: str, dtype: torch.dtype) -> float:
    """Largest k*dist0 at which a model keeps a point in this dtype."""
    return MAX_RADIUS[dtype] if model == "lorentz" else 2.0 * math.atanh(max_ball_norm(dtype))


def _norm(vector: Tensor) -> Tensor:
    return norm(vector if vector.dtype in MAX_RADIUS else vector.float())


def _stretch(sinh: Tensor, size: Tensor, at_zero: Tensor) -> Tensor:
    return torch.where(size > 0, sinh / torch.where(size > 0, size, 1.0), at_zero)


def lorentz_polar(x: Tensor, k: Tensor) -> Polar:
    """Lorentz points: sinh r = k|x|."""
    sinh = k * _norm(x)
    radius = torch.asinh(sinh)
    sinh = sinh.detach()
    return Polar(x, radius, sinh, k.detach().expand_as(sinh).clone())  # one memory for all entries stops forward mode


def poincare_polar(p: Tensor, k: Tensor) -> Polar:
    """Ball points: tanh(r/2) = k|p|; points on or outside the rim count as just inside."""
    p = tame(p)
    size = _norm(p)
    a = (k * size).clamp(max=max_ball_norm(size.dtype))
    radius = 2.0 * torch.atanh(a)
    with torch.no_grad():
        sinh = 2.0 * a / ((1.0 - a) * (1.0 + a))
        return Polar(p, radius, sinh, _stretch(sinh, size, 2.0 * k))


def lorentz_polar0(v: Tensor, k: Tensor) -> Polar:
    """exp_map0(v) of the Lorentz model: r = k|v|."""
    return _polar0(v, k, "lorentz")


def poincare_polar0(v: Tensor, k: Tensor) -> Polar:
    """exp_map0(v) of the ball: r = 2k|v|."""
    return _polar0(v, 2.0 * k, "poincare")


def _polar0(v: Tensor, slope: Tensor, model: str) -> Polar:
    v = tame(v)
    size = _norm(v)
    radius = (slope * size).clamp(max=max_radius(model, size.dtype))
    with torch.no_grad():
        sinh = torch.sinh(radius)
        return Polar(v, radius, sinh, _stretch(sinh, size, slope))


POLAR: dict[tuple[str, str], Callable[[Tensor, Tensor], Polar]] = {
    ("lorentz", "points"): lorentz_polar,
    ("lorentz", "tangent0"): lorentz_polar0,
    ("poincare", "points"): poincare_polar,
    ("poincare", "tangent0"): poincare_polar0,
}


def half_exponentials(r: Tensor) -> tuple[Tensor, Tensor]:
    """exp(r/2) - 1 and exp(-r/2)/2."""
    return torch.expm1(0.5 * r), 0.5 * torch.exp(-0.5 * r)


def side(points: Polar) -> Tensor:
    """The five numbers that a compiled kernel needs of each point, (5, *b, num)."""
    return torch.stack((points.stretch, points.sinh, *half_exponentials(points.radius), coth(points.sinh)))


def coth(sinh: Tensor) -> Tensor:
    """cosh(r)/sinh(r), and 0 at r = 0, where the radius has no gradient to pass on."""
    return safe_div((1.0 + sinh.square()).sqrt(), sinh)
