"""Two gloo processes give the losses and the averaged gradients of one process that holds every row."""

import pytest
import torch

from hyper_blip import HyperbolicConfig, image_text_contrastive_loss
from hyper_blip.losses import positives

PROGRAM = """
import warnings
warnings.simplefilter("ignore")
from hyper_blip import HyperbolicConfig, RandomQuerySelection, image_text_contrastive_loss
from hyper_blip.gather import fetch_rows, gather_rows
from hyper_blip.losses import positives

part = lambda x: x.chunk(2)[rank].clone()
for number, case in enumerate(job["cases"]):
    config = HyperbolicConfig(**case)
    image, text = (part(job[n]).requires_grad_() for n in ("image", "text"))
    image_ = image[:, 0] if case["rqs_prob"] else image
    tau, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, 0.7))
    loss, i2t, t2i = image_text_contrastive_loss(image_, text, config, tau, part(job["ids"]), part(job["keys"]), c=c, mix=0.4)
    grads = torch.autograd.grad(loss, (image, text, tau, c), allow_unused=True)
    zero = torch.zeros(())
    out[f"loss{number}"], out[f"i2t{number}"], out[f"t2i{number}"] = loss.detach(), i2t.detach(), t2i.detach()
    out[f"grads{number}"] = [zero if g is None else g for g in grads]
out["positives"] = positives(4, part(job["ids"]), part(job["keys"]))
rows = part(job["image"]).requires_grad_()
want = torch.tensor([[7, 0, 0, 5], [1, 2, 6, 6]][rank])[: 4 - rank]
got = fetch_rows(rows, want)
weights = torch.arange(1.0, 1 + len(want), dtype=torch.float64)
(grad,) = torch.autograd.grad((got.sum((1, 2)) * weights).sum(), rows)
out["fetched"], out["fetched_grad"] = got.detach(), grad
rqs = RandomQuerySelection(p=0.5)
drawn = [rqs(4, 8, step, rank) for step in range(20)]
out["rqs"] = torch.tensor([d is not None for d in drawn])

# A whole step: equal losses with negatives within the rank, a mean over ranks without a hang with global ones.
sys.path.insert(0, job["tests"])
from conftest import tiny_config
from hyper_blip import HyperBlip2ForPretraining
for kind in ("local", "global"):
    torch.manual_seed(0)
    model = HyperBlip2ForPretraining(tiny_config(HyperbolicConfig.distance(itm_negatives=kind))).train()
    found = model(part(job["pixels"]), part(job["tokens"]), part(job["mask"]), step=0)
    found.loss.backward()
    out[kind] = torch.stack([found.loss_itc, found.loss_itm, found.loss_lm]).detach()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    out[kind + "_finite"] = torch.tensor(all(bool(g.isfinite().all()) for g in grads))
    norm = model.blip2.vision_model.post_layernorm.weight.grad
    dist.all_reduce(norm)
    out[kind + "_norm"] = norm / 2

# Captions of other lengths: a mean over words is one over the words of all ranks.
torch.manual_seed(0)
model = HyperBlip2ForPretraining(tiny_config(HyperbolicConfig.distance())).eval()
out["ragged"] = model(part(job["pixels"]), part(job["tokens"]), part(job["ragged"]), step=0).loss_lm.detach()

# Ranks of different captions, of different numbers of pairs, one with an empty caption.
keep = 6 if rank else 4
ids, mask = part(job["tokens"])[:, :keep].clone(), part(job["mask"])[:, :keep].clone()
found = model(part(job["pixels"]), ids, mask, step=0)
padded = torch.nn.functional.pad(ids, (0, 6 - keep)), torch.nn.functional.pad(mask, (0, 6 - keep))
same = model(part(job["pixels"]), *padded, step=0)
out["padded"] = torch.stack([found.loss, same.loss]).detach()
uneven = 4 - rank
empty = ids.clone()
empty[0, 1:] = 2
for name, args in (("uneven", (part(job["pixels"])[:uneven], ids[:uneven], mask[:uneven])),
                   ("empty", (part(job["pixels"]), empty if rank else ids, mask))):
    try:
        model(*args, step=0)
        out[name] = "nothing"
    except ValueError as error:
        out[name] = str(error)

# A picture of one rank is not finite: no rank moves a weight, and the next step is the same on both.
from torch.nn.parallel import DistributedDataParallel
for name in ("ddp", "plain"):
    torch.manual_seed(0)
    model = HyperBlip2ForPretraining(tiny_config(HyperbolicConfig.distance(on_non_finite="skip", itm_negatives="local"))).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if name == "ddp" else model
    for step in range(3):
        pixels = part(job["pixels"])
        if step == 1:
            before = {n: p.detach().clone() for n, p in trained.items()}
            if rank:
                pixels[0] = torch.nan
        loss = wrapped(pixels, part(job["tokens"]), part(job["mask"]), step=step).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            out[name + "_moved"] = [n for n, p in trained.items() if not torch.equal(p, before[n])]
            out[name + "_counted"] = model.non_finite_steps
    out[name + "_weights"] = {n: p.detach() for n, p in trained.items()}
    out[name + "_after"] = bool((trained["blip2.query_tokens"] != before["blip2.query_tokens"]).any())
model = HyperBlip2ForPretraining(tiny_config(HyperbolicConfig.distance(itm_negatives="local"))).train()
try:
    model(pixels * (torch.nan if rank else 1), part(job["tokens"]), part(job["mask"]), step=0)
    out["raised"] = "nothing"
except ValueError as error:
    out["raised"] = str(error)
"""
CASES = [
    {"similarity": similarity, "query_agg": agg, "rqs_prob": rqs, "gather_grad": True}
    for similarity, agg, rqs in (
        ("cosine", "max", 0.0),
        ("distance", "max", 0.0),
        ("distance", "midpoint", 0.0),
        ("distance", "max", 1.0),
        ("inner", "mean", 0.0),
        ("angle", "mean", 0.0),
        ("mix", "max", 0.0),
    )
] + [{"similarity": "distance", "query_agg": "mean", "rqs_prob": 0.0, "gather_grad": False}]


