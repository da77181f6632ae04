"""ChestX-ray14 (Wang et al., 2017): chest radiographs with any number of 14 findings, labels closed upwards in a tree."""

import hashlib
from pathlib import Path

import numpy as np

from app_data.read.labelled import Decoding, PictureFile
from app_data.read.pictures import PictureSet
from app_data.store.cache import fingerprint
from app_data.store.errors import DataError
from app_data.store.text import read_text
from hier_losses.builders import chest_xray14, read_findings

LABELS, LISTS = "Data_Entry_2017.csv", {"train": "train_val_list.txt", "test": "test_list.txt"}
# Share of the training patients that is kept for calibration, by a hash of the patient number.
_VALIDATION = 0.1


def load_chest_xray14(root: str | Path, decoding: Decoding | None = None) -> dict[str, PictureSet]:
    """Read the release.

    Args:
        root: The folder with `Data_Entry_2017.csv`, `train_val_list.txt`, `test_list.txt` and the pictures in `images/` or
            `images_001/images/` to `images_012/images/`.
        decoding: Size, cache and budget of bad files; 224 px if None.

    Returns:
        "train", "val" (a tenth of the training patients, so that no patient stands in two parts) and "test". `targets` is
        (n, N) zeros and ones over all nodes of the tree of `hier_losses.builders.chest_xray14`, ancestors included.

    Raises:
        DataError: A missing file, an unknown finding, or a listed picture without labels or file.
    """
    root, decoding = Path(root), decoding or Decoding(size=224)
    tree = chest_xray14()
    try:
        images, findings = read_findings(root / LABELS)
    except OSError as error:
        raise DataError(f"ChestX-ray14 needs the file {error.filename}: give the folder of the release") from error
    except ValueError as error:
        raise DataError(f"the labels {root / LABELS} cannot be used: {error}") from error
    listed = {part: read_text(root / name, "give the folder of the release").split() for part, name in LISTS.items()}
    row = {name: number for number, name in enumerate(images)}
    hot = tree.multi_hot(findings).numpy().astype(np.float32)
    where = {path.name: path for folder in _folders(root) for path in sorted(folder.iterdir())}
    parts = {"train": [], "val": [], "test": []}
    for part, names in listed.items():
        for name in names:
            if name not in row or name not in where:
                lacks = f"has no row in {LABELS}" if name not in row else "is in none of the folders of pictures"
                raise DataError(f"{name}, listed in {root / LISTS[part]}, {lacks}: complete the release")
            parts["val" if part == "train" and _kept(name) else part].append(name)
    files = [PictureFile(where[name], name) for names in parts.values() for name in names]
    key = {"data": "chest-xray14", "fit": decoding.fit, "files": [[str(f), f.path.stat().st_size] for f in files]}
    pixels, kept, skipped, key = decoding.read(key, files)
    done = [files[i].name for i in kept]
    part_of = np.array([part for part, names in parts.items() for _ in names])[kept]
    labels = [row[name] for name in done]
    everything = PictureSet(
        store=pixels,
        rows=np.arange(len(done)),
        targets=hot[labels],
        styles=tuple(part_of),
        names=tuple("|".join(tree.class_names[c] for c in np.flatnonzero(findings[r].numpy())) for r in labels),
        taxonomy=tree.taxonomy,
        fingerprint=fingerprint({**key, "labels": hot[labels].tolist()}),
        files=tuple(done),
        skipped=skipped,
        node_text=tuple(name.replace("_", " ").lower() for name in tree.taxonomy.names),
    )
    return {part: everything.select(part_of == part) for part in parts}


def _folders(root: Path) -> list[Path]:
    found = [folder for folder in (root / "images", *sorted(root.glob("images_*/images"))) if folder.is_dir()]
    if not found:
        raise DataError(f"{root} has no folder images and no images_001/images: give the folder of the release")
    return found


def _kept(name: str) -> bool:
    """Whether the patient of `00000013_005.png` belongs to the validation part."""
    digest = hashlib.sha256(name.partition("_")[0].encode()).hexdigest()
    return int(digest[:8], 16) < _VALIDATION * 16**8
