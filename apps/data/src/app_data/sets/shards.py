"""Captioned pictures in webdataset's shards, read one by one: any number of them, by position, in an order that is a function.

A shard is an uncompressed tar whose members `key.jpg` and `key.txt` (or `key.json` with the columns of `captioned_files`) follow each
other. Its headers are read once into an index; then every sample is one read at a known place. So nothing is unpacked, a stream goes
on at any position without reading what came before, and each process and each thread reads its own samples alone.
"""

import hashlib
import io
import json
import re
import tarfile
import threading
from collections.abc import Sequence
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
from app_data.store.errors import DataError, TooManyBadFiles, UnreadablePicture
from app_data.store.progress import progress
from app_data.store.sealed import read_sealed, write_sealed

MOST_PICTURE, MOST_TEXT = 64 << 20, 1 << 20  # bytes; a header may claim any size
_FORMAT = 2  # raise when the index changes
_DIGEST = 32  # bytes of a sha256, before the index it belongs to
_BLOCK = 1000  # positions over which the weights of several sets hold exactly
_BAD_SHARE, _BAD_FILES, _TRIES = 0.01, 10, 20


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


class Order:
    """The rows of one epoch, computed where they are asked for: 129 million of them would take a gigabyte."""

    def __init__(self, stream: "Stream", epoch: int) -> None:
        self._stream, self._epoch = stream, epoch

    def __len__(self) -> int:
        """Number of pictures of an epoch."""
        return len(self._stream)

    def __getitem__(self, where: slice) -> np.ndarray:
        """Rows of these positions, int64."""
        start, stop, stride = where.indices(len(self))
        return self._stream.rows(self._epoch * len(self) + np.arange(start, stop, stride))


class Stream:
    """Several sets of shards as one endless stream; `order` is what a training stage reads from it.

    Of one set every epoch visits all pictures once. Shards are shuffled, then samples within a window, as a shuffle buffer of that
    size does; both are functions of seed and epoch. Of several sets, each block of 1,000 positions holds the shares that the
    weights say, and each set goes on through epochs of its own.

    Args:
        sets: The data sets.
        weights: Share of each, up to a common factor; their sizes if empty.
        window: Samples that are shuffled among each other.
        seed: Of the order.

    Raises:
        DataError: No set, as many weights as there are sets are not given, or a weight is not above 0.
    """

    def __init__(
        self, sets: Sequence[Shards], weights: Sequence[float] = (), *, window: int = 10_000, seed: int = 0
    ) -> None:
        if not sets:
            raise DataError("a stream needs at least one set of shards")
        weights = tuple(weights) or tuple(float(len(one)) for one in sets)
        if len(weights) != len(sets) or not all(0 < weight < float("inf") for weight in weights):
            raise DataError(f"weights must be {len(sets)} numbers above 0, one for each set, got {list(weights)}")
        if window < 1:
            raise DataError(f"the window must hold at least 1 sample, got {window}")
        self.sets, self.window, self.seed = tuple(sets), window, seed
        self.first = np.concatenate([[0], np.cumsum([len(one) for one in sets])])
        share = np.array(weights) / sum(weights) * _BLOCK
        self.quota = np.maximum(1, share.astype(np.int64))
        self.quota[np.argsort(self.quota - share)[: max(0, _BLOCK - self.quota.sum())]] += 1
        self.fingerprint = fingerprint({"stream": [one.fingerprint for one in sets]})
        self.skipped: dict[str, str] = {}
        self._taken, self._lock = 0, threading.Lock()
        self._shards = lru_cache(maxsize=16)(self._shard_order)
        self._within = lru_cache(maxsize=16)(self._window_order)
        self._pattern = lru_cache(maxsize=16)(self._block_pattern)

    def __len__(self) -> int:
        """Pictures of all sets."""
        return int(self.first[-1])

    def order(self, epoch: int) -> Order:
        """The rows of an epoch."""
        return Order(self, epoch)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows at positions of the endless stream, counted over all epochs."""
        if len(self.sets) == 1:
            return np.array([self._row(0, int(p)) for p in positions], dtype=np.int64)
        size = int(self.quota.sum())
        found = []
        for block, place in zip((positions // size).tolist(), (positions % size).tolist(), strict=True):
            chosen, before = self._pattern(block)
            one = int(chosen[place])
            found.append(self._row(one, block * int(self.quota[one]) + int(before[place])))
        return np.array(found, dtype=np.int64)

    def _row(self, one: int, position: int) -> int:
        """The row at a position of one set's own stream."""
        data = self.sets[one]
        epoch, place = divmod(position, len(data))
        window = place // self.window
        place = window * self.window + int(self._within(one, epoch, window)[place % self.window])
        order, ends = self._shards(one, epoch)
        turn = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[turn])
        within = place - (int(ends[turn - 1]) if turn else 0)
        return int(self.first[one] + data.first[shard]) + within

    def _shard_order(self, one: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        data = self.sets[one]
        order = np.random.default_rng([self.seed, 1, one, epoch]).permutation(len(data.paths))
        return order, data.counts[order].cumsum()

    def _window_order(self, one: int, epoch: int, window: int) -> np.ndarray:
        size = min(self.window, len(self.sets[one]) - window * self.window)
        return np.random.default_rng([self.seed, 2, one, epoch, window]).permutation(size)

    def _block_pattern(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Which set each position of a block reads, and how many before it read the same."""
        chosen = np.repeat(np.arange(len(self.sets)), self.quota)
        chosen = np.random.default_rng([self.seed, 3, block]).permutation(chosen)
        before = np.zeros_like(chosen)
        for one in range(len(self.sets)):
            mine = chosen == one
            before[mine] = np.arange(mine.sum())
        return chosen, before

    def read(self, row: int) -> Sample:
        """The picture at a row; in place of one that cannot be read, the next of its shard.

        Raises:
            TooManyBadFiles: More than ten and more than 1 % of what was read cannot be.
        """
        one = int(np.searchsorted(self.first, row, side="right")) - 1
        data, row = self.sets[one], row - int(self.first[one])
        shard = int(np.searchsorted(data.first, row, side="right")) - 1
        start, count = int(data.first[shard]), int(data.counts[shard])
        for more in range(min(_TRIES, count)):
            candidate = start + (row - start + more) % count
            with self._lock:
                self._taken += 1
            try:
                return data.read(candidate)
            except UnreadablePicture as error:
                self._skip(data.name(candidate), str(error))
        raise TooManyBadFiles(
            f"{data.name(row)} and the {min(_TRIES, count)} after it cannot be read: look at this shard"
        )

    def _skip(self, name: str, reason: str) -> None:
        with self._lock:
            self.skipped[name] = reason
            bad, taken = len(self.skipped), self._taken
        if bad > max(_BAD_FILES, _BAD_SHARE * taken):
            raise TooManyBadFiles(
                f"{bad} of {taken} samples cannot be read, more than {_BAD_SHARE:.0%}; the last is {name}: {reason}"
            )
