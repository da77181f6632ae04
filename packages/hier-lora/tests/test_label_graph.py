"""Pictures with several labels: a graph in place of a tree, MCLoss, a bias, calibrated labels."""

import numpy as np
import pytest
import torch

from hier_lora import HierLoraCLIP, PromptSet, lora_config
from hier_losses import LabelGraph
from hier_losses.functional import mcm
from hier_losses.losses import MCLoss


@pytest.fixture
def graph():
    return LabelGraph.from_edges([("lung", "nodule"), ("lung", "edema"), ("fluid", "edema"), (None, "hernia")])


def targets(graph, *rows):
    hot = torch.zeros(len(rows), graph.num_nodes)
    for i, row in enumerate(rows):
        hot[i, [graph.index(name) for name in row]] = 1
    return mcm(hot, graph)


@pytest.mark.parametrize("towers", ["vision", "both"])
def test_training_on_several_labels(tiny, graph, tmp_path, towers):
    text = "cached" if towers == "vision" else "chunked"
    torch.manual_seed(0)
    model = HierLoraCLIP(tiny, graph, lora_config(tiny, towers=towers, r=2), text, train_logit_bias=True)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    pixels = colours[:, :, None, None].expand(4, 3, 16, 16)
    hot = targets(graph, ("nodule",), ("edema",), ("hernia",), ())
    loss = MCLoss(graph)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    first = float(loss(model(pixels), hot).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(pixels), hot).backward()
        optimizer.step()
    model.eval()
    assert float(loss(model(pixels), hot).detach()) < 0.7 * first
    assert float(model.logit_bias.detach()) != 0
    model.calibrate(model(pixels), hot)
    picture = (pixels[1].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    found = model.predict_labels([picture, picture], threshold=0.0)
    assert set(found[0].names) == set(graph.names)
    assert list(found[0].probabilities) == sorted(found[0].probabilities, reverse=True)
    p = dict(zip(found[0].names, found[0].probabilities, strict=True))
    assert p["edema"] <= min(p["lung"], p["fluid"])
    model.save_pretrained(tmp_path)
    loaded = HierLoraCLIP.from_pretrained(tmp_path)
    assert loaded.tax == graph
    assert torch.equal(loaded(pixels), model(pixels))
    assert loaded.predict_labels([picture]) == model.predict_labels([picture])
    assert "labels in a graph" in (tmp_path / "README.md").read_text()


def test_labels_come_and_go(tiny, graph, pixels):
    model = HierLoraCLIP(tiny, graph)
    before = model(pixels)
    new = LabelGraph.from_edges([("lung", "edema"), ("lung", "mass"), (None, "hernia")])
    update = model.update_taxonomy(new)
    kept = update.new_to_old >= 0
    assert torch.equal(model(pixels)[:, kept], before[:, update.new_to_old[kept]])
    assert int(kept.sum()) == 3


def test_what_a_graph_cannot_do(tiny, graph):
    with pytest.raises(ValueError, match="style must be 'name' for a label graph"):
        PromptSet(graph, style="path")
    with pytest.raises(ValueError, match="use predict_labels"):
        HierLoraCLIP(tiny, graph).predict([np.zeros((16, 16, 3), np.uint8)])
