"""Captioned pictures in webdataset's shards, read one by one: any number of them, by position.

A shard is an uncompressed tar whose members `key.jpg` and `key.txt` (or `key.json` with the columns of `captioned_files`) follow each
other. Its headers are read once into an index; then every sample is one read at a known place. So nothing is unpacked, a stream goes
on at any position without reading what came before, and each process and each thread reads its own samples alone.
"""

import hashlib
import io
import json
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app_data.read.pictures import SUFFIXES, open_picture
from app_data.sets.captions import row_captions
from app_data.store.atomic import new_file
from app_data.store.cache import default_cache_dir, fingerprint
from app_data.store.errors import DataError, UnreadablePicture
from app_data.store.progress import progress
from app_data.store.sealed import read_sealed, write_sealed

MOST_PICTURE, MOST_TEXT = 64 << 20, 1 << 20  # bytes; a header may claim any size
_FORMAT = 2  # raise when the index changes
_DIGEST = 32  # bytes of a sha256, before the index it belongs to


@dataclass(frozen=True)
class Sample:
    """One picture of a shard.

    Attributes:
        picture: RGB, upright, at its own size.
        captions: What describes it, at least one.
        name: Shard and key, for messages.
    """

    picture: Image.Image
    captions: tuple[str, ...]
    name: str


class Shards:
    """One data set: a shard, or a folder of shards.

    Args:
        source: The tar, or the folder.
        cache_dir: Where indexes are kept; the user's cache folder if None.

    Raises:
        DataError: Nothing is there, or a shard is compressed, damaged, holds something else than files, or a file beyond the limits.
    """

    def __init__(self, source: str | Path, cache_dir: str | Path | None = None) -> None:
        source = Path(source)
        self.paths = sorted(source.glob("*.tar")) if source.is_dir() else [source]
        if not self.paths:
            raise DataError(f"the folder {source} holds no tar archives: give a shard or a folder of them")
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise DataError(f"the shard {missing[0]} does not exist: give a tar file or a folder of them")
        self._cache = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / "shards"
        self._index = lru_cache(maxsize=64)(self._read_index)
        summary = self._summary()
        self.counts = np.array(summary["counts"], dtype=np.int64)
        self.first = np.concatenate([[0], self.counts.cumsum()])
        self.fingerprint: str = summary["fingerprint"]
        if not len(self):
            raise DataError(f"{source} holds no picture with a caption")

    def _stamp(self, path: Path) -> list:
        status = path.stat()
        return [_FORMAT, str(path.absolute()), status.st_size, status.st_mtime_ns]

    def _summary(self) -> dict[str, Any]:
        """How many samples each shard has, and a fingerprint of all: of thousands of shards not every index is read again."""
        kept = self._cache / f"{fingerprint({'shards': [self._stamp(path) for path in self.paths]})}.json"
        with suppress(OSError, DataError):  # a damaged one is made anew
            return read_sealed(kept, required=True)
        counts, stamps = [], []
        for number, path in enumerate(progress(self.paths, "shards")):
            index = self._index(number)
            counts.append(len(index))
            stamps.append([path.name, path.stat().st_size, hashlib.sha256(index.tobytes()).hexdigest()])
        found = {"counts": counts, "fingerprint": fingerprint({"shards": stamps})}
        return write_sealed(kept, found)

    def __len__(self) -> int:
        """Number of pictures with a caption."""
        return int(self.first[-1])

    def _read_index(self, number: int) -> np.ndarray:
        path = self.paths[number]
        kept = self._cache / f"{fingerprint({'shard': self._stamp(path)})}.index"
        if kept.exists():
            content = kept.read_bytes()
            if (
                hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]
            ):  # else a damaged copy, which is made anew
                return np.frombuffer(content, np.int64, offset=_DIGEST).reshape(-1, 5)
        index = scan(path)
        with new_file(kept) as temporary:
            temporary.write_bytes(hashlib.sha256(index.tobytes()).digest() + index.tobytes())
        return index

    def read(self, row: int) -> Sample:
        """The picture at a row.

        Raises:
            UnreadablePicture: It cannot be decoded, or its text is none.
            DataError: The shard has changed since it was indexed.
        """
        shard = int(np.searchsorted(self.first, row, side="right")) - 1
        path, number = self.paths[shard], row - int(self.first[shard])
        picture_at, picture_size, text_at, text_size, is_json = self._index(shard)[number].tolist()
        with path.open("rb") as file:
            picture, text = _part(file, path, picture_at, picture_size), _part(file, path, text_at, text_size)
        try:
            said = text.decode("utf-8")
            captions = row_captions(json.loads(said) if is_json else {"caption": said})
        except (ValueError, AttributeError, RecursionError) as error:
            raise UnreadablePicture(f"its text cannot be read ({error})") from error
        if not captions:
            raise UnreadablePicture("it has no caption")
        return Sample(open_picture(io.BytesIO(picture)), captions, self.name(row))

    def name(self, row: int) -> str:
        """What messages call it."""
        shard = int(np.searchsorted(self.first, row, side="right")) - 1
        return f"sample {row - int(self.first[shard])} of {self.paths[shard]}"


def _part(file: io.BufferedReader, path: Path, start: int, size: int) -> bytes:
    file.seek(start)
    content = file.read(size)
    if len(content) < size:
        raise DataError(f"the shard {path} has changed since the run began: start again")
    return content


def scan(path: Path) -> np.ndarray:
    """Where the samples of a shard lie.

    Args:
        path: The tar.

    Returns:
        One row for each picture with a text: where the picture begins, its bytes, where the text begins, its bytes, and whether the
        text is JSON; int64 (n, 5). What lacks a picture or a text is left out.

    Raises:
        DataError: See `Shards`.
    """
    rows: list[list[int]] = []
    key, parts = "", {}

    def close() -> None:
        picture = next((parts[e] for e in parts if e in SUFFIXES), None)
        text = parts.get(".txt", parts.get(".json"))
        if picture is not None and text is not None:
            rows.append([*picture, *text, int(".txt" not in parts)])

    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else a shard's headers stay in memory
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"the shard {path} holds {member.name!r}, which is no plain file: make it anew without"
                    )
                stem, _, ending = member.name.rpartition("/")[2].partition(".")
                if not stem or re.fullmatch(r"__.*__", stem):
                    continue  # hidden files, and webdataset's notes about a shard
                ending = f".{ending.lower()}"
                most = MOST_PICTURE if ending in SUFFIXES else MOST_TEXT
                if ending in (*SUFFIXES, ".txt", ".json") and member.size > most:
                    raise DataError(
                        f"the shard {path} holds {member.name!r} of {member.size} bytes, more than {most}: leave it out"
                    )
                if member.offset_data + member.size > length:
                    raise DataError(f"the shard {path} is truncated: fetch it again")
                own = f"{member.name.rpartition('/')[0]}/{stem}"
                if own != key:
                    close()
                    key, parts = own, {}
                parts[ending] = [member.offset_data, member.size]
            close()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"the shard {path} is no uncompressed tar archive, or is damaged ({error})") from error
    return np.array(rows, dtype=np.int64).reshape(-1, 5)
