"""Data sets of the papers on hierarchical recognition, read from their released files, with their own splits.

CIFAR-100 (Krizhevsky, 2009), CUB-200-2011 (Wah et al., 2011), FGVC-Aircraft (Maji et al., 2013), Butterfly-200 (Chen et
al., 2018) and iNaturalist 2021 (Van Horn et al., 2021). Nothing is downloaded; each function takes the unpacked folder.
"""

import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app_data.read.folder import find_pictures, load_found
from app_data.read.labelled import PARTS, Decoding, LabelledFile, picture_sets
from app_data.read.pictures import PictureSet
from app_data.store.cache import default_cache_dir, fingerprint
from app_data.store.errors import DataError
from app_data.store.text import read_text
from hier_losses import builders
from hier_losses.builders import DatasetTree

_ENTRY = 4096  # bytes on the disk that an empty file takes


def load_cifar100_folders(source: str | Path, decoding: Decoding | None = None) -> dict[str, PictureSet]:
    """CIFAR-100 as pictures in `train/<class>/` and `test/<class>/`, under its 20 superclasses.

    Args:
        source: The folder, or a tar archive of it, which is unpacked into the cache folder. (The released Python files
            are pickles, which this project never reads.)
        decoding: Size, cache and budget of bad files; 32 px if None, the size of the originals.

    Returns:
        "train" and "test".

    Raises:
        DataError: A missing folder, or classes other than the hundred.
    """
    decoding = decoding or Decoding(size=32)
    source = Path(source)
    root = unpack(source, decoding.cache_dir) if source.is_file() else source
    return load_found(find_pictures(root, builders.cifar100().taxonomy), decoding)


def load_cub200(
    root: str | Path,
    hierarchy_file: str | Path,
    levels: Sequence[str] = ("order", "family", "species"),
    decoding: Decoding | None = None,
) -> dict[str, PictureSet]:
    """CUB-200-2011 with a taxonomy table.

    Args:
        root: The folder with `classes.txt`, `images.txt`, `image_class_labels.txt`, `train_test_split.txt`, `images/`.
        hierarchy_file: See `hier_losses.builders.cub200`; the data set itself has no taxonomy.
        levels: The levels of that table, top first.
        decoding: Size, cache and budget of bad files.

    Returns:
        "train" and "test" as released.

    Raises:
        DataError: A missing file, or files that do not fit together.
    """
    root = Path(root)
    tree = _build("CUB-200-2011", builders.cub200, root / "classes.txt", hierarchy_file, levels)
    names = dict(_pairs(root / "images.txt"))
    labels = dict(_pairs(root / "image_class_labels.txt"))
    in_train = dict(_pairs(root / "train_test_split.txt"))
    if not names.keys() == labels.keys() == in_train.keys():
        raise DataError(f"images.txt, image_class_labels.txt and train_test_split.txt of {root} list different images")
    rows = [
        (f"images/{names[i]}", int(labels[i]) - 1, "train" if in_train[i] == "1" else "test")
        for i in sorted(names, key=int)
    ]
    return _sets(root, tree, rows, decoding)


def load_aircraft(root: str | Path, decoding: Decoding | None = None) -> dict[str, PictureSet]:
    """FGVC-Aircraft: manufacturer > family > variant.

    Args:
        root: The release's `data` folder with `images/` and the lists `images_{manufacturer,family,variant}_*.txt`.
        decoding: Size, cache and budget of bad files.

    Returns:
        "train", "val" and "test" as released.

    Raises:
        DataError: A missing file, or lists that do not fit together.
    """
    root = Path(root)
    tree = _build("FGVC-Aircraft", builders.aircraft, root)
    label = {name: number for number, name in enumerate(tree.class_names)}
    rows = [
        (f"images/{image}.jpg", label[variant], part)
        for part in PARTS
        if (root / f"images_variant_{part}.txt").is_file()
        for image, variant in _pairs(root / f"images_variant_{part}.txt")
    ]
    return _sets(root, tree, rows, decoding)


def load_butterfly200(
    root: str | Path, images: str = "images_small", decoding: Decoding | None = None
) -> dict[str, PictureSet]:
    """Butterfly-200: family > subfamily > genus > species.

    Args:
        root: The folder with `Butterfly200_{train,val,test}_release.txt` and the folder of pictures.
        images: Name of the folder of pictures.
        decoding: Size, cache and budget of bad files.

    Returns:
        "train", "val" and "test" as released.

    Raises:
        DataError: A missing file, or lists that do not fit together.
    """
    root = Path(root)
    lists = {part: root / f"Butterfly200_{part}_release.txt" for part in PARTS}
    tree = _build("Butterfly-200", builders.butterfly200, *lists.values())
    sizes = [len({line.rsplit(maxsplit=4)[column] for line in _lines(lists.values())}) for column in range(1, 5)]
    finest = 1 + int(np.argmax(sizes))
    rows = []
    for part, path in lists.items():
        for line in _lines([path]):
            pieces = line.rsplit(maxsplit=4)
            rows.append((f"{images}/{pieces[0].replace(chr(92), '/')}", int(pieces[finest]) - 1, part))
    return _sets(root, tree, rows, decoding)


