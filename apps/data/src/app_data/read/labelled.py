"""Decodes picture files, and hands labelled ones out as one `PictureSet` for each part of a split."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from app_data.read.pictures import PictureSet, load_picture
from app_data.read.splits import stratified_split
from app_data.store.cache import cached_pictures, fingerprint
from app_data.store.digests import content_digests
from app_data.store.errors import DataError, Skipped
from hier_losses import Taxonomy

PARTS = ("train", "val", "test")
_PILLOWS = 89478485  # most pixels of a picture, unless `allow_megapixels` says otherwise
_CODE = 2  # raise when the decoding of files changes: cached pictures are then decoded again


@dataclass(frozen=True)
class PictureFile:
    """A picture file and what messages call it."""

    path: Path
    name: str  # relative to the data set's root, with forward slashes

    def __str__(self) -> str:
        """Return the name."""
        return self.name


@dataclass(frozen=True)
class LabelledFile(PictureFile):
    """A picture file, the folders or table cell that label it, and its part of the split ("" if there is none yet)."""

    label: tuple[str, ...]
    part: str = ""


class Decoded(NamedTuple):
    """What `decode_files` read.

    Attributes:
        pixels: The pictures (n, size, size, 3) uint8, memory-mapped.
        kept: Position of each in the list of files (n,).
        skipped: Files left out, with reasons.
        key: What the pixels depend on, for fingerprints.
    """

    pixels: np.ndarray
    kept: np.ndarray
    skipped: tuple[Skipped, ...]
    key: dict[str, Any]


@dataclass(frozen=True)
class Decoding:
    """How files become arrays.

    Attributes:
        size: Height and width of the pictures in pixels.
        fit: See `load_picture`.
        cache_dir: Where decoded pictures are kept; the user's cache folder if None.
        workers: Threads that decode; at most eight of the machine's cores if None.
        max_bad_fraction: Budget of unreadable files: the larger of this share and `max_bad_files`.
        max_bad_files: See `max_bad_fraction`.
    """

    size: int = 128
    fit: str = "crop"
    cache_dir: str | Path | None = None
    workers: int | None = None
    max_bad_fraction: float = 0.01
    max_bad_files: int = 10

    def __post_init__(self):
        """Refuse sizes that no picture has."""
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.fit not in ("crop", "pad", "squash"):
            raise ValueError(f"fit must be 'crop', 'pad' or 'squash', got {self.fit!r}")

    def read(self, key: Mapping[str, Any], files: Sequence["PictureFile"]) -> "Decoded":
        """Decode files, or read what is stored under a key of all they depend on but the size."""
        pixels, kept, skipped = cached_pictures(
            dict(key),
            files,
            lambda file: load_picture(file.path, self.size, self.fit),
            size=self.size,
            cache_dir=self.cache_dir,
            workers=min(8, os.cpu_count() or 1) if self.workers is None else self.workers,
            max_bad_fraction=self.max_bad_fraction,
            max_bad_files=self.max_bad_files,
        )
        return Decoded(pixels, kept, skipped, {**key, "size": self.size})


def picture_sets(
    files: Sequence[LabelledFile],
    targets: np.ndarray,
    taxonomy: Taxonomy,
    decoding: Decoding,
    *,
    style: str = "",
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    allow_empty_classes: bool = False,
) -> dict[str, PictureSet]:
    """Decode files, or read them from the cache, and split them.

    Args:
        files: The pictures; either all or none of them name a part.
        targets: Taxonomy node of each file's class (n,).
        taxonomy: The label tree.
        decoding: Size, cache and budget of bad files.
        style: Style of pictures without a part.
        fractions: Shares of the split if no file names a part; {"train": .8, "val": .1, "test": .1} if None.
        seed: Decides which picture goes where.
        allow_empty_classes: Keep leaves without pictures as candidate labels.

    Returns:
        The parts by name, all over one taxonomy.

    Raises:
        DataError: A file is missing, a class has no readable picture, or none is left.
        TooManyBadFiles: More unreadable files than the budget.
    """
    pixels, kept, skipped, key = decode_files(files, decoding)
    _check_classes(files, targets, kept, taxonomy, allow_empty_classes)
    done = [files[i] for i in kept]
    digests = [digest for _, digest in key["files"]]
    labels = {"tree": [list(taxonomy.names), taxonomy.parent.tolist()], "targets": targets.tolist()}
    everything = PictureSet(
        store=pixels,
        rows=np.arange(len(done)),
        targets=targets[kept],
        styles=tuple(file.part or style for file in done),
        names=tuple(taxonomy.names[target] for target in targets[kept]),
        taxonomy=taxonomy,
        fingerprint=fingerprint({**key, **labels}),
        files=tuple(file.name for file in done),
        skipped=skipped,
        node_text=tuple(name.replace("_", " ") for name in taxonomy.names),
    )
    part_of = {file.name: file.part for file in files}
    if not any(part_of.values()):
        # "test" before "val": of two parts with equal shares the first one gets the odd picture of a small class.
        shares = {"train": 0.8, "test": 0.1, "val": 0.1} if fractions is None else fractions
        split = _split(everything.targets, everything.files, [digests[i] for i in kept], shares, seed)
        order = [part for part in PARTS if part in split] + [part for part in split if part not in PARTS]
        return {part: everything.select(split[part]) for part in order}
    parts = {}
    for part in PARTS:
        rows = [row for row, file in enumerate(done) if file.part == part]
        if rows:
            own = tuple(bad for bad in skipped if part_of[bad.path] == part)
            parts[part] = replace(everything.select(rows), skipped=own)
    return parts


def with_parts(
    files: Sequence[LabelledFile],
    targets: np.ndarray,
    fractions: Mapping[str, float],
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> list[LabelledFile]:
    """The files with the parts that `picture_sets` would split them into; they are read for their copies, none is decoded.

    Args:
        files: The pictures, without parts.
        targets: Taxonomy node of each file's class (n,).
        fractions: Shares of the split.
        seed: Decides which picture goes where.
        cache_dir: Where hashes of contents are kept; the user's cache folder if None.
    """
    digests = content_digests([file.path for file in files], cache_dir)
    split = _split(targets, [file.name for file in files], digests, fractions, seed)
    part_of = {int(row): part for part, rows in split.items() for row in rows}
    return [replace(file, part=part_of[row]) for row, file in enumerate(files)]


def _split(
    targets: np.ndarray, names: Sequence[str], digests: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Split by class; copies of one picture go into one part, which else would test what training has seen."""
    first: dict[str, int] = {}
    for row, digest in enumerate(digests):
        first.setdefault(digest, row)
    rows = np.array(sorted(first.values()))
    split = stratified_split(targets[rows], [names[row] for row in rows], shares, seed)
    part_of = {int(rows[i]): part for part, chosen in split.items() for i in chosen}
    found: dict[str, list[int]] = {part: [] for part in split}
    for row, digest in enumerate(digests):
        found[part_of[first[digest]]].append(row)
    return {part: np.array(chosen, dtype=np.int64) for part, chosen in found.items()}


