"""The published adapter's recipe on tiny random models: plumbing, not results."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from app_data.sets.demonstration_tasks import IclTask
from app_data.store.errors import DataError
from app_train.core.errors import NonFiniteGradient
from app_train.recipes.icl.adapter import Example, encode_task, train_adapter
from app_train.recipes.icl.settings import PRESETS, AdapterConfig

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


@pytest.mark.parametrize(("preset", "name", "shots"), [("idefics-9b", "idefics1", 32), ("idefics2-8b", "idefics2", 8)])
def test_presets_train_on_tiny_models(families, preset, name, shots):
    config = PRESETS[preset]
    assert (config.shots, config.rank, config.c, config.ce, config.lr, config.num_instances) == (
        shots,
        4,
        0.1,
        0.5,
        5e-3,
        1000,
    )
    config = config.model_copy(update={"epochs": 4, "batch_size": 3, "normalize": "d"})
    model = families.make_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    records = []
    adapter, best = train_adapter(model, examples(families, name, 8), config, records.append)
    assert [r["epoch"] for r in records] == [0, 1, 2, 3]
    assert records[-1]["anchor"] + 0.5 * records[-1]["ce"] < records[0]["anchor"] + 0.5 * records[0]["ce"]
    assert best == min(records, key=lambda r: r["held_out_anchor"] + 0.5 * r["held_out_ce"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert adapter.u_k.abs().max() > 0
    again, _ = train_adapter(model, examples(families, name, 8), config)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


def test_bad_training(families):
    model = families.make_model("idefics2")
    some = examples(families, "idefics2", 3)
    with pytest.raises(DataError, match="two instances"):
        train_adapter(model, some[:1], AdapterConfig())
    some[0].student["pixel_values"][:] = torch.nan
    with pytest.raises(NonFiniteGradient, match="epoch 0"):
        train_adapter(model, some, AdapterConfig(epochs=1, batch_size=1))


def processor(text, images, return_tensors):
    """One token a character; checks that there is a picture for every placeholder."""
    assert return_tensors == "pt"
    assert text[0].count("<image>") == len(images[0])
    ids = [1, *(ord(char) for char in text[0].replace("<image>", "\x64"))]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.from_numpy(np.stack(images[0]))[None]}


def task(num=12, score="vqa"):
    store = np.zeros((num // 2, 8, 8, 3), dtype=np.uint8)
    store[:] = np.arange(num // 2)[:, None, None, None]
    rows = tuple((i // 2,) for i in range(num))
    answers = tuple(f"a{i}" for i in range(num))
    groups = tuple(row[0] for row in rows)
    return IclTask(
        "t", score, store, rows, ("q",) * num, answers, tuple((a,) for a in answers), groups, tuple(range(num))
    )


@pytest.mark.parametrize("score", ["vqa", "cider"])
def test_instances(score):
    found = list(encode_task(task(score=score), processor, AdapterConfig(shots=3, num_instances=5)))
    assert len(found) == 5
    for one in found:
        student, teacher = one.student["input_ids"][0].tolist(), one.teacher["input_ids"][0].tolist()
        assert teacher[-len(student) + 1 :] == student[1:]
        said = "".join(map(chr, student))
        assert said[-one.num_answer :].startswith("a")
        own = int(one.student["pixel_values"][0, 0, 0, 0, 0])
        pictures = one.teacher["pixel_values"][0, :, 0, 0, 0].tolist()
        assert len(pictures) == 4
        assert pictures[-1] == own
        assert own not in pictures[:-1]
    with pytest.raises(DataError, match="too small"):
        next(encode_task(task(4), processor, AdapterConfig(shots=3)))
    with pytest.raises(DataError, match="VQA and captioning"):
        next(encode_task(task(score="exact"), processor, AdapterConfig(shots=3)))
