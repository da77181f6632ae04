"""iNaturalist 2021: 7 levels from kingdom to species, 10,000 species (Van Horn et al., 2021, CVPR)."""

import os
from pathlib import Path

from hier_losses._formats import _folders, load_json
from hier_losses.builders._base import DatasetTree
from hier_losses.taxonomy import Taxonomy

LEVELS = ("kingdom", "phylum", "class", "order", "family", "genus", "specific_epithet")


def inaturalist(source: str | os.PathLike) -> DatasetTree:
    """Read folder names such as `00001_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax`.

    Args:
        source: the folder that holds the class folders, or an annotation file (JSON with `categories`).

    Returns:
        The tree; a species is called `genus epithet`, because epithets repeat; classes in the order of their numbers.

    Raises:
        ValueError: a folder name without exactly eight pieces, numbers that do not count from 0, a species twice.
    """
    if os.path.isdir(source):
        names = _folders(source)
    else:
        data = load_json(Path(source).read_text(encoding="utf-8"), str(source))
        categories = sorted(data["categories"], key=lambda entry: entry["id"])
        names = [
            entry.get("image_dir_name") or "_".join([f"{entry['id']:05d}", *(entry[level] for level in LEVELS)])
            for entry in categories
        ]
    if not names:
        raise ValueError(f"{os.fspath(source)!r} holds no class")
    paths = []
    for number, name in enumerate(names):
        pieces = name.split("_")
        if len(pieces) != 1 + len(LEVELS) or not all(pieces):
            raise ValueError(f"folder {name!r} must have eight pieces: a number, then {', '.join(LEVELS)}")
        if not pieces[0].isdigit() or int(pieces[0]) != number:
            raise ValueError(f"folder {name!r} must have the number {number:05d}: labels are positions in that order")
        paths.append((*pieces[1:-1], f"{pieces[-2]} {pieces[-1]}"))
    if len(set(paths)) < len(paths):
        raise ValueError("a species occurs twice among the folders")
    tax = Taxonomy.from_paths(paths)
    return DatasetTree(tax, tax.indices(paths), tuple(names))
