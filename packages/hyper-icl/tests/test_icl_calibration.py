"""Calibration on the nine families: bit-equality without a plan, generation, padding, other forms of the same bias."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hyper_icl import (
    CalibrationPlan,
    SegmentMap,
    additive_mask,
    augment_qk,
    calibrate,
    hierarchy_bias,
    register_attention,
    text_attention_modules,
    use_calibrated_attention,
)
from hyper_icl._attention import NAMES
from hyper_icl._hooks import hooks_of, is_active

FAMILIES = (
    "idefics1",
    "idefics2",
    "idefics3",
    "smolvlm",
    "llava",
    "llava_interleave",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
GENERATING = ("idefics1", "idefics2", "idefics3", "smolvlm", "llava", "qwen2_vl")
BIAS = torch.tensor([[2.0, -1.5], [-2.0, 1.0]])


def plan_of(prompt, bias=BIAS, **kwargs):
    return CalibrationPlan(bias, SegmentMap.from_lengths(prompt.prefix, prompt.demos, prompt.query), **kwargs)


def logits(model, prompt, **kwargs):
    with torch.no_grad():
        return model(**prompt.inputs, **kwargs).logits


def original(model):
    """Switch the text model back to transformers' own sdpa."""
    subs = {key: "sdpa" for key in model.config.sub_configs if getattr(model.config, key, None) is not None}
    model.set_attn_implementation({"": "sdpa", **subs})


