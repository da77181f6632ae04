"""LAVIS's own stage-1 Q-Former, run once with random weights: the same states, logits and loss from the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2QFormerConfig

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
