"""Reads the two tables that may stand beside pictures: a taxonomy (CSV or JSON) and a listing of files (CSV)."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

from app_data.store.errors import DataError
from hier_losses import Taxonomy

__all__ = ["Listed", "read_listing", "read_taxonomy"]


def read_taxonomy(path: str | Path) -> Taxonomy:
    """Read a taxonomy from a file.

    A CSV has a header: `leaf,parent,grandparent,...` (one row per leaf; "leaf" stands at either end and tells the
    direction), `level_1,level_2,...` (top level first), or `parent,child` (one row per edge, in either order).
    A JSON file holds nested names (`{"animal": ["cat", "dog"]}`) or a node list (`id`, `name`, `parent`).

    Args:
        path: A file that ends in .csv or .json.

    Returns:
        The tree.

    Raises:
        DataError: The file is missing or of another kind, or its content is no tree (a cycle, a node with two parents).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the taxonomy {path} does not exist: give a CSV or JSON file")
    try:
        if path.suffix.lower() == ".json":
            return Taxonomy.from_json(path)
        if path.suffix.lower() == ".csv":
            return Taxonomy.from_csv(path, order=_row_order(path))
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(f"the taxonomy {path} is not valid JSON: line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the taxonomy {path} is not UTF-8 text: save it as UTF-8") from error
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise DataError(f"the taxonomy {path} is not a tree: {error}") from error
    raise DataError(f"the taxonomy {path} must end in .csv or .json")


def _row_order(path: Path) -> str | None:
    """The direction the header tells; a file without a header would silently lose its first row, so it is refused."""
    header = [cell.strip().lower() for cell in _rows(path)[0]]
    if sorted(header) == ["child", "parent"]:
        return None
    if header[0] == "leaf" and header[-1] != "leaf":
        return "fine_to_coarse"
    if header[-1] == "leaf" or all(cell.startswith("level") for cell in header):
        return "coarse_to_fine"
    raise DataError(
        f"the first line of the taxonomy {path} must be a header such as 'leaf,parent,grandparent' or 'parent,child', "
        f"got {','.join(header)!r}"
    )


def _rows(path: Path) -> list[list[str]]:
    # utf-8-sig, because spreadsheet programs put a byte order mark before the header.
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if any(cell.strip() for cell in row)]
    if not rows:
        raise DataError(f"the file {path} is empty: it needs a header and at least one row")
    return rows


class Listed(NamedTuple):
    """One row of a listing; `split` is empty when the table has no such column."""

    path: str
    leaf: str
    split: str


def read_listing(path: str | Path) -> list[Listed]:
    """Read a CSV with the columns `path`, `leaf` and optionally `split`.

    Raises:
        DataError: A missing file or column, an empty cell, or a path that is listed twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the listing {path} does not exist: give a CSV file with the header path,leaf")
    try:
        rows = _rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the listing {path} cannot be read as UTF-8 CSV: {error}") from error
    header = [cell.strip().lower() for cell in rows[0]]
    if "path" not in header or "leaf" not in header:
        raise DataError(f"the listing {path} must have the columns path and leaf, got {','.join(header)!r}")
    where, leaf = header.index("path"), header.index("leaf")
    split = header.index("split") if "split" in header else None
    found: list[Listed] = []
    seen: set[str] = set()
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise DataError(f"row {number} of {path} has {len(row)} cells, the header has {len(header)}")
        cells = (row[where].strip(), row[leaf].strip(), row[split].strip().lower() if split is not None else "")
        if not cells[0] or not cells[1]:
            raise DataError(f"row {number} of {path} has an empty path or leaf: fill it in or remove the row")
        if cells[0] in seen:
            raise DataError(f"row {number} of {path} lists {cells[0]} a second time: keep one of the rows")
        seen.add(cells[0])
        found.append(Listed(*cells))
    if not found:
        raise DataError(f"the listing {path} has a header but no row")
    return found
