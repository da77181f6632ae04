"""The start by least squares: closed forms, what it changes and what it leaves, bad input."""

import math

import numpy as np
import pytest
import torch

from hyper_blip import HyperbolicConfig, recall_at_k
from hyper_blip.start import FLOOR, apply_map, mean_words, ridge_map, whitened_components

SET = (
    "crossattention.attention.value.weight",
    "crossattention.attention.value.bias",
    "crossattention.output.dense.weight",
    "crossattention.output.dense.bias",
    "blip2.text_projection.weight",
    "blip2.text_projection.bias",
    "blip2.vision_projection.weight",
    "blip2.vision_projection.bias",
)


def test_components_are_damped_whitening():
    x = np.random.default_rng(0).normal(size=(50, 6)) * [9, 5, 3, 1, 0.1, 0.01] + 4
    found = apply_map(whitened_components(torch.from_numpy(x), 4), torch.from_numpy(x)).numpy()
    left, singular, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    deviation = singular[:4] / math.sqrt(50)
    expected = left[:, :4] * math.sqrt(50) * (deviation / (deviation + FLOOR * deviation[0]))
    expected *= 2 / np.linalg.norm(expected, axis=1).mean()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-9)


def test_a_lower_floor_damps_less():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 3)) * [9, 1, 0.3])
    low, high = (apply_map(whitened_components(x, 3, floor), x).square().mean(0) for floor in (1e-9, 0.5))
    torch.testing.assert_close(low / low[0], torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    assert (high / high[0]).tolist() == sorted((high / high[0]).tolist(), reverse=True)
    assert high[2] / high[0] < 0.02


def test_components_beyond_the_width_are_zero():
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    affine = whitened_components(x, 5)
    assert not affine.weight[3:].any()
    assert apply_map(affine, x).norm(dim=1).mean().item() == pytest.approx(math.sqrt(5))


@pytest.mark.parametrize("ridge", [1e-9, 0.5])
def test_ridge_map_is_the_regression(ridge):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 5)) + 2, rng.normal(size=(40, 3)) - 1
    centred = x - x.mean(0)
    gram = centred.T @ centred
    weight = np.linalg.solve(gram + ridge * np.trace(gram) / 5 * np.eye(5), centred.T @ (y - y.mean(0)))
    expected = centred @ weight + y.mean(0)
    expected *= math.sqrt(3) / np.linalg.norm(expected, axis=1).mean()
    found = apply_map(ridge_map(torch.from_numpy(x), torch.from_numpy(y), ridge), torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def recall(model, pixels, ids, mask):
    with torch.no_grad():
        scores = model.similarity(model.encode_image(pixels), model.encode_text(ids, mask))
    return recall_at_k(scores, list(range(len(ids))), [[i] for i in range(len(ids))])["txt_r1"]


@pytest.mark.parametrize("similarity", ["cosine", "distance"])
@pytest.mark.parametrize("manifold", ["lorentz", "poincare"])
def test_ties_pictures_to_captions(stage1, batch, similarity, manifold):
    hyper = HyperbolicConfig(manifold=manifold, similarity=similarity, rqs_prob=0.0, rtp_prob=0.0)
    model, (pixels, ids, mask) = stage1(hyper), batch(20)
    with torch.no_grad():
        model.blip2.qformer.encoder.layer[0].crossattention.output.dense.bias.fill_(
            0.1
        )  # 0 in a fresh model, and after
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.eval()
    poor = recall(model, pixels, ids, mask)
    model.train()
    assert model.start_from_pairs(pixels, ids, mask, batch_size=7) is model
    assert model.training
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert all(name.endswith(SET) for name in changed)
    assert {s for s in SET if any(name.endswith(s) for name in changed)} == set(SET)
    model.eval()
    assert poor < 30
    assert recall(model, pixels, ids, mask) > 80
    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    scale = 2 if manifold == "poincare" else 1
    torch.testing.assert_close(text.radius.mean(), torch.tensor(float(scale)), rtol=1e-3, atol=0)
    assert float(image.radius.detach().mean()) == pytest.approx(scale, rel=1e-3)


def test_a_linear_start_silences_the_feed_forward_nets(stage1, batch):
    """What a query holds after a layer is what its attention gave: the feed-forward net adds nothing until it is trained."""
    model, (pixels, ids, mask) = stage1(HyperbolicConfig.euclidean()), batch(20)
    model.eval().start_from_pairs(pixels, ids, mask, linear=True)
    layers, seen = model.blip2.qformer.encoder.layer, []
    for layer in layers:
        layer.output_query.LayerNorm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        layer.intermediate_query.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    assert recall(model, pixels, ids, mask) > 80
    assert len(seen) == 2 * len(layers)
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(before, after)
    model.train()(pixels, ids, mask).loss.backward()
    assert all(layer.output_query.dense.weight.grad.abs().max() > 0 for layer in layers)
    assert all(layer.output.dense.weight.abs().max() > 0 for layer in layers)  # those of the text stay


def test_components_are_those_of_training(stage1, batch):
    """Dropout is part of what the text projection whitens: texts have radius 1 in training, not some multiple of it."""
    pixels, ids, mask = batch(40)
    made = []
    for seed in (1, 1, 2):
        model = stage1(HyperbolicConfig(manifold="lorentz", similarity="distance", rqs_prob=0.0, rtp_prob=0.0))
        for module in model.blip2.qformer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.start_from_pairs(pixels, ids, mask, dropout_passes=20)
        made.append(model)
    one, again, two = made
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.blip2.text_projection.weight, two.blip2.text_projection.weight)
    one.train()
    with torch.no_grad():
        trained = torch.stack([one.encode_text(ids, mask).radius for _ in range(20)]).mean()
        asked = one.eval().encode_text(ids, mask).radius.mean()
    assert float(trained) == pytest.approx(1, abs=0.05)
    assert float(asked) < 0.8


