"""A tree from WordNet files of the test's own, in Princeton's format."""

import pytest

from app_data.read.tables import read_taxonomy
from app_data.read.wordnet import find_wordnet, suggest_tree
from app_data.store.errors import DataError

# word, hypernym, gloss; "tiger.person" is the more frequent sense of the word tiger.
SYNSETS = [
    ("entity", None, "all there is"),
    ("person", "entity", "somebody"),
    ("animal", "entity", "it moves"),
    ("carnivore", "animal", "it eats meat"),
    ("feline", "carnivore", "cats"),
    ("adult", "person", "grown"),
    ("fighter", "adult", "in the ring"),
    ("warrior", "fighter", "in the field"),
    ("tiger.person", "warrior", "a fierce person"),
    ("tiger", "feline", "striped"),
    ("lion", "feline", "king"),
    ("dog", "carnivore", "it barks"),
    ("husky", "dog", "it pulls sleds"),
    ("Golden_Eagle", "animal", "a bird"),
    ("berry", "entity", "a fruit"),
]


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "dict"
    folder.mkdir()
    header = b"  1 a line of the licence\n"
    offsets: dict[str, int] = {}
    for _ in range(2):  # the first round finds the offsets, whose digits are of one width
        text = header
        for word, up, gloss in SYNSETS:
            offsets[word] = len(text)
            pointers = "000" if up is None else f"001 @ {offsets[up]:08d} n 0000"
            text += f"{offsets[word]:08d} 03 n 01 {word.partition('.')[0]} 0 {pointers} | {gloss}\n".encode()
    (folder / "data.noun").write_bytes(text)
    senses: dict[str, list[int]] = {}
    for word, _, _ in SYNSETS:
        senses.setdefault(word.partition(".")[0].lower(), []).append(offsets[word])
    lines = [
        f"{word} n {len(each)} 1 @ {len(each)} 0 {' '.join(f'{offset:08d}' for offset in each)}  \n"
        for word, each in sorted(senses.items())
    ]
    (folder / "index.noun").write_bytes(header + "".join(lines).encode())
    return folder


def test_the_tree(wordnet, tmp_path):
    names = ["Tiger", "lion", "dog", "husky", "golden-eagle", "Berries", "xyzzy", "sea lion"]
    found = suggest_tree(names, wordnet)
    assert found.unknown == ["xyzzy"]
    assert found.paths == {
        "Tiger": ("animal", "carnivore", "feline", "Tiger"),
        "lion": ("animal", "carnivore", "feline", "lion (group)", "lion"),
        "sea lion": ("animal", "carnivore", "feline", "lion (group)", "sea lion"),
        "dog": ("animal", "carnivore", "dog (group)", "dog"),
        "husky": ("animal", "carnivore", "dog (group)", "husky"),
        "golden-eagle": ("animal", "golden-eagle"),
        "Berries": ("Berries",),
    }
    # Among animals a tiger is a cat, although the person is the more frequent sense.
    assert found.senses["Tiger"] == ("striped", 1)
    (tmp_path / "tree.txt").write_text(found.lines())
    tree = read_taxonomy(tmp_path / "tree.txt").taxonomy
    assert sorted(tree.names[node] for node in tree.leaf.tolist()) == sorted(names)


def test_where_the_files_are(wordnet, monkeypatch, tmp_path):
    monkeypatch.setenv("WNHOME", str(wordnet.parent))
    assert find_wordnet() == wordnet
    with pytest.raises(DataError, match=r"index\.noun.*nowhere.*wordnet-base"):
        find_wordnet(str(tmp_path / "nowhere"))


def test_it_is_never_applied_unseen(wordnet):
    with pytest.raises(DataError, match=r"read first: hier check DIR --taxonomy wordnet:"):
        read_taxonomy("wordnet:")


def test_bad_files_and_names(wordnet):
    with pytest.raises(DataError, match=r"none of the 2 classes, such as foo, qux"):
        suggest_tree(["qux", "foo"], wordnet)
    data = wordnet / "data.noun"
    data.write_bytes(data.read_bytes()[40:])
    with pytest.raises(DataError, match="cannot be read"):
        suggest_tree(["lion"], wordnet)
