"""Files and folders that notice damage.

A sealed JSON file holds the sha256 of what it says, and of the files that it speaks for. A sealed folder holds such a file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from app_data.store.atomic import new_folder, write_json
from app_data.store.errors import DamagedFile, DataError

FORMAT = 1
SEAL_FILE = ".seal.json"  # of a folder
MANIFEST = "manifest.json"  # of a finished run
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


def write_sealed(path: Path, content: Mapping[str, object], *, beside: bool = False, also: Sequence[Path] = ()) -> dict:
    """Write a JSON file with a seal; returns its content as a reader will find it, without the seal.

    Args:
        path: The file.
        content: What it says; tuples become lists.
        beside: Also seal the files of its folder and below, as they are now; checkpoints and logs of TensorBoard are left out.
        also: Further files to seal.
    """
    plain = json.loads(json.dumps(content))
    folder = path.parent
    files = {}
    for file in sorted(folder.rglob("*")) if beside else ():
        place = file.relative_to(folder)
        passing = any(part.startswith(_PASSING) for part in place.parts if part != SEAL_FILE)
        if file.is_file() and file != path and not passing:
            files[place.as_posix()] = file_digest(file)
    files |= {Path(os.path.relpath(file, folder)).as_posix(): file_digest(file) for file in also}
    write_json(path, {**plain, _SEAL: {"content": text_digest(plain), "files": files}})
    return plain


def read_sealed(path: Path, *, required: bool = False) -> dict:
    """The content of a JSON file, without its seal if it has one, or must have one.

    Raises:
        DamagedFile: It is no JSON object, or not what was sealed.
        DataError: A later version wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    seal = content.pop(_SEAL, None) if isinstance(content, dict) else None
    sealed = isinstance(seal, dict) and seal.get("content") == text_digest(content)
    if not isinstance(content, dict) or (not sealed and (required or seal is not None)):
        raise DamagedFile(f"{path} is damaged; delete it and run the same command again")
    if (found := content.get("format", FORMAT)) != FORMAT:
        raise DataError(
            f"{path} has format {found!r}, this version reads {FORMAT}: use the version that wrote it, or another folder"
        )
    return content


def seal_broken(path: Path) -> str:
    """The first file that is not as a sealed JSON file found it; "" if all are, or none was sealed."""
    seal = json.loads(path.read_text(encoding="utf-8")).get(_SEAL) or {}
    files = seal.get("files", {})
    return next((name for name, known in files.items() if file_digest(path.parent / name) != known), "")


def seal_folder(path: Path, also: Sequence[Path] = ()) -> None:
    """Seal all files of a folder as they are now, but for checkpoints and logs, and further files that belong to it."""
    write_sealed(path / SEAL_FILE, {}, beside=True, also=also)


@contextmanager
def new_sealed_folder(path: Path, also: Sequence[Path] = ()) -> Iterator[Path]:
    """As `new_folder`, and sealed."""
    with new_folder(path) as temporary:
        yield temporary
        # It lies beside its later place, so that relative paths are the same.
        seal_folder(temporary, also)


def is_whole(path: Path) -> bool:
    """Whether a folder is there that was sealed.

    Raises:
        DataError: A file of it is damaged or missing.
    """
    seal = path / SEAL_FILE
    if not seal.exists():
        return False
    read_sealed(seal)
    if broken := seal_broken(seal):
        file = os.path.normpath(path / broken)
        raise DataError(f"{file} is damaged or missing; delete {path} and run the same command again")
    return True


def check_sealed(folder: Path) -> None:
    """Refuse a saved model with a file that is not as its run left it.

    The result of its row decides, else the folder's own seal, else the manifest of the run, which a run at work has not written yet.
    A folder that nothing was sealed of, such as one that a person made, passes, and so does a model card that was filled in.

    Raises:
        DataError: A file of it is damaged, changed or missing.
    """
    folder = folder.absolute()
    above = (folder, *folder.parents[:3])
    for seal in (*(p / "result.json" for p in above), folder / SEAL_FILE, *(p / MANIFEST for p in above)):
        try:
            content = json.loads(seal.read_text(encoding="utf-8"))
            files = content["sha256"] if seal.name == MANIFEST else content[_SEAL]["files"]
            known = {Path(os.path.normpath(seal.parent / name)): digest for name, digest in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        mine = {file: digest for file, digest in known.items() if file.is_relative_to(folder)}
        for file, digest in mine.items():
            if file.suffix != ".md" and file_digest(file) != digest:
                again = seal.parent if seal.name == "result.json" else folder  # a row is made again as a whole
                raise DataError(
                    f"{file} is damaged, changed or missing: restore it, or delete {again} and train again (a model that was "
                    "changed on purpose belongs in a folder of its own)"
                )
        if mine:
            return