def test_pieces_do_not_matter(stage1, batch):
    a, b = (stage1(HyperbolicConfig.distance()).start_from_pairs(*batch(12), batch_size=n) for n in (5, 12))
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=name)


def test_bad_input(stage1, batch):
    model, (pixels, ids, mask) = stage1(), batch(4)
    with pytest.raises(ValueError, match="pixel_values must hold 4 pictures, one per caption, got 3"):
        model.start_from_pairs(pixels[:3], ids, mask)
    with pytest.raises(ValueError, match="ridge must be finite and > 0, got 0"):
        model.start_from_pairs(pixels, ids, mask, ridge=0.0)
    with pytest.raises(ValueError, match="value_ridge must be finite and > 0, got -1"):
        model.start_from_pairs(pixels, ids, mask, value_ridge=-1.0)
    with pytest.raises(ValueError, match="pixel_values must give finite features"):
        model.start_from_pairs(pixels * math.nan, ids, mask)
    with pytest.raises(ValueError, match="pixel_values must hold at least two different rows, got 4 equal"):
        model.start_from_pairs(pixels[:1].expand(4, -1, -1, -1), ids, mask)
    with pytest.raises(ValueError, match="input_ids must hold at least two different rows, got 0"):
        model.start_from_pairs(pixels[:0], ids[:0], mask[:0])
    with pytest.raises(ValueError, match="floor must be finite and > 0, got 0"):
        model.start_from_pairs(pixels, ids, mask, floor=0.0)
    with pytest.raises(ValueError, match="dropout_passes must be finite and > 0, got 0"):
        model.start_from_pairs(pixels, ids, mask, dropout_passes=0)
    model.train()
    with pytest.raises(ValueError, match="input_ids must hold at least two different rows, got 4 equal"):
        model.start_from_pairs(pixels, ids[:1].expand(4, -1), mask[:1].expand(4, -1))
    assert model.training


def test_mean_words_weigh_by_rarity():
    table = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 1, 2, 3], [1, 2, -100, -100], [1, 5, 5, -100], [1, 1, -100, -100]])
    common, rare, two = 0.0, math.log(4), math.log(2)
    expected = torch.stack(
        [
            (common * table[1] + two * table[2] + rare * table[3]) / (two + rare),
            table[2],
            table[5],
            table[1],  # nothing but what all hold: the plain mean
        ]
    )
    torch.testing.assert_close(mean_words(labels, table), expected)
    with pytest.raises(ValueError, match=r"labels must hold a token in every row, got none in \[1\]"):
        mean_words(torch.tensor([[1], [-100]]), table)
