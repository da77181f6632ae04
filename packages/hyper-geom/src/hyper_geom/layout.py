"""Points of any dimension on the Poincare disk with their radius kept, and the picture as SVG or HTML.

References: Kruskal, "Multidimensional scaling by optimizing goodness of fit", 1964 (stress); Guo, Guo and Yu, "CO-SNE",
CVPR 2022 (the problem). Keeping the radius and solving for the angles alone is ours. Nothing here needs matplotlib.
"""

import html as _html
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom import convert, lorentz, poincare
from hyper_geom.trees import _order, _parents, rank_correlation

__all__ = ["Layout", "layout", "to_html", "to_svg"]
# Pairs a step scores; a picture of more points than this allows is drawn from samples of them.
_PAIRS = 2**15
_COLOURS = (
    "#4c72b0",
    "#dd8452",
    "#55a868",
    "#c44e52",
    "#8172b3",
    "#937860",
    "#da8bc3",
    "#8c8c8c",
    "#ccb974",
    "#64b5cd",
)


class Layout(NamedTuple):
    """A picture and how far it can be believed.

    Attributes:
        points: on the disk of radius 1, `(n 2)`: ball points at c = 1 with the depth k dist0 of the given ones.
        radius_error: largest change of k dist0.
        distance_rank: rank correlation of the distances in the picture and in space, in [-1, 1].
        stress: sqrt(sum (d - d_space)^2 / sum d_space^2).
        neighbours: mean share of each point's 10 nearest (or all, of fewer) that are among its 10 nearest in the picture.
    """

    points: Float[Tensor, "n 2"]
    radius_error: float
    distance_rank: float
    stress: float
    neighbours: float


def layout(
    x: Tensor,
    edges: Tensor | None = None,
    *,
    c: float | Tensor = 1.0,
    model: str = "lorentz",
    num_steps: int = 300,
    generator: torch.Generator | None = None,
) -> Layout:
    """Place points of any dimension on the disk: each keeps its distance to the origin, the angles minimise the stress.

    min over angles of the mean of (d_picture(i, j)/d(i, j) - 1)^2, from the two principal directions, or from the
    sectors of a tree, whichever ends lower.

    Args:
        x: points `(n dim)`.
        edges: int64 `(e 2)`, (parent, child) of a tree on the points, for a start without crossings.
        c: curvature parameter.
        model: "lorentz" or "poincare".
        num_steps: steps from each start.
        generator: source of the pairs where there are more than 32,768.

    Returns:
        The picture with its fidelity; see `Layout`.

    Raises:
        ValueError: x is no matrix, edges are no tree, unknown model.
    """
    nm.check_choice("model", model, ("lorentz", "poincare"))
    if x.ndim != 2:
        raise ValueError(f"x must have shape (n, dim), got {tuple(x.shape)}")
    x = x.detach().to("cpu", torch.float64)
    c = nm.curvature_tensor(c, torch.float64, torch.device("cpu")) if not isinstance(c, Tensor) else c.detach().cpu()
    x = (x if model == "lorentz" else convert.poincare_to_lorentz(x, c=c)) * c.double().sqrt()
    radius, wanted = lorentz.dist0(x), lorentz.dist(x.unsqueeze(1), x)
    starts = [_principal_angles(x)]
    if edges is not None:
        starts.append(_sector_angles(edges.cpu(), len(x)))
    tries = [_solve(start, radius, wanted, num_steps, generator) for start in starts]
    angle = min(tries, key=lambda found: found[1])[0]
    direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
    points = poincare.exp_map0(direction * radius.unsqueeze(-1) / 2)
    return Layout(points, *_fidelity(points, radius, wanted))


def _principal_angles(x: Tensor) -> Tensor:
    tangent = lorentz.log_map0(x)
    if x.shape[1] > 2 and len(x) > 2:
        tangent = tangent @ torch.linalg.svd(tangent, full_matrices=False)[2][:2].mT
    if tangent.shape[1] == 1:
        return torch.where(tangent[:, 0] < 0, math.pi, 0.0).to(tangent)
    return torch.atan2(tangent[:, 1], tangent[:, 0])


def _sector_angles(edges: Tensor, num: int) -> Tensor:
    """The middle of each node's sector, sectors as wide as their number of leaves."""
    parent = _parents(edges, num)
    order = _order(parent)
    leaves = [0.0] * num
    for node in reversed(order):
        leaves[node] = leaves[node] or 1.0
        if parent[node] >= 0:
            leaves[parent[node]] += leaves[node]
    used, angle = [0.0] * num, torch.zeros(num, dtype=torch.float64)
    left = [0.0] * num
    for node in order[1:]:
        above = parent[node]
        left[node] = left[above] + used[above]
        used[above] += leaves[node]
        angle[node] = 2 * math.pi * (left[node] + leaves[node] / 2) / leaves[order[0]]
    return angle


def _solve(
    start: Tensor, radius: Tensor, wanted: Tensor, num_steps: int, generator: torch.Generator | None
) -> tuple[Tensor, float]:
    num = len(start)
    every = torch.triu_indices(num, num, offset=1)
    if every.shape[1] == 0:
        return start, 0.0
    angle = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([angle], lr=0.1)
    half = (radius / 2).unsqueeze(-1)

    def loss(pick: Tensor) -> Tensor:
        points = 2 * half * torch.stack((angle.cos(), angle.sin()), dim=-1)
        found = lorentz.tangent0_dist(points[pick[0]], points[pick[1]])
        return (nm.safe_div(found, wanted[pick[0], pick[1]]) - 1).square().mean()

    with torch.no_grad():
        best = start, loss(every).item()
    with torch.enable_grad():
        for step in range(num_steps):
            pick = every
            if every.shape[1] > _PAIRS:
                pick = every[:, torch.randint(every.shape[1], (_PAIRS,), generator=generator)]
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / num_steps)) / 2
            optimizer.zero_grad()
            loss(pick).backward()
            optimizer.step()
    with torch.no_grad():
        return min(best, (angle.detach(), loss(every).item()), key=lambda found: found[1])


