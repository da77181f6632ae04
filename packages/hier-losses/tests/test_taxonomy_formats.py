"""Reading and writing taxonomies: every format gives the same tree back, and broken files are refused."""

import json
import subprocess
import sys

import pytest
import torch

from hier_losses import Taxonomy

ODD = [
    "a,b",
    'say "hi"',
    "it's",
    "(x)",
    "semi;colon",
    "new\nline",
    " lead",
    "trail ",
    "tab\tin",
    "[c]",
    "a:b",
    "r\rr",
    "_",
]


def odd_tree(seed, random_tree):
    tax = random_tree(seed)
    names = [ODD[v % len(ODD)] + str(v) * (v % 3) + "." * v for v in range(tax.num_nodes)]
    return Taxonomy(names, tax.parent.tolist())


def homonyms():
    return Taxonomy.from_paths([("a", "x", "a"), ("b", "x", "a"), ("root",), ("b", "b")])


@pytest.fixture(params=[*range(8), "homonyms", "single root"])
def tree(request, random_tree):
    if request.param == "homonyms":
        return homonyms()
    if request.param == "single root":
        return Taxonomy.from_paths([("root", "name", "children"), ("root", "parent")])
    return odd_tree(request.param, random_tree)


def unique(tax):
    return len(set(tax.names)) == tax.num_nodes


def test_round_trips_in_memory(tree):
    assert Taxonomy.from_paths(tree.to_paths()) == tree
    assert Taxonomy.from_paths([p[::-1] for p in tree.to_paths()], order="fine_to_coarse") == tree
    assert Taxonomy.from_edges(tree.to_edges("path")) == tree
    assert Taxonomy.from_newick(tree.to_newick()) == tree
    assert Taxonomy.from_networkx(tree.to_networkx()) == tree
    assert Taxonomy.from_json(tree.to_json()) == tree
    if unique(tree):
        assert Taxonomy.from_edges(tree.to_edges()) == tree
        flipped = [edge[::-1] for edge in tree.to_edges()]
        assert Taxonomy.from_edges(flipped, order="child_parent") == tree
    else:
        with pytest.raises(ValueError, match="needs unique names, repeated"):
            tree.to_edges()


def test_round_trips_through_files(tree, tmp_path):
    file = tmp_path / "tree"
    tree.to_csv(file)
    assert Taxonomy.from_csv(file) == tree
    file.write_text(json.dumps(tree.to_json()), encoding="utf-8")
    assert Taxonomy.from_json(file) == Taxonomy.from_json(str(file)) == tree
    file.write_bytes(tree.to_newick().encode())
    assert Taxonomy.from_newick(file) == tree
    if unique(tree):
        tree.to_csv(file, layout="edges")
        assert Taxonomy.from_csv(file) == tree
    else:
        with pytest.raises(ValueError, match="repeated"):
            tree.to_csv(file, layout="edges")
    with pytest.raises(ValueError, match="layout must be one of"):
        tree.to_csv(file, layout="rows")


@pytest.mark.parametrize("name", ODD)
def test_one_odd_name_in_csv(name, tmp_path):
    tax = Taxonomy.from_paths([("top", "plain"), ("top", name), (name, name)])
    tax.to_csv(tmp_path / "tree.csv")
    assert Taxonomy.from_csv(tmp_path / "tree.csv") == tax


def test_labels_of_the_data_survive_json():
    tax = Taxonomy.from_paths([(1, 0), (0, 1), (1, 2)])
    again = Taxonomy.from_json(json.loads(json.dumps(tax.to_json())))
    assert again == tax
    assert torch.equal(again.label, tax.label)
    assert Taxonomy.from_paths(tax.to_paths()) != tax, "paths of names carry no labels"


# Edges


def test_edges_with_a_root_to_leave_out(t11):
    edges = [("top", "a"), ("a", "a1"), ("a1", "x"), ("a1", "y"), ("a", "a2"), ("top", "c")]
    tax = Taxonomy.from_edges(edges, root="top")
    assert tax.to_paths() == [("a", "a1", "x"), ("a", "a1", "y"), ("a", "a2"), ("c",)]
    assert Taxonomy.from_edges(edges).level_sizes == (1, 2, 2, 2)
    assert Taxonomy.from_edges([("", "b"), ("b", "x")]) == Taxonomy.from_edges([("b", "x")])


