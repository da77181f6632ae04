"""Tree cuts: enumeration, sampling, published cuts, and the losses against slow references."""

import copy
import importlib.util
import json
import math
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from hier_losses.taxonomy import Taxonomy
from hier_losses.treecuts import (
    TreeCut,
    TreeCuts,
    count_cuts,
    cut_at,
    node_classification_loss,
    sample_cut,
    sample_cuts,
    treecut_loss,
)

SEEDS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def slow():
    spec = importlib.util.spec_from_file_location("metric_oracles", Path(__file__).with_name("_metric_oracles.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Slow


def small_tree(seed, random_tree):
    return random_tree(seed, num_nodes=9)


def test_t11_has_nine_cuts(t11, slow):
    assert count_cuts(t11) == 9
    cuts = [cut_at(t11, i).nodes.tolist() for i in range(9)]
    assert sorted(cuts) == sorted(slow(t11).cuts())


@pytest.mark.parametrize("seed", SEEDS)
def test_all_cuts(seed, random_tree, slow):
    tax = small_tree(seed, random_tree)
    expected = slow(tax).cuts()
    assert count_cuts(tax) == len(expected)
    assert sorted(cut_at(tax, i).nodes.tolist() for i in range(len(expected))) == sorted(expected)


def test_counts_of_simple_trees():
    assert count_cuts(Taxonomy.from_paths([("a",)])) == 1
    assert count_cuts(Taxonomy.from_paths([("a", "b", "c")])) == 3
    deep = Taxonomy.from_paths([tuple(f"c{i}" for i in range(18))])
    assert count_cuts(deep) == 18
    wide = Taxonomy.from_paths([(f"t{i}", f"l{i}{j}") for i in range(200) for j in range(2)])
    assert count_cuts(wide) == 2**200


@pytest.mark.parametrize("seed", SEEDS)
def test_member_of_every_node(seed, random_tree, slow):
    tax = small_tree(seed, random_tree)
    reference = slow(tax)
    for i in range(count_cuts(tax)):
        cut = cut_at(tax, i)
        members = cut.nodes.tolist()
        assert members == sorted(members)
        assert len(cut) == len(members)
        for node in reference.nodes:
            above = [v for v in reference.path[node] if v in members]
            assert cut.member[node].item() == (members.index(above[0]) if above else -1)
        assert torch.equal(cut.leaf_to_member, cut.member[tax.leaf])
        assert (cut.leaf_to_member >= 0).all()


def test_what_is_no_cut(t11):
    with pytest.raises(ValueError, match="leaf c has 0 members"):
        TreeCut(t11, [0, 1])
    with pytest.raises(ValueError, match="leaf a > a1 > x has 2 members"):
        TreeCut(t11, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="leaf c has 2 members"):
        TreeCut(t11, [0, 1, 2, 2])
    with pytest.raises(ValueError, match=r"nodes must lie in \[0, 11\)"):
        TreeCut(t11, [0, 1, 11])
    with pytest.raises(ValueError, match=r"nodes must lie in \[0, 11\)"):
        TreeCut(t11, [-1, 0])
    with pytest.raises(ValueError, match="leaf c has 0 members"):
        TreeCut(t11, [])
    with pytest.raises(ValueError, match="at least one cut"):
        TreeCuts(t11, [])
    for index in (-1, 9):
        with pytest.raises(ValueError, match=r"index must lie in \[0, 9\)"):
            cut_at(t11, index)


def test_sampler_limits(random_tree):
    tax = random_tree(4)
    assert sample_cut(tax, 0.0).nodes.tolist() == tax.leaf.tolist()
    assert sample_cut(tax, 1.0).nodes.tolist() == list(range(tax.level_sizes[0]))
    for p in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
            sample_cut(tax, p)


def test_sampler_probabilities(t11, slow):
    """Frequencies of the nine cuts against the product of the choices that lead to each."""
    reference, p, draws = slow(t11), 0.3, 4000
    generator = torch.Generator().manual_seed(0)
    seen = Counter(tuple(sample_cut(t11, p, generator).nodes.tolist()) for _ in range(draws))
    total = 0.0
    for cut in reference.cuts():
        probability = 1.0
        for node in reference.nodes:
            visited = not any(v in cut for v in reference.path[node][:-1])
            if visited and reference.children[node]:
                probability *= p if node in cut else 1 - p
        total += probability
        spread = math.sqrt(probability * (1 - probability) / draws)
        assert abs(seen[tuple(cut)] / draws - probability) < 4.5 * spread
    assert total == pytest.approx(1)
    assert sum(seen.values()) == draws


def test_sampler_follows_its_generator(random_tree):
    tax = random_tree(5)
    state = torch.random.get_rng_state()
    first = [sample_cut(tax, 0.4, torch.Generator().manual_seed(3)).nodes.tolist() for _ in range(2)]
    assert first[0] == first[1]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sample_cuts_are_different_and_repeatable():
    tax = Taxonomy.synthetic((3, 9, 40), seed=2)
    cuts = sample_cuts(tax)
    assert len(cuts) == 25
    assert len({tuple(nodes) for nodes in cuts.node_ids}) == 25
    assert sample_cuts(tax).node_ids == cuts.node_ids
    assert sample_cuts(tax, seed=1).node_ids != cuts.node_ids
    assert sum(map(len, cuts[:5])) < sum(map(len, cuts[20:]))


@pytest.mark.parametrize("rates", [(0.5,), (0.0,), (1.0,), (0.0, 1.0, 0.5)])
def test_every_cut_can_be_asked_for(t11, rates):
    """The search ends even where the rates alone would give the same cut forever."""
    cuts = sample_cuts(t11, rates=rates, per_rate=9 // len(rates))
    assert len({tuple(nodes) for nodes in cuts.node_ids}) == len(cuts) == 9


def test_more_cuts_than_exist(t11):
    with pytest.raises(ValueError, match="ask for 10 different cuts, the tree has 9"):
        sample_cuts(t11, rates=(0.5,), per_rate=10)
    with pytest.raises(ValueError, match="ask for 25 different cuts, the tree has 9"):
        sample_cuts(t11)
    with pytest.raises(ValueError, match="at least one cut"):
        sample_cuts(t11, rates=())
    with pytest.raises(ValueError, match="at least one cut"):
        sample_cuts(t11, per_rate=0)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        sample_cuts(t11, rates=(1.5,), per_rate=1)


def test_json_round_trip(t11, tmp_path):
    cuts = sample_cuts(t11, per_rate=1)
    cuts.to_json(tmp_path / "cuts.json")
    again = TreeCuts.from_json(tmp_path / "cuts.json", t11)
    assert again.node_ids == cuts.node_ids
    assert torch.equal(again.leaf_to_member, cuts.leaf_to_member)
    assert again.leaf_to_member.shape == (5, 7)
    other = Taxonomy.from_paths([("a", "x"), ("b",)])
    with pytest.raises(ValueError, match="tax must be the taxonomy of the stored cuts"):
        TreeCuts.from_json(tmp_path / "cuts.json", other)
    renamed = Taxonomy([name.upper() for name in t11.names], t11.parent.tolist())
    with pytest.raises(ValueError, match="tax must be the taxonomy of the stored cuts"):
        TreeCuts.from_json(tmp_path / "cuts.json", renamed)


def test_container(t11, random_tree):
    cuts = sample_cuts(t11, per_rate=1)
    assert copy.deepcopy(cuts) is cuts
    assert pickle.loads(pickle.dumps(cuts)).node_ids == cuts.node_ids
    assert cuts.to("cpu") is cuts
    assert cuts[0].to("cpu") is cuts[0]
    assert "5 cuts" in repr(cuts)
    with pytest.raises(ValueError, match="given taxonomy"):
        TreeCuts(random_tree(0), cuts)


TREES = {"cifar100": (147, 100), "sun": (342, 324), "imagenet": (1367, 1000), "rarespecies": (1023, 400)}


@pytest.mark.parametrize("name", TREES)
def test_published_cuts(name, published_tree, tree_file):
    content = published_tree(name)
    tax = Taxonomy.from_json(tree_file(name))
    assert (tax.num_nodes, tax.num_leaves) == TREES[name]
    cuts = TreeCuts.from_text_cuts(tree_file(name), tax)
    assert len(cuts) == 25
    assert len({tuple(nodes) for nodes in cuts.node_ids}) == 25
    by_id = {node["id"]: node for node in content["nodes"]}
    leaf_of = {by_id[key]["name"]: position for position, key in enumerate(content["leaves"])}
    for cut, stored in zip(cuts, content["treecuts"], strict=True):
        assert len(cut) == len(stored["text"])
        members = cut.nodes.tolist()
        texts = [tax.names[members[m]] for m in cut.leaf_to_member.tolist()]
        for leaf, text in zip(tax.leaf_names, texts, strict=True):
            expected = stored["text"][stored["leaf_to_label"][leaf_of[leaf]]]
            # Twelve texts of the ImageNet tree repeat; their node names end in a number.
            assert text.replace("_", " ").rstrip("0123456789").strip() == expected.rstrip("0123456789").strip()
        parts = Counter(cut.leaf_to_member.tolist()).values()
        assert sorted(parts) == sorted(Counter(stored["leaf_to_label"]).values())


def test_text_cuts_resolve_repeated_texts(t11, tmp_path):
    nodes = [{"id": "r", "name": "root", "parent": None}]
    for v in range(11):
        parent = t11.parent[v].item()
        nodes.append({"id": v, "name": t11.names[v], "parent": "r" if parent < 0 else parent, "text": "same"})
    leaves = [10, 9, 8, 7, 5, 4, 2]
    source = {"nodes": nodes, "leaves": leaves, "treecuts": []}
    wanted = [[0, 1, 2], [2, 3, 4, 5, 6], [2, 4, 5, 7, 8, 9, 10]]
    for members in wanted:
        member = {leaf: next(i for i, v in enumerate(members) if v in t11.paths[leaf]) for leaf in leaves}
        labels = [member[leaf] for leaf in leaves]
        source["treecuts"].append({"text": ["same"] * len(members), "leaf_to_label": labels})
    # b and b1 hold the same leaves; with equal texts the upper one is taken.
    assert TreeCuts.from_text_cuts(source, t11).node_ids == [[0, 1, 2], [1, 2, 3, 4, 5], wanted[2]]
    next(node for node in nodes if node["id"] == 1)["text"] = "other"
    source["treecuts"] = source["treecuts"][1:]
    assert TreeCuts.from_text_cuts(source, t11).node_ids == wanted[1:]
    (tmp_path / "cuts.json").write_text(json.dumps(source))
    assert TreeCuts.from_text_cuts(tmp_path / "cuts.json", t11).node_ids == wanted[1:]


def test_text_cuts_that_do_not_fit(t11):
    nodes = [{"id": v, "name": t11.names[v], "parent": None if u < 0 else u} for v, u in enumerate(t11.parent.tolist())]
    source = {"nodes": nodes, "leaves": t11.leaf.tolist()}
    # As many leaves as a has, from its first on, but b11 instead of y.
    source["treecuts"] = [{"text": ["a", "b", "c"], "leaf_to_label": [2, 0, 0, 0, 1, 0, 1]}]
    with pytest.raises(ValueError, match=r"treecuts\[0\]: no node with text 'a' holds exactly its 4 leaves"):
        TreeCuts.from_text_cuts(source, t11)
    source["treecuts"] = [{"text": ["a", "B", "c"], "leaf_to_label": [2, 0, 0, 0, 0, 1, 1]}]
    with pytest.raises(ValueError, match="no node with text 'B'"):
        TreeCuts.from_text_cuts(source, t11)
    source["treecuts"] = [{"text": ["a", "b", "c", "d"], "leaf_to_label": [2, 0, 0, 0, 0, 1, 1]}]
    with pytest.raises(ValueError, match="no node with text 'd' holds exactly its 0 leaves"):
        TreeCuts.from_text_cuts(source, t11)
    with pytest.raises(ValueError, match="tax must have the 11 nodes of the file"):
        TreeCuts.from_text_cuts(source, Taxonomy.from_paths([("a",)]))


def treecut_reference(slow, logits, cut, target):
    members, terms = cut.nodes.tolist(), []
    for z, y in zip(logits.tolist(), target.tolist(), strict=True):
        above = [v for v in slow.path[y] if v in members]
        if above:
            terms.append(math.log(sum(math.exp(z[v]) for v in members)) - z[above[0]])
        else:
            terms.append(None)
    return terms


def node_reference(slow, logits, target, skip):
    groups = []
    for u in [-1, *slow.nodes]:
        children = slow.children[u]
        if not children or (skip and len(children) == 1):
            continue
        terms = []
        for z, y in zip(logits.tolist(), target.tolist(), strict=True):
            on_path = [c for c in children if c in slow.path[y]]
            if on_path:
                terms.append(math.log(sum(math.exp(z[c]) for c in children)) - z[on_path[0]])
        if terms:
            groups.append(sum(terms) / len(terms))
    return sum(groups) / len(groups) if groups else 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_treecut_loss(seed, random_tree, slow, close):
    tax = random_tree(seed)
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(tax.num_nodes)
    logits = torch.randn(len(target), tax.num_nodes, dtype=torch.float64, generator=generator)
    for p in (0.0, 0.3, 0.8, 1.0):
        cut = sample_cut(tax, p, generator)
        terms = treecut_reference(slow(tax), logits, cut, target)
        known = [term for term in terms if term is not None]
        close(treecut_loss(logits, cut, target), sum(known) / len(known))
        close(treecut_loss(logits, cut, target, reduction="sum"), sum(known))
        close(treecut_loss(logits, cut, target, reduction="none"), [term or 0.0 for term in terms])


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_node_classification_loss(seed, skip, random_tree, slow, close):
    tax = random_tree(seed)
    generator = torch.Generator().manual_seed(seed)
    for batch in (1, 3, 12):
        target = torch.randint(tax.num_nodes, (batch,), generator=generator)
        logits = torch.randn(batch, tax.num_nodes, dtype=torch.float64, generator=generator)
        loss = node_classification_loss(logits, target, tax, skip_single_child=skip)
        close(loss, node_reference(slow(tax), logits, target, skip))


def test_losses_of_a_flat_tree_are_cross_entropy(close):
    tax = Taxonomy.from_paths([(name,) for name in "abcde"])
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 3, 4, 4])
    close(treecut_loss(logits, sample_cut(tax, 0.5), target), cross_entropy(logits, target))
    close(node_classification_loss(logits, target, tax), cross_entropy(logits, target))


def test_leaf_cut_is_leaf_cross_entropy(random_tree, close):
    tax = random_tree(2)
    logits = torch.randn(tax.num_leaves, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = treecut_loss(logits, sample_cut(tax, 0.0), tax.leaf)
    close(loss, cross_entropy(logits[:, tax.leaf], torch.arange(tax.num_leaves)))


@pytest.mark.parametrize("seed", range(4))
def test_weights_and_ignored_samples(seed, random_tree, close):
    """Each inner mean is torch's weighted cross-entropy over the samples that it sees."""
    tax = random_tree(seed)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(tax.num_nodes, (12,), generator=generator)
    logits = torch.randn(12, tax.num_nodes, dtype=torch.float64, generator=generator)
    weight = torch.rand(tax.num_nodes, dtype=torch.float64, generator=generator)
    counts = torch.tensor([1, 2, 1, 3, 0, 1, 1, 2, 1, 1, 1, 1])
    gaps = torch.where(torch.arange(12) % 5 == 3, -100, target)
    again = torch.arange(12).repeat_interleave(torch.where(gaps == -100, 0, counts))
    cut = sample_cut(tax, 0.3, generator)
    member = {node: i for i, node in enumerate(cut.nodes.tolist())}
    label = torch.tensor([next((member[v] for v in tax.paths[y].tolist() if v in member), -100) for y in target])[again]
    expected = cross_entropy(logits[again][:, cut.nodes], label, weight[cut.nodes]) if (label >= 0).any() else 0.0
    options = {"class_weights": weight, "sample_weight": counts.double()}
    close(treecut_loss(logits, cut, gaps, **options), expected)
    means = []
    for up in range(-1, tax.num_nodes):
        children = (tax.parent == up).nonzero()[:, 0].tolist()
        rows = [(i, v) for i in again.tolist() for v in tax.paths[target[i]].tolist() if v in children]
        if len(children) > 1 and rows:
            scores = logits[[i for i, _ in rows]][:, children]
            means.append(cross_entropy(scores, torch.tensor([children.index(v) for _, v in rows]), weight[children]))
    expected = sum(means) / len(means) if means else 0.0
    close(node_classification_loss(logits, gaps, tax, **options), expected)


def test_classes_names_and_pixels(t11, close):
    z = torch.randn(2, 11, 3, dtype=torch.float64)
    target = torch.tensor([[7, 8, -1], [10, 2, 3]])
    flat, cut = z.movedim(1, -1).reshape(6, 11), sample_cut(t11, 0.3, torch.Generator().manual_seed(0))
    found = treecut_loss(z, cut, target, ignore_index=-1, reduction="none")
    close(found.flatten(), treecut_loss(flat, cut, target.flatten(), ignore_index=-1, reduction="none"))
    close(
        node_classification_loss(z, target, t11, ignore_index=-1),
        node_classification_loss(flat, target.flatten(), t11, ignore_index=-1),
    )
    by_id = node_classification_loss(flat[:2], torch.tensor([7, 10]), t11)
    close(node_classification_loss(flat[:2], ["x", "b12"], t11), by_id)
    close(node_classification_loss(flat[:2], torch.tensor([1, 0]), t11, classes=torch.tensor([10, 7])), by_id)


def test_gradients(random_tree):
    tax = random_tree(1)
    logits = torch.randn(5, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    target = torch.tensor([0, tax.num_nodes - 1, 1, 2, int(tax.leaf[0])])
    cut = sample_cut(tax, 0.3, torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda z: treecut_loss(z, cut, target), logits)
    assert torch.autograd.gradcheck(lambda z: node_classification_loss(z, target, tax), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, close):
    tax = Taxonomy.synthetic((3, 9, 200), seed=0)
    logits = (4 * torch.randn(32, tax.num_nodes, generator=torch.Generator().manual_seed(0))).to(dtype)
    target = tax.leaf[torch.arange(32) * 6]
    cut = sample_cut(tax, 0.3, torch.Generator().manual_seed(0))
    for loss in (lambda z: treecut_loss(z, cut, target), lambda z: node_classification_loss(z, target, tax)):
        assert loss(logits).dtype == torch.float32
        close(loss(logits), loss(logits.double()), rtol=1e-6)


def test_empty_batch_and_labels_above_the_cut(t11):
    empty = torch.zeros(0, 11, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    leaves = sample_cut(t11, 0.0)
    for loss in (treecut_loss(empty, leaves, none), node_classification_loss(empty, none, t11)):
        assert loss.item() == 0
        loss.backward()
    logits = torch.randn(2, 11, requires_grad=True)
    loss = treecut_loss(logits, leaves, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0
    lone = Taxonomy.from_paths([("a", "b")])
    assert node_classification_loss(torch.randn(1, 2), torch.tensor([1]), lone).item() == 0


def test_nan_propagates(t11):
    logits = torch.zeros(2, 11)
    logits[0, 7] = torch.nan
    target = torch.tensor([7, 10])
    assert treecut_loss(logits, sample_cut(t11, 0.0), target).isnan()
    assert node_classification_loss(logits, target, t11).isnan()


def test_bad_input_of_the_losses(t11):
    cut = sample_cut(t11, 0.5)
    good, target = torch.zeros(2, 11), torch.tensor([7, 10])
    losses = [lambda z, y: treecut_loss(z, cut, y), lambda z, y: node_classification_loss(z, y, t11)]
    for loss in losses:
        with pytest.raises(ValueError, match=r"logits must have shape \(batch, 11\)"):
            loss(torch.zeros(2, 10), target)
        with pytest.raises(ValueError, match=r"target must lie in \[0, 11\), got 11"):
            loss(good, torch.tensor([0, 11]))
        with pytest.raises(ValueError, match=r"target must lie in \[0, 11\), got -1"):
            loss(good, torch.tensor([-1, 0]))
        with pytest.raises(ValueError, match="target must hold integer node ids"):
            loss(good, torch.tensor([1.0, 2.0]))
        with pytest.raises(ValueError, match="target must have shape"):
            loss(good, torch.tensor([1]))
    with pytest.raises(ValueError, match="reduction must be one of"):
        treecut_loss(good, cut, target, reduction="max")


@pytest.mark.compile
def test_compile(t11, close):
    cut = sample_cut(t11, 0.3, torch.Generator().manual_seed(0))
    for loss in (lambda z, y: treecut_loss(z, cut, y), lambda z, y: node_classification_loss(z, y, t11)):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for target in (torch.tensor([7, 10, 2, 3]), torch.tensor([0, 9, -100, 7, 4, 3, 8])):
            logits = torch.randn(len(target), 11, generator=torch.Generator().manual_seed(0))
            ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            close(compiled(ours, target), loss(plain, target), rtol=1e-6)
            compiled(ours, target).backward()
            loss(plain, target).backward()
            close(ours.grad, plain.grad, rtol=1e-5, atol=1e-7)
        assert compiled(torch.zeros(2, 11), torch.tensor([-1, 7])).isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees(random_tree, close):
    tax = random_tree(3)
    cut = sample_cut(tax, 0.4, torch.Generator().manual_seed(0))
    logits = torch.randn(8, tax.num_nodes, dtype=torch.float64)
    target = torch.arange(8) % tax.num_nodes
    close(treecut_loss(logits.cuda(), cut, target.cuda()), treecut_loss(logits, cut, target))
    close(node_classification_loss(logits.cuda(), target.cuda(), tax), node_classification_loss(logits, target, tax))
