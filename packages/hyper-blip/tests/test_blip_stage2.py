"""Stage 2: loss against a loop, image tokens, captions, radius, LoRA, half precision."""

import copy

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hyper_blip import (
    HyperBlip2Config,
    HyperBlip2ForConditionalGeneration,
    caption_batch,
    generate_captions,
    register_locator,
)

IMAGE = 119


class LetterTokenizer:
    """Each letter is a token; 2 begins a text."""

    pad_token_id, eos_token_id = 1, 3

    def __call__(self, text, add_special_tokens=True):
        return {
            "input_ids": [2] * add_special_tokens + [4 if c == "\n" else 5 if c == " " else ord(c) - 90 for c in text]
        }

    def batch_decode(self, rows, skip_special_tokens=True):
        letters = {1: "", 2: "", 3: "", 4: "\n", 5: " "}
        return ["".join(letters.get(i, chr(i + 90)) for i in row.tolist()) for row in rows]


@pytest.fixture
def opt():
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=120, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1,
            bos_token_id=2, eos_token_id=3,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def stage2(stage1, opt):
    def build(**more):
        first, language = stage1().eval(), copy.deepcopy(opt)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = HyperBlip2ForConditionalGeneration.from_pretraining(first, language, image_token_id=IMAGE, **more)
        return made.eval()

    return build


@pytest.fixture
def inputs(batch):
    pixels = batch(3)[0]
    return pixels, caption_batch(
        ["a cat", "two dogs", "i"], LetterTokenizer(), num_queries=8, image_token_id=IMAGE, prompt="see "
    )


def test_caption_batch(inputs):
    _, made = inputs
    ids, mask, labels = made["input_ids"], made["attention_mask"], made["labels"]
    assert (ids[:, :8] == IMAGE).all()
    assert ids[0, 8] == 2
    text = LetterTokenizer().batch_decode(ids[:, 8:])
    assert text[0].startswith("see a cat\n")
    assert (labels[:, : 8 + 1 + 3] == -100).all()
    assert labels[2][labels[2] >= 0].tolist() == [5, ord("i") - 90, 4]
    assert torch.equal(labels >= 0, mask.bool() & (torch.arange(ids.shape[1]) >= 12))
    with pytest.raises(ValueError, match="must not be empty"):
        caption_batch([" "], LetterTokenizer(), num_queries=8, image_token_id=IMAGE)
    with pytest.raises(ValueError, match="must not be empty"):
        caption_batch([], LetterTokenizer(), num_queries=8, image_token_id=IMAGE)


def test_loss_against_a_loop(stage2, inputs):
    model = stage2()
    pixels, made = inputs
    out = model(pixels, **made)
    with torch.no_grad():
        states = model.blip2.qformer(
            query_embeds=model.blip2.query_tokens.expand(3, -1, -1), encoder_hidden_states=model.vision_features(pixels)
        ).last_hidden_state
        prefix = model.blip2.language_projection(states)
        total = count = 0
        for row in range(3):
            num = int(made["attention_mask"][row].sum())
            words = model.blip2.language_model.get_input_embeddings()(made["input_ids"][row, 8:num])
            logits = model.blip2.language_model(inputs_embeds=torch.cat([prefix[row], words])[None]).logits[0]
            for t in range(num - 1):
                label = made["labels"][row, t + 1]
                if label >= 0:
                    total -= logits[t].log_softmax(0)[label].item()
                    count += 1
    assert out.loss.item() == pytest.approx(total / count, abs=1e-5)
    model.train()
    model(pixels, **made).loss.backward()
    trained = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {"query_tokens", "qformer", "language_projection", "vision_model"}
    assert not model.blip2.language_model.training


def test_stage_1_carries_over(stage1, stage2, batch):
    first, second = stage1().eval(), stage2()
    pixels = batch(3)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            second.radius(pixels), first.encode_image(pixels).radius.mean(1), rtol=1e-5, atol=1e-6
        )


