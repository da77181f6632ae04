"""Hugging Face and open_clip models behind locators, with tiny random weights in the real formats."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hier_lora import HierLoraCLIP, PromptSet, load_dual_encoder, lora_config


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *[f"{c}</w>" for c in letters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = vocabulary.index("<|endoftext|>")
    text = {**size, "vocab_size": len(vocabulary), "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    picture = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(picture, tokenizer).save_pretrained(folder)
    return folder


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
