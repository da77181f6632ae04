"""Distances, norms and inner products of the Lorentz model on space components.

References: Nickel and Kiela, "Learning continuous hierarchies in the Lorentz model", ICML 2018, eq. 2-6; the split of
the chord into a radial and a tangential part is derived in `chord_sq` and keeps fp32 exact to a few units.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _cpu, _pairwise
from hyper_geom import _numerics as nm
from hyper_geom._kernel import make_kernel
from hyper_geom._log_space import tangent0_half_angle_sq


def chord_sq(x: Tensor, y: Tensor, c: float | Tensor) -> Tensor:
    """Squared chord q = c <x-y, x-y>_L = 2 cosh(k d) - 2, from points that already share dtype and device.

    With delta = k(x-y), s = k(x+y), a = delta.s/s.s and R = a^2 s.s, q is a sum of non-negative terms:
    |delta - a s|^2 s0^2/E + 4R/E with s0 = k(x_t+y_t), E = s0^2 - R. Subtracting delta.s/s0 squared from |delta|^2,
    which is the same number, costs 3e-4 in fp32 at radii (12, 0.1). For obtuse pairs the direct form does not cancel.
    """
    # Subtract first, scale by k afterwards: the difference of close points is exact, their scaled values are not.
    delta, total = x - y, x + y
    X, Y, product = c * nm.sq_norm(x), c * nm.sq_norm(y), c * nm.dot(x, y)
    x0, y0 = (1 + X).sqrt(), (1 + Y).sqrt()
    # Not 0: the gradient divides by s.s, whose reciprocal must not overflow. Vectors of norm 1e-18 (fp32) do without.
    smallest = 100 * torch.finfo(product.dtype).tiny
    acute = product > smallest
    s_sq = torch.where(acute, c * nm.sq_norm(total), 1.0)
    a = torch.where(acute, c * nm.dot(delta, total) / s_sq, 0.0)
    radial = a * a * s_sq
    cross = c * nm.sq_norm(delta - a.unsqueeze(-1) * total)
    s0 = x0 + y0
    # Both branches must stay finite, or the one not taken puts NaN into the gradient from k*dist0 = 30 on.
    E = torch.where(acute, 2 + 2 * x0 * y0 + 4 * (X / s_sq) * Y + 2 * product * ((X + Y) / s_sq), s0 * s0)
    w = 1 + x0 * y0
    obtuse_sq = (2 * ((X + Y) / w + X * (Y / w) - product)).clamp(min=0)
    return torch.where(acute, cross * (s0 * (s0 / E)) + 4 * radial / E, obtuse_sq)


def _dist(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return 2 * (nm.safe_sqrt(chord_sq(x, y, c)) / 2).asinh() / c.sqrt()


def _pairs_forward(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return _cpu.pairs(x, y, c) if _cpu.serves(x, y, c) else _dist(x, y, c)


def _pairs_backward(inputs: list, outputs: tuple, grads: tuple) -> tuple[Tensor, ...]:
    return _cpu.pairs_grad(*inputs, *grads)


# `_dist` of equal shapes and c (*b), compiled; asked for only where the CPU kernels serve.
_pairs = make_kernel(_dist, _pairs_forward, _pairs_backward)


def split(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(v's component along x in units of x, the rest of v); all of v is rest at x = 0."""
    along = nm.safe_div(nm.dot(x, v), nm.sq_norm(x))
    return along, v - along.unsqueeze(-1) * x


def tangent_sq_norm(x: Tensor, v: Tensor, c: float | Tensor) -> Tensor:
    """|v|_x^2 = |v_perp|^2 + (v.xhat)^2 / (1 + c|x|^2)."""
    along, rest = split(x, v)
    x_sq = nm.sq_norm(x)
    return nm.sq_norm(rest) + along * (along * (x_sq / (1 + c * x_sq)))


