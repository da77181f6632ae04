"""Segment masses, their KL, LoRA distillation on a tiny Idefics3, the logit adapter and the Lorentz anchor loss."""

import math

import pytest
import torch
from peft import get_peft_model

from hyper_geom import lorentz
from hyper_icl import (
    CalibrationPlan,
    LogitAdapter,
    LorentzAnchorLoss,
    SegmentDistillLoss,
    SegmentMap,
    SegmentMassCollector,
    align_suffix,
    attach,
    base_model,
    calibrate,
    format_prompt,
    insert_demos,
    lora_config,
    lorentz_anchor_loss,
    middle_layers,
    postprocess_caption,
    postprocess_vqa,
    segment_kl,
    segment_log_mass,
    text_attention_modules,
    tilt,
    use_calibrated_attention,
)

# peft 0.21 reads a property that transformers 5.23 has renamed; the warning is theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
BIAS = torch.tensor([[2.0, -1.5], [-2.0, 1.0]])


def plan_of(prompt, bias=BIAS, **kwargs):
    return CalibrationPlan(bias, SegmentMap.from_lengths(prompt.prefix, prompt.demos, prompt.query), **kwargs)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SEGMENTS = SegmentMap.from_lengths([2, 1], [[3, 2], [4, 2]], [3, 3])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_masses_are_sums_of_attention(groups, kind):
    b, h, t, d = 2, 4, 10, 6
    q, k = draw(b, h, t, d), draw(b, h // groups, t, d, seed=1)
    allowed = torch.ones(t, t, dtype=torch.bool).tril().repeat(b, 1, 1, 1)
    if kind != "none":
        allowed[0, :, :, 0] = False
        allowed[0, :, 0, 0] = True
    lowest = torch.finfo(torch.float64).min
    mask = {"none": None, "bool": allowed, "float": torch.zeros(b, 1, t, t).double().masked_fill(~allowed, lowest)}[
        kind
    ]
    scores = 0.4 * q @ k.repeat_interleave(groups, 1).mT
    alpha = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    rows = torch.tensor([[7, 8, 9], [4, 8, 9]])
    found = segment_log_mass(q, k, SEGMENTS, rows, 0.4, mask)
    assert found.dtype == torch.float32
    for i in range(b):
        for j, row in enumerate(rows[i].tolist()):
            for s in range(-1, 3):
                expected = alpha[i, :, row, SEGMENTS.ids[i] == s].sum(-1)
                torch.testing.assert_close(found[i, :, j, s + 1].exp().double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(b, h, 3))
    # Queries may be the last positions only.
    tail = None if mask is None else mask[:, :, -3:]
    again = segment_log_mass(q[:, :, -3:], k, SEGMENTS, torch.tensor([[7, 8, 9]] * 2), 0.4, tail)
    torch.testing.assert_close(again[0], found[0])


def test_masses_keep_tiny_segments():
    """A segment whose attention is below fp32's smallest number keeps its log-mass, and gradients stay finite."""
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
    q[..., 0] = 1.0
    k[0, 0, :, 0] = torch.tensor([0.0, -200.0, -201.0, 0.0])
    segments = SegmentMap(torch.tensor([[-1, 0, 0, 1]]), torch.tensor([3]), 1)
    k.requires_grad_()
    found = segment_log_mass(q, k, segments, torch.tensor([[3]]), 1.0)
    expected = [math.log(0.5), -200 + math.log1p(math.exp(-1)) - math.log(2), math.log(0.5)]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))
    found.sum().backward()
    assert torch.isfinite(k.grad).all()


def test_unseen_segments_are_minus_infinity():
    q, k = draw(1, 2, 4, 3), draw(1, 2, 4, 3, seed=1).requires_grad_()
    segments = SegmentMap(torch.tensor([[-1, 0, 1, 2]]), torch.tensor([3]), 2)
    found = segment_log_mass(q, k, segments, torch.tensor([[1]]), 1.0)
    assert torch.isneginf(found[..., 2:]).all()
    loss = segment_kl({0: found.detach()}, {0: found})
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert torch.isfinite(k.grad).all()


