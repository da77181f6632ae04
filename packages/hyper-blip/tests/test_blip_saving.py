"""Saving, loading, locators, taking over Hugging Face models."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2QFormerConfig

from hyper_blip import (
    HyperBlip2Config,
    HyperBlip2ForConditionalGeneration,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    external_vision_config,
    register_locator,
)
from hyper_blip.vision import load_module

IDS = {"cls_token_id": 1, "sep_token_id": 2, "dec_token_id": 99}


class Patches(torch.nn.Module):
    """A vision module of somebody else."""

    def __init__(self, width):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.conv = torch.nn.Conv2d(3, width, 7, stride=7)
            self.norm = torch.nn.BatchNorm2d(width)

    def forward(self, pixels):
        return self.norm(self.conv(pixels)).flatten(2).mT


def external(locator=""):
    qformer = Blip2QFormerConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64
    )  # fmt: skip
    blip2 = external_vision_config(20, qformer, num_query_tokens=8, image_text_hidden_size=16)
    return HyperBlip2Config(blip2, HyperbolicConfig.distance(), vision_locator=locator, **IDS)


def test_round_trip_is_bit_identical(stage1, batch, tmp_path):
    model = stage1(HyperbolicConfig.distance(c=0.5, learn_c=True)).eval()
    model.save_pretrained(tmp_path / "model")
    again, info = HyperBlip2ForPretraining.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert info == ((), ())
    assert again.config.to_dict() == model.config.to_dict()
    pixels, ids, mask = batch()
    assert torch.equal(again.encode_image(pixels).point, model.encode_image(pixels).point)
    assert torch.equal(again.encode_text(ids, mask).point, model.encode_text(ids, mask).point)
    assert torch.equal(again.itm_logits(pixels, ids, mask), model.itm_logits(pixels, ids, mask))
    a, b = (m.train()(pixels, ids, mask, step=4).loss for m in (again, model))
    assert torch.equal(a, b)


def test_vision_module_by_locator(batch, tmp_path):
    register_locator("patches", lambda name: Patches(int(name)))
    model = HyperBlip2ForPretraining.from_config(external("patches:20")).train()
    assert not model.blip2.vision_model.module.norm.training
    pixels, ids, mask = batch()
    out = model(pixels, ids, mask, step=0)
    out.loss.backward()
    assert out.image_features.shape == (4, 8, 16)
    assert model.blip2.vision_model.module.conv.weight.grad is None
    assert model.blip2.vision_model.post_layernorm.weight.grad is not None
    half = HyperBlip2ForPretraining.from_config(external("patches:20")).eval().cast_vision(torch.bfloat16)
    assert half.encode_image(pixels).point.dtype == torch.float32
    model.eval().save_pretrained(tmp_path)
    assert not any("vision_model.module" in n for n in load_file(tmp_path / "model.safetensors"))
    again = HyperBlip2ForPretraining.from_pretrained(tmp_path)
    assert torch.equal(again.encode_image(pixels).point, model.encode_image(pixels).point)
    # A trained vision module is written, locator or not.
    model.freeze_vision(False)
    model.save_pretrained(tmp_path / "trained")
    assert any("vision_model.module.conv" in n for n in load_file(tmp_path / "trained" / "model.safetensors"))


class Means(torch.nn.Module):
    """A frozen text encoder of somebody else: the mean of its own word vectors."""

    def __init__(self, width):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.table = torch.nn.Embedding(100, width)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, ids, mask):
        kept = mask[..., None].float()
        return self.drop((self.table(ids) * kept).sum(1) / kept.sum(1))


@pytest.mark.parametrize("weights", [{"lm": 1.0}, {"entail": 1.0}])
def test_text_encoder_by_locator(batch, config, tmp_path, weights):
    """The contrastive loss reads the encoder's states; the language and the matching loss still read the Q-Former."""
    register_locator("means", lambda name: Means(int(name)))
    settings = HyperbolicConfig.distance(loss_weights=weights, rqs_prob=0.0, rtp_prob=1.0, seed=3)
    torch.manual_seed(0)
    plain = HyperBlip2ForPretraining(config(settings)).train()
    model = HyperBlip2ForPretraining(config(settings, text_locator="means:32")).train()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert not model.text_encoder.drop.training
    pixels, ids, mask = batch()
    out, other = model(pixels, ids, mask, step=2), plain(pixels, ids, mask, step=2)
    seen = model.text_pruning.prune_ids(ids, mask, (1, 2), 2, 0, pad_id=0, starts_word=None)
    table = model.text_encoder.table.weight.detach().double().numpy()
    means = [table[i[m.bool()].numpy()].mean(0) for i, m in zip(*seen, strict=True)]
    z = np.stack(means) @ model.blip2.text_projection.weight.detach().double().numpy().T
    z += model.blip2.text_projection.bias.detach().numpy()
    np.testing.assert_allclose(out.text_features.detach().numpy(), z * 16**-0.5, atol=1e-5)
    torch.testing.assert_close(out.loss_lm, other.loss_lm)
    assert not torch.allclose(out.loss_itc, other.loss_itc)
    if "entail" in weights:
        assert not torch.allclose(out.loss_entail, other.loss_entail)
    out.loss.backward()
    assert model.text_encoder.table.weight.grad is None
    model.eval().save_pretrained(tmp_path)
    assert not any(n.startswith("text_encoder") for n in load_file(tmp_path / "model.safetensors"))
    again, info = HyperBlip2ForPretraining.from_pretrained(tmp_path, output_loading_info=True)
    assert info == ((), ())
    assert torch.equal(again.encode_text(ids, mask).point, model.encode_text(ids, mask).point)
    assert model.encode_text(ids[:1], mask[:1]).point.shape == (1, 16)
    wrong = HyperBlip2ForPretraining(config(settings, text_locator="means:31"))
    with pytest.raises(ValueError, match=r"must return states of shape \(4, 32\), got \(4, 31\)"):
        wrong.encode_text(ids, mask)


