"""FGVC-Aircraft: 30 manufacturers, 70 families, 100 variants (Maji et al., 2013, arXiv:1306.5151)."""

import os
from pathlib import Path

from hier_losses.builders._base import DatasetTree
from hier_losses.taxonomy import Taxonomy

LEVELS = ("manufacturer", "family", "variant")


def aircraft(folder: str | os.PathLike) -> DatasetTree:
    """Join the image lists of the three levels.

    Args:
        folder: the data set's `data` folder with `images_{manufacturer,family,variant}_<split>.txt`, whose lines hold
            an image number, a blank and a name that may hold blanks; and, for the order of classes, `variants.txt`.

    Returns:
        The tree; classes in the order of `variants.txt` (alphabetical if it is absent), as in torchvision.

    Raises:
        ValueError: a list is missing or empty, an image lacks a level, a variant has two families.
    """
    labels = {level: _read_level(Path(folder), level) for level in LEVELS}
    above: dict[str, tuple[str, str, str]] = {}
    for image, variant in labels["variant"].items():
        missing = [level for level in LEVELS if image not in labels[level]]
        if missing:
            raise ValueError(f"image {image} has no {missing[0]}")
        path = (labels["manufacturer"][image], labels["family"][image], variant)
        if above.setdefault(variant, path) != path:
            raise ValueError(f"variant {variant!r} has two paths, {above[variant]} and {path}")
    parents: dict[str, str] = {}
    for manufacturer, family, _ in above.values():
        if parents.setdefault(family, manufacturer) != manufacturer:
            raise ValueError(f"family {family!r} has two manufacturers, {parents[family]!r} and {manufacturer!r}")
    listed = Path(folder) / "variants.txt"
    names = [line.strip() for line in _lines(listed)] if listed.is_file() else sorted(above)
    if sorted(names) != sorted(above):
        raise ValueError(f"variants.txt and the image lists differ in {sorted(set(names) ^ set(above))[:5]}")
    tax = Taxonomy.from_paths(sorted(above.values()))
    return DatasetTree(tax, tax.indices(above[name] for name in names), tuple(names))


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_level(folder: Path, level: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for path in sorted(folder.glob(f"images_{level}_*.txt")):
        for line in _lines(path):
            image, _, name = line.strip().partition(" ")
            if not name:
                raise ValueError(f"{path.name} has a line without a name: {line!r}")
            if labels.setdefault(image, name) != name:
                raise ValueError(f"image {image} has two {level} names, {labels[image]!r} and {name!r}")
    if not labels:
        raise ValueError(f"no image in images_{level}_*.txt of {os.fspath(folder)!r}")
    return labels
