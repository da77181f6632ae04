"""`hier answer` on a tiny random LLaVA, and on a server that notes what it is sent."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlavaForConditionalGeneration

from app_eval.ask.models import LocalModel
from app_eval.ask.pool import PoolItem, encode_pictures, encode_pool, picture_encoder, read_items
from app_eval.ask.select import choose
from app_eval.ask.settings import Choosing
from app_train.cli import hier
from app_train.recipes.icl.lift import train_lift
from hyper_icl import SegmentMap, hierarchy_bias, insert_demos

pytestmark = pytest.mark.filterwarnings("default")


class Eye(nn.Module):
    """Mean colours of a grid, as wide as the real tower."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mixed", torch.randn(48, 1280, generator=torch.Generator().manual_seed(0)))
        self.calls = 0

    def forward(self, pixels):
        self.calls += len(pixels)
        return nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1) @ self.mixed


@pytest.fixture
def eye(monkeypatch):
    """Stands for EfficientNet-Lite0, and counts the pictures it sees."""
    made = Eye()
    monkeypatch.setattr("app_eval.ask.pool.lite0", lambda num_classes: made)
    return made


@pytest.fixture(scope="module")
def pool(tiny, tmp_path_factory):
    """What the script writes: three colours with three pictures each, as folders and as JSON lines, and a model."""
    root = tmp_path_factory.mktemp("pool")
    tiny.main(root)
    return root


@pytest.fixture(scope="module")
def model(pool):
    return pool / "model"


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny.make_processor()


def answer(capsys, tmp_path, *args):
    status = hier(["answer", "--cache-dir", str(tmp_path / "cache"), *map(str, args)])
    out = capsys.readouterr()
    return status, [json.loads(line) for line in out.out.splitlines()], out.err


def test_answers_twice_without_encoding_again(eye, pool, model, capsys, tmp_path):
    args = ["--pool", pool / "pool.jsonl", "--image", pool / "red.png", pool / "blue.png", "--question", "Which color?"]
    args += ["--model", model, "-k", 2, "--max-new-tokens", 5]
    status, rows, err = answer(capsys, tmp_path, *args)
    assert status == 0, err
    assert [Path(row["image"]).stem for row in rows] == ["red", "blue"]
    for row, colour in zip(rows, ("red", "blue"), strict=True):
        assert set(row) == {"image", "question", "answer", "demos", "model", "method", "calibrated"}
        assert [demo["answer"] for demo in row["demos"]] == [colour] * 2
        assert (row["question"], row["method"], row["calibrated"]) == ("Which color?", "hyperbolic", False)
        # Five new bytes at most: the prompt is not part of the answer.
        assert 0 < len(row["answer"].encode()) <= 15
        assert "Be brief" not in row["answer"]
    assert eye.calls == 9 + 2
    assert answer(capsys, tmp_path, *args)[1] == rows
    assert eye.calls == 9 + 2 + 2
    # A changed picture is encoded again.
    again = pool / "pictures" / "green" / "0.png"
    again.write_bytes((pool / "pictures" / "green" / "1.png").read_bytes())
    answer(capsys, tmp_path, *args)
    assert eye.calls == 9 + 2 + 2 + 9 + 2


def test_answer_is_greedy_generation_from_the_processors_prompt(eye, pool, model, processor, capsys, tmp_path):
    args = [
        "--pool",
        pool / "pool.jsonl",
        "--image",
        pool / "red.png",
        "--question",
        "What?",
        "--model",
        model,
        "-k",
        2,
    ]
    row = answer(capsys, tmp_path, *args, "--method", "rices", "--max-new-tokens", 6)[1][0]
    shown = [(demo["path"], f"Color {Path(demo['path']).stem}?", demo["answer"]) for demo in row["demos"]]
    text = "<s>Be brief." + "".join(f"u:<image>{q}</s>a:{a}</s>" for _, q, a in shown) + "u:<image>What?</s>a:"
    pictures = [Image.open(path) for path in (*(path for path, *_ in shown), pool / "red.png")]
    inputs = processor(images=pictures, text=text, return_tensors="pt", add_special_tokens=False)
    net = LlavaForConditionalGeneration.from_pretrained(model).eval()
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            logits = net(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    wanted = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert row["answer"] == wanted.strip()


@pytest.mark.parametrize("side", ["left", "right"])
def test_segments_of_chats_say_the_text_of_each_turn(processor, pool, side):
    def asked(text):
        return [{"type": "image", "image": Image.open(pool / "red.png")}, {"type": "text", "text": text}]

    shown = [[("one", "1"), ("two2", "22")], [("three", "3")]]
    chats = [
        insert_demos([{"role": "user", "content": asked("last")}],
                     [(asked(q), [{"type": "text", "text": a}]) for q, a in demos])
        for demos in shown
    ]  # fmt: skip
    settings = {"padding": True, "padding_side": side}
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    )
    found = SegmentMap.from_chats(processor, chats, inputs)
    assert found.num_demos == 2
    for row, demos in enumerate(shown):
        texts = [processor.tokenizer.decode(inputs["input_ids"][row][found.ids[row] == s]) for s in (-1, 0, 1, 2)]
        pictures = "<image>" * 4
        wanted = [f"u:{pictures}{q}</s>a:{a}</s>" for q, a in demos]
        assert texts[0].replace("<pad>", "") == "<s>Be brief."
        assert texts[1:] == [*wanted, *[""] * (2 - len(demos)), f"u:{pictures}last</s>a:"]
    with pytest.raises(ValueError, match="turns of user and assistant"):
        SegmentMap.from_chats(processor, [chats[0][:-1]], inputs)


