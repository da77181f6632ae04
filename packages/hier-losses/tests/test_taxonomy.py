"""The index tensors of a taxonomy, its lookups, and its level labels."""

import copy
import pickle

import pytest
import torch

from hier_losses import Taxonomy

TENSORS = [
    "parent",
    "depth",
    "level_ptr",
    "group_start",
    "group_size",
    "leaf",
    "leaf_index",
    "leaf_start",
    "paths",
    "n_leaves",
    "height",
    "n_siblings",
    "edge_parent",
    "edge_child",
    "label",
    "label_to_node",
]


def path_up(tax, node):
    path = []
    while node >= 0:
        path.insert(0, node)
        node = int(tax.parent[node])
    return path


def below(tax, node):
    return [v for v in range(tax.num_nodes) if node in path_up(tax, v)]


def depth_first_leaves(tax):
    def walk(node):
        children = [v for v in range(tax.num_nodes) if int(tax.parent[v]) == node]
        return [leaf for child in children for leaf in walk(child)] if children else [node]

    return walk(-1)


def test_t11_has_the_ids_of_the_reference_tables(t11):
    assert t11.names == ("a", "b", "c", "a1", "a2", "a3", "b1", "x", "y", "b11", "b12")
    assert t11.parent.tolist() == [-1, -1, -1, 0, 0, 0, 1, 3, 3, 6, 6]
    assert t11.depth.tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert t11.level_ptr.tolist() == [0, 3, 7, 11]
    assert t11.level_sizes == (3, 4, 4)
    assert t11.leaf.tolist() == [2, 4, 5, 7, 8, 9, 10]
    assert t11.height.tolist() == [2, 2, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    assert t11.n_siblings.tolist() == [2, 2, 2, 2, 2, 2, 0, 1, 1, 1, 1]
    assert (t11.num_nodes, t11.num_leaves, t11.num_levels, len(t11)) == (11, 7, 3, 11)
    assert (t11.root_height, t11.max_group_size) == (3, 3)
    assert t11.leaf_names == ("c", "a2", "a3", "x", "y", "b11", "b12")
    assert all(getattr(t11, name).dtype == torch.int64 for name in TENSORS)


@pytest.mark.parametrize("seed", range(12))
def test_every_tensor_against_a_walk_over_the_parents(random_tree, seed):
    tax = random_tree(seed)
    order = depth_first_leaves(tax)
    groups = [[v for v in range(tax.num_nodes) if int(tax.parent[v]) == g - 1] for g in range(tax.num_nodes + 1)]
    assert sorted(tax.parent.tolist()) == tax.parent.tolist(), "breadth-first order has ascending parents"
    assert tax.num_levels == max(len(path_up(tax, v)) for v in range(tax.num_nodes)) == tax.root_height
    assert tax.max_group_size == max(map(len, groups))
    for group, members in enumerate(groups):
        start, size = int(tax.group_start[group]), int(tax.group_size[group])
        assert members == list(range(start, start + size))
    for v in range(tax.num_nodes):
        path = path_up(tax, v)
        leaves = [u for u in below(tax, v) if not groups[u + 1]]
        assert int(tax.depth[v]) == len(path)
        assert tax.paths[v].tolist() == path + [-1] * (tax.num_levels - len(path))
        assert int(tax.level_ptr[len(path) - 1]) <= v < int(tax.level_ptr[len(path)])
        assert int(tax.n_leaves[v]) == len(leaves)
        assert int(tax.height[v]) == max(len(path_up(tax, u)) for u in leaves) - len(path)
        assert int(tax.n_siblings[v]) == len(groups[int(tax.parent[v]) + 1]) - 1
        start = int(tax.leaf_start[v])
        assert sorted(order[start : start + len(leaves)]) == leaves
        assert tax.index(tax.path_of(v)) == v
    assert tax.leaf.tolist() == [v for v in range(tax.num_nodes) if not groups[v + 1]]
    assert tax.leaf_index[tax.leaf].tolist() == list(range(tax.num_leaves))
    assert (tax.leaf_index == -1).sum() == tax.num_nodes - tax.num_leaves
    edges = [(p, v) for v, p in enumerate(tax.parent.tolist()) if p >= 0]
    assert list(zip(tax.edge_parent.tolist(), tax.edge_child.tolist(), strict=True)) == edges


def test_breadth_first_order_whatever_the_input_order(t11):
    tax = Taxonomy(["x", "a1", "a", "b", "y"], [1, 2, -1, -1, 1])
    assert tax.names == ("a", "b", "a1", "x", "y")
    assert tax.parent.tolist() == [-1, -1, 0, 2, 2]


def test_equal_names_under_different_parents_stay_apart():
    tax = Taxonomy.from_paths([("cat", "wild"), ("dog", "wild"), ("dog", "tame")])
    assert tax.num_nodes == 5
    assert tax.index(("cat", "wild")) != tax.index(("dog", "wild"))
    assert tax.index("tame") == 4
    with pytest.raises(ValueError, match=r"'wild' stands for 2 nodes.*cat > wild; dog > wild"):
        tax.index("wild")


def test_lookups(t11):
    assert t11.path_of(7) == ("a", "a1", "x")
    assert t11.index("b11") == 9
    assert t11.index(("a", "a1")) == 3
    assert t11.indices(["x", ("c",)]).tolist() == [7, 2]
    with pytest.raises(ValueError, match="no node is named 'B11'; did you mean 'b11'"):
        t11.index("B11")
    with pytest.raises(ValueError, match=r"no node 'z' below 'a > a1', which holds 'x', 'y'"):
        t11.index(("a", "a1", "z"))
    with pytest.raises(ValueError, match="no node 'z' among the top nodes"):
        t11.index(("z",))
    with pytest.raises(ValueError, match="which holds nothing"):
        t11.index(("c", "z"))
    with pytest.raises(ValueError, match="at least one name"):
        t11.index(())
    for node in (-1, 11):
        with pytest.raises(ValueError, match=r"node must lie in \[0, 11\)"):
            t11.path_of(node)


def test_immutable_equal_hashable(t11):
    with pytest.raises(AttributeError, match="immutable"):
        t11.parent = None
    with pytest.raises(AttributeError, match="immutable"):
        del t11.names
    same = Taxonomy(t11.names, t11.parent.tolist())
    other = Taxonomy([*t11.names[:-1], "z"], t11.parent.tolist())
    moved = Taxonomy(t11.names, [*t11.parent.tolist()[:-1], 3])
    assert same == t11
    assert hash(same) == hash(t11)
    assert t11 not in (other, moved)
    assert t11 != "t11"
    assert len({t11, same, other, moved}) == 3


def test_copies_and_processes(t11):
    assert copy.deepcopy(t11) is t11
    assert copy.copy(t11) is t11
    labelled = Taxonomy.from_paths([(1, 0), (0, 1), (1, 2)])
    assert pickle.loads(pickle.dumps(labelled)) == labelled


def test_to_moves_all_tensors_once(t11):
    meta = t11.to("meta")
    assert t11.to("cpu") is t11
    assert t11.to("meta") is meta
    assert meta.to("cpu") is t11
    assert all(getattr(meta, name).device.type == "meta" for name in TENSORS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_to_cuda_and_back(t11):
    there = t11.to("cuda")
    assert there.to("cuda:0") is there
    assert there == t11
    assert there.node_ids(torch.tensor([[0, 0, 1]], device="cuda")).tolist() == [8]


@pytest.mark.compile
def test_reading_a_tree_does_not_break_a_graph(t11):
    def gather(z, tax):
        top, *rest = z.split(tax.level_sizes, 1)
        there = tax.to(z.device)
        return z[:, there.parent.clamp(min=0)] + top.sum() + sum(level.sum() for level in rest) + there.num_nodes

    z = torch.randn(2, 11)
    torch.testing.assert_close(torch.compile(gather, fullgraph=True, backend="aot_eager")(z, t11), gather(z, t11))


@pytest.mark.parametrize(
    ("names", "parents", "message"),
    [
        ([], [], "empty"),
        (["a", "b"], [-1], "one entry per node"),
        (["a", ""], [-1, 0], "empty name"),
        (["a", "b"], [-1, 2], r"parent of node 'b' must lie in \[-1, 2\)"),
        (["a", "a"], [-1, -1], "siblings must have different names, repeated: 'a'"),
        (["r", "a", "b", "c", "z"], [-1, 3, 1, 2, 1], "cycle: a > b > c > a"),
    ],
)
def test_broken_trees(names, parents, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy(names, parents)


def test_names_must_be_text():
    with pytest.raises(TypeError, match="must be str, got 3"):
        Taxonomy(["a", 3], [-1, 0])


def test_deep_chain_and_single_node():
    chain = Taxonomy.from_paths([[f"c{i}" for i in range(50)]])
    assert (chain.num_levels, chain.num_leaves, int(chain.height[0])) == (50, 1, 49)
    one = Taxonomy.from_paths([("only",)])
    assert (one.num_nodes, one.num_leaves, one.num_levels) == (1, 1, 1)
    assert one.edge_child.shape == (0,)


def test_large_trees_need_memory_in_proportion_to_their_nodes():
    tax = Taxonomy.synthetic((3, 51, 1103, 30000, 100000))
    largest = max(getattr(tax, name).numel() for name in TENSORS)
    assert largest == tax.num_nodes * tax.num_levels
    assert Taxonomy.from_paths(tax.to_paths()) == tax


# Level labels


def test_node_ids_take_the_deepest_known_level(t11):
    rows = torch.tensor([[0, 0, 1], [1, 3, 2], [2, -1, -1], [0, 2, -1], [0, 0, -1]])
    assert t11.node_ids(rows).tolist() == [8, 9, 2, 5, 3]
    shifted = torch.where(rows >= 0, rows + 1, rows)
    assert t11.node_ids(shifted, base=1).tolist() == [8, 9, 2, 5, 3]
    assert t11.node_ids(rows[:, :1].to(torch.int32)).tolist() == [0, 1, 2, 0, 0]
    assert t11.node_ids(rows[:0]).shape == (0,)


@pytest.mark.parametrize("seed", range(6))
def test_node_ids_of_every_node(random_tree, seed):
    tax = random_tree(seed)
    start = tax.level_ptr[:-1]
    rows = torch.where(tax.paths >= 0, tax.paths - start, -1)
    assert tax.node_ids(rows).tolist() == list(range(tax.num_nodes))


@pytest.mark.parametrize(
    ("rows", "base", "message"),
    [
        ([[0, 0, 0], [0, 4, 0]], 0, r"row 1: label 4 of level 2 must lie in \[0, 4\)"),
        ([[0, 0, 0], [0, -2, 0]], 0, "row 1: label -2"),
        ([[1, 1, 1], [0, 1, 1]], 1, r"row 1: label 0 of level 1 must lie in \[1, 4\) with base=1"),
        ([[0, -1, 0]], 0, "row 0: known levels must come first"),
        ([[0, 0, 0], [-1, -1, -1]], 0, "row 1: known levels must come first"),
        ([[0, 0, 0], [1, 0, 0]], 0, "row 1: .* is no path of the tree"),
        ([[0, 0, 2]], 0, "row 0: .* is no path of the tree"),
        ([[0, 0, 0, 0]], 0, "shape"),
        ([0, 0, 0], 0, "shape"),
        ([[0.0, 0.0]], 0, "integers"),
        ([[0, 0, 0]], 2, "base must be 0 or 1"),
    ],
)
def test_node_ids_refuse(t11, rows, base, message):
    with pytest.raises(ValueError, match=message):
        t11.node_ids(torch.tensor(rows), base=base)


def test_integer_paths_keep_the_labels_of_the_data():
    # Species 0 and 2 share family 1; breadth-first order differs from label order on both levels.
    rows = [(1, 0), (0, 1), (1, 2)]
    tax = Taxonomy.from_paths(rows)
    assert tax.names == ("1", "0", "0", "2", "1")
    assert not tax.natural_labels
    assert tax.label.tolist() == [1, 0, 0, 2, 1]
    assert tax.label_to_node.tolist() == [1, 0, 2, 4, 3]
    ids = tax.node_ids(torch.tensor(rows)).tolist()
    assert [tax.path_of(i) for i in ids] == [("1", "0"), ("0", "1"), ("1", "2")]
    scores = tax.cat_levels([torch.tensor([[10.0, 11.0]]), torch.tensor([[20.0, 21.0, 22.0]])])
    assert scores.tolist() == [[11.0, 10.0, 20.0, 22.0, 21.0]]


@pytest.mark.parametrize("seed", range(5))
def test_labels_in_any_order_against_a_table(seed):
    generator = torch.Generator().manual_seed(seed)
    top = torch.cat([torch.arange(4), torch.randint(4, (8,), generator=generator)])
    low = torch.randperm(12, generator=generator)
    rows = torch.stack([top[torch.randperm(12, generator=generator)], low], 1)
    names = [[f"t{i}" for i in range(4)], [f"l{i}" for i in range(12)]]
    tax = Taxonomy.from_paths(rows, names=names)
    for (up, down), node in zip(rows.tolist(), tax.node_ids(rows).tolist(), strict=True):
        assert tax.path_of(node) == (f"t{up}", f"l{down}")
    tops, lows = torch.arange(4.0)[None], 100 + torch.arange(12.0)[None]
    scores = tax.cat_levels([tops, lows])[0].tolist()
    assert [f"t{s:.0f}" if s < 100 else f"l{s - 100:.0f}" for s in scores] == list(tax.names)


def test_integer_paths_fine_to_coarse_from_one_with_names():
    rows = [(3, 1), (1, 2), (2, 1), (1, -1)]
    with pytest.raises(ValueError, match="missing levels|hole|two parents"):
        Taxonomy.from_paths(rows, index_base=1)
    tax = Taxonomy.from_paths(
        [(3, 1), (1, 2), (2, 1)], order="fine_to_coarse", index_base=1, names=[["cat", "dog"], ["pug", "lynx", "puma"]]
    )
    assert tax.to_paths() == [("cat", "puma"), ("cat", "lynx"), ("dog", "pug")]
    assert tax.node_ids(torch.tensor([[1, 3], [2, 1]]), base=1).tolist() == tax.indices(["puma", "pug"]).tolist()
    tensor_rows = torch.tensor([(3, 1), (1, 2), (2, 1)])
    assert Taxonomy.from_paths(tensor_rows, order="fine_to_coarse", index_base=1).parent.equal(tax.parent)


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ([(1, 1), (2, 2)], {}, r"level 1 must be 0\.\.1 without gaps, got 2 labels in 1\.\.2; index_base=1\?"),
        ([(0, 0), (1, 1)], {"index_base": 1}, "index_base=0"),
        ([(0, 0), (0, 2)], {}, r"level 2 must be 0\.\.1 without gaps, got 2 labels in 0\.\.2"),
        ([(0, 0), (1, 1), (0, 1)], {}, r"label 1 of level 2 has two parents, 1 and 0 \(row 2\).*other order"),
        ([(0, -1, 1)], {}, "row 0 has a hole"),
        ([(0, 0)], {"names": [["a"], ["x", "y"]]}, "names must hold 1 names for level 2"),
        ([(0, 0)], {"names": [["a"]]}, "names must hold 1 names for level 2"),
        ([("a", "b")], {"names": [["a"]]}, "names goes with"),
        ([("a", "b")], {"index_base": 1}, "index_base=1 goes with"),
        ([("a", "b")], {"index_base": 2}, "index_base must be 0 or 1"),
        ([("a", "b")], {"order": "up"}, "order must be one of 'coarse_to_fine', 'fine_to_coarse', got 'up'"),
        ([("a", "", "b")], {}, "row 0 has a hole"),
        ([("a",), ("", "")], {}, "row 1 is empty"),
        ([], {}, "at least one path"),
    ],
)
def test_paths_refuse(rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_paths(rows, **kwargs)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([("a", 1)], "names only or integer labels only"), (["ab"], "single str"), ([(0.5,)], "names or integers")],
)
def test_paths_of_wrong_type(rows, message):
    with pytest.raises(TypeError, match=message):
        Taxonomy.from_paths(rows)


