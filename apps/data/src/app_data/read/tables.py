"""Reads the tables that may stand beside pictures: a taxonomy, and listings of files; what was guessed is said."""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import hier_losses
from app_data.read.pictures import SUFFIXES
from app_data.read.wordnet import PREFIX
from app_data.store.errors import DataError
from hier_losses import Taxonomy

__all__ = ["Classes", "Listed", "read_listing", "read_taxonomy"]

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "space"}


@dataclass(frozen=True)
class Classes:
    """A taxonomy and how it was read.

    Attributes:
        taxonomy: The tree.
        ids: Full path by the id that a table gives it: of the classes, then of the level above, and so on.
        notes: What was understood and guessed, one sentence each.
    """

    taxonomy: Taxonomy
    ids: tuple[dict[str, tuple[str, ...]], ...] = ()
    notes: tuple[str, ...] = ()


class Table(NamedTuple):
    """Rows of a text table with the number of each line, and what was guessed."""

    rows: list[tuple[int, list[str]]]
    notes: list[str]


def read_taxonomy(path: str | Path) -> Classes:
    """Read a taxonomy from a file.

    A table has a header: `leaf,parent,grandparent,...`, `level_1,level_2,...`, `parent,child`, or names with ids,
    `name,id` or `name,id,coarse name,coarse id`, whose ids listings may use. Everything else is read by
    `hier_losses.read_taxonomy`: JSON, OBO, Newick, lines `A > B > C`, Darwin Core.

    Args:
        path: The file.

    Returns:
        The tree, with what was understood.

    Raises:
        DataError: The file is missing, or its content is no tree (a cycle, a node with two parents).
    """
    if str(path).startswith(PREFIX):
        raise DataError(
            f"{path} suggests a tree that a person must read first: hier check DIR --taxonomy {path} > tree.txt, then "
            "--taxonomy tree.txt"
        )
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"the taxonomy {path} does not exist: give a table, a JSON file, or lines 'A > B > C'")
    try:
        order = None
        if path.suffix.lower() in (".csv", ".tsv"):
            table = _read_table(path)
            found = _with_ids(path, table)
            if found is not None:
                return found
            order = _row_order(path, table)
        reading = hier_losses.read_taxonomy(path, order=order)
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise DataError(f"the taxonomy {path} is not a tree: {error}") from error
    said = "; ".join(f"{name} {value}" for name, value in reading.understood.items())
    guesses = [f"guessed: {guess}" for guess in reading.guesses]
    return Classes(
        reading.taxonomy, (), (f"{path.name} is read as {reading.format} ({said})", *guesses, *reading.notes)
    )


def _row_order(path: Path, table: Table) -> str | None:
    """The direction the header tells, else the numbers of names; a file without a header would silently lose its first row."""
    header = [cell.strip().lower() for cell in table.rows[0][1]]
    if sorted(header) == ["child", "parent"]:
        return None
    if header[0] == "leaf" and header[-1] != "leaf":
        return "fine_to_coarse"
    if header[-1] == "leaf" or all(cell.startswith("level") for cell in header):
        return "coarse_to_fine"
    rows = [row for _, row in table.rows[1:] if len(row) == len(header)]
    again = any(row[i].strip().lower() == cell for row in rows for i, cell in enumerate(header))
    first, last = (len({row[i] for row in rows}) for i in (0, -1))
    if again or first == last:
        raise DataError(
            f"the first line of the taxonomy {path} must be a header such as 'leaf,parent,grandparent' or "
            f"'parent,child', got {','.join(header)!r}"
        )
    return "fine_to_coarse" if first > last else "coarse_to_fine"


