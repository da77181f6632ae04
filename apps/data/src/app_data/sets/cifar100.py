"""CIFAR-100 with few pictures per class, under the WordNet tree and the 25 tree cuts stored with it.

Pictures: Krizhevsky, 2009. Tree and cuts: Wu, Ho, Vasconcelos, 2024, "ProTeCt" (arXiv 2306.02240).
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app_data.read.folder import find_pictures, load_found
from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet
from app_data.read.tables import read_taxonomy
from app_data.sets.papers import unpack
from app_data.store.errors import DataError
from app_data.store.text import read_json
from hier_losses import Taxonomy
from hier_losses.treecuts import TreeCuts

ARCHIVE, TREE = "cifar100_fewshot.tar.gz", "trees/cifar100.json"


class StoredTree(NamedTuple):
    """A published tree: the taxonomy, the readable text of every node, and the stored evaluation cuts."""

    taxonomy: Taxonomy
    node_text: tuple[str, ...]
    cuts: TreeCuts


class FewShot(NamedTuple):
    """Pictures to train and to test on, over one taxonomy, and the cuts that mean tree-cut accuracy is taken over."""

    train: PictureSet
    test: PictureSet
    cuts: TreeCuts


def read_stored_tree(path: str | Path) -> StoredTree:
    """Read a tree in ProTeCt's JSON form, with its cuts.

    Args:
        path: A file with `nodes` (`id`, `name`, `text`, `parent`, `children`), `leaves` and `treecuts`.

    Returns:
        The tree; its single root becomes the taxonomy's virtual root.

    Raises:
        DataError: The file is missing, holds no tree, or its cuts do not fit the tree.
    """
    path = Path(path)
    tax = read_taxonomy(path).taxonomy
    try:
        content = read_json(path)
        cuts = TreeCuts.from_text_cuts(content, tax)
        by_id = {node["id"]: node for node in content["nodes"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the tree {path} has no usable cuts ({error}): give a file in ProTeCt's form") from error
    text = [name.replace("_", " ") for name in tax.names]
    for node in by_id.values():
        names, up = [], node
        while up is not None:
            names.append(str(up["name"]))
            up = None if up["parent"] is None else by_id[up["parent"]]
        names = names[::-1][len(by_id) - tax.num_nodes :]
        if names:
            text[tax.index(tuple(names))] = str(node.get("text", node["name"]))
    return StoredTree(tax, tuple(text), cuts)


def load_cifar100_fewshot(
    data: str | Path, tree: str | Path | None = None, decoding: Decoding | None = None
) -> FewShot:
    """CIFAR-100, 20 pictures per class to train on and 50 to test on, under the stored WordNet tree.

    Args:
        data: The folder with `cifar100_fewshot.tar.gz` (or its content, `train/<class>/` and `test/<class>/`) and
            `trees/cifar100.json`; or the archive itself.
        tree: The tree, if it stands elsewhere.
        decoding: Size, cache and budget of bad files; 32 px if None, the size of the originals.

    Returns:
        Train and test pictures, and the 25 stored cuts; leaf and folder names are equal.

    Raises:
        DataError: A missing file or folder, or classes that the tree does not have.
    """
    data = Path(data)
    folder = data if data.is_dir() else data.parent
    archive = folder / ARCHIVE if data.is_dir() else data
    if not (data / "train").is_dir() and not archive.is_file():
        raise DataError(f"{data} holds neither {ARCHIVE} nor a folder train: give the folder of the data set")
    stored = read_stored_tree(folder / TREE if tree is None else tree)
    decoding = decoding or Decoding(size=32)
    root = data if (data / "train").is_dir() else unpack(archive, decoding.cache_dir)
    parts = {
        part: load_found(find_pictures(root / part, stored.taxonomy), decoding, fractions={part: 1.0})[part]
        for part in ("train", "test")
    }
    train, test = (replace(part, node_text=stored.node_text) for part in parts.values())
    return FewShot(train, test, stored.cuts)


def take_shots(pictures: PictureSet, shots: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Choose so many pictures of every class, by a hash of seed and file name; more shots keep what fewer chose.

    Args:
        pictures: Labelled pictures with file names.
        shots: Pictures per class; a class with fewer gives all it has.
        seed: Decides which ones.

    Returns:
        Positions of the chosen pictures and of the others, each ascending.

    Raises:
        ValueError: A negative number of shots, or pictures without file names.
    """
    if len(pictures.files) != len(pictures):
        raise ValueError(f"pictures must have one file name each, got {len(pictures.files)} for {len(pictures)}")
    chosen = choose_shots(pictures.files, pictures.targets, shots, seed)
    kept = np.isin(np.arange(len(pictures)), chosen)
    return np.flatnonzero(kept), np.flatnonzero(~kept)


def choose_shots(names: Sequence[str], targets: np.ndarray, shots: int, seed: int = 0) -> np.ndarray:
    """Positions of so many files of every class, ascending; see `take_shots`. No file is opened.

    Args:
        names: Name of each file.
        targets: Class of each file (n,).
        shots: Files per class; a class with fewer gives all it has.
        seed: Decides which ones.

    Raises:
        ValueError: A negative number of shots.
    """
    if shots < 0:
        raise ValueError(f"shots must be at least 0, got {shots}")
    rank = [hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in names]
    members: dict[int, list[int]] = {}
    for position, target in enumerate(targets.tolist()):
        members.setdefault(target, []).append(position)
    chosen = [p for group in members.values() for p in sorted(group, key=rank.__getitem__)[:shots]]
    return np.array(sorted(chosen), dtype=np.int64)


def part_of_tree(stored: StoredTree, leaves: Collection[int]) -> tuple[StoredTree, Tensor]:
    """The tree above some of its leaves, with the cuts of these.

    Args:
        stored: The whole tree.
        leaves: Node ids of the leaves that stay.

    Returns:
        The smaller tree, and the new id of every old node, -1 for those that are gone (N,).
    """
    tax = stored.taxonomy
    paths = tax.paths[torch.tensor(sorted(leaves))]
    gone = torch.ones(tax.num_nodes, dtype=torch.bool)
    gone[paths[paths >= 0]] = False
    update = tax.prune(gone.nonzero().squeeze(1))
    new = update.old_to_new
    # A member that stays has leaves that stay below it; one that goes has none.
    cuts = TreeCuts(update.taxonomy, [new[cut.nodes][new[cut.nodes] >= 0] for cut in stored.cuts])
    text = tuple(stored.node_text[node] for node in update.new_to_old.tolist())
    return StoredTree(update.taxonomy, text, cuts), new
