"""Files of every kind, what the readers say about them, and files that are refused with a sentence."""

import json
import warnings

import numpy as np
import pytest

from hier_losses import LabelGraph, Taxonomy, read_label_graph, read_taxonomy

SMALL = [("a", "x"), ("a", "y"), ("b",)]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes text, or bytes, and gives the path."""

    def put(name, text):
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return file

    return put


@pytest.mark.parametrize(("delimiter", "name"), [(",", "comma"), (";", "semicolon"), ("\t", "tab"), ("|", "bar")])
def test_delimiters(delimiter, name, write):
    text = delimiter.join(("top", "low")) + "\n" + "\n".join(delimiter.join((*p, "")[:2]) for p in SMALL)
    file = write("tree.csv", text)
    found = read_taxonomy(file)
    assert found.taxonomy.to_paths() == SMALL
    assert found.understood == {
        "delimiter": name, "encoding": "utf-8", "header": "top, low", "layout": "paths", "order": "coarse_to_fine"
    }  # fmt: skip
    assert bool(found.guesses) == (delimiter != ",")
    assert f"delimiter: {name}" in str(found)
    if delimiter == ",":
        assert Taxonomy.from_csv(file) == found.taxonomy
        return
    with pytest.warns(UserWarning, match=f"delimiter {name}, which stands equally often"):
        assert Taxonomy.from_csv(file) == found.taxonomy
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Taxonomy.from_csv(file, delimiter=delimiter) == found.taxonomy


def test_two_delimiters_are_no_guess(write):
    file = write("tree.csv", "a;b,c\nd;e,f\n")
    with pytest.raises(ValueError, match=r"more than one delimiter: comma \(2 columns\), semicolon \(2 columns\)"):
        read_taxonomy(file)
    assert read_taxonomy(file, delimiter=";").taxonomy.to_paths() == [("d", "e,f")]


def test_encodings(write):
    text = "top,low\nk\u00e4se,brie\nk\u00e4se,gouda\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        found = read_taxonomy(write("tree.csv", text.encode(encoding)))
        assert found.taxonomy.names[0] == "k\u00e4se"
        assert not found.guesses
    file = write("tree.csv", text.encode("cp1252"))
    found = read_taxonomy(file)
    assert found.understood["encoding"] == "cp1252"
    assert "byte 9 is not UTF-8: read as cp1252" in found.guesses[0]
    assert read_taxonomy(file, encoding="cp1252").guesses == ()
    assert read_taxonomy(file, encoding="latin-1").taxonomy == found.taxonomy


def test_headers(write):
    found = read_taxonomy(write("tree.csv", "a,x\na,y\nb,z\n"))
    assert found.taxonomy.to_paths() == [("a", "x"), ("a", "y"), ("b", "z")]
    assert found.understood["header"] == "none"
    assert found.guesses == ("no header, since 'a' of the first line stands in its column again",)
    assert read_taxonomy(write("tree.csv", "a,x\nb,y\n"), header=False).taxonomy.num_nodes == 4
    with pytest.raises(ValueError, match="columns goes with a header"):
        read_taxonomy(write("tree.csv", "a,x\nb,y\n"), header=False, columns=["a"])


def test_look_alikes(write):
    names = ["Felidae", "Felidae ", "felidae", "Caf\u00e9", "Cafe\u0301", "Canidae"]
    file = write("tree.csv", "name\n" + "\n".join(f'"{name}"' for name in names) + "\n")
    found = read_taxonomy(file)
    assert found.taxonomy.names == tuple(names)
    assert found.notes[0] == (
        "names that look alike stay different nodes: 'Felidae' and 'Felidae ' and 'felidae'; "
        r"'Caf\xe9' and 'Cafe\u0301'"
    )
    with pytest.warns(UserWarning, match="look alike"):
        Taxonomy.from_csv(file)


@pytest.mark.parametrize("reverse", [False, True])
def test_holes(reverse, write):
    rows = [("order", "family", "genus"), ("o", "f", "g"), ("o", "", "h"), ("p", "q", "")]
    text = "\n".join(",".join(row[::-1] if reverse else row) for row in rows[:2])
    # A blank line and a name with a line break: the message counts lines of the file.
    text += "\n\n" + "\n".join(",".join(row[::-1] if reverse else row) for row in rows[2:])
    file = write("tree.csv", text)
    order = "fine_to_coarse" if reverse else None
    with pytest.raises(ValueError, match=r"tree.csv' line 4 has a hole: .*on_hole='close' leaves the level out"):
        read_taxonomy(file, order=order)
    closed = read_taxonomy(file, order=order, on_hole="close").taxonomy
    assert closed.to_paths() == [("o", "f", "g"), ("o", "h"), ("p", "q")]
    filled = Taxonomy.from_csv(file, order=order, on_hole="fill")
    assert filled.to_paths() == [("o", "f", "g"), ("o", "(no family)", "h"), ("p", "q")]
    with pytest.raises(ValueError, match="on_hole must be one of"):
        read_taxonomy(file, on_hole="skip")


def test_lines(write):
    found = read_taxonomy(write("tree.txt", "a > x\na > y\n\nb > z\n"))
    assert (found.format, found.taxonomy.to_paths()) == ("lines", [("a", "x"), ("a", "y"), ("b", "z")])
    assert found.guesses[-1] == "separator ' > ', in 3 of 3 lines"
    found = read_taxonomy(write("tree.txt", "a/x\na/y\nb\n"), format="lines")
    assert found.taxonomy.to_paths() == SMALL
    with pytest.raises(ValueError, match="line 2 has an empty name: 'a > '"):
        read_taxonomy(write("tree.txt", "a > x\na > \n"), format="lines")


def test_lines_of_a_product_list(write):
    """Comments, numbers in front and lines of one name, as in lists of product categories."""
    found = read_taxonomy(
        write("list.txt", "# version 1\n1 - pet\n7 - pet > dog\n8 - pet > dog > pug\n9 - pet > cat\n")
    )
    assert (found.format, found.taxonomy.to_paths()) == ("lines", [("pet", "dog", "pug"), ("pet", "cat")])
    assert any("begin with '#' are comments: 1 left out" in guess for guess in found.guesses)
    assert any("'1 - ' left out" in guess for guess in found.guesses)


def test_flat_trees_are_noted_and_rdf_is_refused(write):
    assert read_taxonomy(write("flat.txt", "x\ny\nz\n")).notes == (
        "the tree is flat: none of its 2 nodes has a parent",
    )
    text = "@prefix skos: <http://www.w3.org/2004/02/skos/core#> .\n<a> skos:broader <b> .\n"
    with pytest.raises(ValueError, match="looks like RDF or XML, which is not read"):
        read_taxonomy(write("tree.ttl", text))


def test_codes(write):
    text = "A00 Cholera\nA00.0 Cholera due to one\nA00.1 Cholera due to other\nB15-B19 Hepatitis\nA001 x\n"
    with pytest.raises(ValueError, match="line 5: code 'A001' stands in an earlier line too"):
        read_taxonomy(write("icd.txt", text))
    found = read_taxonomy(write("icd.txt", text.rsplit("A001", 1)[0]))
    assert found.format == "codes"
    assert found.taxonomy.to_paths() == [
        ("A00 Cholera", "A00.0 Cholera due to one"),
        ("A00 Cholera", "A00.1 Cholera due to other"),
        ("B15-B19 Hepatitis",),
    ]


OBO = """format-version: 1.2