@pytest.fixture(scope="module")
def job():
    generator = torch.Generator().manual_seed(0)
    image = 0.4 * torch.randn(8, 3, 4, dtype=torch.float64, generator=generator)
    text = 0.4 * torch.randn(8, 4, dtype=torch.float64, generator=generator)
    tokens = torch.randint(10, 90, (8, 6), generator=generator)
    tokens[:, 0], tokens[:, -1] = 1, 2
    ragged = (torch.arange(6) < torch.tensor([2, 3, 2, 3, 6, 6, 5, 6])[:, None]).long()
    from pathlib import Path

    return {
        "image": image, "text": text, "ids": torch.tensor([0, 1, 2, 3, 4, 0, 5, 6]), "cases": CASES,
        "keys": torch.tensor([1, 2, 3, 4, 5, 6, 3, 7]), "pixels": torch.randn(8, 3, 28, 28, generator=generator),
        "tokens": tokens, "ragged": ragged, "mask": torch.ones_like(tokens), "tests": str(Path(__file__).parent),
    }  # fmt: skip


@pytest.fixture(scope="module")
def outputs(job, two_processes):
    return two_processes(PROGRAM, job)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(list(case.values())) for case in CASES])
def test_contrastive_loss(job, outputs, number):
    case = CASES[number]
    image, text = (job[n].clone().requires_grad_() for n in ("image", "text"))
    tau, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, 0.7))
    config = HyperbolicConfig(**case)
    image_ = image[:, 0] if case["rqs_prob"] else image
    loss, i2t, t2i = image_text_contrastive_loss(image_, text, config, tau, job["ids"], job["keys"], c=c, mix=0.4)
    grads = torch.autograd.grad(loss, (image, text, tau, c), allow_unused=True)
    torch.testing.assert_close(sum(o[f"loss{number}"] for o in outputs) / 2, loss.detach(), rtol=1e-9, atol=1e-12)
    for name, expected in (("i2t", i2t), ("t2i", t2i)):
        got = torch.cat([o[f"{name}{number}"] for o in outputs])
        torch.testing.assert_close(got, expected.detach(), rtol=1e-8, atol=1e-9)
    for position, expected in enumerate(grads):
        parts = [o[f"grads{number}"][position] for o in outputs]
        # Averaging over ranks, as DistributedDataParallel does.
        got = torch.cat(parts) / 2 if position < 2 else sum(parts) / 2
        if expected is None:
            assert (got == 0).all()
        elif case["gather_grad"]:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
        elif position < 2:
            # The local operand only: half of the paths are missing.
            assert (got - expected).abs().max() > 1e-4


def test_positives(job, outputs):
    got = torch.cat([o["positives"] for o in outputs])
    assert torch.equal(got, positives(8, job["ids"], job["keys"]))
    assert got[0, 5]
    assert got[2, 6]


def test_fetched_rows_and_their_gradients(job, outputs):
    wanted = ([7, 0, 0, 5], [1, 2, 6])
    grad = torch.zeros_like(job["image"])
    for rank, want in enumerate(wanted):
        assert torch.equal(outputs[rank]["fetched"], job["image"][want])
        for weight, row in enumerate(want, 1):
            grad[row] += weight
    assert torch.equal(torch.cat([o["fetched_grad"] for o in outputs]), grad)


def test_bernoulli_draw_is_shared(outputs):
    assert torch.equal(outputs[0]["rqs"], outputs[1]["rqs"])


def test_captions_of_other_ranks_are_longer(outputs):
    for out in outputs:
        torch.testing.assert_close(out["padded"][0], out["padded"][1], rtol=0, atol=1e-6)


def test_a_mean_over_words_is_one_over_the_words_of_all_ranks(job, outputs, stage1):
    model = stage1(HyperbolicConfig.distance()).eval()
    expected = model(job["pixels"], job["tokens"], job["ragged"], step=0).loss_lm.detach()
    found = [out["ragged"] for out in outputs]
    torch.testing.assert_close(sum(found) / 2, expected, rtol=1e-6, atol=1e-6)


def test_a_batch_that_one_rank_refuses_is_refused_by_all(outputs):
    for out in outputs:
        assert "every rank must hold as many pairs, got [4, 3]" in out["uneven"]
    assert "ranks [1] refuse theirs" in outputs[0]["empty"]
    assert "got an empty caption" in outputs[1]["empty"]


@pytest.mark.parametrize("name", ["ddp", "plain"])
def test_a_skipped_step_moves_nothing_on_any_rank(outputs, name):
    for out in outputs:
        assert out[f"{name}_moved"] == []
        assert out[f"{name}_counted"] == 1
        assert out[f"{name}_after"]
    if name == "ddp":
        torch.testing.assert_close(outputs[0]["ddp_weights"], outputs[1]["ddp_weights"], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_is_an_error_on_every_rank(outputs):
    assert all("the loss must be finite" in out["raised"] for out in outputs)


def test_whole_steps(outputs, stage1, job):
    for kind in ("local", "global"):
        assert all(o[f"{kind}_finite"] for o in outputs)
        assert all(o[kind].isfinite().all() for o in outputs)
        torch.testing.assert_close(outputs[0][f"{kind}_norm"], outputs[1][f"{kind}_norm"])
    # The contrastive part of a step does not depend on where negatives come from.
    assert torch.equal(outputs[0]["local"][0], outputs[0]["global"][0])