def _fidelity(points: Tensor, radius: Tensor, wanted: Tensor) -> tuple[float, float, float, float]:
    num = len(points)
    if num < 2:
        return 0.0, 1.0, 0.0, 1.0
    found = poincare.dist(points.unsqueeze(1), points)
    rows, columns = torch.triu_indices(num, num, offset=1)
    a, b = found[rows, columns], wanted[rows, columns]
    nearest = min(10, num - 1)
    sets = []
    for matrix in (found, wanted):
        near = matrix.clone().fill_diagonal_(torch.inf).topk(nearest, largest=False).indices
        sets.append(torch.zeros(num, num, dtype=torch.bool).scatter_(1, near, True))
    shared = (sets[0] & sets[1]).sum().item() / (num * nearest)
    stress = ((a - b).square().sum() / b.square().sum().clamp(min=1e-300)).sqrt().item()
    return (poincare.dist0(points) - radius).abs().max().item(), rank_correlation(a, b), stress, shared


def to_svg(
    picture: Layout | Tensor,
    edges: Tensor | None = None,
    *,
    labels: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
    thumbnails: Sequence[str | None] | None = None,
    size: int = 640,
) -> str:
    """The disk with its points, tree edges as geodesics, and thumbnails, as one SVG element.

    Args:
        picture: what `layout` returns, or points `(n 2)` of the disk of radius 1.
        edges: pairs to connect.
        labels: shown when the pointer rests on a point.
        groups: a colour for each point, by number.
        thumbnails: an address (or a `data:` address) of a picture to draw in place of a point, None for none.
        size: width and height in pixels, > 0.

    Returns:
        The text of an SVG file.

    Raises:
        ValueError: points that are not two-dimensional, or lists of another length.

    >>> to_svg(torch.zeros(1, 2), labels=["root"]).count("<circle")
    2
    """
    points = (picture.points if isinstance(picture, Layout) else picture).detach().double().cpu()
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"picture must hold points (n 2), got shape {tuple(points.shape)}")
    num = len(points)
    for name, value in (("labels", labels), ("groups", groups), ("thumbnails", thumbnails)):
        if value is not None and len(value) != num:
            raise ValueError(f"{name} must have {num} entries, got {len(value)}")
    nm.check_positive("size", size)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1.03 -1.03 2.06 2.06" width="{size}" height="{size}">',
        '<circle cx="0" cy="0" r="1" fill="#ffffff" stroke="#555555" stroke-width="0.006"/>',
    ]
    if edges is not None and (edges.ndim != 2 or edges.shape[1] != 2 or edges.is_floating_point()):
        raise ValueError(f"edges must be integer pairs (e 2), got {edges.dtype} {tuple(edges.shape)}")
    if edges is not None and len(edges):
        t = torch.linspace(0, 1, 17, dtype=torch.float64)
        a, b = points[edges[:, 0]].unsqueeze(1), points[edges[:, 1]].unsqueeze(1)
        for arc in poincare.geodesic(a, b, t).tolist():
            path = " ".join(f"{u:.4f},{-v:.4f}" for u, v in arc)
            lines.append(f'<polyline points="{path}" fill="none" stroke="#999999" stroke-width="0.004"/>')
    for i, (u, v) in enumerate(points.tolist()):
        # Things shrink towards the rim as the metric does, down to a third.
        dot = 0.014 * max(1 / 3, 1 - (u * u + v * v))
        title = "" if labels is None else f"<title>{_html.escape(str(labels[i]))}</title>"
        image = None if thumbnails is None else thumbnails[i]
        if image is None:
            colour = _COLOURS[(0 if groups is None else int(groups[i])) % len(_COLOURS)]
            lines.append(f'<circle cx="{u:.4f}" cy="{-v:.4f}" r="{dot:.4f}" fill="{colour}">{title}</circle>')
        else:
            side = 6 * dot
            lines.append(
                f'<image href="{_html.escape(image)}" x="{u - side / 2:.4f}" y="{-v - side / 2:.4f}" '
                f'width="{side:.4f}" height="{side:.4f}">{title}</image>'
            )
    return "\n".join([*lines, "</svg>"])


def to_html(picture: Layout, edges: Tensor | None = None, *, title: str = "Layout", **options) -> str:
    """A page of its own: the SVG of `to_svg` and the picture's fidelity beneath it.

    Args:
        picture: what `layout` returns.
        edges: pairs to connect.
        title: heading of the page.
        **options: as in `to_svg`.

    Returns:
        The text of an HTML file that needs nothing else.
    """
    note = (
        f"Distances to the centre are kept to {picture.radius_error:.1g}. Of the distances between points the ranks are kept "
        f"to {picture.distance_rank:.2f}, the stress is {picture.stress:.2f}; {picture.neighbours:.0%} of the nearest "
        "neighbours are neighbours in the picture."
    )
    name = _html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title></head>\n'
        f'<body style="font-family:sans-serif;margin:2em">\n<h1>{name}</h1>\n{to_svg(picture, edges, **options)}\n'
        f"<p>{note}</p>\n</body></html>\n"
    )