@nm.geometry(1)
def time(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch"]:
    """Time component of a point.

    x_t = sqrt(1/c + |x|^2)

    Args:
        x: points.
        c: curvature parameter, the sectional curvature is -c.

    Returns:
        x_t `(*batch)`, at least 1/sqrt(c).

    >>> time(torch.tensor([0.0, 2.0]), c=0.2)
    tensor(3.)
    """
    return (1 / c + nm.sq_norm(x)).sqrt()


@nm.geometry(2)
def dist(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Geodesic distance.

    d = (2/k) asinh(sqrt(q)/2), q = c <x-y, x-y>_L, k = sqrt(c)

    Args:
        x: points.
        y: points.
        c: curvature parameter.

    Returns:
        Distances `(*batch)` in length units; 0 with gradient 0 where x = y.

    >>> round(dist(torch.tensor([0.3, -0.4, 0.5]), torch.tensor([-0.2, 0.9, 1.1]), c=0.7).item(), 5)
    1.36374
    """
    c = cast(Tensor, c)
    if x.shape == y.shape and _cpu.serves(x, y):
        return _pairs(x, y, c.expand(x.shape[:-1]))
    return _dist(x, y, c)


@nm.geometry(1)
def dist0(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch"]:
    """Distance to the origin.

    d = asinh(k|x|)/k; acosh(k x_t)/k is the same number and loses half the digits near the origin.

    Args:
        x: points.
        c: curvature parameter.

    Returns:
        Distances `(*batch)`; 0 with gradient 0 at the origin.
    """
    return nm.safe_sqrt(c * nm.sq_norm(x)).asinh() / cast(Tensor, c).sqrt()


@nm.geometry(2)
def sq_dist(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Squared geodesic distance, smooth where x = y.

    d^2 = (4/c) asinh(sqrt(q/4))^2

    Args:
        x: points.
        y: points.
        c: curvature parameter.

    Returns:
        Squared distances `(*batch)`.
    """
    return 4 * nm.asinh_sq(chord_sq(x, y, c) / 4) / c


@nm.geometry(2, matrices=True)
def pairwise_dist(
    x: Float[Tensor, "*#batch n dim"],
    y: Float[Tensor, "*#batch m dim"],
    *,
    c: float | Tensor = 1.0,
    precision: str = "default",
) -> Float[Tensor, "*#batch n m"]:
    """Distance of every x to every y through one matmul (haversine form).

    h = sinh^2((r-s)/2) + sinh(r) sinh(s) (1-cos)/2, d = (2/k) asinh(sqrt h), with r, s the scaled radii.
    Distances below about sqrt(eps) sinh(r)/k are rounding noise; take `dist` for close pairs.

    Args:
        x: points `(*batch n dim)`.
        y: points `(*batch m dim)`.
        c: curvature parameter.
        precision: "default", or "high" for a Gram matrix in fp64.

    Returns:
        Distances `(*batch n m)`.

    Raises:
        ValueError: precision is unknown.
    """
    nm.check_choice("precision", precision, ("default", "high"))
    return _pairwise.lorentz_pairwise_dist(x, y, cast(Tensor, c), precision)


def _tangent0_sq_dist(u: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return 4 * tangent0_half_angle_sq(u, v, c) / c


@nm.geometry(2)
def tangent0_sq_dist(
    u: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Squared distance of exp_map0(u) and exp_map0(v) without forming the points, hence without a radius cap.

    d^2 = (4/c) asinh(sqrt A)^2, A = sinh^2((a-b)/2) + sinh(a) sinh(b) |uhat-vhat|^2/4, a = k|u|, b = k|v|, in logs.

    Args:
        u: tangent vectors at the origin.
        v: tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Squared distances `(*batch)`.
    """
    return _tangent0_sq_dist(u, v, cast(Tensor, c))


@nm.geometry(2)
def tangent0_dist(
    u: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Distance of exp_map0(u) and exp_map0(v) without forming the points, hence without a radius cap.

    The square root of `tangent0_sq_dist`, with gradient 0 where u = v.

    Args:
        u: tangent vectors at the origin.
        v: tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Distances `(*batch)`.
    """
    return nm.safe_sqrt(_tangent0_sq_dist(u, v, cast(Tensor, c)))


@nm.geometry(3)
def inner(
    x: Float[Tensor, "*#batch dim"],
    u: Float[Tensor, "*#batch dim"],
    v: Float[Tensor, "*#batch dim"],
    *,
    c: float | Tensor = 1.0,
) -> Float[Tensor, "*#batch"]:
    """Riemannian inner product of two tangent vectors at x, given by their space components.

    <u,v>_x = u_perp.v_perp + (u.xhat)(v.xhat)/(1 + c|x|^2)

    Args:
        x: points.
        u: tangent vectors at x.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Inner products `(*batch)`.
    """
    u_along, u_rest = split(x, u)
    v_along, v_rest = split(x, v)
    x_sq = nm.sq_norm(x)
    return nm.dot(u_rest, v_rest) + u_along * (v_along * (x_sq / (1 + c * x_sq)))


@nm.geometry(2)
def norm(
    x: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Riemannian norm of a tangent vector at x.

    |v|_x = sqrt(<v,v>_x)

    Args:
        x: points.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Norms `(*batch)`; gradient 0 at v = 0.
    """
    return nm.safe_sqrt(tangent_sq_norm(x, v, c))


@nm.geometry(2)
def inner_ambient(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Lorentzian inner product of two points.

    <x,y>_L = x.y - x_t y_t = -(1 + q/2)/c

    Args:
        x: points.
        y: points.
        c: curvature parameter.

    Returns:
        Inner products `(*batch)`, at most -1/c.
    """
    return -(1 + chord_sq(x, y, c) / 2) / c


@nm.geometry(2, matrices=True)
def pairwise_inner(
    x: Float[Tensor, "*#batch n dim"], y: Float[Tensor, "*#batch m dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch n m"]:
    """Lorentzian inner product of every x with every y, as one matmul.

    <x,y>_L = x.y - x_t y_t, with the absolute error of the product: about eps x_t y_t.

    Args:
        x: points `(*batch n dim)`.
        y: points `(*batch m dim)`.
        c: curvature parameter.

    Returns:
        Inner products `(*batch n m)`.
    """
    x_t, y_t = ((1 / cast(Tensor, c).unsqueeze(-1) + nm.sq_norm(v)).sqrt() for v in (x, y))
    return x @ y.mT - x_t.unsqueeze(-1) * y_t.unsqueeze(-2)


@nm.geometry(2)
def egrad2rgrad(
    x: Float[Tensor, "*#batch dim"], g: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Riemannian gradient from the Euclidean gradient with respect to the space components.

    grad = g + c (x.g) x

    Args:
        x: points.
        g: Euclidean gradients.
        c: curvature parameter.

    Returns:
        Tangent vectors at x `(*batch dim)`.
    """
    return g + (c * nm.dot(x, g)).unsqueeze(-1) * x
