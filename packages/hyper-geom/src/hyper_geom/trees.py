"""Trees in hyperbolic space: an embedding to start from, and how faithful an embedding is to its tree.

References: Sarkar, "Low distortion Delaunay embedding of trees in hyperbolic plane", 2011 (the layout); Nickel and
Kiela, "Poincare embeddings for learning hierarchical representations", NeurIPS 2017 (mean average precision); Sala et
al., "Representation tradeoffs for hyperbolic embeddings", ICML 2018 (distortion); Ganea et al., ICML 2018 (cones).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom import convert, lorentz
from hyper_geom.cones import is_entailed

__all__ = [
    "TreeFit",
    "cone_scores",
    "distortion",
    "embed_tree",
    "graph_distances",
    "rank_correlation",
    "reconstruction_map",
    "tree_fit",
]
# Pairs scored at a time by the optimisation.
_PAIRS = 2**16


class TreeFit(NamedTuple):
    """What `tree_fit` finds.

    Attributes:
        distortion: mean of |s d/d_tree - 1| at the best scale s, >= 0.
        worst: largest d/d_tree over the smallest, >= 1.
        mean_average_precision: of the neighbours of each node among all by distance, in (0, 1].
        depth_radius: rank correlation of depth and distance to the origin, in [-1, 1].
        parent_order: share of edges whose parent is nearer to the origin.
        cone_precision: share of entailed pairs that are ancestor and descendant; NaN where nothing is entailed.
        cone_recall: share of ancestor-descendant pairs that are entailed.
    """

    distortion: float
    worst: float
    mean_average_precision: float
    depth_radius: float
    parent_order: float
    cone_precision: float
    cone_recall: float


def _check_edges(edges: Tensor, num: int) -> None:
    """ValueError unless these are pairs of so many nodes."""
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype != torch.int64:
        raise ValueError(
            f"edges must be an int64 tensor (e 2) of (parent, child), got {edges.dtype} {tuple(edges.shape)}"
        )
    if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= num):
        raise ValueError(f"edges must name nodes in 0..{num - 1}, got {int(edges.min())}..{int(edges.max())}")


def _parents(edges: Tensor, num: int) -> list[int]:
    """Each node's parent, -1 at the root."""
    _check_edges(edges, num)
    parent = [-1] * num
    for a, b in edges.tolist():
        if parent[b] != -1:
            raise ValueError(f"edges must give each node one parent, got {parent[b]} and {a} for {b}")
        parent[b] = a
    if len(edges) != num - 1:
        raise ValueError(f"edges must connect {num} nodes to one tree, got {len(edges)} edges")
    return parent


def _order(parent: list[int]) -> list[int]:
    """Nodes, parents first."""
    children: list[list[int]] = [[] for _ in parent]
    for node, above in enumerate(parent):
        if above >= 0:
            children[above].append(node)
    order = [parent.index(-1)] if -1 in parent else []
    for node in order:
        order += children[node]
    if len(order) != len(parent):
        raise ValueError("edges must have no cycle")
    return order


def graph_distances(edges: Tensor, num_nodes: int) -> Float[Tensor, "n n"]:
    """Numbers of edges between all nodes of a tree.

    Args:
        edges: int64 `(e 2)`, (parent, child).
        num_nodes: number of nodes.

    Returns:
        Distances in fp64.

    Raises:
        ValueError: edges that are no tree on 0..num_nodes-1.

    >>> graph_distances(torch.tensor([[0, 1], [0, 2]]), 3)[1].tolist()
    [1.0, 0.0, 2.0]
    """
    parent = _parents(edges, num_nodes)
    found = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    seen: list[int] = []
    for node in _order(parent):
        if seen:
            # Every node placed before is reached through the parent.
            found[node, seen] = found[seen, node] = found[parent[node], seen] + 1
        seen.append(node)
    return found.to(edges.device)


def _spread(count: int, dim: int, generator: torch.Generator | None) -> Tensor:
    """Unit vectors that repel each other; evenly around the circle in two dimensions, the first along the first axis."""
    if dim == 2 or count == 1:
        angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
        found = torch.zeros(count, dim, dtype=torch.float64)
        found[:, 0], found[:, min(1, dim - 1)] = angle.cos(), angle.sin() if dim > 1 else angle.cos()
        return found
    found = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    found = found / found.norm(dim=1, keepdim=True)
    for _ in range(100):
        gap = found.unsqueeze(1) - found
        push = (gap / (gap.square().sum(-1, keepdim=True) + torch.eye(count).double().unsqueeze(-1))).sum(1)
        found = found + 0.3 / count * push
        found = found / found.norm(dim=1, keepdim=True)
    return found


