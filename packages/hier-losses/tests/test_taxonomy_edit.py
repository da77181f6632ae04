"""Growing and cutting taxonomies: the new tree, and the maps between old and new node ids."""

import numpy as np
import pytest
import torch

from hier_losses import Taxonomy, TaxonomyUpdate


def check_maps(old, update):
    new = update.taxonomy
    assert update.old_to_new.shape == (old.num_nodes,)
    assert update.new_to_old.shape == (new.num_nodes,)
    for before, after in enumerate(update.old_to_new.tolist()):
        if after >= 0:
            assert int(update.new_to_old[after]) == before
            assert new.names[after] == old.names[before]
    for after, before in enumerate(update.new_to_old.tolist()):
        if before >= 0:
            assert int(update.old_to_new[before]) == after


def test_extend_by_paths(t11):
    update = t11.extend([("a", "a1", "z"), ("d", "d1"), ("c", "c1"), ("a", "a2")])
    check_maps(t11, update)
    assert update.taxonomy.to_paths() == [
        ("a", "a1", "x"),
        ("a", "a1", "y"),
        ("a", "a1", "z"),
        ("a", "a2"),
        ("a", "a3"),
        ("b", "b1", "b11"),
        ("b", "b1", "b12"),
        ("c", "c1"),
        ("d", "d1"),
    ]
    assert (update.old_to_new >= 0).all()
    added = [update.taxonomy.names[v] for v in (update.new_to_old < 0).nonzero().flatten().tolist()]
    assert added == ["d", "c1", "d1", "z"]
    assert update.taxonomy == Taxonomy.from_paths([*t11.to_paths(), ("a", "a1", "z"), ("c", "c1"), ("d", "d1")])


def test_extend_by_edges_equals_extend_by_paths(t11):
    by_paths = t11.extend([("a", "a1", "z"), ("d", "d1", "d11"), ("b", "b1", "x")])
    edges = [("d1", "d11"), ("a1", "z"), (None, "d"), ("d", "d1"), (("b", "b1"), "x")]
    by_edges = t11.extend(edges=edges)
    check_maps(t11, by_edges)
    assert set(by_edges.taxonomy.to_paths()) == set(by_paths.taxonomy.to_paths())
    full = t11.extend(edges=[(("a", "a1"), ("a", "a1", "z")), (("a", "a1", "z"), ("a", "a1", "z", "zz"))])
    assert full.taxonomy.index(("a", "a1", "z", "zz")) == 12


@pytest.mark.parametrize("seed", range(10))
def test_extend_then_prune_gives_the_tree_back(random_tree, seed):
    tax = random_tree(seed)
    rng = np.random.default_rng(seed)
    hosts = rng.integers(0, tax.num_nodes, 6).tolist()
    grown = tax.extend([(*tax.path_of(v), f"new{i}", f"low{i}") for i, v in enumerate(hosts)])
    check_maps(tax, grown)
    added = (grown.new_to_old < 0).nonzero().flatten()
    cut = grown.taxonomy.prune(added)
    check_maps(grown.taxonomy, cut)
    assert cut.taxonomy == tax
    assert cut.old_to_new[grown.old_to_new].tolist() == list(range(tax.num_nodes))


