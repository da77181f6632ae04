"""Read and write taxonomies as CSV, JSON, Newick text, networkx graphs and image folders."""

import csv
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hier_losses._order import repeated, shorten
from hier_losses._parse import Parts, _check_choice, parse_edges, parse_paths
from hier_losses._tables import PathLike, Table, close_holes, look_alikes, read_table
from hier_losses._tree import Tree


def drop_virtual_root(parts: Parts, root: str | None) -> Parts:
    """Remove the node that only joins the top nodes.

    "auto" removes a single top node that has no name or the name "root"; another text removes the single top node of
    that name; None removes nothing.
    """
    tops = [node for node, up in enumerate(parts.parents) if up < 0]
    if root is None or (root == "auto" and (len(tops) != 1 or parts.names[tops[0]].lower() not in ("", "root"))):
        return parts
    if len(tops) != 1 or (root != "auto" and parts.names[tops[0]] != root):
        raise ValueError(
            f"root must name the single top node, got {root!r}; top nodes: "
            f"{shorten(parts.names[node] for node in tops)}"
        )
    top = tops[0]
    if len(parts.names) == 1:
        raise ValueError(f"the tree is empty: it holds nothing but its root {parts.names[top]!r}")

    def drop(items: Sequence) -> list:
        return [item for node, item in enumerate(items) if node != top]

    parents = [-1 if up == top else up - (up > top) for up in drop(parts.parents)]
    return Parts(drop(parts.names), parents, None if parts.labels is None else drop(parts.labels))


def read_csv(
    path: PathLike,
    layout: str,
    order: str | None,
    columns: Sequence[str] | None,
    delimiter: str | None = None,
    encoding: str | None = None,
    header: bool | None = None,
    on_hole: str = "error",
) -> Parts:
    """Read edges, or one path per row, from a text table; warn about what was guessed."""
    table = read_table(path, delimiter, encoding, header)
    parts = table_parts(table, layout, order, columns, on_hole)
    for guess in [*table.guesses, *look_alikes(parts.names)]:
        warnings.warn(f"{table.name!r}: {guess}", stacklevel=3)
    return parts


def table_parts(table: Table, layout: str, order: str | None, columns: Sequence[str] | None, on_hole: str) -> Parts:
    """Turn a table into nodes."""
    _check_choice("layout", layout, ("auto", "paths", "edges"))
    header = table.header
    if columns is not None and header is None:
        raise ValueError(f"columns goes with a header, which {table.name!r} does not have, got {list(columns)}")
    missing = [name for name in columns or () if header is None or name not in header]
    if missing:
        raise ValueError(f"columns must be among {header}, got {missing}")
    width = len(header) if header is not None else len(table.rows[0][1])
    picked = list(range(width)) if columns is None or header is None else [header.index(name) for name in columns]
    used = [] if header is None else [header[i].lower() for i in picked]
    cells = [[row[i] for i in picked] for _, row in table.rows]
    if layout == "auto":
        layout = "edges" if sorted(used) == ["child", "parent"] else "paths"
    table.understood["layout"] = layout
    if layout == "edges":
        order = order or ("child_parent" if used[:1] == ["child"] else "parent_child")
        table.understood["order"] = order
        return parse_edges(cells, order)
    order = order or _direction(table, used, cells)
    table.understood["order"] = order
    names = None if header is None else [header[i] for i in picked]
    reverse = order == "fine_to_coarse"
    rows = [
        close_holes(row, names, on_hole, f"{table.name!r} line {line}", reverse)
        for row, (line, _) in zip(cells, table.rows, strict=True)
    ]
    return parse_paths(rows, order)


def _direction(table: Table, used: list[str], cells: list[list[str]]) -> str:
    """Which end of the rows holds the leaves: by the header, else by a first column that never repeats before one that does."""
    if used[:1] == ["leaf"] and used[-1] != "leaf":
        return "fine_to_coarse"
    first, last = ([row[end] for row in cells] for end in (0, -1))
    known = used[-1:] == ["leaf"] or (used and all(name.startswith("level") for name in used))
    if known or not all(first) or not all(last) or len(set(first)) < len(first) or len(set(last)) == len(last):
        return "coarse_to_fine"
    table.guesses.append("the first column, which never repeats a name, holds the leaves; order= tells otherwise")
    return "fine_to_coarse"


