from collections import Counter

import numpy as np
import pytest

from app_data.read.splits import stratified_split, withhold_leaves
from hier_losses import Taxonomy

TREE = Taxonomy.from_paths(
    [("a", "big", f"b{i}") for i in range(40)]
    + [("a", "small", f"s{i}") for i in range(3)]
    + [("c", "lone", "only")]
    + [("c", "mid", f"m{i}") for i in range(16)]
)


def test_withheld_share_is_stratified():
    chosen = withhold_leaves(TREE, 0.15, seed=0)
    assert len(chosen) == round(0.15 * 60)
    assert (np.diff(chosen) > 0).all()
    by_parent = Counter(TREE.names[TREE.parent[node]] for node in chosen)
    assert by_parent["big"] == 6
    assert by_parent["mid"] in (2, 3)
    assert by_parent["lone"] == 0, "a lone child keeps its pictures"
    assert set(chosen.tolist()) <= set(TREE.leaf.tolist())


def test_withheld_leaves_depend_on_seed_and_names_only():
    first = withhold_leaves(TREE, 0.15, seed=0)
    np.testing.assert_array_equal(first, withhold_leaves(TREE, 0.15, seed=0))
    assert set(first.tolist()) != set(withhold_leaves(TREE, 0.15, seed=1).tolist())
    turned = Taxonomy.from_paths(TREE.to_paths()[::-1])
    again = withhold_leaves(turned, 0.15, seed=0)
    assert {TREE.path_of(n) for n in first} == {turned.path_of(n) for n in again}


def test_withhold_among_some():
    some = TREE.leaf[:20].numpy()
    chosen = withhold_leaves(TREE, 0.25, among=some)
    assert len(chosen) == 5
    assert set(chosen.tolist()) <= set(some.tolist())


def test_withhold_nothing_and_nearly_all():
    assert len(withhold_leaves(TREE, 0.0)) == 0
    chosen = withhold_leaves(TREE, 0.99)
    assert len(chosen) == 60 - 4, "each of the four parents keeps one leaf"


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_withhold_bad_fraction(fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\)"):
        withhold_leaves(TREE, fraction)


def test_stratified_split_by_class():
    labels = np.repeat([7, 3], [20, 10])
    names = [f"p{i}" for i in range(30)]
    parts = stratified_split(labels, names, {"val": 0.1, "train": 0.8, "test": 0.1}, seed=4)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(30))
    assert Counter(labels[parts["train"]].tolist()) == {7: 16, 3: 8}
    assert Counter(labels[parts["val"]].tolist()) == {7: 2, 3: 1}
    assert Counter(labels[parts["test"]].tolist()) == {7: 2, 3: 1}
    assert list(parts) == ["val", "train", "test"]
    again = stratified_split(labels, names, {"val": 0.1, "train": 0.8, "test": 0.1}, seed=4)
    other = stratified_split(labels, names, {"val": 0.1, "train": 0.8, "test": 0.1}, seed=5)
    np.testing.assert_array_equal(parts["test"], again["test"])
    assert parts["test"].tolist() != other["test"].tolist()


def test_new_pictures_keep_old_ones_mostly_in_place():
    names = [f"p{i}" for i in range(100)]
    shares = {"train": 0.8, "test": 0.2}
    before = set(stratified_split(np.zeros(100), names, shares)["test"].tolist())
    after = set(stratified_split(np.zeros(101), [*names, "new"], shares)["test"].tolist())
    assert len(before - after) <= 1


def test_every_class_keeps_a_training_picture():
    parts = stratified_split(range(5), list("abcde"), {"train": 0.4, "val": 0.3, "test": 0.3})
    assert len(parts["train"]) == 5
    assert len(parts["test"]) == 0


@pytest.mark.parametrize(
    ("names", "fractions", "message"),
    [
        (["a", "a"], {"train": 1.0}, "names must be 2 different"),
        (["a"], {"train": 1.0}, "names must be 2 different"),
        (["a", "b"], {"train": 0.5}, "add up to 1"),
        (["a", "b"], {"train": 1.5, "test": -0.5}, "at least 0"),
        (["a", "b"], {}, "add up to 1"),
    ],
)
def test_bad_split(names, fractions, message):
    with pytest.raises(ValueError, match=message):
        stratified_split([0, 0], names, fractions)
