"""The few-shot CIFAR-100 set: tree, stored cuts and pictures, on a tiny copy and, where it is at hand, on the real one."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from app_data.read.labelled import Decoding
from app_data.sets.cifar100 import ARCHIVE, load_cifar100_fewshot, read_stored_tree, take_shots
from app_data.store.errors import DataError

NODES = [
    {"id": 0, "name": "root", "text": "root", "parent": None, "children": [1, 4]},
    {"id": 1, "name": "tree", "text": "tall plant", "parent": 0, "children": [2, 3]},
    {"id": 2, "name": "oak_tree", "text": "oak tree", "parent": 1, "children": []},
    {"id": 3, "name": "pine_tree", "text": "pine tree", "parent": 1, "children": []},
    {"id": 4, "name": "bus", "text": "bus", "parent": 0, "children": []},
]
CUTS = [
    {"text": ["bus", "tall plant"], "leaf_to_label": [1, 1, 0]},
    {"text": ["oak tree", "pine tree", "bus"], "leaf_to_label": [0, 1, 2]},
]


@pytest.fixture
def folder(tmp_path, make_picture):
    root = tmp_path / "data"
    for part, count in (("train", 4), ("test", 2)):
        for value, name in enumerate(("oak_tree", "pine_tree", "bus")):
            for j in range(count):
                make_picture(root / part / name / f"{name}_{j}.png", 40 * value + j, (32, 32))
    (root / "trees").mkdir()
    (root / "trees" / "cifar100.json").write_text(json.dumps({"nodes": NODES, "leaves": [2, 3, 4], "treecuts": CUTS}))
    return root


@pytest.fixture
def decoding(tmp_path):
    return Decoding(size=16, cache_dir=tmp_path / "cache", workers=1)


def test_tree_and_cuts(folder):
    tax, text, cuts = read_stored_tree(folder / "trees" / "cifar100.json")
    assert tax.num_nodes == 4
    assert dict(zip(tax.names, text, strict=True)) == {
        "tree": "tall plant", "bus": "bus", "oak_tree": "oak tree", "pine_tree": "pine tree",
    }  # fmt: skip
    found = [sorted(tax.names[node] for node in cut) for cut in cuts.node_ids]
    assert found == [["bus", "tree"], ["bus", "oak_tree", "pine_tree"]]


def test_folder_and_archive_agree(folder, decoding, tmp_path):
    train, test, cuts = load_cifar100_fewshot(folder, decoding=decoding)
    assert (len(train), len(test), len(cuts)) == (12, 6, 2)
    assert train.taxonomy == test.taxonomy == cuts.tax
    assert train.node_text[train.taxonomy.index("tree")] == "tall plant"
    assert all(train.taxonomy.names[t] == Path(f).parent.name for t, f in zip(train.targets, train.files, strict=True))
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / ARCHIVE, "w:gz") as tar:
        tar.add(folder / "train", "train")
        tar.add(folder / "test", "test")
    for source in (packed, packed / ARCHIVE):
        again = load_cifar100_fewshot(source, folder / "trees" / "cifar100.json", decoding)
        assert np.array_equal(again.train.batch(range(12)), train.batch(range(12)))
        assert np.array_equal(again.test.targets, test.targets)


def test_shots(folder, decoding):
    train = load_cifar100_fewshot(folder, decoding=decoding).train
    chosen, rest = take_shots(train, 2)
    assert np.bincount(train.targets[chosen]).tolist() == np.bincount(train.targets[rest]).tolist()
    assert sorted([*chosen, *rest]) == list(range(12))
    assert set(take_shots(train, 1)[0]) < set(chosen)
    assert take_shots(train, 9)[1].size == 0
    assert any(take_shots(train, 1, seed)[0].tolist() != take_shots(train, 1)[0].tolist() for seed in range(1, 9))
    with pytest.raises(ValueError, match="shots must be at least 0, got -1"):
        take_shots(train, -1)


def test_what_does_not_fit_is_named(folder, decoding, tmp_path):
    with pytest.raises(DataError, match="neither cifar100_fewshot"):
        load_cifar100_fewshot(tmp_path / "nowhere")
    tree = folder / "trees" / "cifar100.json"
    tree.write_text(json.dumps({"nodes": NODES, "leaves": [2, 3, 4]}))
    with pytest.raises(DataError, match="no usable cuts"):
        load_cifar100_fewshot(folder, decoding=decoding)
    tree.write_text(json.dumps({"nodes": NODES, "leaves": [2, 3, 4], "treecuts": CUTS}))
    (folder / "train" / "bus").rename(folder / "train" / "bush")
    with pytest.raises(DataError, match="'bush'.*is no leaf"):
        load_cifar100_fewshot(folder, decoding=decoding)
    tree.unlink()
    with pytest.raises(DataError, match="cifar100.json does not exist"):
        load_cifar100_fewshot(folder, decoding=decoding)


def _real():
    """The folder named by HIER_SHARED_DATA, or `shared/data` beside the repository."""
    given = os.environ.get("HIER_SHARED_DATA")
    folders = [Path(given)] if given else [p / "shared" / "data" for p in Path(__file__).resolve().parents]
    return next((folder for folder in folders if (folder / ARCHIVE).is_file()), None)


@pytest.mark.skipif(_real() is None, reason="the data set is not on this machine")
def test_the_real_set(tmp_path):
    train, test, cuts = load_cifar100_fewshot(_real(), decoding=Decoding(size=32, cache_dir=tmp_path, workers=1))
    assert (len(train), len(test), len(cuts)) == (2000, 5000, 25)
    assert (train.taxonomy.num_nodes, train.taxonomy.num_leaves, train.taxonomy.num_levels) == (147, 100, 10)
    assert (np.bincount(train.targets)[train.taxonomy.leaf] == 20).all()
    assert (np.bincount(test.targets)[train.taxonomy.leaf] == 50).all()
    assert train.node_text[train.taxonomy.index("maple_tree")] == "maple tree"