def test_opt_from_the_configuration(blip2_config, inputs, batch):
    config = HyperBlip2Config(blip2_config(image_token_index=IMAGE))
    torch.manual_seed(0)
    model = HyperBlip2ForConditionalGeneration.from_config(config).eval()
    assert model.blip2.language_model.config.model_type == "opt"
    pixels, made = inputs
    # Equal to the Hugging Face model around the same weights.
    plain = Blip2ForConditionalGeneration(blip2_config(image_token_index=IMAGE)).eval()
    plain.load_state_dict(model.blip2.state_dict())
    expected = plain(
        pixel_values=pixels, input_ids=made["input_ids"], attention_mask=made["attention_mask"], labels=made["labels"]
    )
    assert model(pixels, **made).loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    with pytest.warns(UserWarning, match="initialised afresh"):
        other, info = HyperBlip2ForConditionalGeneration.from_blip2(plain, output_loading_info=True)
    assert info.missing == ("vision_projection.weight", "vision_projection.bias")
    # Directions of a random projection have a radius, but it says nothing.
    for ask in (other.radius, other.encode_image):
        with pytest.raises(ValueError, match="projection to the radius must come from stage 1"):
            ask(pixels)
    assert other(pixels, **made).loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)


def test_generation(stage2, inputs):
    model = stage2()
    pixels, made = inputs
    options = {"prompt": "see ", "max_new_tokens": 6, "min_new_tokens": 2}
    found = generate_captions(model, pixels, LetterTokenizer(), num_beams=2, batch_size=2, **options)
    assert len(found) == 3
    assert all(0 <= len(text) <= 6 for text in found)
    assert found == generate_captions(model, pixels, LetterTokenizer(), num_beams=2, batch_size=3, **options)
    ids = made["input_ids"][:, :12]
    out = model.generate(pixels, ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(out[:, :12], ids)
    # Greedy decoding: the first new token is the largest logit.
    logits = model(pixels, ids, torch.ones_like(ids)).logits[:, -1]
    assert torch.equal(out[:, 12], logits.argmax(-1))
    for name in ("batch_size", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            generate_captions(model, pixels, LetterTokenizer(), **{name: 0})


def test_image_tokens_are_counted(stage2, inputs, blip2_config):
    model = stage2()
    pixels, made = inputs
    ids = made["input_ids"].clone()
    ids[1, 0] = 7
    with pytest.raises(ValueError, match=r"must hold 8 image tokens \(id 119\) in every row, got \[8, 7, 8\]"):
        model(pixels, ids, made["attention_mask"])
    with pytest.raises(ValueError, match="8 image tokens"):
        model.generate(pixels, ids)
    with pytest.raises(ValueError, match="image_token_index must be"):
        HyperBlip2ForConditionalGeneration(HyperBlip2Config(blip2_config()))


def test_lora_on_the_language_model(stage2, inputs, tmp_path, opt):
    pytest.importorskip("peft")
    plain, model = stage2(), stage2(lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    pixels, made = inputs
    # A fresh adapter adds nothing.
    assert model(pixels, **made).loss.item() == pytest.approx(plain(pixels, **made).loss.item(), abs=1e-6)
    model.train()
    model(pixels, **made).loss.backward()
    language = {n for n, p in model.named_parameters() if p.grad is not None and "language_model" in n}
    assert language
    assert all(".lora_" in n for n in language)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    model.eval()
    model.save_pretrained(tmp_path)
    again = HyperBlip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(pixels, **made).logits, model(pixels, **made).logits)


def test_located_language_model_is_not_written(stage1, opt, inputs, tmp_path):
    def fresh(name):
        torch.manual_seed(3)
        return LlamaForCausalLM(LlamaConfig(**opt.config.to_dict()))

    register_locator("tiny-lm", fresh)
    model = HyperBlip2ForConditionalGeneration.from_pretraining(
        stage1().eval(), image_token_id=IMAGE, language_locator="tiny-lm:x", lora={"r": 2, "target_modules": ["q_proj"]}
    ).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    names = [n for n in load_file(tmp_path / "model.safetensors") if "language_model" in n]
    assert names
    assert all(".lora_" in n for n in names)
    again, info = HyperBlip2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info == ((), ())
    pixels, made = inputs
    assert torch.equal(again(pixels, **made).logits, model(pixels, **made).logits)
    assert torch.equal(again.radius(pixels), model.radius(pixels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(stage2, inputs, dtype):
    model = stage2().train()
    model.blip2.language_model.to(dtype)
    pixels, made = inputs
    reference = stage2()(pixels, **made).loss.item()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(pixels, **made).loss
        radius = model.radius(pixels)
    loss.backward()
    assert loss.item() == pytest.approx(reference, rel=0.02)
    assert radius.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradient_checkpointing(stage2, inputs):
    pixels, made = inputs
    found = []
    for checkpointed in (False, True):
        model = stage2().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(pixels, **made).loss
        loss.backward()
        found.append((loss.item(), model.blip2.query_tokens.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(42, 42), (28, 42)])
def test_other_picture_sizes(stage2, inputs, shape):
    model = stage2()
    _, made = inputs
    pixels = torch.randn(3, 3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = model.blip2.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        queries = model.blip2.query_tokens.expand(3, -1, -1)
        states = model.blip2.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        words = model.blip2.language_model.get_input_embeddings()(made["input_ids"])
        words[:, :8] = model.blip2.language_projection(states)
        expected = model.blip2.language_model(inputs_embeds=words, attention_mask=made["attention_mask"]).logits
    torch.testing.assert_close(model(pixels, **made).logits, expected, rtol=1e-4, atol=1e-5)
    ids = made["input_ids"][:, :12]
    out = model.generate(pixels, ids, max_new_tokens=1, do_sample=False)
    assert torch.equal(out[:, 12], expected[:, 11].argmax(-1))
    assert model.radius(pixels).shape == (3,)


def test_radius_in_half_precision(stage2, blip2_config, batch):
    model, pixels = stage2(), batch(3)[0]
    expected = model.radius(pixels)
    for half in (model.cast_vision(torch.bfloat16), model.to(torch.bfloat16)):
        found = half.radius(pixels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0)
    # A Q-Former in half precision below a projection of single precision, as a checkpoint read by `dtype` has it.
    model.vision_projection.float()
    torch.testing.assert_close(model.radius(pixels), expected, rtol=0.03, atol=0)


def test_non_finite(stage2, inputs):
    model = stage2()
    pixels, made = inputs
    pixels[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite features"):
        model.radius(pixels)
    with pytest.raises(ValueError, match="loss must be finite"):
        model(pixels, **made)


@pytest.mark.parametrize("given", [False, True])
def test_encoder_decoder_language_models(blip2_config, stage1, batch, tmp_path, given):
    torch.manual_seed(0)
    settings = T5Config(
        vocab_size=120, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, pad_token_id=1, eos_token_id=3,
        decoder_start_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    if given:
        language = T5ForConditionalGeneration(settings)
        model = HyperBlip2ForConditionalGeneration.from_pretraining(stage1(), language, image_token_id=IMAGE)
    else:
        made = Blip2Config(**{**blip2_config(image_token_index=IMAGE).to_dict(), "text_config": settings.to_dict()})
        model = HyperBlip2ForConditionalGeneration.from_config(HyperBlip2Config(made))
    pixels = batch(3)[0]
    inputs = caption_batch(
        ["a cat", "two dogs", "i"],
        LetterTokenizer(),
        num_queries=8,
        image_token_id=IMAGE,
        prompt="see ",
        encoder_decoder=True,
    )
    assert inputs["input_ids"].shape == (3, 12)
    assert inputs["labels"][2].tolist() == [5, ord("i") - 90, 3] + [-100] * 7
    loss = model.train()(pixels, **inputs).loss
    loss.backward()
    assert model.blip2.query_tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.blip2.language_model.parameters())
    plain = Blip2ForConditionalGeneration(model.config.blip2).eval()
    plain.load_state_dict(model.blip2.state_dict())
    model.eval()
    ids = inputs["input_ids"]
    expected = plain(pixels, input_ids=ids, attention_mask=inputs["attention_mask"], labels=inputs["labels"])
    assert model(pixels, **inputs).loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    tokens = model.generate(pixels, ids, max_new_tokens=4)
    assert torch.equal(tokens, plain.generate(pixels, input_ids=ids, max_new_tokens=4))
    texts = generate_captions(model, pixels, LetterTokenizer(), prompt="see ", num_beams=2, max_new_tokens=4)
    assert len(texts) == 3
    model.save_pretrained(tmp_path)
    again = HyperBlip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(pixels, **inputs).logits, model(pixels, **inputs).logits)
    model.start_from_captions(pixels, inputs["labels"])


def test_generation_without_a_text(blip2_config, batch):
    torch.manual_seed(0)
    plain = Blip2ForConditionalGeneration(blip2_config(image_token_index=IMAGE)).eval()
    with pytest.warns(UserWarning, match="initialised afresh"):
        model = HyperBlip2ForConditionalGeneration.from_blip2(plain)
    pixels = batch(3)[0]
    for options in ({"max_new_tokens": 4}, {"max_new_tokens": 5, "num_beams": 3}):
        assert torch.equal(model.generate(pixels, **options), plain.generate(pixels, **options))


def test_start_from_captions(stage2, batch):
    model, pixels = stage2().train(), batch(12)[0]
    labels = torch.randint(5, 110, (12, 4), generator=torch.Generator().manual_seed(1))
    labels[:, 0], labels[::2, 3] = 7, -100  # one word for all, and captions of two lengths
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert model.start_from_captions(pixels, labels, ridge=1e-6, batch_size=5) is model
    assert model.training
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"blip2.language_projection.weight", "blip2.language_projection.bias"}
    table = model.blip2.language_model.get_input_embeddings().weight.detach()
    model.eval()
    with torch.no_grad():
        seen = model.blip2.get_image_features(pixels).pooler_output
    norms = seen.norm(dim=-1).mean()
    torch.testing.assert_close(norms, table.norm(dim=1).mean(), rtol=1e-3, atol=0)
    words = torch.stack([table[row[1:][row[1:] >= 0]].mean(0) for row in labels])
    centred = [x - x.mean(0) for x in (seen.mean(1), words)]
    found = torch.nn.functional.cosine_similarity(
        *(x[:, None] if i == 0 else x[None] for i, x in enumerate(centred)), dim=-1
    )
    assert (found.argmax(1) == torch.arange(12)).float().mean() > 0.8


def test_start_from_captions_bad_input(stage2, batch):
    model, pixels = stage2().train(), batch(4)[0]
    labels = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])
    with pytest.raises(ValueError, match="pixel_values must hold 4 pictures, one per caption, got 3"):
        model.start_from_captions(pixels[:3], labels)
    with pytest.raises(ValueError, match="ridge must be finite and > 0, got 0"):
        model.start_from_captions(pixels, labels, ridge=0.0)
    with pytest.raises(ValueError, match="labels must hold at least two different rows, got 4 equal"):
        model.start_from_captions(pixels, labels[:1].expand(4, -1))
    with pytest.raises(ValueError, match="labels must hold at least two different rows, got 0"):
        model.start_from_captions(pixels[:0], labels[:0])
    with pytest.raises(ValueError, match=r"labels must hold a token in every row, got none in \[3\]"):
        model.start_from_captions(pixels, torch.tensor([[5, 6], [7, 8], [9, 10], [-100, -100]]))
    with pytest.raises(ValueError, match="pixel_values must give finite features"):
        model.start_from_captions(pixels * float("nan"), labels)
    with pytest.raises(ValueError, match="pixel_values must hold at least two different rows, got 4 equal"):
        model.start_from_captions(pixels[:1].expand(4, -1, -1, -1), labels)
    assert model.training