[Term]
id: X:1
name: pet

[Term]
id: X:2
name: canine

[Term]
id: X:3
name: dog
is_a: X:2 {source="y"} ! canine
is_a: X:1 ! pet

[Term]
id: X:4
name: old
is_obsolete: true

[Typedef]
id: part_of
"""


def test_obo(write):
    file = write("pets.obo", OBO)
    graph = read_label_graph(file)
    assert graph == LabelGraph.from_edges([("canine", "dog"), ("pet", "dog")], nodes=["pet", "canine", "dog"])
    with pytest.raises(ValueError, match=r"1 nodes have several parents: 'dog: canine, pet'; on_second_parent='first'"):
        read_taxonomy(file)
    found = read_taxonomy(file, on_second_parent="first")
    assert found.taxonomy.to_paths() == [("pet",), ("canine", "dog")]
    assert found.notes == ("1 nodes keep the first of several parents: 'dog: canine, pet'",)
    assert found.understood["obsolete terms left out"] == "1"
    with pytest.raises(ValueError, match=r"names parents that it does not hold: 'X:3 -> X:1'"):
        read_label_graph(write("lost.obo", OBO.replace("id: X:1", "id: X:9")))


def test_darwin_core_with_parents(write):
    text = (
        "taxonID\tparentNameUsageID\tacceptedNameUsageID\tscientificName\ttaxonRank\n"
        "1\t\t\tAnimalia\tkingdom\n2\t1\t2\tFelis\tgenus\n3\t2\t\tFelis catus\tspecies\n4\t2\t3\tFelis domestica\tspecies\n"
    )
    found = read_taxonomy(write("Taxon.tsv", text))
    assert found.format == "darwin_core"
    assert found.taxonomy.to_paths() == [("Animalia", "Felis", "Felis catus")]
    assert found.understood["synonyms left out"] == "1"
    assert read_label_graph(write("Taxon.tsv", text)).names == ("Animalia", "Felis", "Felis catus")


def test_darwin_core_with_ranks(write):
    text = (
        "gbifID\tscientificName\tgenus\tfamily\tkingdom\tcountry\n"
        "1\tFelis catus\tFelis\tFelidae\tAnimalia\tFR\n2\tQuercus robur\tQuercus\tFagaceae\tPlantae\tDE\n"
    )
    found = read_taxonomy(write("occurrence.txt", text))
    assert found.understood["columns"] == "kingdom, family, genus, scientificName"
    assert found.taxonomy.to_paths()[0] == ("Animalia", "Felidae", "Felis", "Felis catus")


def test_ncbi(write, tmp_path):
    rows = [("1", "1", "no rank"), ("2", "1", "superkingdom"), ("6", "2", "genus"), ("7", "6", "species")]
    write("nodes.dmp", "".join("\t|\t".join(row) + "\t|\n" for row in rows))
    assert read_taxonomy(tmp_path).taxonomy.to_paths() == [("2", "6", "7")]
    names = [("2", "Bacteria", "", "scientific name"), ("2", "eubacteria", "", "synonym")]
    names += [("6", "Azo", "", "scientific name"), ("7", "Azo caul", "", "scientific name")]
    write("names.dmp", "".join("\t|\t".join(row) + "\t|\n" for row in names))
    found = read_taxonomy(tmp_path / "nodes.dmp")
    assert found.taxonomy.to_paths() == [("Bacteria", "Azo", "Azo caul")]
    assert read_label_graph(tmp_path).rank.tolist() == [0, 1, 2]


def test_other_formats_and_graphs(write, t11):
    assert read_taxonomy(write("tree.json", json.dumps(t11.to_json()))).taxonomy == t11
    assert read_taxonomy(write("tree.nwk", t11.to_newick())).format == "newick"
    graph = read_label_graph(write("edges.csv", "parent,child\npet,dog\ncanine,dog\n"))
    assert graph.names == ("pet", "dog", "canine")
    assert len(graph.edge_child) == 2
    assert read_label_graph(write("paths.csv", "top,low\na,x\nb,y\n")).num_nodes == 4
    with pytest.raises(ValueError, match="format must be one of 'table', 'lines'"):
        read_taxonomy(write("tree.json", "[]"), format="xml")


def test_siblings_of_one_name(write):
    text = "taxonID,parentNameUsageID,scientificName\n1,,A\n2,1,B\n3,1,B\n"
    found = read_taxonomy(write("taxon.csv", text))
    assert found.taxonomy.names == ("A", "B", "B (3)")
    assert found.notes == ("siblings share the name 'B': the later one is called B (3)",)


def test_a_str_is_text_or_a_file_for_both(t11, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = t11.to_json("tree.json")
    assert Taxonomy.from_json("tree.json") == Taxonomy.from_json(json.dumps(data)) == Taxonomy.from_json(data) == t11
    (tmp_path / "tree.nwk").write_text(t11.to_newick())
    assert Taxonomy.from_newick("tree.nwk") == Taxonomy.from_newick(t11.to_newick()) == t11
    for read in (Taxonomy.from_json, Taxonomy.from_newick):
        with pytest.raises(FileNotFoundError):
            read("nothing here")


def test_deep_trees_end_in_a_sentence():
    with pytest.raises(ValueError, match=r"a tree of 100000 nodes and 100000 levels needs a table of paths of 80 GB"):
        Taxonomy([str(i) for i in range(100_000)], range(-1, 99_999))
    deep = '{"a":' * 100_000 + "null" + "}" * 100_000
    with pytest.raises(ValueError, match="nested too deeply|needs a table of paths"):
        Taxonomy.from_json(deep)


def test_labels_without_end():
    nodes = [{"id": 0, "name": "r", "parent": None}, {"id": 1, "name": "a", "parent": 0, "label": float("1e400")}]
    with pytest.raises(ValueError, match="label of node 'a' must be an integer, got inf"):
        Taxonomy.from_json(nodes)
    with pytest.raises(TypeError, match="must hold names or integers"):
        Taxonomy.from_paths(np.array([[0.0, np.inf]]))


@pytest.mark.parametrize(
    "text", ["species,genus\npoodle,dog\nhusky,dog\nlynx,cat\n", "poodle;dog\nhusky;dog\nlynx;cat\n"]
)
def test_leaves_in_the_first_column_are_seen(tmp_path, text):
    (tmp_path / "tree.csv").write_text(text)
    reading = read_taxonomy(tmp_path / "tree.csv")
    assert {reading.taxonomy.path_of(leaf) for leaf in reading.taxonomy.leaf.tolist()} >= {
        ("dog", "poodle"),
        ("cat", "lynx"),
    }
    assert any("holds the leaves" in guess for guess in reading.guesses)
    (tmp_path / "tree.csv").write_text("dog,poodle\ndog,husky\ncat,lynx\n")
    assert not any("holds the leaves" in guess for guess in read_taxonomy(tmp_path / "tree.csv").guesses)
