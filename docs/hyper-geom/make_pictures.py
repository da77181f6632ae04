"""Draw the pictures of the guide: `python docs/hyper-geom/make_pictures.py` writes them beside this file.

Needs `hyper-geom[plot]` and a checkout (the tree comes from packages/hyper-geom/examples). Everything is seeded.
"""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image

from hyper_geom import WrappedNormal, convert, lorentz, plot

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "packages" / "hyper-geom" / "examples"))
from embed_tree import binary_tree, embed  # noqa: E402

BLUE, ORANGE, GREEN, RED, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#c53030", "#718096"


def save(figure, name: str) -> None:
    path = HERE / f"{name}.png"
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.05, facecolor="white")
    plt.close(figure)
    # A palette is enough for flat drawings and makes the files a third as large.
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def to_disk(x: torch.Tensor):
    return convert.lorentz_to_poincare(x).numpy()


def at(radius: float, degrees: float) -> torch.Tensor:
    """Lorentz point at a distance from the origin and a direction."""
    angle = math.radians(degrees)
    return lorentz.exp_map0(radius * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64))


def geodesics() -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.2))
    for ax in (left, middle, right):
        plot.disk(ax=ax)
    apex = at(1.2, 200)
    for degrees in range(0, 180, 20):
        u = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], dtype=torch.float64)
        v = lorentz.parallel_transport0(apex, 9.0 * u)
        plot.geodesic(lorentz.exp_map(apex, -v), lorentz.exp_map(apex, v), ax=left, colors=BLUE, linewidths=1.1)
    plot.points(apex, ax=left, color=ORANGE, s=45)
    left.set_title("geodesics through one point", fontsize=11)

    corners = torch.stack((at(2.6, 90), at(2.0, 215), at(3.0, 330)))
    centre = lorentz.midpoint(corners)
    plot.geodesic(corners, corners.roll(1, 0), ax=middle, colors=BLUE, linewidths=1.6)
    plot.geodesic(centre, corners, ax=middle, colors=GREY, linewidths=0.9, linestyles="--")
    plot.points(corners, ax=middle, color=ORANGE, s=45)
    plot.points(centre, ax=middle, color=GREEN, s=45, marker="D")
    middle.set_title("a triangle and the midpoint of its corners", fontsize=11)

    # The same circle carried outward: equally large everywhere, ever smaller on paper.
    turn = torch.linspace(0, 2 * math.pi, 120, dtype=torch.float64)
    ring = 0.4 * torch.stack((turn.cos(), turn.sin()), dim=-1)
    for place in [at(0, 0)] + [at(0.9 * steps, degrees) for steps in range(1, 5) for degrees in range(0, 360, 45)]:
        circle = to_disk(lorentz.exp_map(place, lorentz.parallel_transport0(place, ring)))
        right.fill(*circle.T, facecolor=BLUE, alpha=0.25)
        right.plot(*circle.T, color=BLUE, linewidth=0.8)
    right.set_title("circles of one radius", fontsize=11)
    save(figure, "geodesics")


def cones() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6))
    for ax in (left, right):
        plot.disk(ax=ax)
    apexes = (at(0.25, 100), at(0.7, 225), at(1.5, 340))
    for apex, colour, shift in zip(apexes, (BLUE, GREEN, ORANGE), ((9, -22), (9, -22), (-14, -34)), strict=True):
        plot.cone(apex, ax=left, facecolors=colour, alpha=0.25)
        plot.points(apex, ax=left, color=colour, s=45)
        aperture = math.degrees(lorentz.half_aperture(apex).item())
        label(left, apex, f"depth {lorentz.dist0(apex).item():.2f}\n{aperture:.0f} deg", shift, "0.2")
    left.set_title("the half-aperture narrows away from the origin", fontsize=11)

    parent, inside, outside = at(0.5, 180), at(2.0, 168), at(1.7, 100)
    plot.cone(parent, ax=right, facecolors=BLUE, alpha=0.2)
    plot.geodesic(torch.zeros_like(parent), at(8.0, 180), ax=right, colors=GREY, linewidths=0.9, linestyles="--")
    plot.geodesic(parent, torch.stack((inside, outside)), ax=right, colors=[GREEN, RED], linewidths=1.6)
    plot.points(parent, ax=right, color=BLUE, s=50)
    plot.points(torch.zeros(1, 2), ax=right, color="0.2", s=20)
    label(right, parent, "parent", (-2, -18), BLUE)
    label(right, torch.zeros(2), "origin", (6, -12), "0.2")
    for child, name, shift, colour in ((inside, "entailed", (-14, 12), GREEN), (outside, "violation", (12, -8), RED)):
        plot.points(child, ax=right, color=colour, s=45)
        angle = math.degrees(lorentz.exterior_angle(parent, child).item())
        label(right, child, f"{name}\nangle {angle:.0f} deg", shift, colour)
    aperture = math.degrees(lorentz.half_aperture(parent).item())
    right.set_title(f"half-aperture of the parent: {aperture:.0f} deg", fontsize=11)
    save(figure, "cones")


