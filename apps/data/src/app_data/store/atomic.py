"""Write-then-rename in one place: a reader finds a file or a folder whole or not at all, also after a power cut."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARK = ".tmp-"
_LEFT = 1 << 16  # bytes; a disk with less is full


def sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_MARK}{os.getpid()}")


@contextmanager
def _room_said(folder: Path) -> Iterator[None]:
    """A full disk as the system says it: safetensors and torch.save raise errors of their own, which name no disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(told.group(1))
            raise OSError(number, os.strerror(number), str(folder)) from error
        # What was written so far is still there, so the disk is as full as it was.
        if shutil.disk_usage(folder).free >= _LEFT:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Fill the file whose name this gives; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with _room_said(path.parent):
            yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill the empty folder that this gives; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _room_said(path.parent):
            yield temporary
        for inner in sorted(temporary.rglob("*")):
            sync(inner)
        sync(temporary)
        if path.exists():
            # A rename never replaces a filled folder: move the old one aside first.
            aside = path.with_name(f".{path.name}.old{_MARK}{os.getpid()}")
            os.rename(path, aside)
            os.rename(temporary, path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder, which is whole or has lost its name: a reader never finds half of it."""
    if _MARK not in path.name:
        aside = path.with_name(f".{path.name}.old{_MARK}{os.getpid()}")
        os.rename(path, aside)
        path = aside
    shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, one space of indentation."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left below a folder that nobody else writes to now."""
    for path in folder.rglob(f".*{_MARK}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
