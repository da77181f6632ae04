"""Put the nodes of a tree in breadth-first order and derive its index arrays without recursion."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item", bound=Hashable)

# 2 GiB of int64; the taxonomy of NCBI (2.6 million nodes on about 45 levels) takes half of it.
_MOST_PATH_ENTRIES = 2**28


def show_path(path: Iterable[str]) -> str:
    """Return a path as people write it: `a > a1 > x`."""
    return " > ".join(path)


def shorten(items: Iterable[str], limit: int = 5) -> str:
    """Return at most `limit` items for an error message, and how many were left out."""
    listed = [repr(item) for item in items]
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest


def repeated(items: Iterable[Item]) -> list[Item]:
    """List every occurrence of an item but its first."""
    seen: set[Item] = set()
    twice = []
    for item in items:
        if item in seen:
            twice.append(item)
        seen.add(item)
    return twice


def find_cycle(start: int, up: Callable[[int], int]) -> list[int]:
    """Walk up from a node that has no way to the top; return the cycle met, downwards, its first node repeated."""
    walk: dict[int, int] = {}
    node = start
    while node not in walk:
        walk[node] = len(walk)
        node = up(node)
    return [node, *reversed(list(walk)[walk[node] :])]


def bfs_order(names: Sequence, parents: Sequence[int]) -> list[int]:
    """Return the positions of the nodes in breadth-first order, siblings in the order in which they are given.

    Raises:
        ValueError: no node, a name that is empty or repeated among siblings, or a cycle.
    """
    if not names:
        raise ValueError("the tree is empty: at least one node is needed")
    if len(names) != len(parents):
        raise ValueError(f"names and parents must have one entry per node, got {len(names)} and {len(parents)}")
    children: list[list[int]] = [[] for _ in names]
    top: list[int] = []
    for node, (name, parent) in enumerate(zip(names, parents, strict=True)):
        if not isinstance(name, str):
            raise TypeError(f"node names must be str, got {name!r} of type {type(name).__name__}")
        if not name:
            raise ValueError(f"node {node} has an empty name")
        if not -1 <= parent < len(names):
            raise ValueError(f"parent of node {name!r} must lie in [-1, {len(names)}), got {parent}")
        (top if parent < 0 else children[parent]).append(node)
    order: list[int] = []
    level = top
    for siblings in (top, *children):
        if len({names[node] for node in siblings}) < len(siblings):
            twice = repeated(names[node] for node in siblings)
            raise ValueError(f"siblings must have different names, repeated: {shorten(twice)}")
    while level:
        order += level
        level = [child for node in level for child in children[node]]
    if len(order) < len(names):
        cycle = find_cycle(min(set(range(len(names))) - set(order)), parents.__getitem__)
        raise ValueError(f"the edges hold a cycle: {show_path(names[i] for i in cycle)}")
    return order


def index_arrays(parent: np.ndarray) -> dict[str, np.ndarray]:
    """Derive the index arrays of a tree from the parents of its nodes in breadth-first order."""
    num = len(parent)
    ids = np.arange(num)
    above = parent.tolist()
    depth = [1] * num
    for node, up in enumerate(above):
        if up >= 0:
            depth[node] = depth[up] + 1
    group_size = np.bincount(parent + 1, minlength=num + 1)
    n_leaves = (group_size[1:] == 0).astype(np.int64).tolist()
    height = [0] * num
    for node in range(num - 1, -1, -1):
        if above[node] >= 0:
            n_leaves[above[node]] += n_leaves[node]
            height[above[node]] = max(height[above[node]], height[node] + 1)
    leaf_start = [0] * num
    filled = [0] * (num + 1)
    for node, up in enumerate(above):
        # Leaves of earlier siblings come first; the last slot counts for the virtual root (index -1).
        leaf_start[node] = filled[up] + (leaf_start[up] if up >= 0 else 0)
        filled[up] += n_leaves[node]
    level_ptr = np.concatenate([[0], np.cumsum(np.bincount(depth)[1:])]).astype(np.int64)
    num_levels = len(level_ptr) - 1
    if num * num_levels > _MOST_PATH_ENTRIES:
        raise ValueError(
            f"a tree of {num} nodes and {num_levels} levels needs a table of paths of {8e-9 * num * num_levels:.0f} GB; "
            "leave levels out where nodes have a single child (prune with mode='splice', or before reading)"
        )
    paths = np.full((num, num_levels), -1, dtype=np.int64)
    for level in range(num_levels):
        nodes = slice(level_ptr[level], level_ptr[level + 1])
        if level:
            paths[nodes] = paths[parent[nodes]]
        paths[nodes, level] = ids[nodes]
    leaf = np.flatnonzero(group_size[1:] == 0)
    leaf_index = np.full(num, -1, dtype=np.int64)
    leaf_index[leaf] = np.arange(len(leaf))
    group_start = np.concatenate([[0], np.cumsum(group_size)[:-1]])
    edge_child = np.flatnonzero(parent >= 0)
    fields = {
        "parent": parent,
        "depth": np.asarray(depth),
        "level_ptr": level_ptr,
        "group_start": group_start,
        "group_size": group_size,
        "leaf": leaf,
        "leaf_index": leaf_index,
        "leaf_start": np.asarray(leaf_start),
        "paths": paths,
        "n_leaves": np.asarray(n_leaves),
        "height": np.asarray(height),
        "n_siblings": group_size[parent + 1] - 1,
        "edge_parent": parent[edge_child],
        "edge_child": edge_child,
    }
    return {key: np.ascontiguousarray(value, dtype=np.int64) for key, value in fields.items()}
