"""Apertures and exterior angles of entailment cones in the Lorentz model.

References: Ganea, Becigneul and Hofmann, "Hyperbolic entailment cones for learning hierarchical embeddings", ICML 2018;
Desai et al., "Hyperbolic image-text representations", ICML 2023, eq. 10-12 (MERU); the atan2 form of the angle is ours.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom._angles import angle, asinh_difference, guarded_asin, matmul_angle


@nm.geometry(1)
def half_aperture(
    x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0, min_radius: float = 0.1
) -> Float[Tensor, "*batch"]:
    """Half aperture of the entailment cone with apex x.

    omega = asin(min(1, 2 K/(k|x|))), K = min_radius; the gradient of asin is bounded by 100, and 0 where k|x| < 2K.

    Args:
        x: apexes.
        c: curvature parameter.
        min_radius: K, > 0.

    Returns:
        Angles `(*batch)` in (0, pi/2].

    Raises:
        ValueError: min_radius is not finite and > 0.

    >>> half_aperture(torch.tensor([0.1, 0.0]))
    tensor(1.5708)
    """
    radius = 2 * nm.check_positive("min_radius", min_radius)
    size = c * nm.sq_norm(x)
    outside = size > radius * radius
    return guarded_asin(torch.where(outside, radius / torch.where(outside, size, 1.0).sqrt(), 1.0))


@nm.geometry(2)
def exterior_angle(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Angle at x between the outward ray from the origin and the geodesic to y.

    In coordinates scaled by k: p = y.xhat, t = |y - p xhat|, mu = sqrt(1 + t^2),
    phi = atan2(t, mu sinh(asinh(p/mu) - asinh|x|))

    Args:
        x: apexes.
        y: points.
        c: curvature parameter.

    Returns:
        Angles `(*batch)` in [0, pi]: 0 beyond x on its ray, pi between the origin and x. Where it is undefined: 0 with
        gradient 0 at x = y, pi/2 at x = 0.
    """
    k = cast(Tensor, c).sqrt()
    x_norm = nm.norm(x)
    x_hat = nm.safe_div(x, x_norm.unsqueeze(-1))
    # From y - x, not from y: the part across x is the same and its rounding error smaller.
    delta = y - x
    along = nm.dot(delta, x_hat)
    t = k * nm.norm(delta - along.unsqueeze(-1) * x_hat)
    mu_less_1 = t * t / (1 + (1 + t * t).sqrt())
    mu = 1 + mu_less_1
    n = k * x_norm
    p = k * nm.dot(y, x_hat)
    rise = asinh_difference(p / mu, n, (k * along - n * mu_less_1) / mu)
    return angle(t, mu * rise.sinh())


@nm.geometry(2, matrices=True)
def pairwise_exterior_angle(
    x: Float[Tensor, "*#batch n dim"], y: Float[Tensor, "*#batch m dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch n m"]:
    """`exterior_angle` of every apex x to every y, through one matmul.

    Args:
        x: apexes `(*batch n dim)`.
        y: points `(*batch m dim)`.
        c: curvature parameter.

    Returns:
        Angles `(*batch n m)` in [0, pi]. They rest on the angle between the directions of x and y, which is rounding
        noise below about sqrt(eps) = 3e-4 (fp32); take `exterior_angle` for such pairs.
    """
    return matmul_angle(x, y, cast(Tensor, c))
