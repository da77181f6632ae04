"""The published adapter's recipe on tiny random models: plumbing, not results."""

import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from app_data.read.labelled import Decoding
from app_data.sets.demonstration_tasks import IclTask
from app_data.sets.six_tasks import TASKS
from app_data.store.errors import DataError
from app_eval.ask.models import LocalModel
from app_train.cli import hier
from app_train.cli import main as train
from app_train.core.errors import Interrupted, NonFiniteGradient
from app_train.core.interrupt import StopFlag
from app_train.recipes.icl.adapter import Example, Instances, train_adapter
from app_train.recipes.icl.settings import IclAdapterConfig
from helpers import releases
from helpers.stops import terminated_in_step

ROOT = Path(__file__).parents[5]


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("icl_recipe_families", ROOT / "packages/hyper-icl/tests/_families.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def examples(families, name, num):
    """Queries of one picture; the teacher sees two demonstrations before the same query."""
    found = []
    for i in range(num):
        long = families.make_prompt(name, batch=1, seed=i)
        short = families.make_prompt(name, batch=1, seed=i, text=(4,))
        tail = families.image_tokens(name) + 4
        short.inputs["input_ids"][:, -tail:] = long.inputs["input_ids"][:, -tail:]
        short.inputs["pixel_values"] = long.inputs["pixel_values"][:, -1:]
        found.append(Example(short.inputs, long.inputs, 2))
    return found


def settings(**more):
    return IclAdapterConfig(data=Path("nowhere"), **more)


@pytest.mark.parametrize("name", ["idefics1", "idefics2"])
def test_trains_on_tiny_models(families, name):
    config = settings()
    assert (config.shots, config.rank, config.c, config.ce, config.lr, config.num_instances) == (
        8,
        4,
        0.1,
        0.5,
        5e-3,
        1000,
    )
    config = config.model_copy(update={"epochs": 4, "batch_size": 3, "normalize": "d"})
    model = families.make_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter, best = train_adapter(model, examples(families, name, 8), config)
    records = best.history
    assert [r["epoch"] for r in records] == [0, 1, 2, 3]
    assert records[-1]["anchor"] + 0.5 * records[-1]["ce"] < records[0]["anchor"] + 0.5 * records[0]["ce"]
    assert best.record == min(records, key=lambda r: r["held_out_anchor"] + 0.5 * r["held_out_ce"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert adapter.u_k.abs().max() > 0
    again, _ = train_adapter(model, examples(families, name, 8), config)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("number", [1, 3])
def test_stopped_and_resumed_is_bit_identical(families, tmp_path, number):
    """Two steps an epoch: stopped within the first, and within the second, when the checkpoint keeps the weights of the best."""
    config = settings(epochs=3, batch_size=4, normalize="d", tensorboard=False)
    model = families.make_model("idefics2")
    whole, best = train_adapter(model, examples(families, "idefics2", 8), config, tmp_path / "whole")
    with StopFlag() as stop, terminated_in_step(number), pytest.raises(Interrupted):
        train_adapter(model, examples(families, "idefics2", 8), config, tmp_path / "cut", stop)
    cut, again = train_adapter(model, examples(families, "idefics2", 8), config, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    assert again.history == best.history


def test_bad_training(families):
    model = families.make_model("idefics2")
    some = examples(families, "idefics2", 3)
    with pytest.raises(DataError, match="two instances"):
        train_adapter(model, some[:1], settings())
    some[0].student["pixel_values"][:] = torch.nan
    with pytest.raises(NonFiniteGradient, match="epoch 0"):
        train_adapter(model, some, settings(epochs=1, batch_size=1))


def task(num=12, score="vqa"):
    store = np.zeros((num // 2, 16, 16, 3), dtype=np.uint8)
    store[:] = 20 * np.arange(num // 2)[:, None, None, None]
    rows = tuple((i // 2,) for i in range(num))
    answers = tuple(f"a{i}" for i in range(num))
    groups = tuple(row[0] for row in rows)
    return IclTask(
        "t", score, store, rows, ("q",) * num, answers, tuple((a,) for a in answers), groups, tuple(range(num))
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The script of the guide: a LLaVA over bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs" / "hyper-icl")
        script = import_module("tiny_model")
    folder = tmp_path_factory.mktemp("tiny")
    script.main(folder)
    return folder / "model"


@pytest.mark.parametrize("score", ["vqa", "exact"])
def test_instances(tiny, score):
    model = LocalModel(str(tiny))
    found = Instances(task(score=score), model, settings(shots=3, num_instances=5))
    assert len(found) == 5
    say = model.processor.tokenizer.decode
    for one in (found[i] for i in range(5)):
        student, teacher = one.student["input_ids"][0], one.teacher["input_ids"][0]
        own = say(student).replace("<image>", "")
        answer = own.removeprefix("<s>Be brief.u:q</s>a:").removesuffix("</s>")
        assert answer in {f"a{i}" for i in range(12)}
        assert say(student[-one.num_answer :]) == f"{answer}</s>"
        shown = say(teacher).replace("<image>", "")
        assert shown.count("u:q</s>a:") == 4
        assert shown.endswith(own.removeprefix("<s>Be brief."))
        # The pictures of the demonstrations are others than the query's.
        assert len(one.teacher["pixel_values"]) == 4
        assert torch.equal(one.teacher["pixel_values"][-1], one.student["pixel_values"][0])
        assert not any(torch.equal(x, one.student["pixel_values"][0]) for x in one.teacher["pixel_values"][:-1])
    with pytest.raises(DataError, match="too small"):
        Instances(task(4), model, settings(shots=3))


def test_recipe_and_its_row_in_the_table(tiny, tmp_path, capsys, monkeypatch):
    data = releases.six_tasks(tmp_path / "data") / "vqav2"
    out = tmp_path / "run"
    quick = [
        "--shots",
        "2",
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--normalize",
        "d",
        "--lr",
        "0.05",
        "--no-tensorboard",
    ]
    places = ["--data", str(data), "--cache-dir", str(tmp_path / "cache")]
    argv = ["icl-adapter", "--model", str(tiny), *places, "--out", str(out), *quick]
    assert train(argv) == 0
    result = json.loads((out / "result.json").read_text())
    assert [row["epoch"] for row in result["epochs"]] == [0, 1]
    assert result["best"] in result["epochs"]
    assert f"--adapter {out}" in capsys.readouterr().out
    assert train(argv) == 0
    monkeypatch.setattr(
        "app_eval.ask.table.choices.lite0",
        lambda num: torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()),
    )
    monkeypatch.setattr("app_eval.ask.table.choices.MiniLM", lambda: lambda texts: torch.ones(len(texts), 2))
    table = [
        "eval",
        "icl",
        str(tiny),
        "--data",
        f"vqav2:{data}",
        *places[2:],
        "--tasks",
        "vqav2",
        "--selectors",
        "rices",
    ]
    table += [
        "--methods",
        "--seeds",
        "1",
        "-k",
        "2",
        "--queries",
        "0",
        "--out",
        str(tmp_path / "table"),
        "--adapter",
        str(out),
    ]
    assert hier(table) == 0
    rows = json.loads((tmp_path / "table" / "result.json").read_text())["groups"][0]["rows"]
    assert list(rows) == ["no pictures shown", "adapter, no demonstrations", "rices"]
    # The row is the model with the adapter at work, on the question alone.
    lines = next((tmp_path / "table" / "vqav2" / "adapter-no-demonstrations").rglob("*.jsonl")).read_text().splitlines()
    model = LocalModel(str(tiny), adapter=out)
    queries = TASKS["vqav2"].load(data, "val", Decoding(16, cache_dir=tmp_path / "cache"), None)
    chats = [[{"role": "user", "content": queries.content(i)}] for i in range(len(queries))]
    said = [model.reply([one], 5, adapted=True)[0] for one in chats]
    assert [json.loads(line)["answer"] for line in lines] == said
    assert said != [model.reply([one], 5)[0] for one in chats]
    assert train([*argv[:4], str(tmp_path / "none"), *argv[5:]]) == 2
    assert "does not exist; it is to hold v2_OpenEnded" in capsys.readouterr().err
