"""Matches the names of folders and tables to the nodes of a taxonomy: exactly, else by a normal form, and says so."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from hier_losses import Taxonomy

Label = tuple[str, ...]


class Matches(NamedTuple):
    """What `match_labels` found: the node of each label, what deserves a look, and what matches nothing."""

    nodes: dict[Label, int]
    notes: list[str]
    problems: list[str]


def normal_form(name: str) -> str:
    """The name in NFC without case; `_`, `-` and runs of blanks are one blank.

    >>> normal_form("Golden_Delicious ") == normal_form("golden-delicious")
    True
    """
    return " ".join(re.sub(r"[_\-\s]+", " ", unicodedata.normalize("NFC", name)).casefold().split())


def look_alikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of different names with one normal form."""
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        groups.setdefault(normal_form(name), {})[name] = None
    return [tuple(group) for group in groups.values() if len(group) > 1]


def match_labels(examples: Mapping[Label, str], tree: Taxonomy, where: str) -> Matches:
    """Find the node of each label: the full path of a leaf, the name of a leaf, those of an inner node; last, normal forms.

    Args:
        examples: A picture of each label, for messages.
        tree: The taxonomy.
        where: The folder or the listing, for messages.
    """
    leaf, inner = _Index(tree, True), _Index(tree, False)
    found = Matches({}, [], [])
    alike, partial = [], []
    for label, example in examples.items():
        spelled = "/".join(label)
        nodes, exact = _first(leaf.exact(label), inner.exact(label)), True
        if not nodes:
            nodes, exact = _first(leaf.near(label), inner.near(label)), False
        if len(nodes) > 1:
            listed = " and ".join("/".join(tree.path_of(node)) for node in nodes[:3])
            found.problems.append(f"the class {label[-1]!r} stands for several leaves ({listed}): use a full path")
        elif not nodes:
            close = get_close_matches(label[-1], leaf.names, n=1, cutoff=0.6)
            some = ", ".join(list(leaf.names)[:3])
            hint = f"did you mean {close[0]!r}?" if close else f"its leaves are for example {some}"
            found.problems.append(
                f"the class {spelled!r} (of {example} in {where}) is no leaf of the taxonomy: add it there or rename it; "
                f"{hint}"
            )
        else:
            found.nodes[label] = nodes[0]
            if not exact:
                alike.append(f"{label[-1]!r} is {tree.names[nodes[0]]!r}")
            if tree.leaf_index[nodes[0]] < 0:
                partial.append(spelled)
    if alike:
        found.notes.append(f"names matched but for case, accents, _, - and blanks: {', '.join(alike)}")
    if partial:
        found.notes.append(f"pictures known only to an inner class (partial labels): {', '.join(partial)}")
    return found


def _first(*groups: list[int]) -> list[int]:
    return next((group for group in groups if group), [])


class _Index:
    """The leaves, or the inner nodes, of a tree by path and by name."""

    def __init__(self, tree: Taxonomy, leaves: bool) -> None:
        self.paths: dict[Label, list[int]] = {}
        self.names: dict[str, list[int]] = {}
        self.normal: dict[str, list[int]] = {}
        for node, index in enumerate(tree.leaf_index.tolist()):
            if (index >= 0) == leaves:
                self.paths[tree.path_of(node)] = [node]
                self.names.setdefault(tree.names[node], []).append(node)
                self.normal.setdefault(normal_form(tree.names[node]), []).append(node)

    def exact(self, label: Label) -> list[int]:
        # The whole path first; else the folder that holds the picture, whatever lies above it.
        return _first(self.paths.get(label, []), self.names.get(label[-1], []), self.names.get("/".join(label), []))

    def near(self, label: Label) -> list[int]:
        return self.normal.get(normal_form(label[-1]), [])