def test_vision_module_given(batch, tmp_path):
    model = HyperBlip2ForPretraining.from_config(external(), vision=Patches(20)).eval()
    with pytest.raises(ValueError, match="vision_locator must name"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must return \(B, M, 20\), got \(4, 16, 12\)"):
        HyperBlip2ForPretraining.from_config(external(), vision=Patches(12)).encode_image(batch()[0])
    with pytest.raises(ValueError, match="with a prefix of"):
        load_module("nowhere:x")
    with pytest.raises(ValueError, match="without ':'"):
        register_locator("a:b", Patches)


def test_other_picture_sizes(stage1):
    model = stage1().eval()
    assert model.vision_features(torch.zeros(1, 3, 42, 42)).shape == (1, 10, 32)


def test_from_blip2(blip2_config, batch, tmp_path):
    torch.manual_seed(0)
    plain = Blip2ForImageTextRetrieval(blip2_config()).eval()
    plain.save_pretrained(tmp_path / "plain")
    pixels, ids, mask = batch()
    expected = plain(pixels, ids, mask, use_image_text_matching_head=False)
    settings = HyperbolicConfig.euclidean()
    for source in (plain, str(tmp_path / "plain")):
        with pytest.warns(UserWarning, match="initialised afresh"):
            model, info = HyperBlip2ForPretraining.from_blip2(source, settings, output_loading_info=True, **IDS)
        assert {n.split(".")[0] for n in info.missing} == {
            "lm_head",
            "text_projector",
            "image_projector",
            "temperature",
        }
        text, image = model.encode_text(ids, mask), model.encode_image(pixels)
        torch.testing.assert_close(model.similarity(image, text), expected.logits_per_image, rtol=0, atol=1e-6)
    # [DEC] beyond the vocabulary adds a row and moves nothing else.
    with pytest.warns(UserWarning, match="initialised afresh"):
        model = HyperBlip2ForPretraining.from_blip2(plain, settings, **{**IDS, "dec_token_id": 100})
    assert model.blip2.embeddings.word_embeddings.num_embeddings == 101
    torch.testing.assert_close(model.encode_text(ids, mask).point, text.point)
    model.train()(pixels, ids, mask).loss.backward()


def test_captioning_checkpoints_lack_the_text_side(blip2_config, tmp_path, batch):
    settings = blip2_config(image_token_index=119)
    settings.qformer_config.use_qformer_text_input = False
    Blip2ForConditionalGeneration(settings).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="initialised afresh") as caught:
        model, info = HyperBlip2ForPretraining.from_blip2(str(tmp_path), output_loading_info=True, **IDS)
    assert len([w for w in caught if "afresh" in str(w.message)]) == 1
    assert any("text_projection" in n for n in info.missing)
    assert any("language_model" in n for n in info.unexpected)
    out = model.train()(*batch(), step=0)
    assert out.loss.isfinite()


