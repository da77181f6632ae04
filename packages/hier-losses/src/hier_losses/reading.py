"""Read taxonomies and label graphs from files of many kinds, and say what was understood and what was guessed.

Formats: text tables, lines of the form `A > B > C`, codes that extend one another (as in ICD-10), OBO 1.4, Darwin Core
and GBIF tables, the dump of the NCBI taxonomy, JSON and Newick text. No file is taken apart without a word: a `Reading`
holds the format, delimiter, encoding and columns, every guess, and every name or edge that deserves a look.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hier_losses import _formats
from hier_losses._order import shorten
from hier_losses._parse import Parts, _check_choice, parse_paths
from hier_losses._tables import PathLike, Table, look_alikes, read_table, read_text
from hier_losses.graph import LabelGraph
from hier_losses.taxonomy import Taxonomy

FORMATS = ("table", "lines", "codes", "obo", "darwin_core", "ncbi", "json", "newick")
_RANKS = ("domain", "kingdom", "phylum", "class", "order", "family", "subfamily", "genus", "species")
_SEPARATORS = (" > ", " -> ", " / ", "::", ">", "/")
_NUMBERED = re.compile(r"\s*\d+ - ")
_CODE = re.compile(r"([A-Za-z]?\d[\w.\-]*)\s*[,;\t ]\s*(\S.*)")


@dataclass(frozen=True)
class Reading:
    """A taxonomy and how it was read; `str` gives lines to print.

    Attributes:
        taxonomy: the tree.
        format: one of `FORMATS`.
        understood: what the file was read as, by name: delimiter, encoding, header, layout, order.
        guesses: what was guessed, one sentence each.
        notes: what deserves a look, one sentence each: names that look alike, holes, edges left out.
    """

    taxonomy: Taxonomy
    format: str
    understood: dict[str, str]
    guesses: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return one line per thing understood, guessed and noted."""
        lines = [f"{self.taxonomy!r} from {self.format}"]
        lines += [f"  {name}: {value}" for name, value in self.understood.items()]
        lines += [f"  guessed: {guess}" for guess in self.guesses]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass
class _Edges:
    """Nodes by key, with their names and the keys of their parents in the order of the file."""

    names: dict[str, str]
    parents: dict[str, list[str]]


def read_taxonomy(
    path: PathLike,
    format: str = "auto",
    *,
    layout: str = "auto",
    order: str | None = None,
    columns: Sequence[str] | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    header: bool | None = None,
    on_hole: str = "error",
    on_second_parent: str = "error",
    root: str | None = "auto",
) -> Reading:
    """Read a tree from a file, and report what was understood and guessed.

    Args:
        path: the file; for "ncbi" `nodes.dmp`, beside which `names.dmp` lies, or their folder.
        format: one of `FORMATS`, or "auto" to recognise it by the name and the first lines.
        layout: for tables, as in `Taxonomy.from_csv`.
        order: for tables, as in `Taxonomy.from_csv`.
        columns: for tables, as in `Taxonomy.from_csv`.
        delimiter: for tables, as in `Taxonomy.from_csv`; for lines, the text between the names.
        encoding: None recognises it.
        header: for tables, as in `Taxonomy.from_csv`.
        on_hole: for tables of paths, as in `Taxonomy.from_csv`.
        on_second_parent: for formats of graphs, what to do with a node of several parents: "error", or "first", which
            keeps the parent that the file names first and notes the others. `read_label_graph` keeps all.
        root: for JSON and Newick, as in `Taxonomy.from_json`.

    Returns:
        The tree with its report.

    Raises:
        ValueError: a file that fits no format or several, a hole, a second parent, a broken tree.
    """
    _check_choice("on_second_parent", on_second_parent, ("error", "first"))
    guesses: list[str] = []
    notes: list[str] = []
    kind = _recognise(path, encoding, guesses) if format == "auto" else format
    _check_choice("format", kind, FORMATS)
    understood: dict[str, str] = {}
    if kind in ("json", "newick"):
        reader = _formats.read_json if kind == "json" else _formats.read_newick
        parts = reader(Path(path), root)
    elif kind == "lines":
        parts = _read_lines(path, encoding, delimiter, order, understood, guesses)
    elif kind == "table":
        table = read_table(path, delimiter, encoding, header)
        parts = _formats.table_parts(table, layout, order, columns, on_hole)
        understood, guesses = table.understood, guesses + table.guesses
    elif kind == "darwin_core" and (ranks := _rank_columns(table := read_table(path, delimiter, encoding, True))):
        parts = _formats.table_parts(table, "paths", None, ranks, on_hole)
        understood, guesses = {**table.understood, "columns": ", ".join(ranks)}, guesses + table.guesses
    else:
        edges = _read_edges(path, kind, delimiter, encoding, understood, guesses)
        parts = _tree_parts(edges, on_second_parent, notes)
    notes += look_alikes(dict.fromkeys(parts.names))
    taxonomy = Taxonomy(*parts)
    if taxonomy.num_levels == 1:
        notes.append(f"the tree is flat: none of its {taxonomy.num_nodes} nodes has a parent")
    return Reading(taxonomy, kind, understood, tuple(guesses), tuple(notes))


