"""Losses and sampling: golden values, brute force, gradient checks, laws of the draws."""

import math

import pytest
import torch
from scipy import stats

from hyper_blip import (
    HyperbolicConfig,
    MixSchedule,
    RandomQuerySelection,
    RandomTextPruning,
    entailment_loss,
    hard_negatives,
    image_text_contrastive_loss,
    image_text_matching_loss,
    pairwise_similarity,
    query_diversity_penalty,
    text_generation_loss,
)
from hyper_blip.losses import positives
from hyper_blip.sampling import text_keys

PLAIN = HyperbolicConfig.euclidean()


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_itc_golden():
    eye = torch.eye(4, dtype=torch.float64)
    assert image_text_contrastive_loss(eye, eye, PLAIN, 0.07)[0].item() == pytest.approx(1.0714304460516664, abs=1e-12)
    # A zero vector has cosine 0 with everything.
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    assert image_text_contrastive_loss(zeros, zeros, PLAIN, 0.07)[0].item() == pytest.approx(math.log(5), abs=1e-12)


def test_itc_golden_with_duplicates():
    logits = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 3]], dtype=torch.float64)
    config = HyperbolicConfig.euclidean(similarity="inner")
    # Ball points have inner products below 1: scale the logits down and undo it with tau.
    p = torch.linalg.cholesky(logits + 1e-12 * torch.eye(3)) * 0.3
    v = torch.atanh(p.norm(dim=-1, keepdim=True)) * p / p.norm(dim=-1, keepdim=True)
    loss, i2t, t2i = image_text_contrastive_loss(v, v, config, 0.09, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(i2t, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(t2i, logits.mT, rtol=1e-9, atol=1e-9)
    assert loss.item() == pytest.approx(0.7367116284365739, abs=1e-9)


@pytest.mark.parametrize("similarity", ["cosine", "distance", "inner", "angle", "mix"])
@pytest.mark.parametrize("query_agg", ["max", "mean", "fixed", "midpoint"])
def test_itc_against_loops(similarity, query_agg):
    config = HyperbolicConfig.paper(similarity=similarity, query_agg=query_agg, c=0.7)
    image, text = 0.4 * random(5, 3, 4), 0.4 * random(5, 4, seed=1)
    ids, keys = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([7, 8, 9, 7, 6])
    loss, i2t, _ = image_text_contrastive_loss(image, text, config, 0.2, ids, keys, mix=0.3)

    def scores(mode):
        if query_agg == "midpoint":
            from hyper_blip.similarity import tangent_midpoint

            return pairwise_similarity(tangent_midpoint(image, 0.7, "poincare"), text, mode, 0.7)
        each = torch.stack(
            [
                torch.stack([pairwise_similarity(q[None], t[None], mode, 0.7)[0, 0] for t in text])
                for i in image
                for q in i
            ]
        ).reshape(5, 3, 5)
        return {"max": each.amax(1), "mean": each.mean(1), "fixed": each[:, 0]}[query_agg]

    def cross_entropy(table):
        total = 0.0
        for table_, _ in ((table, 0), (table.T, 1)):
            for i in range(5):
                same = [j for j in range(5) if i == j or ids[i] == ids[j] or keys[i] == keys[j]]
                log_p = (table_[i] / 0.2).log_softmax(0)
                total += -sum((0.9 * (j in same) / len(same) + 0.1 / 5) * log_p[j].item() for j in range(5)) / 5
        return total / 2

    if similarity == "mix":
        expected = 0.7 * cross_entropy(scores("cosine")) + 0.3 * cross_entropy(scores("distance"))
    else:
        expected = cross_entropy(scores(similarity))
        torch.testing.assert_close(i2t, scores(similarity) / 0.2, rtol=1e-8, atol=1e-8)
    assert loss.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("similarity", ["cosine", "distance", "inner", "angle"])
def test_itc_gradcheck(similarity):
    config = HyperbolicConfig.paper(similarity=similarity, query_agg="mean")
    args = [(0.5 * random(3, 2, 4)).requires_grad_(), (0.5 * random(3, 4, seed=1)).requires_grad_()]
    args += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.8)]
    torch.autograd.gradcheck(
        lambda i, t, tau, c: image_text_contrastive_loss(i, t, config, tau, torch.tensor([0, 1, 0]), c=c)[0], args
    )


def test_itc_of_close_pairs_is_exact_in_single_precision():
    config = HyperbolicConfig.distance()
    v = random(6, 64)
    v = (2.3 * v / v.norm(dim=-1, keepdim=True)).float()
    _, i2t, _ = image_text_contrastive_loss(v, v.clone(), config, 1.0)
    assert i2t.diagonal().abs().max() == 0


