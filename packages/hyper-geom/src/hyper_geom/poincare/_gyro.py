"""Gyrovector operations of the Poincare ball in forms that do not cancel.

References: Ungar, "Analytic Hyperbolic Geometry", 2008, chapter 3; Ganea, Becigneul and Hofmann, "Hyperbolic neural
networks", NeurIPS 2018, eq. 4. With s = p + q: 1 + 2c p.q + c^2 |p|^2 |q|^2 = (1-c|p|^2)(1-c|q|^2) + c|s|^2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm


def add(p: Tensor, q: Tensor, c: float | Tensor) -> Tensor:
    """P (+) q for points inside the ball."""
    total = p + q
    s = c * nm.sq_norm(total)
    p_gap, q_gap = 1 - c * nm.sq_norm(p), 1 - c * nm.sq_norm(q)
    bottom = p_gap * q_gap + s
    # (+)-sum of p and -p: both terms are 0 and so is the result.
    return nm.into_ball((p_gap / bottom).unsqueeze(-1) * total + (s / bottom).unsqueeze(-1) * p, c)


def rotate(q: Tensor, p: Tensor, v: Tensor, c: float | Tensor) -> Tensor:
    """gyr[q, -p] v: the rotation by 2 arg(1 - c p.q + i c p^q) in the plane of p and q.

    With delta = q - p and J w = p (delta.w) - delta (p.w): v + 2/D (Re c J v + c^2 J J v), Re = 1 - c p.q,
    D = (1-c|p|^2)(1-c|q|^2) + c|delta|^2.
    """
    delta = q - p
    s = c * nm.sq_norm(delta)
    p_gap, q_gap = 1 - c * nm.sq_norm(p), 1 - c * nm.sq_norm(q)
    bottom = p_gap * q_gap + s
    real = (p_gap + q_gap + s) / 2

    def turn(w: Tensor) -> Tensor:
        return (c * nm.dot(delta, w)).unsqueeze(-1) * p - (c * nm.dot(p, w)).unsqueeze(-1) * delta

    turned = turn(v)
    return v + 2 * ((real / bottom).unsqueeze(-1) * turned + turn(turned) / bottom.unsqueeze(-1))


@nm.geometry(2)
def mobius_add(
    p: Float[Tensor, "*#batch dim"], q: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Moebius addition.

    p (+) q = ((1 + 2c p.q + c|q|^2) p + (1 - c|p|^2) q) / (1 + 2c p.q + c^2 |p|^2 |q|^2)

    Args:
        p: ball points.
        q: ball points.
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)`.

    >>> mobius_add(torch.tensor([0.5]), torch.tensor([0.5]))
    tensor([0.8000])
    """
    return add(nm.into_ball(p, c), nm.into_ball(q, c), c)


@nm.geometry(1, first=1)
def mobius_scalar_mul(
    t: float | Tensor, p: Float[Tensor, "*#batch dim"], *, c: float | Tensor = 1.0
) -> Float[Tensor, "*#batch dim"]:
    """Moebius scalar multiplication.

    t (x) p = tanh(t artanh(k|p|)) p/(k|p|)

    Args:
        t: factors, a number or a tensor that broadcasts with `(*batch)`.
        p: ball points.
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)` at |t| times the distance from the origin.
    """
    nm.check_numbers("t", t, p.shape[:-1])
    p = nm.into_ball(p, c)
    size = c * nm.sq_norm(p)
    unit_speed = nm.atanhc(size)
    t = torch.as_tensor(t, dtype=p.dtype, device=p.device)
    # tanh(t r)/|p| as (tanh(t r)/(t r)) t (r/|p|), each factor smooth at 0.
    scale = nm.tanhc(t * t * unit_speed * unit_speed * size) * t * unit_speed
    return nm.into_ball(scale.unsqueeze(-1) * p, c)


@nm.geometry(3)
def gyration(
    p: Float[Tensor, "*#batch dim"],
    q: Float[Tensor, "*#batch dim"],
    v: Float[Tensor, "*#batch dim"],
    *,
    c: float | Tensor = 1.0,
) -> Float[Tensor, "*#batch dim"]:
    """Gyration, the rotation by which Moebius addition fails to be associative.

    gyr[p, q] v = -(p (+) q) (+) (p (+) (q (+) v))

    Args:
        p: ball points.
        q: ball points.
        v: vectors.
        c: curvature parameter.

    Returns:
        Vectors `(*batch dim)` of the same Euclidean norm.
    """
    return rotate(nm.into_ball(p, c), -nm.into_ball(q, c), v, c)
