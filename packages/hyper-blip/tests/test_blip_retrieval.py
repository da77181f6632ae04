"""Recall by hand, re-ranking against pair-by-pair scores, and the statistics of the radius against scipy."""

import json
import math

import pytest
import torch
from scipy import stats

from hyper_blip import (
    HyperbolicConfig,
    aurc,
    calibration_bins,
    error_auroc,
    kendall,
    radius_report,
    recall_at_k,
    retrieval_scores,
    spearman,
)
from hyper_blip.retrieval import target_ranks

SCORES = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.2, 0], [0.2, 0.7, 0.6, 0.5, 0.1, 0.3], [0.4, 0.3, 0.2, 0.1, 0.6, 0.5]])
TXT2IMG, IMG2TXT = [0, 0, 1, 1, 2, 2], [[0, 1], [2, 3], [4, 5]]


def test_recall_golden():
    own = torch.zeros(3, 6, dtype=torch.bool)
    own[torch.tensor(TXT2IMG), torch.arange(6)] = True
    assert target_ranks(SCORES, own).tolist() == [0, 1, 0]
    assert target_ranks(SCORES.T, own.T).tolist() == [0, 2, 1, 0, 0, 0]
    found = recall_at_k(SCORES, TXT2IMG, IMG2TXT)
    assert found["txt_r1"] == pytest.approx(200 / 3)
    assert found["txt_r5"] == found["txt_r10"] == 100
    assert found["img_r1"] == pytest.approx(400 / 6)
    assert found["img_r5"] == 100
    assert found["txt_r_mean"] == found["agg_metrics"] == pytest.approx((200 / 3 + 200) / 3)
    assert found["r_mean"] == pytest.approx((found["txt_r_mean"] + found["img_r_mean"]) / 2)
    assert found["text_retrieval_recall@1"] == found["txt_r1"]
    assert found["image_retrieval_recall@5"] == found["img_r5"]


def test_ties_count_against_the_target():
    assert recall_at_k(torch.ones(2, 2), [0, 1], [[0], [1]], (1, 2)) | {} == recall_at_k(
        torch.zeros(2, 2), [0, 1], [[0], [1]], (1, 2)
    )
    assert recall_at_k(torch.ones(2, 2), [0, 1], [[0], [1]], (1, 2))["txt_r1"] == 0
    assert recall_at_k(torch.full((2, 2), -torch.inf), [0, 1], [[0], [1]], (1, 2))["txt_r2"] == 100


def test_recall_bad_input():
    with pytest.raises(ValueError, match="need 3 entries"):
        recall_at_k(SCORES, TXT2IMG[:5], IMG2TXT)
    with pytest.raises(ValueError, match="NaN"):
        recall_at_k(SCORES * math.nan, TXT2IMG, IMG2TXT)
    with pytest.raises(ValueError, match="none for picture 1"):
        recall_at_k(SCORES, TXT2IMG, [[0], [], [1]])
    with pytest.raises(ValueError, match="ks must be >= 1"):
        recall_at_k(SCORES, TXT2IMG, IMG2TXT, (0,))


@pytest.mark.parametrize("similarity", ["cosine", "distance"])
@pytest.mark.parametrize("rerank", ["itm+itc", "itm", "itm+zitc", "none", None])
def test_reranking_against_pairs(stage1, batch, similarity, rerank):
    model = stage1(HyperbolicConfig(similarity=similarity)).eval()
    # Fresh features are nearly equal, and standardising would amplify rounding.
    with torch.no_grad():
        model.blip2.vision_projection.weight.mul_(50)
        model.blip2.text_projection.weight.mul_(50)
    pixels = batch(5)[0]
    ids, mask = batch(7, seed=1)[1:]
    if rerank == "itm+itc" and similarity != "cosine":
        with pytest.raises(ValueError, match="needs similarity 'cosine', got 'distance'"):
            retrieval_scores(model, pixels, (ids, mask), 2, rerank)
        return
    found = retrieval_scores(model, pixels, (ids, mask), 2, rerank, batch_size=3)
    with torch.no_grad():
        itc = model.similarity(model.encode_image(pixels), model.encode_text(ids, mask))
        itm = torch.stack(
            [
                torch.stack(
                    [model.itm_logits(pixels[i : i + 1], ids[t : t + 1], mask[t : t + 1])[0, 1] for t in range(7)]
                )
                for i in range(5)
            ]
        )
    if rerank == "none":
        torch.testing.assert_close(found.image_to_text, itc)
        return
    kind = rerank or ("itm+itc" if similarity == "cosine" else "itm")
    total = itm + {"itm": 0, "itm+itc": itc, "itm+zitc": (itc - itc.mean()) / itc.std()}[kind]
    for scores, table, expected in ((found.image_to_text, itc, total), (found.text_to_image.T, itc.T, total.T)):
        for row in range(len(table)):
            best = table[row].topk(2).indices
            rest = torch.ones(table.shape[1], dtype=torch.bool)
            rest[best] = False
            torch.testing.assert_close(scores[row, best], expected[row, best], rtol=1e-3, atol=1e-3)
            assert (scores[row, rest] == -torch.inf).all()