def test_itc_small_batches():
    for config in (PLAIN, HyperbolicConfig.distance()):
        one = image_text_contrastive_loss(random(1, 3, 4), random(1, 4), config, 0.07)[0]
        assert one.item() == pytest.approx(0.0, abs=1e-12)
        none = image_text_contrastive_loss(random(0, 4).requires_grad_(), random(0, 4), config, 0.07)[0]
        assert none.item() == 0.0


def test_itc_bad_input():
    with pytest.raises(ValueError, match="as many rows, got 2 and 3"):
        image_text_contrastive_loss(random(2, 4), random(3, 4), PLAIN, 0.07)
    with pytest.raises(ValueError, match="tau must be > 0"):
        image_text_contrastive_loss(random(2, 4), random(2, 4), PLAIN, 0.0)
    with pytest.raises(ValueError, match="image_ids must have 2 rows, got 3"):
        image_text_contrastive_loss(random(2, 4), random(2, 4), PLAIN, 0.07, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="needs the share"):
        image_text_contrastive_loss(random(2, 4), random(2, 4), HyperbolicConfig(similarity="mix"), 0.07)


def test_hard_negatives_follow_the_softmax_and_skip_positives():
    logits = random(3, 5)
    positive = torch.zeros(3, 5, dtype=torch.bool)
    positive[0, 0] = positive[1, 1] = positive[1, 3] = True
    positive[2] = True
    generator = torch.Generator().manual_seed(0)
    draws = [hard_negatives(logits, logits.flip(0), positive, generator) for _ in range(4000)]
    assert draws[0][2].tolist() == [True, True, False]
    for part, table in ((1, logits), (0, logits.flip(0))):
        chosen = torch.stack([d[part] for d in draws])
        for row in (0, 1):
            counts = torch.bincount(chosen[:, row], minlength=5)
            assert counts[positive[row]].sum() == 0
            p = table[row].masked_fill(positive[row], -torch.inf).softmax(0)
            kept = ~positive[row]
            assert stats.chisquare(counts[kept].numpy(), (4000 * p[kept]).numpy()).pvalue > 1e-3
    empty = hard_negatives(logits[:0], logits[:0], positive[:0])
    assert [len(part) for part in empty] == [0, 0, 0]
    with pytest.raises(ValueError, match="one shape"):
        hard_negatives(logits, logits[:2], positive)


def test_itm_and_lm():
    assert image_text_matching_loss(
        torch.tensor([[2 / 3, 1 / 3]]).log().repeat(3, 1), torch.tensor([1, 0, 0])
    ).item() == pytest.approx(0.6365141683, abs=1e-6)
    logits, labels = random(2, 4, 7), torch.tensor([[0, 3, 5, -100], [0, 1, -100, -100]])
    total, count = 0.0, 0
    for b in range(2):
        for t in range(3):
            if labels[b, t + 1] >= 0:
                log_p = logits[b, t].log_softmax(0)
                total -= 0.9 * log_p[labels[b, t + 1]].item() + 0.1 * log_p.mean().item()
                count += 1
    assert text_generation_loss(logits, labels).item() == pytest.approx(total / count, abs=1e-6)


def test_entailment_and_diversity():
    apex = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    assert entailment_loss(apex, 3 * apex).item() == 0
    behind = entailment_loss(apex, -apex).item()
    assert behind > 1
    # Isometry: the Lorentz model at twice the tangent vector.
    assert entailment_loss(2 * apex, -2 * apex, manifold="lorentz").item() == pytest.approx(behind, abs=1e-12)
    v = random(2, 3, 4)
    expected = 0.0
    for b in range(2):
        for i in range(3):
            for j in range(3):
                if i != j:
                    expected += torch.nn.functional.cosine_similarity(v[b, i], v[b, j], dim=0).item() ** 2 / 12
    assert query_diversity_penalty(v).item() == pytest.approx(expected, abs=1e-12)
    assert query_diversity_penalty(v[:, :1]).item() == 0
    torch.autograd.gradcheck(query_diversity_penalty, (v.requires_grad_(),))


def test_mix_schedule():
    schedule = MixSchedule()
    assert [schedule(f) for f in (0, 50 / 600, 75 / 600, 100 / 600, 1)] == pytest.approx([0, 0, 0.5, 1, 1])
    with pytest.raises(ValueError, match="f0 < f1"):
        MixSchedule(0.5, 0.5)


