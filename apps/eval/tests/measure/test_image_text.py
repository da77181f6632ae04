"""Scores from tables against their definitions, also where pictures are drawn several times."""

import math

import numpy as np
import pytest
import torch

from app_eval.measure.captions import bleu
from app_eval.measure.image_text import auroc, caption_scores, caption_table, rank_table, recall_scores
from app_eval.measure.interval import difference_of, interval_of, resamples
from hyper_blip import error_auroc, recall_at_k
from hyper_blip.retrieval import RetrievalScores

REFS = (("a cat on the mat", "the grey cat sits"), ("two dogs run in a park",), ("a man on a red bike", "he rides"))
SAID = ("a cat sits on a mat", "two dogs run", "a bike")


def drawn(*rows):
    return np.array(rows, dtype=float)


def repeated(items, counts):
    return [item for item, count in zip(items, counts, strict=True) for _ in range(int(count))]


def test_recalls_are_those_of_the_package_and_texts_are_drawn_with_their_picture():
    generator = torch.Generator().manual_seed(0)
    scores, owner = torch.randn(5, 11, generator=generator), np.array([0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4])
    table = {k: v.numpy() for k, v in rank_table(RetrievalScores(scores, scores), owner).items()} | {"owner": owner}
    own = [np.flatnonzero(owner == i).tolist() for i in range(5)]
    expected = recall_at_k(scores, owner.tolist(), own)
    found = recall_scores(table)
    everything = drawn([1] * 5)
    for k in (1, 5, 10):
        assert found[f"TR@{k}"](everything)[0] == pytest.approx(expected[f"txt_r{k}"])
        assert found[f"IR@{k}"](everything)[0] == pytest.approx(expected[f"img_r{k}"])
    assert found["mean recall"](everything)[0] == pytest.approx(expected["r_mean"])
    hits = [[table["image_rank"][j] < 1 for j in texts] for texts in own]
    for counts in ((2, 0, 1, 1, 1), (0, 3, 0, 2, 0)):
        texts = [hit for row in repeated(hits, counts) for hit in row]
        assert found["IR@1"](drawn(counts))[0] == pytest.approx(100 * np.mean(texts))
    assert set(found) == {"TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "mean recall"}


def test_captions_of_drawn_pictures_score_as_a_set_of_them():
    table = {k: v.numpy() for k, v in caption_table(REFS, SAID).items()}
    found = caption_scores(table, ("in", "out", "in"))
    for counts in ((1, 1, 1), (2, 0, 1), (0, 1, 3)):
        refs, said = repeated(REFS, counts), repeated(SAID, counts)
        expected = bleu(dict(enumerate(refs)), dict(enumerate(said)))
        for n in range(4):
            assert found[f"BLEU-{n + 1}"](drawn(counts))[0] == pytest.approx(100 * expected[n], abs=1e-9)
        mean = np.mean(repeated(table["rouge_l"], counts))
        assert found["ROUGE-L"](drawn(counts))[0] == pytest.approx(100 * mean)
    assert found["CIDEr, in"](drawn([1, 1, 1]))[0] == pytest.approx(50 * (table["cider"][0] + table["cider"][2]))
    assert math.isnan(found["CIDEr, out"](drawn([1, 0, 1]))[0])
    assert "CIDEr, in" not in caption_scores(table, ("in", "in", "in"))


def test_auroc_equals_pairs_by_hand():
    draw = np.random.default_rng(0)
    confidence, wrong = draw.integers(0, 5, 30).astype(float), draw.random(30) < 0.4
    score = auroc(confidence, wrong)
    assert score(np.ones((1, 30)))[0] == pytest.approx(
        error_auroc((-confidence).tolist(), wrong.astype(float).tolist()), abs=1e-12
    )
    counts = draw.integers(0, 4, (3, 30)).astype(float)
    for row, value in zip(counts, score(counts), strict=True):
        c, w = np.array(repeated(confidence, row)), np.array(repeated(wrong, row))
        pairs = [(a < b) + 0.5 * (a == b) for a in c[w] for b in c[~w]]
        assert value == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(confidence, np.zeros(30, bool))(np.ones((1, 30)))[0])


def test_a_model_against_itself_differs_by_nothing():
    table = {k: v.numpy() for k, v in caption_table(REFS, SAID).items()}
    score = caption_scores(table, ("", "", ""))["ROUGE-L"]
    counts = resamples(3)
    assert difference_of(score, score, counts).as_json() == [0, 0, 0]
    other = caption_scores({k: v.numpy() for k, v in caption_table(REFS, SAID[::-1]).items()}, ("", "", ""))["ROUGE-L"]
    found = difference_of(score, other, counts)
    assert found.value == pytest.approx(interval_of(score, counts).value - interval_of(other, counts).value)
    assert found.low <= found.value <= found.high