def write_csv(tree: Tree, path: PathLike, layout: str) -> None:
    """Write one row per leaf or one row per node."""
    _check_choice("layout", layout, ("paths", "edges"))
    if layout == "edges":
        header = ["parent", "child"]
        rows = [["" if up is None else up, down] for up, down in edge_list(tree, "name")]
    else:
        header = [f"level_{level + 1}" for level in range(tree.num_levels)]
        rows = [[*row, *[""] * (tree.num_levels - len(row))] for row in leaf_paths(tree)]
    # Readers commonly drop blanks after a comma; quotes keep those that belong to a name, and a lone carriage return.
    spaced = any(name != name.strip() or "\r" in name for name in tree.names)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL if spaced else csv.QUOTE_MINIMAL, lineterminator="\n")
        writer.writerows([header, *rows])


def leaf_paths(tree: Tree) -> list[tuple[str, ...]]:
    """Return the path of every leaf in depth-first order, which keeps the order of siblings when read back."""
    leaves = sorted(tree.leaf.tolist(), key=tree.leaf_start.tolist().__getitem__)
    names = tree.names
    return [tuple(names[i] for i in row if i >= 0) for row in tree.paths[leaves].tolist()]


def edge_list(tree: Tree, ends: str) -> list[tuple]:
    """Return (parent, child) for every node, with the parent None for top nodes."""
    _check_choice("ends", ends, ("name", "path"))
    if ends == "name":
        twice = repeated(tree.names)
        if twice:
            listed = shorten(dict.fromkeys(twice))
            raise ValueError(f"ends='name' needs unique names, repeated: {listed}; use ends='path'")
        keys: Sequence = tree.names
    else:
        keys = [tree.path_of(node) for node in range(tree.num_nodes)]
    return [(None if up < 0 else keys[up], keys[node]) for node, up in enumerate(tree.parent.tolist())]


def text_or_file(source: PathLike, opening: str) -> str:
    """Return the text of a file; a str is text if it begins like one or ends in a semicolon, a file name otherwise."""
    if isinstance(source, str) and (source.lstrip()[:1] in tuple(opening) or source.rstrip()[-1:] == ";"):
        return source
    if isinstance(source, str) and (not source.strip() or "\n" in source):
        return source  # no file name; the parser says what is wrong
    # Bytes, because text mode would turn a carriage return inside a quoted name into a newline.
    try:
        return Path(source).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} must be UTF-8 text: {error}") from error


