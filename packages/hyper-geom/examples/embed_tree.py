"""Embed a binary tree in two dimensions and compare the hyperbolic plane with the Euclidean one.

    python packages/hyper-geom/examples/embed_tree.py
    python packages/hyper-geom/examples/embed_tree.py --optimizer riemannian   # needs hyper-geom[geoopt]

Both planes start from a drawing of the tree without crossings and minimise the mean squared relative error of all
pairwise distances. Distortion is the mean of |d / d_tree - 1|.
"""

import argparse
import math

import torch
from torch import Tensor

from hyper_geom import gromov_delta, lorentz


def binary_tree(depth: int) -> tuple[Tensor, Tensor]:
    """Parents (n,), the root being its own, and graph distances (n n) of a complete binary tree."""
    num_nodes = 2 ** (depth + 1) - 1
    parents = torch.clamp((torch.arange(num_nodes) - 1) // 2, min=0)
    distances = torch.zeros(num_nodes, num_nodes)
    for node in range(1, num_nodes):
        # Nodes are numbered level by level: every earlier node is reached through the parent.
        distances[node, :node] = distances[:node, node] = distances[parents[node], :node] + 1
    return parents, distances


def sector_layout(parents: Tensor, edge: float) -> Tensor:
    """Euclidean drawing (n, 2): radius proportional to the level, each child in its half of the parent's sector."""
    num_nodes = len(parents)
    radius, angle, width = torch.zeros(num_nodes), torch.zeros(num_nodes), torch.full((num_nodes,), 2 * math.pi)
    for node in range(1, num_nodes):
        parent, side = parents[node], 1 - 2 * (node % 2)
        radius[node] = radius[parent] + edge
        width[node] = width[parent] / 2
        angle[node] = angle[parent] + side * width[parent] / 4
    return radius[:, None] * torch.stack((angle.cos(), angle.sin()), dim=-1)


def even_fan_layout(parents: Tensor, edge: float) -> Tensor:
    """Hyperbolic drawing (n, 2), Lorentz points: the three edges at a node have length `edge` and turn by 120 degrees.

    Sarkar, "Low distortion Delaunay embedding of trees in hyperbolic plane", 2011: there is room for all of them.
    """
    points = torch.zeros(len(parents), 2)
    third = 2 * math.pi / 3
    for node in range(1, len(parents)):
        here, side = points[parents[node]], 1 - 2 * (node % 2)
        # The way back to the grandparent, seen in the flat tangent space of the origin, turned by a third.
        back = lorentz.parallel_transport0_back(here, lorentz.log_map(here, points[parents[parents[node]]]))
        angle = torch.atan2(back[1], back[0]) + side * third if back.any() else torch.tensor(side * math.pi / 2)
        step = edge * torch.stack((angle.cos(), angle.sin()))
        points[node] = lorentz.exp_map(here, lorentz.parallel_transport0(here, step))
    return points


def embed(
    parents: Tensor,
    targets: Tensor,
    *,
    space: str = "hyperbolic",
    optimizer: str = "tangent",
    edge: float = 1.5,
    num_steps: int = 300,
    lr: float = 0.02,
) -> tuple[Tensor, float]:
    """Coordinates (n, 2) and mean distortion; hyperbolic ones are Lorentz points, `edge` long edges at c = 1."""
    start = sector_layout(parents, edge) if space == "euclidean" else even_fan_layout(parents, edge)
    rows, columns = torch.triu_indices(len(parents), len(parents), offset=1)
    wanted = edge * targets[rows, columns]
    if space == "euclidean":
        parameter = torch.nn.Parameter(start)

        def distances() -> Tensor:
            return (parameter[rows] - parameter[columns]).norm(dim=-1)
    elif optimizer == "tangent":
        parameter = torch.nn.Parameter(lorentz.log_map0(start))

        def distances() -> Tensor:
            points = lorentz.exp_map0(parameter)
            return lorentz.dist(points[rows], points[columns])
    else:
        import geoopt

        from hyper_geom.riemannian import Lorentz

        manifold = Lorentz(c=1.0)
        parameter = geoopt.ManifoldParameter(start, manifold=manifold)

        def distances() -> Tensor:
            return manifold.dist(parameter[rows], parameter[columns])

    if space == "hyperbolic" and optimizer == "riemannian":
        step_rule = geoopt.optim.RiemannianAdam([parameter], lr=3 * lr)  # one rate per point, not per coordinate
    else:
        step_rule = torch.optim.Adam([parameter], lr=lr)
    for _ in range(num_steps):
        step_rule.zero_grad()
        (distances() / wanted - 1).square().mean().backward()
        step_rule.step()
    with torch.no_grad():
        distortion = (distances() / wanted - 1).abs().mean().item()
        final = parameter.detach().clone()
        if space == "hyperbolic" and optimizer == "tangent":
            final = lorentz.exp_map0(final)
    return final, distortion


def main() -> None:
    """Print how tree-like the metric is and the distortion of each embedding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--optimizer", choices=("tangent", "riemannian"), default="tangent")
    options = parser.parse_args()
    parents, targets = binary_tree(options.depth)
    print(f"binary tree of depth {options.depth}, {len(parents)} nodes")
    for space in ("euclidean", "hyperbolic"):
        points, distortion = embed(parents, targets, space=space, optimizer=options.optimizer, num_steps=options.steps)
        metric = torch.cdist(points, points) if space == "euclidean" else lorentz.pairwise_dist(points, points)
        relative = gromov_delta(metric, "fixed_base").relative.item()
        print(f"{space:>10}: mean distortion {100 * distortion:5.2f} %, relative delta of the result {relative:.3f}")
    print(f"relative delta of the tree itself: {gromov_delta(targets, 'fixed_base').relative.item():.3f}")


if __name__ == "__main__":
    main()
