"""Pictures on the Poincare disk: points, geodesics and entailment cones of two-dimensional hyperbolic space.

References: Ganea, Becigneul and Hofmann, "Hyperbolic entailment cones", ICML 2018 (cones in the ball, section 4).
Points of more dimensions go through `hyper_geom.layout`.
Everything is drawn in ball coordinates, in a disk of radius 1/sqrt(c); matplotlib is imported on the first call.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyper_geom import convert, poincare
from hyper_geom._numerics import check_choice, curvature_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection, PathCollection, PolyCollection

# Equal steps of hyperbolic length: on a segment of k * length 30 a chord is off its arc by 3e-4 of the disk's radius.
_NUM_SEGMENTS = 256


def _axes(ax: "Axes | None") -> "Axes":
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("hyper_geom.plot needs matplotlib: pip install 'hyper-geom[plot]'") from error
    return plt.gca() if ax is None else ax


def _in_ball(name: str, x: Tensor, c: float | Tensor, model: str) -> tuple[Tensor, Tensor]:
    """Points (n 2) of either model in ball coordinates, fp64 on the CPU, and c."""
    check_choice("model", model, ("lorentz", "poincare"))
    if x.ndim < 1 or x.shape[-1] != 2:
        raise ValueError(f"{name} must hold points of two coordinates (*b 2), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    x = x.detach().to("cpu", torch.float64).reshape(-1, 2)
    c = curvature_tensor(c, torch.float64, torch.device("cpu")).detach().cpu()
    return (convert.lorentz_to_poincare(x, c=c) if model == "lorentz" else poincare.project(x, c=c)), c


def disk(*, c: float | Tensor = 1.0, ax: "Axes | None" = None, **style: Any) -> "Axes":
    """Draw the boundary circle of radius 1/sqrt(c) and set up the axes: equal aspect, no frame.

    Args:
        c: positive curvature magnitude.
        ax: matplotlib axes; the current ones when left out.
        **style: passed to `matplotlib.patches.Circle`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: c is not positive.
    """
    ax = _axes(ax)
    from matplotlib.patches import Circle

    radius = float(curvature_tensor(c, torch.float64, torch.device("cpu"))) ** -0.5
    ax.add_patch(Circle((0, 0), radius, **{"facecolor": "none", "edgecolor": "0.3", "linewidth": 1.0} | style))
    ax.set(xlim=(-1.03 * radius, 1.03 * radius), ylim=(-1.03 * radius, 1.03 * radius), aspect="equal")
    ax.set_axis_off()
    return ax


def points(
    x: Tensor,
    *,
    values: Tensor | None = None,
    c: float | Tensor = 1.0,
    model: str = "lorentz",
    ax: "Axes | None" = None,
    **style: Any,
) -> "PathCollection":
    """Draw points.

    Args:
        x: points (*b 2) of the model.
        values: numbers (*b) to colour by, through `cmap` (matplotlib's own name for them, c, is the curvature here).
        c: positive curvature magnitude.
        model: "lorentz" (space components) or "poincare".
        ax: matplotlib axes; the current ones when left out.
        **style: passed to `Axes.scatter`.

    Returns:
        The scatter collection.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: x is not two-dimensional, values do not fit it, the model is unknown or c is not positive.
    """
    ax = _axes(ax)
    p, _ = _in_ball("x", x, c, model)
    if values is not None:
        if values.shape != x.shape[:-1]:
            raise ValueError(f"values must have shape {tuple(x.shape[:-1])}, got {tuple(values.shape)}")
        style["c"] = values.detach().cpu().reshape(-1).numpy()
    return ax.scatter(p[:, 0].numpy(), p[:, 1].numpy(), **{"s": 16, "zorder": 3} | style)


def geodesic(
    x: Tensor, y: Tensor, *, c: float | Tensor = 1.0, model: str = "lorentz", ax: "Axes | None" = None, **style: Any
) -> "LineCollection":
    """Draw the geodesic segments between pairs of points.

    Args:
        x: start points (*b 2) of the model.
        y: end points (*b 2), broadcast with x.
        c: positive curvature magnitude.
        model: "lorentz" (space components) or "poincare".
        ax: matplotlib axes; the current ones when left out.
        **style: passed to `matplotlib.collections.LineCollection`.

    Returns:
        The line collection, one line per pair.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: x or y is not two-dimensional, the shapes do not broadcast, the model is unknown or c is not
            positive.
    """
    ax = _axes(ax)
    from matplotlib.collections import LineCollection

    try:
        x, y = torch.broadcast_tensors(x, y)
    except RuntimeError:
        raise ValueError(f"x and y must broadcast, got shapes {tuple(x.shape)} and {tuple(y.shape)}") from None
    start, c = _in_ball("x", x, c, model)
    end, _ = _in_ball("y", y, c, model)
    steps = torch.linspace(0, 1, _NUM_SEGMENTS + 1, dtype=torch.float64)[:, None]
    lines = poincare.geodesic(start, end, steps, c=c)
    defaults: dict[str, Any] = {"colors": "0.4", "linewidths": 1.0, "zorder": 2}
    collection = LineCollection(list(lines.transpose(0, 1).numpy()), **defaults | style)
    ax.add_collection(collection)
    return collection


def cone(
    x: Tensor,
    *,
    c: float | Tensor = 1.0,
    min_radius: float = 0.1,
    model: str = "lorentz",
    ax: "Axes | None" = None,
    **style: Any,
) -> "PolyCollection":
    """Fill the entailment cones {y: exterior_angle(x, y) <= half_aperture(x)} up to the boundary of the disk.

    Args:
        x: apexes (*b 2) of the model; at the origin the cone is the whole disk.
        c: positive curvature magnitude.
        min_radius: K of the half-aperture.
        model: "lorentz" (space components) or "poincare".
        ax: matplotlib axes; the current ones when left out.
        **style: passed to `matplotlib.collections.PolyCollection`.

    Returns:
        The polygon collection, one polygon per apex.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: x is not two-dimensional, the model is unknown, or c or min_radius is not positive.
    """
    ax = _axes(ax)
    from matplotlib.collections import PolyCollection

    p, c = _in_ball("x", x, c, model)
    aperture = poincare.half_aperture(p, c=c, min_radius=min_radius)
    polygons = [_cone_polygon(apex, float(angle), math.sqrt(c)) for apex, angle in zip(p, aperture, strict=True)]
    defaults: dict[str, Any] = {"facecolors": "C0", "alpha": 0.2, "edgecolors": "none", "zorder": 1}
    collection = PolyCollection(polygons, **defaults | style)
    ax.add_collection(collection)
    return collection


def _cone_polygon(apex: Tensor, aperture: float, k: float) -> Any:
    """Corners (m 2) of one cone, by complex numbers in the unit disk."""
    a = k * torch.complex(apex[0], apex[1])
    if a == 0:
        turn = torch.linspace(0, 2 * math.pi, 2 * _NUM_SEGMENTS, dtype=torch.float64)
        corners = torch.polar(torch.ones_like(turn), turn)
    else:
        steps = torch.linspace(0, 1, _NUM_SEGMENTS, dtype=torch.float64)

        def edge(side: float) -> Tensor:
            # A ray from the apex is the image of a radius of the disk under z -> (a + z)/(1 + conj(a) z).
            ray = steps * torch.polar(torch.ones((), dtype=torch.float64), a.angle() + side * aperture)
            return (a + ray) / (1 + a.conj() * ray)

        lower, upper = edge(-1.0), edge(1.0)
        # The ideal points lie within half a turn of the apex's direction: an arc through that direction joins them.
        first, last = (lower[-1] / a).angle(), (upper[-1] / a).angle()
        arc = torch.polar(torch.ones_like(steps), a.angle() + first + steps * (last - first))
        corners = torch.cat((lower, arc, upper.flip(0)))
    return torch.view_as_real(corners / k).numpy()