def test_damaged_and_foreign_folders(stage1, tmp_path):
    model = stage1()
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="a HyperBlip2ForConditionalGeneration, got HyperBlip2ForPretraining"):
        HyperBlip2ForConditionalGeneration.from_pretrained(tmp_path / "m")
    settings = tmp_path / "m" / "config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "hyperbolic": {"curvature": 1}}))
    with pytest.raises(ValueError, match="unknown key 'curvature' in the configuration of HyperbolicConfig"):
        HyperBlip2ForPretraining.from_pretrained(tmp_path / "m")
    settings.write_text("{")
    with pytest.raises(ValueError, match="complete saved model"):
        HyperBlip2ForPretraining.from_pretrained(tmp_path / "m")
    settings.write_text(json.dumps(content))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="complete saved model"):
        HyperBlip2ForPretraining.from_pretrained(tmp_path / "m")


def everything(module):
    """Weights, flags, classes and configuration of a module."""
    weights = {n: (p.clone(), p.requires_grad) for n, p in module.named_parameters()}
    kinds = {n: (type(m), m.training) for n, m in module.named_modules()}
    return weights, kinds, module.config.to_dict() if hasattr(module, "config") else None


def assert_untouched(module, before):
    weights, kinds, config = everything(module)
    assert kinds == before[1]
    assert config == before[2]
    assert weights.keys() == before[0].keys()
    for name, (value, trained) in weights.items():
        assert trained == before[0][name][1], name
        assert torch.equal(value, before[0][name][0]), name


def move(model):
    """One large step, so that shared memory would show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)


@pytest.mark.filterwarnings("ignore:initialised afresh")
def test_loading_leaves_the_callers_objects_alone(blip2_config, tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = Blip2ForImageTextRetrieval(blip2_config()).train()
    before = everything(plain)
    model = HyperBlip2ForPretraining.from_blip2(plain, **{**IDS, "dec_token_id": 100})
    assert model.blip2.embeddings.word_embeddings.num_embeddings == 101
    layer = "encoder.layers.0.mlp.fc1"
    assert (
        model.blip2.vision_model.get_submodule(layer).weight.data_ptr()
        == plain.vision_model.get_submodule(layer).weight.data_ptr()
    )
    move(model)
    move(model.freeze_vision(False))
    assert_untouched(plain, before)

    settings = blip2_config(image_token_index=98)
    settings.qformer_config.use_qformer_text_input = False
    config = HyperBlip2Config(settings, **{**IDS, "dec_token_id": 120})
    content = config.to_dict()
    first = HyperBlip2ForPretraining.from_config(config)
    assert config.to_dict() == content
    assert first.config.blip2.qformer_config.vocab_size == 121

    caption = Blip2ForConditionalGeneration(blip2_config(image_token_index=119)).train()
    before = everything(caption)
    move(HyperBlip2ForConditionalGeneration.from_blip2(caption))
    assert_untouched(caption, before)
    language = caption.language_model
    before = everything(language)
    second = HyperBlip2ForConditionalGeneration.from_pretraining(
        first, language, image_token_id=119, lora={"r": 2, "target_modules": ["q_proj"]}
    )
    move(second)
    assert_untouched(language, before)

    vision = Patches(20).train()
    before = everything(vision)
    model = HyperBlip2ForPretraining.from_config(external("patches:20"), vision=vision)
    assert_untouched(vision, before)
    move(model.freeze_vision(False))
    model.save_pretrained(tmp_path / "vision")
    again = HyperBlip2ForPretraining.from_pretrained(tmp_path / "vision", vision=vision)
    assert_untouched(vision, before)
    assert torch.equal(again.blip2.vision_model.module.conv.weight, model.blip2.vision_model.module.conv.weight)


@pytest.mark.parametrize("learn_c", [True, False])
def test_the_curvature_has_one_name(stage1, learn_c):
    model = stage1(HyperbolicConfig.distance(learn_c=learn_c))
    assert [n for n in model.state_dict() if "curvature.log_c" in n] == ["curvature.log_c"]
    assert model.image_projector.curvature is model.text_projector.curvature is model.curvature
    twin = copy.deepcopy(model)
    assert twin.image_projector.curvature is twin.curvature is not model.curvature