def test_ragged_and_repeated_paths():
    nan = float("nan")
    rows = [("a", "x", None), ("a", "x"), ("b", None, None), ("a", nan, nan), ("c", "d", "e")]
    tax = Taxonomy.from_paths(rows)
    assert tax.to_paths() == [("a", "x"), ("b",), ("c", "d", "e")]
    upward = [(None, "x", "a"), ("x", "a", None), ("b", "", ""), ("e", "d", "c")]
    assert Taxonomy.from_paths(upward, order="fine_to_coarse") == tax


def test_cat_levels_is_concatenation_in_natural_order(t11):
    levels = [torch.randn(2, size) for size in t11.level_sizes]
    assert torch.equal(t11.cat_levels(levels), torch.cat(levels, 1))
    with pytest.raises(ValueError, match=r"widths \(3, 4, 4\), got \(3, 4\)"):
        t11.cat_levels(levels[:2])


# Synthetic trees


@pytest.mark.parametrize("rate", [None, 0.25, 0.4])
def test_synthetic_sizes_and_lone_rate(rate):
    sizes = (2, 5, 40, 90)
    tax = Taxonomy.synthetic(sizes, rate, seed=1)
    assert tax.level_sizes == sizes
    assert tax.num_leaves == 90
    if rate is not None:
        assert int((tax.n_siblings[tax.leaf] == 0).sum()) == round(rate * 90)
    assert tax == Taxonomy.synthetic(sizes, rate, seed=1)
    assert tax != Taxonomy.synthetic(sizes, rate, seed=2)


