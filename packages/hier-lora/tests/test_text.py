"""How prompts become features: the modes agree where they promise to, and cost what they promise."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hier_lora import HierLoraCLIP, PromptSet, embed_sentences, lora_config, sample_nodes
from hier_lora.text import ABSENT, spread
from hier_losses import HierarchyAwareLoss, LabelGraph, Taxonomy
from hier_losses.functional import hisce, level_cross_entropy, tp_kl

_spec = importlib.util.spec_from_file_location("hier_lora_memory", Path(__file__).with_name("_memory.py"))
_memory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_memory)


def make(tiny_clip, tax, text, **kwargs):
    base = tiny_clip()
    torch.manual_seed(1)
    model = HierLoraCLIP(base, tax, lora_config(base, towers="both", r=2), text, train_logit_scale=True, **kwargs)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=draw)
    return model.train()


def gradients(model, pixels, target, tax):
    logits = model(pixels, target)
    HierarchyAwareLoss(tax)(logits, target).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for n, g in found.items() if "lora_A" not in n or "text" in n)
    return logits.detach(), found


@pytest.fixture
def wide():
    return Taxonomy.synthetic((3, 9, 40), seed=0)


@pytest.fixture
def batch(wide):
    draw = torch.Generator().manual_seed(3)
    return torch.rand(4, 3, 32, 32, generator=draw), wide.leaf[torch.tensor([0, 7, 19, 33])]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_is_live(tiny_clip, wide, batch, chunk, center):
    prompts = PromptSet(wide, ("a {}", "one longer picture of {}"))
    kwargs = {"prompts": prompts, "center_text": center}
    logits, grads = gradients(make(tiny_clip, wide, "live", **kwargs), *batch, wide)
    again, chunked = gradients(make(tiny_clip, wide, "chunked", text_chunk=chunk, **kwargs), *batch, wide)
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert (chunked[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_chunked_needs_a_quarter_of_the_memory(tiny_clip):
    """4,000 nodes: the activations of one chunk instead of those of all."""
    tax = Taxonomy.synthetic((10, 190, 3800), seed=0)
    peaks = {}
    for text in ("live", "chunked"):
        model = make(tiny_clip, tax, text)
        features = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
        with _memory.PeakMemory() as memory:
            model.score(features).logsumexp(1).sum().backward()
        peaks[text] = memory.peak
    assert peaks["chunked"] <= 0.25 * peaks["live"], peaks


def test_cached_is_live_before_training(tiny_clip, wide, batch):
    base = tiny_clip()
    cached = HierLoraCLIP(base, wide, None, "cached")(batch[0])
    torch.testing.assert_close(HierLoraCLIP(base, wide, None, "live")(batch[0]), cached, rtol=1e-5, atol=1e-5)


def test_a_full_sample_is_live(tiny_clip, wide, batch):
    logits, grads = gradients(make(tiny_clip, wide, "live"), *batch, wide)
    again, sampled = gradients(make(tiny_clip, wide, "sampled", num_negatives=1000), *batch, wide)
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert (sampled[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_the_sample_holds_paths_and_siblings():
    tax = Taxonomy.synthetic((3, 12, 60), seed=1)
    target = tax.leaf[torch.tensor([4, 30])]
    needed = set()
    for leaf in target.tolist():
        for node in tax.paths[leaf].tolist():
            needed |= {v for v in range(tax.num_nodes) if tax.parent[v] == tax.parent[node]}
    plain = sample_nodes(target, tax, 0)
    assert set(plain.nodes.tolist()) == needed
    assert (plain.log_weight == 0).all()
    more = sample_nodes(target, tax, 10)
    extra = [v for v in more.nodes.tolist() if v not in needed]
    assert len(extra) == 10
    rest = tax.num_nodes - len(needed)
    weight = dict(zip(more.nodes.tolist(), more.log_weight.tolist(), strict=True))
    assert all(weight[v] == pytest.approx(torch.tensor(rest / 10).log().item()) for v in extra)
    assert all(weight[v] == 0 for v in needed)
    assert len(sample_nodes(target, tax, 10**6).nodes) == tax.num_nodes


def test_sampled_sums_are_unbiased_and_smoothing_is_exact():
    tax = Taxonomy.synthetic((3, 12, 60), seed=1)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, tax.num_nodes, generator=draw, dtype=torch.double)
    target = tax.leaf[torch.tensor([4, 30])]
    sums = []
    for seed in range(600):
        torch.manual_seed(seed)
        sample = sample_nodes(target, tax, 8)
        sums.append(spread(logits[:, sample.nodes], sample, tax.num_nodes).exp().sum(1))
    sums = torch.stack(sums)
    error = (sums.mean(0) - logits.exp().sum(1)).abs()
    assert (error < 4 * sums.std(0) / 600**0.5).all()
    ours = spread(logits[:, sample.nodes], sample, tax.num_nodes)
    smoothing = [hisce(z, target, tax, eps=0.2) - level_cross_entropy(z, target, tax) for z in (ours, logits)]
    torch.testing.assert_close(smoothing[0], smoothing[1])


def test_a_level_without_a_sampled_node_gives_no_nan():
    tax = Taxonomy.from_paths([("a",), ("b", "c"), ("b", "d", "e"), ("b", "d", "f")])
    target = torch.tensor([tax.index("a")])
    sample = sample_nodes(target, tax, 0)
    features = torch.randn(1, len(sample.nodes), requires_grad=True)
    logits = spread(features, sample, tax.num_nodes)
    assert (logits == ABSENT).sum() == tax.num_nodes - 2
    (tp_kl(logits, target, tax) + hisce(logits, target, tax)).backward()
    assert torch.isfinite(features.grad).all()


def test_sampled_scores_everything_outside_training(tiny_clip, wide, batch):
    model = make(tiny_clip, wide, "sampled", num_negatives=2)
    with pytest.raises(ValueError, match="target must be given"):
        model(batch[0])
    sampled = model(*batch)
    assert (sampled == ABSENT).any()
    model.eval()
    everything = model(batch[0])
    assert (everything > ABSENT).all()
    exact = sampled.detach() > ABSENT
    path = wide.paths[batch[1]]
    torch.testing.assert_close(sampled.gather(1, path), everything.gather(1, path), rtol=1e-5, atol=1e-4)
    assert exact.gather(1, path).all()


def test_sampled_draws_anew(tiny_clip, wide, batch):
    model = make(tiny_clip, wide, "sampled", num_negatives=5)
    torch.manual_seed(0)
    first, second = model(*batch), model(*batch)
    torch.manual_seed(0)
    assert torch.equal(model(*batch), first)
    assert not torch.equal(first, second)


def test_sentences_of_a_node_stay_together():
    calls = []

    def encode(texts):
        calls.append(list(texts))
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    sentences = [["a", "bb"], ["ccc", "dddd"], ["e", "ff"]]
    whole = embed_sentences(encode, sentences)
    assert torch.equal(embed_sentences(encode, sentences, chunk=3), whole)
    assert calls[1:] == [["a", "bb"], ["ccc", "dddd"], ["e", "ff"]]
    unit = torch.nn.functional.normalize(torch.tensor([[3.0, 1.0], [4.0, 1.0]]), dim=-1)
    torch.testing.assert_close(whole[1], unit.mean(0))


def test_bad_settings(tiny_clip, wide):
    base = tiny_clip()
    with pytest.raises(ValueError, match="text_chunk must be at least 1, got 0"):
        HierLoraCLIP(base, wide, text_chunk=0)
    with pytest.raises(ValueError, match="num_negatives must be at least 0, got -1"):
        HierLoraCLIP(base, wide, num_negatives=-1)
    with pytest.raises(ValueError, match="must not be 'sampled' for a LabelGraph"):
        HierLoraCLIP(base, LabelGraph.from_edges([("a", "b")]), None, "sampled")
