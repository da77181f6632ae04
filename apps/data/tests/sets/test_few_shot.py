"""The paper's data sets before a picture is opened: the same pictures, parts and shots as those that are decoded."""

import numpy as np
import pytest

from app_data.read import labelled
from app_data.read.folder import load_found
from app_data.sets.cifar100 import choose_shots, take_shots
from app_data.sets.few_shot import find_few_shot
from app_data.sets.tree_sets import find_rare_species, find_sun397
from app_data.store.errors import DataError
from helpers import releases


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("few")
    releases.sun397(root / "sun397")
    releases.rare_species(root / "rare-species")
    return root


def test_nothing_is_decoded_and_nothing_else_is_found(sets, decoding, monkeypatch):
    tree = sets / "sun397" / "sun.json"
    decoded = load_found(find_sun397(sets / "sun397", tree), decoding, allow_empty_classes=True)
    monkeypatch.setattr(labelled, "load_picture", lambda *args: pytest.fail("a picture was opened"))
    found = find_few_shot("sun397", sets)
    for part, files in (("train", found.train), ("test", found.test)):
        assert [file.name for file in files.files] == list(decoded[part].files)
        assert files.targets.tolist() == decoded[part].targets.tolist()
    assert found.stored.node_text == decoded["train"].node_text


def test_rare_species_is_split_as_if_it_were_decoded(sets, decoding):
    shares = {"train": 0.8, "test": 0.2}
    tree = sets / "rare-species" / "rarespecies.json"
    found = find_rare_species(sets / "rare-species", tree)
    decoded = load_found(found, decoding, fractions=shares, allow_empty_classes=True)
    found = find_few_shot("rare-species", sets, cache_dir=decoding.cache_dir)
    for part, files in (("train", found.train), ("test", found.test)):
        assert sorted(file.name for file in files.files) == sorted(decoded[part].files)
    assert (len(found.train.files), len(found.test.files)) == (32, 8)


@pytest.mark.parametrize("seed", [1, 2])
def test_shots_are_those_of_the_decoded_pictures(sets, decoding, seed):
    found = find_few_shot("sun397", sets)
    (whole,) = load_found(found.train, decoding, allow_empty_classes=True).values()
    kept, _ = take_shots(whole, 2, seed)
    chosen = found.shots(2, seed)
    assert [file.name for file in chosen.files] == [whole.files[i] for i in kept]
    assert np.bincount(chosen.targets)[found.stored.taxonomy.leaf.numpy()].tolist() == [2] * 4
    # More shots keep what fewer chose; another seed chooses others.
    assert {f.name for f in found.shots(1, seed).files} < {f.name for f in chosen.files}
    assert {f.name for f in found.shots(2, 3 - seed).files} != {f.name for f in chosen.files}


def test_shots_of_the_naming():
    names, targets = [f"{i}.png" for i in range(6)], np.array([5, 5, 3, 3, 3, 5])
    chosen = choose_shots(names, targets, 2, 0)
    assert chosen.tolist() == sorted(chosen.tolist())
    assert sorted(targets[chosen].tolist()) == [3, 3, 5, 5]
    assert choose_shots(names, targets, 0).tolist() == []
    assert choose_shots([], targets[:0], 4).tolist() == []
    with pytest.raises(ValueError, match="shots must be at least 0, got -1"):
        choose_shots(names, targets, -1)


def test_some_leaves(sets, decoding):
    found = find_few_shot("sun397", sets)
    tax = found.stored.taxonomy
    leaves = [tax.index(("built", "abbey")), tax.index(("open", "orchard"))]
    part = found.under(leaves)
    assert {file.name.split("/")[1] for file in part.train.files} == {"abbey", "orchard"}
    assert [part.stored.taxonomy.path_of(int(t)) for t in part.test.targets] == [
        tax.path_of(int(t)) for t in found.test.targets if t in leaves
    ]
    pictures = load_found(part.shots(1, 1), decoding, allow_empty_classes=True)["train"]
    assert sorted(pictures.names) == ["abbey", "orchard"]
    assert pictures.taxonomy is part.stored.taxonomy


def test_too_many_shots(sets):
    with pytest.raises(DataError, match="'abbey' .* has 4 training pictures, fewer than 8 shots"):
        find_few_shot("sun397", sets).shots(8, 1)


def test_the_tree_is_found_beside_the_data(sets, tmp_path):
    place = tmp_path / "SUN"
    place.symlink_to(sets / "sun397")
    assert find_few_shot("sun397", place).stored.taxonomy.num_leaves == 4
    assert find_few_shot("sun397", place, sets / "sun397").stored.taxonomy.num_leaves == 4
    with pytest.raises(DataError, match=r"the tree of SUN397 is missing \(.*rare-species/sun.json\): give --tree FILE"):
        find_few_shot("sun397", place, sets / "rare-species")
