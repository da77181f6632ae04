"""Distances, norms and inner products of the Poincare ball model.

References: Nickel and Kiela, "Poincare embeddings for learning hierarchical representations", NeurIPS 2017, eq. 1;
Ganea, Becigneul and Hofmann, "Hyperbolic neural networks", NeurIPS 2018, section 2.
"""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom import _pairwise
from hyper_geom._log_space import tangent0_half_angle_sq


def shrinkage(p: Tensor, c: float | Tensor) -> Tensor:
    """1 - c|p|^2 = 2/lambda."""
    size = c * nm.sq_norm(p)
    return 1 - size


def half_chord_sq(p: Tensor, q: Tensor, c: float | Tensor) -> Tensor:
    """A = sinh^2(k d/2) = c|p-q|^2 / ((1-c|p|^2)(1-c|q|^2)), for points inside the ball."""
    return c * nm.sq_norm(p - q) / shrinkage(p, c) / shrinkage(q, c)


@nm.geometry(1)
def conformal_factor(p: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch"]:
    """Ratio of the Riemannian to the Euclidean length of a tangent vector.

    lambda = 2/(1 - c|p|^2)

    Args:
        p: ball points.
        c: curvature parameter.

    Returns:
        lambda `(*batch)`, at least 2.
    """
    return 2 / shrinkage(nm.into_ball(p, c), c)


@nm.geometry(2)
def dist(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Geodesic distance.

    d = (2/k) asinh(k|x-y| / sqrt((1-c|x|^2)(1-c|y|^2)))

    Args:
        x: ball points.
        y: ball points.
        c: curvature parameter.

    Returns:
        Distances `(*batch)` in length units; 0 with gradient 0 where x = y.

    >>> dist(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.0]))  # log 3
    tensor(1.0986)
    """
    return 2 * nm.safe_sqrt(half_chord_sq(nm.into_ball(x, c), nm.into_ball(y, c), c)).asinh() / cast(Tensor, c).sqrt()


@nm.geometry(1)
def dist0(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch"]:
    """Distance to the origin.

    d = (2/k) artanh(k|x|)

    Args:
        x: ball points.
        c: curvature parameter.

    Returns:
        Distances `(*batch)`; 0 with gradient 0 at the origin.
    """
    x_sq = nm.sq_norm(nm.into_ball(x, c))
    return 2 * nm.safe_sqrt(x_sq) * nm.atanhc(c * x_sq)


@nm.geometry(2)
def sq_dist(
    x: Float[Tensor, "*#batch dim"], y: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Squared geodesic distance, smooth where x = y.

    d^2 = (4/c) asinh(sqrt A)^2, A = c|x-y|^2 / ((1-c|x|^2)(1-c|y|^2))

    Args:
        x: ball points.
        y: ball points.
        c: curvature parameter.

    Returns:
        Squared distances `(*batch)`.
    """
    return 4 * nm.asinh_sq(half_chord_sq(nm.into_ball(x, c), nm.into_ball(y, c), c)) / c


@nm.geometry(2, matrices=True)
def pairwise_dist(
    x: Float[Tensor, "*#batch n dim"],
    y: Float[Tensor, "*#batch m dim"],
    *,
    c: float | Tensor = 1.0,
    precision: str = "default",
) -> Float[Tensor, "*#batch n m"]:
    """Distance of every x to every y through one matmul (haversine form).

    h = ((a-b)^2 + 2ab(1-cos)) / ((1-a^2)(1-b^2)), a = k|x|, b = k|y|, d = (2/k) asinh(sqrt h).
    Distances below about sqrt(eps) sinh(r)/k are rounding noise; take `dist` for close pairs.

    Args:
        x: ball points `(*batch n dim)`.
        y: ball points `(*batch m dim)`.
        c: curvature parameter.
        precision: "default", or "high" for a Gram matrix in fp64.

    Returns:
        Distances `(*batch n m)`.

    Raises:
        ValueError: precision is unknown.
    """
    nm.check_choice("precision", precision, ("default", "high"))
    c = cast(Tensor, c)
    x, y = nm.into_ball(x, c.unsqueeze(-1)), nm.into_ball(y, c.unsqueeze(-1))
    return _pairwise.poincare_pairwise_dist(x, y, c, precision)


