"""`hier eval icl` on tiny files in the layouts of the releases, and a tiny random LLaVA."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    LlavaForConditionalGeneration,
)

from app_data.sets.six_tasks import TASKS as SIX
from app_data.store.errors import DataError
from app_eval.ask.models import PLAIN, LocalModel
from app_eval.ask.settings import EvalIcl, TaskName
from app_eval.ask.table import cost as table_cost
from app_eval.ask.table import each_score, table
from app_eval.ask.table.rows import resolved, rows
from app_eval.measure.cells import kept
from app_train.cli import hier
from helpers import releases
from hyper_icl import CalibrationPlan, SegmentMap, calibrate, hierarchy_bias, insert_demos, use_calibrated_attention

pytestmark = pytest.mark.filterwarnings("default")
NAMES = tuple(releases.WALLS)
TASKS = ("vqav2", "okvqa", "coco-caption", "caption-editing", "image-text-matching", "visual-reasoning")


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.make_model().save_pretrained(folder)
    tiny.make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """All six tasks: eight pictures to show, four to ask about; of four colours in turn."""
    return releases.six_tasks(tmp_path_factory.mktemp("release"))


class Eye(nn.Module):
    """Mean colours of a grid, as wide as the real tower."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mixed", torch.randn(48, 1280, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1) @ self.mixed


class Reader(nn.Module):
    """Stands for MiniLM: counts of letters."""

    def forward(self, texts):
        counts = torch.tensor([[float(text.lower().count(chr(97 + i))) for i in range(26)] for text in texts])
        return nn.functional.normalize(counts + 1e-3, dim=-1)


@pytest.fixture(autouse=True)
def encoders(monkeypatch):
    monkeypatch.setattr("app_eval.ask.table.choices.lite0", lambda num_classes: Eye())
    for module in ("table.choices", "select"):
        monkeypatch.setattr(f"app_eval.ask.{module}.MiniLM", Reader)


@pytest.fixture
def quick_lift(monkeypatch):
    """Five steps in place of 150."""
    from app_train.recipes.icl import lift

    own = lift.train_lift
    monkeypatch.setattr(lift, "train_lift", lambda *args, **more: own(*args, **{**more, "steps": 5}))


def evaluate(capsys, model, *args):
    status = hier(["eval", "icl", str(model), *map(str, args)])
    out = capsys.readouterr()
    return status, out.out, [line for line in out.err.splitlines() if line.startswith("error: ")]


def said(chat):
    """What tells a chat from another: its texts and its pictures."""
    parts = [part for message in chat for part in message["content"]]
    return tuple(p["text"] if p["type"] == "text" else np.asarray(p["image"]).tobytes() for p in parts)


SMALL = ("--selectors", "random", "rices", "-k", 2, "--seeds", 2, "--queries", 0, "--pool", 0, "--batch", 3)


