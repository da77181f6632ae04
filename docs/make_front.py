"""Draw the README's picture: `python docs/make_front.py RUN PICTURE` with a finished run of the recipe `emoji`.

Left: the tree of 853 emoji on the Poincare disk, and the path that the run's product
predicts for the picture. Right: its probabilities, level by level.
"""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from app_data.read.pictures import load_picture
from app_data.sets.emoji import emoji_taxonomy
from app_eval.ask.frozen import FrozenClassifier
from app_eval.ask.predict import find_model
from hyper_geom import convert, lorentz, plot

HERE = Path(__file__).resolve().parent
COLOURS = ("#2b6cb0", "#2f855a", "#b7791f", "#805ad5", "#0e7490", "#4a5568")
PATH = "#c53030"
# Hyperbolic distance of each level from the root.
RADII = (0.0, 1.3, 2.5, 4.2)


def tree(ax, tax, path: list[int]) -> None:
    """The taxonomy on the disk with one path: each subtree has a sector as wide as its leaves, each level its radius."""
    parent = tax.parent + 1  # the root, which the taxonomy does not count, is node 0 here
    nodes = torch.arange(tax.num_nodes) + 1
    leaves = sorted(tax.leaf.tolist(), key=lambda leaf: tax.paths[leaf].tolist())
    spot = {leaf: number / len(leaves) for number, leaf in enumerate(leaves)}
    below: list[list[float]] = [[] for _ in nodes]
    for leaf in leaves:
        for node in tax.paths[leaf].tolist():
            below[node].append(spot[leaf])
    angle = 2 * math.pi * torch.tensor([0.0, *(sum(spots) / len(spots) for spots in below)], dtype=torch.float64)
    radius = torch.tensor(RADII, dtype=torch.float64)[torch.tensor([0, *tax.depth.tolist()])]
    points = lorentz.exp_map0(radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1))
    top = tax.paths[:, 0]
    plot.disk(ax=ax)
    for number, group in enumerate(top.unique().tolist()):
        inside = nodes[top == group]
        colour = COLOURS[number % len(COLOURS)]
        plot.geodesic(points[parent[inside - 1]], points[inside], ax=ax, colors=colour, linewidths=0.4, alpha=0.7)
        plot.points(points[inside], ax=ax, color=colour, s=2.5)
    steps = torch.tensor([0, *(node + 1 for node in path)])
    plot.geodesic(points[steps[:-1]], points[steps[1:]], ax=ax, colors=PATH, linewidths=2.2, zorder=5)
    plot.points(points[steps], ax=ax, color=PATH, s=22, zorder=6)
    x, y = convert.lorentz_to_poincare(points[steps[-1]]).tolist()
    ax.annotate(tax.names[path[-1]], (x, y), (1.12 * x / (x * x + y * y) ** 0.5, 1.12 * y / (x * x + y * y) ** 0.5),
                color=PATH, fontsize=11, ha="left" if x > 0 else "right", va="center")  # fmt: skip
    ax.set_title(
        f"{tax.num_leaves} emoji in the hyperbolic plane: {tax.level_sizes[0]} groups, {tax.level_sizes[1]} subgroups",
        fontsize=10,
    )


def bars(ax, prediction) -> None:
    """The probabilities of a predicted path."""
    rows = range(len(prediction.names))[::-1]
    ax.barh(list(rows), prediction.probabilities, color=PATH, height=0.45)
    for row, name, value in zip(rows, prediction.names, prediction.probabilities, strict=True):
        ax.text(0, row + 0.36, f"{name}  {value:.2f}", fontsize=11)
    ax.set(
        xlim=(0, 1),
        ylim=(-0.6, len(prediction.names) - 0.3),
        yticks=[],
        xlabel="probability among the nodes of the level",
    )
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_title("the path predicted for a picture by an artist never seen", fontsize=10)


def main(run: Path, picture: Path) -> None:
    """Write front.png beside this file."""
    model, tax = FrozenClassifier.load(find_model(run)), emoji_taxonomy()
    prediction = model.predict([load_picture(picture, model.size)])[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 5), width_ratios=(1.25, 1))
    tree(left, tax, list(prediction.nodes))
    bars(right, prediction)
    figure.savefig(HERE / "front.png", dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
