"""Label graphs: reachability against a walk, ranks, cycles, and trees as graphs."""

import copy
import pickle

import numpy as np
import pytest
import torch

from hier_losses import LabelGraph, Taxonomy

DIAMOND = [("pet", "dog"), ("canine", "dog"), ("animal", "pet"), ("animal", "canine"), ("dog", "puppy")]


def random_edges(seed, num=25, rate=0.12):
    rng = np.random.default_rng(seed)
    place = rng.permutation(num)
    pairs = [(int(place[i]), int(place[j])) for i in range(num) for j in range(i + 1, num) if rng.random() < rate]
    order = rng.permutation(len(pairs))
    return [pairs[i] for i in order]


def reachable(num, edges):
    reach = np.eye(num, dtype=bool)
    for _ in range(num):
        for up, down in edges:
            reach[up] |= reach[down]
    return reach


@pytest.mark.parametrize("seed", range(8))
def test_reachability_and_ranks_against_a_dense_closure(seed):
    num = 25
    edges = random_edges(seed, num)
    nodes = [f"v{i}" for i in range(num)]
    graph = LabelGraph.from_edges([(f"v{a}", f"v{b}") for a, b in edges], nodes=nodes)
    reach = reachable(num, edges)
    assert graph.names == tuple(nodes)
    assert list(zip(graph.edge_parent.tolist(), graph.edge_child.tolist(), strict=True)) == edges
    for v in range(num):
        up = graph.ancestor[graph.ancestor_ptr[v] : graph.ancestor_ptr[v + 1]]
        down = graph.descendant[graph.descendant_ptr[v] : graph.descendant_ptr[v + 1]]
        assert up.tolist() == np.flatnonzero(reach[:, v]).tolist()
        assert down.tolist() == np.flatnonzero(reach[v]).tolist()
        ups = [a for a, b in edges if b == v]
        assert int(graph.rank[v]) == max((int(graph.rank[a]) + 1 for a in ups), default=0)
    assert graph.num_ranks == int(graph.rank.max()) + 1
    for rows, ptr in ((graph.ancestor_row, graph.ancestor_ptr), (graph.descendant_row, graph.descendant_ptr)):
        assert rows.tolist() == torch.repeat_interleave(torch.arange(num), ptr.diff()).tolist()


def test_two_ways_to_a_node_count_once():
    graph = LabelGraph.from_edges(DIAMOND)
    assert graph.names == ("pet", "dog", "canine", "animal", "puppy")
    start, stop = graph.ancestor_ptr[4], graph.ancestor_ptr[5]
    assert graph.ancestor[start:stop].tolist() == [0, 1, 2, 3, 4]
    assert graph.rank.tolist() == [1, 2, 1, 0, 3]
    assert graph == LabelGraph.from_edges([e[::-1] for e in DIAMOND], order="child_parent", nodes=graph.names)


def test_nodes_keep_the_order_of_the_target_columns():
    graph = LabelGraph.from_edges([("b", "a")], nodes=["a", "lonely", "b"])
    assert (graph.index("a"), graph.index("lonely"), graph.index("b")) == (0, 1, 2)
    assert graph.edge_parent.tolist() == [2]
    assert LabelGraph.from_edges([(None, "x"), (None, "y")]).num_nodes == 2
    with pytest.raises(ValueError, match="no node is named 'z'"):
        graph.index("z")


@pytest.mark.parametrize("seed", range(4))
def test_a_taxonomy_is_a_graph(random_tree, seed):
    tax = random_tree(seed)
    graph = LabelGraph.from_taxonomy(tax)
    assert graph.names == tax.names
    assert torch.equal(graph.rank, tax.depth - 1)
    assert torch.equal(graph.edge_parent, tax.edge_parent)
    assert torch.equal(graph.edge_child, tax.edge_child)
    for v in range(tax.num_nodes):
        up = graph.ancestor[graph.ancestor_ptr[v] : graph.ancestor_ptr[v + 1]]
        assert up.tolist() == [u for u in tax.paths[v].tolist() if u >= 0]


def test_a_taxonomy_with_equal_names_gets_paths_as_names():
    graph = LabelGraph.from_taxonomy(Taxonomy.from_paths([("a", "x"), ("b", "x")]))
    assert graph.names == ("a", "b", "a > x", "b > x")


@pytest.mark.parametrize(
    ("edges", "kwargs", "message"),
    [
        ([("r", "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("c", "z")], {}, "cycle: a > b > c > a"),
        ([("a", "a")], {}, "cycle: a > a"),
        ([("a", "b"), ("a", "b")], {}, "duplicate edge 'a -> b'"),
        ([], {}, "empty"),
        ([("a", "b")], {"nodes": ["a"]}, "edge 0 uses 'b', which is not one of the nodes"),
        ([("a", "b")], {"nodes": ["a", "b", "a"]}, "'a' twice"),
        ([("a", "b")], {"order": "up"}, "order must be"),
        ([("a", "")], {}, "no child"),
        ([("a",)], {}, "must be a pair"),
    ],
)
def test_refuses(edges, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LabelGraph.from_edges(edges, **kwargs)


def test_labels_must_be_names():
    with pytest.raises(TypeError, match="labels of a graph are names"):
        LabelGraph.from_edges([(("a",), ("a", "b"))])


def test_immutable_equal_copied():
    graph = LabelGraph.from_edges(DIAMOND)
    with pytest.raises(AttributeError, match="immutable"):
        graph.rank = None
    with pytest.raises(AttributeError, match="immutable"):
        del graph.rank
    assert copy.deepcopy(graph) is graph
    assert copy.copy(graph) is graph
    again = pickle.loads(pickle.dumps(graph))
    assert again == graph
    assert hash(again) == hash(graph)
    assert graph != LabelGraph.from_edges(DIAMOND[:-1], nodes=graph.names)
    assert graph != 3
    assert len(graph) == 5
    assert repr(graph) == "LabelGraph(nodes=5, edges=5, ranks=4)"


def test_to_moves_all_tensors_once():
    graph = LabelGraph.from_edges(DIAMOND)
    meta = graph.to("meta")
    assert graph.to("cpu") is graph
    assert graph.to("meta") is meta
    assert meta.to("cpu") is graph
    assert meta.ancestor_row.device.type == meta.rank.device.type == "meta"
