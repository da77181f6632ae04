"""COCO captions (Chen et al., 2015), Flickr30k (Young et al., 2014) and nocaps (Agrawal et al., 2019), as released.

The Karpathy files (Karpathy and Fei-Fei, 2015) split COCO and Flickr30k. Nothing is downloaded.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from app_data.read.labelled import PARTS, Decoding
from app_data.sets.captions import CaptionedFile, CaptionSet, caption_sets, captioned_files
from app_data.sets.papers import unpack
from app_data.store.errors import DataError
from app_data.store.text import read_json


def find_captions(
    data: str | Path,
    pictures: str | Path | None = None,
    *,
    split: str | None = "test",
    cache_dir: str | Path | None = None,
) -> list[CaptionedFile]:
    """Captioned pictures in whatever form they come, none of them opened; `caption_sets` decodes them.

    Args:
        data: Karpathy's `dataset_coco.json`, `dataset_flickr30k.json` or `dataset_flickr8k.json`; LAVIS's `coco_karpathy_train.json`,
            beside which those of the other parts are read if they are there; a file of COCO's or of nocaps' captions, whose domain is
            the style; or a table or archive, see `captioned_files`. Or a folder with one such file, or with one for each part, whose
            name then ends in `_<split>.json`.
        pictures: The folder of pictures, for COCO the one with `train2014/` and `val2014/`; that of the file if None.
        split: The part, where the data name parts; all parts if None. COCO's "restval" is "train", as is usual.
        cache_dir: Where archives are unpacked; the user's cache folder if None.

    Returns:
        The files, in the order of the data.

    Raises:
        DataError: Nothing like that is there, or it has no such part.
    """
    source = Path(data)
    if source.is_dir():
        tables = sorted(p for p in source.iterdir() if p.suffix in (".json", ".jsonl", ".csv", ".tsv"))
        own = [p for p in tables if p.stem.endswith(f"_{split}")] or tables
        if len(own) > 1:
            raise DataError(f"the folder {source} holds {', '.join(p.name for p in own)}: name one of them")
        source = own[0] if own else source
    root = Path(pictures) if pictures is not None else source.parent
    content = read_json(source) if source.suffix == ".json" else None
    if isinstance(content, dict):
        first = _list(content, "images", source)[0]
        karpathy = isinstance(first, dict) and "sentences" in first
        files = _karpathy_files(content, source, root) if karpathy else _coco_files(source, root, None)
    elif source.stem.rpartition("_")[2] in PARTS and _lavis_rows(content):
        files = _lavis_files(source, root)
    else:
        files = captioned_files(source, pictures, cache_dir)
    parts = dict.fromkeys(file.part for file in files)
    found = [file for file in files if split is None or file.part in (split, "")]
    if not found:
        raise DataError(f"{source} has no part {split!r}, it has {', '.join(sorted(parts))}")
    return found


def _karpathy_files(content: Any, annotations: str | Path, root: Path) -> list[CaptionedFile]:
    files = []
    for number, image in enumerate(_list(content, "images", annotations)):
        try:
            name = "/".join(part for part in (image.get("filepath", ""), image["filename"]) if part)
            captions = tuple(" ".join(sentence["raw"].split()) for sentence in image["sentences"])
            part = {"restval": "train"}.get(image["split"], image["split"])
            files.append(CaptionedFile(root / name, name, captions, image.get("cocoid", image["imgid"]), part))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"image {number} of {annotations} is not in Karpathy's form ({error}): give dataset_coco.json or "
                "dataset_flickr30k.json"
            ) from error
    return files


def _lavis_rows(content: Any) -> bool:
    return isinstance(content, list) and any(
        isinstance(row, dict) and {"image", "caption"} <= row.keys() for row in content[:1]
    )


def _lavis_files(annotations: Path, root: Path) -> list[CaptionedFile]:
    """LAVIS's lists: a row for each caption in training, a row with all captions for each picture elsewhere."""
    stem, _, own = annotations.stem.rpartition("_")
    found = []
    for part in PARTS:
        path = annotations.with_name(f"{stem}_{part}.json")
        if part != own and not path.is_file():
            continue
        captions: dict[str, list[str]] = defaultdict(list)
        rows = read_json(path)
        for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
            try:
                # A path, so that what is no name is refused here.
                Path(row["image"])
                said = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
                captions[row["image"]] += [" ".join(text.split()) for text in said]
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(f"row {number} of {path} is not in LAVIS's form ({error})") from error
        for name, texts in captions.items():
            digits = Path(name).stem.rpartition("_")[2]
            number = int(digits) if digits.isdigit() else name
            found.append(CaptionedFile(root / name, name, tuple(texts), number, part))
    return found


def load_coco_mini(archive: str | Path, decoding: Decoding | None = None) -> CaptionSet:
    """A small COCO in one tar archive: `train2017/`, `val2017/` and COCO's annotation files in `annotations/`.

    Its photographs have mixed licences: use them for checks, do not show them.

    Args:
        archive: The archive, or the folder of its content.
        decoding: Size, cache and budget of bad files; 224 px if None.

    Returns:
        All pictures with captions and objects; the style is "train2017" or "val2017".

    Raises:
        DataError: The archive is missing or damaged, or an annotation file is.
        TooManyBadFiles: More unreadable files than the budget.
    """
    decoding = decoding or Decoding(size=224)
    archive = Path(archive)
    if not archive.exists():
        raise DataError(f"the archive {archive} does not exist: give a tar file of COCO pictures and annotations")
    root = unpack(archive, decoding.cache_dir) if archive.is_file() else archive
    files = []
    for part in ("train2017", "val2017"):
        tables = [root / "annotations" / f"{kind}_{part}.json" for kind in ("captions", "instances")]
        files += [
            replace(file, name=f"{part}/{file.name}", style=part)
            for file in _coco_files(tables[0], root / part, tables[1])
        ]
    return caption_sets(files, decoding)["test"]


def _coco_files(annotations: str | Path, root: Path, instances: str | Path | None) -> list[CaptionedFile]:
    content = read_json(annotations)
    images = _list(content, "images", annotations)
    captions: dict[Any, list[str]] = defaultdict(list)
    objects: dict[Any, list[str]] = defaultdict(list)
    try:
        for row in content.get("annotations", []):
            captions[row["image_id"]].append(" ".join(row["caption"].split()))
        if instances is not None:
            boxes = read_json(instances)
            names = {row["id"]: row["name"] for row in boxes["categories"]}
            for row in boxes["annotations"]:
                if not row.get("iscrowd"):
                    objects[row["image_id"]].append(names[row["category_id"]])
        return [
            CaptionedFile(
                root / image["file_name"],
                image["file_name"],
                tuple(captions.get(image["id"], ())),
                image["id"],
                style=image.get("domain", ""),
                objects=tuple(objects.get(image["id"], ())),
            )
            for image in images
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{annotations} is not in COCO's form ({error}): give a file of captions") from error


def _list(content: Any, name: str, path: str | Path) -> list[Any]:
    if not isinstance(content, dict) or not isinstance(content.get(name), list) or not content[name]:
        raise DataError(f"{path} must hold an object with a list {name!r} that is not empty")
    return content[name]