@pytest.mark.parametrize(
    ("edges", "kwargs", "message"),
    [
        ([], {}, "at least one edge"),
        ([("a", "b"), ("a", "b")], {}, "duplicate edge 'a' -> 'b'"),
        ([("a", "b"), ("c", "b")], {}, "node 'b' has two parents, 'a' and 'c'"),
        ([("a", "b"), ("b", "c"), ("c", "a")], {}, "cycle: a > b > c > a"),
        ([("r", "z"), ("a", "a")], {}, "cycle: a > a"),
        ([("a", "b", "c")], {}, "edge 0 must be a pair"),
        (["ab"], {}, "edge 0 must be a pair"),
        ([("a", None)], {}, "edge 0 has no child"),
        ([("a", "b")], {"order": "down"}, "order must be one of"),
        ([("a", "b")], {"root": "z"}, "root must be a node of the edges, got 'z'"),
        ([("a", "b")], {"root": "b"}, "root 'b' has the parent 'a'"),
        ([(("a",), ("b", "c"))], {}, "must be its beginning"),
        ([(None, ("a",))], {"root": "a"}, "root goes with edges between names"),
    ],
)
def test_edges_refuse(edges, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_edges(edges, **kwargs)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(1, 2)], "an end of an edge must be"),
        ([(("a",), "b")], "joins a name and a full path"),
        ([(None, ("a",)), (None, "b")], "names only or full paths only"),
    ],
)
def test_edges_of_wrong_type(edges, message):
    with pytest.raises(TypeError, match=message):
        Taxonomy.from_edges(edges)


def test_path_edges_make_the_nodes_above_them():
    tax = Taxonomy.from_edges([(("a", "b"), ("a", "b", "c"))])
    assert tax.to_paths() == [("a", "b", "c")]


# CSV


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ("leaf,parent,grandparent\nx,a1,a\ny,a1,a\na2,a,\nc,,\n", {}),
        ("\ufeffLeaf, Parent ,Grandparent\nx, a1, a\ny,a1,a\n\na2,a,\nc,,\n", {}),
        ("top,mid,low\na,a1,x\na,a1,y\na,a2,\nc,,\n", {}),
        ("species,genus,family\nx,a1,a\ny,a1,a\n,a2,a\n,,c\n", {"order": "fine_to_coarse"}),
        ("image,top,mid,low\n1.png,a,a1,x\n2.png,a,a1,y\n3.png,a,a2,\n4.png,c,,\n", {"columns": ["top", "mid", "low"]}),
        ("parent,child\n,a\na,a1\na1,x\na1,y\na,a2\n,c\n", {}),
        ("child,parent\na,\na1,a\nx,a1\ny,a1\na2,a\nc,\n", {}),
        ("from,to\n,a\na,a1\na1,x\na1,y\na,a2\n,c\n", {"layout": "edges"}),
    ],
)
def test_csv_layouts(tmp_path, text, kwargs):
    file = tmp_path / "tree.csv"
    file.write_text(text, encoding="utf-8")
    expected = [("a", "a1", "x"), ("a", "a1", "y"), ("a", "a2"), ("c",)]
    assert Taxonomy.from_csv(file, **kwargs).to_paths() == expected


@pytest.mark.parametrize(
    ("text", "kwargs", "message"),
    [
        ("", {}, "is empty"),
        ("a,b\n", {}, "at least one path"),
        ("a,b\nx\n", {}, "line 2: 1 cells, the header has 2"),
        ("a,b,c\nx,,y\n", {}, "line 2 has a hole"),
        ("a,b\nx,y\n", {"columns": ["a", "z"]}, r"columns must be among \['a', 'b'\], got \['z'\]"),
        ("a,b\nx,y\n", {"layout": "tree"}, "layout must be one of"),
        ("parent,child\na,b\nb,a\n", {}, "cycle"),
    ],
)
def test_csv_refuses(tmp_path, text, kwargs, message):
    file = tmp_path / "tree.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_csv(file, **kwargs)


# JSON

SMALL = [("a", "x"), ("a", "y"), ("b",)]


@pytest.mark.parametrize(
    "data",
    [
        {"a": ["x", "y"], "b": []},
        {"a": {"x": {}, "y": None}, "b": {}},
        [{"name": "a", "children": ["x", {"name": "y"}]}, "b"],
        {"name": "Root", "children": [{"name": "a", "children": [{"name": "x"}, {"name": "y", "children": []}]}, "b"]},
        {
            "nodes": [
                {"name": "a", "parent": None},
                *({"name": n, "parent": "a"} for n in "xy"),
                {"name": "b", "parent": None},
            ]
        },
        [
            {"id": 7, "name": "root", "parent": None, "children": [3, 4]},
            {"id": 3, "name": "a", "parent": 7},
            {"id": 4, "name": "b", "parent": 7},
            {"id": 1, "name": "x", "parent": 3},
            {"id": 2, "name": "y", "parent": 3},
        ],
    ],
)
def test_json_forms(data):
    assert Taxonomy.from_json(data).to_paths() == SMALL