@nm.geometry(2)
def tangent0_sq_dist(
    u: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Squared distance of exp_map0(u) and exp_map0(v) without forming the points, hence without a radius cap.

    The Lorentz formula at 2u and 2v: a ball tangent vector has depth 2|v|.

    Args:
        u: tangent vectors at the origin.
        v: tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Squared distances `(*batch)`.
    """
    return 4 * tangent0_half_angle_sq(u, v, 4 * cast(Tensor, c)) / c


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
    c = cast(Tensor, c)
    return 2 * nm.safe_sqrt(tangent0_half_angle_sq(u, v, 4 * c)) / c.sqrt()


@nm.geometry(3)
def inner(
    x: Float[Tensor, "*#batch dim"],
    u: Float[Tensor, "*#batch dim"],
    v: Float[Tensor, "*#batch dim"],
    *,
    c: float | Tensor = 1.0,
) -> Float[Tensor, "*#batch"]:
    """Riemannian inner product of two tangent vectors at x.

    <u,v>_x = lambda_x^2 u.v

    Args:
        x: ball points.
        u: tangent vectors at x.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Inner products `(*batch)`.
    """
    return nm.dot(u, v) * (2 / shrinkage(nm.into_ball(x, c), c)).square()


@nm.geometry(2)
def norm(
    x: Float[Tensor, "*#batch dim"], v: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch"]:
    """Riemannian norm of a tangent vector at x.

    |v|_x = lambda_x |v|

    Args:
        x: ball points.
        v: tangent vectors at x.
        c: curvature parameter.

    Returns:
        Norms `(*batch)`; gradient 0 at v = 0.
    """
    return nm.norm(v) * (2 / shrinkage(nm.into_ball(x, c), c))


@nm.geometry(2)
def egrad2rgrad(
    x: Float[Tensor, "*#batch dim"], g: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Riemannian gradient from the Euclidean gradient.

    grad = g/lambda_x^2

    Args:
        x: ball points.
        g: Euclidean gradients.
        c: curvature parameter.

    Returns:
        Tangent vectors at x `(*batch dim)`.
    """
    return (shrinkage(nm.into_ball(x, c), c) / 2).square().unsqueeze(-1) * g


@nm.geometry(1)
def project(
    p: Float[Tensor, "*batch dim"], max_radius: float | None = None, *, c: float | Tensor = 1.0
) -> Float[Tensor, "*batch dim"]:
    """Pull points that lie too far out back along their own direction; others are returned exactly.

    Args:
        p: points, inside or outside the ball.
        max_radius: bound on k*dist0, so that k|p| <= tanh(max_radius/2); k|p| <= 1 - 4 eps always holds.
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)`.

    Raises:
        ValueError: max_radius is not finite and > 0.
    """
    limit = nm.max_ball_norm(p.dtype)
    if max_radius is not None:
        limit = min(limit, math.tanh(nm.check_positive("max_radius", max_radius) / 2))
    return nm.into_ball(nm.tame(p), c, limit)


@nm.geometry(1)
def check_point(p: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> tuple[bool, str | None]:
    """Whether every point lies inside the ball, k|p| < 1; reads values, so it waits for the device.

    Args:
        p: points.
        c: curvature parameter.

    Returns:
        `(True, None)`, or `(False, reason)`.

    >>> check_point(torch.tensor([0.6, 0.8]))
    (False, 'k|p| must be < 1, got 1 for 1 of 1 points')
    """
    size = cast(Tensor, c).sqrt() * torch.linalg.vector_norm(p, dim=-1)
    outside = ~(size < 1)
    if not outside.any():
        return True, None
    return False, f"k|p| must be < 1, got {size[outside].max():.9g} for {int(outside.sum())} of {size.numel()} points"
