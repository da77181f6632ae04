"""Exponential and logarithmic maps, parallel transport, geodesics and the gyromidpoint of the Poincare ball.

References: Ganea, Becigneul and Hofmann, "Hyperbolic neural networks", NeurIPS 2018, lemma 2 and theorem 4;
Ungar, "Analytic Hyperbolic Geometry", 2008, section 6.21. The forms in q - p, which do not cancel, are ours.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom._centroid import centroid_parts, check_weights
from hyper_geom.convert import from_ball, to_ball
from hyper_geom.lorentz._maps import geodesic_weights
from hyper_geom.poincare._gyro import add, rotate
from hyper_geom.poincare._metric import half_chord_sq, shrinkage


@nm.geometry(1)
def exp_map0(v: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim"]:
    """Exponential map at the origin.

    exp_0(v) = tanh(k|v|) v/(k|v|); k|p| is kept within 1 - 4 eps.

    Args:
        v: tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)` at distance 2|v| from the origin, twice that of `lorentz.exp_map0`.

    >>> exp_map0(Tensor([0.0, 1.0]))
    tensor([0.0000, 0.7616])
    """
    v = nm.tame(v)
    return nm.into_ball(nm.tanhc(c * nm.sq_norm(v)).unsqueeze(-1) * v, c)


@nm.geometry(1)
def log_map0(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim"]:
    """Logarithmic map at the origin, the inverse of `exp_map0`.

    log_0(x) = artanh(k|x|) x/(k|x|)

    Args:
        x: ball points.
        c: curvature parameter.

    Returns:
        Tangent vectors at the origin `(*batch dim)` of norm dist0(x)/2.
    """
    x = nm.into_ball(x, c)
    return nm.atanhc(c * nm.sq_norm(x)).unsqueeze(-1) * x


@nm.geometry(2)
def exp_map(
    x: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Exponential map at x.

    exp_x(v) = x (+) tanh(k lambda_x |v|/2) v/(k|v|)

    Args:
        x: ball points.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)`.
    """
    x = nm.into_ball(x, c)
    half = nm.tame(v) / shrinkage(x, c).unsqueeze(-1)
    return add(x, nm.tanhc(c * nm.sq_norm(half)).unsqueeze(-1) * half, c)


@nm.geometry(2)
def log_map(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Logarithmic map at x, the inverse of `exp_map`.

    (2/(k lambda)) artanh(k|z|) z/|z| with z = (-x) (+) y, in the form that does not cancel for close points:
    f'(A) ((1-c|x|^2) delta - c|delta|^2 x)/(1-c|y|^2), delta = y - x, f(A) = asinh(sqrt A)^2 = (k d/2)^2.

    Args:
        x: ball points.
        y: ball points.
        c: curvature parameter.

    Returns:
        Tangent vectors at x `(*batch dim)` of Riemannian norm d(x, y); 0 where x = y.
    """
    x, y = nm.into_ball(x, c), nm.into_ball(y, c)
    delta = y - x
    factor = nm.asinh_sq_slope(half_chord_sq(x, y, c)) / shrinkage(y, c)
    toward, inward = factor * shrinkage(x, c), factor * (c * nm.sq_norm(delta))
    return toward.unsqueeze(-1) * delta - inward.unsqueeze(-1) * x