def decode_files(files: Sequence[PictureFile], decoding: Decoding, *, missing_is_bad: bool = False) -> Decoded:
    """Decode files, or read them from the cache.

    Args:
        files: The pictures.
        decoding: Size, cache and budget of bad files.
        missing_is_bad: Count a missing file as one that cannot be read; else it is an error.

    Returns:
        Pixels, which files they are, and the files left out.

    Raises:
        DataError: A file is missing, or none can be read.
        TooManyBadFiles: More unreadable files than the budget.
    """
    key = {
        "data": "files",
        "code": _CODE,
        "fit": decoding.fit,
        **({} if Image.MAX_IMAGE_PIXELS == _PILLOWS else {"pixels": Image.MAX_IMAGE_PIXELS}),
        # By content: a file that was only touched or copied changes nothing.
        "files": [
            [file.name, digest] for file, digest in zip(files, _digests(files, decoding, missing_is_bad), strict=True)
        ],
    }
    return decoding.read(key, files)


def _digests(files: Sequence[PictureFile], decoding: Decoding, missing_is_bad: bool) -> list[str]:
    for file in files:
        # A dead link is counted as a file that cannot be read.
        if not missing_is_bad and not os.path.lexists(file.path):
            raise DataError(f"the picture {file.path} does not exist: correct its path or remove its row")
    return content_digests([file.path for file in files], decoding.cache_dir)


def _check_classes(
    files: Sequence[LabelledFile], targets: np.ndarray, kept: np.ndarray, tree: Taxonomy, allow_empty: bool
) -> None:
    """Every leaf has a picture, unless empty ones are allowed; a class whose files are all bad is never silent."""
    readable = set(targets[kept].tolist())
    for file, target in zip(files, targets.tolist(), strict=True):
        if target not in readable:
            raise DataError(
                f"no picture of the class {'/'.join(file.label)} can be read (for example {file.name}): repair its "
                "files or remove the class"
            )
    missing = [node for node in tree.leaf.tolist() if node not in readable]
    if missing and not allow_empty:
        shown = ", ".join("/".join(tree.path_of(node)) for node in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"the taxonomy has classes with no pictures ({shown}{more}): add pictures, remove them from the taxonomy, "
            "or pass allow_empty_classes=True to keep them as candidate labels"
        )