def test_kl_is_its_formula():
    p, q = (draw(2, 3, 4, 5, seed=s).log_softmax(-1) for s in (0, 1))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(segment_kl({3: p}, {3: q}), expected)
    both = segment_kl({0: p, 1: q}, {0: q, 1: p}, {0: 2.0, 1: 0.5})
    torch.testing.assert_close(both, 2 * expected + 0.5 * (q.exp() * (q - p)).sum(-1).mean())
    assert segment_kl({0: p}, {0: p}).item() == 0
    with pytest.raises(ValueError, match="same layers"):
        segment_kl({0: p}, {1: p})


def full_maps(model, prompt, plan=None):
    """Attention weights of both layers, from the eager backend."""
    use_calibrated_attention(model, "eager")
    with torch.no_grad():
        if plan is None:
            found = model(**prompt.inputs, output_attentions=True).attentions
        else:
            with calibrate(model, plan):
                found = model(**prompt.inputs, output_attentions=True).attentions
    use_calibrated_attention(model)
    return found


def collect(model, prompt, plan=None, **kwargs):
    segments = plan_of(prompt).segments
    with SegmentMassCollector(model, segments, segments.query_rows(), [0, 1]) as collector:
        if plan is None:
            model(**prompt.inputs, use_cache=False, **kwargs)
        else:
            with calibrate(model, plan):
                model(**prompt.inputs, use_cache=False, **kwargs)
    return collector.masses


