"""Prompt learners, the text tower with learned tokens, and PromptSRC's regularisers."""

import math

import open_clip
import pytest
import torch
from torch.nn import functional as F

from mat_align import (
    HETEROGENEOUS,
    GaussianPromptAverage,
    MaPLePrompts,
    MATModel,
    PromptSRCPrompts,
    PromptSRCRegularizer,
    released,
)
from mat_align.backbones import text_tower, token_ids
from mat_align.prompts import encode_text, label_text, template_features

NAMES = ("cat", "maple_tree", "fish_1")


@pytest.mark.parametrize(
    ("name", "kept", "dropped"),
    [
        ("maple_tree", "maple tree", "maple tree"),
        ("crane_2", "crane 2", "crane"),
        ("n0_x", "n0 x", "n x"),
        ("cat", "cat", "cat"),
        ("a_b_", "a b", "a b"),
        ("737-300", "737-300", "-"),
    ],
)
def test_label_text(name, kept, dropped):
    assert label_text(name) == kept
    assert label_text(name, drop_digits=True) == dropped


def test_digits_reach_the_text_tower(clip):
    names = ["737-300", "747-200"]
    kept = MATModel(clip, None).encode_text(names)
    assert not torch.allclose(kept[0], kept[1])
    dropped = MATModel(clip, None, released(HETEROGENEOUS)).encode_text(names)
    assert torch.equal(dropped[0], dropped[1])
    assert torch.equal(*MATModel(clip, None, released(HETEROGENEOUS)).frozen_text(names))


def test_tokens_are_those_of_open_clip():
    texts = ["a photo of a cat.", "a picture of two greenhouses, ok"]
    assert torch.equal(token_ids(texts, 77), open_clip.tokenize(texts))
    with pytest.raises(ValueError, match="77 tokens, got 102"):
        token_ids(["cat " * 100], 77)


def test_text_features_without_prompts_are_clips(clip):
    ids = open_clip.tokenize([f"a photo of a {label_text(name)}." for name in NAMES])
    expected = clip.encode_text(ids)
    torch.testing.assert_close(encode_text(clip, ids), expected, atol=1e-5, rtol=0)
    model = MATModel(clip, None)
    torch.testing.assert_close(model.encode_text(NAMES), expected, atol=1e-5, rtol=0)
    untrained = MATModel(clip, MaPLePrompts(clip, depth=1))
    torch.testing.assert_close(untrained.encode_text(NAMES), expected, atol=1e-5, rtol=0)
    every = MATModel(clip, PromptSRCPrompts(clip, depth_text=1, depth_vision=1))
    torch.testing.assert_close(every.encode_text(NAMES), expected, atol=1e-5, rtol=0)


def test_custom_text_clip(make_clip):
    plain = make_clip()
    vision = {"layers": 4, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"width": 16, "heads": 2, "layers": 4}
    custom = open_clip.model.CustomTextCLIP(24, vision, text).eval()
    custom.text.load_state_dict({k: v for k, v in plain.state_dict().items() if k in custom.text.state_dict()})
    ids = open_clip.tokenize(["a cat"])
    torch.testing.assert_close(encode_text(custom, ids), plain.encode_text(ids), atol=1e-5, rtol=0)


def test_deep_text_tokens(clip):
    """Against the tower run by hand."""
    tower, ids = text_tower(clip).module, open_clip.tokenize(["a photo of a cat.", "a dog"])
    g = torch.Generator().manual_seed(0)
    first, deep = (torch.randn(2, 16, generator=g) for _ in range(2))
    x = tower.token_embedding(ids).clone()
    x[:, 1:3] = first
    x = x + tower.positional_embedding
    for number, block in enumerate(tower.transformer.resblocks):
        if number == 1:
            x = x.clone()
            x[:, 1:3] = deep
        x = block(x, attn_mask=tower.attn_mask)
    expected = tower.ln_final(x)[torch.arange(2), ids.argmax(1)] @ tower.text_projection
    torch.testing.assert_close(encode_text(clip, ids, first, (deep,)), expected, atol=1e-5, rtol=0)


def test_maple_structure(clip):
    learner = MaPLePrompts(clip, num_ctx=2, depth=3)
    words = clip.token_embedding(open_clip.tokenize(["a photo of a"]))[0, 1:3]
    assert torch.equal(learner.ctx, words)
    first, deeper = learner.text_prompts()
    visual = learner.visual_prompts()
    assert first.shape == (2, 16)
    assert visual.first.shape == (2, 32)
    assert len(deeper) == len(visual.deeper) == 2
    torch.testing.assert_close(visual.first, learner.maps[0](first))
    torch.testing.assert_close(visual.deeper[1], learner.maps[2](deeper[1]))
    assert 0.01 < torch.cat(deeper).std() < 0.03
    assert learner.prompt("cat") == "a photo of a cat."


def test_promptsrc_structure(clip):
    learner = PromptSRCPrompts(clip, depth_text=2, depth_vision=4)
    assert torch.equal(learner.ctx, clip.token_embedding(open_clip.tokenize(["a photo of a"]))[0, 1:5])
    assert len(learner.text_prompts()[1]) == 1
    assert learner.visual_prompts().first.shape == (4, 32)
    assert len(learner.visual_prompts().deeper) == 3