def _carry(vectors: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The reflection that takes unit vector `start` to `end`."""
    axis = start - end
    return vectors - 2 * nm.safe_div((vectors @ axis).unsqueeze(-1) * axis, axis @ axis)


def embed_tree(
    edges: Tensor,
    num_nodes: int | None = None,
    dim: int = 2,
    *,
    c: float = 1.0,
    edge_length: float = 1.0,
    num_steps: int = 200,
    lr: float = 0.02,
    model: str = "lorentz",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n dim"]:
    """Points of a tree's nodes whose distances are close to the numbers of edges between them, the root at the origin.

    Sarkar's layout: the edges at a node leave in directions that are spread evenly, so the longer the edges the smaller
    the distortion. Then Adam lowers the mean of (d/(edge_length d_tree) - 1)^2 in tangent coordinates.

    Args:
        edges: int64 `(e 2)`, (parent, child).
        num_nodes: number of nodes; one more than the largest number in `edges` by default.
        dim: dimension of the space, at least 2.
        c: curvature parameter.
        edge_length: length that an edge should have, > 0.
        num_steps: steps of the optimisation; 0 keeps the layout.
        lr: step size of the optimisation.
        model: "lorentz" or "poincare".
        generator: source of the directions for dim > 2 and of the pairs where there are more than 65,536.

    Returns:
        Points in fp64.

    Raises:
        ValueError: edges that are no tree, dim < 2, a number out of range, unknown model.

    >>> points = embed_tree(torch.tensor([[0, 1], [0, 2]]), 3, num_steps=0)
    >>> lorentz.dist(points[1], points[2]) > 1.4
    tensor(True)
    """
    nm.check_choice("model", model, ("lorentz", "poincare"))
    nm.check_positive("edge_length", edge_length)
    if dim < 2 or num_steps < 0:
        raise ValueError(f"dim must be at least 2 and num_steps at least 0, got {dim} and {num_steps}")
    if num_nodes is None:
        num_nodes = int(edges.max()) + 1 if edges.numel() else 1
    parent = _parents(edges, num_nodes)
    order = _order(parent)
    children: list[list[int]] = [[] for _ in parent]
    for node in order[1:]:
        children[parent[node]].append(node)
    points = torch.zeros(num_nodes, dim, dtype=torch.float64)
    for node in order:
        if not children[node]:
            continue
        above = parent[node] >= 0
        ways = _spread(len(children[node]) + above, dim, generator)
        if above:
            back = lorentz.log_map_frame(points[node], points[parent[node]], c=c)
            ways = _carry(ways, ways[0].clone(), back / back.norm())[1:]
        points[children[node]] = lorentz.exp_map_frame(points[node], edge_length * ways, c=c)
    if num_steps and num_nodes > 1:
        points = _improved(
            points, edge_length * graph_distances(edges, num_nodes).cpu(), order[0], c, num_steps, lr, generator
        )
    return points if model == "lorentz" else convert.lorentz_to_poincare(points, c=c)


def _improved(
    points: Tensor, wanted: Tensor, root: int, c: float, num_steps: int, lr: float, generator: torch.Generator | None
) -> Tensor:
    every = torch.triu_indices(len(points), len(points), offset=1)
    free = torch.ones(len(points), 1, dtype=points.dtype)
    free[root] = 0  # a motion of the whole would not change the loss
    tangent = lorentz.log_map0(points, c=c).requires_grad_()
    optimizer = torch.optim.Adam([tangent], lr=lr)
    with torch.enable_grad():
        for step in range(num_steps):
            pick = every
            if every.shape[1] > _PAIRS:
                pick = every[:, torch.randint(every.shape[1], (_PAIRS,), generator=generator)]
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / num_steps)) / 2
            x = lorentz.exp_map0(free * tangent, c=c)
            loss = (lorentz.dist(x[pick[0]], x[pick[1]], c=c) / wanted[pick[0], pick[1]] - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lorentz.exp_map0((free * tangent).detach(), c=c)


def distortion(distances: Float[Tensor, "n n"], target: Float[Tensor, "n n"]) -> tuple[float, float]:
    """Mean and worst-case distortion of distances against those of a tree, whatever their unit.

    mean |s d/t - 1| at the s that minimises the mean square, and max(d/t)/min(d/t).

    Args:
        distances: of the embedding.
        target: of the tree.

    Returns:
        The mean, >= 0, and the worst case, >= 1.

    Raises:
        ValueError: shapes that differ or are no square of at least two nodes.
    """
    if (
        distances.ndim != 2
        or distances.shape != distances.mT.shape
        or distances.shape != target.shape
        or len(target) < 2
    ):
        raise ValueError(
            f"distances and target must share a shape (n, n), n >= 2, got {tuple(distances.shape)} and {tuple(target.shape)}"
        )
    rows, columns = torch.triu_indices(len(target), len(target), offset=1)
    ratio = distances.double()[rows, columns] / target.double()[rows, columns]
    scale = ratio.sum() / ratio.square().sum().clamp(min=1e-300)
    return (scale * ratio - 1).abs().mean().item(), (ratio.max() / ratio.min()).item()


def reconstruction_map(distances: Float[Tensor, "n n"], edges: Tensor) -> float:
    """Mean average precision of each node's neighbours in the tree among all nodes sorted by distance.

    Args:
        distances: of the embedding.
        edges: int64 `(e 2)`, (parent, child).

    Returns:
        In (0, 1]; 1 where every neighbour is nearer than every other node.

    Raises:
        ValueError: distances that are no square, or edges that are no pairs of its nodes.

    >>> reconstruction_map(torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 2.0], [1.0, 2.0, 0.0]]), torch.tensor([[0, 1], [0, 2]]))
    1.0
    """
    if distances.ndim != 2 or distances.shape != distances.mT.shape:
        raise ValueError(f"distances must have a shape (n, n), got {tuple(distances.shape)}")
    num = len(distances)
    _check_edges(edges, num)
    neighbour = torch.zeros(num, num, dtype=torch.bool, device=distances.device)
    neighbour[edges[:, 0], edges[:, 1]] = neighbour[edges[:, 1], edges[:, 0]] = True
    away = distances.clone().fill_diagonal_(torch.inf)
    hits = neighbour.gather(1, away.argsort(dim=1)).double()
    precision = hits.cumsum(1) / torch.arange(1, num + 1, device=distances.device)
    return ((precision * hits).sum(1) / hits.sum(1).clamp(min=1)).mean().item()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties at their mean rank; ValueError if they differ in length.

    >>> round(rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3])), 6)
    1.0
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a and b must be vectors of one length, got shapes {tuple(a.shape)} and {tuple(b.shape)}")

    def ranks(x: Tensor) -> Tensor:
        _, inverse, counts = x.double().unique(return_inverse=True, return_counts=True)
        rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()
        return rank - rank.mean()

    a, b = ranks(a), ranks(b)
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).item()


def _ancestors(edges: Tensor, num: int) -> Tensor:
    parent = _parents(edges, num)
    found = torch.zeros(num, num, dtype=torch.bool)
    for node in _order(parent)[1:]:
        found[:, node] = found[:, parent[node]]
        found[parent[node], node] = True
    return found


def cone_scores(
    points: Float[Tensor, "n dim"],
    edges: Tensor,
    *,
    c: float | Tensor = 1.0,
    model: str = "lorentz",
    min_radius: float = 0.1,
    aperture_scale: float = 1.0,
) -> tuple[float, float]:
    """Precision and recall of entailment cones for the pairs (ancestor, descendant).

    Args:
        points: of the nodes.
        edges: int64 `(e 2)`, (parent, child).
        c: curvature parameter.
        model: "lorentz" or "poincare".
        min_radius: K of the half aperture.
        aperture_scale: factor on the half aperture.

    Returns:
        Precision (NaN where no cone holds another point) and recall.

    Raises:
        ValueError: points that are no matrix, or edges that make no tree of them.
    """
    if points.ndim != 2:
        raise ValueError(f"points must have a shape (n, dim), got {tuple(points.shape)}")
    held = is_entailed(
        points.unsqueeze(1), points, c=c, model=model, min_radius=min_radius, aperture_scale=aperture_scale
    )
    held = held.cpu().fill_diagonal_(False)
    true = _ancestors(edges, len(points))
    both, num_held = int((held & true).sum()), int(held.sum())
    return both / num_held if num_held else math.nan, both / max(1, int(true.sum()))


def tree_fit(
    points: Float[Tensor, "n dim"],
    edges: Tensor,
    *,
    c: float | Tensor = 1.0,
    model: str = "lorentz",
    min_radius: float = 0.1,
) -> TreeFit:
    """All measures of an embedding against its tree.

    Args:
        points: of the nodes.
        edges: int64 `(e 2)`, (parent, child).
        c: curvature parameter.
        model: "lorentz" or "poincare".
        min_radius: K of the half aperture.

    Returns:
        See `TreeFit`.

    Raises:
        ValueError: edges that are no tree on the points, unknown model.
    """
    nm.check_choice("model", model, ("lorentz", "poincare"))
    x = points.detach().double()
    c = c.detach().double() if isinstance(c, Tensor) else c
    x = x if model == "lorentz" else convert.poincare_to_lorentz(x, c=c)
    tree = graph_distances(edges, len(x))
    distances = lorentz.dist(x.unsqueeze(1), x, c=c)
    depth, radius = tree[int(_order(_parents(edges, len(x)))[0])], lorentz.dist0(x, c=c)
    order = (radius[edges[:, 0]] < radius[edges[:, 1]]).double().mean().item()
    cones = cone_scores(x, edges, c=c, min_radius=min_radius)
    mean = reconstruction_map(distances, edges)
    return TreeFit(*distortion(distances, tree), mean, rank_correlation(depth, radius), order, *cones)