@pytest.mark.parametrize("pad", [0, 3])
def test_closed_form_teacher(families, pad):
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3", pad=pad)
    plan = plan_of(prompt)
    use_calibrated_attention(model)
    with torch.no_grad():
        base, calibrated = collect(model, prompt), collect(model, prompt, plan)
    torch.testing.assert_close(tilt(base[0], BIAS), calibrated[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tilt(base[0], BIAS).exp(), calibrated[0].exp(), atol=1e-6, rtol=0)
    assert (tilt(base[1], BIAS).exp() - calibrated[1].exp()).abs().max() > 1e-4
    # Against the full maps: equal in layer 0, a lower bound in layer 1.
    rows = plan.segments.query_rows()
    before, after = full_maps(model, prompt), full_maps(model, prompt, plan)
    for layer in (0, 1):
        p, q = (
            x[layer].gather(2, rows[:, None, :, None].expand(-1, 4, -1, x[layer].shape[-1])) for x in (after, before)
        )
        full = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
        ours = (
            calibrated[layer].exp() * torch.where(calibrated[layer] > -torch.inf, calibrated[layer] - base[layer], 0.0)
        ).sum(-1)
        if layer == 0:
            torch.testing.assert_close(ours, full, atol=1e-5, rtol=1e-4)
        else:
            assert (ours <= full + 1e-6).all()
            assert float(ours.mean()) < float(full.mean())
    per_head = BIAS.unsqueeze(1) * torch.tensor([1.0, 0.5, -1.0, 0.0]).view(1, 4, 1)
    with torch.no_grad():
        calibrated = collect(model, prompt, plan_of(prompt, per_head))
    torch.testing.assert_close(tilt(base[0], per_head).exp(), calibrated[0].exp(), atol=1e-6, rtol=0)


def test_collecting_changes_nothing(families, refused):
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    segments = plan_of(prompt).segments
    with torch.no_grad():
        plain = model(**prompt.inputs).logits
        with SegmentMassCollector(model, segments, segments.query_rows(), [1]) as collector:
            assert torch.equal(model(**prompt.inputs, use_cache=False).logits, plain)
        assert list(collector.masses) == [1]
        model(**prompt.inputs)
        collector.reset()
        assert not collector.masses
    with pytest.raises(ValueError, match="layers must"):
        SegmentMassCollector(model, segments, segments.query_rows(), [5])
    short = SegmentMap.from_lengths([1], [[1, 1]], [1])
    with refused("keys' length"), SegmentMassCollector(model, short, short.query_rows(), [0]):
        model(**prompt.inputs, use_cache=False)


def test_distillation(families):
    model, prompt = families.make_model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    with torch.no_grad():
        base_logits = model(**prompt.inputs).logits
    plan = plan_of(prompt, 0.5 * BIAS)
    torch.manual_seed(0)
    student = get_peft_model(model, lora_config(model))
    adapted = [name for name, _ in student.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == 8
    assert all("text_model" in name for name in adapted)
    with torch.no_grad(), base_model(student):
        teacher = collect(student, prompt, plan)
        assert torch.equal(student(**prompt.inputs).logits, base_logits)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 5e-3)
    loss, seen = SegmentDistillLoss(ce=0.0, base_kl=0.0), []
    for _ in range(61):
        terms = loss(teacher, collect(student, prompt))
        seen.append(terms.kl.item())
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    assert 0.15 < seen[0] < 0.25
    assert seen[20] < 0.05
    assert seen[60] < 0.005
    # The base model is what it was, bit for bit.
    with torch.no_grad(), base_model(student):
        assert torch.equal(student(**prompt.inputs).logits, base_logits)
    with torch.no_grad():
        assert not torch.equal(student(**prompt.inputs).logits, base_logits)


def test_terms_of_the_loss():
    p, q = ({0: draw(1, 2, 3, 4, seed=s).log_softmax(-1)} for s in (0, 1))
    logits, base = draw(1, 5, 7, seed=2), draw(1, 5, 7, seed=3)
    labels = torch.tensor([[-100, -100, 3, 1, 2]])
    terms = SegmentDistillLoss(2.0, 0.5, 0.25)(p, q, logits, labels, base)
    at = logits[0, 1:4].float().log_softmax(-1)
    ce = -at[torch.arange(3), labels[0, 2:]].mean()
    log_p = base[0, 1:4].float().log_softmax(-1)
    away = (log_p.exp() * (log_p - at)).sum(-1).mean()
    torch.testing.assert_close(terms.ce, ce)
    torch.testing.assert_close(terms.base_kl, away)
    torch.testing.assert_close(terms.total.double(), 2 * terms.kl + 0.5 * ce.double() + 0.25 * away.double())
    with pytest.raises(ValueError, match="logits must"):
        SegmentDistillLoss()(p, q, labels=labels)
    with pytest.raises(ValueError, match="kl must"):
        SegmentDistillLoss(kl=-1.0)


def test_middle_layers_and_lora_pattern(families):
    assert middle_layers(24) == list(range(8, 16))
    assert middle_layers(6) == [2, 3]
    assert middle_layers(1) == [0]
    for name in families.NAMES:
        model = families.model(name)
        student = get_peft_model(families.make_model(name), lora_config(model, r=2))
        adapted = [n for n, _ in student.named_modules() if n.endswith("lora_A.default")]
        assert len(adapted) == 8, name
        assert not any("vision" in n or "cross" in n or "perceiver" in n or "visual" in n for n in adapted)
    with pytest.raises(ValueError, match="r must"):
        lora_config(families.model("idefics3"), r=0)


def trained(adapter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def test_adapter_size_and_identity(families):
    assert sum(p.numel() for p in LogitAdapter(32, 32, 128).parameters()) == 1_180_672
    adapter = LogitAdapter(2, 4, 16)
    q = torch.randn(1, 4, 3, 16)
    assert torch.equal(adapter.rewrite(0, q, 0.25), q)
    model, prompt = families.model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    with torch.no_grad():
        plain = model(**prompt.inputs).logits
        with attach(model, LogitAdapter.for_model(model)):
            assert torch.equal(model(**prompt.inputs).logits, plain)
        with attach(model, trained(LogitAdapter.for_model(model))):
            assert (model(**prompt.inputs).logits - plain).abs().max() > 1e-2
        assert torch.equal(model(**prompt.inputs).logits, plain)


@pytest.mark.parametrize("scaling", [0.25, 0.7])
def test_rewrite_is_the_explicit_logits(scaling):
    adapter = trained(LogitAdapter(3, 4, 6)).double()
    q, k = draw(2, 4, 5, 6), draw(2, 2, 7, 6, seed=1).repeat_interleave(2, 1)
    layer = 1
    normed = (q - q.mean(-1, keepdim=True)) / (q.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    gate = 1 / (
        1 + (-(normed * adapter.w[layer][:, None]).sum(-1, keepdim=True) - adapter.b[layer][:, None, None]).exp()
    )
    low = (q @ adapter.u_q[layer]) @ (k @ adapter.u_k[layer]).mT / 4**0.5
    explicit = scaling * q @ k.mT + gate * low
    found = scaling * adapter.rewrite(layer, q, scaling) @ k.mT
    torch.testing.assert_close(found, explicit, atol=1e-13, rtol=1e-13)


def test_adapter_learns_alone(families):
    model, prompt = families.make_model("idefics3"), families.make_prompt("idefics3")
    use_calibrated_attention(model)
    model.requires_grad_(False)
    torch.manual_seed(0)
    adapter = LogitAdapter.for_model(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), 5e-3, weight_decay=0.0)
    with torch.no_grad(), attach(model, trained(LogitAdapter.for_model(model), seed=3)):
        target = model(**prompt.inputs, output_hidden_states=True).hidden_states[1:-1]
    loss, seen = LorentzAnchorLoss(normalize="d"), []
    with attach(model, adapter):
        for _ in range(40):
            states = model(**prompt.inputs, output_hidden_states=True, use_cache=False).hidden_states[1:-1]
            value = loss(states, target)
            seen.append(value.item())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert seen[-1] < 0.8 * seen[0]
    assert all(p.grad is None for p in model.parameters())


def test_adapter_and_calibration_work_together(families):
    model, prompt = families.model("qwen2_vl"), families.make_prompt("qwen2_vl")
    use_calibrated_attention(model)
    adapter = trained(LogitAdapter.for_model(model))
    with torch.no_grad(), calibrate(model, plan_of(prompt)):
        alone = model(**prompt.inputs).logits
        with attach(model, adapter):
            both = model(**prompt.inputs).logits
            ids = model.generate(**prompt.inputs, max_new_tokens=2)
        assert torch.equal(model(**prompt.inputs).logits, alone)
    assert (both - alone).abs().max() > 1e-2
    assert ids.shape[0] == 2


def test_adapter_round_trip(tmp_path, families):
    adapter = trained(LogitAdapter(2, 4, 16, r=3))
    adapter.save_pretrained(tmp_path)
    again = LogitAdapter.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
    (tmp_path / "logit_adapter.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="complete"):
        LogitAdapter.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="r must"):
        LogitAdapter(2, 4, 16, r=0)
    model = families.model("idefics3")
    use_calibrated_attention(model)
    with pytest.raises(ValueError, match="adapter must"), attach(model, LogitAdapter(2, 3, 16)):
        pass
    assert text_attention_modules(model)


def test_lorentz_anchor_loss():
    student, teacher = ([draw(2, 3, 16, seed=s + i) for i in range(2)] for s in (0, 10))

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    each = [lorentz.tangent0_sq_dist(norm(a), norm(b), c=0.1) for a, b in zip(student, teacher, strict=True)]
    expected = torch.stack([e.mean() for e in each]).mean()
    torch.testing.assert_close(lorentz_anchor_loss(student, teacher), expected)
    torch.testing.assert_close(LorentzAnchorLoss()(student, teacher), expected)
    torch.testing.assert_close(lorentz_anchor_loss(student, teacher, normalize="d"), expected / 16)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    kept = torch.stack([e[mask].mean() for e in each]).mean()
    torch.testing.assert_close(lorentz_anchor_loss(student, teacher, mask=mask), kept)
    short = [
        lorentz.tangent0_sq_dist(norm(a) / 4, norm(b) / 4, c=0.1).mean() for a, b in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(lorentz_anchor_loss(student, teacher, tangent_scale="rsqrt_d"), sum(short) / 2)
    h = [student[0].clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda x: lorentz_anchor_loss([x], teacher[:1]), (h[0],))
    lorentz_anchor_loss(h, [student[0]]).backward()
    assert torch.isfinite(h[0].grad).all()


def test_lorentz_anchor_loss_at_full_width():
    """|u| = sqrt(d): d = (2/k) asinh(sinh(k sqrt d) sin(theta/2)), where sinh alone overflows fp32 for c = 4."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(4096, generator=generator, dtype=torch.float64) for _ in range(2))
    u, v = (torch.nn.functional.layer_norm(x, (4096,), eps=0.0) for x in (u, v))
    v = v - (v @ u) / (u @ u) * u
    v = torch.nn.functional.layer_norm(v, (4096,), eps=0.0)
    mixed = math.cos(math.radians(17)) * u + math.sin(math.radians(17)) * v
    found = lorentz_anchor_loss([u.view(1, 1, -1).float()], [mixed.view(1, 1, -1).float()], c=0.1)
    k = math.sqrt(0.1)
    expected = (2 / k * math.asinh(math.sinh(k * 64) * math.sin(math.radians(8.5)))) ** 2
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert found.item() == pytest.approx(1.3e4, rel=0.05)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: lorentz_anchor_loss([], []), "same layers"),
        (lambda: lorentz_anchor_loss([torch.ones(1, 2, 4)], [torch.ones(1, 3, 4)]), "equal shapes"),
        (lambda: lorentz_anchor_loss([torch.ones(1, 0, 4)], [torch.ones(1, 0, 4)]), "at least one token"),
        (
            lambda: lorentz_anchor_loss(
                [torch.ones(1, 2, 4)], [torch.ones(1, 2, 4)], mask=torch.zeros(1, 2, dtype=torch.bool)
            ),
            "mask must",
        ),
        (lambda: LorentzAnchorLoss(c=0.0), "c must"),
        (lambda: LorentzAnchorLoss(tangent_scale="half"), "tangent_scale must"),
        (lambda: align_suffix(torch.tensor([[1, 2]]), torch.tensor([[1, 3]])), "common suffix"),
        (lambda: align_suffix(torch.tensor([[1, 2]]), torch.ones(2, 2, dtype=torch.int64)), "equal batch"),
        (lambda: format_prompt("vqa", [{"question": "a"}], {"question": "b"}), "answer"),
        (lambda: format_prompt("video", [], {}), "task must"),
        (lambda: insert_demos([{"role": "system", "content": "s"}], []), "user message"),
    ],
)
def test_bad_input(make, word, refused):
    with refused(word):
        make()


def test_align_suffix():
    student = torch.tensor([[0, 1, 7, 8, 9], [1, 5, 7, 8, 9]])
    teacher = torch.tensor([[1, 4, 4, 4, 7, 8, 9], [1, 4, 4, 5, 7, 8, 9]])
    assert align_suffix(student, teacher).tolist() == [3, 4]


def test_answers_are_cut_as_openflamingo_does():
    assert postprocess_vqa(" yes, it is\nQuestion: foo") == " yes"
    assert postprocess_vqa("red Short answer: x") == "red "
    assert postprocess_vqa("two Answer") == "two "
    assert postprocess_vqa("1,000") == "1,000"
    assert postprocess_caption('a "big" dog Output:a cat Output') == "a big dog "


def test_prompts():
    demos = [{"question": "Color?", "answer": "red"}, {"question": "Size?", "answer": "big"}]
    made = format_prompt("vqa", demos, {"question": "Shape?"})
    assert made.count("<image>") == 3
    assert made.endswith("<image>Question:Shape? Short answer:")
    zero = format_prompt("vqa", demos, {"question": "Shape?"}, zero_shot=True)
    assert zero.count("<image>") == 1
    assert zero.startswith("Question:Color? Short answer:red<|endofchunk|>\n")
    assert format_prompt("caption", [{"caption": "A."}], {}, zero_shot=True) == "Output:A.<|endofchunk|><image>Output:"


def test_insert_demos():
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "a"},
    ]
    chat += [{"role": "user", "content": "q"}]
    found = insert_demos(chat, [("d1", "a1"), ("d2", "a2")])
    assert [m["content"] for m in found] == ["s", "old", "a", "d1", "a1", "d2", "a2", "q"]
    assert [m["role"] for m in found][3:7] == ["user", "assistant"] * 2
    assert len(chat) == 4
