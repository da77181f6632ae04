"""Pictures with captions: the set they are held in, and its reader for tables and webdataset archives."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from app_data.read.labelled import PARTS, Decoding, PictureFile, decode_files
from app_data.read.pictures import StoredPictures
from app_data.read.splits import stratified_split
from app_data.sets.papers import unpack
from app_data.store.cache import fingerprint
from app_data.store.errors import DataError, Skipped
from app_data.store.text import parse_json, read_json, read_text
from hier_losses import Taxonomy

__all__ = [
    "CaptionSet",
    "Captioned",
    "CaptionedFile",
    "caption_sets",
    "captioned_files",
    "row_captions",
]

_PATH_COLUMNS = ("path", "image", "file_name", "filename", "filepath")
_CAPTION_COLUMNS = ("caption", "captions", "text", "title")


class Captioned(NamedTuple):
    """One item of a `CaptionSet`."""

    pixels: np.ndarray
    captions: tuple[str, ...]
    id: int | str


@dataclass(frozen=True)
class CaptionSet(StoredPictures):
    """Pictures with captions; indexing gives a `Captioned`.

    Attributes:
        captions: What describes each picture, every one of them the whole of it; empty where captions are withheld.
        ids: The data set's own name of each picture, for result files.
        styles: Source of each picture: an artist, a domain, a part.
        fingerprint: Changes whenever pictures or captions do.
        files: Where each picture came from.
        skipped: Files left out while reading, with reasons.
        broader: True but less specific descriptions of each picture, the most general last; none in most sets.
        objects: Names of the annotated objects, one for each object; none in most sets.
        targets: Taxonomy node id of each picture, or None.
        taxonomy: The label tree, or None.
    """

    captions: tuple[tuple[str, ...], ...]
    ids: tuple[int | str, ...]
    styles: tuple[str, ...]
    fingerprint: str
    files: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    broader: tuple[tuple[str, ...], ...] = ()
    objects: tuple[tuple[str, ...], ...] = ()
    targets: np.ndarray | None = None
    taxonomy: Taxonomy | None = None

    each: ClassVar[tuple[str, ...]] = ("captions", "ids", "styles", "files", "broader", "objects", "targets")

    def __getitem__(self, index: int) -> Captioned:
        """The picture at `index`, its captions and its id."""
        return Captioned(np.array(self.store[self.rows[index]]), self.captions[index], self.ids[index])

    def chain(self, index: int) -> tuple[str, ...]:
        """Descriptions of a picture from the most to the least specific, each entailed by those before it."""
        return (*self.captions[index], *(self.broader[index] if self.broader else ()))

    def flat(self) -> tuple[list[str], np.ndarray]:
        """All captions one after another, and the position of each one's picture, for retrieval."""
        texts = [caption for captions in self.captions for caption in captions]
        owner = np.repeat(np.arange(len(self)), [len(captions) for captions in self.captions])
        return texts, owner


@dataclass(frozen=True)
class CaptionedFile(PictureFile):
    """A picture file with its captions; the last fields are as in `CaptionSet`."""

    captions: tuple[str, ...]
    id: int | str
    part: str = ""
    style: str = ""
    objects: tuple[str, ...] = ()


def caption_sets(
    files: Sequence[CaptionedFile],
    decoding: Decoding | None = None,
    *,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, CaptionSet]:
    """Decode captioned files, or read them from the cache, and split them.

    Args:
        files: The pictures; either all or none of them name a part.
        decoding: Size, cache and budget of bad files; missing files count as bad.
        fractions: Shares of the split if no file names a part; all of them are "test" if None.
        seed: Decides which picture goes where.

    Returns:
        The parts by name; `skipped` lists the files of the part that could not be read.

    Raises:
        DataError: No file can be read, ids repeat, or only some files name a part.
        TooManyBadFiles: More unreadable files than the budget.
    """
    files = list(files)
    unsplit = [file for file in files if not file.part]
    if unsplit and len(unsplit) < len(files):
        raise DataError(
            f"{unsplit[0].name} belongs to no part of the split but others do: name the part of all or none"
        )
    if len({file.id for file in files}) < len(files):
        raise DataError("two pictures have the same id: give each its own")
    pixels, kept, skipped, key = decode_files(files, decoding or Decoding(), missing_is_bad=True)
    done = [files[i] for i in kept]
    texts = {"captions": [[file.id, file.style, file.captions, file.objects] for file in done]}
    everything = CaptionSet(
        store=pixels,
        rows=np.arange(len(done)),
        captions=tuple(file.captions for file in done),
        ids=tuple(file.id for file in done),
        styles=tuple(file.style for file in done),
        fingerprint=fingerprint({**key, **texts}),
        files=tuple(file.name for file in done),
        skipped=skipped,
        objects=tuple(file.objects for file in done) if any(file.objects for file in done) else (),
    )
    if unsplit and fractions is not None:
        split = stratified_split(np.zeros(len(done)), everything.files, fractions, seed)
        return {part: everything.select(rows) for part, rows in split.items() if len(rows)}
    if unsplit:
        return {"test": everything}
    part_of = {file.name: file.part for file in files}
    parts = {}
    for part in dict.fromkeys([*PARTS, *part_of.values()]):
        rows = [row for row, file in enumerate(done) if file.part == part]
        if rows:
            own = tuple(bad for bad in skipped if part_of[bad.path] == part)
            parts[part] = replace(everything.select(rows), skipped=own)
    return parts