def read_label_graph(
    path: PathLike, format: str = "auto", *, delimiter: str | None = None, encoding: str | None = None
) -> LabelGraph:
    """Read a graph of labels, in which a node may have several parents, from the files that `read_taxonomy` reads.

    Args:
        path: the file.
        format: as in `read_taxonomy`.
        delimiter: as in `read_taxonomy`.
        encoding: as in `read_taxonomy`.

    Returns:
        The graph; names that repeat are followed by their key in the file.

    Raises:
        ValueError: a cycle, or what `read_taxonomy` raises.
    """
    kind = _recognise(path, encoding, []) if format == "auto" else format
    _check_choice("format", kind, FORMATS)
    if kind in ("obo", "ncbi", "codes") or (
        kind == "darwin_core" and not _rank_columns(read_table(path, delimiter, encoding, True))
    ):
        found = _read_edges(path, kind, delimiter, encoding, {}, [])
        seen: dict[str, int] = {}
        for name in found.names.values():
            seen[name] = seen.get(name, 0) + 1
        label = {key: name if seen[name] == 1 else f"{name} ({key})" for key, name in found.names.items()}
        pairs = [(label[up], label[key]) for key, ups in found.parents.items() for up in ups]
        return LabelGraph.from_edges(pairs, nodes=list(label.values()))
    if kind == "table":
        table = read_table(path, delimiter, encoding)
        used = [] if table.header is None else [name.lower() for name in table.header]
        if sorted(used) == ["child", "parent"]:
            order = "child_parent" if used[0] == "child" else "parent_child"
            return LabelGraph.from_edges([row for _, row in table.rows], order)
    return LabelGraph.from_taxonomy(read_taxonomy(path, kind, delimiter=delimiter, encoding=encoding).taxonomy)


def _recognise(path: PathLike, encoding: str | None, guesses: list[str]) -> str:
    """Name the format of a file by its name or its first lines."""
    file = Path(path)
    if file.is_dir() or file.name == "nodes.dmp":
        return "ncbi"
    by_end = {".json": "json", ".obo": "obo", ".nwk": "newick", ".newick": "newick", ".tree": "newick"}
    if file.suffix.lower() in by_end:
        return by_end[file.suffix.lower()]
    text, _ = read_text(path, encoding, [])
    lines = [line for line in text.splitlines()[:200] if line.strip()]
    head = {name.strip().strip('"').lower() for name in re.split(r"[,;\t|]", lines[0])} if lines else set()
    if "parentnameusageid" in head or (
        len(head & set(_RANKS)) >= 3 and head & {"scientificname", "taxonid", "taxonkey"}
    ):
        return "darwin_core"
    if lines and lines[0].startswith("format-version:"):
        return "obo"
    if lines and lines[0].lstrip().startswith(("@prefix", "@base", "<?xml", "<rdf")):
        raise ValueError(
            f"{os.fspath(path)!r} looks like RDF or XML, which is not read (SKOS neither); write its broader relations "
            "as a table with the columns parent and child"
        )
    found = "table"
    lines = [line for line in lines if not line.startswith("#")]
    if file.suffix.lower() not in (".csv", ".tsv") and lines:
        # A line without a separator names a top node.
        if any(2 * sum(s in line for line in lines) > len(lines) for s in (" > ", " -> ", "::")):
            found = "lines"
        elif all(_CODE.fullmatch(line.strip()) for line in lines):
            found = "codes"
    if file.suffix.lower() not in (".csv", ".tsv"):
        guesses.append(f"format {found!r}, by the first lines; format= names another one")
    return found


