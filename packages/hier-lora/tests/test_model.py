"""The model: logits for all nodes, LoRA on one tower or both, saving and loading."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hier_lora import HierLoraCLIP, PromptSet, lora_config
from hier_losses import Taxonomy


def make(tiny, tax, towers="vision", **kwargs):
    text = "cached" if towers == "vision" else "live"
    torch.manual_seed(3)
    return HierLoraCLIP(tiny, tax, lora_config(tiny, towers=towers, r=2, lora_alpha=4), text, **kwargs)


def train_a_little(model, pixels, steps=3):
    """Move every trainable weight."""
    model.train()
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), torch.tensor([2, 3, 4, 5])).backward()
        optimizer.step()
    return model.eval()


def test_logits_are_scaled_cosines(tiny, tax, pixels):
    model = HierLoraCLIP(tiny, tax, prompts=PromptSet(tax, ("a {}", "the {}")))
    image = F.normalize(tiny.encode_image(pixels), dim=-1)
    a = F.normalize(tiny.encode_text([f"a {n}" for n in tax.names]), dim=-1)
    the = F.normalize(tiny.encode_text([f"the {n}" for n in tax.names]), dim=-1)
    expected = tiny.logit_scale.exp() * image @ F.normalize((a + the) / 2, dim=-1).T
    torch.testing.assert_close(model(pixels), expected)
    assert model(pixels).shape == (4, tax.num_nodes)


def test_centred_text_has_mean_zero_before_scaling(tiny, tax):
    model = HierLoraCLIP(tiny, tax, center_text=True)
    raw = F.normalize(tiny.encode_text([f"a picture of {n}." for n in tax.names]), dim=-1)
    torch.testing.assert_close(model.node_features, F.normalize(raw - raw.mean(0), dim=-1))


def test_lora_starts_as_the_base_model(tiny, tax, pixels):
    before = HierLoraCLIP(tiny, tax)(pixels)
    torch.testing.assert_close(make(tiny, tax)(pixels), before)


@pytest.mark.parametrize("towers", ["vision", "text", "both"])
def test_only_the_chosen_towers_learn(tiny, tax, pixels, towers):
    model = make(tiny, tax, towers)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_a_little(model, pixels)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved, "nothing learned"
    assert all(".lora_" in n or ".modules_to_save." in n for n in moved)
    assert any("vision" in n for n in moved) == (towers != "text")
    assert any("text" in n for n in moved) == (towers != "vision")


def test_logit_scale_trains_by_choice(tiny, tax, pixels):
    model = train_a_little(make(tiny, tax, train_logit_scale=True), pixels)
    assert float(model.dual_encoder.logit_scale.detach()) != 2.0


def test_batch_norm_keeps_its_statistics(tiny, tax, pixels):
    model = make(tiny, tax)
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    train_a_little(model, pixels)
    assert torch.equal(norm.running_mean, before)
    model.train()
    assert not norm.training


@pytest.mark.parametrize("towers", ["vision", "both"])
def test_saved_and_loaded_is_the_same(tiny, tax, pixels, tmp_path, towers):
    model = train_a_little(make(tiny, tax, towers, train_logit_scale=True, center_text=True), pixels)
    model.save_pretrained(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "hier_lora.json", "taxonomy.json"} <= names
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny:8"
    loaded = HierLoraCLIP.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels), model(pixels))
    assert loaded.tax == tax
    assert loaded.prompts.words == model.prompts.words


def test_zero_shot_model_round_trips(tiny, tax, pixels, tmp_path):
    model = HierLoraCLIP(tiny, tax)
    model.save_pretrained(tmp_path)
    assert torch.equal(HierLoraCLIP.from_pretrained(tmp_path)(pixels), model(pixels))


def test_predict_names_paths(tiny, tax, tmp_path):
    model = make(tiny, tax)
    pictures = [Image.fromarray(np.full((16, 16, 3), 40 * i, dtype=np.uint8)) for i in range(3)]
    for decoder in ("joint_path", "bottom_up", "top_down", "level_argmax"):
        found = model.predict(pictures, decoder)
        assert len(found) == 3
        for one in found:
            assert len(one.names) == len(one.probabilities) == len(one.nodes)
            assert all(0 < p <= 1 for p in one.probabilities)
            assert " > ".join(one.names).split(" > ")[0] in ("animal", "plant", "rock")
    # The probability of a level is the softmax over that level and the shallower leaves.
    logits = model(torch.stack([tiny.preprocess(pictures[0])]))
    level_two = [2 + i for i in range(tax.num_nodes) if i + 2 < tax.num_nodes]
    one = model.predict(pictures[:1], "bottom_up")[0]
    if len(one.nodes) == 2:
        classes = torch.tensor([v for v in range(tax.num_nodes) if v in tax.leaf.tolist() or int(tax.depth[v]) == 2])
        expected = logits[0, classes].softmax(-1)[classes.tolist().index(one.nodes[1])]
        assert one.probabilities[1] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert level_two


@pytest.mark.parametrize(
    "broken", ["adapter_model.safetensors", "hier_lora.safetensors", "hier_lora.json", "taxonomy.json"]
)
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_files_are_named(tiny, tax, pixels, tmp_path, broken, how):
    make(tiny, tax).save_pretrained(tmp_path)
    path = tmp_path / broken
    if how == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        HierLoraCLIP.from_pretrained(tmp_path)


def test_bad_arguments(tiny, tax):
    with pytest.raises(ValueError, match="text must be one of"):
        HierLoraCLIP(tiny, tax, text="sometimes")
    with pytest.raises(ValueError, match="must be 'live'"):
        HierLoraCLIP(tiny, tax, lora_config(tiny, towers="both", r=2), "cached")
    other = Taxonomy.from_paths([("a",), ("b",)])
    with pytest.raises(ValueError, match="cover the 7 nodes"):
        HierLoraCLIP(tiny, tax, prompts=PromptSet(other))
    tiny.locator = ""
    with pytest.raises(ValueError, match="locator"):
        HierLoraCLIP(tiny, tax).save_pretrained("never-written")
    with pytest.raises(ValueError, match="decoder must be one of"):
        HierLoraCLIP(tiny, tax).predict([np.zeros((16, 16, 3), np.uint8)], "magic")