def test_synthetic_has_the_lone_leaves_of_inaturalist():
    tax = Taxonomy.synthetic((3, 13, 51, 273, 1103, 4900, 10000), lone_child_rate=0.3175)
    assert tax.num_nodes == 16343
    assert int((tax.n_siblings[tax.leaf] == 0).sum()) == 3175


def test_synthetic_edges():
    assert Taxonomy.synthetic((1, 1, 1), 1.0).num_levels == 3
    assert Taxonomy.synthetic((4,)).num_leaves == 4
    assert Taxonomy.synthetic((3, 6), 0.0).group_size.tolist()[1:4] == [2, 2, 2]


@pytest.mark.parametrize(
    ("sizes", "rate", "message"),
    [
        ((), None, "level_sizes"),
        ((3, 2), None, "never shrink"),
        ((0, 2), None, "positive"),
        ((2, 3), 1.5, r"\[0, 1\]"),
        ((2, 3), 1.0, r"must lie in \[0.3333, 0.3333\] for 3 leaves below 2 parents"),
        ((2, 2), 0.0, r"must lie in \[1, 1\]"),
        ((3,), 0.5, "at least two levels"),
    ],
)
def test_synthetic_refuses(sizes, rate, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy.synthetic(sizes, rate)


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    Taxonomy.synthetic((2, 5), None)
    assert torch.equal(torch.rand(1), first)


@pytest.mark.parametrize("ignore_index", [-100, -1])
def test_rows_without_a_label(ignore_index, t11):
    rows = torch.tensor([[0, 0, 0], [ignore_index] * 3, [1, 3, ignore_index], [2, -1, ignore_index]])
    nodes = t11.node_ids(rows, ignore_index=ignore_index)
    assert nodes.tolist() == [7, ignore_index, 6, 2]
    with pytest.raises(ValueError, match=r"row 1: known levels must come first, .* a row of -100 stands for a sample"):
        t11.node_ids(torch.tensor([[0, 0, 0], [-1, -1, -1]]))
    with pytest.raises(ValueError, match=r"label -2 of level 1 must lie in"):
        t11.node_ids(torch.tensor([[-2, 0, 0]]))
    with pytest.raises(ValueError, match=r"ignore_index must be negative, since labels are not, got 3"):
        t11.node_ids(torch.tensor([[0, 0, 0]]), ignore_index=3)
