"""Questions at several levels about one picture: what sort it is, what kind, and what it is, of the emoji's own taxonomy.

Half of the subgroups, leaves included, never train: what a model says of them it has read in its demonstrations.
"""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from app_data.read.pictures import PictureSet
from app_data.sets.episodes import IclItems

__all__ = ["QUESTIONS", "held_out_subgroups", "level_items", "picture_paths", "shuffled_paths"]

QUESTIONS = {"group": "what sort is this?", "subgroup": "what kind is this?", "leaf": "what is this?"}
NAME = "taxonomy"

Path = tuple[str, str, str]


def picture_paths(data: PictureSet) -> tuple[Path, ...]:
    """Group, subgroup and leaf of every picture, by the row of its features."""
    names = data.taxonomy.names
    found: list = [()] * (int(data.rows.max()) + 1)
    for row, nodes in zip(data.rows.tolist(), data.taxonomy.paths[data.targets].tolist(), strict=True):
        found[row] = tuple(names[node] for node in nodes if node >= 0)
    return tuple(found)


def held_out_subgroups(paths: Collection[Path]) -> frozenset[tuple[str, str]]:
    """Every second subgroup, with its group: pool and questions are made of them, and nothing of them trains.

    >>> sorted(held_out_subgroups([("food", "fruit", "pear"), ("food", "drink", "tea"), ("life", "bug", "bee")]))
    [('food', 'drink'), ('life', 'bug')]
    """
    return frozenset(sorted({path[:2] for path in paths})[::2])


def level_items(
    paths: Sequence[Path], features: Float[Tensor, "pictures width"], subgroups: Collection[tuple[str, str]]
) -> IclItems:
    """Three questions about every picture of these subgroups; the answers are the names on its path.

    Args:
        paths: See `picture_paths`.
        features: One row a picture.
        subgroups: With their groups.
    """
    kept = set(subgroups)
    rows = [row for row, path in enumerate(paths) if path[:2] in kept]
    kinds = tuple(QUESTIONS)
    return IclItems(
        NAME,
        features,
        np.repeat(np.asarray(rows, dtype=np.int64), len(kinds)),
        tuple(QUESTIONS.values()) * len(rows),
        tuple(name for row in rows for name in paths[row]),
        kinds * len(rows),
    )


def shuffled_paths(paths: Sequence[Path], seed: int) -> tuple[Path, ...]:
    """The same leaves in a tree of the same shape, each put in the place of another: a control for what the tree says.

    Args:
        paths: Of pictures; those of one leaf stay together.
        seed: Of the draw.

    >>> shuffled_paths([("food", "fruit", "pear"), ("life", "bug", "bee"), ("food", "fruit", "pear")], 3)
    (('life', 'bug', 'pear'), ('food', 'fruit', 'bee'), ('life', 'bug', 'pear'))
    """
    leaves = sorted(set(paths))
    moved = np.random.default_rng(seed).permutation(len(leaves)).tolist()
    at = {leaf: (*leaves[new][:2], leaf[2]) for leaf, new in zip(leaves, moved, strict=True)}
    return tuple(at[path] for path in paths)
