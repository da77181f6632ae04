"""The models as Hugging Face's tools see them: Trainer, AutoModel, checkpointing, precision, devices, files."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    BertConfig,
    BertForMaskedLM,
    Blip2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hyper_blip import (
    HyperBlip2Config,
    HyperBlip2ForConditionalGeneration,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    StepCallback,
)

IMAGE = 119


@pytest.fixture
def stage2(blip2_config):
    torch.manual_seed(0)
    return HyperBlip2ForConditionalGeneration.from_config(HyperBlip2Config(blip2_config(image_token_index=IMAGE)))


@pytest.fixture
def rows(batch):
    """Eight examples for each stage."""
    pixels, ids, mask = batch(8)
    first = [
        {"pixel_values": p, "input_ids": i, "attention_mask": m} for p, i, m in zip(pixels, ids, mask, strict=True)
    ]
    words = torch.cat([torch.full((8, 8), IMAGE), ids], 1)
    second = [
        {
            "pixel_values": p,
            "input_ids": i,
            "attention_mask": torch.ones_like(i),
            "labels": i.masked_fill(i == IMAGE, -100),
        }
        for p, i in zip(pixels, words, strict=True)
    ]
    return {1: first, 2: second}


def trainer(model, rows, folder, **more):
    pytest.importorskip("accelerate")
    settings = TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="steps", save_steps=2, logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        seed=0, **more,
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=rows, callbacks=[StepCallback()])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("stage", [1, 2])
def test_trainer_trains_resumes_and_auto_model_reloads(stage, stage1, stage2, rows, tmp_path):
    model = stage1(HyperbolicConfig.distance(learn_c=True)) if stage == 1 else stage2
    again, before = copy.deepcopy(model), copy.deepcopy(model).state_dict()
    first = trainer(model, rows[stage], tmp_path / "run")
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert len(losses) == 4
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert "blip2.query_tokens" in moved
    assert not any("encoder.layers" in n for n in moved if "vision_model" in n)
    if stage == 1:
        assert {"image_projector.alpha", "temperature.log_c", "curvature.log_c"} <= moved
        assert model.at_step == (3, 0.75)
    # After two of four steps, as if it had been stopped there.
    second = trainer(again, rows[stage], tmp_path / "run")
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    first.save_model(str(tmp_path / "model"))
    for auto in (AutoModel, AutoModelForPreTraining if stage == 1 else AutoModelForImageTextToText):
        found = auto.from_pretrained(tmp_path / "model")
        assert type(found) is type(model)
        assert all(torch.equal(v, found.state_dict()[n]) for n, v in model.state_dict().items())


def test_steps_come_from_the_callback(stage1, batch):
    model = stage1(HyperbolicConfig(similarity="mix")).train()
    expected = model(*batch(), step=2, progress=0.1)
    model.at_step = (2, 0.1)
    found = model(*batch())
    assert torch.equal(found.loss, expected.loss)
    assert found["loss"] is found.loss is found[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_configuration_files(stage, stage1, stage2, tmp_path):
    model = stage1(HyperbolicConfig.distance(c=0.5, max_radius=None)) if stage == 1 else stage2
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "hyper-blip2"
    assert content["architectures"] == [type(model).__name__]
    assert content["blip2"]["num_query_tokens"] == 8
    found = AutoConfig.from_pretrained(tmp_path)
    assert found.hyperbolic == model.config.hyperbolic
    assert found.to_dict() == {**model.config.to_dict(), "_name_or_path": found.to_dict()["_name_or_path"]}
    assert (tmp_path / "generation_config.json").exists() == (stage == 2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors") == ["model.safetensors"]


def test_generation_config(stage2, rows, tmp_path):
    pixels, ids = rows[2][0]["pixel_values"][None], rows[2][0]["input_ids"][None]
    assert stage2.generation_config.eos_token_id == 3
    stage2.generation_config.max_new_tokens = 3
    stage2.eval().save_pretrained(tmp_path)
    found = HyperBlip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert found.generation_config.max_new_tokens == 3
    for model in (stage2, found):
        assert model.generate(pixels, ids, min_new_tokens=3).shape[1] == ids.shape[1] + 3
    expected = stage2.blip2.generate(
        pixels, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3
    )
    assert torch.equal(found.generate(pixels, ids, min_new_tokens=3), expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_precision_and_device(stage, stage1, stage2, rows, tmp_path):
    model = (stage1(HyperbolicConfig.distance(learn_c=True)) if stage == 1 else stage2).cast_vision(torch.bfloat16)
    model.save_pretrained(tmp_path)
    kind = type(model)
    found = kind.from_pretrained(tmp_path)
    assert {n: v.dtype for n, v in found.state_dict().items()} == {n: v.dtype for n, v in model.state_dict().items()}
    pixels = torch.stack([row["pixel_values"] for row in rows[stage]])
    assert torch.equal(found.encode_image(pixels).radius, model.eval().encode_image(pixels).radius)
    half = kind.from_pretrained(tmp_path, dtype="bfloat16", device_map={"": "cpu"})
    kept = {n for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        n for n, _ in half.named_parameters() if n.startswith(("curvature", "image_p", "text_projector", "temp"))
    }
    torch.testing.assert_close(
        half.encode_image(pixels).radius, model.encode_image(pixels).radius, rtol=0.05, atol=0.01
    )
    assert kind.from_pretrained(tmp_path, dtype=torch.float32, device_map="meta").device.type == "meta"
    with pytest.raises(ValueError, match="device_map must be one device"):
        kind.from_pretrained(tmp_path, device_map="auto")
    with pytest.raises(ValueError, match="knows no argument 'precision'"):
        kind.from_pretrained(tmp_path, precision="bf16")


def test_several_files_and_a_subfolder(stage1, batch, tmp_path):
    model = stage1().eval()
    model.save_pretrained(tmp_path / "sub", max_shard_size="100KB")
    assert (tmp_path / "sub" / "model.safetensors.index.json").exists()
    found = HyperBlip2ForPretraining.from_pretrained(tmp_path, subfolder="sub")
    assert torch.equal(found.encode_image(batch()[0]).point, model.encode_image(batch()[0]).point)


def test_revision_reaches_the_hub(monkeypatch, stage1, tmp_path):
    from hyper_blip import weights

    stage1().save_pretrained(tmp_path)
    asked = []
    real = weights.cached_file
    monkeypatch.setattr(weights, "cached_file", lambda *args, **more: asked.append(more) or real(*args, **more))
    HyperBlip2ForPretraining.from_pretrained(tmp_path, revision="v2", token="t")
    assert (asked[0]["revision"], asked[0]["token"]) == ("v2", "t")


@pytest.mark.parametrize("arguments", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointing_takes_arguments(stage1, batch, arguments):
    found = []
    for checkpointed in (False, True):
        model = stage1().train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
            assert model.is_activation_checkpointing
        model(*batch(), step=1).loss.backward()
        found.append(model.blip2.query_tokens.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_saved_weights_have_one_name_each(stage1, tmp_path):
    model = stage1(HyperbolicConfig.distance(learn_c=True))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert [n for n in names if "curvature" in n] == ["curvature.log_c"]
    assert set(names) == {n for n, _ in model.named_parameters()} | {n for n in names if n.endswith("position_ids")}


@pytest.fixture
def checkpoint(blip2_config, tmp_path):
    """A captioning checkpoint and a BERT as wide as its Q-Former, in folders."""
    torch.manual_seed(0)
    settings = blip2_config(image_token_index=IMAGE)
    settings.qformer_config.use_qformer_text_input = False
    blip2 = Blip2ForConditionalGeneration(settings)
    blip2.save_pretrained(tmp_path / "blip2")
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    bert.save_pretrained(tmp_path / "bert")
    return blip2, bert, tmp_path


def test_starts_from_bert(checkpoint, rows):
    blip2, bert, folder = checkpoint
    ids = {"cls_token_id": 1, "sep_token_id": 2, "dec_token_id": 99}
    model = HyperBlip2ForPretraining.from_bert(str(folder / "blip2"), str(folder / "bert"), ids=ids)
    vision = {n: p for n, p in model.blip2.vision_model.named_parameters() if "post_layernorm" not in n}
    assert {p.dtype for p in vision.values()} == {torch.bfloat16}
    expected = dict(blip2.vision_model.named_parameters())
    assert all(torch.equal(p, expected[n].bfloat16()) for n, p in vision.items())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    old = bert.bert.state_dict()
    for layer in (0, 1):
        mine = model.blip2.qformer.encoder.layer[layer]
        stem = f"encoder.layer.{layer}."
        for name, query in (("intermediate.dense.weight", True), ("output.LayerNorm.bias", True)):
            assert torch.equal(mine.get_parameter(name), old[stem + name])
            if query:
                assert torch.equal(mine.get_parameter(name.replace(".", "_query.", 1)), old[stem + name])
        assert torch.equal(
            mine.get_parameter("attention.attention.query.weight"), old[stem + "attention.self.query.weight"]
        )
    table = model.blip2.embeddings.word_embeddings.weight
    assert len(table) == 100
    assert torch.equal(table[:80], old["embeddings.word_embeddings.weight"])
    assert torch.equal(model.lm_head.dense.weight, bert.cls.predictions.transform.dense.weight)
    assert 0.015 < model.blip2.query_tokens.std() < 0.025
    batch = {k: torch.stack([row[k] for row in rows[1]]) for k in rows[1][0]}
    assert model.train()(**batch, step=0).loss.isfinite()
    # Stage 2 shares the encoder instead of building another one.
    second = HyperBlip2ForConditionalGeneration.from_pretraining(model, blip2.language_model, image_token_id=IMAGE)
    name = "encoder.layers.0.mlp.fc1.weight"
    assert (
        second.blip2.vision_model.get_parameter(name).data_ptr()
        == model.blip2.vision_model.get_parameter(name).data_ptr()
    )
    assert second.config.blip2.vision_config.num_hidden_layers == 2
    pixels = batch["pixel_values"]
    torch.testing.assert_close(second.eval().radius(pixels), model.eval().encode_image(pixels).radius.mean(1))


@pytest.mark.filterwarnings("ignore:initialised afresh")
def test_checkpoints_are_read_by_dtype(checkpoint):
    _, _, folder = checkpoint
    kinds = (HyperBlip2ForPretraining, HyperBlip2ForConditionalGeneration)
    for kind, ids in zip(kinds, ({"dec_token_id": 99}, {}), strict=True):
        model = kind.from_blip2(str(folder / "blip2"), dtype=torch.bfloat16, device_map="cpu", **ids)
        assert model.blip2.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
        assert model.image_projector.alpha.dtype == torch.float32


WORDS = ["a", "red", "blue", "cat", "dog"]


def processor(first, marked):
    """A `Blip2Processor` over a few words."""
    from transformers import Blip2Processor, BlipImageProcessor

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] if first else ["<unk>", "<pad>", "<s>", "</s>"]
    table = {token: number for number, token in enumerate([*special, *WORDS])} | {"<image>": 98 if first else IMAGE}
    made = Tokenizer(models.WordLevel(table, unk_token=special[3 if first else 0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = (special[1], special[2]) if first else (special[2], None)
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}" if end else f"{start} $A", special_tokens=[(t, table[t]) for t in (start, end) if t]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=special[0 if first else 1], additional_special_tokens=["<image>"]
    )
    pictures = BlipImageProcessor(size={"height": 28, "width": 28})
    return Blip2Processor(pictures, tokenizer, num_query_tokens=8 if marked else None)


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.parametrize("marked", [False, True])
def test_processor_in_stage_1(stage1, marked):
    pictures = [pytest.importorskip("PIL.Image").new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    inputs = processor(True, marked)(images=pictures, text=["a red cat", "a dog"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 5 + 8 * marked
    model = stage1().train()
    expected = processor(True, False)(images=pictures, text=["a red cat", "a dog"], padding=True, return_tensors="pt")
    assert torch.equal(model(**inputs, step=0).loss, model(**expected, step=0).loss)
    assert model.itm_logits(**inputs).shape == (2, 2)
    assert model.encode_text(inputs["input_ids"], inputs["attention_mask"]).radius.shape == (2,)


def test_processor_in_stage_2(stage2):
    pictures = [pytest.importorskip("PIL.Image").new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    made = processor(False, True)
    inputs = made(images=pictures, text=["a red", "a blue"], return_tensors="pt")
    assert (inputs["input_ids"][:, :8] == IMAGE).all()
    assert stage2(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    assert stage2.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape == (2, 13)
    assert stage2.generate(**made(images=pictures, return_tensors="pt"), max_new_tokens=2, min_new_tokens=2).shape == (
        2,
        11,
    )
