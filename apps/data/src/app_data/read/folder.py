"""A folder of pictures plus a taxonomy: nested folders, class folders with a tree of their own, or lists of files.

Every problem a person can cause raises `DataError` with one sentence that names the file, class or line and the remedy;
what was found, matched and left out is kept, to be shown.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from app_data.read.labelled import Decoding, LabelledFile, picture_sets
from app_data.read.names import match_labels
from app_data.read.pictures import SUFFIXES, PictureSet, lies_in
from app_data.read.tables import Classes, read_listing, read_taxonomy
from app_data.store.errors import DataError, Skipped
from hier_losses import Taxonomy

# What people call the parts of a split.
_PART_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_PART_NAMES |= dict.fromkeys(("val", "valid", "validation"), "val")
# Files that commonly lie beside pictures; others that are no pictures are worth a warning.
_BESIDE = (
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".ini", ".db", ".html", ".yaml", ".yml", ".log", ".pdf", ".py", ".npy",
    ".npz", ".mat",
)  # fmt: skip


@dataclass
class Found:
    """Pictures before any of them is opened.

    Attributes:
        root: The folder.
        files: The pictures with their labels and parts.
        tree: The taxonomy.
        targets: Node of each picture; -1 where the label matches nothing.
        split: Where the parts come from.
        notes: What was found and understood.
        warnings: What deserves a look.
        problems: What stops: labels that match nothing, pictures that do not exist.
        left_out: Files that were not taken for pictures, with reasons.
        node_text: Readable text of every node; the names without underscores if empty.
    """

    root: Path
    files: list[LabelledFile]
    tree: Taxonomy
    targets: np.ndarray
    split: str
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[Skipped] = field(default_factory=list)
    node_text: tuple[str, ...] = ()

    def select(self, keep: Sequence[int] | np.ndarray) -> "Found":
        """The pictures at these positions."""
        chosen = [int(i) for i in keep]
        return replace(self, files=[self.files[i] for i in chosen], targets=self.targets[chosen])


def load_found(
    found: Found,
    decoding: Decoding | None = None,
    *,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    allow_empty_classes: bool = False,
) -> dict[str, PictureSet]:
    """Decode what `find_pictures` found, and split it.

    Args:
        found: The pictures.
        decoding: Size, cache and budget of bad files.
        fractions: Shares for the split when the folder has none; {"train": .8, "val": .1, "test": .1} if None.
        seed: Decides which picture goes where.
        allow_empty_classes: Keep leaves without pictures as candidate labels.

    Returns:
        The parts by name; all share one taxonomy. `skipped` lists the files that could not be read: those of the part
        if the folder came split, else all.

    Raises:
        DataError: `found` has problems, or a class has no picture that can be read.
        TooManyBadFiles: More unreadable files than the budget.
    """
    if found.problems:
        raise DataError("; ".join(found.problems))
    parts = picture_sets(
        found.files,
        found.targets,
        found.tree,
        decoding or Decoding(),
        style=found.root.name,
        fractions=fractions,
        seed=seed,
        allow_empty_classes=allow_empty_classes,
    )
    return {p: replace(d, node_text=found.node_text) for p, d in parts.items()} if found.node_text else parts


def find_pictures(
    root: str | Path,
    taxonomy: str | Path | Taxonomy | None = None,
    *,
    listing: str | Path | Sequence[str | Path] | None = None,
    listing_columns: str = "",
    outside: bool = False,
) -> Found:
    """Find pictures with their labels and parts, without opening any.

    Args:
        root: The folder. With `train/` and `val/` or `test/` directly below it, these are the split, whatever else lies
            there; so are lists called train, val and test (.txt, .csv, .tsv) that name pictures.
        taxonomy: None takes the tree from the nested folders (`animal/dog/1.jpg`); else a file (see `read_taxonomy`), or
            a `Taxonomy`, and the folder that holds a picture names its class: by name, or by full path where names repeat.
        listing: Lists of the pictures in place of the folders, see `read_listing`; of several each is the part of its
            name. Paths are relative to `root`. Without `taxonomy`, labels spell full paths such as `animal/dog`.
        listing_columns: See `read_listing`.
        outside: Whether a list may name files that do not lie below `root`.

    Raises:
        DataError: Anything that leaves no tree or no pictures; names that match nothing are in `problems`.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder that holds the pictures")
    classes = None
    if taxonomy is not None:
        classes = Classes(taxonomy) if isinstance(taxonomy, Taxonomy) else read_taxonomy(taxonomy)
    search = _Search(root, classes is None, outside)
    lists = [listing] if isinstance(listing, str | Path) else list(listing or ())
    if lists:
        files = search.from_lists([Path(path) for path in lists], listing_columns, classes)
    else:
        files = search.lists_beside(listing_columns, classes) or search.from_folders()
    if {file.part for file in files} == {"train"}:
        search.notes.append("there are pictures to train on alone: they are split")
        files = [LabelledFile(file.path, file.name, file.label) for file in files]
        search.split = "made"
    if not files:
        raise DataError(f"the folder {root} holds no picture ({', '.join(SUFFIXES)})")
    tree = _tree_of(files) if classes is None else classes.taxonomy
    examples: dict[tuple[str, ...], str] = {}
    for file in files:
        examples.setdefault(file.label, file.name)
    matches = match_labels(examples, tree, str(root))
    targets = np.array([matches.nodes.get(file.label, -1) for file in files], dtype=np.int64)
    search.warnings += search.unknown_endings()
    notes = [*(classes.notes if classes else ()), *search.notes, *matches.notes]
    problems = [*search.problems, *matches.problems]
    return Found(root, files, tree, targets, search.split, notes, search.warnings, problems, search.left_out)