def test_retrieval_arguments(stage1, batch):
    model = stage1().eval()
    pixels, ids, mask = batch(3)
    with pytest.raises(ValueError, match="k_test must be >= 1, got 0"):
        retrieval_scores(model, pixels, (ids, mask), 0)
    with pytest.raises(ValueError, match="rerank must be one of"):
        retrieval_scores(model, pixels, (ids, mask), 1, "best")
    with pytest.raises(ValueError, match="batch_size"):
        retrieval_scores(model, pixels, (ids, mask), 1, batch_size=0)
    with pytest.warns(UserWarning, match="k_test 9 is larger") as caught:
        whole = retrieval_scores(model, pixels, (ids, mask), 9)
    assert len(caught) == 1
    assert whole.image_to_text.isfinite().all()
    # Batches of pictures are as good as one tensor; a midpoint and a mean are other scores.
    parts = retrieval_scores(model, iter(pixels.split(2)), (ids, mask), 1, "none")
    torch.testing.assert_close(
        parts.image_to_text, retrieval_scores(model, pixels, (ids, mask), 1, "none").image_to_text
    )
    for how in ("mean", "fixed", "midpoint", "random"):
        assert retrieval_scores(model, pixels, (ids, mask), 1, "none", query_agg=how).image_to_text.shape == (3, 3)


def test_rank_correlations_equal_scipy():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, y = (torch.randint(0, 6, (30,), generator=generator).double() for _ in range(2))
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    for function in (spearman, kendall):
        with pytest.warns(UserWarning, match="constant input"):
            assert math.isnan(function([1.0, 1.0], [1.0, 2.0]))
        with pytest.raises(ValueError, match="must have 2 values, got 3"):
            function([1.0, 2.0], [1.0, 2.0, 3.0])
        with pytest.raises(ValueError, match="finite"):
            function([1.0, math.nan], [1.0, 2.0])


def test_aurc_and_auroc():
    assert aurc([4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 1.0, 0.0]) == pytest.approx((1 / 3 + 1 / 4) / 4, abs=1e-12)
    assert aurc([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 0.0]) == pytest.approx(0.1458333, abs=1e-7)
    with pytest.raises(ValueError, match="must not be empty"):
        aurc([], [])
    generator = torch.Generator().manual_seed(1)
    u = torch.randint(0, 8, (40,), generator=generator).double()
    e = torch.randint(0, 2, (40,), generator=generator).double()
    expected = stats.mannwhitneyu(u[e == 1], u[e == 0]).statistic / (int(e.sum()) * int((1 - e).sum()))
    assert error_auroc(u, e) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(error_auroc([1.0, 2.0], [0.0, 0.0]))


def test_calibration():
    u = torch.arange(100.0)
    # Recall falls in a straight line with the uncertainty.
    right = torch.cat([torch.tensor([1.0] * (10 - k) + [0.0] * k) for k in range(10)])
    found = calibration_bins(u, right)
    assert [b["recall"] for b in found["bins"]] == pytest.approx([1 - k / 10 for k in range(10)])
    assert found["spearman"] == pytest.approx(-1)
    assert found["minus_s_r2"] == pytest.approx(1)
    assert calibration_bins(-u, right)["minus_s_r2"] == pytest.approx(-1)
    assert math.isnan(calibration_bins(u, torch.ones(100))["minus_s_r2"])
    with pytest.raises(ValueError, match="num_bins must be >= 1"):
        calibration_bins(u, right, 0)


def test_radius_report():
    generator = torch.Generator().manual_seed(2)
    rho = torch.rand(200, generator=generator) * 3
    right = (torch.rand(200, generator=generator) < rho / 3).double()
    found = radius_report(
        rho, right, {"length": rho * 2 + 1}, {"norm": -rho}, text_radius=rho - 0.1, paired_image_radius=rho, c=0.5
    )
    json.dumps(found)
    assert found["correlations"]["radius"]["length"]["spearman"] == pytest.approx(1)
    assert found["correlations"]["norm"]["length"]["kendall"] == pytest.approx(-1)
    assert found["text_below_image"] == 1
    scores = found["scores"]
    assert scores["radius"]["aurc"] < scores["random"]["aurc"] < scores["norm"]["aurc"]
    assert scores["radius"]["error_auroc"] == pytest.approx(1 - scores["norm"]["error_auroc"])
    assert scores["radius"]["error_auroc"] > 0.7
    assert found["radius"]["ball_mean"] == pytest.approx(
        (torch.tanh(0.5**0.5 * rho / 2) / 0.5**0.5).mean().item(), rel=1e-6
    )
    with pytest.raises(ValueError, match=r"controls\['norm'\] must have 200 values"):
        radius_report(rho, right, controls={"norm": rho[:5]})


def test_another_similarity_than_the_trained_one(stage1, batch):
    """Features of a distance, ranked by their cosine: what the Euclidean preset says of the same weights."""
    model, (pixels, ids, mask) = stage1(HyperbolicConfig.distance()), batch(5)
    plain = stage1(HyperbolicConfig.euclidean())
    plain.load_state_dict(model.state_dict())
    found = retrieval_scores(model, pixels, (ids, mask), 1, "none", mode="cosine").image_to_text
    torch.testing.assert_close(found, retrieval_scores(plain, pixels, (ids, mask), 1, "none").image_to_text)
    own = retrieval_scores(model, pixels, (ids, mask), 1, "none").image_to_text
    torch.testing.assert_close(
        retrieval_scores(model, pixels, (ids, mask), 1, "none", mode="distance").image_to_text, own
    )
    assert not torch.allclose(own, found, atol=1e-3)
    # Re-ranking follows: a cosine may be added to the matching logit, a distance may not.
    retrieval_scores(model, pixels, (ids, mask), 2, "itm+itc", mode="cosine")
    with pytest.raises(ValueError, match="'itm\\+itc' needs similarity 'cosine', got 'distance'"):
        retrieval_scores(plain, pixels, (ids, mask), 2, "itm+itc", mode="distance")
    with pytest.raises(ValueError, match="mode must be one of"):
        retrieval_scores(model, pixels, (ids, mask), 1, "none", mode="dot")