@pytest.mark.parametrize("seed", range(10))
def test_prune_against_sets_of_paths(random_tree, seed):
    tax = random_tree(seed)
    rng = np.random.default_rng(100 + seed)
    chosen = set(rng.choice(tax.num_nodes, size=max(1, tax.num_nodes // 4), replace=False).tolist())
    paths = [[v for v in row if v >= 0] for row in tax.paths.tolist()]

    kept = [path for path in paths if not chosen & set(path)]
    if kept:
        update = tax.prune(sorted(chosen), mode="subtree")
        check_maps(tax, update)
        names = {tuple(tax.names[v] for v in path) for path in kept}
        assert {update.taxonomy.path_of(v) for v in range(update.taxonomy.num_nodes)} == names

    update = tax.prune(torch.tensor(sorted(chosen)), mode="splice")
    check_maps(tax, update)
    names = {tuple(tax.names[v] for v in path if v not in chosen) for path in paths if path[-1] not in chosen}
    assert {update.taxonomy.path_of(v) for v in range(update.taxonomy.num_nodes)} == names
    assert (update.old_to_new < 0).nonzero().flatten().tolist() == sorted(chosen)


def test_splice_puts_children_where_their_parent_stood(t11):
    update = t11.prune([t11.index("a1"), t11.index("b")], mode="splice")
    assert update.taxonomy.names == ("a", "b1", "c", "x", "y", "a2", "a3", "b11", "b12")
    assert update.taxonomy.natural_labels


def test_a_parent_without_children_becomes_a_leaf(t11):
    tax = t11.prune([t11.index("x"), t11.index("y")]).taxonomy
    assert "a1" in tax.leaf_names


def test_labels_of_the_data_stay_in_front():
    tax = Taxonomy.from_paths([(1, 0), (0, 1), (1, 2)])
    update = tax.extend([("1", "new"), ("0", "late")])
    new = update.taxonomy
    old_rows = torch.tensor([(1, 0), (0, 1), (1, 2)])
    assert torch.equal(new.node_ids(old_rows), update.old_to_new[tax.node_ids(old_rows)])
    assert new.path_of(new.node_ids(torch.tensor([[1, 3]]))[0]) == ("1", "new")
    assert new.path_of(new.node_ids(torch.tensor([[0, 4]]))[0]) == ("0", "late")
    assert new.prune((update.new_to_old < 0).nonzero().flatten()).taxonomy == tax


def test_added_labels_follow_all_old_ones_in_a_wide_level():
    rows = torch.tensor([(0, 11 - i) if i < 6 else (1, 11 - i) for i in range(12)])
    tax = Taxonomy.from_paths(rows)
    update = tax.extend([("0", "new")])
    assert int(update.taxonomy.label[update.taxonomy.index("new")]) == 12
    assert torch.equal(update.taxonomy.node_ids(rows), update.old_to_new[tax.node_ids(rows)])


def test_transfer_carries_rows_over(t11):
    update = t11.extend([("a", "a1", "z")])
    weight = torch.randn(11, 4, requires_grad=True)
    moved = update.transfer(weight, fill=-1.0)
    assert moved.shape == (12, 4)
    new = int((update.new_to_old < 0).nonzero())
    assert (moved[new] == -1).all()
    assert torch.equal(moved[update.old_to_new], weight)
    moved.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert update.transfer(torch.arange(11)).tolist()[:3] == [0, 1, 2]
    for rows in (torch.zeros(10), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="rows must have 11 entries"):
            update.transfer(rows)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one"),
        ({"paths": [("d",)], "edges": [("a", "d")]}, "exactly one"),
        ({"paths": [("a", "", "z")]}, "path|row 0 has a hole"),
        ({"paths": [()]}, "row 0 is empty"),
        ({"edges": [("a", "a1")]}, "duplicate edge 'a' -> 'a1'"),
        ({"edges": [("a", "n"), ("a", "n")]}, "duplicate edge"),
        ({"edges": [("a", "n"), ("b", "n")]}, "'n' has two parents"),
        ({"edges": [("nowhere", "n")]}, "no node is named 'nowhere'"),
        ({"edges": [("n", "m"), ("m", "n")]}, "cycle"),
        ({"edges": [("b", "x"), ("x", "n")]}, "'x' stands for an old node and a new one"),
        ({"edges": [("a", None)]}, "has no child"),
    ],
)
def test_extend_refuses(t11, kwargs, message):
    with pytest.raises(ValueError, match=message):
        t11.extend(**kwargs)


def test_extend_refuses_other_types(t11):
    with pytest.raises(TypeError, match="single str 'ab'"):
        t11.extend(["ab"])
    with pytest.raises(TypeError, match="must hold names"):
        t11.extend([(1, 2)])


@pytest.mark.parametrize(
    ("nodes", "mode", "message"),
    [
        ([11], "subtree", r"nodes must lie in \[0, 11\), got 11"),
        ([-1], "splice", r"got -1"),
        ([0, 1, 2], "subtree", "at least one node"),
        (range(11), "splice", "at least one node"),
        ([0], "cut", "mode must be one of 'subtree', 'splice'"),
    ],
)
def test_prune_refuses(t11, nodes, mode, message):
    with pytest.raises(ValueError, match=message):
        t11.prune(nodes, mode=mode)


def test_splice_refuses_equal_siblings():
    tax = Taxonomy.from_paths([("a", "p", "x"), ("a", "q", "x")])
    with pytest.raises(ValueError, match="'a > p > x' and 'a > q > x' siblings of the same name"):
        tax.prune(tax.indices(["p", "q"]), mode="splice")


def test_pruning_nothing_changes_nothing(t11):
    update = t11.prune([])
    assert isinstance(update, TaxonomyUpdate)
    assert update.taxonomy == t11


def test_self_leaves():
    tax = Taxonomy.from_paths([("dog", "pug"), ("dog", "hound", "beagle"), ("cat",)])
    update = tax.with_self_leaves()
    assert update.taxonomy.to_paths() == [
        ("dog", "pug"),
        ("dog", "hound", "beagle"),
        ("dog", "hound", "(self)"),
        ("dog", "(self)"),
        ("cat",),
    ]
    for node in range(tax.num_nodes):
        assert update.taxonomy.path_of(update.old_to_new[node]) == tax.path_of(node)
    some = tax.with_self_leaves(torch.tensor([tax.index("hound")]), name="other").taxonomy
    assert some.num_nodes == tax.num_nodes + 1
    assert some.index(("dog", "hound", "other")) in some.leaf
    assert Taxonomy.from_paths([("a",), ("b",)]).with_self_leaves().taxonomy.num_nodes == 2


def test_self_leaves_of_the_wrong_nodes():
    tax = Taxonomy.from_paths([("dog", "pug"), ("cat",)])
    with pytest.raises(ValueError, match=r"nodes must be inner nodes in \[0, 3\), got 1"):
        tax.with_self_leaves([tax.index("cat")])
    for edit in (tax.with_self_leaves, tax.prune):
        with pytest.raises(TypeError, match="nodes must be node ids, got 'hound'; indices of the taxonomy"):
            edit(["hound"])
    with pytest.raises(ValueError, match=r"nodes must be inner nodes in \[0, 3\), got -1"):
        tax.with_self_leaves([-1])
    with pytest.raises(ValueError, match=r"node 0 \('dog'\) has a child named 'pug' already"):
        tax.with_self_leaves(name="pug")