def test_six_tasks_stopped_and_gone_on_give_the_same_table(release, model, quick_lift, capsys, tmp_path, monkeypatch):
    args = ["--data", release, *SMALL, "--queries", 3, "--cache-dir", tmp_path / "cache"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    status, text, errors = evaluate(capsys, model, *args, "--out", whole)
    assert status == 0, errors
    result = json.loads((whole / "result.json").read_text())
    assert [group["task"] for group in result["groups"]] == list(TASKS)
    assert [group["num_queries"] for group in result["groups"]] == [3] * 6
    assert (whole / "table.md").read_text() == table(result)
    assert table(result) in text
    for group in result["groups"]:
        assert len(group["rows"]) == 3 + 3 * 2
        assert group["rows"]["rices"]["seeds"] == 1
        assert group["rows"]["random"]["seeds"] == group["rows"]["anchors, Euclidean"]["seeds"] == 2
        assert "against" not in group["rows"]["rices"]
        assert [name for name, row in group["rows"].items() if "twin" in row] == [
            "anchors, curvature 1",
            "rices calibrated, curvature 1",
            "anchors calibrated, curvature 1",
        ]
    # Stopped hard in the twentieth batch, in the middle of a line.
    own, calls, asked = LocalModel.reply, [], []

    def stopping(self, chats, num, bias, adapted):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        weights = [None] * len(chats) if bias is None else [tuple(row.tolist()) for row in bias]
        asked.extend((said(chat), row) for chat, row in zip(chats, weights, strict=True))
        return own(self, chats, num, bias, adapted)

    monkeypatch.setattr(LocalModel, "reply", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(capsys, model, *args, "--out", cut)
    assert len(asked) == len(set(asked))
    torn = max(cut.rglob("answers-*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    torn.write_bytes(torn.read_bytes() + b'{"id": 1, "ans')
    finished = {path: path.stat().st_mtime_ns for path in cut.rglob("scores.safetensors")}
    assert finished
    calls.clear()
    calls += [0] * 100
    assert evaluate(capsys, model, *args, "--out", cut)[0] == 0
    assert (cut / "table.md").read_bytes() == (whole / "table.md").read_bytes()
    assert json.loads((cut / "result.json").read_text()) == result
    # Nothing is answered twice: a finished cell is not touched, and a finished table asks nothing.
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    calls.clear()
    calls += [0] * 100
    assert evaluate(capsys, model, *args, "--out", cut)[0] == 0
    assert len(calls) == 100
    assert len(list(whole.rglob("scores.safetensors"))) == sum(
        r["seeds"] for g in result["groups"] for r in g["rows"].values()
    )
    # Other settings do not mix with these.
    status, _, errors = evaluate(capsys, model, *args, "--out", cut, "--strength", 2)
    assert status == 2
    assert "strength differ" in errors[0]


def test_a_cell_by_hand(release, model, tiny, quick_lift, capsys, tmp_path, monkeypatch):
    out, biases = tmp_path / "out", []
    own = LocalModel.reply

    def noted(self, chats, num, bias, adapted):
        biases.extend([] if bias is None else bias)
        return own(self, chats, num, bias, adapted)

    monkeypatch.setattr(LocalModel, "reply", noted)
    args = [
        "--data",
        release,
        "--tasks",
        "vqav2",
        *SMALL,
        "--cache-dir",
        tmp_path / "cache",
        "--strength",
        5,
        "--against",
        "random",
    ]
    methods = ["--methods", "calibration", "--curvature", 1]
    assert evaluate(capsys, model, *args, *methods, "--out", out)[0] == 0
    assert len(biases) == 2 * 4  # two seeds, four questions
    net = LlavaForConditionalGeneration.from_pretrained(model).eval()
    use_calibrated_attention(net)
    processor = tiny.make_processor()
    pool = {
        100 * 0 + i: (NAMES[i % 4], f"Hue {i % 3}?", release / f"vqav2/train2014/COCO_train2014_{i:012d}.jpg")
        for i in range(8)
    }

    def shown(path):
        # The tiny processor names 16 pixels: pictures are decoded at that size.
        from app_data.read.pictures import load_picture

        return Image.fromarray(load_picture(path, 16))

    changed = []
    for row in ("rices", "random-calibrated-curvature-1"):
        lines = [
            json.loads(line)
            for line in next((out / "vqav2" / row / "k-2" / "seed-0").glob("*.jsonl")).read_text().splitlines()
        ]
        for i, line in enumerate(lines):
            assert line["id"] == 100 + i
            demos = [pool[j] for j in line["demos"]]
            text = "<s>Be brief." + "".join(f"u:<image>{q}</s>a:{colour}</s>" for colour, q, _ in demos)
            whole = f"{text}u:<image>Hue {i % 3}?</s>a:"
            pictures = [shown(path) for *_, path in demos]
            pictures.append(shown(release / f"vqav2/val2014/COCO_val2014_{100 + i:012d}.jpg"))
            inputs = processor(images=pictures, text=whole, return_tensors="pt", add_special_tokens=False)
            start = inputs["input_ids"].shape[1]

            def greedy(plan=None, inputs=inputs, start=start):
                ids = inputs["input_ids"]
                for _ in range(5):
                    more = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
                    with torch.no_grad():
                        if plan is None:
                            logits = net(**more, use_cache=False).logits
                        else:
                            with calibrate(net, CalibrationPlan(plan[0], plan[1](ids.shape[1] - start))):
                                logits = net(**more, use_cache=False).logits
                    ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
                return processor.decode(ids[0, start:], skip_special_tokens=True).strip()

            plain = greedy()
            if row == "rices":
                assert line["answer"] == plain
                continue
            # The weights are recomputed from features of the files.
            bias = _bias(release, demos, i)
            torch.testing.assert_close(biases[i], bias[0], atol=1e-4, rtol=1e-4)
            head = len("<s>Be brief.") - 2
            lengths = [len(f"u:q{q}</s>a:{colour}</s>") - 1 - 2 * 3 + 4 for colour, q, _ in demos]

            def segments(more, start=start, lengths=lengths, head=head):
                return SegmentMap.from_lengths([head], [lengths], [start + more - head - sum(lengths)])

            assert line["answer"] == greedy((bias, segments))
            changed.append(line["answer"] != plain)
    assert any(changed)
    scores = kept(out / "vqav2" / "random" / "k-2" / "seed-0")["all"]
    assert set(scores) == {"vqa", "vote"}
    colours = [
        json.loads(line)["demos"]
        for line in next((out / "vqav2/random/k-2/seed-0").glob("*.jsonl")).read_text().splitlines()
    ]
    for i, ids in enumerate(colours):
        said = [pool[j][0] for j in ids]
        # Seven of ten say the colour. Of two different answers the better demonstration's counts, the first of random ones.
        wanted = {1.0} if said[0] == said[1] == NAMES[i % 4] else {0.0, 1.0} if NAMES[i % 4] in said else {0.0}
        assert scores["vote"][i] in wanted


def _bias(release, demos, i):
    """The weights of two demonstrations of a question: distances of lifted pictures and questions, at curvature 1."""
    from app_data.read.pictures import load_picture
    from app_data.weights.lite0_minilm import lite0_preprocess
    from app_train.recipes.icl.lift import train_lift

    def seen(path):
        pixels = torch.from_numpy(load_picture(path, 16).copy()).permute(2, 0, 1)[None]
        ready = nn.functional.interpolate(lite0_preprocess(pixels), (128, 128), mode="bilinear", antialias=True)
        return Eye()(ready)[0]

    train = [release / f"vqav2/train2014/COCO_train2014_{j:012d}.jpg" for j in range(8)]
    pool = torch.stack([seen(path) for path in train])
    query = seen(release / f"vqav2/val2014/COCO_val2014_{100 + i:012d}.jpg")[None]
    texts = Reader()([f"Hue {j % 3}?" for j in range(8)])
    asked = Reader()([f"Hue {i % 3}?"])
    norm = nn.functional.normalize
    joint = torch.cat([norm(pool - pool.mean(0)), norm(texts - texts.mean(0))], -1)
    own = torch.cat([norm(query - pool.mean(0)), norm(asked - texts.mean(0))], -1)
    classes = torch.tensor([sorted(NAMES).index(NAMES[j % 4]) for j in range(8)])
    lift = train_lift(norm(joint - joint.mean(0)), classes, c=1.0, seed=0, steps=5)
    at = [train.index(path) for *_, path in demos]
    with torch.no_grad():
        tangents = lift(norm(joint - joint.mean(0)))[at]
        return hierarchy_bias(lift(norm(own - joint.mean(0))), tangents[None], 1.0, lam=5.0)


def cider_by_hand(references, answers):
    """CIDEr-D times 1, straight from its definition, for captions of plain words."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    num = len(references)
    df = Counter(g for refs in references for g in {g for r in refs for n in range(1, 5) for g in grams(r, n)})
    found = []
    for refs, answer in zip(references, answers, strict=True):
        total = 0.0
        for ref in refs:
            for n in range(1, 5):
                weigh = lambda c: {g: k * (math.log(num) - math.log(max(1, df[g]))) for g, k in c.items()}  # noqa: E731
                h, r = weigh(grams(answer, n)), weigh(grams(ref, n))
                norm = math.sqrt(sum(v * v for v in h.values()) * sum(v * v for v in r.values()))
                if norm:
                    delta = max(0, len(answer.split()) - 1) - max(0, len(ref.split()) - 1)
                    common = sum(min(v, r.get(g, 0.0)) * r.get(g, 0.0) for g, v in h.items())
                    total += common / norm * math.exp(-(delta**2) / 72) / 4
        found.append(10 * total / len(refs))
    return found


def test_scores_are_those_of_an_independent_oracle(release, model, quick_lift, capsys, tmp_path, monkeypatch):
    """The model's words are set: right, half right, and wrong ones in turn; every score is recomputed from the files."""
    said = {
        "vqav2": ["red.\nQuestion: x", "dark", "two", "black"],
        "coco-caption": ["a red wall in the sun", "one green wall", 'a "blue" wall Output: b', "nothing at all"],
        "visual-reasoning": ["No, they are not", "Yes.", "yes yes", "Yes"],
    }
    script = []
    monkeypatch.setattr(LocalModel, "reply", lambda self, chats, *rest: [script.pop(0) for _ in chats])
    wanted = {
        # Leaving each of ten people out in turn: min(1, matches / 3).
        "vqav2": [np.mean([min(1, (m - own) / 3) for own in [1] * m + [0] * (10 - m)]) for m in (7, 2, 1, 0)],
        "coco-caption": cider_by_hand(
            [[f"a {c} wall in the sun", f"one {c} wall"] for c in NAMES],
            ["a red wall in the sun", "one green wall", "a blue wall", "nothing at all"],
        ),
        "visual-reasoning": [1.0, 1.0, 0.0, 1.0],
    }
    for task, words in said.items():
        script[:] = words * 10
        out = tmp_path / task
        args = ["--data", release, "--tasks", task, "--selectors", "rices", "--methods", "--seeds", 1, "-k", 2]
        status, _, errors = evaluate(
            capsys, model, *args, "--queries", 0, "--pool", 0, "--out", out, "--cache-dir", tmp_path / "cache"
        )
        assert status == 0, errors
        group = json.loads((out / "result.json").read_text())["groups"][0]
        scores = kept(out / task / "rices" / "k-2" / "seed-0")["all"][group["score"]]
        np.testing.assert_allclose(scores, wanted[task], atol=1e-6)
        assert group["rows"]["rices"][group["score"]]["mean"][0] == pytest.approx(np.mean(wanted[task]), abs=1e-6)


def test_no_pictures_means_two_answers_and_the_question(release, model, capsys, tmp_path, monkeypatch):
    seen = []
    own = LocalModel.reply
    monkeypatch.setattr(LocalModel, "reply", lambda self, chats, *rest: seen.extend(chats) or own(self, chats, *rest))
    args = [
        "--data",
        f"vqav2:{release / 'vqav2'}",
        "--tasks",
        "vqav2",
        "--selectors",
        "rices",
        "--methods",
        "--seeds",
        1,
        "-k",
        2,
    ]
    assert evaluate(capsys, model, *args, "--out", tmp_path / "o", "--cache-dir", tmp_path / "cache")[0] == 0
    bare, full = seen[0], seen[-1]
    kinds = [[part["type"] for part in message["content"]] for message in bare]
    assert kinds == [["text"], ["text"]] * 2 + [["image", "text"]]
    assert [[part["type"] for part in message["content"]] for message in full][::2] == [["image", "text"]] * 3


def test_no_picture_answers_for_itself(release, model, capsys, tmp_path):
    """Matching has one part: both captions of a picture are items of it."""
    args = [
        "--data",
        release,
        "--tasks",
        "image-text-matching",
        "--selectors",
        "rices",
        "random",
        "--seeds",
        1,
        "-k",
        3,
    ]
    out = tmp_path / "o"
    assert (
        evaluate(capsys, model, *args, "--methods", "--queries", 5, "--pool", 0, "--out", out, "--cache-dir", tmp_path)[
            0
        ]
        == 0
    )
    lines = [json.loads(line) for path in out.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 3 * 5
    for line in lines:
        assert line["id"].rsplit("-", 1)[0] not in [demo.rsplit("-", 1)[0] for demo in line["demos"]]


def test_bad_input_is_one_sentence(release, model, capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("x")
    withheld = tmp_path / "withheld"
    for path in (release / "okvqa").rglob("*"):
        if path.is_file():
            target = withheld / "okvqa" / path.relative_to(release / "okvqa")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    notes = withheld / "okvqa" / "mscoco_val2014_annotations.json"
    content = json.loads(notes.read_text())
    content["annotations"][1]["answers"] = []
    notes.write_text(json.dumps(content))
    good = {"--data": [release], "--tasks": ["okvqa"], "--out": [tmp_path / "out"], "--cache-dir": [tmp_path / "cache"]}
    for changed, word in (
        ({"--data": [tmp_path / "none"]}, "does not exist; it is to hold OpenEnded_mscoco"),
        ({"--data": [f"vqav2:{release}"]}, "no folder for okvqa"),
        ({"--data": []}, "no folder for okvqa"),
        ({"--data": [empty]}, "does not exist"),
        ({"--data": [withheld]}, "has no answer to compare with"),
        ({"--out": [file]}, "is a file"),
        ({"--out": None}, "--out is missing"),
        ({"--seeds": [0]}, "at least 1"),
        ({"--queries": [1]}, "at least 2"),
        ({"-k": [0]}, "at least 1"),
        ({"-k": [1]}, "--methods anchors"),
        ({"-k": [9], "--methods": []}, "at most 8"),
        ({"-k": [2, 2]}, "none twice"),
        ({"--curvature": [-1]}, "at least 0"),
        ({"--against": ["mmices"]}, "one of --selectors"),
        ({"--adapter": [empty]}, "complete saved adapter"),
        ({"--tasks": ["horses"]}, "horses"),
        ({"--preset": ["large"]}, "large"),
    ):
        settings = {**good, **changed}
        args = [x for key, values in settings.items() if values is not None for x in (key, *values)]
        status, _, errors = evaluate(capsys, model, *args)
        assert status == 2, word
        assert len(errors) == 1
        assert word in errors[0], errors
    status, _, errors = evaluate(capsys, tmp_path / "nowhere", "--data", release, "--out", tmp_path / "out")
    assert status == 2
    assert "nowhere does not exist" in errors[0]


def test_plan_counts(model, tiny, capsys):
    args = ["--tasks", "vqav2", "--selectors", "rices", "--methods", "anchors", "--curvature", 1, "--seeds", 2]
    args += ["--tflops", 1]
    status, text, errors = evaluate(capsys, model, *args, "-k", 4, "--queries", 100, "--plan")
    assert status == 0, errors
    net = tiny.make_model()
    vision = sum(p.numel() for n, p in net.named_parameters() if "vision" in n)
    rest = sum(p.numel() for p in net.parameters()) - vision
    cost = table_cost.cost_of(str(model))
    assert (cost.text, cost.vision, cost.picture, cost.patches) == (rest, vision, 4, 4)
    # Four demonstrations and a question of 24 tokens and a picture of 4 each, and five new ones.
    tokens = 5 * 24 + 5 * 4 + 5
    operations = 2 * rest * tokens + 2 * 2 * 32 * tokens**2 + 2 * vision * 4 * 5
    assert cost.operations(tokens - 5, 5, 5) == operations
    assert f"| VQAv2 | rices | 4 | 1 | 100 | 140 | 0.0 | {100 * operations / 3.6e15:.2g} |" in text
    assert "3 rows, 4 cells with their seeds" in text
    assert "not measured" in text


def test_every_task_has_its_name_and_its_size():
    assert get_args(TaskName) == tuple(SIX) == TASKS
    assert set(table_cost._QUESTIONS) == set(TASKS)


def test_presets(capsys):
    config = resolved(EvalIcl("HuggingFaceM4/idefics-9b", preset="note"))
    own = [row for row in rows(config) if row.select]
    assert len(own) * len(config.tasks) * len(config.k) == 24
    status, text, _ = evaluate(capsys, "HuggingFaceM4/idefics-9b", "--preset", "note", "--plan")
    assert status == 0
    assert "8.93 billion" in text
    assert "Otter-9B, which is not in transformers" in text
    config = resolved(EvalIcl("HuggingFaceM4/idefics2-8b-base", preset="published", k=(8,), adapter=Path("a")))
    assert [row.name for row in rows(config)] == ["no pictures shown", "adapter, no demonstrations", "random", "rices"]
    assert (config.queries, config.k, config.tasks) == (10_000, (8,), TASKS[:3])
    with pytest.raises(DataError, match="not here"):
        table_cost.cost_of("nobody/nothing")


def test_idefics_reads_pictures_where_they_stand(tiny, tmp_path):
    """Its first processor puts pictures that are given apart behind the text."""
    tokenizer = tiny.make_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>"]})
    folder = tmp_path / "idefics"
    IdeficsProcessor(IdeficsImageProcessorPil(image_size=16), tokenizer, image_size=16).save_pretrained(folder)
    config = IdeficsConfig(
        vocab_size=260, additional_vocab_size=1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, cross_layer_interval=1, use_resampler=False, alpha_initializer="ones", pad_token_id=0,
        vision_config={"embed_dim": 32, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "intermediate_size": 64},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = IdeficsForVisionText2Text(config)
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim > 1:
                value.mul_(4)
    net.save_pretrained(folder)
    with pytest.raises(DataError, match="no chat template"):
        LocalModel(str(folder))
    model = LocalModel(str(folder), calibrated=True, plain=True)
    assert model.processor.own.chat_template == PLAIN

    def asked(colour, text):
        return [
            {"type": "image", "image": Image.new("RGB", (16, 16), releases.WALLS[colour])},
            {"type": "text", "text": text},
        ]

    chats = [
        insert_demos([{"role": "user", "content": asked("blue", f"Hue{'?' * n}")}],
                     [(asked(*one), [{"type": "text", "text": a}]) for one, a in ((("red", "What?"), "red"), (("green", "How?"), "no"))])
        for n in (1, 3)
    ]  # fmt: skip
    inputs = model.inputs(chats)
    mark = "<fake_token_around_image><image><fake_token_around_image>"
    text = model.processor.own.tokenizer.decode(inputs["input_ids"][0]).replace("<pad>", "")
    assert (
        text == f"<s>{mark}Question: What? Answer: red\n{mark}Question: How? Answer: no\n{mark}Question: Hue? Answer:"
    )
    assert inputs["pixel_values"].shape[:2] == (2, 3)
    segments = SegmentMap.from_chats(model.processor, chats, inputs)
    said = [model.processor.own.tokenizer.decode(inputs["input_ids"][1][segments.ids[1] == s]) for s in (0, 1, 2)]
    assert said == [
        f"{'' if segments.ids[1][0] == -1 else '<s>'}{mark}Question: What? Answer: red\n",
        f"{mark}Question: How? Answer: no\n",
        f"{mark}Question: Hue??? Answer:",
    ]
    plain, tilted = (model.reply(chats, 4, bias) for bias in (None, torch.tensor([[3.0, -3.0]] * 2)))
    assert len(plain) == len(tilted) == 2
    assert plain == [model.reply([one], 4)[0] for one in chats]
    # Demonstrations are read: without them the answers are others.
    assert plain != model.reply([one[-1:] for one in chats], 4) or plain != tilted


def test_cuts():
    from app_data.sets.demonstration_tasks import IclTask

    store = np.zeros((2, 4, 4, 3), np.uint8)
    made = IclTask("t", "exact", store, ((0,), (1,)), ("a", "b"), ("yes", "no"), (("yes",), ("no",)), (0, 1), (0, 1))
    assert each_score(made, ["Yes, it does", "no\nyes"]).tolist() == [1.0, 1.0]
    assert each_score(made, ["", " NO. "]).tolist() == [0.0, 1.0]
