"""Adapters that others can load: names of the plain model, for every family, and weights that go back where they came from."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from hier_lora import HFDualEncoder, HierLoraCLIP, load_dual_encoder, lora_config, lora_overhead, project_attention
from hier_lora.hf_encoder import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZE, "image_size": 32, "patch_size": 16}
WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "picture", "of", "cat", "dog", "animal", "plant", "oak", "fern", "rock"]
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
TEXT = {**SIZE, "vocab_size": len(WORDS), "max_position_embeddings": 16, **IDS}


def tiny_model(family):
    """A model of random weights, in the format of a family."""
    import transformers as hf

    if family == "aimv2":
        config = hf.Aimv2Config(text_config=TEXT, vision_config={**VISION, "is_native": False}, projection_dim=8)
    elif family == "altclip":
        text = {**TEXT, "project_dim": 8, "type_vocab_size": 1}
        config = hf.AltCLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 8}, projection_dim=8)
    elif family == "groupvit":
        groups = {"depths": [1, 1, 1], "num_hidden_layers": 3, "num_group_tokens": [4, 2, 0]}
        vision = {**VISION, **groups, "num_output_groups": [4, 2, 1]}
        config = hf.GroupViTConfig(
            text_config=TEXT, vision_config=vision, projection_dim=8, projection_intermediate_dim=16
        )
    elif family == "siglip":
        config = hf.SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION)
    elif family == "vision-text-dual-encoder":
        config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            hf.ViTConfig(**VISION), hf.BertConfig(**TEXT), projection_dim=8
        )
    else:
        kind = {"clip": hf.CLIPConfig, "chinese_clip": hf.ChineseCLIPConfig, "metaclip_2": hf.MetaClip2Config}[family]
        config = kind(text_config=TEXT, vision_config=VISION, projection_dim=8)
    torch.manual_seed(0)
    return hf.AutoModel.from_config(config).eval()


@pytest.fixture(scope="module")
def processor():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", model_max_length=12
    )
    return SimpleNamespace(tokenizer=tokenizer, save_pretrained=lambda folder: None)


def adapted(encoder, tax, **kwargs):
    """A model whose adapter does something."""
    encoder.locator = encoder.locator or "hf:somewhere/tiny"
    model = HierLoraCLIP(encoder, tax, lora_config(encoder, r=2, **kwargs), "live")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_fits_the_plain_model(family, processor, tax, tmp_path):
    plain = tiny_model(family)
    model = adapted(HFDualEncoder(copy.deepcopy(plain), processor), tax)
    cost = lora_overhead(model)
    assert cost["vision"].adapter > 0 < cost["text"].adapter
    assert cost["vision"].adapter + cost["text"].adapter == cost["total"].adapter
    model.save_pretrained(tmp_path)
    pixels, texts = torch.rand(2, 3, 32, 32), ["a picture of a cat", "a dog"]
    with torch.no_grad():
        ours = model.dual_encoder.encode_image(pixels), model.dual_encoder.encode_text(texts)
        before = model(pixels)
        inputs = processor.tokenizer(
            texts,
            padding="max_length" if family == "siglip" else True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        if family == "siglip":
            del inputs["attention_mask"]
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        image = theirs.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        text = theirs.get_text_features(**inputs, return_dict=True).pooler_output
        torch.testing.assert_close(image, ours[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(text, ours[1], atol=1e-6, rtol=0)
        assert not torch.allclose(image, plain.get_image_features(pixel_values=pixels).pooler_output, atol=1e-3)
        assert not torch.allclose(text, plain.get_text_features(**inputs).pooler_output, atol=1e-3)
        again = HierLoraCLIP.from_pretrained(tmp_path, HFDualEncoder(plain, processor))
        torch.testing.assert_close(again(pixels), before, atol=1e-6, rtol=1e-6)


def test_the_adapter_names_its_base_as_peft_does(clip_folder, tax, tmp_path):
    from transformers import AutoModel

    base = load_dual_encoder(f"hf:{clip_folder}", revision="main", dtype=torch.float32)
    model = adapted(base, tax, towers="vision")
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.revision) == (str(clip_folder), "main")
    plain = AutoModel.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        image = PeftModel.from_pretrained(plain, tmp_path).get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(image, model.dual_encoder.encode_image(pixels), atol=1e-6, rtol=0)


def make_old(folder):
    """Turn a saved folder into one of format 2, whose names began at the wrapper."""
    weights = load_file(folder / "adapter_model.safetensors")
    old = {name.replace("base_model.model.", "base_model.model.model."): value for name, value in weights.items()}
    save_file(old, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = re.sub(
        r"\((?=vision_model|text_model|visual|\(text)", r"(model\.", config["target_modules"]
    )
    config["base_model_name_or_path"] = "hf:somewhere/tiny"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "hier_lora.json").read_text())
    del settings["options"]
    (folder / "hier_lora.json").write_text(json.dumps({**settings, "format": 2}))


@pytest.mark.parametrize("family", ["clip", "altclip"])
def test_the_second_format_still_loads(family, processor, tax, tmp_path):
    plain = tiny_model(family)
    model = adapted(HFDualEncoder(copy.deepcopy(plain), processor), tax)
    model.save_pretrained(tmp_path)
    new = load_file(tmp_path / "adapter_model.safetensors")
    make_old(tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    again = HierLoraCLIP.from_pretrained(tmp_path, HFDualEncoder(copy.deepcopy(plain), processor))
    assert torch.equal(again(pixels), model(pixels))
    assert not [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    again.dual_encoder.locator = "hf:somewhere/tiny"
    again.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == new.keys()
    PeftModel.from_pretrained(plain, tmp_path)


def test_the_second_format_can_be_trained_on(processor, tax, tmp_path):
    plain = tiny_model("clip")
    adapted(HFDualEncoder(copy.deepcopy(plain), processor), tax).save_pretrained(tmp_path)
    make_old(tmp_path)
    again = HierLoraCLIP.from_pretrained(tmp_path, HFDualEncoder(plain, processor), trainable=True)
    open_ones = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert open_ones == {name for name, _ in again.named_parameters() if ".lora_" in name} != set()


@pytest.fixture
def tiny_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    tower = {"width": 16, "layers": 2}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 8},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (tmp_path / "hier-lora-plain.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    plain = open_clip.create_model("hier-lora-plain").eval()
    weights = copy.deepcopy(plain.state_dict())
    encoder = load_dual_encoder("open_clip:hier-lora-plain")
    encoder.model.load_state_dict(project_attention(copy.deepcopy(plain)).state_dict())
    return plain, weights, encoder


@pytest.mark.filterwarnings("ignore")
def test_open_clip_takes_the_adapter(tiny_open_clip, tax, tmp_path):
    plain, _, encoder = tiny_open_clip
    model = adapted(encoder, tax)
    model.save_pretrained(tmp_path / "saved")
    theirs = PeftModel.from_pretrained(project_attention(plain), tmp_path / "saved")
    pixels, texts = torch.rand(2, 3, 32, 32), ["a cat", "a much longer sentence about a dog"]
    with torch.no_grad():
        image, text = theirs.encode_image(pixels), theirs.encode_text(encoder.tokenizer(texts))
        torch.testing.assert_close(image, encoder.encode_image(pixels), atol=1e-6, rtol=0)
        # `encode_text` cuts after the longest sentence, which moves the last bit.
        torch.testing.assert_close(text, encoder.encode_text(texts), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(text, encoder.model.encode_text(encoder.tokenizer(texts)), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_merged_weights_go_back_into_open_clip(tiny_open_clip, tax, tmp_path):
    import open_clip

    _, weights, encoder = tiny_open_clip
    model = adapted(encoder, tax).merge_and_unload()
    model.save_merged(tmp_path / "merged")
    file = tmp_path / "merged" / "open_clip_model.safetensors"
    assert load_file(file).keys() == weights.keys()
    plain = open_clip.create_model("hier-lora-plain", pretrained=str(file)).eval()
    pixels, texts = torch.rand(2, 3, 32, 32), ["a cat", "a much longer sentence about a dog"]
    with torch.no_grad():
        image, text = plain.encode_image(pixels), plain.encode_text(encoder.tokenizer(texts))
        torch.testing.assert_close(image, encoder.encode_image(pixels), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(text, encoder.encode_text(texts), atol=2e-6, rtol=1e-5)
    again = HierLoraCLIP(load_dual_encoder(f"open_clip:hier-lora-plain@{file}"), tax)
    torch.testing.assert_close(again(pixels), model(pixels), rtol=1e-4, atol=1e-4)


def test_merged_weights_go_back_into_transformers(tiny_clip, tax, tmp_path):
    from transformers import CLIPModel

    model = adapted(tiny_clip(), tax)
    with pytest.raises(ValueError, match="call merge_and_unload before save_merged"):
        model.save_merged(tmp_path)
    model.merge_and_unload().save_merged(tmp_path / "merged")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        image = CLIPModel.from_pretrained(tmp_path / "merged").get_image_features(pixel_values=pixels).pooler_output
        assert torch.equal(image, model.dual_encoder.encode_image(pixels))
        again = HierLoraCLIP(load_dual_encoder(f"hf:{tmp_path / 'merged'}"), tax, text="live")
        assert torch.equal(again(pixels), model(pixels))


def test_merged_weights_of_an_own_model_are_its_own(tiny, tax, tmp_path):
    model = HierLoraCLIP(tiny, tax, lora_config(tiny, towers="vision", r=2)).merge_and_unload()
    with pytest.raises(ValueError, match="must have `save_merged` to write its weights, got TinyDualEncoder"):
        model.save_merged(tmp_path)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("siglip2", "SigLIP2 NaFlex takes pictures as lists of patches; take a SigLIP2 of a fixed size"),
        ("align", "ALIGN has a temperature"),
        ("xclip", "X-CLIP embeds videos"),
        ("clipseg", "got 'clipseg'$"),
    ],
)
def test_other_families_are_refused_before_any_work(family, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ValueError, match=words):
        load_dual_encoder(f"hf:{tmp_path}")
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type=family)
    with pytest.raises(ValueError, match=words):
        HFDualEncoder(model, None)


@pytest.mark.parametrize("make", ["tiny_clip", "tiny"])
def test_all_linear(make, request, tax):
    base = request.getfixturevalue(make)
    base = base() if make == "tiny_clip" else base
    before = {name for name, _ in base.named_parameters()}
    with pytest.raises(ValueError, match="text must be 'live', .* adapts the text tower .*got 'cached'"):
        HierLoraCLIP(base, tax, lora_config(base, targets="all-linear", r=2))
    assert {name for name, _ in base.named_parameters()} == before, "refused before peft changed the model"
    model = HierLoraCLIP(base, tax, lora_config(base, targets="all-linear", r=2), "live")
    assert lora_overhead(model)["text"].adapter > 0
    model.train()
    model(torch.rand(2, 3, 32, 32))[:, tax.index("oak")].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", ["tiny_clip", "tiny"])
def test_half_precision_scores(make, request, tax, dtype, tmp_path):
    base = request.getfixturevalue(make)
    base = base() if make == "tiny_clip" else base
    pixels = torch.rand(2, 3, 32, 32)
    model = HierLoraCLIP(base, tax, lora_config(base, towers="vision", r=2), train_logit_bias=True).eval()
    exact, features = model(pixels).detach(), model.node_features.clone()
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.node_features, features), "features stay in single precision"
    found = model(pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05 * float(base.logit_scale.exp()), rtol=0)
    model.refresh_text()
    assert model.node_features.dtype == torch.float32
    assert model.logits([]).shape == (0, tax.num_nodes)
    with model.disable_adapter():
        assert model(pixels).dtype == torch.float32
    model.train()
    model(pixels)[:, 0].sum().backward()
    model.eval().save_pretrained(tmp_path)
    assert model.merge_and_unload()(pixels).isfinite().all()
