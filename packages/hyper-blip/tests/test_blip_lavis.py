"""LAVIS's own stage-1 Q-Former, run once with random weights: the same states, logits and loss from the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, CLIPVisionConfig, CLIPVisionModel

from hyper_blip import HyperBlip2Config, HyperBlip2ForPretraining, HyperbolicConfig, text_generation_loss
from hyper_blip.qformer import BIDIRECTIONAL, CAUSAL, JOINT, Segment, image_keys, joint_states
from hyper_blip.vision import external_vision_config
from hyper_blip.weights import lavis_state

FIXTURE = Path(__file__).with_name("lavis_stage1_golden.safetensors")


@pytest.fixture(scope="module")
def golden():
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def pth(golden, tmp_path_factory):
    """The weights as a LAVIS checkpoint file."""
    path = tmp_path_factory.mktemp("lavis") / "model.pth"
    state = {}
    for name, value in golden.items():
        if name.startswith("weights."):
            name = name.removeprefix("weights.")
            state[name if name == "query_tokens" else f"Qformer.{name}"] = value
    state["temp"] = torch.tensor(0.05)
    state["odd.key"] = torch.zeros(1)
    torch.save({"model": state}, path)
    return path


@pytest.fixture
def fixture_config():
    qformer = Blip2QFormerConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    blip2 = external_vision_config(24, qformer, num_query_tokens=8, image_text_hidden_size=16)
    ids = {"cls_token_id": 1, "sep_token_id": 2, "dec_token_id": 99}
    return HyperBlip2Config(blip2, HyperbolicConfig.euclidean(), **ids)


@pytest.fixture
def model(pth, fixture_config):
    with pytest.warns(UserWarning, match="initialised afresh"):
        model, info = HyperBlip2ForPretraining.from_lavis(
            pth, fixture_config, vision=torch.nn.Identity(), output_loading_info=True
        )
    assert info.unexpected == ("odd.key",)
    missing = {name.split(".")[1] for name in info.missing if name.startswith("blip2.")}
    assert missing == {"vision_model", "vision_projection", "text_projection", "itm_head"}
    assert not any(".qformer." in name or "lm_head" in name for name in info.missing)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("with_keys", [False, True])
@torch.no_grad()
def test_every_output_equals_lavis(golden, model, attention, with_keys):
    model.blip2.set_attn_implementation(attention)
    inputs = {name.removeprefix("inputs."): value for name, value in golden.items() if name.startswith("inputs.")}
    image = image_keys(model.blip2.qformer, inputs["image_embeds"]) if with_keys else inputs["image_embeds"]
    mask = inputs["attention_mask"]
    lm = Segment(inputs["decoder_input_ids"], mask, CAUSAL)
    itc = Segment(inputs["input_ids"], mask, BIDIRECTIONAL)
    queries, lm_states, text = joint_states(model.blip2, image, [lm, itc])
    joint = joint_states(model.blip2, image, [Segment(inputs["input_ids"], mask, JOINT)])
    logits = model.lm_head(lm_states, model.blip2.embeddings.word_embeddings.weight)
    valid = mask.bool()

    def difference(found, name, where=...):
        return (found - golden[f"outputs.{name}"])[where].abs().max().item()

    assert difference(queries, "query_states") <= 1e-5
    assert difference(text, "text_states", valid) <= 1e-5
    both = torch.cat([torch.ones(5, 8, dtype=torch.bool), valid], dim=1)
    assert difference(torch.cat(joint, dim=1), "joint_states", both) <= 1e-5
    assert difference(logits, "lm_logits", valid) <= 1e-5
    loss = text_generation_loss(logits, inputs["labels"])
    assert loss.item() == pytest.approx(golden["outputs.lm_loss"].item(), abs=1e-5)
    assert loss.item() == pytest.approx(4.730197, abs=1e-5)


def test_temperature_comes_along(model):
    assert model.temperature().item() == pytest.approx(0.05, rel=1e-6)


def test_names_of_the_vision_encoder():
    bias = {
        "visual_encoder.blocks.3.attn.q_bias": torch.ones(2),
        "visual_encoder.blocks.3.attn.v_bias": torch.full((2,), 3.0),
    }
    others = {
        "visual_encoder.cls_token": "embeddings.class_embedding",
        "visual_encoder.pos_embed": "embeddings.position_embedding",
        "visual_encoder.patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "visual_encoder.blocks.3.norm1.bias": "encoder.layers.3.layer_norm1.bias",
        "visual_encoder.blocks.3.attn.qkv.weight": "encoder.layers.3.self_attn.qkv.weight",
        "visual_encoder.blocks.3.attn.proj.bias": "encoder.layers.3.self_attn.projection.bias",
        "visual_encoder.blocks.3.mlp.fc2.weight": "encoder.layers.3.mlp.fc2.weight",
        "ln_vision.weight": "post_layernorm.weight",
    }
    found = lavis_state({**bias, **{name: torch.zeros(1) for name in others}})
    qkv = found.pop("blip2.vision_model.encoder.layers.3.self_attn.qkv.bias")
    assert qkv.tolist() == [1, 1, 0, 0, 3, 3]
    assert set(found) == {f"blip2.vision_model.{name}" for name in others.values()}


def test_unsafe_and_unfit_files_are_refused(tmp_path, fixture_config, golden):
    torch.save({"model": {"x": print}}, tmp_path / "unsafe.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, words in (
        ("unsafe", "weights_only=True"),
        ("text", "weights_only=True"),
        ("list", "state dict"),
        ("none", "none"),
    ):
        with pytest.raises(ValueError, match=words):
            HyperBlip2ForPretraining.from_lavis(tmp_path / f"{name}.pth", fixture_config, vision=torch.nn.Identity())
    torch.save({"model": {"query_tokens": torch.zeros(1, 9, 32)}}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"query_tokens must have shape \(1, 8, 32\), got \(1, 9, 32\)"):
        HyperBlip2ForPretraining.from_lavis(tmp_path / "shape.pth", fixture_config, vision=torch.nn.Identity())


class ViTL(nn.Module):
    """A small CLIP encoder as its paper has it, under the names of LAVIS's ViT-L: the features before the last LayerNorm."""

    def __init__(self, width=24, layers=2, heads=4, size=28, patch=14):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.transformer = nn.LayerNorm(width), nn.Module()
        blocks = []
        for _ in range(layers):
            block = nn.Module()
            block.attn, block.mlp = nn.MultiheadAttention(width, heads, batch_first=True), nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            blocks.append(block)
        self.transformer.resblocks = nn.ModuleList(blocks)

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False)[0]
            y = block.mlp.c_fc(block.ln_2(x))
            x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))
        return x


