"""ImageNet classes under the hypernyms of WordNet 3.0 (Fellbaum, 1998; Deng et al., 2009, CVPR).

Nouns may have several hypernyms. A tree needs one: each synset keeps the hypernym that is nearest to the root
(shortest hypernym path), ties go to the smaller synset number, so the result depends on the database files only.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hier_losses.builders._base import DatasetTree
from hier_losses.taxonomy import Taxonomy


class Synset(NamedTuple):
    """A noun synset: its words, and the offsets of its hypernyms and instance hypernyms."""

    words: tuple[str, ...]
    hypernyms: tuple[int, ...]


def read_synsets(folder: str | os.PathLike) -> dict[int, Synset]:
    """Parse `data.noun` (format: wndb(5WN)).

    Args:
        folder: the `dict` folder of WordNet.

    Returns:
        Synsets by offset.

    Raises:
        ValueError: a line that is not in the format.
    """
    synsets = {}
    with open(Path(folder) / "data.noun", encoding="utf-8") as file:
        for line in file:
            if line.startswith("  "):  # the licence, in front
                continue
            fields = line.split("|", 1)[0].split()
            try:
                num_words = int(fields[3], 16)
                at = 4 + 2 * num_words
                num_pointers = int(fields[at])
                pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(num_pointers)]
                up = tuple(int(p[1]) for p in pointers if p[0] in ("@", "@i") and p[2] == "n")
                synsets[int(fields[0])] = Synset(tuple(fields[4:at:2]), up)
            except (IndexError, ValueError) as error:
                raise ValueError(f"data.noun has a line that is no synset: {line[:60]!r}") from error
    return synsets


def find_offsets(folder: str | os.PathLike, words: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Look words up in `index.noun`.

    Args:
        folder: the `dict` folder of WordNet.
        words: nouns, in any case, with blanks or underscores.

    Returns:
        For each word that is there, the offsets of its senses, the most frequent first.
    """
    wanted = {word.lower().replace(" ", "_"): word for word in words}
    found = {}
    with open(Path(folder) / "index.noun", encoding="utf-8") as file:
        for line in file:
            lemma = line.split(" ", 1)[0]
            if lemma in wanted:
                fields = line.split()
                found[wanted[lemma]] = tuple(map(int, fields[-int(fields[2]) :]))
    return found


def imagenet(wnids: Sequence[str], wordnet: str | os.PathLike, collapse: bool = True) -> DatasetTree:
    """Build the tree above a list of synsets.

    Args:
        wnids: synset ids of the classes, such as `n02084071` (dog), in class order.
        wordnet: the `dict` folder of WordNet 3.0, with `data.noun`; ids are offsets in exactly this version.
        collapse: leave out nodes that are no class and have a single child.

    Returns:
        The tree; a node is called after its first word, with the synset id in brackets where words repeat. A single
        root that is no class is left out. A class above another class is an internal node.

    Raises:
        ValueError: no class, a repeated or malformed id, an id that WordNet does not hold, a hypernym cycle.
    """
    offsets = []
    for wnid in wnids:
        if len(wnid) != 9 or wnid[0] != "n" or not wnid[1:].isdigit():
            raise ValueError(f"wnids must look like 'n02084071', got {wnid!r}")
        offsets.append(int(wnid[1:]))
    if not offsets or len(set(offsets)) < len(offsets):
        raise ValueError(
            f"wnids must be unique and not empty, got {len(offsets)}, {len(set(offsets))} of them different"
        )
    synsets = read_synsets(wordnet)
    unknown = [wnid for wnid, offset in zip(wnids, offsets, strict=True) if offset not in synsets]
    if unknown:
        raise ValueError(f"{len(unknown)} wnids are not in data.noun, such as {unknown[:3]}; is it WordNet 3.0?")
    parent = _parents(synsets, offsets)
    if collapse:
        parent = _collapse(parent, set(offsets))
    roots = [node for node, up in parent.items() if up is None]
    if len(roots) == 1 and roots[0] not in set(offsets):
        parent = {node: None if up == roots[0] else up for node, up in parent.items() if node != roots[0]}
    order = sorted(parent)
    place = {node: number for number, node in enumerate(order)}
    words = [synsets[node].words[0].replace("_", " ") for node in order]
    count: dict[str, int] = {}
    for word in words:
        count[word] = count.get(word, 0) + 1
    names = [word if count[word] == 1 else f"{word} (n{node:08d})" for word, node in zip(words, order, strict=True)]
    tax = Taxonomy(names, [-1 if (up := parent[node]) is None else place[up] for node in order])
    return DatasetTree(tax, tax.indices(names[place[offset]] for offset in offsets), tuple(wnids))


def _parents(synsets: dict[int, Synset], offsets: list[int]) -> dict[int, int | None]:
    above: set[int] = set()
    waiting = list(offsets)
    while waiting:
        node = waiting.pop()
        if node in above:
            continue
        if node not in synsets:
            raise ValueError(f"data.noun lacks the hypernym {node:08d}")
        above.add(node)
        waiting += synsets[node].hypernyms
    below: dict[int, list[int]] = {node: [] for node in above}
    for node in above:
        for up in synsets[node].hypernyms:
            below[up].append(node)
    # Breadth first from the roots gives the shortest distances; within a round smaller parents claim first.
    parent: dict[int, int | None] = {node: None for node in sorted(above) if not synsets[node].hypernyms}
    level = list(parent)
    while level:
        found: dict[int, int | None] = {}
        for node in level:
            for child in below[node]:
                if child not in parent:
                    found.setdefault(child, node)
        parent |= found
        level = sorted(found)
    if len(parent) < len(above):
        lost = sorted(above - set(parent))
        raise ValueError(f"hypernyms form a cycle through {synsets[lost[0]].words[0]!r} ({lost[0]:08d})")
    return _restrict(parent, offsets)


def _restrict(parent: dict[int, int | None], offsets: list[int]) -> dict[int, int | None]:
    kept: dict[int, int | None] = {}
    for node in offsets:
        step: int | None = node
        while step is not None and step not in kept:
            kept[step] = parent[step]
            step = parent[step]
    return kept


def _collapse(parent: dict[int, int | None], classes: set[int]) -> dict[int, int | None]:
    children = dict.fromkeys(parent, 0)
    for up in parent.values():
        if up is not None:
            children[up] += 1
    dropped = {node for node, count in children.items() if count == 1 and node not in classes}

    def kept_above(node: int) -> int | None:
        up = parent[node]
        while up in dropped:
            up = parent[up]
        return up

    return {node: kept_above(node) for node in parent if node not in dropped}
