"""Grow and cut taxonomies, keeping track of where every node went."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hier_losses._order import bfs_order, show_path
from hier_losses._parse import _check_choice, grow, known_part, split_edge
from hier_losses._tree import Tree
from hier_losses.graph import LabelGraph


@dataclass(frozen=True, eq=False)
class TaxonomyUpdate:
    """A changed taxonomy and the way between old and new node ids.

    Attributes:
        taxonomy: the new tree.
        old_to_new: (N_old,) new id of every old node, -1 if it was removed.
        new_to_old: (N_new,) old id of every new node, -1 if it was added.
    """

    taxonomy: Any
    old_to_new: Int[Tensor, " old"]
    new_to_old: Int[Tensor, " new"]

    def transfer(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """Carry per-node values, such as the rows of a classifier, over to the new tree.

        Args:
            rows: (N_old, ...) one entry per old node.
            fill: the value for added nodes.

        Returns:
            (N_new, ...) the same entries in the new order.

        Raises:
            ValueError: the first dimension is not N_old.
        """
        if rows.ndim == 0 or rows.shape[0] != len(self.old_to_new):
            raise ValueError(f"rows must have {len(self.old_to_new)} entries first, got shape {tuple(rows.shape)}")
        new_to_old = self.new_to_old.to(rows.device)
        out = rows[new_to_old.clamp(min=0)]
        return out.masked_fill((new_to_old < 0).view(-1, *[1] * (rows.ndim - 1)), fill)


def _finish(tree: Tree, names: list[str], parents: list[int], old: list[int]) -> TaxonomyUpdate:
    order = bfs_order(names, parents)
    num = tree.num_nodes
    known = tree.label.tolist()
    # Labels that come from the data stay meaningful; those that are mere positions are counted anew. Old labels keep
    # their order and stay in front, added nodes follow in the order of their ids.
    labels = [0] * len(names)
    for place, node in enumerate(order):
        labels[node] = known[old[node]] if old[node] >= 0 else num + place
    new_to_old = torch.tensor([old[node] for node in order], dtype=torch.int64)
    old_to_new = torch.full((num,), -1, dtype=torch.int64)
    kept = new_to_old >= 0
    old_to_new[new_to_old[kept]] = torch.arange(len(order))[kept]
    device = tree.device
    new = type(tree)(names, parents, None if tree.natural_labels else labels)
    return TaxonomyUpdate(new.to(device), old_to_new.to(device), new_to_old.to(device))


def extend(tree: Tree, paths: Iterable | None, edges: Iterable | None) -> TaxonomyUpdate:
    """Add the nodes of paths, or of edges, that are not there yet."""
    if (paths is None) == (edges is None):
        raise ValueError("exactly one of paths and edges must be given")
    names, parents = list(tree.names), tree.parent.tolist()
    child = dict(tree._child)
    if paths is not None:
        for number, path in enumerate(paths):
            if isinstance(path, str):
                raise TypeError(f"path {number} must be a sequence of names, got the single str {path!r}")
            path = known_part(path, number, reverse=False)
            if not all(isinstance(name, str) for name in path):
                raise TypeError(f"path {number} must hold names, got {path!r}")
            grow(names, parents, child, path)
    if edges is not None:
        _add_edges(tree, edges, names, parents, child)
    return _finish(tree, names, parents, list(range(tree.num_nodes)) + [-1] * (len(names) - tree.num_nodes))


def _add_edges(tree: Tree, edges: Iterable, names: list[str], parents: list[int], child: dict) -> None:
    new: dict = {}
    waiting = [split_edge(edge, number, "parent_child") for number, edge in enumerate(edges)]
    downs = {down for _, down in waiting}
    while waiting:
        later = []
        for up, down in waiting:
            if isinstance(up, str) and up in downs and up in tree._by_name:
                raise ValueError(f"name {up!r} stands for an old node and a new one, give full paths")
            if up in new:
                place = new[up]
            elif up is None:
                place = -1
            elif up in downs:
                later.append((up, down))
                continue
            else:
                place = tree.index(up)
            name = down if isinstance(down, str) else down[-1]
            if (place, name) in child:
                raise ValueError(f"duplicate edge {up!r} -> {down!r}")
            if down in new:
                raise ValueError(f"node {down!r} has two parents, a tree allows one; give full paths for equal names")
            new[down] = child[place, name] = len(names)
            names.append(name)
            parents.append(place)
        if len(later) == len(waiting):
            raise ValueError(f"the edges hold a cycle: {'; '.join(f'{up!r} -> {down!r}' for up, down in later[:5])}")
        waiting = later


def _ids(nodes: Iterable | Tensor) -> list[int]:
    found = nodes.tolist() if isinstance(nodes, Tensor) else list(nodes)
    for node in found:
        if isinstance(node, str):
            raise TypeError(f"nodes must be node ids, got {node!r}; indices of the taxonomy turns names into ids")
    return [int(node) for node in found]


def prune(tree: Tree, nodes: Iterable | Tensor, mode: str) -> TaxonomyUpdate:
    """Remove nodes with all below them ("subtree"), or hand their children to their parents ("splice")."""
    _check_choice("mode", mode, ("subtree", "splice"))
    chosen = set(_ids(nodes))
    for node in sorted(chosen):
        if not 0 <= node < tree.num_nodes:
            raise ValueError(f"nodes must lie in [0, {tree.num_nodes}), got {node}")
    above = tree.parent.tolist()
    new_parent = list(above)
    for node, up in enumerate(above):  # parents come before children
        if up in chosen:
            if mode == "subtree":
                chosen.add(node)
            else:
                new_parent[node] = new_parent[up]
    if len(chosen) == tree.num_nodes:
        raise ValueError("nodes must leave at least one node, got all of them")
    # Depth-first positions put the children of a removed node where it stood among its siblings.
    kept = [node for node in _depth_first(tree) if node not in chosen]
    place = {node: number for number, node in enumerate(kept)}
    names = [tree.names[node] for node in kept]
    parents = [place[new_parent[node]] if new_parent[node] >= 0 else -1 for node in kept]
    _check_splice(tree, kept, new_parent)
    return _finish(tree, names, parents, kept)


def _check_splice(tree: Tree, kept: list[int], new_parent: list[int]) -> None:
    seen: dict[tuple[int, str], int] = {}
    for node in kept:
        key = (new_parent[node], tree.names[node])
        if key in seen:
            both = " and ".join(repr(show_path(tree.path_of(i))) for i in (seen[key], node))
            raise ValueError(f"splicing would make {both} siblings of the same name")
        seen[key] = node


def _depth_first(tree: Tree) -> list[int]:
    start, size = tree.group_start.tolist(), tree.group_size.tolist()
    order, stack = [], [0]
    while stack:
        group = stack.pop()
        if group:
            order.append(group - 1)
        stack += range(start[group] + size[group], start[group], -1)
    return order


def match_taxonomies(old: Tree | LabelGraph, new: Tree | LabelGraph) -> TaxonomyUpdate:
    """Find every node of an old taxonomy in a new one.

    Nodes with the same full path are the same. Of the others, two nodes with the same name are the same if the name occurs
    once among the unmatched nodes of each side: the node moved. `Taxonomy.extend` and `prune` return such an update
    themselves; this function serves trees that were edited elsewhere, and moves.

    Args:
        old: the taxonomy before.
        new: the taxonomy after; of the same kind.

    Returns:
        The update, as `extend` and `prune` give it.

    Raises:
        ValueError: if a tree is matched with a graph.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> old = Taxonomy.from_paths([("pet", "cat"), ("wild", "fox")])
    >>> new = Taxonomy.from_paths([("pet", "fox"), ("pet", "cat"), ("wild", "owl")])
    >>> update = match_taxonomies(old, new)
    >>> [(new.names[v], u) for v, u in enumerate(update.new_to_old.tolist())]
    [('pet', 0), ('wild', 1), ('fox', 3), ('cat', 2), ('owl', -1)]
    """
    if isinstance(old, LabelGraph) != isinstance(new, LabelGraph):
        raise ValueError(f"new must be of the kind of old, {type(old).__name__}, got {type(new).__name__}")
    old_paths = {_path(old, u): u for u in range(old.num_nodes)}
    source = [old_paths.get(_path(new, v), -1) for v in range(new.num_nodes)]
    taken = set(source)
    lost = _once([u for u in range(old.num_nodes) if u not in taken], old.names)
    come = _once([v for v, u in enumerate(source) if u < 0], new.names)
    for name in come.keys() & lost.keys():
        source[come[name]] = lost[name]
    new_to_old = torch.tensor(source, dtype=torch.int64)
    old_to_new = torch.full((old.num_nodes,), -1, dtype=torch.int64)
    kept = new_to_old >= 0
    old_to_new[new_to_old[kept]] = kept.nonzero().squeeze(1)
    return TaxonomyUpdate(new, old_to_new, new_to_old)


def _path(tax: Tree | LabelGraph, node: int) -> tuple[str, ...]:
    return (tax.names[node],) if isinstance(tax, LabelGraph) else tax.path_of(node)


def _once(nodes: list[int], names: tuple[str, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in nodes:
        counts[names[node]] = counts.get(names[node], 0) + 1
    return {names[node]: node for node in nodes if counts[names[node]] == 1}


def add_self_leaves(tree: Tree, nodes: Iterable | Tensor | None, name: str) -> "TaxonomyUpdate":
    """Add a leaf of one name below each of the inner nodes."""
    if nodes is None:
        chosen = (tree.leaf_index < 0).nonzero()[:, 0].tolist()
    else:
        chosen = _ids(nodes)
    for node in chosen:
        if not 0 <= node < tree.num_nodes or tree.leaf_index[node] >= 0:
            raise ValueError(f"nodes must be inner nodes in [0, {tree.num_nodes}), got {node}")
        if (node, name) in tree._child:
            raise ValueError(f"node {node} ({show_path(tree.path_of(node))!r}) has a child named {name!r} already")
    return extend(tree, [(*tree.path_of(node), name) for node in chosen], None)
