"""What lies in a saved folder, what is read back, and what the adapter can be asked to do."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from hier_lora import HierLoraCLIP, lora_config
from hier_losses import HierarchyAwareLoss


def train(base, tax, towers="both", steps=3, **kwargs):
    torch.manual_seed(0)
    text = kwargs.pop("text", "cached" if towers == "vision" else "live")
    model = HierLoraCLIP(base, tax, lora_config(base, towers=towers, r=2), text, train_logit_scale=True, **kwargs)
    loss = HierarchyAwareLoss(tax)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    draw = torch.Generator().manual_seed(0)
    size = 32 if hasattr(base, "processor") else 16
    model.train()
    for _ in range(steps):
        pixels = torch.rand(4, 3, size, size, generator=draw)
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss(model(pixels, tax.leaf[:4]), tax.leaf[:4]).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("text", ["live", "chunked", "sampled"])
def test_the_same_adapter_trained_twice_is_the_same_to_the_bit(tiny_clip, tax, tmp_path, text):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        train(tiny_clip(), tax, text=text, num_negatives=1).save_pretrained(folder)
    for file in ("adapter_model.safetensors", "hier_lora.safetensors"):
        first, second = (load_file(folder / file) for folder in folders)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_a_hub_ready_folder(tiny_clip, tax, tmp_path):
    model = train(tiny_clip(), tax)
    target = tax.leaf[torch.arange(100) % tax.num_leaves]
    scores = torch.randn(100, tax.num_nodes, generator=torch.Generator().manual_seed(0))
    assert model.calibrate(scores + torch.nn.functional.one_hot(target, tax.num_nodes), target)
    model.save_pretrained(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "hier_lora.json", "taxonomy.json"} <= names
    assert "tokenizer_config.json" in names
    assert {"preprocessor_config.json", "processor_config.json"} & names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "hier-lora"
    assert "peft" in card.data.tags
    assert "5 leaves, 7 nodes on 2 levels" in card.text
    assert "calibrated on held-out pictures" in card.text
    assert f"{sum(p.numel() for n, p in model.named_parameters() if '.lora_' in n):,}" in card.text
    assert json.loads((tmp_path / "hier_lora.json").read_text())["format"] == 3


def test_saved_preprocessing_is_used(tiny_clip, tax, tmp_path):
    train(tiny_clip(), tax).save_pretrained(tmp_path)
    file = next(p for p in (tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json") if p.exists())
    settings = file.read_text()
    mean = tiny_clip().processor.image_processor.image_mean
    changed = json.loads(settings)
    (changed if "image_mean" in changed else changed["image_processor"])["image_mean"] = [0.0, 0.0, 0.0]
    file.write_text(json.dumps(changed))
    loaded = HierLoraCLIP.from_pretrained(tmp_path)
    assert list(loaded.dual_encoder.processor.image_processor.image_mean) == [0.0, 0.0, 0.0] != list(mean)


def test_the_first_format_still_loads(tiny, tax, tmp_path, pixels):
    model = train(tiny, tax, "vision", center_text=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "hier_lora.json"
    settings = json.loads(path.read_text())
    for key in ("train_logit_bias", "text_chunk", "num_negatives", "kind"):
        del settings[key]
    del settings["prompts"]["names"]
    settings["format"] = 1
    path.write_text(json.dumps(settings))
    loaded = HierLoraCLIP.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels), model(pixels))
    loaded.update_taxonomy(tax.extend([("animal", "owl")]))


@pytest.mark.parametrize("towers", ["vision", "both"])
def test_disable_adapter_is_the_base_model(tiny_clip, tax, towers):
    pixels = torch.rand(2, 3, 32, 32)
    zero = HierLoraCLIP(tiny_clip(), tax, None, "live")(pixels)
    model = train(tiny_clip(), tax, towers)
    trained = model(pixels)
    with model.disable_adapter():
        torch.testing.assert_close(model(pixels), zero, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(pixels), trained)
    assert not torch.allclose(trained, zero, atol=1e-3)


def test_disable_adapter_sets_heads_aside(tiny, tax, pixels, tmp_path):
    zero = HierLoraCLIP(type(tiny)(), tax)(pixels)
    model = train(tiny, tax, "vision")
    model.save_pretrained(tmp_path)
    for one in (model, HierLoraCLIP.from_pretrained(tmp_path)):
        with one.disable_adapter():
            torch.testing.assert_close(one(pixels), zero)
        assert torch.equal(one(pixels), model(pixels))
    with HierLoraCLIP(type(tiny)(), tax).disable_adapter() as plain:
        torch.testing.assert_close(plain(pixels), zero)


@pytest.mark.parametrize("towers", ["vision", "both"])
def test_merging_keeps_the_predictions(tiny_clip, tax, tmp_path, towers):
    model = train(tiny_clip(), tax, towers)
    pixels = torch.rand(2, 3, 32, 32)
    before = model(pixels).detach()
    assert model.merge_and_unload() is model
    assert not [n for n, _ in model.named_parameters() if "lora_" in n]
    torch.testing.assert_close(model(pixels), before, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "logit_scale" not in n)
    with pytest.raises(ValueError, match="save before merge_and_unload"):
        model.save_pretrained(tmp_path)


def test_merging_takes_the_trained_head(tiny, tax, pixels):
    model = train(tiny, tax, "vision")
    before = model(pixels).detach()
    torch.testing.assert_close(model.merge_and_unload()(pixels), before, rtol=1e-4, atol=1e-4)


def test_bad_pictures_are_named(tiny, tax):
    model = HierLoraCLIP(tiny, tax)
    good = np.zeros((16, 16, 3), np.uint8)
    for bad, words in (
        (np.zeros((16, 16, 3), np.float32), r"pictures\[1\] must be uint8 of shape \(H, W, 3\), got float32"),
        (np.zeros((16, 16), np.uint8), r"got uint8 of shape \(16, 16\)"),
        ("cat.jpg", "must be a PIL picture or a uint8 array, got str"),
    ):
        with pytest.raises(ValueError, match=words):
            model.predict([good, bad])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.predict([good], batch_size=0)
    assert model.predict([]) == []
    model.train()
    model.predict([Image.new("L", (16, 16)).convert("RGB")])
    assert model.training


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("hier_lora.json", "prompts", 3), ("hier_lora.json", "text", None), ("taxonomy.json", "nodes", [])],
)
def test_wrong_content_is_named(tiny, tax, tmp_path, file, key, value):
    HierLoraCLIP(tiny, tax).save_pretrained(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    if value is None:
        del content[key]
    else:
        content[key] = value
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"complete saved model, got {tmp_path}"):
        HierLoraCLIP.from_pretrained(tmp_path)