def load_inaturalist(root: str | Path, decoding: Decoding | None = None) -> dict[str, PictureSet]:
    """INaturalist 2021: seven levels, spelled out in the folder names.

    Args:
        root: The folder with `train/` (or `train_mini/`) and `val/`, whose folders have names such as
            `00001_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax`.
        decoding: Size, cache and budget of bad files.

    Returns:
        "train" and "val".

    Raises:
        DataError: A missing folder, or a folder name without eight parts.
    """
    root = Path(root)
    folders = {"train": root / "train", "val": root / "val"}
    if not folders["train"].is_dir():
        folders["train"] = root / "train_mini"
    tree = _build("iNaturalist", builders.inaturalist, folders["train"])
    rows = []
    for part, folder in folders.items():
        if part == "val" and not folder.is_dir():
            continue
        for number, name in enumerate(tree.class_names):
            if (folder / name).is_dir():
                files = sorted(path for path in (folder / name).iterdir() if not path.name.startswith("."))
                rows += [(path.relative_to(root).as_posix(), number, part) for path in files]
    return _sets(root, tree, rows, decoding)


def unpack(archive: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Unpack a tar archive once.

    Members that would land outside, links to elsewhere and devices are refused (Python's `data` filter), and so is more than
    the disk has room for: a few bytes can unpack to any number.

    Args:
        archive: The file.
        cache_dir: Where the content goes; the user's cache folder if None.

    Returns:
        The folder with the content.

    Raises:
        DataError: The file is no tar archive, is damaged, or holds something unsafe.
    """
    archive = Path(archive)
    status = archive.stat()
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = root / f"unpacked-{fingerprint({'name': archive.name, 'stamp': [status.st_size, status.st_mtime_ns]})}"
    if folder.is_dir():
        return folder
    temporary = root / f"{folder.name}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    room = shutil.disk_usage(root).free

    def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        nonlocal room
        room -= member.size + _ENTRY
        if room < 0:
            raise DataError(
                f"the archive {archive} unpacks to more than {root} has room for: free some, or choose another cache_dir"
            )
        return tarfile.data_filter(member, path)

    try:
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter=checked)
        temporary.rename(folder)
    except (tarfile.TarError, EOFError, OSError) as error:
        if not folder.is_dir():  # else another process was first
            said = " ".join(str(error).split())
            raise DataError(f"the archive {archive} cannot be unpacked ({said}): fetch it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _build(name: str, builder: Callable[..., DatasetTree], *args: Any) -> DatasetTree:
    try:
        return builder(*args)
    except OSError as error:
        raise DataError(f"{name} needs the file {error.filename}: give the folder of the unpacked release") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"the files of {name} do not fit together: {error}") from error


def _lines(paths: Iterable[Path]) -> list[str]:
    found = []
    for path in paths:
        text = read_text(path, "give the folder of the unpacked release")
        found += [line for line in text.splitlines() if line.strip()]
    return found


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Lines of a number, a blank and a value that may hold blanks."""
    pairs = []
    for number, line in enumerate(_lines([path]), start=1):
        key, _, value = line.strip().partition(" ")
        if not value:
            raise DataError(f"line {number} of {path} must hold a number and a value, got {line!r}")
        pairs.append((key, value.strip()))
    return pairs


def _sets(
    root: Path, tree: DatasetTree, rows: Sequence[tuple[str, int, str]], decoding: Decoding | None
) -> dict[str, PictureSet]:
    """Decode rows of relative path, class number and part."""
    if not rows:
        raise DataError(f"the lists in {root} name no picture: give the folder of the unpacked release")
    wrong = next((row for row in rows if not 0 <= row[1] < len(tree.class_names)), None)
    if wrong is not None:
        raise DataError(f"{wrong[0]} in {root} has class number {wrong[1]}, there are {len(tree.class_names)} classes")
    files = [LabelledFile(root / name, name, (tree.class_names[label],), part) for name, label, part in rows]
    targets = tree.targets.numpy()[[label for _, label, _ in rows]]
    # Small excerpts of a release are common, and a class without pictures is still a class of the data set.
    return picture_sets(files, targets, tree.taxonomy, decoding or Decoding(), allow_empty_classes=True)
