"""Deterministic splits of leaves and of pictures: a function of names and a seed, not of order, library or machine."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from hier_losses import Taxonomy

T = TypeVar("T")


def some(items: Sequence[T], num: int | None) -> list[T]:
    """So many of the items, drawn by a fixed seed, in their order; all of them if `num` is None or no smaller.

    >>> some("abcdef", 3) == some("abcdef", 3), len(some("abc", None))
    (True, 3)
    """
    if num is None or num >= len(items):
        return list(items)
    return [items[i] for i in np.sort(np.random.default_rng(0).permutation(len(items))[:num])]


def withhold_leaves(
    taxonomy: Taxonomy, fraction: float = 0.15, seed: int = 0, among: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Choose leaves evenly from all sibling groups.

    Each parent gives its share of leaves rounded down; the largest remainders fill up to round(fraction * K). A parent
    always keeps one leaf, so no subgroup loses all its pictures.

    Args:
        taxonomy: The label tree.
        fraction: Share of the leaves to withhold, in [0, 1).
        seed: Decides which ones.
        among: Node ids of the leaves to choose from; all leaves if None.

    Returns:
        Node ids of the withheld leaves, ascending.

    Raises:
        ValueError: The fraction lies outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must lie in [0, 1), got {fraction}")
    leaves = taxonomy.leaf.tolist() if among is None else sorted({int(node) for node in among})
    groups: dict[int, list[int]] = {}
    for node in leaves:
        groups.setdefault(int(taxonomy.parent[node]), []).append(node)
    parents = sorted(groups)
    rank = {node: _rank(seed, "/".join(taxonomy.path_of(node))) for node in leaves}
    quotas = {parent: int(fraction * len(groups[parent])) for parent in parents}
    # Remainders repeat a lot (groups are small), so the seed breaks the ties.
    by_remainder = sorted(
        (parent for parent in parents if quotas[parent] < len(groups[parent]) - 1),
        key=lambda parent: (quotas[parent] - fraction * len(groups[parent]), min(rank[n] for n in groups[parent])),
    )
    for parent in by_remainder[: max(0, round(fraction * len(leaves)) - sum(quotas.values()))]:
        quotas[parent] += 1
    chosen = [node for parent in parents for node in sorted(groups[parent], key=rank.__getitem__)[: quotas[parent]]]
    return np.array(sorted(chosen), dtype=np.int64)


def stratified_split(
    labels: Sequence[int] | np.ndarray, names: Sequence[str], fractions: Mapping[str, float], seed: int = 0
) -> dict[str, np.ndarray]:
    """Split pictures so that every class is divided in the same proportion.

    Within a class the pictures are ordered by a hash of seed and name and cut at the rounded cumulative fractions; the
    part with the largest fraction never goes empty because of rounding, so each class keeps training pictures.

    Args:
        labels: Class of each picture.
        names: A stable name of each picture, such as its relative path; all different.
        fractions: Share of each part, adding up to 1, for example {"train": .8, "val": .1, "test": .1}.
        seed: Decides which picture goes where.

    Returns:
        Ascending positions of each part.

    Raises:
        ValueError: Names repeat, lengths differ, or fractions are negative or do not add up to 1.
    """
    if len(labels) != len(names) or len(set(names)) != len(names):
        different = len(set(names))
        raise ValueError(f"names must be {len(labels)} different strings, got {len(names)} ({different} different)")
    shares = list(fractions.values())
    if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"fractions must be at least 0 and add up to 1, got {dict(fractions)}")
    # The largest part comes first, so the class's first picture is always its own.
    parts = sorted(fractions, key=lambda part: -fractions[part])
    edges = np.cumsum([fractions[part] for part in parts])
    found: dict[str, list[int]] = {part: [] for part in fractions}
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(int(label), []).append(position)
    for positions in members.values():
        positions.sort(key=lambda position: _rank(seed, names[position]))
        start = 0
        for part, edge in zip(parts, edges, strict=True):
            stop = max(start, round(float(edge) * len(positions)), 1)
            found[part] += positions[start:stop]
            start = stop
    return {part: np.array(sorted(positions), dtype=np.int64) for part, positions in found.items()}


def _rank(seed: int, name: str) -> str:
    """A hash that stands in for a random number: the same on every machine and in every library version."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
