"""Plans in serving: threads, compiled models, caches of every kind, windows, sinks; against an explicit fp64 reference."""

import _thread
import asyncio
import contextvars
import copy
import itertools
import threading

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

from hyper_icl import (
    CalibrationPlan,
    LogitAdapter,
    SegmentMap,
    SegmentMassCollector,
    attach,
    calibrate,
    hierarchy_bias,
    lora_config,
    text_attention_modules,
    use_calibrated_attention,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
BIAS = torch.tensor([[2.0, -1.5], [-2.0, 1.0]])
OTHER = torch.tensor([[-1.0, 2.0], [1.0, -2.0]])
# The prompt: bos, two demonstrations of 4 and 3 tokens, a query of 5, then 3 tokens that count as generated.
PLACES = [-1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
LENGTH, MORE = len(PLACES), 3
IDS = torch.randint(3, 90, (2, LENGTH + MORE), generator=torch.Generator().manual_seed(0))


def plan_of(bias=BIAS, **kwargs):
    return CalibrationPlan(bias, SegmentMap.from_lengths([1, 1], [[4, 3]] * 2, [5, 5]), **kwargs)


def reference(model, ids, places, bias, padding=None, rows="query"):
    """The model's own eager attention in fp64 under masks that loops write: order, padding, window and bias."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    config = model.config
    if hasattr(config, "num_local_experts"):
        # The grouped product knows no fp64.
        model.set_experts_implementation("eager")
    batch, total = ids.shape
    window = getattr(config, "sliding_window", None) or total
    masks = {}
    for kind, width in (("full_attention", total), ("sliding_attention", window)):
        # fp32's lowest number: some models take the softmax in fp32, where fp64's would be -inf and a padded row NaN.
        mask = torch.full((batch, 1, total, total), torch.finfo(torch.float32).min, dtype=torch.float64)
        for b in range(batch):
            for i in range(total):
                for j in range(max(0, i - width + 1), i + 1):
                    if padding is not None and not padding[b, j]:
                        continue
                    row, column = places[b][i], places[b][j]
                    biased = row == bias.shape[1] or (rows == "all" and row >= 0)
                    mask[b, 0, i, j] = float(bias[b, column]) if biased and 0 <= column < bias.shape[1] else 0.0
        masks[kind] = mask
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window < total else "full_attention"])
    if kinds == {"sliding_attention"} or kinds == {"full_attention"}:
        masks = masks[kinds.pop()]
    position = torch.arange(total).expand(batch, -1)
    if padding is not None:
        position = (padding.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=masks, use_cache=False, position_ids=position).logits


def places_of(ids, places=PLACES):
    return [places + [2] * (ids.shape[1] - len(places))] * len(ids)


def close(found, expected, start=0):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found[:, start:].double(), expected[:, start:], atol=2e-5 * scale, rtol=0)


def forward(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


SERVED = ("llama", "mistral", "gemma2", "gemma3", "cohere2", "gpt_oss", "deepseek_v3", "opt")


@pytest.fixture(scope="module")
def served(families):
    """Text models after `use_calibrated_attention`, with what they must compute under the plan and without."""
    built = {}

    def get(name, **changed):
        key = (name, *changed.items())
        if key not in built:
            model = families.make_text_model(name, **changed)
            expected = reference(model, IDS, places_of(IDS), BIAS)
            without = reference(model, IDS, places_of(IDS), 0 * BIAS)
            use_calibrated_attention(model)
            built[key] = model, expected, without
        return built[key]

    return get


def in_pieces(model, cuts, cache=None):
    """Logits of IDS read in several calls."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return torch.cat([forward(model, IDS[:, a:b], past_key_values=cache) for a, b in itertools.pairwise(cuts)], 1)


@pytest.mark.parametrize("window", [8, 64])
@pytest.mark.parametrize("name", SERVED)
def test_positions_are_absolute(served, name, window):
    """Whole, step by step, in chunks, from a static cache, after cached demonstrations; windows shorter and longer."""
    windowed = name in ("mistral", "gemma2", "gemma3", "cohere2", "gpt_oss")
    if not windowed and window != 8:
        pytest.skip("no window")
    model, expected, without = served(name, **({"sliding_window": window} if windowed else {}))
    close(forward(model, IDS), without)
    total = LENGTH + MORE
    steps = [0, *range(LENGTH, total + 1)]
    static = StaticCache(config=model.config, max_cache_len=total + 4)
    assert float((expected - without)[:, 8:].abs().amax(-1).min()) > 1e-3 * float(expected.abs().max())
    with calibrate(model, plan_of()):
        close(forward(model, IDS[:, :LENGTH]), expected[:, :LENGTH])
        close(in_pieces(model, steps), expected)
        close(in_pieces(model, steps, static), expected)
    with calibrate(model, plan_of(), chunked=True):
        close(in_pieces(model, [0, 5, 10, LENGTH, total]), expected)
        close(in_pieces(model, [0, 1, 2, 9, LENGTH, LENGTH + 1, total]), expected)
        static.reset()
        close(in_pieces(model, [0, 6, LENGTH, LENGTH + 1, total], static), expected)
    # The demonstrations run once, outside, and any question follows.
    before = DynamicCache(config=model.config)
    forward(model, IDS[:, :8], past_key_values=before)
    for plan, want in ((plan_of(), expected), (plan_of(0 * BIAS), without)):
        again = copy.deepcopy(before)
        with calibrate(model, plan):
            first = forward(model, IDS[:, 8:LENGTH], past_key_values=again)
            rest = forward(model, IDS[:, LENGTH:], past_key_values=again)
        close(torch.cat((first, rest), 1), want[:, 8:])


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("rows", ["query", "all"])
def test_backends(served, name, rows):
    model, _, _ = served(name)
    expected = reference(model, IDS, places_of(IDS), BIAS, rows=rows)
    use_calibrated_attention(model, "eager")
    with calibrate(model, plan_of(rows=rows)):
        close(in_pieces(model, [0, LENGTH, LENGTH + 1, LENGTH + MORE]), expected)
    use_calibrated_attention(model, "augmented")
    with calibrate(model, plan_of(rows=rows)):
        if name in ("gpt_oss", "gemma2"):
            with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
                forward(model, IDS[:, :LENGTH])
            use_calibrated_attention(model)
            forward(model, IDS[:, :LENGTH])
        else:
            close(in_pieces(model, [0, LENGTH, LENGTH + 1, LENGTH + MORE]), expected)
    use_calibrated_attention(model)
    with calibrate(model, plan_of(rows=rows)):
        close(in_pieces(model, [0, LENGTH, LENGTH + 1, LENGTH + MORE]), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere2", "gpt_oss"])
@pytest.mark.parametrize(
    "settings", [{}, {"prefill_chunk_size": 5}, {"cache_implementation": "static"}, {"num_beams": 2}]
)
def test_generate(served, name, settings):
    model, _, _ = served(name)
    common = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    beams = settings.get("num_beams", 1)
    with calibrate(model, plan_of(), chunked="prefill_chunk_size" in settings):
        found = model.generate(IDS[:, :LENGTH], **common, **settings)
    plan = [row for row in BIAS for _ in range(1)]
    with calibrate(model, plan_of(torch.stack(plan))):
        fresh = model.generate(IDS[:, :LENGTH], **common, num_beams=beams, use_cache=False)
    assert torch.equal(found, fresh)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_padding_on_either_side_and_ragged_demonstrations(served, name, side):
    """Prompt 0 has one demonstration and is padded; prompt 1 has two."""
    model, _, _ = served(name)
    short = SegmentMap.from_lengths([1], [[4]], [5])
    whole = SegmentMap.from_lengths([1], [[4, 3]], [5])
    pad = LENGTH - short.length
    ids, mask = IDS[:, :LENGTH].clone(), torch.ones(2, LENGTH, dtype=torch.long)
    padded = slice(0, pad) if side == "left" else slice(LENGTH - pad, LENGTH)
    ids[0, padded], mask[0, padded] = 0, 0
    segments = SegmentMap.batch([short, whole], mask)
    own = [-1] + [0] * 4 + [2] * 5
    row = [-1] * pad + own if side == "left" else own + [-1] * pad
    assert segments.ids.tolist() == [row, PLACES]
    bias = torch.tensor([[2.0, 0.0], [-2.0, 1.0]])
    expected = reference(model, ids, [row, PLACES], bias, mask)
    with calibrate(model, CalibrationPlan(bias, segments)):
        found = forward(model, ids, attention_mask=mask)
    for i in range(2):
        kept = mask[i].bool()
        torch.testing.assert_close(found[i][kept].double(), expected[i][kept], atol=1e-4, rtol=1e-4)
    rows = segments.query_rows()
    assert torch.equal(segments.ids.gather(1, rows), torch.full((2, 5), 2))


def test_masses_of_a_prompt_padded_on_the_right(served):
    model, _, _ = served("llama")
    one = SegmentMap.from_lengths([1], [[4, 3]], [5])
    mask = torch.ones(1, LENGTH + 3, dtype=torch.long)
    mask[:, LENGTH:] = 0
    padded = SegmentMap.batch([one], mask)
    ids = torch.nn.functional.pad(IDS[:1, :LENGTH], (0, 3))
    with torch.no_grad():
        with SegmentMassCollector(model, one, one.query_rows(), [0, 1]) as alone:
            model(ids[:, :LENGTH], use_cache=False)
        with SegmentMassCollector(model, padded, padded.query_rows(), [0, 1]) as beside:
            model(ids, attention_mask=mask, use_cache=False)
    for layer in (0, 1):
        torch.testing.assert_close(alone.masses[layer], beside.masses[layer], atol=1e-5, rtol=1e-5)


def test_absent_demonstrations_take_no_part_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    query, demos = torch.randn(2, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    present = torch.tensor([[True, True, False, False], [True] * 4])
    found = hierarchy_bias(query, demos, present=present)
    torch.testing.assert_close(found[0, :2], hierarchy_bias(query[:1], demos[:1, :2])[0])
    torch.testing.assert_close(found[1], hierarchy_bias(query, demos)[1])
    assert (found[0, 2:] == 0).all()
    with pytest.raises(ValueError, match="present must"):
        hierarchy_bias(query, demos, present=torch.zeros(2, 4, dtype=torch.bool))


def test_threads_do_not_share(served):
    """Two plans and no plan at the same time on one model; every thread stands inside its forward pass with the others."""
    model, _, _ = served("llama")
    ids = IDS[:, :LENGTH]
    plain = forward(model, ids)
    want = {}
    for name, bias in (("one", BIAS), ("two", OTHER)):
        with calibrate(model, plan_of(bias)):
            want[name] = forward(model, ids)
    want["none"] = plain
    barrier, found = threading.Barrier(3, timeout=30), {}
    module = text_attention_modules(model)[0]
    handle = module.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1])

    def run(name, bias):
        if bias is None:
            found[name] = forward(model, ids)
            return
        with calibrate(model, plan_of(bias)):
            found[name] = forward(model, ids)

    threads = [threading.Thread(target=run, args=a) for a in (("one", BIAS), ("two", OTHER), ("none", None))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert torch.equal(forward(model, ids), plain)


def test_a_thread_started_inside_takes_the_plan_only_when_it_is_handed_over(served):
    model, _, _ = served("llama")
    ids, found = IDS[:, :LENGTH], {}
    plain = forward(model, ids)

    def run(name):
        found[name] = forward(model, ids)

    def bare():
        with calibrate(model, plan_of()):
            thread = threading.Thread(target=run, args=("bare",))
            thread.start()
            thread.join()

    with pytest.raises(ValueError, match="copy_context"):
        bare()
    assert torch.equal(found["bare"], plain)
    with calibrate(model, plan_of()):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(run, "handed"))
        thread.start()
        thread.join()
        assert torch.equal(found["handed"], forward(model, ids))
    assert not torch.equal(found["handed"], plain)


def test_tasks_do_not_share(served):
    model, _, _ = served("llama")
    ids = IDS[:, :LENGTH]

    async def calibrated(bias):
        with calibrate(model, plan_of(bias)):
            await asyncio.sleep(0)
            first = forward(model, ids)
            await asyncio.sleep(0)
            return first, forward(model, ids)

    async def plain():
        await asyncio.sleep(0)
        return forward(model, ids)

    async def all_of_them():
        return await asyncio.gather(calibrated(BIAS), plain(), calibrated(OTHER))

    one, none, two = asyncio.run(all_of_them())
    assert torch.equal(none, forward(model, ids))
    for (first, second), bias in ((one, BIAS), (two, OTHER)):
        with calibrate(model, plan_of(bias)):
            assert torch.equal(first, forward(model, ids))
        assert torch.equal(first, second)


def test_two_models_in_nested_blocks(served):
    (one, first, _), (two, second, _) = served("llama"), served("opt")
    with calibrate(one, plan_of()), calibrate(two, plan_of()):
        close(forward(one, IDS[:, :LENGTH]), first[:, :LENGTH])
        close(forward(two, IDS[:, :LENGTH]), second[:, :LENGTH])


def test_misplaced_plans_are_refused(served):
    model, _, _ = served("llama")
    cache = DynamicCache(config=model.config)
    forward(model, IDS[:, :10], past_key_values=cache)
    plan = plan_of()
    with calibrate(model, plan):
        with pytest.raises(ValueError, match="at most the 8 tokens"):
            forward(model, IDS[:, 10:LENGTH], past_key_values=cache)
        for wrong in (IDS[:, : LENGTH - 1], IDS):
            with pytest.raises(ValueError, match="chunked=True"):
                forward(model, wrong)
        forward(model, IDS[:, :LENGTH])
    demos = DynamicCache(config=model.config)
    forward(model, IDS[:, :8], past_key_values=demos)
    with calibrate(model, plan_of(rows="all")):
        with pytest.raises(ValueError, match="at most the 0 tokens"):
            forward(model, IDS[:, 8:LENGTH], past_key_values=copy.deepcopy(demos))
        forward(model, IDS[:, :LENGTH])
    with calibrate(model, plan, chunked=True):
        with pytest.raises(ValueError, match="prompt of 13 tokens"):
            forward(model, IDS[:, 8:], past_key_values=copy.deepcopy(demos))
        forward(model, IDS[:, :LENGTH])
    # A cache that the model made itself inside the block goes on.
    with calibrate(model, plan), torch.no_grad():
        made = model(IDS[:, :LENGTH], use_cache=True).past_key_values
        model(IDS[:, LENGTH:], past_key_values=made)
    with calibrate(model, plan):
        with pytest.raises(ValueError, match="filled inside"):
            forward(model, IDS[:, LENGTH:], past_key_values=made)
        forward(model, IDS[:, :LENGTH])


@pytest.mark.compile
@pytest.mark.parametrize("how", ["whole", "module", "layers"])
def test_compiled_models_honour_the_plan(families, how):
    model = families.make_text_model("llama")
    use_calibrated_attention(model)
    ids = IDS[:, :LENGTH]
    plain = forward(model, ids)
    with calibrate(model, plan_of()):
        expected = forward(model, ids)
    compiled = model
    if how == "whole":
        compiled = torch.compile(model, backend="aot_eager")
    elif how == "module":
        model.compile(backend="aot_eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(forward(compiled, ids), plain, atol=1e-5, rtol=1e-5)
        with calibrate(model, plan_of()):
            torch.testing.assert_close(forward(compiled, ids), expected, atol=1e-5, rtol=1e-5)
            with calibrate(model, plan_of(OTHER)):
                assert (forward(compiled, ids) - expected).abs().max() > 1e-2


@pytest.mark.compile
def test_a_full_graph_is_refused(families):
    model = families.make_text_model("llama")
    use_calibrated_attention(model)
    # Or it would find, and use, what another test compiled with graph breaks.
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = IDS[:, :LENGTH]
    torch.testing.assert_close(forward(compiled, ids), forward(model, ids), atol=1e-5, rtol=1e-5)
    with calibrate(model, plan_of()):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile with fullgraph=False"):
            forward(compiled, ids)
        forward(model, ids)
    # The graph of before serves again.
    torch.testing.assert_close(forward(compiled, ids), forward(model, ids), atol=1e-5, rtol=1e-5)


def test_checkpointing_in_a_thread_of_autograd(families):
    """On a GPU the layers run again in threads that Python did not start; one such thread stands for them here."""
    model = families.make_text_model("llama").train()
    use_calibrated_attention(model)
    weight = model.model.layers[0].self_attn.q_proj.weight

    def grad_of(run):
        model.zero_grad()
        run(model(IDS[:, :LENGTH], use_cache=False).logits.square().mean())
        return weight.grad.clone()

    def elsewhere(loss):
        done = threading.Event()
        _thread.start_new_thread(lambda: (loss.backward(), done.set()), ())
        assert done.wait(30)

    with calibrate(model, plan_of()):
        expected = grad_of(lambda loss: loss.backward())
        model.activation_checkpointing_enable()
        torch.testing.assert_close(grad_of(lambda loss: loss.backward()), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(grad_of(elsewhere), expected, rtol=1e-4, atol=1e-7)
    plain = grad_of(elsewhere)
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()


def test_copies_of_a_model_start_without_hooks(families):
    model = families.make_text_model("llama")
    use_calibrated_attention(model)
    with calibrate(model, plan_of()):
        calibrated = forward(model, IDS[:, :LENGTH])
        twin = copy.deepcopy(model)
        assert not torch.equal(forward(twin, IDS[:, :LENGTH]), calibrated)
    with calibrate(twin, plan_of()):
        assert torch.equal(forward(twin, IDS[:, :LENGTH]), calibrated)


@pytest.mark.parametrize("name", ["llama", "phi3", "deepseek_v3", "opt", "persimmon"])
def test_adapter_and_lora_whatever_the_projections(families, name):
    model = families.make_text_model(name)
    use_calibrated_attention(model)
    ids = IDS[:, :LENGTH]
    plain = forward(model, ids)
    adapter = LogitAdapter.for_model(model)
    with attach(model, adapter):
        assert torch.equal(forward(model, ids), plain)
        torch.nn.init.normal_(adapter.u_k)
        torch.nn.init.normal_(adapter.u_q)
        changed = forward(model, ids)
    assert (changed - plain).abs().max() > 1e-2
    with attach(model, adapter), calibrate(model, plan_of()):
        assert (forward(model, ids) - changed).abs().max() > 1e-3
    with pytest.raises(ValueError, match="adapter must"), attach(model, LogitAdapter(2, 4, 5)):
        pass
    student = get_peft_model(model, lora_config(model, r=2))
    adapted = [n for n, _ in student.named_modules() if n.endswith("lora_A.default")]
    linear = [n for n, m in text_attention_modules(student)[0].named_modules() if n.endswith("base_layer")]
    assert len(adapted) == 2 * len(linear) > 0
    assert all("self_attn" in n for n in adapted)
    for n, p in student.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p)
    with torch.no_grad():
        assert (student(ids).logits - plain).abs().max() > 1e-2
    with calibrate(student, plan_of()):
        forward(student, ids)
