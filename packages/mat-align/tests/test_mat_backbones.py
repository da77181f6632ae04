"""Adapters against the models' own features, prompts on every backbone, learners of one's own."""

import copy

import open_clip
import pytest
import torch
from torch import nn

from mat_align import HETEROGENEOUS, Backbone, MaPLePrompts, MATModel, MATObjective, PromptSRCPrompts, released
from mat_align.prompts import PromptLearner, initial_context

transformers = pytest.importorskip("transformers")
NAMES = ["cat", "old dog", "a red fish"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def words_of(length):
    """Stands for a tokenizer that needs a download: a number for each word, then the end token 1."""

    def tokenizer(texts):
        ids = torch.ones(len(texts), length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            found = [2 + sum(map(ord, word.strip("."))) % 90 for word in text.split()]
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids

    return tokenizer


def hf_clip():
    text = transformers.CLIPTextConfig(**SIZES, vocab_size=49408, eos_token_id=49407)
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    return Backbone(transformers.CLIPModel(config))


def siglip():
    text = transformers.SiglipTextConfig(**SIZES, vocab_size=100, max_position_embeddings=16, projection_size=32)
    vision = transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    return Backbone(transformers.SiglipModel(config), words_of(16))


def siglip2():
    text = transformers.Siglip2TextConfig(**SIZES, vocab_size=100, max_position_embeddings=16, projection_size=32)
    vision = transformers.Siglip2VisionConfig(**SIZES, num_patches=4, patch_size=8)
    config = transformers.Siglip2Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    return Backbone(transformers.Siglip2Model(config), words_of(16))


def eva():
    from timm.models.eva import Eva

    class Visual(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = Eva(
                16, 8, num_classes=24, global_pool="token", embed_dim=32, depth=4, num_heads=4, use_rot_pos_emb=True,
                swiglu_mlp=True, qkv_fused=False, ref_feat_shape=(2, 2),
            )  # fmt: skip
            self.head = nn.Sequential()

        def forward(self, x):
            return self.head(self.trunk(x))

    vision = {"layers": 1, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16}
    model = open_clip.model.CustomTextCLIP(24, vision, {"width": 16, "heads": 2, "layers": 4})
    model.visual = Visual()
    return Backbone(model)


BACKBONES = {f.__name__: f for f in (hf_clip, siglip, siglip2, eva)}


@pytest.fixture(params=BACKBONES)
def parts(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = BACKBONES[request.param]()
        with torch.no_grad():  # random positions too: some start at 0
            for parameter in found.model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    found.model.eval()
    return found


def tensor(out):
    return out if isinstance(out, torch.Tensor) else out.pooler_output


@torch.no_grad()
def test_features_are_the_models_own(parts, images):
    model, name = parts.model, type(parts.model).__name__
    prompt = [f"a photo of a {name}." for name in NAMES]
    ids = parts.text.tokenize(prompt)
    if name == "Siglip2Model":
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(images), 4, -1)
        options = {"pixel_attention_mask": torch.ones(len(images), 4, dtype=torch.int64)}
        options["spatial_shapes"] = torch.full((len(images), 2), 2)
        image = tensor(model.get_image_features(patches, **options))
    elif name == "CustomTextCLIP":
        image = model.encode_image(images)
    else:
        image = tensor(model.get_image_features(images))
    text = model.encode_text(ids) if name == "CustomTextCLIP" else tensor(model.get_text_features(ids))
    found = MATModel(parts, None)
    tokens = found.encode_image(images)
    assert tokens.shape == (3, 3, image.shape[1])
    torch.testing.assert_close(tokens[:, -1], image, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.frozen_image(images), image, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.encode_text(NAMES), text, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_token_alone_is_the_block_on_one_token(parts, images):
    tower = parts.image
    h = torch.randn(2, 3, tower.width, generator=torch.Generator().manual_seed(0))
    got = tower.alone(1, h)
    for i in range(2):
        for j in range(3):
            single = h[i : i + 1, j : j + 1]
            rope = {"rope": None} if type(parts.model).__name__ == "CustomTextCLIP" else {}
            torch.testing.assert_close(got[i, j], tower.blocks[1](single, **rope)[0, 0], atol=1e-5, rtol=1e-4)
    first = torch.randn(2, tower.width)
    x, with_learned = tower.embed(images, None), tower.embed(images, first)
    assert with_learned.shape[1] == x.shape[1] + 2
    assert tower.block(0, with_learned).shape == with_learned.shape


@torch.no_grad()
def test_learned_tokens_of_an_eva_are_not_rotated(images):
    torch.manual_seed(0)
    tower = eva().image
    trunk, first = tower.module.trunk, torch.randn(2, tower.width)
    x = tower.embed(images, first)
    got = tower.block(0, x)
    # timm leaves the tokens in front alone; there is room for three of them here.
    trunk.blocks[0].attn.num_prefix_tokens = 3
    order = [0, 5, 6, 1, 2, 3, 4]
    torch.testing.assert_close(got[:, order], trunk.blocks[0](x[:, order], rope=trunk.rope.get_embed()))


@pytest.mark.parametrize("method", [MaPLePrompts, PromptSRCPrompts])
def test_prompts_train_and_reload(parts, tax, images, tmp_path, method):
    options = {"depth": 3} if method is MaPLePrompts else {"depth_text": 3, "depth_vision": 4}
    torch.manual_seed(0)
    model = MATModel(parts, method(parts, **options), HETEROGENEOUS)
    target = torch.tensor([6, 3, 5])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("clip.") for name in trained)
    before = MATObjective(tax)(model, images, target, torch.Generator().manual_seed(0)).total
    before.backward()
    for name, p in trained.items():
        assert (p.grad is not None and p.grad.abs().sum() > 0) or name.endswith("key.bias"), name
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    optimizer.step()
    after = MATObjective(tax)(model, images, target, torch.Generator().manual_seed(0)).total
    assert after < before
    model.save_pretrained(tmp_path)
    loaded = MATModel.from_pretrained(tmp_path, parts)
    for a, b in zip(model(images, NAMES)[:3], loaded(images, NAMES)[:3], strict=True):
        assert torch.equal(a, b)


def test_refused_in_one_sentence(clip):
    vision = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8}
    residual = open_clip.model.CLIP(24, vision, {"width": 16, "heads": 2, "layers": 4})
    for make in (lambda: MaPLePrompts(residual), lambda: MATModel(residual, None), lambda: PromptSRCPrompts(residual)):
        with pytest.raises(ValueError, match=r"vision transformer with a class token .* got ModifiedResNet$"):
            make()
    with pytest.raises(ValueError, match="tokenizer must be given for SigLIP"):
        Backbone(siglip().model)
    with pytest.raises(ValueError, match="mode must be one of"):
        MATModel(siglip(), None, released(HETEROGENEOUS)).encode_image(torch.zeros(1, 3, 16, 16))
    other = siglip()
    other.text.dim = 24
    with pytest.raises(ValueError, match=r"towers must share a width, got 32 and 24"):
        MATModel(other, None)


def test_learners_of_your_own(clip, images, tmp_path):
    class CoOp(PromptLearner):
        kind = "coop"

        def __init__(self, clip, num_ctx=4, ctx_init="a photo of a"):
            super().__init__()
            self.ctx_init, self.settings = ctx_init, {"num_ctx": num_ctx, "ctx_init": ctx_init}
            self.ctx = nn.Parameter(initial_context(clip, ctx_init, num_ctx))

        def text_prompts(self):
            return self.ctx, ()

    class WithNet(CoOp):
        """As CoCoOp, with a small network behind the tokens."""

        kind = "coop-net"

        def __init__(self, clip, hidden=4, **settings):
            super().__init__(clip, **settings)
            self.settings |= {"hidden": hidden}
            width = self.ctx.shape[1]
            self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

        def text_prompts(self):
            return self.ctx + self.net(self.ctx.mean(0)), ()

    plain = MATModel(copy.deepcopy(clip), None)
    untrained = MATModel(copy.deepcopy(clip), CoOp(clip))
    torch.testing.assert_close(untrained.encode_text(NAMES), plain.encode_text(NAMES), atol=1e-5, rtol=1e-4)
    for learner in (CoOp(clip, num_ctx=2), WithNet(clip, hidden=3, num_ctx=2)):
        model = MATModel(copy.deepcopy(clip), learner)
        with torch.no_grad():
            learner.ctx.add_(1.0)
        model.save_pretrained(tmp_path / learner.kind)
        loaded = MATModel.from_pretrained(tmp_path / learner.kind, copy.deepcopy(clip))
        assert type(loaded.prompts) is type(learner)
        assert torch.equal(loaded.encode_text(NAMES), model.encode_text(NAMES))
    config = tmp_path / "coop" / "mat_align.json"
    config.write_text(config.read_text().replace('"coop"', '"other"'))
    with pytest.raises(ValueError, match=r"kind 'other' must be defined first; known are .*maple"):
        MATModel.from_pretrained(tmp_path / "coop", clip)