def label(ax, x: torch.Tensor, text: str, shift: tuple[int, int], colour: str) -> None:
    ax.annotate(text, xy=to_disk(x), xytext=shift, textcoords="offset points", fontsize=9, color=colour)


def wrapped_normal() -> None:
    torch.manual_seed(0)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2))
    flat = torch.tensor([[0.9, 0.0], [0.45, 0.3]], dtype=torch.float64)
    laws = (
        ("at the origin, scale 0.5", WrappedNormal(torch.zeros(2, dtype=torch.float64), 0.5)),
        ("the same scale, farther out", WrappedNormal(at(2.0, 35), 0.5)),
        ("full covariance", WrappedNormal(at(1.0, 200), scale_tril=flat)),
    )
    steps = torch.linspace(-0.995, 0.995, 260, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
    outside = grid.square().sum(-1) > 0.99
    on_grid = convert.poincare_to_lorentz(torch.where(outside[..., None], 0.0, grid))
    for ax, (title, law) in zip(axes, laws, strict=True):
        plot.disk(ax=ax)
        # Density per Riemannian area; the levels lie 0.5, 2 and 4.5 below the top.
        density = law.log_prob(on_grid).masked_fill(outside, -math.inf)
        top = law.log_prob(law.mode)
        levels = [float(top) - 4.5, float(top) - 2.0, float(top) - 0.5]
        ax.contour(steps, steps, density.clamp(min=-1e3), levels=levels, colors=ORANGE, linewidths=1.2, linestyles="-")
        plot.points(law.sample((350,)), ax=ax, color=BLUE, s=5, alpha=0.5, linewidths=0)
        plot.points(law.mode, ax=ax, color=RED, s=30, marker="x")
        ax.set_title(title, fontsize=11)
    save(figure, "wrapped_normal")


def tree() -> None:
    parents, targets = binary_tree(5)
    level = torch.floor(torch.log2(torch.arange(1, len(parents) + 1).float()))
    style = {"cmap": "viridis_r", "edgecolors": "white", "linewidths": 0.4, "zorder": 3}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5))

    flat, distortion = embed(parents, targets, space="euclidean")
    for child, parent in zip(flat[1:], flat[parents[1:]], strict=True):
        left.plot(*torch.stack((child, parent)).T.numpy(), color=GREY, linewidth=0.8, zorder=1)
    left.scatter(*flat.T.numpy(), c=level, s=30, **style)
    left.set_aspect("equal")
    left.set_axis_off()
    left.set_title(f"Euclidean plane: mean distortion {100 * distortion:.0f} %", fontsize=11)

    # Edges of length 1 draw well; with 1.5 the distortion halves again and the leaves touch the circle.
    points, distortion = embed(parents, targets, edge=1.0)
    plot.disk(ax=right)
    plot.geodesic(points[1:], points[parents[1:]], ax=right, colors=GREY, linewidths=0.8)
    plot.points(points, values=level, ax=right, s=40 * 0.68**level, **style)
    right.set_title(f"hyperbolic plane: mean distortion {100 * distortion:.0f} %", fontsize=11)
    save(figure, "tree")


if __name__ == "__main__":
    geodesics()
    cones()
    wrapped_normal()
    tree()