def test_calibration_changes_the_logits_and_is_that_of_hyper_icl(eye, pool, model, capsys, tmp_path):
    args = [
        "--pool",
        pool / "pool.jsonl",
        "--image",
        pool / "red.png",
        "--question",
        "What?",
        "--model",
        model,
        "-k",
        3,
    ]
    seen = {"plain": [], "calibrated": []}

    class Watched(LocalModel):
        """Notes the bias of each answer, and the logits of each step."""

        def __init__(self, name, calibrated):
            super().__init__(name, calibrated)
            self.steps = seen["calibrated" if calibrated else "plain"]
            self.model.lm_head.register_forward_hook(lambda module, args, out: self.steps.append(out[:, -1]))

        def answer(self, *args):
            self.steps.append(args[4])
            return super().answer(*args)

    for more in ([], ["--calibrate"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app_eval.ask.answer.LocalModel", Watched)
            status, rows, err = answer(capsys, tmp_path, *args, *more, "--method", "topk", "--max-new-tokens", 3)
        assert status == 0, err
        assert rows[0]["calibrated"] == bool(more)
    assert seen["plain"][0] is None
    assert len(seen["plain"]) == len(seen["calibrated"]) == 4
    assert float((seen["plain"][1] - seen["calibrated"][1]).abs().max()) > 1e-4
    request, found, _ = choose(
        read_items(pool / "pool.jsonl"), [pool / "red.png"], ["What?"], train_lift,
        Choosing(k=3, method="topk", cache_dir=tmp_path / "cache"),
    )  # fmt: skip
    bank, query, trained = request.lifted
    assert trained
    torch.testing.assert_close(seen["calibrated"][0], hierarchy_bias(query, bank.tangent[found.ids], bank.c)[0])


def test_folder_batch_and_out(eye, pool, model, capsys, tmp_path):
    batch, out = pool / "questions.jsonl", tmp_path / "new" / "answers.jsonl"
    batch.write_text('{"image": "red.png", "question": "Hue?"}\n\n{"image": "blue.png", "question": "Tint?"}\n')
    asked = []

    class Noted(LocalModel):
        def answer(self, demos, *args):
            asked.append([demo.question for demo in demos])
            return super().answer(demos, *args)

    args = ["--pool", pool / "pictures", "--batch", batch, "--model", model, "-k", 2, "--max-new-tokens", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app_eval.ask.answer.LocalModel", Noted)
        status, printed, err = answer(capsys, tmp_path, *args, "--out", out)
    assert status == 0, err
    assert printed == []
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(Path(row["image"]).name, row["question"]) for row in rows] == [("red.png", "Hue?"), ("blue.png", "Tint?")]
    # Folders hold no questions: demonstrations are asked what is asked.
    assert asked == [["Hue?"] * 2, ["Tint?"] * 2]


@pytest.fixture
def server(monkeypatch):
    """Where a server listens, what it got, and what it says next."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    got, reply = [], {"choices": [{"index": 0, "message": {"role": "assistant", "content": " red "}}]}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(
                (self.path, dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )
            said = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *args):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", got, reply
    listening.shutdown()
    listening.server_close()
    thread.join()


def test_server_gets_pictures_and_turns(eye, pool, server, capsys, tmp_path):
    url, got, reply = server
    args = ["--pool", pool / "pool.jsonl", "--image", pool / "green.png", "--question", "Which?", "-k", 2]
    status, rows, err = answer(capsys, tmp_path, *args, "--model", f"{url}#tiny", "--max-new-tokens", 7)
    assert status == 0, err
    assert rows[0]["answer"] == "red"
    path, headers, sent = got[0]
    assert path == "/v1/chat/completions"
    assert "hf_secret" not in str(headers)
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("tiny", 7, 0.0)
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant"] * 2 + ["user"]
    files = [*(demo["path"] for demo in rows[0]["demos"]), pool / "green.png"]
    questions = [*(f"Color {Path(demo['path']).stem}?" for demo in rows[0]["demos"]), "Which?"]
    for message, file, question in zip(sent["messages"][::2], files, questions, strict=True):
        picture, text = message["content"]
        assert text == {"type": "text", "text": question}
        head, _, data = picture["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        sent_pixels, own = (
            np.asarray(Image.open(x).convert("RGB"), float) for x in (io.BytesIO(base64.b64decode(data)), file)
        )
        assert np.abs(sent_pixels - own).mean() < 4
    assert [m["content"] for m in sent["messages"][1::2]] == [[{"type": "text", "text": "green"}]] * 2
    # A server that does not speak as OpenAI's, and calibration that no server offers.
    reply.clear()
    reply["choices"] = []
    for more, word in ((["--model", url], "gives no answer"), (["--model", url, "--calibrate"], "inside the model")):
        status, rows, err = answer(capsys, tmp_path, *args, *more)
        assert status == 2
        assert word in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert got[1][2]["model"] == "dummy"


def test_no_picture_from_elsewhere_goes_to_a_server(eye, pool, server, capsys, tmp_path):
    url, got, _ = server
    far = tmp_path / "far"
    far.mkdir()
    rows = [json.loads(line) for line in (pool / "pool.jsonl").read_text().splitlines() if line.strip()]
    own = [{**row, "image": str(pool / row["image"])} for row in rows]
    (far / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (far / "asked.jsonl").write_text(json.dumps({"image": "../red.png", "question": "What?"}) + "\n")
    one = ["--image", pool / "red.png", "--question", "What?"]
    for args in (
        ["--pool", far / "pool.jsonl", *one],
        ["--pool", pool / "pool.jsonl", "--batch", far / "asked.jsonl"],
    ):
        status, _, err = answer(capsys, tmp_path, *args, "--model", url, "-k", 2)
        assert status == 2
        assert "does not lie in" in err
        assert "--outside" in err
    assert not got
    args = ["--pool", far / "pool.jsonl", *one, "--model", url, "-k", 2, "--outside"]
    assert answer(capsys, tmp_path, *args)[0] == 0
    assert got


def test_errors_are_one_sentence(eye, pool, model, tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    silent = tmp_path / "silent"
    tiny.make_model().save_pretrained(silent)
    tiny.make_processor(template=None).save_pretrained(silent)
    files = {
        "no_question": {"image": "red.png", "answer": "red"},
        "no_answer": {"image": "red.png", "question": "x"},
        "no_image": {"question": "x"},
    }
    for name, row in files.items():
        (pool / f"{name}.jsonl").write_text("\n" + json.dumps(row))
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes((pool / "red.png").read_bytes())
    given = {"--pool": pool / "pool.jsonl", "--image": pool / "red.png", "--question": "Q?", "--model": model}
    for changed, word in (
        ({"--model": tmp_path / "nowhere"}, "nowhere does not exist"),
        ({"--model": pool}, "cannot be loaded"),
        ({"--model": silent}, "no chat template"),
        ({"--model": "http://127.0.0.1:9/v1"}, "gives no answer"),
        ({"--pool": pool / "no_question.jsonl"}, "has no question"),
        ({"--pool": pool / "no_answer.jsonl"}, "has no answer"),
        ({"--pool": flat}, "folders named after their answers"),
        ({"--pool": tmp_path / "none"}, "does not exist"),
        ({"-k": 10}, "at most 9"),
        ({"-k": 1, "--calibrate": None}, "at least 2"),
        ({"--max-new-tokens": 0}, "at least 1"),
        ({"--question": ""}, "--batch"),
        ({"--batch": pool / "no_image.jsonl"}, "leave out"),
        ({"--image": tmp_path / "none.png"}, "cannot be used"),
    ):
        pairs = {**given, **changed}
        args = [word for key, value in pairs.items() for word in ((key,) if value is None else (key, value))]
        status, rows, err = answer(capsys, tmp_path, *args)
        assert (status, rows) == (2, []), word
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert word in said[0]
    for name, field in (("no_image", "image"), ("no_question", "question")):
        args = ["--pool", given["--pool"], "--model", model, "--batch", pool / f"{name}.jsonl"]
        status, _, err = answer(capsys, tmp_path, *args)
        assert status == 2
        assert f"line 2 of {pool / name}.jsonl must have the field {field}" in err


def test_pictures_that_cannot_be_read_keep_their_neighbours_features(eye, pool, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    names = ["red.png", tmp_path / "bad.png", "blue.png"]
    items = [PoolItem(pool / name, "q", "a") for name in names]
    for _ in range(2):
        found = encode_pool(items, picture_encoder(eye), tmp_path / "cache")
        assert [item.path.name for item in found.items] == ["red.png", "blue.png"]
        assert [skipped.path for skipped in found.skipped] == [str(tmp_path / "bad.png")]
        torch.testing.assert_close(
            found.features, encode_pictures([pool / "red.png", pool / "blue.png"], picture_encoder(eye))[0]
        )
