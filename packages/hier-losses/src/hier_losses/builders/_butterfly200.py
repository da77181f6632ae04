"""Butterfly-200: 5 families, 23 subfamilies, 116 genera, 200 species (Chen et al., 2018, ACM Multimedia)."""

import os
from pathlib import Path

from hier_losses.builders._base import DatasetTree, tree_of_labels


def butterfly200(*lists: str | os.PathLike, index_base: int = 1) -> DatasetTree:
    """Read the release lists, whose lines hold an image file and one integer label per level.

    Args:
        lists: the train, validation and test lists; together they must show every species.
        index_base: the first label, 1 in the released lists.

    Returns:
        The tree; a species is called after the folder of its images. Class i is the label i + index_base.

    Raises:
        ValueError: no line, a line without four labels, labels that are no tree or start elsewhere.
    """
    rows: list[tuple[int, ...]] = []
    folders: list[str] = []
    for path in lists:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            pieces = line.rsplit(maxsplit=4)
            if len(pieces) != 5 or not all(piece.lstrip("-").isdigit() for piece in pieces[1:]):
                raise ValueError(f"a line must hold a file name and four integers, got {line!r}")
            rows.append(tuple(map(int, pieces[1:])))
            folders.append(Path(pieces[0].replace("\\", "/")).parent.name)
    if not rows:
        raise ValueError("the lists hold no line")
    finest = max(range(4), key=lambda column: len({row[column] for row in rows}))
    found: dict[int, str] = {}
    for row, folder in zip(rows, folders, strict=True):
        found.setdefault(row[finest], folder)
    names = [found[label] or f"species {label}" for label in sorted(found)]
    if len(set(names)) < len(names):
        names = [f"species {label}" for label in sorted(found)]
    return tree_of_labels(sorted(set(rows)), ("family", "subfamily", "genus", "species"), names, index_base)