def test_json_root_choices():
    data = {"thing": {"a": ["x"]}}
    assert Taxonomy.from_json(data).num_nodes == 3
    assert Taxonomy.from_json(data, root="thing").names == ("a", "x")
    assert Taxonomy.from_json({"root": {"a": ["x"]}}).names == ("a", "x")
    assert Taxonomy.from_json({"root": {"a": ["x"]}}, root=None).names == ("root", "a", "x")
    with pytest.raises(ValueError, match="single top node, got 'a'; top nodes: 'thing'"):
        Taxonomy.from_json(data, root="a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ({}, "empty"),
        ({"name": "root"}, "nothing but its root"),
        ([{"parent": None}], "neither 'id' nor 'name'"),
        (
            [{"id": 0, "name": "a", "parent": None}, {"id": 0, "name": "b", "parent": None}],
            "different ids, got 0 twice",
        ),
        ([{"id": 0, "name": "a", "parent": 5}], "unknown parent 5"),
        (
            [{"id": 0, "name": "a", "parent": None, "children": [1]}, {"id": 1, "name": "b", "parent": None}],
            "lists the child 1",
        ),
        ([{"id": 0, "name": "a", "parent": 1}, {"id": 1, "name": "b", "parent": 0}], "cycle"),
        ({"a": 3}, "made of objects, lists and names, got 3"),
    ],
)
def test_json_refuses(data, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_json(data)


def test_deep_json_and_newick_need_no_recursion():
    depth = 3000
    data = "x"
    for step in range(depth):
        data = {f"n{step}": [data]}
    assert Taxonomy.from_json(data).num_levels == depth + 1
    text = "(" * depth + "x" + "".join(f")n{i}" for i in range(depth - 1)) + ");"
    tax = Taxonomy.from_newick(text)
    assert tax.num_levels == depth
    assert Taxonomy.from_newick(tax.to_newick()) == tax


@pytest.mark.parametrize(
    ("name", "nodes", "leaves", "levels"),
    [("cifar100", 147, 100, 10), ("sun", 342, 324, 3), ("imagenet", 1367, 1000, 15), ("rarespecies", 1023, 400, 6)],
)
def test_published_node_lists(tree_file, published_tree, name, nodes, leaves, levels):
    tax = Taxonomy.from_json(tree_file(name))
    assert (tax.num_nodes, tax.num_leaves, tax.num_levels) == (nodes, leaves, levels)
    data = published_tree(name)
    names = {node["id"]: node["name"] for node in data["nodes"]}
    assert {names[i] for i in data["leaves"]} == set(tax.leaf_names)
    assert Taxonomy.from_newick(tax.to_newick()) == tax


# Newick


def test_newick_with_lengths_comments_and_quotes():
    text = "( (x:0.1,'y''s':1e-3)[note]a1:2 , 'two words' ) 'a b':0.5 [end] ;\n"
    tax = Taxonomy.from_newick(text)
    assert tax.to_paths() == [("a b", "a1", "x"), ("a b", "a1", "y's"), ("a b", "two words")]
    assert Taxonomy.from_newick(text, root="a b").to_paths() == [("a1", "x"), ("a1", "y's"), ("two words",)]
    assert Taxonomy.from_newick("((x,y),z);").names == ("unnamed_0", "z", "x", "y")
    assert Taxonomy.from_newick("a;").names == ("a",)
    assert Taxonomy.from_newick("(a_b)root;").names == ("a_b",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "end with a semicolon"),
        ("(a,b)", "end with a semicolon"),
        ("((a,b);", "close all parentheses"),
        ("(a,b));", "closes more than it opens at position 5"),
        ("a,b;", "comma outside parentheses at position 1"),
        ("(a,b);(c);", "goes on after the semicolon at position 6"),
        ("(a,'b);", "unclosed quote or comment at position 3"),
        ("(a,[b);", "unclosed quote or comment"),
        ("(a b,c);", "two labels in a row at position 3"),
        ("((a)(b));", "needs a comma before the parenthesis at position 4"),
        ("(a(b));", "needs a comma before the parenthesis at position 2"),
        ("(a,);", "leaf without a label"),
        (";", "nothing but its root|empty"),
        ("(a,a);", "siblings must have different names"),
    ],
)
def test_newick_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_newick(text)


# networkx