def captioned_files(
    source: str | Path, root: str | Path | None = None, cache_dir: str | Path | None = None
) -> list[CaptionedFile]:
    """Pictures and captions of your own, none of them opened; archives are unpacked into the cache folder.

    Args:
        source: A table, an archive or a folder of archives. Tables are CSV or TSV files with a header, JSONL files, or
            JSON files with a list of objects; they name the picture in `path` (or `image`, `file_name`, `filename`,
            `filepath`) and its text in `caption` (or `captions`, `text`, `title`), and may have `id` and `split`. A
            picture may have several rows, and JSON may give a list of captions. Archives are tar files in webdataset's
            form: members `key.jpg` and `key.txt`, or `key.json` with the fields above.
        root: Where the pictures of a table lie; the table's own folder if None.
        cache_dir: Where archives are unpacked; the user's cache folder if None.

    Raises:
        DataError: The source is missing or has another form; the message names the row.
    """
    source = Path(source)
    if source.is_dir():
        shards = sorted(source.glob("*.tar"))
        if not shards:
            raise DataError(f"the folder {source} holds no tar archives: give a table, an archive or a folder of them")
        files = [file for shard in shards for file in _from_archive(shard, cache_dir, prefix=f"{shard.stem}/")]
    elif not source.is_file():
        raise DataError(f"the captions {source} do not exist: give a CSV, TSV, JSONL, JSON or tar file")
    elif source.name.endswith((".tar", ".tar.gz", ".tgz")):
        files = _from_archive(source, cache_dir)
    else:
        folder = Path(root) if root is not None else source.parent
        files = _collect(source, [(number, row, folder) for number, row in _rows(source)])
    if not files:
        raise DataError(f"{source} holds no picture with a caption")
    return files


def _rows(source: Path) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a table with their line numbers."""
    if source.suffix in (".csv", ".tsv"):
        try:
            reader = csv.DictReader(
                io.StringIO(read_text(source), newline=""), delimiter="\t" if source.suffix == ".tsv" else ","
            )
            return [(reader.line_num, {(k or "").strip().lower(): v for k, v in row.items()}) for row in reader]
        except csv.Error as error:
            raise DataError(f"the captions {source} cannot be read as {source.suffix[1:].upper()}: {error}") from error
    if source.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(read_text(source).splitlines(), 1) if line.strip()]
        return [(n, parse_json(line, f"line {n} of {source}", "mend it")) for n, line in lines]
    if source.suffix == ".json":
        rows = read_json(source)
        if not isinstance(rows, list):
            raise DataError(f"the captions {source} must be a list of objects, got {rows!r:.80}")
        return list(enumerate(rows, 1))
    raise DataError(f"the captions {source} must end in .csv, .tsv, .jsonl, .json or .tar")


def _collect(source: Path, rows: Sequence[tuple[int, dict[str, Any], Path]]) -> list[CaptionedFile]:
    """Files with all their captions, in the order in which they first appear."""
    found: dict[str, CaptionedFile] = {}
    for number, row, folder in rows:
        where = f"row {number} of {source}"
        if not isinstance(row, dict):
            raise DataError(f"{where} must be an object, got {row!r}")
        path = next((str(row[name]).strip() for name in _PATH_COLUMNS if row.get(name)), "")
        texts = row_captions(row)
        if not path or not texts:
            raise DataError(f"{where} needs a path and a caption, got {row!r}: fill them in or remove the row")
        part = str(row.get("split") or "").strip().lower()
        before = found.get(path)
        if before is not None and before.part != part:
            raise DataError(f"{where} puts {path} into the split {part!r}, an earlier row into {before.part!r}")
        identity = row.get("id", path) if before is None else before.id
        if not isinstance(identity, str | int):
            raise DataError(f"{where} must have a text or a number as id, got {identity!r}")
        captions = texts if before is None else (*before.captions, *texts)
        found[path] = CaptionedFile(folder / path, path, captions, identity, part)
    return list(found.values())


def row_captions(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions in an object of a table or a shard."""
    texts = next((row[name] for name in _CAPTION_COLUMNS if row.get(name)), ())
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list | tuple) else []
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _from_archive(archive: Path, cache_dir: str | Path | None, prefix: str = "") -> list[CaptionedFile]:
    """Samples of a webdataset archive: members that share a name up to its first dot belong together."""
    folder = unpack(archive, cache_dir)
    pictures = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    samples: dict[str, dict[str, Path]] = {}
    visible = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for member in sorted(visible):
        stem, _, ending = member.name.partition(".")
        key = (member.parent.relative_to(folder) / stem).as_posix()
        samples.setdefault(key, {})[f".{ending.lower()}"] = member
    rows = []
    for number, (key, members) in enumerate(samples.items(), 1):
        row: dict[str, Any] = {}
        try:
            if ".json" in members:
                row = read_json(members[".json"])
            if ".txt" in members:
                row = {**row, "caption": read_text(members[".txt"])}
        except (DataError, TypeError) as error:
            raise DataError(f"the sample {key} of {archive} has no readable text: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"the sample {key} of {archive} must be an object, got {row!r}")
        picture = next((path for ending, path in members.items() if ending in pictures), None)
        if picture is None:
            raise DataError(f"the sample {key} of {archive} has no picture, only {', '.join(members)}")
        rows.append((number, {**row, "path": picture.relative_to(folder).as_posix(), "id": f"{prefix}{key}"}, folder))
    files = _collect(archive, rows)
    return [CaptionedFile(f.path, prefix + f.name, f.captions, f.id, f.part) for f in files]