def test_rqs_is_uniform_shared_and_stateless():
    rqs = RandomQuerySelection(seed=3)
    drawn = torch.stack([rqs(16, 8, step=step, rank=0) for step in range(500)])
    assert stats.chisquare(torch.bincount(drawn.flatten(), minlength=8).numpy()).pvalue > 1e-3
    assert torch.equal(drawn[7], RandomQuerySelection(seed=3)(16, 8, step=7, rank=0))
    assert not torch.equal(drawn[7], rqs(16, 8, step=7, rank=1))
    batch = RandomQuerySelection(mode="per_batch")(16, 8, step=0)
    assert (batch == batch[0]).all()
    # The Bernoulli draw is the same for all ranks.
    half = RandomQuerySelection(p=0.5)
    selected = [[half(2, 8, step=step, rank=rank) is not None for step in range(400)] for rank in range(3)]
    assert selected[0] == selected[1] == selected[2]
    assert stats.binomtest(sum(selected[0]), 400, 0.5).pvalue > 1e-3
    assert RandomQuerySelection(p=0.0)(2, 8, step=0) is None


@pytest.mark.parametrize("mode", ["prefix", "drop", "span", "priority"])
def test_rtp_laws(mode):
    caption = "one two three four five"
    words = caption.split()
    rtp = RandomTextPruning(p=1.0, mode=mode, priority=lambda words: [len(w) for w in words])
    found = [rtp([caption], step=step)[0].split() for step in range(600)]
    lengths = torch.tensor([len(f) for f in found])
    assert lengths.min() >= 1
    assert stats.chisquare(torch.bincount(lengths, minlength=6)[1:].numpy()).pvalue > 1e-3
    for f in found:
        positions = [words.index(w) for w in f]
        assert positions == sorted(positions)
        if mode == "prefix":
            assert f == words[: len(f)]
        if mode == "span":
            assert positions == list(range(positions[0], positions[0] + len(f)))
        if mode == "priority":
            assert set(f) == set(sorted(words, key=lambda w: (-len(w), words.index(w)))[: len(f)])
    half = RandomTextPruning(p=0.5, mode="prefix")
    pruned = half([caption] * 1000, step=0)
    assert stats.binomtest(sum(p != caption for p in pruned), 1000, 0.4).pvalue > 1e-3
    assert pruned == half([caption] * 1000, step=0)
    assert RandomTextPruning(p=0.0)([caption], step=0) == [caption]


def test_prune_ids_keeps_specials_and_whole_words():
    ids = torch.tensor([[1, 10, 11, 50, 12, 2, 0], [1, 13, 2, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    starts = torch.ones(60, dtype=torch.bool)
    starts[50] = False
    seen = set()
    for step in range(60):
        out, out_mask = RandomTextPruning(p=1.0).prune_ids(ids, mask, (1, 2), step, starts_word=starts)
        assert torch.equal(out_mask, (out != 0).long())
        row = out[0][out_mask[0].bool()].tolist()
        assert row in ([1, 10, 2], [1, 10, 11, 50, 2], [1, 10, 11, 50, 12, 2])
        seen.add(len(row))
        assert out[1].tolist() == ids[1].tolist()
    assert seen == {3, 5, 6}
    lengths = {int(RandomTextPruning(p=1.0).prune_ids(ids, mask, (1, 2), s)[1][0].sum()) for s in range(60)}
    assert lengths == {3, 4, 5, 6}


def test_equal_pruned_captions_are_positives():
    ids = torch.tensor([[1, 10, 11, 2], [1, 10, 2, 0], [1, 11, 10, 2]])
    keys = text_keys(ids, (ids != 0).long())
    same = text_keys(torch.tensor([[1, 10, 2, 99]]), torch.tensor([[1, 1, 1, 0]]))
    assert keys[1] == same[0]
    assert len(set(keys.tolist())) == 3
    found = positives(3, None, torch.tensor([[1, 10, 2], [1, 10, 2], [1, 11, 2]]))
    assert found.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_bad_sampling():
    with pytest.raises(ValueError, match="p must lie in"):
        RandomQuerySelection(p=2.0)
    with pytest.raises(ValueError, match="mode must be one of"):
        RandomQuerySelection(mode="each")
    with pytest.raises(ValueError, match="needs a function `priority`"):
        RandomTextPruning(mode="priority")
    with pytest.raises(ValueError, match="must not be empty"):
        RandomTextPruning()(["a", " "], step=0)
    with pytest.raises(ValueError, match="none in row 0"):
        RandomTextPruning().prune_ids(torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]]), (1, 2), 0)
    with pytest.raises(ValueError, match="a score for each of the 2 words, got 1"):
        RandomTextPruning(p=1.0, mode="priority", priority=lambda words: [1.0])(["a b"], step=0)
