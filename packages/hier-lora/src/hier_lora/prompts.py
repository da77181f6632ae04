"""One prompt for every node of a taxonomy, on every level.

Prompt templates: Radford et al., 2021, section 3.1.4 (prompt engineering and ensembling).
"""

from collections.abc import Sequence

from hier_losses import Taxonomy

STYLES = ("name", "parent", "path")


class PromptSet:
    """Sentences for all N nodes, in node order, each template filled with the node's words.

    Args:
        tax: the taxonomy.
        templates: sentences with one `{}` each; the embeddings of a node's sentences are averaged.
        style: what fills the braces: "name" the node's own name; "parent" `name, a kind of parent`; "path" the whole path
            from the leaf up. With "name" and "parent", nodes whose words would be equal fall back to "path".
        names: words for the N nodes in place of the taxonomy's own names.

    Raises:
        ValueError: if a template has no `{}` or more than one, or the style is unknown.
    """

    def __init__(
        self,
        tax: Taxonomy,
        templates: Sequence[str] = ("a picture of {}.",),
        style: str = "name",
        names: Sequence[str] | None = None,
    ) -> None:
        if style not in STYLES:
            raise ValueError(f"style must be one of {STYLES}, got {style!r}")
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates must hold exactly one '{{}}' each, got {template!r}")
        if not templates:
            raise ValueError("templates must name at least one sentence, got none")
        self.templates = tuple(templates)
        self.style = style
        self.words = _words(tax, style, names)

    @classmethod
    def from_words(cls, saved: dict) -> "PromptSet":
        """Rebuild a prompt set from its saved templates, style and words."""
        found = cls.__new__(cls)
        found.templates, found.style, found.words = tuple(saved["templates"]), saved["style"], list(saved["words"])
        return found

    def sentences(self) -> list[list[str]]:
        """The sentences of every node: N lists of T sentences each."""
        return [[template.format(word) for template in self.templates] for word in self.words]

    def __len__(self) -> int:
        return len(self.words)


def _words(tax: Taxonomy, style: str, names: Sequence[str] | None) -> list[str]:
    names = list(tax.names if names is None else names)
    if len(names) != tax.num_nodes:
        raise ValueError(f"names must hold one name for each of the {tax.num_nodes} nodes, got {len(names)}")
    names = [" ".join(name.replace("_", " ").split()) for name in names]
    parents = tax.parent.tolist()

    def path(node: int) -> str:
        words = []
        while node >= 0:
            words.append(names[node])
            node = parents[node]
        return ", ".join(words)

    if style == "path":
        return [path(v) for v in range(tax.num_nodes)]
    words = names
    if style == "parent":
        words = [n if p < 0 else f"{n}, a kind of {names[p]}" for n, p in zip(names, parents, strict=True)]
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return [word if counts[word] == 1 else path(v) for v, word in enumerate(words)]
