"""Decoders against slow references, their laws, and the worked example of the eleven-node tree."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from hier_losses import decoding as D
from hier_losses.decoding import (
    bottom_up,
    crm,
    crm_risk,
    joint_path,
    joint_path_scores,
    level_argmax,
    threshold,
    top_down,
    top_k_paths,
)
from hier_losses.path_ops import end_of_paths, extend_paths, paths_of
from hier_losses.probabilities import (
    extended_level,
    leaf_columns,
    leaf_to_node_logits,
    level_probabilities,
    node_probabilities,
)
from hier_losses.taxonomy import Taxonomy

SEEDS = [0, 1, 2, 3, 4, 5]
NODE_DECODERS = [level_argmax, top_down, joint_path]
LEAF_DECODERS = [bottom_up, crm]


@pytest.fixture(scope="module")
def slow():
    spec = importlib.util.spec_from_file_location("metric_oracles", Path(__file__).with_name("_metric_oracles.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Slow


@pytest.fixture(params=[*SEEDS, "flat", "one", "chain"])
def case(request, random_tree, slow):
    if request.param == "flat":
        tax = Taxonomy.from_paths([(name,) for name in "abcd"])
    elif request.param == "one":
        tax = Taxonomy.from_paths([("a",)])
    elif request.param == "chain":
        tax = Taxonomy.from_paths([tuple(f"c{i}" for i in range(18)), ("c0", "side"), ("top",)])
    else:
        tax = random_tree(request.param)
    seed = request.param if isinstance(request.param, int) else 99
    logits = 2 * torch.randn(7, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return tax, slow(tax), logits


@pytest.fixture
def z11():
    return torch.sin(torch.arange(11, dtype=torch.float64) + 1)[None]


def test_t11_decoders(t11, z11):
    assert level_argmax(z11, t11).tolist() == [[1, 6, 7]]
    assert bottom_up(z11, t11).tolist() == [[0, 3, 7]]
    assert top_down(z11, t11).tolist() == [[1, 6, 9]]
    assert joint_path(z11, t11).tolist() == [[0, 3, 7]]
    scores = dict(zip(t11.leaf.tolist(), joint_path_scores(z11, t11)[0].tolist(), strict=True))
    assert scores[7] == pytest.approx(-4.262015, abs=1e-6)
    assert scores[9] == pytest.approx(-4.313779, abs=1e-6)


def test_t11_risk(t11, z11):
    risk = crm_risk(z11, t11)[0]
    assert risk[7].item() == pytest.approx(1.356199, abs=1e-6)
    assert risk[8].item() == pytest.approx(1.514757, abs=1e-6)
    assert risk[t11.leaf].argmin() == t11.leaf.tolist().index(7)
    assert crm(z11, t11).tolist() == [[0, 3, 7]]


def test_level_argmax(case):
    tax, slow, logits = case
    assert level_argmax(logits, tax).tolist() == [slow.level_argmax(z) for z in logits.tolist()]


def test_bottom_up(case):
    tax, slow, logits = case
    expected = [slow.bottom_up(z) for z in logits.tolist()]
    assert bottom_up(logits, tax).tolist() == expected
    assert bottom_up(logits[:, tax.leaf], tax).tolist() == expected


def test_top_down(case):
    tax, slow, logits = case
    assert top_down(logits, tax).tolist() == [slow.top_down(z) for z in logits.tolist()]


def test_joint_path(case, close):
    tax, slow, logits = case
    scores = joint_path_scores(logits, tax)
    expected = [slow.joint_scores(z) for z in logits.tolist()]
    close(scores, [[row[k] for k in tax.leaf.tolist()] for row in expected])
    assert joint_path(logits, tax).tolist() == [slow.pad(max(row, key=row.get)) for row in expected]


@pytest.mark.parametrize("distance", ["height", "edge"])
def test_risk(case, distance, close):
    tax, slow, logits = case
    expected = [[slow.risk(z, v, distance) for v in slow.nodes] for z in logits.tolist()]
    close(crm_risk(logits, tax, distance=distance), expected, atol=1e-12)


def test_crm_leaves_is_the_dense_argmin(case):
    tax, slow, logits = case
    cost = torch.tensor([[slow.distance(a, b) for b in slow.leaves] for a in slow.leaves], dtype=torch.float64)
    dense = tax.leaf[(logits[:, tax.leaf].softmax(1) @ cost).argmin(1)]
    assert torch.equal(crm(logits, tax), paths_of(dense, tax))


@pytest.mark.parametrize("distance", ["height", "edge"])
def test_crm_nodes(case, distance):
    tax, slow, logits = case
    expected = []
    for z in logits.tolist():
        risks = {v: slow.risk(z, v, distance) for v in [-1, *slow.nodes]}
        expected.append(slow.pad(min(risks, key=risks.get)))
    assert crm(logits, tax, candidates="nodes", distance=distance).tolist() == expected


def test_crm_nodes_never_stops_early_under_height(case):
    tax, _, logits = case
    assert torch.equal(crm(logits, tax, candidates="nodes"), crm(logits, tax))


def test_crm_edge_follows_the_majority(random_tree):
    tax = random_tree(3)
    logits = torch.randn(200, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nodes = crm(logits, tax, candidates="nodes", distance="edge")
    assert torch.equal(nodes, threshold(logits, tax, 0.5))
    assert (end_of_paths(nodes) == -1).any()
    stopped = end_of_paths(nodes)
    assert ((stopped >= 0) & (tax.leaf_index[stopped.clamp(min=0)] < 0)).any()


@pytest.mark.parametrize("tau", [0.05, 0.3, 0.5, 0.9])
def test_threshold(case, tau):
    tax, slow, logits = case
    assert threshold(logits, tax, tau).tolist() == [slow.threshold(z, tau) for z in logits.tolist()]


def test_threshold_limits(case, random_tree):
    tax, _, logits = case
    assert torch.equal(threshold(logits, tax, 1e-12), threshold(logits, tax, 1e-13))
    deep = (threshold(logits, tax, 0.2) >= 0).sum(1)
    assert (deep >= (threshold(logits, tax, 0.6) >= 0).sum(1)).all()


def test_threshold_one_keeps_a_lone_top_node():
    tax = Taxonomy.from_paths([("top", "mid", str(i)) for i in range(37)])
    for seed in range(20):
        logits = torch.randn(50, tax.num_nodes, generator=torch.Generator().manual_seed(seed))
        assert threshold(logits, tax, 1.0).tolist() == [[0, 1, -1]] * 50


def test_conditional_probabilities(case, close):
    tax, slow, logits = case
    expected = []
    for z in logits.tolist():
        row = []
        for v in slow.nodes:
            value = 1.0
            for u in slow.path[v]:
                group = slow.children[slow.parents[u]]
                value *= math.exp(z[u]) / sum(math.exp(z[s]) for s in group)
            row.append(value)
        expected.append(row)
    p = node_probabilities(logits, tax, probabilities="conditional")
    close(p, expected)
    close(p[:, tax.leaf].sum(1), torch.ones(len(p)))
    reached = threshold(logits, tax, 0.4, probabilities="conditional")
    end = end_of_paths(reached)
    assert (p.gather(1, end.clamp(min=0)[:, None])[end >= 0] >= 0.4).all()
    risk = crm_risk(logits, tax, probabilities="conditional")
    cost = torch.tensor([[slow.distance(v, k) for v in slow.nodes] for k in slow.leaves], dtype=torch.float64)
    close(risk, p[:, tax.leaf] @ cost)


def test_leaf_probabilities(case, close):
    tax, slow, logits = case
    expected = [[slow.mass(z)[v] for v in slow.nodes] for z in logits.tolist()]
    close(node_probabilities(logits, tax), expected)
    close(
        leaf_to_node_logits(logits[:, tax.leaf], tax),
        torch.tensor(expected).log().double() + logits[:, tax.leaf].logsumexp(1, keepdim=True),
        rtol=1e-5,
        atol=1e-5,
    )


def test_leaf_to_node_logits_gives_marginals_on_every_partition(case, close):
    tax, _, logits = case
    scores = leaf_to_node_logits(logits[:, tax.leaf], tax)
    mass = node_probabilities(logits, tax)
    for level, p in enumerate(level_probabilities(scores, tax), start=1):
        close(p, mass[:, extended_level(tax, level)])


def test_level_probabilities(case, close):
    tax, slow, logits = case
    for level, p in enumerate(level_probabilities(logits, tax), start=1):
        classes = slow.level(level)
        assert extended_level(tax, level).tolist() == classes
        assert sorted(k for v in classes for k in slow.leaves_below[v]) == slow.leaves
        close(p, [[math.exp(z[v]) / sum(math.exp(z[u]) for u in classes) for v in classes] for z in logits.tolist()])


def test_top_k_paths(case):
    tax, slow, logits = case
    k = min(5, tax.num_leaves)
    expected = [[slow.pad(v) for v in sorted(slow.leaves, key=lambda v: -z[v])[:k]] for z in logits.tolist()]
    ranked = top_k_paths(logits, tax, k)
    assert ranked.tolist() == expected
    assert torch.equal(ranked[:, 0], bottom_up(logits, tax))


def test_ties_go_to_the_smaller_id(case):
    tax, slow, _ = case
    zeros = torch.zeros(2, tax.num_nodes)
    assert level_argmax(zeros, tax).tolist() == [slow.level_argmax([0.0] * tax.num_nodes)] * 2
    assert top_down(zeros, tax).tolist() == [slow.top_down([0.0] * tax.num_nodes)] * 2
    assert end_of_paths(bottom_up(zeros, tax)).tolist() == [slow.leaves[0]] * 2
    ranked = end_of_paths(top_k_paths(zeros, tax, tax.num_leaves))
    assert ranked.tolist() == [slow.leaves] * 2


def test_paths_of_and_extend(case):
    tax, slow, _ = case
    nodes = torch.arange(-1, tax.num_nodes)
    padded = paths_of(nodes, tax)
    assert padded.tolist() == [slow.pad(v) for v in nodes.tolist()]
    extended = [[-1 if v is None else v for v in slow.extend(row)] for row in padded.tolist()]
    assert extend_paths(padded, tax).tolist() == extended
    assert torch.equal(extend_paths(extend_paths(padded, tax), tax), extend_paths(padded, tax))
    assert torch.equal(end_of_paths(padded), nodes)
    assert torch.equal(end_of_paths(extend_paths(padded, tax)), nodes)


def test_permuting_siblings_does_not_matter(t11, z11):
    names = ["c", "b", "a", "b1", "a3", "a1", "a2", "b12", "b11", "y", "x"]
    parents = [-1, -1, -1, 1, 2, 2, 2, 3, 3, 5, 5]
    other = Taxonomy(names, parents)
    order = [t11.index(other.path_of(v)) for v in range(11)]
    for decode in [*NODE_DECODERS, *LEAF_DECODERS]:
        here = [t11.names[v] for v in decode(z11, t11)[0].tolist() if v >= 0]
        there = [other.names[v] for v in decode(z11[:, order], other)[0].tolist() if v >= 0]
        assert here == there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(random_tree, dtype):
    tax = random_tree(5)
    # Values that every dtype holds exactly, so that the decoders must agree exactly.
    logits = (torch.randperm(tax.num_nodes * 4, generator=torch.Generator().manual_seed(1)) % 61 / 4).view(4, -1)
    for decode in [*NODE_DECODERS, *LEAF_DECODERS]:
        assert torch.equal(decode(logits.to(dtype), tax), decode(logits.double(), tax))
    assert level_probabilities(logits.to(dtype), tax)[0].dtype == torch.float32
    assert node_probabilities(logits.to(dtype), tax).dtype == torch.float32


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(case, batch):
    tax, _, logits = case
    for decode in [*NODE_DECODERS, *LEAF_DECODERS]:
        assert torch.equal(decode(logits[:batch], tax), decode(logits, tax)[:batch])
    assert torch.equal(threshold(logits[:batch], tax, 0.5), threshold(logits, tax, 0.5)[:batch])
    assert top_k_paths(logits[:batch], tax, 1).shape == (batch, 1, tax.num_levels)
    nodes = crm(logits[:batch], tax, candidates="nodes", distance="edge")
    assert nodes.shape == (batch, tax.num_levels)
    assert len(level_probabilities(logits[:batch], tax)) == tax.num_levels


def test_a_leaf_at_minus_infinity_is_never_chosen(t11):
    logits = torch.full((1, 11), -torch.inf, dtype=torch.float64)
    logits[0, [1, 6, 10]] = 0.0
    for decode in [*NODE_DECODERS, *LEAF_DECODERS]:
        assert decode(logits, t11).tolist() == [[1, 6, 10]]
    assert threshold(logits, t11, 1.0).tolist() == [[1, 6, 10]]


def test_nan_reaches_the_probabilities(t11, z11):
    z11[0, 7] = torch.nan
    assert node_probabilities(z11, t11).isnan().any()
    assert joint_path_scores(z11, t11).isnan().any()


@pytest.mark.parametrize("decode", [*NODE_DECODERS, *LEAF_DECODERS, lambda z, t: threshold(z, t, 0.5)])
def test_wrong_width(t11, decode):
    for width in (10, 12):
        with pytest.raises(ValueError, match=r"logits must have shape \(batch, 11\)"):
            decode(torch.zeros(2, width), t11)


def test_leaf_scores_are_no_node_scores(t11):
    for decode in NODE_DECODERS:
        with pytest.raises(ValueError, match=r"\(batch, 11\), got \(2, 7\)"):
            decode(torch.zeros(2, 7), t11)
    with pytest.raises(ValueError, match="leaf_logits"):
        leaf_to_node_logits(torch.zeros(2, 11), t11)
    assert leaf_columns(torch.arange(11.0)[None], t11).tolist() == [[2, 4, 5, 7, 8, 9, 10]]


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.0001, math.nan])
def test_wrong_tau(t11, tau):
    with pytest.raises(ValueError, match=r"tau must lie in \(0, 1\]"):
        threshold(torch.zeros(1, 11), t11, tau)


def test_wrong_choices(t11):
    zeros = torch.zeros(1, 11)
    with pytest.raises(ValueError, match="candidates must be one of"):
        crm(zeros, t11, candidates="all")
    with pytest.raises(ValueError, match="distance must be one of"):
        crm_risk(zeros, t11, distance="cosine")
    with pytest.raises(ValueError, match="distance must be one of"):
        crm(zeros, t11, distance="cosine")
    with pytest.raises(ValueError, match="probabilities must be one of"):
        threshold(zeros, t11, 0.5, probabilities="sigmoid")
    for k in (0, 8):
        with pytest.raises(ValueError, match=r"k must lie in \[1, 7\]"):
            top_k_paths(zeros, t11, k)
    for level in (0, 4):
        with pytest.raises(ValueError, match=r"level must lie in \[1, 3\]"):
            extended_level(t11, level)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees(case):
    tax, _, logits = case
    for decode in [*NODE_DECODERS, *LEAF_DECODERS]:
        assert torch.equal(decode(logits.cuda(), tax).cpu(), decode(logits, tax))
    assert torch.equal(threshold(logits.cuda(), tax, 0.5).cpu(), threshold(logits, tax, 0.5))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_top_k_with_ties_is_a_stable_sort(seed, random_tree):
    tax = random_tree(seed)
    generator = torch.Generator().manual_seed(seed)
    for logits in (
        torch.randint(3, (20, tax.num_leaves), generator=generator).float(),
        torch.randn(20, tax.num_leaves, generator=generator),
        torch.full((2, tax.num_leaves), math.nan),
        torch.zeros(0, tax.num_leaves),
    ):
        for k in (1, 2, tax.num_leaves):
            reference = logits.sort(stable=True, dim=1, descending=True).indices[:, :k]
            assert torch.equal(D.top_k_paths(logits, tax, k), tax.paths[tax.leaf[reference]])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_joint_path_needs_no_constant(seed, random_tree):
    tax = random_tree(seed)
    logits = torch.randn(50, tax.num_nodes, generator=torch.Generator().manual_seed(seed))
    best = D.joint_path_scores(logits, tax).argmax(1)
    assert torch.equal(D.joint_path(logits, tax), tax.paths[tax.leaf[best]])
