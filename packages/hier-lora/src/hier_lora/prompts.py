"""One prompt for every node of a taxonomy, on every level.

Prompt templates: Radford et al., 2021, section 3.1.4 (prompt engineering and ensembling).
"""

from collections.abc import Mapping, Sequence
from typing import cast

from hier_losses import LabelGraph, Taxonomy, TaxonomyUpdate

STYLES = ("name", "parent", "path")


class PromptSet:
    """Sentences for all N nodes, in node order, each template filled with the node's words.

    Args:
        tax: the taxonomy, or a label graph (style "name" only, since a label may have several parents).
        templates: sentences with one `{}` each; the embeddings of a node's sentences are averaged.
        style: what fills the braces: "name" the node's own name; "parent" `name, a kind of parent`; "path" the whole path
            from the leaf up. With "name" and "parent", nodes whose words would be equal fall back to "path".
        names: words for the N nodes in place of the taxonomy's own names.

    Raises:
        ValueError: if a template has no `{}` or more than one, or the style is unknown.

    >>> PromptSet(Taxonomy.from_paths([("bird", "crane")]), ("a {}",)).sentences()
    [['a bird'], ['a crane']]
    """

    def __init__(
        self,
        tax: Taxonomy | LabelGraph,
        templates: Sequence[str] = ("a picture of {}.",),
        style: str = "name",
        names: Sequence[str] | None = None,
    ) -> None:
        if style not in STYLES:
            raise ValueError(f"style must be one of {STYLES}, got {style!r}")
        if style != "name" and isinstance(tax, LabelGraph):
            raise ValueError(f"style must be 'name' for a label graph, got {style!r}")
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates must hold exactly one '{{}}' each, got {template!r}")
        if not templates:
            raise ValueError("templates must name at least one sentence, got none")
        self.templates = tuple(templates)
        self.style = style
        self.names = _clean(tax, names)
        self.words = _words(tax, style, self.names)

    @classmethod
    def from_words(cls, saved: Mapping) -> "PromptSet":
        """Rebuild a prompt set from its saved templates, style, words and names."""
        found = cls.__new__(cls)
        found.templates, found.style, found.words = tuple(saved["templates"]), saved["style"], list(saved["words"])
        found.names = list(saved.get("names") or saved["words"])
        return found

    def to_words(self) -> dict:
        """What `from_words` rebuilds the set from, ready for JSON."""
        return {"templates": list(self.templates), "style": self.style, "words": self.words, "names": self.names}

    def sentences(self, nodes: Sequence[int] | None = None) -> list[list[str]]:
        """The sentences of some nodes, or of all: T sentences each."""
        words = self.words if nodes is None else [self.words[v] for v in nodes]
        return [[template.format(word) for template in self.templates] for word in words]

    def update(
        self, old: Taxonomy | LabelGraph, update: TaxonomyUpdate, names: Mapping | None = None
    ) -> tuple["PromptSet", list[bool]]:
        """The prompts of a changed taxonomy; nodes that stay keep their words wherever these are still true.

        A kept node changes its words only if they spell a path (by style, or because its name was not unique) and that
        path changed. A new node whose name is taken gets its path; the old holder of the name keeps its words.

        Args:
            old: the taxonomy of this set.
            update: see `hier_losses.TaxonomyUpdate`.
            names: words for some of the new nodes, by name or by full path; the taxonomy's own names for the rest.

        Returns:
            The prompts, and for each node of the new taxonomy whether its sentences are those it had before.

        Raises:
            ValueError: if `names` names a node that the new taxonomy lacks.
        """
        new, come_from = update.taxonomy, update.new_to_old.tolist()
        given = {new.index(key): _spaced(str(text)) for key, text in (names or {}).items()}
        plain = _clean(new, None)
        found = type(self).__new__(type(self))
        found.templates, found.style = self.templates, self.style
        found.names = [given.get(v, self.names[u] if u >= 0 else plain[v]) for v, u in enumerate(come_from)]
        found.words = _words(new, self.style, found.names)
        for v, u in enumerate(come_from):
            if u < 0 or found.names[v] != self.names[u]:
                continue
            by_name = self.style == "name" and self.words[u] == self.names[u]
            if by_name or _chain(new, found.names, v) == _chain(old, self.names, u):
                found.words[v] = self.words[u]
        same = [u >= 0 and found.words[v] == self.words[u] for v, u in enumerate(come_from)]
        return found, same

    def __len__(self) -> int:
        return len(self.words)


def _clean(tax: Taxonomy | LabelGraph, names: Sequence[str] | None) -> list[str]:
    names = list(tax.names if names is None else names)
    if len(names) != tax.num_nodes:
        raise ValueError(f"names must hold one name for each of the {tax.num_nodes} nodes, got {len(names)}")
    return [_spaced(name) for name in names]


def _spaced(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _chain(tax: Taxonomy | LabelGraph, names: Sequence[str], node: int) -> list[str]:
    if isinstance(tax, LabelGraph):
        return [names[node]]
    return [names[v] for v in tax.paths[node].tolist() if v >= 0][::-1]


def _words(tax: Taxonomy | LabelGraph, style: str, names: list[str]) -> list[str]:
    if style == "path":
        return [", ".join(_chain(tax, names, v)) for v in range(tax.num_nodes)]
    words = list(names)
    if style == "parent":
        parents = cast(Taxonomy, tax).parent.tolist()
        words = [n if p < 0 else f"{n}, a kind of {names[p]}" for n, p in zip(names, parents, strict=True)]
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return [word if counts[word] == 1 else ", ".join(_chain(tax, names, v)) for v, word in enumerate(words)]
