"""Temperatures and sigmoids fitted on held-out pictures, and the probabilities that come of them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hier_lora import DECODERS, HierLoraCLIP, fit_sigmoid, fit_temperatures, label_probabilities, predict_paths
from hier_lora.predict import name_labels
from hier_losses import LabelGraph, Taxonomy, decoding
from hier_losses.probabilities import extended_level, leaf_to_node_logits


@pytest.fixture
def case():
    """Scores that are three times too sharp: the leaf is drawn from the softmax of a third of them."""
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "w"), ("c",)])
    draw = torch.Generator().manual_seed(0)
    leaf = torch.randn(4000, tax.num_leaves, generator=draw, dtype=torch.double) * 2
    target = tax.leaf[leaf.softmax(1).multinomial(1, generator=draw).squeeze(1)]
    return tax, 3 * leaf_to_node_logits(leaf, tax), target


def test_the_temperature_is_found(case):
    tax, logits, target = case
    found = fit_temperatures(logits, target, tax)
    torch.testing.assert_close(found, torch.tensor([3.0, 3.0]), rtol=0.1, atol=0)


def test_it_minimises_the_cross_entropy_of_each_level(case):
    tax, logits, target = case
    found = fit_temperatures(logits, target, tax)
    for level in range(2):
        classes = extended_level(tax, level + 1)
        path = tax.paths[target][:, level]
        column = torch.searchsorted(classes, torch.where(path < 0, target, path))

        def nll(t, classes=classes, column=column):
            return float(F.cross_entropy(logits[:, classes] / t, column))

        best = nll(float(found[level]))
        assert all(best <= nll(float(found[level]) * factor) + 1e-12 for factor in (0.9, 0.99, 1.01, 1.1))


def test_partial_labels_count_down_to_their_level(case):
    tax, logits, target = case
    partial = torch.where(tax.depth[target] == 2, tax.parent[target], target)
    shallow = fit_temperatures(logits, partial, tax)
    assert shallow[0] == fit_temperatures(logits, target, tax)[0]
    only_a = torch.full_like(target, tax.index("a"))
    assert fit_temperatures(logits, only_a, tax)[1] == 1


def test_separable_scores_stop_at_the_bound():
    tax = Taxonomy.from_paths([("a",), ("b",)])
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperatures(right, torch.tensor([0, 1]), tax).item() == pytest.approx(0.01)
    assert fit_temperatures(right, torch.tensor([1, 0]), tax).item() == pytest.approx(100)


def test_bad_calibration_input(case):
    tax, logits, target = case
    with pytest.raises(ValueError, match="same number of pictures, at least 1, got 4000 and 3"):
        fit_temperatures(logits, target[:3], tax)
    with pytest.raises(ValueError, match="at least 1, got 0 and 0"):
        fit_temperatures(logits[:0], target[:0], tax)
    with pytest.raises(ValueError, match="one shape and not be empty"):
        fit_sigmoid(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="temperature must hold one number for each of the 2 levels"):
        predict_paths(logits[:1], tax, temperature=torch.ones(3))


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder(case, decoder):
    tax, logits, _ = case
    logits, temperature = logits[:200].float(), torch.tensor([2.0, 4.0])
    found = predict_paths(logits, tax, decoder, temperature)
    kwargs = {"tau": 0.5} if decoder == "threshold" else {}
    decided = logits / 4 if decoder in ("crm", "threshold") else logits
    paths = getattr(decoding, decoder)(decided, tax, **kwargs)
    for row, one in enumerate(found):
        nodes = [v for v in paths[row].tolist() if v >= 0]
        assert list(one.nodes) == list(dict.fromkeys(nodes))
        for level, (node, p) in enumerate(zip(one.nodes, one.probabilities, strict=True)):
            classes = extended_level(tax, level + 1)
            expected = (logits[row, classes] / temperature[level]).softmax(0)[(classes == node).nonzero().item()]
            assert p == pytest.approx(float(expected), abs=1e-5)


def test_decoder_options(case):
    tax, logits, _ = case
    lax = predict_paths(logits[:50], tax, "threshold", torch.tensor([3.0, 3.0]), tau=0.01)
    strict = predict_paths(logits[:50], tax, "threshold", torch.tensor([3.0, 3.0]), tau=0.999)
    assert sum(len(one.nodes) for one in strict) < sum(len(one.nodes) for one in lax)
    undecided = next(one for one in strict if not one.nodes)
    assert str(undecided) == "(undecided)"
    predict_paths(logits[:2], tax, "crm", candidates="nodes", distance="edge")
    with pytest.raises(ValueError, match="tau must be an option of the decoder joint_path"):
        predict_paths(logits[:2], tax, tau=0.5)
    with pytest.raises(ValueError, match="tau must lie in"):
        predict_paths(logits[:2], tax, "threshold", tau=0.0)


def test_calibration_is_saved_and_used(tiny, tax, tmp_path):
    model = HierLoraCLIP(tiny, tax)
    picture = np.zeros((16, 16, 3), np.uint8)
    raw = model.predict([picture])[0]
    target = tax.leaf[torch.arange(100) % tax.num_leaves]
    scores = torch.randn(100, tax.num_nodes, generator=torch.Generator().manual_seed(0))
    assert model.calibrate(scores + torch.nn.functional.one_hot(target, tax.num_nodes), target)
    cooler = model.predict([picture])[0]
    assert cooler.nodes == raw.nodes
    assert cooler.probabilities != raw.probabilities
    model.save_pretrained(tmp_path)
    assert HierLoraCLIP.from_pretrained(tmp_path).predict([picture])[0] == cooler


def test_sigmoid_is_found():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 4, generator=draw) * 3 + 10
    y = torch.bernoulli((0.5 * x - 5.5).sigmoid(), generator=draw)
    a, b = fit_sigmoid(x, y)
    assert a == pytest.approx(0.5, rel=0.1)
    assert b == pytest.approx(-5.5, rel=0.1)
    assert fit_sigmoid(x[:3], torch.ones(3, 4))[0] > 0


def test_a_parent_is_never_less_likely():
    graph = LabelGraph.from_edges([("a", "x"), ("b", "x"), ("b", "y")])
    logits = torch.randn(50, graph.num_nodes, generator=torch.Generator().manual_seed(0))
    found = label_probabilities(logits, graph, 0.7, -0.3)
    assert (found[:, graph.edge_parent] >= found[:, graph.edge_child]).all()
    assert found[0].max() == pytest.approx(float((0.7 * logits[0].max() - 0.3).sigmoid()))
    one = name_labels(torch.tensor([[0.2, 0.9, 0.6, 0.5]]), graph.names)[0]
    assert one.names == tuple(graph.names[i] for i in (1, 2, 3))
    assert str(name_labels(found[:1], graph.names, 1.0)[0]) == "(no label)"
    with pytest.raises(ValueError, match="threshold must lie in"):
        name_labels(found, graph.names, 1.5)


def test_a_temperature_at_its_bound_is_not_kept(tiny, tax):
    """All right by far: the cross-entropy falls for ever as the temperature falls."""
    model, target = HierLoraCLIP(tiny, tax), tax.leaf[torch.tensor([0, 1, 2, 3])]
    logits = torch.zeros(4, tax.num_nodes)
    for row, node in enumerate(target.tolist()):
        logits[row, [v for v in tax.paths[node].tolist() if v >= 0]] = 1.0
    assert not model.calibrate(logits, target)
    assert model.temperature is None
    noise = 3 * torch.randn(200, tax.num_nodes, generator=torch.Generator().manual_seed(0))
    many = tax.leaf[torch.arange(200) % tax.num_leaves]
    own = torch.nn.functional.one_hot(many, tax.num_nodes)
    assert model.calibrate(noise + 3 * own, many)
    assert model.temperature is not None
