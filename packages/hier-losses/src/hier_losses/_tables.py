"""Recognise delimiter, encoding and header of a text table, and say what was recognised and what was guessed."""

import csv
import io
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hier_losses._order import shorten
from hier_losses._parse import _check_choice

PathLike = str | os.PathLike
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


@dataclass
class Table:
    """Rows of a text table, each with the number of its line.

    Attributes:
        name: the file, for messages.
        header: names of the columns, None without a header.
        rows: (line number, cells).
        understood: what the file was read as.
        guesses: what was guessed, one sentence each.
    """

    name: str
    header: list[str] | None
    rows: list[tuple[int, list[str]]]
    understood: dict[str, str] = field(default_factory=dict)
    guesses: list[str] = field(default_factory=list)


def read_text(path: PathLike, encoding: str | None, guesses: list[str]) -> tuple[str, str]:
    """Return the text of a file and its encoding: UTF-8 or by its byte order mark, else a guess."""
    data = Path(path).read_bytes()
    if encoding is not None:
        return data.decode(encoding), encoding
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16"), "utf-16"
    try:
        return data.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError as error:
        guesses.append(
            f"byte {error.start} is not UTF-8: read as cp1252 (Western European); encoding= names another one"
        )
        return data.decode("cp1252", errors="replace"), "cp1252"


@contextmanager
def readable_csv(name: str) -> Iterator[None]:
    """Turn the error of the CSV reader, which is no `ValueError`, into one that names the file."""
    try:
        yield
    except csv.Error as error:
        raise ValueError(f"{name!r} cannot be read as a table: {error}") from error


def read_table(
    path: PathLike, delimiter: str | None = None, encoding: str | None = None, header: bool | None = None
) -> Table:
    """Read the rows of a file; what is None is recognised."""
    name, guesses = os.fspath(path), list[str]()
    text, encoding = read_text(path, encoding, guesses)
    lines = text.splitlines()
    if delimiter is None:
        with readable_csv(name):
            delimiter = _delimiter(name, [line for line in lines[:200] if line.strip()])
        if delimiter != ",":
            guesses.append(f"delimiter {_DELIMITERS[delimiter]}, which stands equally often in the lines")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t")
    rows, line = [], 1
    with readable_csv(name):
        for row in reader:
            if any(row):
                rows.append((line, row))
            line = reader.line_num + 1
    if not rows:
        raise ValueError(f"{name!r} is empty, a header is needed")
    for number, row in rows:
        if len(row) != len(rows[0][1]):
            raise ValueError(f"{name!r} line {number}: {len(row)} cells, the header has {len(rows[0][1])}")
    if header is None:
        first = rows[0][1]
        again = [cell for i, cell in enumerate(first) if cell and any(row[i] == cell for _, row in rows[1:])]
        header = not again
        if again:
            guesses.append(f"no header, since {shorten(again[:1])} of the first line stands in its column again")
    names = [cell.strip() for cell in rows[0][1]] if header else None
    understood = {"delimiter": _DELIMITERS.get(delimiter, delimiter), "encoding": encoding}
    understood["header"] = "none" if names is None else ", ".join(names)
    return Table(name, names, rows[1:] if header else rows, understood, guesses)


def _delimiter(name: str, lines: Sequence[str]) -> str:
    """The delimiter that stands equally often, outside of quotes, in all lines; a comma for a single column."""
    found = {}
    for delimiter in _DELIMITERS:
        sizes = {len(row) for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)}
        if len(sizes) == 1 and sizes != {1}:
            found[delimiter] = sizes.pop()
    if len(found) > 1:
        listed = ", ".join(f"{_DELIMITERS[d]} ({n} columns)" for d, n in found.items())
        raise ValueError(f"{name!r} can be read with more than one delimiter: {listed}; delimiter= names the right one")
    # Lines of different length: the most frequent one is meant, and the error names the line.
    counts = {d: sum(line.count(d) for line in lines) for d in _DELIMITERS}
    return next(iter(found), max(counts, key=lambda d: counts[d]) if any(counts.values()) else ",")


def close_holes(row: Sequence[str], header: Sequence[str] | None, on_hole: str, where: str, reverse: bool) -> list[str]:
    """Handle empty cells between known ones; `reverse` for rows that begin with the leaf."""
    _check_choice("on_hole", on_hole, ("error", "close", "fill"))
    cells = list(row)[::-1] if reverse else list(row)
    known = [i for i, cell in enumerate(cells) if cell]
    # Rows that begin with the leaf may lack far ancestors; the others may not lack the top.
    first = known[0] if known and reverse else 0
    holes = [i for i in range(first, known[-1]) if not cells[i]] if known else []
    if holes and on_hole == "error":
        raise ValueError(
            f"{where} has a hole: {list(row)!r}; missing levels must stand at one end; on_hole='close' leaves the "
            "level out, on_hole='fill' puts a node there"
        )
    names = [f"level {i + 1}" for i in range(len(cells))] if header is None else list(header)
    if header is not None and reverse:
        names.reverse()
    if on_hole == "close":
        cells = [cell for i, cell in enumerate(cells) if i not in holes]
    else:
        for i in holes:
            cells[i] = f"(no {names[i]})"
    return cells[::-1] if reverse else cells


def look_alikes(names: Iterable[str]) -> list[str]:
    """One sentence for names that differ only in case, in blanks or in how accents are written."""
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        key = unicodedata.normalize("NFC", " ".join(name.split())).casefold()
        groups.setdefault(key, {})[name] = None
    twins = [list(group) for group in groups.values() if len(group) > 1]
    if not twins:
        return []
    listed = "; ".join(" and ".join(ascii(name) for name in group[:3]) for group in twins[:5])
    more = f" and {len(twins) - 5} more" if len(twins) > 5 else ""
    return [f"names that look alike stay different nodes: {listed}{more}"]