@nm.geometry(2)
def exp_map_frame(
    x: Float[Tensor, "*#batch dim"], u: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Exponential map at x of a tangent vector given in the frame carried from the origin, in units of length.

    x (+) tanh(k|u|/2) u/(k|u|)

    Args:
        x: ball points.
        u: vectors whose Euclidean norm is the distance to go.
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)` at distance |u| from x.
    """
    half = nm.tame(u) / 2
    return add(nm.into_ball(x, c), nm.tanhc(c * nm.sq_norm(half)).unsqueeze(-1) * half, c)


@nm.geometry(2)
def log_map_frame(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Logarithmic map at x in the frame carried from the origin, the inverse of `exp_map_frame`.

    log_x(y) times lambda_x: Euclidean norms are lengths

    Args:
        x: ball points.
        y: ball points.
        c: curvature parameter.

    Returns:
        Vectors `(*batch dim)` of Euclidean norm d(x, y); 0 where x = y.
    """
    x, y = nm.into_ball(x, c), nm.into_ball(y, c)
    delta = y - x
    factor = 2 * nm.asinh_sq_slope(half_chord_sq(x, y, c)) / shrinkage(y, c)
    return factor.unsqueeze(-1) * (delta - (c * nm.sq_norm(delta) / shrinkage(x, c)).unsqueeze(-1) * x)


@nm.geometry(3)
def parallel_transport(
    x: Float[Tensor, "*#batch dim"],
    y: Float[Tensor, "*#batch dim"],
    v: Float[Tensor, "*#batch dim"],
    *,
    c: float | Tensor = 1.0,
) -> Float[Tensor, "*#batch dim"]:
    """Parallel transport of v from x to y along the geodesic.

    (lambda_x/lambda_y) gyr[y, -x] v

    Args:
        x: points where v lives.
        y: points to carry v to.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Tangent vectors at y `(*batch dim)` of the same Riemannian norm.
    """
    x, y = nm.into_ball(x, c), nm.into_ball(y, c)
    return (shrinkage(y, c) / shrinkage(x, c)).unsqueeze(-1) * rotate(y, x, v, c)


@nm.geometry(2)
def parallel_transport0(
    y: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Parallel transport from the origin to y.

    (1 - c|y|^2) v

    Args:
        y: points to carry v to.
        v: tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Tangent vectors at y `(*batch dim)`.
    """
    return shrinkage(nm.into_ball(y, c), c).unsqueeze(-1) * v


@nm.geometry(2)
def parallel_transport0_back(
    x: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Parallel transport from x to the origin, the inverse of `parallel_transport0`.

    v/(1 - c|x|^2)

    Args:
        x: points where v lives.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Tangent vectors at the origin `(*batch dim)`.
    """
    return v / shrinkage(nm.into_ball(x, c), c).unsqueeze(-1)


@nm.geometry(2)
def geodesic(
    x: Float[Tensor, "*#batch dim"],
    y: Float[Tensor, "*#batch dim"],
    t: float | Tensor,
    *,
    c: float | Tensor = 1.0,
) -> Float[Tensor, "*#batch dim"]:
    """Point at fraction t of the way from x to y; t outside [0, 1] extends the geodesic.

    exp_x(t log_x(y)), evaluated as the Lorentz geodesic

    Args:
        x: points at t = 0.
        y: points at t = 1.
        t: fractions, a number or a tensor that broadcasts with `(*batch)`.
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)`; the speed |gamma'| is d(x, y).
    """
    nm.check_numbers("t", t, x.shape[:-1], y.shape[:-1])
    x, y = from_ball(x, c), from_ball(y, c)
    from_x, from_y = geodesic_weights(x, y, t, c)
    return to_ball(from_x.unsqueeze(-1) * x + from_y.unsqueeze(-1) * y, c)


@nm.geometry(1, matrices=True)
def midpoint(
    x: Float[Tensor, "*batch n dim"], weights: Tensor | None = None, *, c: float | Tensor = 1.0
) -> Float[Tensor, "*batch dim"]:
    """Weighted gyromidpoint of n points, the same point as the Lorentz centroid.

    half (x) (sum_i w_i lambda_i x_i / sum_i w_i (lambda_i - 1)), where half (x) m = m/(1 + sqrt(1 - c|m|^2))

    Args:
        x: ball points `(*batch n dim)`.
        weights: non-negative weights that expand to `(*batch n)`, equal by default; all zero gives the origin.
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)`.

    Raises:
        ValueError: x has fewer than two dimensions, or weights do not expand to `(*batch n)`.
    """
    weights = check_weights(x, weights)
    c = cast(Tensor, c)
    k = c.sqrt()
    p = k[..., None, None] * nm.into_ball(x, c.unsqueeze(-1))
    size = nm.sq_norm(p)
    S, T, root = centroid_parts(2 * p / (1 - size).unsqueeze(-1), (1 + size) / (1 - size), weights)
    return nm.into_ball(nm.safe_div(S, (k * (T + root)).unsqueeze(-1)), c)


@nm.geometry(1)
def clip_tangent0(
    v: Float[Tensor, "*batch dim"], max_radius: float, *, c: float | Tensor = 1.0
) -> Float[Tensor, "*batch dim"]:
    """Shorten tangent vectors at the origin so that k*dist0(exp_map0(v)) stays within a bound.

    v min(1, max_radius/(2k|v|))

    Args:
        v: tangent vectors at the origin.
        max_radius: bound on 2k|v|, > 0.
        c: curvature parameter.

    Returns:
        Tangent vectors `(*batch dim)` of the same direction.

    Raises:
        ValueError: max_radius is not finite and > 0.
    """
    return nm.into_ball(nm.tame(v), c, nm.check_positive("max_radius", max_radius) / 2)


@nm.geometry(1)
def soft_clip_tangent0(
    v: Float[Tensor, "*batch dim"], max_radius: float, *, c: float | Tensor = 1.0
) -> Float[Tensor, "*batch dim"]:
    """`clip_tangent0` without a corner: the length keeps a gradient beyond the bound.

    v / (1 + (2k|v|/R)^4)^(1/4): shorter by 1.5% at R/2 and by 16% at R; the slope of the length is
    (1 + (2k|v|/R)^4)^(-5/4).

    Args:
        v: tangent vectors at the origin.
        max_radius: R, the bound on 2k|v| that is approached, > 0.
        c: curvature parameter.

    Returns:
        Tangent vectors `(*batch dim)` of the same direction.

    Raises:
        ValueError: max_radius is not finite and > 0.
    """
    v = nm.tame(v)
    ratio = c * nm.sq_norm(v / (nm.check_positive("max_radius", max_radius) / 2))
    return torch.hypot(torch.ones_like(ratio), ratio).rsqrt().unsqueeze(-1) * v