def _read_lines(
    path: PathLike,
    encoding: str | None,
    separator: str | None,
    order: str | None,
    understood: dict[str, str],
    guesses: list[str],
) -> Parts:
    text, understood["encoding"] = read_text(path, encoding, guesses)
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    lines = [(number, line) for number, line in numbered if not line.startswith("#")]
    if len(lines) < len(numbered):
        guesses.append(f"lines that begin with '#' are comments: {len(numbered) - len(lines)} left out")
    if lines and all(_NUMBERED.match(line) for _, line in lines):
        guesses.append(f"numbers in front of the lines are no names: {_NUMBERED.match(lines[0][1])[0]!r} left out")  # type: ignore[index]
        lines = [(number, _NUMBERED.sub("", line)) for number, line in lines]
    if separator is None:
        counts = {s: sum(s in line for _, line in lines) for s in _SEPARATORS}
        separator = max(_SEPARATORS, key=lambda s: counts[s])
        guesses.append(f"separator {separator!r}, in {counts[separator]} of {len(lines)} lines")
    understood["separator"] = separator
    rows = []
    for number, line in lines:
        rows.append([name.strip() for name in line.split(separator.strip() or separator)])
        if not all(rows[-1]):
            raise ValueError(f"{os.fspath(path)!r} line {number} has an empty name: {line!r}")
    return parse_paths(rows, order or "coarse_to_fine")


def _rank_columns(table: Table) -> list[str]:
    """Columns of the ranks of a Darwin Core table without parent ids, top first."""
    header = table.header or []
    if any(name.lower() == "parentnameusageid" for name in header):
        return []
    by_rank = {name.lower(): name for name in header}
    ranks = [by_rank[rank] for rank in _RANKS if rank in by_rank]
    if "species" not in by_rank and "scientificname" in by_rank:
        ranks.append(by_rank["scientificname"])
    return ranks


def _read_edges(
    path: PathLike,
    kind: str,
    delimiter: str | None,
    encoding: str | None,
    understood: dict[str, str],
    guesses: list[str],
) -> _Edges:
    if kind == "darwin_core":
        return _darwin_core(read_table(path, delimiter, encoding, True), understood, guesses)
    if kind == "ncbi":
        return _ncbi(Path(path), understood)
    text, understood["encoding"] = read_text(path, encoding, guesses)
    return _obo(text, understood) if kind == "obo" else _codes(text, os.fspath(path), understood)


def _darwin_core(table: Table, understood: dict[str, str], guesses: list[str]) -> _Edges:
    place = {name.lower(): i for i, name in enumerate(table.header or [])}
    missing = [name for name in ("taxonid", "parentnameusageid", "scientificname") if name not in place]
    if missing:
        raise ValueError(
            f"{table.name!r} needs the columns taxonID, parentNameUsageID and scientificName: no {missing}"
        )
    understood |= {**table.understood, "columns": "taxonID, parentNameUsageID, scientificName"}
    guesses += table.guesses
    rows, skipped = [row for _, row in table.rows], 0
    if "acceptednameusageid" in place:
        # A synonym points to the accepted name and is no class of its own.
        at, own = place["acceptednameusageid"], place["taxonid"]
        kept = [row for row in rows if row[at] in ("", row[own])]
        rows, skipped = kept, len(rows) - len(kept)
    understood["synonyms left out"] = str(skipped)
    names = {row[place["taxonid"]]: row[place["scientificname"]] for row in rows}
    ups = {row[place["taxonid"]]: row[place["parentnameusageid"]] for row in rows}
    return _checked(table.name, names, {key: [up] if up and up != key else [] for key, up in ups.items()})


