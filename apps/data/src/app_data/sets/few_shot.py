"""The four data sets of Modality Alignment across Trees (arXiv 2510.27391), found with their trees before a picture is opened.

Their few shots are chosen from the names of the files, so that of ImageNet's 1.28 million pictures the chosen ones are decoded alone.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from app_data.read.folder import Found, find_pictures
from app_data.read.labelled import PARTS, with_parts
from app_data.sets.cifar100 import ARCHIVE, StoredTree, choose_shots, part_of_tree, read_stored_tree
from app_data.sets.papers import unpack
from app_data.sets.tree_sets import find_imagenet, find_rare_species, find_sun397
from app_data.store.errors import DataError


@dataclass(frozen=True)
class FewShotFiles:
    """A data set of the paper before any picture is opened.

    Attributes:
        stored: Its tree with text and cuts.
        train: What shots are chosen from.
        test: What is tested on.
    """

    stored: StoredTree
    train: Found
    test: Found

    def shots(self, num: int, seed: int) -> Found:
        """So many training pictures of every class that has any; see `take_shots`.

        Raises:
            DataError: A class has fewer.
        """
        counts = np.bincount(self.train.targets, minlength=self.stored.taxonomy.num_nodes)
        short = np.flatnonzero((counts > 0) & (counts < num))
        if len(short):
            raise DataError(
                f"the class {self.stored.taxonomy.names[short[0]]!r} of {self.train.root} has {counts[short[0]]} training "
                f"pictures, fewer than {num} shots: choose fewer shots or add pictures"
            )
        return self.train.select(choose_shots([f.name for f in self.train.files], self.train.targets, num, seed))

    def under(self, leaves: Collection[int]) -> "FewShotFiles":
        """The pictures of some leaves, under the part of the tree above these."""
        stored, new = part_of_tree(self.stored, leaves)

        def part(found: Found) -> Found:
            moved = new.numpy()[found.targets]
            chosen = found.select(np.flatnonzero(moved >= 0))
            kept = moved[moved >= 0]
            return replace(chosen, targets=kept, tree=stored.taxonomy, node_text=stored.node_text)

        return FewShotFiles(stored, part(self.train), part(self.test))


class _TreeSet(NamedTuple):
    """What a data set of the paper is called, where it comes from, and how its files are found."""

    title: str
    tree: str
    holds: str
    home: str
    find: Callable[[Path, Path, Path | None], Found]


def _find_cifar100(root: Path, tree: Path, cache_dir: Path | None) -> Found:
    if not (root / "train").is_dir() and (root / ARCHIVE).is_file():
        root = unpack(root / ARCHIVE, cache_dir)
    stored = read_stored_tree(tree)
    return replace(find_pictures(root, stored.taxonomy), node_text=stored.node_text)


def _find_rare(root: Path, tree: Path, cache_dir: Path | None) -> Found:
    found = find_rare_species(root, tree)
    shares = {"train": 0.8, "test": 0.2}
    return replace(found, files=with_parts(found.files, found.targets, shares, 0, cache_dir))


_TREE_SETS = {
    "cifar100": _TreeSet(
        "CIFAR-100", "cifar100.json", f"train/<class>/ and test/<class>/, or {ARCHIVE}",
        "https://www.cs.toronto.edu/~kriz/cifar.html", _find_cifar100,
    ),
    "sun397": _TreeSet(
        "SUN397", "sun.json", "a/, b/, ... and Training_01.txt and Testing_01.txt, there or in Partitions/",
        "https://vision.princeton.edu/projects/2010/SUN", lambda root, tree, cache_dir: find_sun397(root, tree),
    ),
    "imagenet": _TreeSet(
        "ImageNet-1k", "imagenet.json", "train/<wnid>/ and val/",
        "https://image-net.org", lambda root, tree, cache_dir: find_imagenet(root, tree),
    ),
    "rare-species": _TreeSet(
        "Rare Species", "rarespecies.json", "metadata.csv and the pictures it names",
        "https://huggingface.co/datasets/imageomics/rare-species", _find_rare,
    ),
}  # fmt: skip


def find_few_shot(
    name: str, source: str | Path, tree: str | Path | None = None, cache_dir: str | Path | None = None
) -> FewShotFiles:
    """Find a data set of the paper with its tree; no picture is opened.

    Args:
        name: "cifar100", "sun397", "imagenet" or "rare-species".
        source: Its folder, or one that holds it under its name.
        tree: The file of its tree, or a folder that holds it; searched for in and beside the data set's folder if None.
        cache_dir: Where an archive is unpacked and hashes are kept; the user's cache folder if None.

    Raises:
        DataError: What is missing, and where it comes from.
    """
    known, source = _TREE_SETS[name], Path(source).expanduser()
    root = source / name if (source / name).is_dir() else source
    comes = f"{known.title} comes from {known.home}"
    if not root.is_dir():
        raise DataError(f"{source} is no folder: give --source DIR with {known.holds}; {comes}")
    places = [root, root / "trees", source / "trees", source.parent / "trees"] if tree is None else [Path(tree)]
    files = [place / known.tree if place.is_dir() else place for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        looked = ", ".join(dict.fromkeys(map(str, files)))
        raise DataError(
            f"the tree of {known.title} is missing ({looked}): give --tree FILE, JSON with nodes, leaves and treecuts; "
            "the trees come from https://github.com/gina9726/ProTeCt"
        )
    try:
        found = known.find(root, file, None if cache_dir is None else Path(cache_dir))
    except DataError as error:
        raise DataError(f"{error} (needed: {known.holds}; {comes})") from error
    if found.problems:
        raise DataError("; ".join(found.problems))
    parts = {part: [i for i, f in enumerate(found.files) if f.part == part] for part in PARTS}
    test = parts["test"] or parts["val"]  # ImageNet is tested on its validation pictures
    if not parts["train"] or not test:
        raise DataError(
            f"{root} has no pictures to {'test' if parts['train'] else 'train'} on: needed are {known.holds}; {comes}"
        )
    return FewShotFiles(read_stored_tree(file), found.select(parts["train"]), found.select(test))