def _with_ids(path: Path, table: Table) -> Classes | None:
    """A table whose columns come in pairs of name and id; None for another one."""
    pairs: dict[str, dict[str, int]] = {}
    for i, cell in enumerate(table.rows[0][1]):
        words = re.sub(r"\(.*?\)|_", " ", cell).casefold().split()
        if words and words[-1] in ("name", "id"):
            pairs.setdefault(" ".join(words[:-1]), {})[words[-1]] = i
    pairs = {prefix: both for prefix, both in pairs.items() if len(both) == 2 and prefix != "parent"}
    header = [cell.strip().casefold() for cell in table.rows[0][1]]
    if not pairs or not table.rows[1:]:
        return None
    rows = [(line, [cell.strip() for cell in row]) for line, row in table.rows[1:]]
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"the taxonomy {path} has {len(row)} cells in line {line}, the header has {len(header)}")
    up = next((header.index(name) for name in ("parent", "parent_id", "parent id") if name in header), None)
    if up is not None:
        both = next(iter(pairs.values()))
        nodes = [{"id": row[both["id"]], "name": row[both["name"]], "parent": row[up] or None} for _, row in rows]
        tree = Taxonomy.from_json(nodes)
        by_id = {node["id"]: node for node in nodes}

        def full(node: dict) -> tuple[str, ...]:
            return (*(full(by_id[node["parent"]]) if node["parent"] else ()), node["name"])

        paths = {node["id"]: full(node) for node in nodes}
        return Classes(tree, (paths,), (f"{path.name} is read as nodes with id, name and parent",))
    # The level with the most names is the finest.
    levels = sorted(pairs.values(), key=lambda both: -len({row[both["id"]] for _, row in rows}))
    ids: list[dict[str, tuple[str, ...]]] = [{} for _ in levels]
    for line, row in rows:
        names = [row[both["name"]] for both in levels]
        for number, both in enumerate(levels):
            full = tuple(reversed(names[number:]))
            if not all(full) or ids[number].setdefault(row[both["id"]], full) != full:
                raise DataError(
                    f"the taxonomy {path} line {line}: the id {row[both['id']]!r} must stand for one path, "
                    f"got {'/'.join(full)!r}"
                )
    used = " > ".join(table.rows[0][1][both["name"]].strip() for both in reversed(levels))
    notes = [f"{path.name} is read as names with ids ({used}); other columns are not used", *table.notes]
    return Classes(Taxonomy.from_paths(list(dict.fromkeys(ids[0].values()))), tuple(ids), tuple(notes))


def _read_table(path: Path) -> Table:
    """The rows of a text table; encoding and delimiter are recognised."""
    data, notes = path.read_bytes(), []
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        text = data.decode("cp1252", errors="replace")
        notes.append(f"{path.name} is not UTF-8 (byte {error.start}): read as latin-1 (cp1252)")
    lines = [line for line in text.splitlines()[:200] if line.strip()]
    if not lines:
        raise DataError(f"the file {path} is empty: it needs a header and at least one row")
    widths = {d: {len(row) for row in csv.reader(lines, delimiter=d, skipinitialspace=d != "\t")} for d in _DELIMITERS}
    even = [d for d in _DELIMITERS if len(widths[d]) == 1 and widths[d] != {1}]
    delimiter = even[0] if even else max(list(_DELIMITERS)[:-1], key=lambda d: lines[0].count(d))
    if delimiter != ",":
        notes.append(f"{path.name} has {_DELIMITERS[delimiter]}s between cells")
    reader = csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=delimiter != "\t")
    return Table([(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)], notes)


class Listed(NamedTuple):
    """One row of a listing; `split` is empty when the table has no such column."""

    path: str
    label: tuple[str, ...]
    split: str


@dataclass
class _Columns:
    path: int
    label: list[int]
    split: int | None = None
    above: list[int] = field(default_factory=list)


