"""Suggests a tree for class names from the WordNet files on this machine (Princeton WordNet 3.x: Miller, 1995).

Of the senses of a name the one counts that keeps the closest company with the other classes: among animals a tiger is a cat, not
a fierce person. Its hypernyms, the first of each, are its ancestors; those that tell no two classes apart go. A person must read
the result.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from app_data.store.errors import DataError

PREFIX = "wordnet:"
INDEX, DATA = "index.noun", "data.noun"
Chain = list[tuple[int, str]]  # synsets from the top down, each by offset and first word
_UP = ("@", "@i")  # hypernym, instance hypernym


@dataclass
class Suggestion:
    """A tree to be read by a person before it is used.

    Attributes:
        paths: From the top to each class; the last name is the class as it was given.
        unknown: Names that WordNet does not hold.
        senses: What each name was taken for, and how many other senses it has.
    """

    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    senses: dict[str, tuple[str, int]] = field(default_factory=dict)

    def lines(self) -> str:
        """The tree as lines `A > B > C`, which `--taxonomy` reads; unknown names stand at the top."""
        rows = [*self.paths.values(), *((name,) for name in self.unknown)]
        return "".join(" > ".join(path) + "\n" for path in sorted(rows))


def find_wordnet(folder: str = "") -> Path:
    """The folder with `index.noun` and `data.noun`: the one given, else the usual places.

    Raises:
        DataError: They are in none.
    """
    home, places = Path.home(), [Path(folder)] if folder else []
    if not folder:
        told = [os.environ.get(name) for name in ("WNSEARCHDIR", "WNHOME", "NLTK_DATA")]
        for base in [*(Path(path) for path in told if path), home / "nltk_data", Path("/usr/share/nltk_data")]:
            places += [base, base / "dict", base / "corpora" / "wordnet", base / "corpora" / "wordnet31"]
        places += [Path("/usr/share/wordnet"), Path("/usr/local/WordNet-3.0/dict"), Path("/usr/share/wordnet-3.0/dict")]
    for place in places:
        if (place / INDEX).is_file() and (place / DATA).is_file():
            return place
    where = folder or "the usual places"
    raise DataError(
        f"WordNet's files {INDEX} and {DATA} are not in {where}: install them (Debian: wordnet-base; or WNdb from Princeton) and "
        f"name their folder, --taxonomy {PREFIX}FOLDER"
    )


def suggest_tree(names: Iterable[str], folder: Path) -> Suggestion:
    """A tree over class names.

    Args:
        names: The classes; `_`, `-` and blanks are alike. Of a word that is not known the singular counts, then its last part.
        folder: See `find_wordnet`.

    Raises:
        DataError: The files are damaged, or none of the names is in them.
    """
    names = sorted(set(names))
    found = Suggestion()
    senses: dict[str, list[tuple[Chain, str]]] = {}
    try:
        offsets = _senses(folder / INDEX, {word for name in names for word in _spellings(name)})
        with open(folder / DATA, "rb") as data:
            for name in names:
                known = next((offsets[word] for word in _spellings(name) if word in offsets), None)
                if known is None:
                    found.unknown.append(name)
                else:
                    senses[name] = [_chain(data, offset) for offset in known]
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"the WordNet files in {folder} cannot be read: {error}") from error
    if not senses:
        raise DataError(f"WordNet holds none of the {len(names)} classes, such as {', '.join(names[:3])}")
    company = Counter(
        offset for each in senses.values() for offset in {offset for chain, _ in each for offset, _ in chain}
    )
    chains = {}
    for name, each in senses.items():
        # The first of the best: senses stand in the order of their frequency.
        depths = [
            max((at for at, (offset, _) in enumerate(chain) if company[offset] > 1), default=-1) for chain, _ in each
        ]
        chosen = depths.index(max(depths))
        chains[name], gloss = each[chosen]
        found.senses[name] = (gloss, len(each) - 1)
    found.paths = _short(chains)
    return found


def _spellings(name: str) -> list[str]:
    word = re.sub(r"[\s_\-]+", "_", name.strip().lower())
    # Trees often spell compounds as one word, and folders hold plurals.
    singular = [word[:-3] + "y"] if word.endswith("ies") else [word[:-1], word[:-2]] if word.endswith("s") else []
    # Last, what a compound is a kind of: an aquarium fish is a fish.
    return [word, word.replace("_", "-"), word.replace("_", ""), *singular, word.rpartition("_")[2]]


def _senses(index: Path, words: set[str]) -> dict[str, list[int]]:
    """Offsets of all senses of each word that is there, the most frequent first."""
    found = {}
    with open(index, encoding="latin-1") as lines:
        for line in lines:
            word, _, rest = line.partition(" ")
            if word in words:
                fields = rest.split()
                found[word] = [int(offset) for offset in fields[5 + int(fields[2]) :]]
    return found


def _chain(data: BinaryIO, offset: int) -> tuple[Chain, str]:
    """Synsets from the top down to one, each by offset and first word, and the gloss of the last."""
    chain: Chain = []
    text = ""
    seen: set[int] = set()
    while offset not in seen:
        seen.add(offset)
        data.seek(offset)
        line, _, gloss = data.readline().decode("latin-1").partition("|")
        fields = line.split()
        if not fields or int(fields[0]) != offset:
            raise ValueError(f"no synset at {offset}")
        text = text or gloss.strip()
        words = int(fields[3], 16)
        chain.append((offset, fields[4].replace("_", " ")))
        at = 4 + 2 * words
        pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
        up = next((int(target) for symbol, target, kind, _ in pointers if symbol in _UP and kind == "n"), None)
        if up is None:
            break
        offset = up
    return chain[::-1], text


def _short(chains: Mapping[str, Chain]) -> dict[str, tuple[str, ...]]:
    """Paths without ancestors that tell no two classes apart, and without the common top."""
    below: dict[int, int] = Counter(offset for chain in chains.values() for offset, _ in chain)
    paths, whole = {}, len(chains)
    for name, chain in chains.items():
        sizes = [below[offset] for offset, _ in chain]
        # Of groups with the same classes the lowest has the telling name. A class with others below it heads a group of them all.
        kept = [
            word
            for (_, word), size, inner in zip(chain, sizes, [*sizes[1:], 1], strict=True)
            if 1 < size < whole and inner != size
        ]
        paths[name] = (*kept, name)
    return _apart(paths)


def _apart(paths: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Groups whose name is that of a class below them get a mark."""
    classes = {name.lower() for name in paths}
    return {
        name: (*(f"{word} (group)" if word.lower() in classes else word for word in path[:-1]), path[-1])
        for name, path in paths.items()
    }