def _tree_of(files: Sequence[LabelledFile]) -> Taxonomy:
    labels = {file.label for file in files}
    above = {label[:i] for label in labels for i in range(1, len(label))}
    try:
        return Taxonomy.from_paths(sorted(labels - above))
    except ValueError as error:
        raise DataError(f"the class names form no tree: {error}") from error


def _children(folder: Path) -> tuple[list[Path], list[Path]]:
    """Visible subfolders and files, dead links among them, in name order."""
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")) and p.name != "Thumbs.db")
    return [p for p in visible if p.is_dir()], [p for p in visible if not p.is_dir()]


class _Search:
    """Finds labelled files, and keeps what is to be said about it."""

    def __init__(self, root: Path, nested: bool, outside: bool) -> None:
        self.root, self.nested, self.outside, self.split = root, nested, outside, "made"
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.problems: list[str] = []
        self.left_out: list[Skipped] = []

    def from_folders(self) -> list[LabelledFile]:
        """All pictures, each labelled by its folders."""
        folders, loose = _children(self.root)
        if not folders:
            if not loose:
                raise DataError(f"the folder {self.root} is empty: put one folder of pictures per class into it")
            raise DataError(
                f"the folder {self.root} has files but no class folders: make one folder per class, or give a listing"
            )
        parts = [folder for folder in folders if folder.name.lower() in _PART_NAMES]
        kinds = {_PART_NAMES[folder.name.lower()] for folder in parts}
        # A class may be called "train" too: beside other folders it takes two parts to make a split.
        if not parts or (len(parts) < len(folders) and not {"train"} < kinds):
            if parts:
                named = ", ".join(f"{folder.name}/" for folder in parts)
                self.warnings.append(f"{named} is taken for a class: a split needs train/ and test/ or val/")
            return [f for folder in folders for f in self._walk(folder, (folder.name,), "", ())]
        self.split = "folders"
        self.notes.append(f"the split is that of the folders {', '.join(f'{folder.name}/' for folder in parts)}")
        for folder in folders:
            if folder not in parts:
                self._leave(folder, "it lies beside the folders of the split")
        files = []
        for folder in parts:
            part = _PART_NAMES[folder.name.lower()]
            inner, loose = _children(folder)
            if not inner and part != "train" and any(path.name.lower().endswith(SUFFIXES) for path in loose):
                self._leave(folder, "its pictures have no class folders; hier predict names them")
            elif not inner:
                raise DataError(
                    f"the folder {folder} has no class folders: put one folder of pictures per class into it"
                )
            files += [f for child in inner for f in self._walk(child, (child.name,), part, ())]
        return files

    def _leave(self, folder: Path, reason: str) -> None:
        count = sum(name.lower().endswith(SUFFIXES) for _, _, names in os.walk(folder) for name in names)
        self.notes.append(f"{folder.name}/ with {count} pictures is left alone: {reason}")

    def _walk(self, folder: Path, label: tuple[str, ...], part: str, above: tuple[Path, ...]) -> list[LabelledFile]:
        here = folder.resolve()
        if here in above:
            raise DataError(f"the folder {folder} links back to {here} above it: remove the link")
        folders, found = _children(folder)
        pictures = [path for path in found if self._is_picture(path)]
        name = folder.relative_to(self.root).as_posix()
        if not folders and not pictures:
            self.warnings.append(f"the class folder {name} has no pictures")
        if self.nested and folders and pictures:
            raise DataError(
                f"the folder {folder} holds both class folders and files (such as {pictures[0].name}): move the files "
                "into a class folder"
            )
        files = [LabelledFile(path, path.relative_to(self.root).as_posix(), label, part) for path in pictures]
        for inner in folders:
            files += self._walk(inner, (*label, inner.name), part, (*above, here))
        return files

    def _is_picture(self, path: Path) -> bool:
        if path.name.lower().endswith(SUFFIXES):
            return True
        name = path.relative_to(self.root).as_posix()
        self.left_out.append(Skipped(name, "its name does not end like that of a picture"))
        return False

    def unknown_endings(self) -> list[str]:
        """A warning for endings that are not those of files beside pictures: .heic, .svg."""
        endings = Counter(Path(entry.path).suffix.lower() for entry in self.left_out)
        odd = [f"{count} {ending or 'without ending'}" for ending, count in endings.items() if ending not in _BESIDE]
        return [f"files left out by their names: {', '.join(odd)}; {', '.join(SUFFIXES)} are read"] if odd else []

    def lists_beside(self, columns: str, classes: Classes | None) -> list[LabelledFile]:
        """The pictures of the lists train.txt, val.csv, ... in the folder; none if they do not list pictures."""
        _, loose = _children(self.root)
        lists = [p for p in loose if p.suffix.lower() in (".txt", ".csv", ".tsv") and p.stem.lower() in _PART_NAMES]
        if "train" not in {_PART_NAMES[path.stem.lower()] for path in lists}:
            return []
        names = ", ".join(path.name for path in lists)
        try:
            for path in lists:
                rows, _ = read_listing(path, columns, classes, self._exists)
                if not any(self._exists(row.path) for row in rows):
                    raise DataError(f"none of the paths in {path.name} exists")
        except DataError as error:
            self.warnings.append(f"{names} beside the pictures are not used: {error}")
            return []
        self.notes.append(f"the lists {names} were found and are used in place of the folders")
        return self.from_lists(lists, columns, classes)

    def from_lists(self, lists: Sequence[Path], columns: str, classes: Classes | None) -> list[LabelledFile]:
        """The pictures of lists; the part is that of the column split, else of the list's name."""
        files: dict[str, LabelledFile] = {}
        for path in lists:
            rows, notes = read_listing(path, columns, classes, self._exists)
            self.notes += notes
            words = [_PART_NAMES[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in _PART_NAMES]
            own = words[0] if len(words) == 1 else ""
            if len(lists) > 1 and not own and not all(row.split for row in rows):
                raise DataError(
                    f"the name of {path} says no part: call lists train, val and test, or add a column split"
                )
            missing = []
            for row in rows:
                if row.split and row.split not in _PART_NAMES:
                    raise DataError(f"{path} gives {row.path} the split {row.split!r}: use train, val or test")
                part = _PART_NAMES[row.split] if row.split else own
                if row.path in files and files[row.path].part != part:
                    self.problems.append(f"{row.path} is listed as {files[row.path].part} and as {part}: keep one")
                files[row.path] = LabelledFile(self._at(row.path), row.path, row.label, part)
                if not os.path.lexists(files[row.path].path):
                    missing.append(row.path)
            if missing:
                verb, rest = (
                    ("does", "its path or remove its row") if len(missing) == 1 else ("do", "their paths or rows")
                )
                self.problems.append(f"{', '.join(missing)} (in {path}) {verb} not exist: correct {rest}")
        unsplit = [file for file in files.values() if not file.part]
        if unsplit and len(unsplit) < len(files):
            raise DataError(f"{lists[0]} gives {unsplit[0].name} no split but others one: fill in all of them or none")
        self.split = "made" if unsplit else "lists"
        return list(files.values())

    def _at(self, name: str) -> Path:
        at = self.root / Path(name).expanduser()
        if not self.outside and not lies_in(self.root, at):
            raise DataError(
                f"a list names {name}, which does not lie in {self.root}: say outside (--outside) if that is meant"
            )
        return at

    def _exists(self, name: str) -> bool:
        return self._at(name).exists()