@torch.no_grad()
def test_vit_l_of_lavis_gives_its_features(fixture_config, tmp_path):
    torch.manual_seed(0)
    theirs = ViTL().eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    norm = {"ln_vision.weight": torch.rand(24) + 0.5, "ln_vision.bias": torch.randn(24)}
    names = {f"visual_encoder.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"model": names | norm}, tmp_path / "vit_l.pth")
    settings = CLIPVisionConfig(
        hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="initialised afresh"):
        model, info = HyperBlip2ForPretraining.from_lavis(
            tmp_path / "vit_l.pth", fixture_config, vision=CLIPVisionModel(settings), output_loading_info=True
        )
    assert info.unexpected == ()
    # CLIP's own last LayerNorm is not used.
    assert {n for n in info.missing if ".vision_model." in n} == {
        "blip2.vision_model.module.post_layernorm.weight", "blip2.vision_model.module.post_layernorm.bias",
    }  # fmt: skip
    pixels = torch.randn(2, 3, 28, 28)
    eps = model.blip2.vision_model.post_layernorm.eps
    expected = F.layer_norm(theirs(pixels), (24,), norm["ln_vision.weight"], norm["ln_vision.bias"], eps)
    torch.testing.assert_close(model.vision_features(pixels), expected, rtol=1e-4, atol=1e-5)
