"""Turn paths, edges and level sizes into the (names, parents, labels) that a tree is built from."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hier_losses._order import show_path


class Parts(NamedTuple):
    """Names, parent positions and optional level labels of the nodes, in any order."""

    names: list[str]
    parents: list[int]
    labels: list[int] | None = None


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _is_missing(item: Any) -> bool:
    # "not >=" also takes the NaN that table readers put into empty cells.
    return item is None or item == "" or (not isinstance(item, str) and not item >= 0)


def known_part(row: Iterable, number: int, reverse: bool) -> list:
    """Drop the missing end of a row (None, an empty string, a negative label) and turn it top level first."""
    items = list(row)
    # Coarse to fine leaves the lowest levels empty. Fine to coarse may pad on either side: a shallow leaf either lacks
    # far ancestors (the end) or was given per level columns (the start).
    while items and _is_missing(items[-1]):
        items.pop()
    if reverse:
        while items and _is_missing(items[0]):
            items.pop(0)
        items.reverse()
    if not items:
        raise ValueError(f"row {number} is empty")
    if any(_is_missing(item) for item in items):
        raise ValueError(f"row {number} has a hole: {list(row)!r}; missing levels must stand at one end")
    return items


def grow(names: list[str], parents: list[int], child: dict[tuple[int, str], int], path: Sequence[str]) -> int:
    """Walk a path from the top, adding the nodes that are not there yet; return its last node."""
    node = -1
    for name in path:
        below = child.get((node, name))
        if below is None:
            below = len(names)
            child[node, name] = below
            names.append(name)
            parents.append(node)
        node = below
    return node


def parse_paths(
    paths: Iterable,
    order: str = "coarse_to_fine",
    index_base: int = 0,
    names: Sequence[Sequence[str]] | None = None,
) -> Parts:
    """Read paths of names, or of integer labels counted per level."""
    _check_choice("order", order, ("coarse_to_fine", "fine_to_coarse"))
    if index_base not in (0, 1):
        raise ValueError(f"index_base must be 0 or 1, got {index_base!r}")
    rows = []
    for number, row in enumerate(paths):
        if isinstance(row, str):
            raise TypeError(f"row {number} must be a sequence of names, got the single str {row!r}")
        row = row.tolist() if hasattr(row, "tolist") else row
        rows.append(known_part(row, number, order == "fine_to_coarse"))
    if not rows:
        raise ValueError("paths must hold at least one path, got none")
    kinds = {isinstance(item, str) for row in rows for item in row}
    if kinds == {True}:
        if names is not None:
            raise ValueError("names goes with paths of integer labels, got paths of names")
        if index_base:
            raise ValueError("index_base=1 goes with paths of integer labels, got paths of names")
        built: tuple[list[str], list[int]] = ([], [])
        child: dict[tuple[int, str], int] = {}
        for row in rows:
            grow(*built, child, row)
        return Parts(*built)
    if kinds != {False}:
        raise TypeError("paths must hold names only or integer labels only, got both")
    return _parse_labels(rows, index_base, names)


def _parse_labels(rows: list[list], base: int, names: Sequence[Sequence[str]] | None) -> Parts:
    for number, row in enumerate(rows):
        if any(isinstance(item, bool) or item == float("inf") or int(item) != item for item in row):
            raise TypeError(f"row {number} must hold names or integers, got {row!r}")
    above: list[dict[int, int]] = [{} for _ in range(max(map(len, rows)))]
    for number, row in enumerate(rows):
        for level, label in enumerate(row):
            up = int(row[level - 1]) if level else -1
            first = above[level].setdefault(int(label), up)
            if first != up:
                raise ValueError(
                    f"label {label} of level {level + 1} has two parents, {first} and {up} (row {number}); labels "
                    "count the nodes of a whole level; are the rows in the other order (fine_to_coarse)?"
                )
    for level, labels in enumerate(above):
        low, high = min(labels), max(labels)
        if low != base or high - low + 1 != len(labels):
            hint = f"; index_base={low}?" if low in (0, 1) and high - low + 1 == len(labels) else ""
            raise ValueError(
                f"labels of level {level + 1} must be {base}..{len(labels) + base - 1} without gaps, "
                f"got {len(labels)} labels in {low}..{high}{hint}"
            )
        if names is not None and (level >= len(names) or len(names[level]) != len(labels)):
            got = [len(level_names) for level_names in names]
            raise ValueError(f"names must hold {len(labels)} names for level {level + 1}, got {got} per level")
    position: list[dict[int, int]] = []
    numbers: list[int] = []
    parts = Parts([], [], numbers)
    for level, labels in enumerate(above):
        position.append({})
        for label in labels:
            position[level][label] = len(parts.names)
            parts.names.append(str(label) if names is None else names[level][label - base])
            parts.parents.append(position[level - 1][labels[label]] if level else -1)
            numbers.append(label - base)
    return parts


def endpoint(item: object) -> str | tuple[str, ...] | None:
    """Return one end of an edge as a name, a full path, or None for the virtual root."""
    if item is None or isinstance(item, str):
        return item or None
    if isinstance(item, tuple) and item and all(isinstance(name, str) for name in item):
        return item
    raise TypeError(f"an end of an edge must be a name, a tuple of names (a full path) or None, got {item!r}")


def split_edge(edge: Any, number: int, order: str) -> tuple:
    """Return an edge as (parent, child)."""
    ends = list(edge) if not isinstance(edge, str) else []
    if len(ends) != 2:
        raise ValueError(f"edge {number} must be a pair, got {edge!r}")
    up, down = map(endpoint, ends if order == "parent_child" else ends[::-1])
    if down is None:
        raise ValueError(f"edge {number} has no child: {edge!r}")
    if isinstance(down, tuple) and (up or ()) != down[:-1]:
        raise ValueError(f"edge {number}: the parent of path {show_path(down)!r} must be its beginning, got {up!r}")
    return up, down


def parse_edges(edges: Iterable, order: str = "parent_child", root: str | None = None) -> Parts:
    """Read edges whose ends are unique names, or full paths (tuples) where names repeat."""
    _check_choice("order", order, ("parent_child", "child_parent"))
    above: dict = {}
    for number, edge in enumerate(edges):
        up, down = split_edge(edge, number, order)
        if up is not None and isinstance(up, tuple) != isinstance(down, tuple):
            raise TypeError(f"edge {number} joins a name and a full path: {up!r} -> {down!r}")
        if down in above:
            if above[down] == up:
                raise ValueError(f"duplicate edge {up!r} -> {down!r}")
            raise ValueError(f"node {down!r} has two parents, {above[down]!r} and {up!r}; a tree allows one")
        above[down] = up
    if not above:
        raise ValueError("edges must hold at least one edge, got none")
    kinds = {isinstance(down, tuple) for down in above}
    if kinds == {True}:
        if root is not None:
            raise ValueError(f"root goes with edges between names, got root={root!r} and full paths")
        return parse_paths(above)
    if kinds != {False}:
        raise TypeError("edges must join names only or full paths only, got both")
    position = dict.fromkeys(end for down, up in above.items() for end in (up, down) if end is not None)
    if root is not None:
        if root not in position:
            raise ValueError(f"root must be a node of the edges, got {root!r}")
        if above.get(root) is not None:
            raise ValueError(f"root {root!r} has the parent {above[root]!r}")
        position.pop(root)
        above = {down: None if up == root else up for down, up in above.items() if down != root}
    rank = {name: number for number, name in enumerate(position)}
    return Parts(list(rank), [-1 if above.get(name) is None else rank[above[name]] for name in rank])


def synthesize(level_sizes: Sequence[int], lone_child_rate: float | None = None, seed: int = 0) -> Parts:
    """Draw a tree of equal leaf depth with given level sizes."""
    sizes = [int(size) for size in level_sizes]
    if not sizes or any(size < 1 for size in sizes) or any(b < a for a, b in pairwise(sizes)):
        raise ValueError(f"level_sizes must be positive and never shrink from top to bottom, got {list(level_sizes)}")
    if lone_child_rate is not None and not 0 <= lone_child_rate <= 1:
        raise ValueError(f"lone_child_rate must lie in [0, 1], got {lone_child_rate}")
    if lone_child_rate is not None and len(sizes) == 1:
        raise ValueError("lone_child_rate needs at least two levels; the leaves of a one-level tree are all siblings")
    rng = np.random.default_rng(seed)
    names = [f"n1_{i}" for i in range(sizes[0])]
    parents = [-1] * sizes[0]
    for level in range(1, len(sizes)):
        above, here = sizes[level - 1], sizes[level]
        lone = None
        if lone_child_rate is not None and level == len(sizes) - 1:
            lone = round(lone_child_rate * here)
            low, high = max(0, 2 * above - here), above - (here > above)
            if not low <= lone <= high:
                raise ValueError(
                    f"lone_child_rate must lie in [{low / here:.4g}, {high / here:.4g}] for {here} leaves below "
                    f"{above} parents, got {lone_child_rate}"
                )
        counts = np.ones(above, dtype=np.int64)
        crowded = np.arange(above) if lone is None else rng.permutation(above)[lone:]
        if lone is not None:
            counts[crowded] = 2
        if len(crowded):
            # Real taxonomies have few very large groups; a log-normal share reproduces that (the largest of
            # iNaturalist 2021 has 216 species).
            share = rng.lognormal(sigma=1.6, size=len(crowded))
            counts[crowded] += rng.multinomial(here - counts.sum(), share / share.sum())
        offset = len(names) - above
        parents += np.repeat(np.arange(above) + offset, counts).tolist()
        names += [f"n{level + 1}_{i}" for i in range(here)]
    return Parts(names, parents)
