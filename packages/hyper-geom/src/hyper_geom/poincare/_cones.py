"""Apertures and exterior angles of entailment cones in the Poincare ball.

References: Ganea, Becigneul and Hofmann, "Hyperbolic entailment cones for learning hierarchical embeddings", ICML 2018,
eq. 20 and 28; the atan2 form of the angle is ours.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom._angles import angle, guarded_asin, matmul_angle
from hyper_geom.convert import from_ball
from hyper_geom.poincare._metric import shrinkage


@nm.geometry(1)
def half_aperture(
    x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0, min_radius: float = 0.1
) -> Float[Tensor, "*batch"]:
    """Half aperture of the entailment cone with apex x, equal to that of the same Lorentz point.

    omega = asin(min(1, K (1-a^2)/a)), a = k|x|, K = min_radius; the gradient of asin is bounded by 100.

    Args:
        x: apexes.
        c: curvature parameter.
        min_radius: K, > 0.

    Returns:
        Angles `(*batch)` in (0, pi/2].

    Raises:
        ValueError: min_radius is not finite and > 0.
    """
    x = nm.into_ball(x, c)
    radius = nm.check_positive("min_radius", min_radius)
    size, gap = c * nm.sq_norm(x), shrinkage(x, c)
    outside = size > (radius * gap) ** 2
    return guarded_asin(torch.where(outside, radius * gap / torch.where(outside, size, 1.0).sqrt(), 1.0))


@nm.geometry(2)
def exterior_angle(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Angle at x between the outward ray from the origin and the geodesic to y.

    In coordinates scaled by k: a = |x|, b = y.xhat, t = |y - b xhat|,
    phi = atan2((1-a^2) t, (b-a)(1-ab) - a t^2)

    Args:
        x: apexes.
        y: points.
        c: curvature parameter.

    Returns:
        Angles `(*batch)` in [0, pi]: 0 beyond x on its ray, pi between the origin and x. Where it is undefined: 0 with
        gradient 0 at x = y, pi/2 at x = 0.
    """
    x, y = nm.into_ball(x, c), nm.into_ball(y, c)
    k = cast(Tensor, c).sqrt()
    x_norm = nm.norm(x)
    x_hat = nm.safe_div(x, x_norm.unsqueeze(-1))
    delta = y - x
    along = nm.dot(delta, x_hat)
    t = k * nm.norm(delta - along.unsqueeze(-1) * x_hat)
    a, rise, gap = k * x_norm, k * along, shrinkage(x, c)
    # 1 - ab = 1 - a^2 - a (b - a)
    return angle(gap * t, rise * (gap - a * rise) - a * t * t)


@nm.geometry(2, matrices=True)
def pairwise_exterior_angle(
    x: Float[Tensor, "*#batch n dim"], y: Float[Tensor, "*#batch m dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch n m"]:
    """`exterior_angle` of every apex x to every y, through one matmul.

    Args:
        x: apexes `(*batch n dim)`.
        y: ball points `(*batch m dim)`.
        c: curvature parameter.

    Returns:
        Angles `(*batch n m)` in [0, pi]. They rest on the angle between the directions of x and y, which is rounding
        noise below about sqrt(eps) = 3e-4 (fp32); take `exterior_angle` for such pairs.
    """
    c = cast(Tensor, c)
    return matmul_angle(from_ball(x, c.unsqueeze(-1)), from_ball(y, c.unsqueeze(-1)), c)
