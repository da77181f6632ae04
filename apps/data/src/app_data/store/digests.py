"""Hashes of the contents of files; a file whose size and time have not changed is not read again."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from app_data.store.cache import default_cache_dir, fingerprint
from app_data.store.errors import DataError
from app_data.store.sealed import read_sealed, write_sealed


def content_digests(paths: Sequence[Path], cache_dir: str | Path | None = None) -> list[str]:
    """Sixteen hex digits for the content of each file; "" for one that cannot be read.

    Args:
        paths: The files.
        cache_dir: Where the hashes are kept; the user's cache folder if None.
    """
    if not paths:
        return []
    named = [os.path.abspath(path) for path in paths]
    above = os.path.commonpath([os.path.dirname(name) for name in named])
    cache = (
        Path(default_cache_dir() if cache_dir is None else cache_dir) / "digests" / f"{fingerprint({'of': above})}.json"
    )
    try:
        known = read_sealed(cache, required=True)
    except (OSError, DataError):
        known = {}

    def digest(name: str) -> list | None:
        try:
            status = os.stat(name)
            stamp = [status.st_size, status.st_mtime_ns]
            entry = known.get(name)
            if isinstance(entry, list) and entry[:2] == stamp:
                return entry
            with open(name, "rb") as file:
                return [*stamp, hashlib.file_digest(file, "sha256").hexdigest()[:16]]
        except OSError:
            return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(named, pool.map(digest, named), strict=True))
    if any(known.get(name) != entry for name, entry in found.items() if entry is not None):
        with suppress(OSError):  # a cache that cannot be written costs time only
            write_sealed(cache, {**known, **{n: e for n, e in found.items() if e}})
    return ["" if found[name] is None else found[name][2] for name in named]
