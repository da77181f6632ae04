"""A folder of pictures plus a taxonomy: nested folders, class folders with a CSV or JSON tree, or a CSV of files.

Every problem a person can cause raises `DataError` with one sentence that names the file, class or line and the remedy.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from app_data.read.labelled import Decoding, LabelledFile, picture_sets
from app_data.read.pictures import PictureSet
from app_data.read.tables import read_listing, read_taxonomy
from app_data.store.errors import DataError
from hier_losses import Taxonomy

__all__ = ["load_folder"]

# What people call the parts of a split.
_PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def load_folder(
    root: str | Path,
    taxonomy: str | Path | Taxonomy | None = None,
    *,
    listing: str | Path | None = None,
    size: int = 128,
    fit: str = "crop",
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    max_bad_fraction: float = 0.01,
    max_bad_files: int = 10,
    allow_empty_classes: bool = False,
) -> dict[str, PictureSet]:
    """Read labelled pictures and split them.

    Args:
        root: The folder. With `train/`, `val/` or `test/` directly below it, these are the split; else see `fractions`.
        taxonomy: None takes the tree from the nested folders (`animal/dog/1.jpg`); else a CSV or JSON file (see
            `read_taxonomy`), or a `Taxonomy`, and the folder that holds a picture names its class: by name, or by full
            path where names repeat.
        listing: A CSV with the header `path,leaf` (and optionally `split`) that lists the pictures instead of the
            folders; paths are relative to `root`. Without `taxonomy`, `leaf` spells full paths such as `animal/dog`.
        size: Height and width of the pictures in pixels.
        fit: See `load_picture`.
        fractions: Shares for the split when the folder has none; {"train": .8, "val": .1, "test": .1} if None.
        seed: Decides which picture goes where.
        cache_dir: Where decoded pictures are kept; the user's cache folder if None.
        workers: Threads that decode; at most eight of the machine's cores if None.
        max_bad_fraction: Budget of unreadable files: the larger of this share and `max_bad_files`.
        max_bad_files: See `max_bad_fraction`.
        allow_empty_classes: Keep leaves without pictures as candidate labels.

    Returns:
        The parts by name; all share one taxonomy. `skipped` lists the files that could not be read: those of the part
        if the folder came split, else all.

    Raises:
        DataError: Anything in the folder or the tables that does not fit together.
        TooManyBadFiles: More unreadable files than the budget.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder that holds the pictures")
    tree = taxonomy if isinstance(taxonomy, Taxonomy) or taxonomy is None else read_taxonomy(taxonomy)
    files = _from_listing(root, Path(listing)) if listing is not None else _from_folders(root, nested=tree is None)
    if tree is None:
        tree = _tree_of(files)
    targets = _targets(files, tree, root)
    decoding = Decoding(size, fit, cache_dir, workers, max_bad_fraction, max_bad_files)
    return picture_sets(
        files,
        targets,
        tree,
        decoding,
        style=root.name,
        fractions=fractions,
        seed=seed,
        allow_empty_classes=allow_empty_classes,
    )


def _children(folder: Path) -> tuple[list[Path], list[Path]]:
    """Visible subfolders and files, in name order."""
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")) and p.name != "Thumbs.db")
    return [p for p in visible if p.is_dir()], [p for p in visible if p.is_file()]


def _from_folders(root: Path, nested: bool) -> list[LabelledFile]:
    """All pictures below `root`, each labelled by its folders."""
    folders, loose = _children(root)
    if not folders:
        if not loose:
            raise DataError(f"the folder {root} is empty: put one folder of pictures per class into it")
        raise DataError(
            f"the folder {root} has files but no class folders: make one folder per class, or give a listing"
        )
    # A class may be called "train" too, so it is a split only if every folder here is a part of one.
    if all(folder.name.lower() in _PART_NAMES for folder in folders):
        files = []
        for folder in folders:
            classes, _ = _children(folder)
            if not classes:
                raise DataError(
                    f"the folder {folder} has no class folders: put one folder of pictures per class into it"
                )
            part = _PART_NAMES[folder.name.lower()]
            files += [f for inner in classes for f in _walk(inner, root, (inner.name,), part, nested, ())]
        return files
    return [f for folder in folders for f in _walk(folder, root, (folder.name,), "", nested, ())]


def _walk(
    folder: Path, root: Path, label: tuple[str, ...], part: str, nested: bool, above: tuple[Path, ...]
) -> list[LabelledFile]:
    here = folder.resolve()
    if here in above:
        raise DataError(f"the folder {folder} links back to {here} above it: remove the link")
    folders, pictures = _children(folder)
    if not folders and not pictures:
        raise DataError(f"the class folder {folder} has no pictures: add some or remove the folder")
    if nested and folders and pictures:
        raise DataError(
            f"the folder {folder} holds both class folders and files (such as {pictures[0].name}): move the files into "
            "a class folder"
        )
    files = [LabelledFile(picture, picture.relative_to(root).as_posix(), label, part) for picture in pictures]
    for inner in folders:
        files += _walk(inner, root, (*label, inner.name), part, nested, (*above, here))
    return files


def _from_listing(root: Path, listing: Path) -> list[LabelledFile]:
    files = []
    for row in read_listing(listing):
        if row.split and row.split not in _PART_NAMES:
            raise DataError(f"{listing} gives {row.path} the split {row.split!r}: use train, val or test")
        files.append(
            LabelledFile(root / row.path, row.path, tuple(row.leaf.split("/")), _PART_NAMES.get(row.split, ""))
        )
    unsplit = [file for file in files if not file.part]
    if unsplit and len(unsplit) < len(files):
        raise DataError(f"{listing} gives {unsplit[0].name} no split but others one: fill in all of them or none")
    return files


def _tree_of(files: Sequence[LabelledFile]) -> Taxonomy:
    try:
        return Taxonomy.from_paths(sorted({file.label for file in files}))
    except ValueError as error:
        raise DataError(f"the class names form no tree: {error}") from error


def _targets(files: Sequence[LabelledFile], tree: Taxonomy, root: Path) -> np.ndarray:
    """Node id of every file's class."""
    nodes: dict[tuple[str, ...], int] = {}
    named: dict[str, list[int]] = {}
    for node in tree.leaf.tolist():
        named.setdefault(tree.names[node], []).append(node)
    paths = {tree.path_of(node): node for node in tree.leaf.tolist()}
    for file in files:
        if file.label in nodes:
            continue
        # The whole path first; else the folder that holds the picture, whatever lies above it.
        found = [paths[file.label]] if file.label in paths else named.get(file.label[-1], [])
        if not found:
            close = get_close_matches(file.label[-1], named, n=1, cutoff=0.6)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"its leaves are for example {', '.join(list(named)[:3])}"
            )
            raise DataError(
                f"the class {'/'.join(file.label)!r} (of {file.name} in {root}) is no leaf of the taxonomy: add it "
                f"there or rename it; {hint}"
            )
        if len(found) > 1:
            spelled = " and ".join("/".join(tree.path_of(node)) for node in found[:3])
            raise DataError(f"the class {file.label[-1]!r} stands for several leaves ({spelled}): use a full path")
        nodes[file.label] = found[0]
    return np.array([nodes[file.label] for file in files], dtype=np.int64)
