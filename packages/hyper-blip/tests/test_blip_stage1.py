"""Stage 1: fused against separate passes, equality with plain BLIP-2, precision, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel, Blip2ForImageTextRetrieval
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from hyper_blip import (
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    RandomQuerySelection,
    image_text_contrastive_loss,
)
from hyper_blip.qformer import JOINT, Segment, image_keys, joint_states

EVERYTHING = {"itc": 1.0, "itm": 1.0, "lm": 1.0, "entail": 0.2, "diversity": 0.1}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_size_of_the_tiny_model(blip2_config):
    assert sum(p.numel() for p in Blip2ForImageTextRetrieval(blip2_config()).parameters()) == 72770


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("hyper", [HyperbolicConfig.paper, HyperbolicConfig.distance], ids=["paper", "distance"])
def test_fused_equals_separate(stage1, batch, attention, hyper):
    found = []
    for fused in (True, False):
        model = stage1(hyper(fused=fused, loss_weights=EVERYTHING, rtp_targets=("itc", "lm")), attention).train()
        out = model(*batch(), step=3)
        out.loss.backward()
        found.append((out, gradients(model)))
    (a, grads_a), (b, grads_b) = found
    for name in (
        "loss",
        "loss_itc",
        "loss_itm",
        "loss_lm",
        "loss_entail",
        "loss_diversity",
        "image_features",
        "text_features",
    ):
        assert (getattr(a, name) - getattr(b, name)).abs().max() <= 1e-5, name
    assert grads_a.keys() == grads_b.keys()
    largest = max(g.norm() for g in grads_b.values())
    for name, g in grads_a.items():
        assert (g - grads_b[name]).norm() <= 1e-4 * grads_b[name].norm() + 1e-6 * largest, name


def test_shared_image_keys_change_nothing(stage1, batch):
    found = []
    for share in (False, True):
        model = stage1(HyperbolicConfig.distance(share_image_kv=share, itm_negatives="local")).train()
        out = model(*batch(), step=3)
        out.loss.backward()
        found.append((out, gradients(model)))
    (a, grads_a), (b, grads_b) = found
    for name in ("loss_itc", "loss_itm", "loss_lm"):
        assert (getattr(a, name) - getattr(b, name)).abs() <= 1e-5, name
    largest = max(g.norm() for g in grads_a.values())
    for name, g in grads_a.items():
        assert (g - grads_b[name]).norm() <= 1e-4 * g.norm() + 1e-6 * largest, name


def test_euclidean_equals_blip2(stage1, batch):
    """The losses from the public outputs of the Hugging Face model, the matching ones pair by pair."""
    model = stage1(HyperbolicConfig.euclidean())
    model.train()
    pixels, ids, mask = batch(4)
    out = model(pixels, ids, mask, step=0)
    plain = model.blip2
    with torch.no_grad():
        itc = plain(pixels, ids, mask, use_image_text_matching_head=False)
        logits = itc.logits_per_image / 0.07
        target = torch.arange(4)
        losses = [F.cross_entropy(x, target, label_smoothing=0.1) for x in (logits, logits.T)]
        assert out.loss_itc.item() == pytest.approx(sum(losses).item() / 2, abs=2e-6)
        for i in range(4):
            for t in range(4):
                one = pixels[i : i + 1], ids[t : t + 1], mask[t : t + 1]
                expected = plain(*one, use_image_text_matching_head=True).logits_per_image
                assert (model.itm_logits(*one) - expected).abs().max() <= 1e-6
        # The negatives that this step draws.
        from hyper_blip import hard_negatives
        from hyper_blip.sampling import stateless_seed

        generator = torch.Generator().manual_seed(stateless_seed("itm", 0, 0, 0))
        image, text, valid = hard_negatives(logits, logits.T, torch.eye(4, dtype=torch.bool), generator)
        assert valid.all()
        pairs = [*((i, i) for i in range(4)), *((image[t].item(), t) for t in range(4))]
        pairs += [(i, text[i].item()) for i in range(4)]
        rows = [
            plain(pixels[i : i + 1], ids[t : t + 1], mask[t : t + 1], use_image_text_matching_head=True)
            for i, t in pairs
        ]
        table = torch.cat([row.logits_per_image for row in rows])
        labels = torch.tensor([1] * 4 + [0] * 8)
        assert out.loss_itm.item() == pytest.approx(F.cross_entropy(table, labels).item(), abs=1e-6)


def test_lm_head_equals_bert(stage1):
    torch.manual_seed(0)
    head = BertOnlyMLMHead(BertConfig(vocab_size=100, hidden_size=32))
    torch.nn.init.normal_(head.predictions.bias)
    mine = stage1().lm_head
    mine.dense.load_state_dict(head.predictions.transform.dense.state_dict())
    mine.norm.load_state_dict(head.predictions.transform.LayerNorm.state_dict())
    with torch.no_grad():
        mine.bias.copy_(head.predictions.bias)
    x = torch.randn(2, 5, 32)
    expected = head(x)
    # The decoder's own bias is the prediction bias in some versions and separate in others.
    if not torch.equal(head.predictions.decoder.bias, head.predictions.bias):
        mine.bias.data.copy_(head.predictions.decoder.bias)
    assert (mine(x, head.predictions.decoder.weight) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", ["cosine", "distance", "inner", "angle", "mix"])
def test_step_0_in_half_precision(stage1, batch, dtype, similarity):
    model = stage1(HyperbolicConfig(similarity=similarity, loss_weights=EVERYTHING)).train()
    with torch.no_grad():
        for projection in (model.blip2.vision_projection, model.blip2.text_projection):
            projection.weight.mul_(9 / (projection.weight.norm() / math.sqrt(16) * math.sqrt(32)) * 2)
    pixels, ids, mask = batch()
    with torch.no_grad():
        z = model.blip2.vision_projection(joint_states(model.blip2, model.vision_features(pixels))[0])
        model.blip2.vision_projection.weight.mul_(9 / z.norm(dim=-1).mean())
    with torch.autocast("cpu", dtype=dtype):
        out = model(pixels, ids, mask, step=0, progress=0.12)
    assert out.image_features.dtype == torch.float32
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm", "loss_entail", "loss_diversity"):
        assert getattr(out, name).isfinite(), name
    (out.loss * (1024.0 if dtype == torch.float16 else 1.0)).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    assert model.image_projector.alpha.grad is not None
    assert all(v.isfinite() for v in out.diagnostics.values())


def test_gradient_checkpointing_changes_nothing(stage1, batch):
    for hyper in (HyperbolicConfig.paper(), HyperbolicConfig.paper(share_image_kv=True, itm_negatives="local")):
        found = []
        for checkpointed in (False, True):
            model = stage1(hyper).train()
            if checkpointed:
                model.gradient_checkpointing_enable()
            out = model(*batch(), step=1)
            out.loss.backward()
            found.append((out.loss.item(), gradients(model)))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
        for name, g in found[0][1].items():
            torch.testing.assert_close(g, found[1][1][name], rtol=1e-4, atol=1e-6)


def test_one_pair(stage1, batch):
    for hyper in (HyperbolicConfig.euclidean(), HyperbolicConfig.distance()):
        model = stage1(hyper).train()
        out = model(*batch(1), step=0)
        out.loss.backward()
        assert out.loss.isfinite()
        assert out.loss_itc.item() == pytest.approx(0.0, abs=1e-6)


def test_same_pictures_are_positives_and_never_negatives(stage1, batch):
    model = stage1(HyperbolicConfig.euclidean()).train()
    pixels, ids, mask = batch(4)
    every = torch.zeros(4, dtype=torch.long)
    # All pairs are positive: only the four true pairs are left for matching.
    out = model(pixels, ids, mask, image_ids=every, step=0)
    with torch.no_grad():
        expected = F.cross_entropy(model.itm_logits(pixels, ids, mask), torch.ones(4, dtype=torch.long))
    assert out.loss_itm.item() == pytest.approx(expected.item(), abs=1e-6)


def test_resume_draws_the_same(stage1, batch):
    values = []
    for _ in range(2):
        model = stage1(HyperbolicConfig.distance()).train()
        for step in range(3):
            out = model(*batch(), step=step)
        values.append(out.loss.item())
    model = stage1(HyperbolicConfig.distance()).train()
    assert values[0] == values[1] == model(*batch(), step=2).loss.item()
    assert model(*batch(), step=1).loss.item() != values[0]


def test_the_selected_query_is_the_one_that_is_scored(stage1, batch):
    model = stage1(HyperbolicConfig.distance(rtp_prob=0.0)).train()
    out = model(*batch(), step=5)
    index = RandomQuerySelection()(4, 8, step=5, rank=0)
    assert len(set(index.tolist())) > 1
    chosen = out.image_features[torch.arange(4), index]
    expected, *_ = image_text_contrastive_loss(chosen, out.text_features, model.config.hyperbolic, 0.07)
    assert out.loss_itc.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("target", ["itc", "itm", "lm"])
def test_pruning_reaches_the_named_losses_alone(stage1, batch, target):
    settings = {"rqs_prob": 0.0, "rtp_mode": "prefix"}
    whole = stage1(HyperbolicConfig(**settings, rtp_prob=0.0)).train()(*batch(), step=2)
    pruned = stage1(HyperbolicConfig(**settings, rtp_prob=1.0, rtp_targets=(target,))).train()(*batch(), step=2)
    assert torch.equal(pruned.text_features, whole.text_features) == (target != "itc")
    assert (pruned.loss_lm.item() == pytest.approx(whole.loss_lm.item(), abs=1e-6)) == (target != "lm")
    if target != "itc":  # its similarities choose the negatives of the matching loss
        assert (pruned.loss_itm.item() == pytest.approx(whole.loss_itm.item(), abs=1e-7)) == (target != "itm")


def test_traps_of_the_hugging_face_model(stage1, batch, config):
    model = stage1(HyperbolicConfig.euclidean())
    # Queries from the configuration would be zero and the gradient 1e14.
    assert 0.015 < model.blip2.query_tokens.std() < 0.025
    assert model.blip2.qformer.config.use_qformer_text_input
    # An image token in the configuration would cut plain captions.
    made = config()
    made.blip2.image_token_index = 98
    model = HyperBlip2ForPretraining(made).eval()
    pixels, ids, mask = batch()
    assert model.blip2.config.image_token_index is None
    assert model.itm_logits(pixels, ids, mask).shape == (4, 2)
    # The embeddings are those before normalisation.
    with torch.no_grad():
        radius = model.encode_image(pixels).radius
        z = model.blip2.vision_projection(joint_states(model.blip2, model.vision_features(pixels))[0])
    torch.testing.assert_close(radius, 2 * z.norm(dim=-1) / 4, rtol=1e-5, atol=1e-6)
    # The matching mask hides padding: what stands there does not matter, under eager attention neither.
    for attention in ("sdpa", "eager"):
        model.blip2.set_attn_implementation(attention)
        other = torch.where(mask.bool(), ids, 55)
        assert (model.itm_logits(pixels, ids, mask) - model.itm_logits(pixels, other, mask)).abs().max() <= 1e-6
        assert (model.encode_text(ids, mask).tangent - model.encode_text(other, mask).tangent).abs().max() <= 1e-6


def test_many_texts_about_one_picture(stage1, batch):
    model = stage1().eval()
    pixels, ids, mask = batch(5)
    with torch.no_grad():
        image = model.vision_features(pixels[:1])
        keys = image_keys(model.blip2.qformer, image)
        found = joint_states(model.blip2, keys, [Segment(ids, mask, JOINT)])[0]
        expected = joint_states(model.blip2, image.expand(5, -1, -1), [Segment(ids, mask, JOINT)])[0]
    assert (found - expected).abs().max() <= 1e-6


def test_frozen_vision_and_parameter_groups(stage1):
    model = stage1(HyperbolicConfig.paper(learn_c=True)).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    vision = {n for n in trained if ".vision_model." in n}
    assert vision == {"blip2.vision_model.post_layernorm.weight", "blip2.vision_model.post_layernorm.bias"}
    assert not model.blip2.vision_model.training
    assert {"curvature.log_c", "temperature.log_c", "image_projector.alpha"} <= model.no_decay_names()
    model.freeze_vision(False)
    assert model.blip2.vision_model.training
    assert all(p.requires_grad for p in model.blip2.vision_model.parameters())
    with torch.no_grad():
        model.temperature.log_c.fill_(9.0)
        model.text_projector.alpha.fill_(9.0)
        model.curvature.log_c.fill_(9.0)
    model.clamp_()
    assert model.temperature().item() == pytest.approx(0.5)
    assert model.text_projector.alpha.item() == 0
    assert model.curvature().item() == pytest.approx(10.0)


def test_vision_encoder_in_half_precision(stage1, batch):
    model = stage1().eval()
    pixels = batch()[0]
    with torch.no_grad():
        expected = model.vision_features(pixels)
        model.cast_vision(torch.bfloat16)
        found = model.vision_features(pixels)
    assert model.blip2.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.1
    model.train()(*batch(), step=0).loss.backward()
    assert model.blip2.vision_model.post_layernorm.weight.grad.isfinite().all()


def test_diagnostics(stage1, batch):
    model = stage1(HyperbolicConfig.distance(max_radius=0.01)).train()
    found = model(*batch(), step=0).diagnostics
    assert found["clipped_image"] == found["clipped_text"] == 1
    assert found["radius_image_mean"].item() == pytest.approx(0.01)
    assert found["radius_image_std"].item() == pytest.approx(0, abs=1e-6)
    assert 0 <= found["query_entropy"] <= 1
    assert found["tau"].item() == pytest.approx(0.07)
    # One query in every place: always the same one wins, and all look alike.
    with torch.no_grad():
        model.blip2.query_tokens.copy_(model.blip2.query_tokens[:, :1].expand(-1, 8, -1))
    found = model(*batch(), step=0).diagnostics
    assert found["query_cosine"].item() == pytest.approx(1, abs=1e-5)


def test_text_from_bert_comes_out_as_from_bert(stage1, batch):
    torch.manual_seed(1)
    settings = BertConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=64,
    )  # fmt: skip
    bert = BertModel(settings, add_pooling_layer=False).eval()
    model = stage1().eval()
    info = model.load_bert(bert.state_dict())
    assert info.unexpected == ()
    assert all("crossattention" in n or "qformer" not in n for n in info.missing)
    _, ids, mask = batch()
    ids = ids.clamp(max=79)
    with torch.no_grad():
        found = joint_states(model.blip2, None, [Segment(ids, mask, "bidirectional")], queries=False)[0]
        expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    assert (found - expected)[mask.bool()].abs().max() <= 1e-5
    layer = model.blip2.qformer.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, bert.encoder.layer[1].intermediate.dense.weight)


def test_non_finite_losses(stage1, batch, caplog):
    for mode in ("raise", "skip"):
        model = stage1(HyperbolicConfig.paper(on_non_finite=mode)).train()
        pixels, ids, mask = batch()
        with torch.no_grad():
            model.lm_head.dense.weight[0, 0] = math.nan
        if mode == "raise":
            with pytest.raises(ValueError, match="loss must be finite, got nan"):
                model(pixels, ids, mask, step=0)
            continue
        with torch.no_grad():
            model.lm_head.dense.weight[0, 0] = 0
            model.lm_head.bias[0] = 0
        pixels[0, 0, 0, 0] = math.inf
        out = model(pixels, ids, mask, step=0)
        assert out.loss.item() == 0
        out.loss.backward()
        assert all(p.grad is None for p in model.parameters())
        # What other batches of the step have added stays.
        model(batch()[0], ids, mask, step=0).loss.backward()
        before = gradients(model)
        model(pixels, ids, mask, step=0).loss.backward()
        assert all(torch.equal(g, before[n]) for n, g in gradients(model).items())
        assert gradients(model).keys() == before.keys()
        assert model.non_finite_steps == 2
        assert "step skipped" in caplog.text
    model.eval()
    with pytest.raises(ValueError, match="pixel_values must give finite features"):
        model.encode_image(pixels)


def test_bad_input(stage1, batch, config):
    model = stage1(HyperbolicConfig.paper()).train()
    pixels, ids, mask = batch()
    with pytest.raises(ValueError, match="step must be given"):
        model(pixels, ids, mask)
    with pytest.raises(ValueError, match="must begin with cls_token_id 1"):
        model(pixels, ids + (ids == 1), mask, step=0)
    empty = ids.clone()
    empty[2] = 0
    empty[2, :2] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="empty caption"):
        model(pixels, empty, (empty != 0).long(), step=0)
    with pytest.raises(ValueError, match="at most 64 tokens, got 70"):
        model(pixels, ids.repeat(1, 10), mask.repeat(1, 10), step=0)
    with pytest.raises(ValueError, match="image_ids must have 4 rows, got 3"):
        model(pixels, ids, mask, image_ids=torch.arange(3), step=0)
    with pytest.raises(ValueError, match="as many rows, got 3 and 4"):
        model(pixels[:3], ids, mask, step=0)
    with pytest.raises(ValueError, match="must have one shape"):
        model(pixels, ids, mask[:, 1:], step=0)
    with pytest.raises(ValueError, match="progress must be"):
        stage1(HyperbolicConfig(similarity="mix")).train()(pixels, ids, mask, step=0)
    with pytest.raises(ValueError, match="cls_token_id must be >= 0"):
        config(cls_token_id=-1)


def test_overfits_sixteen_pairs(stage1, batch):
    from hyper_blip import recall_at_k, retrieval_scores

    # All queries: with RQS and the contrastive loss alone the queries of a model this small become one.
    hyper = HyperbolicConfig.distance(rqs_prob=0.0, rtp_prob=0.0, loss_weights={"itm": 0.0, "lm": 0.0})
    model = stage1(hyper).train()
    pixels, ids, mask = batch(16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(90):
        out = model(pixels, ids, mask, step=step)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.clamp_()
    model.eval()
    scores = retrieval_scores(model, pixels, (ids, mask), k_test=4, rerank="none")
    own = [[i] for i in range(16)]
    found = recall_at_k(scores.image_to_text, list(range(16)), own, scores_t2i=scores.text_to_image)
    assert found["txt_r1"] == 100
