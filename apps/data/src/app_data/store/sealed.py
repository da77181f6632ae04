"""JSON files that notice damage: they hold the sha256 of what they say, and of the files beside them that they speak for."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from app_data.store.atomic import write_json
from app_data.store.errors import DataError

__all__ = ["file_digest", "read_sealed", "seal_broken", "text_digest", "write_sealed"]

_SEAL = "seal"
# Of a run that is at work, or rewritten whenever it likes.
_PASSING = (".", "checkpoint-", "tensorboard")


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex; "" for one that is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def text_digest(content: object) -> str:
    """The sha256, in hex, of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, content: Mapping[str, object], *, beside: bool = False) -> dict:
    """Write a JSON file with a seal; returns its content as a reader will find it, without the seal.

    Args:
        path: The file.
        content: What it says; tuples become lists.
        beside: Also seal the files of its folder and below, as they are now; checkpoints and logs of TensorBoard are left out.
    """
    plain = json.loads(json.dumps(content))
    folder = path.parent
    files = {}
    for file in sorted(folder.rglob("*")) if beside else ():
        place = file.relative_to(folder)
        if file.is_file() and file != path and not any(part.startswith(_PASSING) for part in place.parts):
            files[place.as_posix()] = file_digest(file)
    write_json(path, {**plain, _SEAL: {"content": text_digest(plain), "files": files}})
    return plain


def read_sealed(path: Path, *, required: bool = False) -> dict:
    """The content of a JSON file, without its seal if it has one, or must have one.

    Raises:
        DataError: It is damaged: no JSON object, or not what was sealed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    seal = content.pop(_SEAL, None) if isinstance(content, dict) else None
    sealed = isinstance(seal, dict) and seal.get("content") == text_digest(content)
    if not isinstance(content, dict) or (not sealed and (required or seal is not None)):
        raise DataError(f"{path} is damaged; delete it and run the same command again")
    return content


def seal_broken(path: Path) -> str:
    """The first file that is not as a sealed JSON file found it; "" if all are, or none was sealed."""
    seal = json.loads(path.read_text(encoding="utf-8")).get(_SEAL) or {}
    files = seal.get("files", {})
    return next((name for name, known in files.items() if file_digest(path.parent / name) != known), "")
