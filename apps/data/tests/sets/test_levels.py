"""Questions at three levels, against the tree itself."""

from collections import Counter

import numpy as np
import torch

from app_data.read.pictures import PictureSet
from app_data.sets.levels import QUESTIONS, held_out_subgroups, level_items, picture_paths, shuffled_paths
from hier_losses import Taxonomy

PATHS = [
    (f"group {g}", f"kind {g}{s}", f"thing {g}{s}{leaf}") for g in range(3) for s in range(3) for leaf in range(2 + s)
]


def pictures(copies=2):
    """Every leaf by each artist, the rows of the store turned round."""
    tree = Taxonomy.from_paths(PATHS)
    targets = np.array([tree.index(path) for path in PATHS] * copies)
    rows = np.arange(len(targets))[::-1].copy()
    store = np.zeros((len(targets), 4, 4, 3), dtype=np.uint8)
    return PictureSet(store, rows, targets, ("a",) * len(targets), ("",) * len(targets), tree, "made")


def test_answers_are_the_names_above_each_picture():
    data = pictures()
    paths, kept = picture_paths(data), {PATHS[0][:2], PATHS[-1][:2]}
    items = level_items(paths, torch.eye(len(data)), kept)
    tree, parents = data.taxonomy, data.taxonomy.parent.tolist()
    expected = set()
    for row, target in zip(data.rows.tolist(), data.targets.tolist(), strict=True):
        chain, node = [], target
        while node >= 0:
            chain.insert(0, tree.names[node])
            node = parents[node]
        chain = chain[-3:]
        if tuple(chain[:2]) in kept:
            expected |= {(row, QUESTIONS[kind], name, kind) for kind, name in zip(QUESTIONS, chain, strict=True)}
    found = list(zip(items.rows.tolist(), items.questions, items.answers, items.kinds, strict=True))
    assert set(found) == expected
    assert len(found) == len(expected) == 3 * 2 * (2 + 4)


def test_half_of_the_subgroups_is_held_out_whatever_the_order():
    held = held_out_subgroups(PATHS)
    assert len(held) == 5
    assert held == held_out_subgroups(PATHS[::-1]) < {path[:2] for path in PATHS}


def test_a_shuffled_tree_keeps_its_shape_and_its_leaves():
    paths = picture_paths(pictures())
    for seed in range(3):
        other = shuffled_paths(paths, seed)
        assert [path[2] for path in other] == [path[2] for path in paths]
        for depth in (1, 2):
            assert Counter(p[:depth] for p in set(other)) == Counter(p[:depth] for p in set(paths))
        # One leaf has one place, and most leaves have a new one.
        assert len(set(other)) == len(set(paths))
        assert sum(a != b for a, b in zip(paths, other, strict=True)) > len(paths) / 2
    assert shuffled_paths(paths, 0) == shuffled_paths(paths, 0) != shuffled_paths(paths, 1)