def test_trainable_numbers_of_vit_b_16():
    """Shapes alone decide, so the model may stay on the meta device, but for the embeddings that are read."""
    with torch.device("meta"):
        clip = open_clip.model.CLIP(
            512,
            {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
            {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        )
    clip.token_embedding = torch.nn.Embedding(49408, 512)
    with torch.device("cpu"):
        maple, src = MaPLePrompts(clip), PromptSRCPrompts(clip)
    assert sum(p.numel() for p in maple.parameters()) == 1_185_024
    assert sum(p.numel() for p in src.parameters()) == 46_080
    trained = [p for p in MATModel(clip, maple).parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 1_185_024 + 787_968 + 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda c: MaPLePrompts(c, num_ctx=5), "ctx_init"),
        (lambda c: MaPLePrompts(c, num_ctx=0), "ctx_init"),
        (lambda c: MaPLePrompts(c, depth=0), r"depth must lie in 1\.\.4"),
        (lambda c: MaPLePrompts(c, depth=5), r"depth must lie in 1\.\.4"),
        (lambda c: PromptSRCPrompts(c, depth_text=5), "depth_text"),
        (lambda c: PromptSRCPrompts(c, depth_text=2, depth_vision=0), "depth_vision"),
        (lambda c: PromptSRCPrompts(c, num_ctx_vision=0), "num_ctx_vision"),
        (lambda c: PromptSRCPrompts(c, depth_text=1, depth_vision=1, ctx_init="a"), "ctx_init"),
    ],
)
def test_learners_refuse(clip, make, match):
    with pytest.raises(ValueError, match=match):
        make(clip)


def test_text_refuses(clip):
    model = MATModel(clip, None)
    with pytest.raises(ValueError, match="n = 0"):
        model.encode_text([])
    with pytest.raises(ValueError, match="77 tokens"):
        model.encode_text(["word " * 90])
    with pytest.raises(ValueError, match="text transformer"):
        encode_text(torch.nn.Linear(1, 1), torch.zeros(1, 77, dtype=torch.int64))


def test_template_features(clip):
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    got = template_features(clip, ["cat", "old dog"], batch_size=7)
    for row, text in zip(got, ("cat", "old dog"), strict=True):
        ids = open_clip.tokenize([template(text) for template in OPENAI_IMAGENET_TEMPLATES[:60]])
        torch.testing.assert_close(row, F.normalize(clip.encode_text(ids).mean(0), dim=0), atol=1e-5, rtol=0)


def test_regularizer_against_plain_torch():
    g = torch.Generator().manual_seed(0)
    t, t0 = (torch.randn(5, 8, generator=g) for _ in range(2))
    f, f0 = (torch.randn(3, 8, generator=g) for _ in range(2))
    z, z0 = (torch.randn(3, 5, generator=g) for _ in range(2))
    unit = [x / x.norm(dim=1, keepdim=True) for x in (t, t0, f, f0)]
    p, p0 = z.softmax(1), z0.softmax(1)
    expected = 25 * (unit[0] - unit[1]).abs().mean() + 10 * (unit[2] - unit[3]).abs().mean()
    expected = expected + (p0 * (p0.log() - p.log())).sum() / 15
    torch.testing.assert_close(PromptSRCRegularizer()(t, t0, f, f0, z, z0), expected)
    assert PromptSRCRegularizer()(t, t, f, f, z, z).item() == pytest.approx(0, abs=1e-7)
    assert PromptSRCRegularizer()(t, t, f[:0], f[:0], z[:0], z[:0]).item() == 0
    only = PromptSRCRegularizer(2.0, 0.0, 0.0)(t, t0, f, f0, z, z0)
    torch.testing.assert_close(only, 2 * (unit[0] - unit[1]).abs().mean())
    with pytest.raises(ValueError, match="image_weight"):
        PromptSRCRegularizer(image_weight=-1.0)


def test_gaussian_average_against_plain_torch():
    average = GaussianPromptAverage(5, mean=3.0, std=2.0)
    density = torch.tensor([math.exp(-((e - 3) ** 2) / 8) for e in range(1, 6)], dtype=torch.float64)
    torch.testing.assert_close(average.weights, density / density.sum())
    assert average.weights.sum().item() == pytest.approx(1)
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    states = []
    for epoch in range(5):
        with torch.no_grad():
            model.weight.fill_(float(epoch))
        states.append(model.weight.detach().clone())
        average.update(model.named_parameters())
        if epoch < 4:
            with pytest.raises(RuntimeError, match="of 5 epochs"):
                average.copy_to(model)
    frozen = model.bias.clone()
    average.copy_to(model)
    expected = sum(w * s.double() for w, s in zip(average.weights, states, strict=True))
    torch.testing.assert_close(model.weight.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.bias, frozen)
    with pytest.raises(RuntimeError, match="all 5 epochs"):
        average.update(model.named_parameters())
    for call in (lambda: GaussianPromptAverage(0), lambda: GaussianPromptAverage(3, std=0.0)):
        with pytest.raises(ValueError, match="num_epochs|std"):
            call()
