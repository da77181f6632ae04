"""Decodes pictures once into a uint8 array on disk that later runs map into memory.

A cache entry is a folder `<fingerprint>/` with `pixels.npy` and `index.json`. It is written under another name, synced
and renamed, so a killed writer leaves no entry, and two writers cannot mix: the second uses the first's.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from app_data.store.atomic import sync
from app_data.store.errors import DataError, Skipped, TooManyBadFiles, UnreadablePicture
from app_data.store.progress import progress
from app_data.store.sealed import read_sealed, write_sealed

T = TypeVar("T")

_FORMAT = 1  # raise when the layout of an entry changes: old entries are then ignored
_CHECKED_ROWS = 4096  # rows under the checksum: all of a small set, an even sample of a large one (0.2 s at 128 px)
_STALE_SECONDS = 24 * 3600  # a temporary folder this old belongs to a writer that was killed


def default_cache_dir() -> Path:
    """The user's cache folder for decoded pictures, `~/.cache/hier-data`."""
    return Path.home() / ".cache" / "hier-data"


def fingerprint(key: Mapping[str, Any]) -> str:
    """Sixteen hex digits that change with any part of `key` (anything JSON can hold) and with the cache format."""
    text = json.dumps({"format": _FORMAT, **key}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached_pictures(
    key: Mapping[str, Any],
    sources: Sequence[Any],
    decode: Callable[[Any], np.ndarray],
    *,
    size: int,
    cache_dir: str | Path | None = None,
    workers: int = 1,
    max_bad_fraction: float = 0.01,
    max_bad_files: int = 10,
    label: str = "decoding pictures",
) -> tuple[np.ndarray, np.ndarray, tuple[Skipped, ...]]:
    """Decoded pictures of `sources`, from the cache if it holds them, else decoded now and stored.

    Args:
        key: What the pixels depend on besides the sources' order: versions, file sizes and times, sizes, options.
        sources: One entry per picture; `str(source)` names it in messages.
        decode: Turns a source into a uint8 array (size, size, 3), or raises `UnreadablePicture`.
        size: Height and width in pixels.
        cache_dir: Folder that holds the entries; `default_cache_dir()` if None.
        workers: Threads that decode.
        max_bad_fraction: With `max_bad_files`, the budget of unreadable files: the larger of the two counts.
        max_bad_files: See `max_bad_fraction`.
        label: What is done, for the progress.

    Returns:
        The pictures (n, size, size, 3) uint8, memory-mapped and read-only; the index of each in `sources` (n,); and the
        sources left out.

    Raises:
        TooManyBadFiles: More sources than the budget could not be decoded.
        DataError: No source could be decoded, or the cache folder cannot be written.
    """
    if not sources:
        raise DataError("there is no picture to decode: give at least one file")
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    budget = max(max_bad_files, int(max_bad_fraction * len(sources)))
    pixels, index = cached_entry(
        root / fingerprint({**key, "size": size, "count": len(sources)}),
        lambda folder: _write(folder, sources, decode, size, workers, budget, label),
        _open,
    )
    skipped = tuple(Skipped(row["path"], row["reason"]) for row in index["skipped"])
    return pixels, np.asarray(index["kept"], dtype=np.int64), skipped


def cached_entry(entry: Path, write: Callable[[Path], None], read: Callable[[Path], T | None]) -> T:
    """What `read` finds in a cache entry, which `write` makes first if it is absent or damaged.

    The entry is written under another name, synced and renamed. A writer that was killed leaves nothing that would be
    read; the next one starts again.

    Args:
        entry: The folder of the entry; the folder above it is made if it does not exist.
        write: Fills an empty folder.
        read: Returns the content of a complete entry, and None for anything else.

    Returns:
        The content.

    Raises:
        DataError: The cache folder cannot be written, or the disk lost what was just written.
    """
    found = read(entry)
    if found is not None:
        return found
    root = entry.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        temporary = root / f"{entry.name}.tmp-{uuid.uuid4().hex}"
        temporary.mkdir()
    except OSError as error:
        raise DataError(f"the cache folder {root} cannot be written ({error}): choose another cache_dir") from error
    try:
        write(temporary)
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        _publish(temporary, entry, read)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = read(entry)
    if found is None:
        raise DataError(f"the cache entry {entry} was damaged right after it was written: check that disk")
    return found


def _write(
    folder: Path,
    sources: Sequence[Any],
    decode: Callable[[Any], np.ndarray],
    size: int,
    workers: int,
    budget: int,
    label: str,
) -> None:
    """Fill `folder` with a complete entry."""
    file = folder / "pixels.npy"
    shape = (len(sources), size, size, 3)
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    kept: list[int] = []
    skipped: list[dict[str, str]] = []
    for position, result in enumerate(progress(_decode_all(sources, decode, workers), label, len(sources))):
        if isinstance(result, UnreadablePicture):
            skipped.append({"path": str(sources[position]), "reason": str(result)})
            if len(skipped) > budget:
                first = "; ".join(f"{row['path']}: {row['reason']}" for row in skipped[:3])
                raise TooManyBadFiles(
                    f"more than {budget} of {len(sources)} files cannot be read (the first ones are {first}): "
                    "remove or repair them, or raise the budget max_bad_files"
                )
        else:
            pixels[len(kept)] = result
            kept.append(position)
    if not kept:
        raise DataError(f"none of the {len(sources)} files can be read (the first: {skipped[0]['reason']})")
    pixels.flush()
    crc = _checksum(pixels[: len(kept)])
    del pixels
    write_sealed(folder / "index.json", {"shape": shape, "kept": kept, "skipped": skipped, "crc": crc})


def _decode_all(sources: Sequence[Any], decode: Callable[[Any], np.ndarray], workers: int) -> Iterator[Any]:
    """Results in the order of `sources`; threads, since Pillow decodes outside the interpreter lock."""

    def attempt(source: Any) -> Any:
        try:
            return decode(source)
        except UnreadablePicture as error:
            return error

    if workers <= 1:
        yield from map(attempt, sources)
        return
    waiting: Iterable[Any] = iter(sources)
    with ThreadPoolExecutor(workers) as pool:
        # In pieces, because map() would queue every picture of a large set in memory at once.
        while piece := list(islice(waiting, 32 * workers)):
            yield from pool.map(attempt, piece)


def _publish(temporary: Path, entry: Path, read: Callable[[Path], Any]) -> None:
    """Give the finished entry its name, unless another process was first."""
    for _ in range(2):
        try:
            os.rename(temporary, entry)
        except OSError:
            if read(entry) is not None:
                return
            # A damaged entry is in the way: move it aside first, since a rename never replaces a filled folder.
            aside = entry.with_name(f"{entry.name}.tmp-{uuid.uuid4().hex}")
            try:
                os.rename(entry, aside)
            except FileNotFoundError:
                continue
            shutil.rmtree(aside, ignore_errors=True)
        else:
            sync(entry.parent)
            return


def _open(entry: Path) -> tuple[np.ndarray, dict[str, Any]] | None:
    """The entry's pictures and index, or None when it is absent or damaged."""
    try:
        index = read_sealed(entry / "index.json", required=True)
        pixels = np.load(entry / "pixels.npy", mmap_mode="r", allow_pickle=False)
        if list(pixels.shape) != index["shape"] or pixels.dtype != np.uint8:
            return None
        pixels = pixels[: len(index["kept"])]
        if _checksum(pixels) != index["crc"] or not isinstance(index["skipped"], list):
            return None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return pixels, index


def _checksum(pixels: np.ndarray) -> int:
    """CRC-32 over at most `_CHECKED_ROWS` evenly spaced pictures."""
    crc = 0
    for row in np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), _CHECKED_ROWS)).astype(np.int64)):
        crc = zlib.crc32(pixels[row].tobytes(), crc)
    return crc


def _remove_stale(root: Path) -> None:
    """Delete what killed writers left behind."""
    for folder in root.glob("*.tmp-*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue
