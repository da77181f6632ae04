"""Exponential and logarithmic maps, parallel transport, geodesics and the centroid of the Lorentz model.

References: Nickel and Kiela, ICML 2018, eq. 9-10; Nagano et al., "A wrapped normal distribution on hyperbolic space",
ICML 2019, eq. 3-5; Law et al., "Lorentzian distance learning for hyperbolic representations", ICML 2019, eq. 13.
"""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom._centroid import centroid_parts, check_weights
from hyper_geom.lorentz._metric import chord_sq, tangent_sq_norm


@nm.geometry(1)
def exp_map0(v: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim"]:
    """Exponential map at the origin.

    exp_0(v) = sinh(k|v|)/(k|v|) v; k|v| is clamped at 40 (fp32) or 350 (fp64), where its gradient ends.

    Args:
        v: tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Points `(*batch dim)` at distance |v| from the origin.

    >>> exp_map0(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 1.1752])
    """
    v = nm.tame(v)
    return nm.sinhc(c * nm.sq_norm(v), nm.MAX_RADIUS[v.dtype]).unsqueeze(-1) * v


@nm.geometry(1)
def log_map0(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim"]:
    """Logarithmic map at the origin, the inverse of `exp_map0`.

    log_0(x) = asinh(k|x|)/(k|x|) x

    Args:
        x: points.
        c: curvature parameter.

    Returns:
        Tangent vectors at the origin `(*batch dim)`.
    """
    return nm.asinhc(c * nm.sq_norm(x)).unsqueeze(-1) * x


@nm.geometry(2)
def exp_map(
    x: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Exponential map at x.

    exp_x(v) = cosh(t) x + sinh(t)/t v, t = k|v|_x; t and the radius of the result are clamped as in `exp_map0`.

    Args:
        x: points.
        v: tangent vectors at x (space components).
        c: curvature parameter.

    Returns:
        Points `(*batch dim)`.
    """
    cap = nm.MAX_RADIUS[x.dtype]
    v = nm.tame(v)
    t_sq = c * tangent_sq_norm(x, v, c)
    y = nm.safe_sqrt(t_sq).clamp(max=cap).cosh().unsqueeze(-1) * x + nm.sinhc(t_sq, cap).unsqueeze(-1) * v
    return _within_cap(y, cast(Tensor, c))


def _within_cap(y: Tensor, c: Tensor) -> Tensor:
    # Divide by the largest radius before squaring: |y|^2 itself may overflow.
    excess = c.sqrt() * nm.norm(y / math.sinh(nm.MAX_RADIUS[y.dtype]))
    return y / excess.clamp(min=1).unsqueeze(-1)


@nm.geometry(2)
def log_map(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Logarithmic map at x, the inverse of `exp_map`.

    log_x(y) = (kd/sinh(kd)) (y - x - (q/2) x), q = c <x-y, x-y>_L

    Args:
        x: points.
        y: points.
        c: curvature parameter.

    Returns:
        Tangent vectors at x `(*batch dim)` of norm d(x, y); 0 where x = y.
    """
    q = chord_sq(x, y, c)
    slope = nm.asinh_sq_slope(q / 4)
    # The slope goes into q before q goes into x: q x overflows from radius 32 (fp32).
    return slope.unsqueeze(-1) * (y - x) - (slope * (q / 2)).unsqueeze(-1) * x


@nm.geometry(2)
def exp_map_frame(
    x: Float[Tensor, "*#batch dim"], u: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Exponential map at x of a tangent vector given in the frame carried from the origin.

    exp_x(PT_{0->x}(u)) = cosh(k|u|/2)^2 (2 t + c|t|^2 x), t = p + q, p = x/(1 + k x_t), q = tanh(k|u|/2) u/(k|u|):
    Moebius addition of the ball points p and q. |u| is the distance gone. In fp32 at radius 5 a round trip through
    `log_map_frame` is off by 1e-3; through `exp_map`, whose space components grow with sinh of the radius, by .2.

    Args:
        x: points.
        u: tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Points `(*batch dim)` at distance |u| from x.
    """
    half = nm.tame(u) / 2
    half_sq = c * nm.sq_norm(half)
    t = x / (1 + (1 + c * nm.sq_norm(x)).sqrt()).unsqueeze(-1) + nm.tanhc(half_sq).unsqueeze(-1) * half
    stretch = nm.safe_sqrt(half_sq).clamp(max=nm.MAX_RADIUS[u.dtype] / 2).cosh().square()
    return _within_cap(stretch.unsqueeze(-1) * (2 * t + (c * nm.sq_norm(t)).unsqueeze(-1) * x), cast(Tensor, c))


@nm.geometry(2)
def log_map_frame(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Logarithmic map at x in the frame carried from the origin, the inverse of `exp_map_frame`.

    PT_{x->0}(log_x(y)) = (kd/sinh(kd)) z, z = delta - c (delta.(x+y)/(x0+y0) - x.delta/(1+x0)) x, delta = y - x

    Args:
        x: points.
        y: points.
        c: curvature parameter.

    Returns:
        Tangent vectors at the origin `(*batch dim)` of Euclidean norm d(x, y); 0 where x = y.
    """
    delta = y - x
    x0, y0 = (1 + c * nm.sq_norm(x)).sqrt(), (1 + c * nm.sq_norm(y)).sqrt()
    back = c * (nm.dot(delta, x + y) / (x0 + y0) - nm.dot(x, delta) / (1 + x0))
    z = delta - back.unsqueeze(-1) * x
    # kd/sinh(kd) from q: the norm of z overflows where the distance passes 44 (fp32).
    return nm.asinh_sq_slope(chord_sq(x, y, c) / 4).unsqueeze(-1) * z


@nm.geometry(3)
def parallel_transport(
    x: Float[Tensor, "*#batch dim"],
    y: Float[Tensor, "*#batch dim"],
    v: Float[Tensor, "*#batch dim"],
    *,
    c: float | Tensor = 1.0,
) -> Float[Tensor, "*#batch dim"]:
    """Parallel transport of v from x to y along the geodesic.

    v + c <y-x, v>_L / (2 + q/2) (x + y)

    Args:
        x: points where v lives.
        y: points to carry v to.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Tangent vectors at y `(*batch dim)` of the same norm.
    """
    delta, total = y - x, x + y
    x_t, y_t = (1 / c + nm.sq_norm(x)).sqrt(), (1 / c + nm.sq_norm(y)).sqrt()
    time_gap = nm.dot(delta, total) / (x_t + y_t)
    product = nm.dot(delta, v) - time_gap * (nm.dot(x, v) / x_t)
    return v + (c * product / (2 + chord_sq(x, y, c) / 2)).unsqueeze(-1) * total


@nm.geometry(2)
def parallel_transport0(
    y: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Parallel transport from the origin to y.

    v + c (y.v)/(1 + k y_t) y

    Args:
        y: points to carry v to.
        v: tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Tangent vectors at y `(*batch dim)`.
    """
    y0 = (1 + c * nm.sq_norm(y)).sqrt()
    return v + (c * nm.dot(y, v) / (1 + y0)).unsqueeze(-1) * y


@nm.geometry(2)
def parallel_transport0_back(
    x: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Parallel transport from x to the origin, the inverse of `parallel_transport0`.

    v - k v_t/(1 + k x_t) x, v_t = x.v/x_t

    Args:
        x: points where v lives.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Tangent vectors at the origin `(*batch dim)`.
    """
    x0 = (1 + c * nm.sq_norm(x)).sqrt()
    return v - (c * nm.dot(x, v) / x0 / (1 + x0)).unsqueeze(-1) * x


def geodesic_weights(x: Tensor, y: Tensor, t: float | Tensor, c: float | Tensor) -> tuple[Tensor, Tensor]:
    """(sinh((1-t) D), sinh(t D)) / sinh(D) with D = k d(x, y); (1-t, t) in the limit D = 0."""
    D_sq = 4 * nm.asinh_sq(chord_sq(x, y, c) / 4)
    t = torch.as_tensor(t, dtype=D_sq.dtype, device=D_sq.device)
    near = D_sq < 1
    small, D = torch.where(near, D_sq, 0.0), torch.where(near, 1.0, D_sq).sqrt()

    def ratio(t: Tensor) -> Tensor:
        # e^((t-1)D) (1-e^(-2tD))/(1-e^(-2D)): sinh(D) alone overflows from D = 89 in fp32.
        far = ((t - 1) * D).exp() * ((-2 * t * D).expm1() / (-2 * D).expm1())
        return torch.where(near, t * (nm.sinhc(t * t * small) / nm.sinhc(small)), far)

    return ratio(1 - t), ratio(t)


@nm.geometry(2)
def geodesic(
    x: Float[Tensor, "*#batch dim"],
    y: Float[Tensor, "*#batch dim"],
    t: float | Tensor,
    *,
    c: float | Tensor = 1.0,
) -> Float[Tensor, "*#batch dim"]:
    """Point at fraction t of the way from x to y; t outside [0, 1] extends the geodesic.

    gamma(t) = (sinh((1-t) D) x + sinh(t D) y) / sinh(D), D = k d(x, y)

    Args:
        x: points at t = 0.
        y: points at t = 1.
        t: fractions, a number or a tensor that broadcasts with `(*batch)`.
        c: curvature parameter.

    Returns:
        Points `(*batch dim)`; the speed |gamma'| is d(x, y).
    """
    nm.check_numbers("t", t, x.shape[:-1], y.shape[:-1])
    from_x, from_y = geodesic_weights(x, y, t, c)
    return from_x.unsqueeze(-1) * x + from_y.unsqueeze(-1) * y


@nm.geometry(1, matrices=True)
def midpoint(
    x: Float[Tensor, "*batch n dim"], weights: Tensor | None = None, *, c: float | Tensor = 1.0
) -> Float[Tensor, "*batch dim"]:
    """Weighted Lorentz centroid of n points, which is also the Einstein midpoint and the gyromidpoint.

    S / (k sqrt(T^2 - |S|^2)), S = sum_i w_i k x_i, T = sum_i w_i k x_it. It is the Frechet mean for two points of
    equal weight only.

    Args:
        x: points `(*batch n dim)`.
        weights: non-negative weights that expand to `(*batch n)`, equal by default; all zero gives the origin.
        c: curvature parameter.

    Returns:
        Points `(*batch dim)`.

    Raises:
        ValueError: x has fewer than two dimensions, or weights do not expand to `(*batch n)`.
    """
    weights = check_weights(x, weights)
    c = cast(Tensor, c)
    k = c.sqrt()
    S, _, root = centroid_parts(k[..., None, None] * x, (1 + c.unsqueeze(-1) * nm.sq_norm(x)).sqrt(), weights)
    return nm.safe_div(S, (k * root).unsqueeze(-1))


@nm.geometry(1)
def clip_tangent0(
    v: Float[Tensor, "*batch dim"], max_radius: float, *, c: float | Tensor = 1.0
) -> Float[Tensor, "*batch dim"]:
    """Shorten tangent vectors at the origin so that k*dist0(exp_map0(v)) stays within a bound.

    v min(1, max_radius/(k|v|))

    Args:
        v: tangent vectors at the origin.
        max_radius: bound on k|v|, > 0.
        c: curvature parameter.

    Returns:
        Tangent vectors `(*batch dim)` of the same direction.

    Raises:
        ValueError: max_radius is not finite and > 0.
    """
    return nm.into_ball(nm.tame(v), c, nm.check_positive("max_radius", max_radius))


@nm.geometry(1)
def soft_clip_tangent0(
    v: Float[Tensor, "*batch dim"], max_radius: float, *, c: float | Tensor = 1.0
) -> Float[Tensor, "*batch dim"]:
    """`clip_tangent0` without a corner: the length keeps a gradient beyond the bound.

    v / (1 + (k|v|/R)^4)^(1/4): shorter by 1.5% at R/2 and by 16% at R; the slope of the length is
    (1 + (k|v|/R)^4)^(-5/4).

    Args:
        v: tangent vectors at the origin.
        max_radius: R, the bound on k|v| that is approached, > 0.
        c: curvature parameter.

    Returns:
        Tangent vectors `(*batch dim)` of the same direction.

    Raises:
        ValueError: max_radius is not finite and > 0.
    """
    v = nm.tame(v)
    ratio = c * nm.sq_norm(v / (nm.check_positive("max_radius", max_radius)))
    return torch.hypot(torch.ones_like(ratio), ratio).rsqrt().unsqueeze(-1) * v
