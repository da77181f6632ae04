"""Hugging Face and open_clip models behind locators, with tiny random weights in the real formats."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hier_lora import (
    HFDualEncoder,
    HierLoraCLIP,
    OpenClipDualEncoder,
    PromptSet,
    load_dual_encoder,
    lora_config,
    lora_overhead,
)


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
def test_a_checkpoint_without_some_weights_is_refused(clip_folder, tmp_path):
    """transformers would draw them at random, and every score would be noise."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1, such as visual_projection.weight"):
        load_dual_encoder(f"hf:{folder}")
    save_file(
        weights | {"visual_projection.weight": lost[:, :3].contiguous()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"hf:.* cannot be read, a file of it seems damaged"):
        load_dual_encoder(f"hf:{folder}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", '"x"'), ("tokenizer_config.json", ""), ("model.safetensors", "x")]
)
def test_damaged_files_are_one_error(clip_folder, tmp_path, name, text):
    """What transformers and tokenizers raise there is an `AttributeError`, a `JSONDecodeError`, a plain `Exception`."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=r"hf:.* cannot be read, a file of it seems damaged"):
        load_dual_encoder(f"hf:{folder}")


@pytest.mark.filterwarnings("ignore")
def test_text_does_not_depend_on_its_neighbours(clip_folder):
    """Sentences are padded to the longest in the batch: the padding must not change them."""
    base = load_dual_encoder(f"hf:{clip_folder}")
    with torch.no_grad():
        alone, beside = base.encode_text(["a cat"]), base.encode_text(["a cat", "a much longer sentence about a dog"])
    torch.testing.assert_close(beside[:1], alone, atol=2e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def siglip():
    """A tiny SigLIP of random weights; its tokenizer knows a few words."""
    from types import SimpleNamespace

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    words = {
        w: i for i, w in enumerate(["<pad>", "<unk>", "a", "picture", "of", "cat", "dog", "animal", "plant", "oak"])
    }
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", model_max_length=12
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**size, "vocab_size": 16, "max_position_embeddings": 12, "projection_size": 16},
        vision_config={**size, "image_size": 32, "patch_size": 16},
    )
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    picture = SiglipImageProcessor(size={"height": 32, "width": 32})
    return lambda: HFDualEncoder(copy.deepcopy(model), SimpleNamespace(tokenizer=tokenizer, image_processor=picture))


def test_siglip(siglip, tax):
    base = siglip()
    model = HierLoraCLIP(base, tax, lora_config(base, towers="both", r=2), "chunked", text_chunk=2)
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(adapted) == 8, "q and v in two layers of two towers"
    pixels = torch.stack([base.preprocess(Image.new("RGB", (50, 40), c)) for c in ("red", "blue")])
    assert pixels.shape == (2, 3, 32, 32)
    model.train()
    model(pixels)[:, tax.index("oak")].sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
    model.eval()
    assert len(model.predict([Image.new("L", (60, 40))])) == 1


def test_siglip_reads_all_positions(siglip):
    """It was trained on sentences of one padded length and pools the last position: no cutting to the longest."""
    base = siglip()
    with torch.no_grad():
        alone, beside = base.encode_text(["a cat"]), base.encode_text(["a cat", "a picture of a dog of a cat of a"])
    torch.testing.assert_close(beside[:1], alone, atol=2e-6, rtol=1e-5)


def test_the_pooling_head_of_siglip_is_out_of_reach(siglip, tax):
    base = siglip()
    with pytest.raises(ValueError, match=r"head\.attention\.out_proj"):
        HierLoraCLIP(base, tax, lora_config(base, targets=r"vision_model\..*\.(q_proj|out_proj)"))


@pytest.fixture
def open_clip_name(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    tower = {"width": 16, "layers": 2}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 8},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (tmp_path / "hier-lora-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    return "hier-lora-tiny"


@pytest.mark.filterwarnings("ignore")
def test_open_clip(open_clip_name, tax, tmp_path):
    torch.manual_seed(0)
    base = load_dual_encoder(f"open_clip:{open_clip_name}")
    again = copy.deepcopy(base)
    model = HierLoraCLIP(base, tax, lora_config(base, towers="both", r=2), "live")
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(adapted) == 8, "q and v in two blocks of two towers"
    pixels = base.preprocess(np.zeros((40, 50, 3), np.uint8))[None]
    model.train()
    model(pixels).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "open_clip_preprocess.json").read_text())["architecture"] == open_clip_name
    loaded = HierLoraCLIP.from_pretrained(tmp_path / "saved", again)
    assert torch.equal(loaded(pixels), model(pixels))
    assert len(model.predict([Image.new("RGB", (60, 40))], "threshold", tau=0.3)) == 1


@pytest.mark.filterwarnings("ignore")
def test_open_clip_computes_what_it_did(open_clip_name):
    """Neither the new attention nor the cut after the longest sentence changes an embedding."""
    import open_clip

    torch.manual_seed(0)
    plain, _, transform = open_clip.create_model_and_transforms(open_clip_name)
    plain = plain.eval()
    tokenizer = open_clip.get_tokenizer(open_clip_name)
    texts = ["a cat", "a much longer sentence about a dog and an oak"]
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        text, image = plain.encode_text(tokenizer(texts)), plain.encode_image(pixels)
        ours = OpenClipDualEncoder(plain, transform, tokenizer)
        torch.testing.assert_close(ours.encode_text(texts), text, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(ours.encode_image(pixels), image, atol=2e-6, rtol=1e-5)
        lengths = []
        plain.transformer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        ours.encode_text(texts)
    assert lengths == [12], "ten words, start and end"


def test_open_clip_costs_what_hugging_face_costs():
    """The same ViT-B/32 has the same adapter: 589,824 + 393,216 weights for queries and values at rank 16."""
    open_clip = pytest.importorskip("open_clip")
    from hier_lora.lora import add_lora

    config = open_clip.get_model_config("ViT-B-32")
    with torch.device("meta"):
        model = OpenClipDualEncoder(open_clip.CLIP(**config), None, None)
        assert sum(p.numel() for p in model.parameters()) == 151_277_313
        add_lora(model, lora_config(model, r=16))
    found = lora_overhead(model)
    assert (found["vision"].adapter, found["text"].adapter) == (589_824, 393_216)
    assert found["vision"].base + found["text"].base + 1 == 151_277_313


def test_open_clip_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"hier-lora\[open-clip\]"):
        load_dual_encoder("open_clip:ViT-B-32")
