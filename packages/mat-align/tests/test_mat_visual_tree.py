"""Layer tokens, stage tokens and text-queried attention."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from torch.nn import functional as F

from mat_align import LayerTokens, StageTokens, TextQueriedAttention, relative_layers, value_pass_through
from mat_align.visual_tree import VisualPrompts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(B=3, n=7, M=3, d=16, dtype=torch.float64, seed=0):
    g = generator(seed)
    tokens = torch.randn(B, M, d, generator=g, dtype=torch.float64).to(dtype)
    text = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    attention = TextQueriedAttention(d).to(dtype)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) / math.sqrt(d))
    return attention, tokens, text


@pytest.mark.parametrize(
    ("num", "expected"), [(6, (2, 3, 5)), (12, (4, 7, 11)), (24, (9, 15, 23)), (32, (12, 20, 31)), (3, (0, 1, 2))]
)
def test_depth_rule(num, expected):
    assert relative_layers(num) == expected


@pytest.mark.parametrize(
    "args", [(0,), (2,), (12, (0.5, 0.4)), (12, (0.5, 0.5)), (12, (0.0, 1.0)), (12, (1.2,)), (12, ())]
)
def test_depth_rule_refuses(args):
    with pytest.raises(ValueError, match="num_blocks|fractions|layers"):
        relative_layers(*args)


@pytest.mark.parametrize("ls", [None, 0.3])
def test_pass_through_is_the_block_on_single_tokens(make_clip, ls):
    block = make_clip(ls=ls).visual.transformer.resblocks[1]
    h = torch.randn(4, 3, 32, generator=generator())
    got = value_pass_through(block, h)
    alone = block(h.reshape(12, 1, 32)).reshape(4, 3, 32)
    torch.testing.assert_close(got, alone, atol=1e-6, rtol=0)
    mask = torch.full((3, 3), -math.inf).fill_diagonal_(0)
    torch.testing.assert_close(got, block(h, attn_mask=mask), atol=1e-5, rtol=0)


def test_released_pass_through(clip):
    block = clip.visual.transformer.resblocks[0]
    h = torch.randn(2, 1, 32, generator=generator())
    attention = block.attn
    value = F.linear(h, attention.in_proj_weight[64:], attention.in_proj_bias[64:])
    expected = h + attention.out_proj(value)
    expected = 2 * expected + block.mlp(block.ln_2(expected))
    torch.testing.assert_close(value_pass_through(block, h, "released"), expected)


def test_pass_through_refuses(clip):
    block = clip.visual.transformer.resblocks[0]
    with pytest.raises(ValueError, match="mode"):
        value_pass_through(block, torch.zeros(1, 1, 32), "other")
    with pytest.raises(ValueError, match="h must have width 32"):
        value_pass_through(block, torch.zeros(1, 1, 31))
    with pytest.raises(ValueError, match="block"):
        value_pass_through(nn.Linear(2, 2), torch.zeros(1, 1, 2))


def test_last_layer_is_the_clip_feature(clip, images):
    got = LayerTokens(clip.visual, (3,))(images)
    torch.testing.assert_close(got[:, 0], clip.encode_image(images), atol=1e-5, rtol=0)


def test_layer_tokens_are_early_class_tokens_carried_on(clip, images):
    tokens = LayerTokens(clip.visual, (0, 2, 3))(images)
    visual = clip.visual
    states = visual.forward_intermediates(images, output_extra_tokens=True, normalize_intermediates=False)
    first, third = (states["image_intermediates_prefix"][i] for i in (0, 2))
    for block in visual.transformer.resblocks[1:]:
        first = block(first)
    third = visual.transformer.resblocks[3](third)
    expected = torch.cat([visual.ln_post(x) @ visual.proj for x in (first, third)], dim=1)
    torch.testing.assert_close(tokens[:, :2], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 2], clip.encode_image(images), atol=1e-5, rtol=0)


def test_prompts_enter_where_they_should(clip, images):
    """Against the tower run by hand, with deep tokens in the last places."""
    visual, g = clip.visual, generator(5)
    prompts = VisualPrompts(torch.randn(2, 32, generator=g), (torch.randn(2, 32, generator=g),))
    x = visual.conv1(images).flatten(2).mT
    x = torch.cat((visual.class_embedding.expand(3, 1, -1), x), 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat((x, prompts.first.expand(3, -1, -1)), 1))
    for number, block in enumerate(visual.transformer.resblocks):
        if number == 1:
            x = x.clone()
            x[:, -2:] = prompts.deeper[0]
        x = block(x)
    expected = visual.ln_post(x[:, 0]) @ visual.proj
    torch.testing.assert_close(LayerTokens(visual, (3,))(images, prompts)[:, 0], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at most 3 deeper"):
        LayerTokens(visual)(images, VisualPrompts(prompts.first, (prompts.first,) * 4))


def test_learned_mix_starts_at_the_rule(clip, images):
    mixed = LayerTokens(clip.visual, (0, 1, 3), mix="learned")
    weights = mixed.mix_logits.softmax(-1)
    assert weights.shape == (3, 4)
    torch.testing.assert_close(weights[0, 0].item(), 0.9)
    every = LayerTokens(clip.visual, (0, 1, 2, 3))(images)
    torch.testing.assert_close(mixed(images), weights @ every)
    mixed(images).square().sum().backward()
    assert mixed.mix_logits.grad.abs().sum() > 0
    assert [name for name, _ in mixed.named_parameters()] == ["mix_logits"]


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1, 2), (0, 4), ()])
def test_layers_refused(clip, layers):
    with pytest.raises(ValueError, match="layers must be ascending"):
        LayerTokens(clip.visual, layers)


def test_towers_refused(clip, make_clip):
    with pytest.raises(ValueError, match="class token"):
        LayerTokens(nn.Linear(2, 2))
    pooled = make_clip().visual
    pooled.pool_type = "avg"
    with pytest.raises(ValueError, match="class token"):
        LayerTokens(pooled)
    with pytest.raises(ValueError, match="pass_through"):
        LayerTokens(clip.visual, pass_through="x")
    with pytest.raises(ValueError, match="mix"):
        LayerTokens(clip.visual, mix="x")


def test_empty_batch_and_batch_of_one(clip, images):
    assert LayerTokens(clip.visual)(images[:0]).shape == (0, 3, 24)
    whole, one = LayerTokens(clip.visual)(images), LayerTokens(clip.visual)(images[:1])
    torch.testing.assert_close(whole[:1], one)


def test_attended_is_multihead_attention():
    attention, tokens, text = problem(d=512, n=5, dtype=torch.float32)
    peer = nn.MultiheadAttention(512, 1, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([m.weight for m in (attention.query, attention.key, attention.value)]))
        peer.in_proj_bias.copy_(torch.cat([m.bias for m in (attention.query, attention.key, attention.value)]))
        peer.out_proj.weight.copy_(torch.eye(512))
        peer.out_proj.bias.zero_()
    query = text.expand(3, -1, -1)
    expected, weights = peer(query, tokens, tokens)
    torch.testing.assert_close(attention.attended(tokens, text), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attention.weights(tokens, text), weights, atol=1e-6, rtol=1e-5)


def test_initialisation_and_size():
    attention = TextQueriedAttention(512)
    assert sum(p.numel() for p in attention.parameters()) == 787_968
    bound = math.sqrt(6 / (4 * 512))
    for linear in (attention.query, attention.key):
        assert 0.99 * bound < linear.weight.abs().max() <= bound
    assert torch.equal(attention.value.weight, torch.eye(512))
    assert all(not m.bias.any() for m in (attention.query, attention.key, attention.value))
    with pytest.raises(ValueError, match="dim"):
        TextQueriedAttention(0)


def test_gram_equals_naive_in_float64():
    results = {}
    for form in ("gram", "naive"):
        attention, tokens, text = problem()
        tokens.requires_grad_()
        text.requires_grad_()
        z = attention.logits(tokens, text, math.log(100), form)
        (z * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)).sum().backward()
        gradients = [x.grad for x in (tokens, text, *attention.parameters())]
        results[form] = z.detach(), gradients
    torch.testing.assert_close(*(results[f][0] for f in results), rtol=1e-12, atol=1e-12)
    for gram, naive in zip(results["gram"][1], results["naive"][1], strict=True):
        assert (gram - naive).norm() <= 1e-10 * naive.norm() + 1e-12


def test_gram_against_a_loop():
    attention, tokens, text = problem(B=2, n=3, M=2, d=4)
    got = attention.logits(tokens, text, math.log(3))
    for b in range(2):
        for j in range(3):
            q = attention.query.weight @ text[j] + attention.query.bias
            score = [q @ (attention.key.weight @ h + attention.key.bias) / 2 for h in tokens[b]]
            a = torch.stack(score).softmax(0)
            v = sum(
                a_l * (attention.value.weight @ h + attention.value.bias) for a_l, h in zip(a, tokens[b], strict=True)
            )
            assert got[b, j].item() == pytest.approx(3 * (v @ text[j] / v.norm() / text[j].norm()).item(), abs=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.6)])
def test_logits_in_low_precision(dtype, bound):
    attention, tokens, text = problem(B=8, n=50, d=512)
    tokens, text = tokens.to(dtype).double(), text.to(dtype).double()
    exact = attention.logits(tokens, text, math.log(100))
    got = attention.to(dtype).logits(tokens.to(dtype), text.to(dtype), math.log(100))
    assert got.dtype == torch.float32
    assert (got.double() - exact).abs().max() <= bound


def test_half_inputs_meet_float32_weights_and_autocast():
    attention, tokens, text = problem(dtype=torch.float32)
    exact = attention.logits(tokens.bfloat16().float(), text.bfloat16().float(), 0.0)
    torch.testing.assert_close(attention.logits(tokens.bfloat16(), text.bfloat16(), 0.0), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.logits(tokens, text, 0.0).dtype == torch.float32


def test_logits_gradcheck():
    attention, tokens, text = problem(B=2, n=3, M=2, d=3)
    tokens.requires_grad_()
    text.requires_grad_()
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention.logits, (tokens, text, scale))


def test_attended_at_takes_each_pictures_own_labels():
    attention, tokens, text = problem(n=4)
    path_text = text[torch.tensor([[0, 1], [2, 2], [3, 0]])]
    every = attention.attended(tokens, text)
    expected = torch.stack([every[b, i] for b, i in enumerate(torch.tensor([[0, 1], [2, 2], [3, 0]]))])
    torch.testing.assert_close(attention.attended_at(tokens, path_text), expected)


def test_a_feature_does_not_depend_on_other_labels():
    attention, tokens, text = problem()
    torch.testing.assert_close(attention.logits(tokens, text[2:3], 0.0), attention.logits(tokens, text, 0.0)[:, 2:3])


def test_zero_vectors_give_finite_gradients():
    attention, _, _ = problem(d=4)
    with torch.no_grad():
        attention.value.bias.zero_()
    tokens, text = (torch.zeros(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (3, 4)))
    z = attention.logits(tokens, text, 0.0)
    z.sum().backward()
    assert not z.any()
    assert all(x.grad.isfinite().all() for x in (tokens, text, *attention.parameters()))


def test_attention_refuses():
    attention, tokens, text = problem()
    with pytest.raises(ValueError, match="n = 0"):
        attention.logits(tokens, text[:0], 0.0)
    # Under the shape-checking hook the annotations speak first.
    with pytest.raises((ValueError, TypeCheckError), match="text must have width|text"):
        attention.logits(tokens, text[:, :3], 0.0)
    with pytest.raises((ValueError, TypeCheckError), match="tokens must have width|text"):
        attention.logits(tokens[..., :3], text, 0.0)
    with pytest.raises(ValueError, match="form"):
        attention.logits(tokens, text, 0.0, "x")
    with pytest.raises((ValueError, TypeCheckError), match="path_text"):
        attention.attended_at(tokens, text[None])
    assert attention.logits(tokens[:0], text, 0.0).shape == (0, 7)


def test_stage_tokens_fit_is_ridge_regression():
    g = generator(3)
    features, target = torch.randn(40, 11, generator=g), torch.randn(40, 5, generator=g)
    stages = StageTokens((4, 7), 5).fit_(features, target, ridge=0.3)
    for m, x in zip(stages.maps, features.double().split((4, 7), 1), strict=True):
        one = torch.cat((x, torch.ones(40, 1, dtype=torch.float64)), 1)
        centred = x - x.mean(0)
        penalty = 0.3 * centred.square().sum() / x.shape[1]
        lhs = one.mT @ one + torch.diag(torch.cat((penalty.expand(x.shape[1]), torch.zeros(1, dtype=torch.float64))))
        solution = torch.linalg.solve(lhs, one.mT @ target.double())
        torch.testing.assert_close(m.weight.double(), solution[:-1].mT, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(m.bias.double(), solution[-1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(stages(features)[:, 1], stages.maps[1](features[:, 4:]))
    exact = StageTokens((11,), 11).fit_(features, features, ridge=1e-12)
    torch.testing.assert_close(exact(features)[:, 0], features, atol=1e-4, rtol=0)


def test_stage_tokens_edges():
    maps = [torch.ones(2, 3, 4, 5), torch.arange(4.0).view(2, 2)]
    pooled = StageTokens.pool(maps)
    assert pooled.tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 2, 3]]
    one = StageTokens((5,), 2).fit_(pooled[:1], torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(one(pooled[:1])[0, 0], torch.tensor([1.0, 2.0]))
    assert StageTokens((3, 2), 2)(pooled[:0]).shape == (0, 2, 2)
    for call in (
        lambda: StageTokens((), 2),
        lambda: StageTokens((3,), 0),
        lambda: StageTokens((3,), 2)(pooled),
        lambda: one.fit_(pooled, torch.zeros(2, 3)),
        lambda: one.fit_(pooled[:0], torch.zeros(0, 2)),
        lambda: one.fit_(pooled, torch.zeros(2, 2), ridge=0.0),
    ):
        with pytest.raises(ValueError, match="widths|features|target|ridge"):
            call()


@pytest.mark.compile
def test_logits_compile():
    attention, tokens, text = problem(dtype=torch.float32)
    compiled = torch.compile(attention.logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, text, torch.tensor(1.0)), attention.logits(tokens, text, 1.0))