def _ncbi(path: Path, understood: dict[str, str]) -> _Edges:
    """Columns of a dump end in a tab and a bar; node 1 is its own parent and the root."""
    folder = path if path.is_dir() else path.parent
    nodes, names = folder / "nodes.dmp", folder / "names.dmp"
    above: dict[str, str] = {}
    with open(nodes, encoding="utf-8") as file:
        for line in file:
            cells = line.split("\t|\t", 2)
            above[cells[0]] = cells[1]
    named: dict[str, str] = {}
    if names.exists():
        with open(names, encoding="utf-8") as file:
            for line in file:
                cells = line.rstrip("\t|\n").split("\t|\t")
                if cells[3] == "scientific name":
                    named[cells[0]] = cells[1]
    understood["names"] = "names.dmp, scientific names" if named else "none, ids stand for them"
    above.pop("1", None)  # the root
    ups = {key: [] if up == "1" else [up] for key, up in above.items()}
    return _checked(os.fspath(nodes), {key: named.get(key, key) for key in above}, ups)


def _obo(text: str, understood: dict[str, str]) -> _Edges:
    """Stanzas `[Term]` with id, name and is_a; obsolete terms are left out."""
    names: dict[str, str] = {}
    ups: dict[str, list[str]] = {}
    obsolete = 0
    for stanza in re.split(r"(?m)^\[", text)[1:]:
        kind, _, body = stanza.partition("]")
        if kind != "Term":
            continue
        tags = [line.partition(":")[::2] for line in body.splitlines() if ":" in line]
        values = [(tag.strip(), re.sub(r"\s+!.*", "", value).strip()) for tag, value in tags]
        first: dict[str, str] = dict(reversed(values))
        if first.get("is_obsolete") == "true":
            obsolete += 1
            continue
        key = first["id"]
        names[key] = first.get("name", key)
        ups[key] = [value.split(" ")[0] for tag, value in values if tag == "is_a"]
    understood |= {"edges": "is_a", "obsolete terms left out": str(obsolete)}
    return _checked("the OBO file", names, ups)


def _codes(text: str, name: str, understood: dict[str, str]) -> _Edges:
    """A code lies below the longest other code that it begins with; dots do not count."""
    names: dict[str, str] = {}
    bare: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _CODE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{name!r} line {number} is no code with a title: {line!r}")
        code = match[1].replace(".", "")
        if code in bare:
            raise ValueError(f"{name!r} line {number}: code {match[1]!r} stands in an earlier line too")
        bare[code], names[match[1]] = match[1], f"{match[1]} {match[2].strip().strip(chr(34))}"
    ups = {}
    for code, key in bare.items():
        above = next((bare[code[:end]] for end in range(len(code) - 1, 0, -1) if code[:end] in bare), None)
        ups[key] = [] if above is None else [above]
    understood["parents"] = "the longest code that a code begins with"
    return _Edges(names, ups)


def _checked(name: str, names: dict[str, str], ups: dict[str, list[str]]) -> _Edges:
    lost = [f"{key} -> {up}" for key, found in ups.items() for up in found if up not in names]
    if lost:
        raise ValueError(f"{name!r} names parents that it does not hold: {shorten(lost)}")
    return _Edges(names, ups)


def _tree_parts(edges: _Edges, on_second_parent: str, notes: list[str]) -> Parts:
    several = {key: ups for key, ups in edges.parents.items() if len(ups) > 1}
    if several:
        shown = [f"{edges.names[key]}: {', '.join(edges.names[up] for up in ups)}" for key, ups in several.items()]
        if on_second_parent == "error":
            raise ValueError(
                f"{len(several)} nodes have several parents: {shorten(shown, 3)}; on_second_parent='first' keeps the "
                "first, read_label_graph keeps all"
            )
        notes.append(f"{len(several)} nodes keep the first of several parents: {shorten(shown, 3)}")
    place = {key: number for number, key in enumerate(edges.names)}
    parents = [place[edges.parents[key][0]] if edges.parents[key] else -1 for key in edges.names]
    taken: dict[tuple[int, str], str] = {}
    names = []
    for (key, name), up in zip(edges.names.items(), parents, strict=True):
        if (up, name) in taken:
            notes.append(f"siblings share the name {name!r}: the later one is called {name} ({key})")
            name = f"{name} ({key})"
        taken[up, name] = key
        names.append(name)
    return Parts(names, parents)
