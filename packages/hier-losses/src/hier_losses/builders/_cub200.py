"""CUB-200-2011 birds: 13 orders, 38 families, 200 species (Wah et al., 2011; levels of Chang et al., 2021, CVPR)."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from hier_losses._tables import readable_csv
from hier_losses.builders._base import DatasetTree, tree_of_labels
from hier_losses.taxonomy import Taxonomy


def cub200(
    classes_file: str | os.PathLike,
    hierarchy_file: str | os.PathLike,
    levels: Sequence[str] = ("order", "family", "species"),
    index_base: int = 1,
) -> DatasetTree:
    """Join the data set's class list with a table of its taxonomy.

    The data set has no taxonomy of its own, and the published tables carry no licence, so none is shipped.

    Args:
        classes_file: the data set's `classes.txt`, with lines like `1 001.Black_footed_Albatross`.
        hierarchy_file: CSV. Either integers, one row per species, without a header, columns in any order (lists in use
            have [species, order, family]): the number of labels tells which column is which. Or names under a header
            with the columns of `levels`.
        levels: the levels, top first: ("order", "family", "genus", "species") for the four-level variant.
        index_base: the first integer label, 1 in the published tables.

    Returns:
        The tree; species are named as in `classes.txt` without number and underscores, class i is line i.

    Raises:
        ValueError: broken lines, integer labels that are no tree or start elsewhere, species that do not match.
    """
    classes: list[str] = []
    for line in Path(classes_file).read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        number, _, name = line.strip().partition(" ")
        if number != str(len(classes) + 1) or not name:
            raise ValueError(f"classes_file must count its lines from 1, got {line!r} as line {len(classes) + 1}")
        classes.append(name)
    species = [_plain(name) for name in classes]
    with open(hierarchy_file, newline="", encoding="utf-8-sig") as file, readable_csv(str(hierarchy_file)):
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError("hierarchy_file is empty")
    if all(cell.isdigit() for row in rows for cell in row):
        tree = tree_of_labels([list(map(int, row)) for row in rows], levels, species, index_base)
        return DatasetTree(tree.taxonomy, tree.targets, tuple(classes))
    missing = [level for level in levels if level not in rows[0]]
    if missing:
        raise ValueError(f"hierarchy_file must hold integers, or have the columns {list(levels)}; missing: {missing}")
    columns = [rows[0].index(level) for level in levels]
    short = next((row for row in rows if len(row) < len(rows[0])), None)
    if short is not None:
        raise ValueError(f"hierarchy_file must have {len(rows[0])} cells in each row, got {short}")
    paths = {_plain(row[columns[-1]]): tuple(row[column] for column in columns[:-1]) for row in rows[1:]}
    unknown = [name for name in species if name not in paths] + [name for name in paths if name not in set(species)]
    if unknown:
        raise ValueError(f"classes_file and hierarchy_file differ in {len(unknown)} species, such as {unknown[:3]}")
    tax = Taxonomy.from_paths((*paths[name], name) for name in species)
    if tax.num_leaves != len(species) or tax.level_sizes[-1] != len(species):
        raise ValueError("every species must have a name on every level")
    return DatasetTree(tax, tax.indices((*paths[name], name) for name in species), tuple(classes))


def _plain(name: str) -> str:
    """Drop the leading number and the underscores: `001.Black_footed_Albatross` -> `Black footed Albatross`."""
    number, dot, rest = name.partition(".")
    return (rest if dot and number.isdigit() else name).replace("_", " ")