def load_json(text: str, name: str = "the text") -> Any:
    """Return the content of JSON text; ValueError where it is none, or nested deeper than Python's reader goes."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError("the JSON is nested too deeply for Python's reader; a node list has no such limit") from None


def read_json(source: PathLike | Mapping | Sequence, root: str | None) -> Parts:
    """Read a node list, nested objects with children, or nested mappings, from a file or from parsed data."""
    data: Any = source
    if isinstance(source, str | os.PathLike):
        text = text_or_file(source, "{[")
        data = load_json(text, "the text" if text is source else str(source))
    if isinstance(data, Mapping) and isinstance(data.get("nodes"), Sequence) and not isinstance(data["nodes"], str):
        data = data["nodes"]
    if isinstance(data, Sequence) and data and all(isinstance(n, Mapping) and "parent" in n for n in data):
        return drop_virtual_root(_node_list(data), root)
    return drop_virtual_root(_nested(data), root)


def _node_list(nodes: Sequence[Mapping]) -> Parts:
    position: dict = {}
    for number, node in enumerate(nodes):
        key = node.get("id", node.get("name"))
        if key is None:
            raise ValueError(f"node {number} has neither 'id' nor 'name'")
        if key in position:
            raise ValueError(f"nodes must have different ids, got {key!r} twice")
        position[key] = number
    parents = []
    for node in nodes:
        up = node["parent"]
        if up is not None and up not in position:
            raise ValueError(f"node {node.get('name', node.get('id'))!r} has the unknown parent {up!r}")
        parents.append(-1 if up is None else position[up])
    _check_children(nodes, position, parents)
    names = [str(node.get("name", node.get("id"))) for node in nodes]
    labels = [node.get("label") for node in nodes]
    known = [label is not None for label, up in zip(labels, parents, strict=True) if up >= 0]
    if not known or not all(known):
        return Parts(names, parents)
    for number, label in enumerate(labels):
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise ValueError(f"label of node {names[number]!r} must be an integer, got {label!r}")
    return Parts(names, parents, [-1 if label is None else label for label in labels])


def _check_children(nodes: Sequence[Mapping], position: Mapping, parents: list[int]) -> None:
    for number, node in enumerate(nodes):
        for child in node.get("children") or ():
            if child not in position or parents[position[child]] != number:
                raise ValueError(
                    f"node {node.get('name', node.get('id'))!r} lists the child {child!r}, whose parent differs"
                )


def _nested(data: Any) -> Parts:
    parts = Parts([], [])
    # A stack instead of recursion: chains may be deep. Reversed, so that nodes keep their order.
    stack: list[tuple[Any, int]] = [(data, -1)]
    while stack:
        item, up = stack.pop()
        if isinstance(item, Mapping) and isinstance(item.get("name"), str):
            parts.names.append(item["name"])
            parts.parents.append(up)
            stack.append((item.get("children") or [], len(parts.names) - 1))
        elif isinstance(item, Mapping):
            for name, below in item.items():
                parts.names.append(str(name))
                parts.parents.append(up)
                stack.append((below, len(parts.names) - 1))
        elif isinstance(item, str):
            parts.names.append(item)
            parts.parents.append(up)
        elif isinstance(item, Sequence):
            stack += [(entry, up) for entry in reversed(item)]
        elif item is not None:
            raise ValueError(f"a taxonomy is made of objects, lists and names, got {item!r}")
    return parts


def node_list(tree: Tree, path: PathLike | None = None) -> dict[str, Any]:
    """Return a node list with the virtual root as node 0; labels are kept where they differ from the order."""
    children: list[list[int]] = [[] for _ in range(tree.num_nodes + 1)]
    for node, up in enumerate(tree.parent.tolist()):
        children[up + 1].append(node + 1)
    nodes: list[dict[str, Any]] = [{"id": 0, "name": "root", "parent": None, "children": children[0]}]
    labels = tree.label.tolist()
    for node, up in enumerate(tree.parent.tolist()):
        entry = {"id": node + 1, "name": tree.names[node], "parent": up + 1, "children": children[node + 1]}
        nodes.append(entry if tree.natural_labels else {**entry, "label": labels[node]})
    data = {"nodes": nodes, "leaves": [node + 1 for node in tree.leaf.tolist()]}
    if path is not None:
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")
    return data


# Quoted label, comment, structure, or plain label: the tokens of the Newick format.
_NEWICK = re.compile(r"'(?:[^']|'')*'|\[[^\]]*\]|[(),:;]|[^\s'()\[\],:;]+|\s+")
_PLAIN = re.compile(r"[^\s'()\[\],:;]+")


def read_newick(source: PathLike, root: str | None) -> Parts:
    """Parse Newick text; branch lengths and comments are skipped, underscores stay."""
    text = text_or_file(source, "(")
    parts = Parts([""], [-1])
    node, at = 0, 0
    fresh, labelled, skip_length, ended = True, False, False, False
    while at < len(text):
        match = _NEWICK.match(text, at)
        if match is None:
            raise ValueError(f"Newick text has an unclosed quote or comment at position {at}")
        token, at = match.group(), match.end()
        if token.isspace() or token.startswith("["):
            continue
        if ended:
            raise ValueError(f"Newick text goes on after the semicolon at position {match.start()}: one tree is read")
        if token in "(,":
            if token == "," and parts.parents[node] < 0:
                raise ValueError(f"Newick text has a comma outside parentheses at position {match.start()}")
            if token == "(" and not fresh:
                raise ValueError(f"Newick text needs a comma before the parenthesis at position {match.start()}")
            parts.parents.append(node if token == "(" else parts.parents[node])
            parts.names.append("")
            node = len(parts.names) - 1
            fresh, labelled, skip_length = True, False, False
        elif token == ")":
            node = parts.parents[node]
            if node < 0:
                raise ValueError(f"Newick text closes more than it opens at position {match.start()}")
            fresh = labelled = skip_length = False
        elif token == ":":
            skip_length = True
        elif token == ";":
            ended = True
        elif skip_length:
            skip_length = False
        elif labelled:
            raise ValueError(f"Newick text has two labels in a row at position {match.start()}; quote blanks")
        else:
            parts.names[node] = token[1:-1].replace("''", "'") if token[0] == "'" else token
            fresh, labelled = False, True
    if not ended or node != 0:
        raise ValueError("Newick text must close all parentheses and end with a semicolon")
    parts = drop_virtual_root(parts, root)
    inner = set(parts.parents)
    for number, name in enumerate(parts.names):
        if not name:
            if number not in inner:
                raise ValueError("Newick text has a leaf without a label")
            parts.names[number] = f"unnamed_{number}"
    return parts


def write_newick(tree: Tree) -> str:
    """Return the tree as Newick text with an unlabelled outer node for the virtual root."""
    text: list[str] = ["("] if tree.group_size[0] else []
    children: list[list[int]] = [[] for _ in range(tree.num_nodes + 1)]
    for node in range(tree.num_nodes - 1, -1, -1):
        children[int(tree.parent[node]) + 1].append(node)
    stack: list[int | str] = [");"]
    _push(stack, children[0])
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            text.append(item)
            continue
        name = tree.names[item]
        label = name if _PLAIN.fullmatch(name) else "'" + name.replace("'", "''") + "'"
        if children[item + 1]:
            text.append("(")
            stack.append(")" + label)
            _push(stack, children[item + 1])
        else:
            text.append(label)
    return "".join(text)


def _push(stack: list[int | str], last_first: list[int]) -> None:
    for number, node in enumerate(last_first):
        if number:
            stack.append(",")
        stack.append(node)


def read_networkx(graph: Any, root: str | None) -> Parts:
    """Read a directed networkx graph; the node attribute `name` is the name if there is one."""
    if not graph.is_directed():
        raise ValueError("graph must be directed, from parent to child")
    position = {node: number for number, node in enumerate(graph.nodes)}
    names = [str(data.get("name", node)) for node, data in graph.nodes(data=True)]
    parents = [-1] * len(names)
    for up, down in graph.edges:
        if parents[position[down]] >= 0:
            first = names[parents[position[down]]]
            raise ValueError(f"node {names[position[down]]!r} has two parents, {first!r} and {names[position[up]]!r}")
        parents[position[down]] = position[up]
    return drop_virtual_root(Parts(names, parents), root)


def write_networkx(tree: Tree) -> Any:
    """Return a DiGraph over node ids with the attribute `name`."""
    import networkx  # type: ignore[import-untyped]  # optional, and slow to import

    graph = networkx.DiGraph()
    graph.add_nodes_from((node, {"name": name}) for node, name in enumerate(tree.names))
    graph.add_edges_from(zip(tree.edge_parent.tolist(), tree.edge_child.tolist(), strict=True))
    return graph


def read_imagefolder(root: PathLike, sep: str | None, skip: int) -> Parts:
    """Read nested folders, or flat folders whose names hold the whole path."""
    if not os.path.isdir(root):
        raise ValueError(f"root must be a folder, got {os.fspath(root)!r}")
    if skip < 0:
        raise ValueError(f"skip must be at least 0, got {skip}")
    if sep is not None:
        return parse_paths([split_folder_name(name, sep, skip) for name in _folders(root)])
    if skip:
        raise ValueError(f"skip goes with sep, got skip={skip} for nested folders")
    parts = Parts([], [])
    stack: list[tuple[str, int, tuple[str, ...]]] = [(str(root), -1, (os.path.realpath(str(root)),))]
    while stack:
        folder, up, above = stack.pop()
        for name in _folders(folder):
            below = os.path.join(folder, name)
            real = os.path.realpath(below)
            if real in above:
                raise ValueError(f"folder {below!r} links back to a folder above it")
            parts.names.append(name)
            parts.parents.append(up)
            stack.append((below, len(parts.names) - 1, (*above, real)))
    if not parts.names:
        raise ValueError(f"root {os.fspath(root)!r} holds no folder")
    return parts


def split_folder_name(name: str, sep: str, skip: int) -> list[str]:
    """Split a folder name into a path, leaving out the first pieces."""
    pieces = name.split(sep)[skip:]
    if not pieces or not all(pieces):
        raise ValueError(f"folder {name!r} has an empty piece or none left after splitting at {sep!r}, skip={skip}")
    return pieces


def _folders(root: PathLike) -> list[str]:
    with os.scandir(str(root)) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