def test_networkx_graphs():
    networkx = pytest.importorskip("networkx")
    graph = networkx.DiGraph([("root", "a"), ("a", "x"), ("root", "b"), ("a", "y")])
    assert Taxonomy.from_networkx(graph, root="root").to_paths() == SMALL
    assert Taxonomy.from_networkx(graph).level_sizes == (1, 2, 2)
    with pytest.raises(ValueError, match="must be directed"):
        Taxonomy.from_networkx(graph.to_undirected())
    graph.add_edge("b", "x")
    with pytest.raises(ValueError, match="node 'x' has two parents, 'a' and 'b'"):
        Taxonomy.from_networkx(graph)
    with pytest.raises(ValueError, match="cycle: 1 > 2 > 1"):
        Taxonomy.from_networkx(networkx.DiGraph([(1, 2), (2, 1)]))


# Image folders


def test_nested_folders(tmp_path):
    for path in ("b", "a/y", "a/x", ".cache/junk"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "a" / "x" / "1.png").write_bytes(b"")
    assert Taxonomy.from_imagefolder(tmp_path).to_paths() == SMALL
    with pytest.raises(ValueError, match="skip goes with sep"):
        Taxonomy.from_imagefolder(tmp_path, skip=1)
    (tmp_path / "a" / "x" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
    with pytest.raises(ValueError, match="links back to a folder above"):
        Taxonomy.from_imagefolder(tmp_path)


def test_flat_folders(tmp_path):
    for name in ("00000_Animalia_Aves_corax", "00001_Animalia_Aves_corone", "00002_Plantae_Rosa_canina"):
        (tmp_path / name).mkdir()
    tax = Taxonomy.from_imagefolder(tmp_path, sep="_", skip=1)
    assert tax.level_sizes == (2, 2, 3)
    assert tax.index(("Plantae", "Rosa", "canina")) == 6
    (tmp_path / "00003__x").mkdir()
    with pytest.raises(ValueError, match="'00003__x' has an empty piece"):
        Taxonomy.from_imagefolder(tmp_path, sep="_", skip=1)


def test_folders_refuse(tmp_path):
    with pytest.raises(ValueError, match="holds no folder"):
        Taxonomy.from_imagefolder(tmp_path)
    with pytest.raises(ValueError, match="at least one path"):
        Taxonomy.from_imagefolder(tmp_path, sep="_")
    with pytest.raises(ValueError, match="must be a folder"):
        Taxonomy.from_imagefolder(tmp_path / "none")
    with pytest.raises(ValueError, match="skip must be at least 0"):
        Taxonomy.from_imagefolder(tmp_path, sep="_", skip=-1)


# Text and pictures


def test_show_and_str(t11):
    assert t11.show(max_depth=2, max_children=2).splitlines() == [
        "Taxonomy(11 nodes, 7 leaves, levels 3/4/4)",
        "  a",
        "    a1 (2 leaves)",
        "    a2",
        "    ... 1 more",
        "  b",
        "    b1 (2 leaves)",
        "  ... 1 more",
    ]
    assert "b1 (2 leaves)" in str(t11)
    assert repr(t11) == "Taxonomy(nodes=11, leaves=7, levels=3/4/4)"
    with pytest.raises(ValueError, match="at least 1"):
        t11.show(max_depth=0)


def test_describe(t11):
    summary = t11.describe()
    assert summary.level_sizes == (3, 4, 4)
    assert summary.leaves_per_level == (1, 2, 4)
    assert summary.leaf_depths == (1, 17 / 7, 3)
    assert (summary.lone_nodes, summary.lone_leaves) == (1, 0)
    assert summary.imbalance == pytest.approx(12 / 7)
    assert summary.largest_group == 3
    text = str(summary)
    assert "HiSCE falls back to plain cross-entropy" in text
    assert "3 of 7 leaves end above level 3" in text
    flat = str(Taxonomy.from_paths([("only",)]).describe())
    assert "the tree is flat" in flat
    assert "single node" in flat
    assert "names repeat" in str(homonyms().describe())
    even = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")])
    assert even.describe().notes == ()


def test_draw(t11):
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as plt

    ax = t11.draw()
    assert len(ax.lines) == 8
    assert [text.get_text() for text in ax.texts] == list(t11.names)
    _, own = plt.subplots()
    assert t11.draw(own) is own
    plt.close("all")
    with pytest.raises(ValueError, match="max_nodes=5 is exceeded by the 11 nodes"):
        t11.draw(max_nodes=5)


@pytest.mark.parametrize("line", ["import hier_losses", "from hier_losses.metrics import path_scores, tice, mta"])
def test_import_loads_nothing_slow(line):
    """torchmetrics, which the classes need, loads matplotlib, torchvision and transformers where it finds them: ten seconds."""
    slow = "{'matplotlib', 'networkx', 'torchmetrics', 'torchvision', 'transformers'}"
    code = f"import sys, torch; before = set(sys.modules); {line}; print(sorted({slow} & (set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