def read_listing(
    path: str | Path, columns: str = "", classes: Classes | None = None, exists: Callable[[str], bool] | None = None
) -> tuple[list[Listed], list[str]]:
    """Read a list of pictures with their classes.

    With a header it has the columns `path`, `leaf` (or `level_1`, `level_2`, ...: empty ones end the path early) and
    optionally `split`; without one, the column that names pictures is the path, and the next one the class.

    Args:
        path: The file; comma, semicolon, tab, bar or space between cells.
        columns: Names of columns, or numbers from 1 in a file without a header: `path=image_id,label=leaf,split=fold`;
            the levels of a label are joined by +, top first.
        classes: The taxonomy; where all labels are ids of its table, they are read as such.
        exists: Whether there is a picture of this path.

    Returns:
        The rows, and what was guessed.

    Raises:
        DataError: A missing file or column, an empty cell, or a path that is listed twice.
    """
    path, exists = Path(path).expanduser(), exists or (lambda _: True)
    if not path.is_file():
        raise DataError(f"the listing {path} does not exist: give a CSV file with the header path,leaf")
    try:
        rows, notes = _read_table(path)
    except csv.Error as error:
        raise DataError(f"the listing {path} cannot be read as a table: {error}") from error
    header = [cell.strip().lower() for cell in rows[0][1]]
    bare = any(cell.endswith(SUFFIXES) for cell in header)
    chosen = _bare_columns(path, header, columns, rows, classes, notes) if bare else _columns(path, header, columns)
    body, ids = rows if bare else rows[1:], classes.ids if classes is not None else ()
    found: dict[str, Listed] = {}
    for number, row in body:
        if len(row) != len(header):
            raise DataError(f"row {number} of {path} has {len(row)} cells, the header has {len(header)}")
        cells = [cell.strip() for cell in row]
        where, label = cells[chosen.path], [cells[i] for i in chosen.label if cells[i]]
        if not where or not label:
            raise DataError(f"row {number} of {path} has an empty path or leaf: fill it in or remove the row")
        if "\\" in where and not exists(where):
            where = where.replace("\\", "/")
        if where in found:
            raise DataError(f"row {number} of {path} lists {where} a second time: keep one of the rows")
        split = cells[chosen.split].lower() if chosen.split is not None else ""
        full = tuple(label) if len(chosen.label) > 1 else tuple(label[0].split("/"))
        found[where] = Listed(where, full, split)
    if not found:
        raise DataError(f"the listing {path} has a header but no row")
    known = set() if classes is None else set(classes.taxonomy.names)
    labels = {row.label[0] if len(row.label) == 1 else None for row in found.values()}
    if ids and labels <= ids[0].keys() and not labels <= known:
        notes.append(f"{path.name} gives classes by their ids")
        found = {where: row._replace(label=ids[0][row.label[0]]) for where, row in found.items()}
        _check_above(path, body, chosen, ids, notes)
    return list(found.values()), notes


def _columns(path: Path, header: list[str], columns: str) -> _Columns:
    """Columns of a listing with a header."""
    given = dict(part.partition("=")[::2] for part in columns.split(",")) if columns else {}
    if given.keys() - {"path", "label", "split"}:
        raise DataError(
            f"--listing-columns must name path, label or split, such as path=file,label=leaf, got {columns!r}"
        )
    levels = [name for name in header if name.startswith("level")]
    where = given.get("path", "path").strip().lower()
    label = (
        given["label"].lower().split("+") if "label" in given else ["leaf"] if "leaf" in header else levels or ["leaf"]
    )
    split = given.get("split", "split").strip().lower()
    missing = [name for name in (where, *label, *([split] if "split" in given else [])) if name not in header]
    if missing:
        wanted = f"{where} and {'+'.join(label)}"
        raise DataError(
            f"the listing {path} must have the columns {wanted}, got {','.join(header)!r}: name yours by "
            "--listing-columns path=...,label=..."
        )
    places = [header.index(name) for name in label]
    return _Columns(header.index(where), places, header.index(split) if split in header else None)


def _bare_columns(
    path: Path, first: list[str], columns: str, rows: list, classes: Classes | None, notes: list[str]
) -> _Columns:
    """Columns of a listing without a header."""
    if columns:
        numbers = [str(i + 1) for i in range(len(first))]
        return _columns(path, numbers, columns)
    where = next(i for i, cell in enumerate(first) if cell.endswith(SUFFIXES))
    others = [i for i in range(len(first)) if i != where]
    if not others:
        raise DataError(f"the listing {path} has no column with a class: add one")
    more = f"; columns {', '.join(str(i + 1) for i in others[1:])} are not read as classes" if others[1:] else ""
    notes.append(f"{path.name} has no header: column {where + 1} is the path, column {others[0] + 1} the class{more}")
    return _Columns(where, others[:1], None, others[1:])


def _check_above(path: Path, body: list, chosen: _Columns, ids: Sequence[dict], notes: list[str]) -> None:
    """Columns that repeat the ids of the levels above must say what the taxonomy says."""
    for level, column in zip(ids[1:], chosen.above, strict=False):
        wrong = []
        for number, row in body:
            up = level.get(row[column].strip())
            full = ids[0][row[chosen.label[0]].strip()]
            if up is None or full[: len(up)] != up:
                wrong.append(str(number))
        if len(wrong) == len(body):
            return  # another kind of column
        if wrong:
            raise DataError(
                f"column {column + 1} of {path} differs from the taxonomy in the rows {', '.join(wrong)}: correct one of them"
            )
        notes.append(f"column {column + 1} of {path.name} agrees with the level above in the taxonomy")
