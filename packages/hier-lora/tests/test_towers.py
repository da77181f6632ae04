"""Hugging Face and open_clip models behind locators, with tiny random weights in the real formats."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hier_lora import HierLoraCLIP, PromptSet, load_dual_encoder, lora_config


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_clip(clip_folder, tax, tmp_path):
    base = load_dual_encoder(f"hf:{clip_folder}")
    model = HierLoraCLIP(
        base, tax, lora_config(base, towers="both", r=2), "live", prompts=PromptSet(tax, ("a photo of a {}",))
    )
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(adapted) == 8, "q and v in two layers of two towers"
    pixels = torch.stack([base.preprocess(Image.fromarray(np.full((40, 50, 3), v, np.uint8))) for v in (0, 255)])
    assert pixels.shape == (2, 3, 32, 32)
    model.train()
    model(pixels)[:, tax.index("oak")].sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = HierLoraCLIP.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels), model(pixels))
    assert len(model.predict([Image.new("RGB", (60, 40))])) == 1


@pytest.mark.filterwarnings("ignore")
def test_text_does_not_depend_on_its_neighbours(clip_folder):
    """Sentences are padded to the longest in the batch: the padding must not change them."""
    base = load_dual_encoder(f"hf:{clip_folder}")
    with torch.no_grad():
        alone, beside = base.encode_text(["a cat"]), base.encode_text(["a cat", "a much longer sentence about a dog"])
    torch.testing.assert_close(beside[:1], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_open_clip(tax, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    tower = {"width": 16, "layers": 2}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 8},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (tmp_path / "hier-lora-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    base = load_dual_encoder("open_clip:hier-lora-tiny")
    model = HierLoraCLIP(base, tax, lora_config(base, towers="both", r=2), "live")
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(adapted) == 8, "two MLP layers in two blocks of two towers"
    pixels = base.preprocess(np.zeros((40, 50, 3), np.uint8))[None]
    model.train()
    model(pixels).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_open_clip_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"hier-lora\[open-clip\]"):
        load_dual_encoder("open_clip:ViT-B-32")