@pytest.mark.parametrize("name", FAMILIES)
def test_forward(families, name):
    model, prompt = families.model(name), families.make_prompt(name)
    original(model)
    plain = logits(model, prompt)
    use_calibrated_attention(model)
    assert len(text_attention_modules(model)) == 2
    assert torch.equal(logits(model, prompt), plain)
    with calibrate(model, plan_of(prompt)):
        calibrated = logits(model, prompt)
        assert all(hooks_of(module).bias is not None for module in text_attention_modules(model).values())
    assert all(hooks_of(module) is None for module in text_attention_modules(model).values())
    start = int(plan_of(prompt).segments.query_start[0])
    assert torch.equal(calibrated[:, :start], plain[:, :start])
    assert (calibrated[:, start:] - plain[:, start:]).abs().amax((-2, -1)).min() > 1e-2
    assert torch.equal(logits(model, prompt), plain)
    # lambda = 0 is no plan at all; a tiny lambda goes all the way and agrees.
    with calibrate(model, plan_of(prompt, 0 * BIAS)):
        assert torch.equal(logits(model, prompt), plain)
    with calibrate(model, plan_of(prompt, 1e-8 * BIAS)):
        torch.testing.assert_close(logits(model, prompt), plain, atol=1e-6 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_run(families, name):
    model, prompt = families.model(name), families.make_prompt(name)
    use_calibrated_attention(model)
    plain = model.generate(**prompt.inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    with calibrate(model, plan_of(prompt)):
        ids = model.generate(**prompt.inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    assert ids.shape[0] == plain.shape[0] == 2
    assert ids.shape[1] <= prompt.inputs["input_ids"].shape[1] + 3


def scores(model, prompt, **kwargs):
    with torch.no_grad():
        return model.generate(
            **prompt.inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **kwargs,
        )


@pytest.mark.parametrize("name", GENERATING)
def test_cached_is_uncached(families, name):
    model, prompt = families.model(name), families.make_prompt(name)
    use_calibrated_attention(model)
    for beams in (1, 3):
        with calibrate(model, plan_of(prompt)):
            cached = scores(model, prompt, num_beams=beams)
            fresh = scores(model, prompt, num_beams=beams, use_cache=False)
        plain = scores(model, prompt, num_beams=beams)
        assert torch.equal(cached.sequences, fresh.sequences)
        for a, b, c in zip(cached.scores, fresh.scores, plain.scores, strict=True):
            finite = torch.isfinite(a)
            torch.testing.assert_close(a[finite], b[finite], atol=2e-4, rtol=1e-4)
            assert (a[finite] - c[finite]).abs().max() > 1e-3


@pytest.mark.parametrize("name", GENERATING)
def test_beams_follow_their_prompt(families, name):
    """Each prompt of the batch alone gives the same beams: the bias is repeated per prompt, not tiled."""
    model, prompt = families.model(name), families.make_prompt(name)
    use_calibrated_attention(model)
    with calibrate(model, plan_of(prompt)):
        both = scores(model, prompt, num_beams=3)
    for i in range(2):
        one = families.make_prompt(name)
        one.inputs = {k: v[i : i + 1] for k, v in one.inputs.items() if k not in ("pixel_values", "image_grid_thw")}
        num = len(prompt.inputs["pixel_values"]) // 2
        one.inputs["pixel_values"] = prompt.inputs["pixel_values"][i * num : (i + 1) * num]
        if "image_grid_thw" in prompt.inputs:
            one.inputs["image_grid_thw"] = prompt.inputs["image_grid_thw"][:3]
        one.prefix, one.demos, one.query = one.prefix[:1], one.demos[:1], one.query[:1]
        with calibrate(model, plan_of(one, BIAS[i : i + 1])):
            alone = scores(model, one, num_beams=3)
        for a, b in zip(both.scores, alone.scores, strict=True):
            finite = torch.isfinite(b)
            torch.testing.assert_close(a[3 * i : 3 * i + 3][finite], b[finite], atol=2e-4, rtol=1e-4)


def positions(model, name, prompt):
    mask = prompt.inputs["attention_mask"]
    if name.startswith("qwen"):
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return model.model.get_rope_index(**{k: prompt.inputs[k] for k in keys})[0]
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("pad", [0, 3])
def test_a_4d_mask_says_the_same(families, name, pad):
    model, prompt = families.model(name), families.make_prompt(name, pad=pad)
    plan = plan_of(prompt)
    use_calibrated_attention(model)
    with calibrate(model, plan):
        registered = logits(model, prompt)
    mask = additive_mask(plan, prompt.inputs["attention_mask"].bool())
    explicit = dict(prompt.inputs, attention_mask=mask, position_ids=positions(model, name, prompt))
    original(model)
    with torch.no_grad():
        dense = model(**explicit).logits
    scale = float(dense.abs().max())
    torch.testing.assert_close(registered[:, pad:], dense[:, pad:], atol=1e-6 * max(scale, 1.0) * 4, rtol=0)


@pytest.mark.parametrize("name", GENERATING)
def test_left_padding(families, name):
    model, prompt, padded = families.model(name), families.make_prompt(name), families.make_prompt(name, pad=5)
    use_calibrated_attention(model)
    assert torch.equal(plan_of(prompt).segments.left_padded(5).ids, plan_of(padded).segments.ids)
    with calibrate(model, plan_of(prompt)):
        alone = scores(model, prompt)
    with calibrate(model, plan_of(padded)):
        beside = scores(model, padded)
    for a, b in zip(alone.scores, beside.scores, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


# transformers asks torch for block masks in a way that torch 2.15 calls outdated.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize(
    "backend", ["eager", "augmented", pytest.param("flex", marks=[pytest.mark.slow, pytest.mark.compile])]
)
@pytest.mark.parametrize("rows", ["query", "all"])
def test_backends_agree(families, backend, rows):
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3", pad=2)
    per_head = BIAS.unsqueeze(1) * torch.tensor([1.0, 0.5, -1.0, 0.0]).view(1, 4, 1)
    for bias in (BIAS, per_head):
        use_calibrated_attention(model)
        plan = plan_of(prompt, bias, rows=rows)
        with calibrate(model, plan):
            expected = scores(model, prompt)
            full = logits(model, prompt)
        use_calibrated_attention(model, backend)
        with calibrate(model, plan):
            torch.testing.assert_close(logits(model, prompt)[:, 2:], full[:, 2:], atol=2e-5, rtol=1e-5)
            found = scores(model, prompt)
        assert torch.equal(found.sequences, expected.sequences)
    use_calibrated_attention(model)


def test_rows_all_biases_the_demonstrations_too(families):
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    plain = logits(model, prompt)
    with calibrate(model, plan_of(prompt, rows="all")):
        found = logits(model, prompt)
    second = int(plan_of(prompt).segments.ids[0].tolist().index(1))
    assert torch.allclose(found[:, 0], plain[:, 0], atol=1e-5)
    assert (found[:, second:] - plain[:, second:]).abs().amax(-1).min() > 1e-3


def test_eager_returns_weights_that_follow_the_bias(families):
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model, "eager")
    with torch.no_grad():
        plain = model(**prompt.inputs, output_attentions=True).attentions[0]
        with calibrate(model, plan_of(prompt)):
            found = model(**prompt.inputs, output_attentions=True).attentions[0]
    use_calibrated_attention(model)
    segments = plan_of(prompt).segments
    start = int(segments.query_start[0])
    gain = torch.nn.functional.pad(BIAS, (1, 1)).gather(1, segments.ids + 1).exp()
    expected = plain[:, :, start:] * gain[:, None, None]
    torch.testing.assert_close(found[:, :, start:], expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
    assert torch.equal(found[:, :, :start], plain[:, :, :start])


def test_layers_are_weighted(families):
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    with calibrate(model, plan_of(prompt, layers={0: 1.0, 1: 1.0})):
        both = logits(model, prompt)
    with calibrate(model, plan_of(prompt)):
        assert torch.equal(logits(model, prompt), both)
    with calibrate(model, plan_of(prompt, layers={1: 0.5})):
        half = logits(model, prompt)
        assert list(hooks_of(m) is None for m in text_attention_modules(model).values()) == [True, False]
    with calibrate(model, plan_of(prompt, 0.5 * BIAS, layers={1: 1.0})):
        assert torch.equal(logits(model, prompt), half)
    with calibrate(model, plan_of(prompt, layers={0: 0.0})):
        assert hooks_of(text_attention_modules(model)[0]) is None


def test_ragged_queries_keep_their_demonstrations(families):
    """In a batch whose queries differ in length, rows before each query keep their bits."""
    torch.manual_seed(0)
    config = LlamaConfig(**families.TEXT)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 90, (2, 12))
    plain = model(ids).logits
    use_calibrated_attention(model)
    segments = SegmentMap.from_lengths([1, 1], [[3, 3], [2, 3]], [5, 6])
    with calibrate(model, CalibrationPlan(5 * BIAS, segments)), torch.no_grad():
        found = model(ids).logits
    for i, start in enumerate(segments.query_start.tolist()):
        assert torch.equal(found[i, :start], plain[i, :start])
        assert (found[i, start:] - plain[i, start:]).abs().amax(-1).min() > 1e-5
    assert model.config._attn_implementation == NAMES["sdpa"]


def test_plans_nest_and_leave_no_trace(families):
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    keys = set(model.state_dict())
    with calibrate(model, plan_of(prompt)):
        outer = logits(model, prompt)
        with calibrate(model, plan_of(prompt, -BIAS)):
            assert (logits(model, prompt) - outer).abs().max() > 1e-2
        assert torch.equal(logits(model, prompt), outer)
        with calibrate(model, plan_of(prompt, 0 * BIAS)):
            assert (logits(model, prompt) - outer).abs().max() > 1e-2
        assert set(model.state_dict()) == keys
    with pytest.raises(RuntimeError, match="boom"), calibrate(model, plan_of(prompt)):
        raise RuntimeError("boom")
    assert all(hooks_of(m) is None and not is_active(m) for m in text_attention_modules(model).values())


def test_gradients_flow(families):
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    bias = BIAS.clone().requires_grad_()
    with calibrate(model, plan_of(prompt, bias)):
        model(**prompt.inputs).logits[:, -1].square().mean().backward()
    assert bias.grad.abs().min() > 0
    step = 1e-2
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            moved = BIAS.clone()
            moved[0, 0] += sign * step
            with calibrate(model, plan_of(prompt, moved)):
                values.append(model(**prompt.inputs).logits[:, -1].square().mean())
    assert float(bias.grad[0, 0]) == pytest.approx(float(values[0] - values[1]) / (2 * step), rel=2e-2)
    model.zero_grad()


def test_bf16_and_checkpointing(families):
    model, prompt = families.make_model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    with calibrate(model, plan_of(prompt)):
        exact = model(**prompt.inputs, use_cache=False).logits
        exact.square().mean().backward()
        expected = model.model.text_model.layers[0].self_attn.q_proj.weight.grad.clone()
        model.zero_grad()
        model.train()
        model.activation_checkpointing_enable()
        model(**prompt.inputs, use_cache=False).logits.square().mean().backward()
        torch.testing.assert_close(
            model.model.text_model.layers[0].self_attn.q_proj.weight.grad, expected, rtol=1e-4, atol=1e-6
        )
    model.activation_checkpointing_disable()
    model.eval().bfloat16()
    prompt.inputs["pixel_values"] = prompt.inputs["pixel_values"].bfloat16()
    with calibrate(model, plan_of(prompt)):
        half = logits(model, prompt)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_golden_bias():
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    demos = torch.tensor([[[0.5, 0.0], [2.0, 0.2], [1.0, 1.0]]], dtype=torch.float64)
    found = hierarchy_bias(query, demos, beta=0.5)
    expected = torch.tensor([[0.4073898953, -0.375316827, -0.2106735295]])
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    raw = hierarchy_bias(query, demos, beta=0.5, center=False)
    torch.testing.assert_close(raw, -torch.tensor([[0.75, 1.532706722, 1.368063425]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", ["neg", "inverse", "exp"])
def test_bias_is_its_formula(kernel):
    generator = torch.Generator().manual_seed(0)
    query, demos = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 5), (3, 4, 5)))
    found = hierarchy_bias(query, demos, 0.7, kernel, tau=1.5, beta=0.3, lam=2.0, clip=1.1)
    from hyper_geom import lorentz

    for i in range(3):
        delta = [
            float(lorentz.tangent0_dist(query[i], demos[i, j], c=0.7))
            + 0.3 * abs(float(query[i].norm() - demos[i, j].norm()))
            for j in range(4)
        ]
        h = [{"neg": -d / 1.5, "inverse": 1 / (1 + d), "exp": math.exp(-d / 1.5)}[kernel] for d in delta]
        centre = math.log(sum(math.exp(x) for x in h) / 4)
        expected = [max(-1.1, min(1.1, 2 * (x - centre))) for x in h]
        torch.testing.assert_close(found[i], torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert (hierarchy_bias(query, demos, lam=0.0) == 0).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_augmentation_is_the_dense_bias(groups):
    generator = torch.Generator().manual_seed(0)
    b, h, t, d, z = 2, 4, 11, 6, 5

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(b, h, t, d), draw(b, h // groups, t, d), draw(b, h // groups, t, d)
    segments = torch.randint(0, z, (b, t), generator=generator)
    for table in (draw(b, h, z, z), draw(b, 1, z, z)):
        q2, k2, v2 = augment_qk(q, k, v, table, segments, 0.37)
        assert q2.shape[-1] == k2.shape[-1] == v2.shape[-1] == 16
        keys, values, k2, v2 = (x.repeat_interleave(groups, 1) for x in (k, v, k2, v2))
        index = torch.arange(b)[:, None, None]
        bias = table.permute(0, 2, 3, 1)[index, segments[:, :, None], segments[:, None, :]].permute(0, 3, 1, 2)
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        dense = ((0.37 * q @ keys.mT + bias).masked_fill(~causal, -torch.inf)).softmax(-1) @ values
        ours = (0.37 * q2 @ k2.mT).masked_fill(~causal, -torch.inf).softmax(-1) @ v2
        torch.testing.assert_close(ours[..., :d], dense, atol=1e-14, rtol=1e-13)
        # The last queries alone.
        tail, _, _ = augment_qk(q[:, :, -3:], k, v, table, segments, 0.37)
        assert torch.equal(tail, q2[:, :, -3:])


def llama(**settings):
    from_text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(**from_text, **heads, sliding_window=None)
        if not settings
        else MistralConfig(**from_text, **heads, **settings)
    ).eval()


def test_bad_input(families):
    model = llama()
    segments = SegmentMap.from_lengths([1, 1], [[3, 3], [3, 3]], [5, 5])
    plan = CalibrationPlan(BIAS, segments)
    ids = torch.randint(3, 90, (2, 12))
    with pytest.raises(ValueError, match="call use_calibrated_attention first"), calibrate(model, plan):
        pass
    with pytest.raises(ValueError, match="backend must"):
        use_calibrated_attention(model, "flash")
    use_calibrated_attention(model)
    with calibrate(model, plan), torch.no_grad():
        model(ids)
        with pytest.raises(ValueError, match="must divide"):
            model(ids[:1])
        with pytest.raises(ValueError, match="must divide"):
            model(ids.repeat(2, 1)[:3])
        with pytest.raises(ValueError, match="left_padded"):
            model(ids[:, :-1])
        with pytest.raises(ValueError, match="left_padded"):
            model(torch.cat((ids, ids), 1))
    with pytest.raises(ValueError, match="layers must"), calibrate(model, CalibrationPlan(BIAS, segments, {7: 1.0})):
        pass
    with pytest.raises(ValueError, match="bias must"):
        CalibrationPlan(BIAS[:1], segments)
    with pytest.raises(ValueError, match="bias must"):
        CalibrationPlan(BIAS[:, :1], segments)
    with pytest.raises(ValueError, match="finite"):
        CalibrationPlan(BIAS * torch.inf, segments)
    with pytest.raises(ValueError, match="rows must"):
        CalibrationPlan(BIAS, segments, rows="some")
    with (
        calibrate(model, CalibrationPlan(BIAS.unsqueeze(1).repeat(1, 3, 1), segments)),
        pytest.raises(ValueError, match="heads"),
    ):
        model(ids)
    with pytest.raises(ValueError, match="layers=None"):
        additive_mask(CalibrationPlan(BIAS, segments, {0: 1.0}))
    with pytest.raises(ValueError, match="attention_mask must"):
        additive_mask(plan, torch.ones(1, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="text layers"):
        text_attention_modules(torch.nn.Linear(2, 2))
    for wrong in ({"tau": 0.0}, {"beta": -1.0}, {"kernel": "other"}, {"clip": 0.0}, {"lam": float("nan")}, {"c": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hierarchy_bias(torch.ones(1, 2), torch.ones(1, 3, 2), **wrong)
    with pytest.raises(ValueError, match="demos must"):
        hierarchy_bias(torch.ones(1, 2), torch.ones(1, 0, 2))


def test_registration_is_idempotent():
    from transformers import AttentionInterface, AttentionMaskInterface

    register_attention()
    before = [AttentionInterface._global_mapping[name] for name in NAMES.values()]
    register_attention()
    assert [AttentionInterface._global_mapping[name] for name in NAMES.values()] == before
    assert all(name in AttentionMaskInterface._global_mapping for name in NAMES.values())
    assert not any(word in name for name in NAMES.values() for word in ("sdpa", "flash", "flex_attention"))
