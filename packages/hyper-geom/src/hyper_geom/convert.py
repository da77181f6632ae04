"""Conversions between the Lorentz, Poincare and Klein models, ambient coordinates and curvatures.

References: Cannon et al., "Hyperbolic geometry", 1997, section 7 (the models and their projections).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm

__all__ = [
    "from_ambient",
    "klein_to_lorentz",
    "lorentz_to_klein",
    "lorentz_to_poincare",
    "poincare_to_lorentz",
    "rescale_curvature",
    "to_ambient",
]


def to_ball(x: Tensor, c: float | Tensor) -> Tensor:
    """`lorentz_to_poincare` for tensors that already share dtype and device."""
    return nm.into_ball(x / (1 + (1 + c * nm.sq_norm(x)).sqrt()).unsqueeze(-1), c)


def from_ball(p: Tensor, c: float | Tensor) -> Tensor:
    """`poincare_to_lorentz` for tensors that already share dtype and device."""
    p = nm.into_ball(p, c)
    return 2 * p / (1 - c * nm.sq_norm(p)).unsqueeze(-1)


@nm.geometry(1)
def lorentz_to_poincare(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim"]:
    """Poincare ball point of a Lorentz point.

    p = x / (1 + k x_t); beyond k*dist0 = 15.2 (fp32) it is pulled in to k|p| = 1 - 4 eps.

    Args:
        x: Lorentz points (space components).
        c: curvature parameter.

    Returns:
        Ball points `(*batch dim)` with k|p| < 1.

    >>> lorentz_to_poincare(torch.tensor([1.0, 2.0**0.5], dtype=torch.float64))
    tensor([0.3333, 0.4714], dtype=torch.float64)
    """
    return to_ball(x, c)


@nm.geometry(1)
def poincare_to_lorentz(p: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim"]:
    """Lorentz point of a Poincare ball point.

    x = 2 p / (1 - c|p|^2)

    Args:
        p: ball points; those outside are pulled in first.
        c: curvature parameter.

    Returns:
        Lorentz points `(*batch dim)`.
    """
    return from_ball(p, c)


@nm.geometry(1)
def lorentz_to_klein(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim"]:
    """Klein (projective) model point of a Lorentz point.

    x / (k x_t); beyond k*dist0 = 7.6 (fp32) it is pulled in to norm (1 - 4 eps)/k.

    Args:
        x: Lorentz points.
        c: curvature parameter.

    Returns:
        Klein points `(*batch dim)` of norm below 1/k.
    """
    return nm.into_ball(x / (1 + c * nm.sq_norm(x)).sqrt().unsqueeze(-1), c)


@nm.geometry(1)
def klein_to_lorentz(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim"]:
    """Lorentz point of a Klein model point.

    x / sqrt(1 - c|x|^2)

    Args:
        x: Klein points; those outside the ball are pulled in first.
        c: curvature parameter.

    Returns:
        Lorentz points `(*batch dim)`.
    """
    x = nm.into_ball(x, c)
    return x / (1 - c * nm.sq_norm(x)).sqrt().unsqueeze(-1)


@nm.geometry(1)
def to_ambient(x: Float[Tensor, "*batch dim"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch dim+1"]:
    """Ambient Minkowski coordinates, time first.

    (sqrt(1/c + |x|^2), x)

    Args:
        x: Lorentz points (space components).
        c: curvature parameter.

    Returns:
        Ambient points `(*batch dim+1)`.
    """
    return torch.cat(((1 / c + nm.sq_norm(x)).sqrt().unsqueeze(-1), x), dim=-1)


@nm.geometry(1)
def from_ambient(x: Float[Tensor, "*batch ambient"], *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch ambient-1"]:
    """Space components of ambient points, time first; the time component is dropped, not checked.

    Args:
        x: ambient points `(*batch dim+1)`.
        c: curvature parameter; it has no effect here and is taken for symmetry with `to_ambient`.

    Returns:
        Lorentz points `(*batch dim)`.

    Raises:
        ValueError: fewer than two components.
    """
    if x.shape[-1] < 2:
        raise ValueError(f"x must have a time and at least one space component, got shape {tuple(x.shape)}")
    return x[..., 1:]


def rescale_curvature(
    x: Tensor, c_from: float | int | Tensor, c_to: float | int | Tensor
) -> Float[Tensor, "*batch dim"]:
    """The similar point in the space of another curvature: all distances scale by sqrt(c_from/c_to).

    x sqrt(c_from/c_to), in both models

    Args:
        x: points `(*batch dim)` of curvature -c_from.
        c_from: their curvature parameter.
        c_to: the new curvature parameter.

    Returns:
        Points `(*batch dim)` of curvature -c_to, at the same k*dist0.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    nm.check_vectors({"x": x})
    tensors = {
        name: value for name, value in (("x", x), ("c_from", c_from), ("c_to", c_to)) if isinstance(value, Tensor)
    }
    dtype = nm.compute_dtype(tensors)
    c_from = nm.curvature_tensor(c_from, dtype, x.device, name="c_from", leading=x.shape[:-1])
    c_to = nm.curvature_tensor(c_to, dtype, x.device, name="c_to", leading=x.shape[:-1])
    return x.to(dtype) * (c_from / c_to).sqrt().unsqueeze(-1)
