"""Task adapters on tiny files in the data sets' own formats."""

import json

import numpy as np
import pytest

from app_data.read.labelled import Decoding
from app_data.sets.captions import caption_sets
from app_data.sets.coco import find_captions
from app_data.sets.demonstration_tasks import (
    caption_task,
    load_caption_editing,
    load_image_text_matching,
    load_nlvr2,
    read_jsonl,
    vqa_task,
)
from app_data.sets.vqa import load_easy_vqa, load_vqa
from app_data.store.errors import DataError


@pytest.fixture
def decoding(tmp_path):
    return Decoding(size=32, cache_dir=tmp_path / "cache", max_bad_files=1)


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("field", ["answer", "raw_answer"])
def test_vqa_and_ok_vqa(tmp_path, make_picture, decoding, field):
    for i in (3, 9):
        make_picture(tmp_path / "val2014" / f"COCO_val2014_{i:012d}.jpg", value=20 * i)
    asked = {
        "data_subtype": "val2014",
        "questions": [
            {"question_id": 30, "image_id": 3, "question": "What color?"},
            {"question_id": 90, "image_id": 9, "question": "How many?"},
            {"question_id": 31, "image_id": 3, "question": "Is it red?"},
        ],
    }
    notes = {
        "annotations": [
            {
                "question_id": n,
                "image_id": n // 10,
                "answer_type": "other",
                "answers": [{"answer_id": j, "answer": f"a{j}", "raw_answer": f"r{j}"} for j in range(1, 11)],
            }
            for n in (30, 90, 31)
        ]
    }
    data = load_vqa(
        write(tmp_path / "q.json", asked), write(tmp_path / "a.json", notes), tmp_path, decoding, answer_field=field
    )
    task = vqa_task(data, "okvqa")
    letter = field[0]
    assert len(task) == 3
    assert task.prompts == ("What color?", "How many?", "Is it red?")
    assert task.answers == (f"{letter}1",) * 3
    assert len(task.references[0]) == 10
    assert task.groups == (3, 9, 3)
    assert task.score == "vqa"
    user, assistant = task.demo(0)
    assert [part["type"] for part in user] == ["image", "text"]
    assert user[0]["image"].size == (32, 32)
    assert assistant == [{"type": "text", "text": f"{letter}1"}]
    np.testing.assert_array_equal(task.pictures(0)[0], task.pictures(2)[0])
    withheld = vqa_task(load_vqa(tmp_path / "q.json", None, tmp_path, decoding))
    with pytest.raises(DataError, match="no answer"):
        withheld.demo(0)


def test_easy_vqa(decoding):
    pytest.importorskip("easy_vqa")
    data = load_easy_vqa(decoding)["test"].select(range(20))
    task = vqa_task(data, "easy-vqa")
    assert len(task) == 20
    assert task.answers == tuple(a[0] for a in data.answers)


def test_captions(tmp_path, make_picture, decoding):
    make_picture(tmp_path / "a.jpg", value=50)
    notes = {
        "images": [{"id": 5, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "image_id": 5, "caption": "A dog."}, {"id": 2, "image_id": 5, "caption": "A pet."}],
    }
    task = caption_task(caption_sets(find_captions(write(tmp_path / "c.json", notes)), decoding)["test"])
    assert task.answers == ("A dog.",)
    assert task.references == (("A dog.", "A pet."),)
    assert task.ids == (5,)
    assert task.score == "cider"


def test_caption_editing(tmp_path, make_picture, decoding):
    make_picture(tmp_path / "COCO_train2014_000000000042.jpg", value=50)
    rows = [{"image_id": 42, "Ref-Cap": "a man rides a cat", "GT-Cap": "a man rides a horse"}]
    task = load_caption_editing(write(tmp_path / "ee.json", rows), tmp_path, decoding)
    assert task.prompts == ("Correct this caption: a man rides a cat",)
    assert task.answers == ("a man rides a horse",)
    assert task.score == "cider"
    make_picture(tmp_path / "99.jpg", value=60)
    rows = [{"image_id": "99", "Ref-Cap": "x", "GT-Cap": "y"}]
    flickr = load_caption_editing(write(tmp_path / "f.json", rows), tmp_path, decoding, image_name="{image_id}.jpg")
    assert len(flickr) == 1
    with pytest.raises(DataError, match="lacks GT-Cap"):
        load_caption_editing(write(tmp_path / "g.json", [{"image_id": 1, "Ref-Cap": "x"}]), tmp_path, decoding)
    with pytest.raises(DataError, match="JSON list"):
        load_caption_editing(write(tmp_path / "h.json", {}), tmp_path, decoding)
    with pytest.raises(DataError, match="no item"):
        load_caption_editing(write(tmp_path / "i.json", []), tmp_path, decoding)
    with pytest.raises(DataError, match="does not fit"):
        load_caption_editing(tmp_path / "f.json", tmp_path, decoding, image_name="{image}.jpg")


def test_image_text_matching(tmp_path, make_picture, decoding):
    make_picture(tmp_path / "000000000001.jpg", value=10)
    entry = {"filename": "000000000001.jpg", "caption": "a dog", "negative_caption": "a cat"}
    missing = {"filename": "gone.jpg", "caption": "a", "negative_caption": "b"}
    for content in ({"0": entry, "1": missing}, [entry, missing]):
        task = load_image_text_matching(write(tmp_path / "s.json", content), tmp_path, decoding)
        assert task.answers == ("yes", "no")
        assert [p.split("? ")[1] for p in task.prompts] == ["a dog", "a cat"]
        assert len(set(task.groups)) == 1
        assert task.ids == ("0-positive", "0-negative")
        assert len(task.skipped) == 1
        assert task.score == "exact"


def test_nlvr2(tmp_path, make_picture, decoding):
    for i in (0, 1):
        make_picture(tmp_path / f"dev-850-0-img{i}.png", value=50 * i)
        make_picture(tmp_path / "7" / f"train-1-2-img{i}.png", value=80 + 50 * i)
    lines = [
        {"identifier": "dev-850-0-0", "sentence": "Two dogs.", "label": "True", "left_url": "x"},
        {"identifier": "dev-850-0-1", "sentence": "One dog.", "label": "False"},
        {"identifier": "train-1-2-0", "sentence": "A cat.", "label": "False", "directory": 7},
    ]
    path = tmp_path / "dev.json"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    task = load_nlvr2(path, tmp_path, decoding)
    assert task.answers == ("yes", "no", "no")
    assert [len(rows) for rows in task.rows] == [2, 2, 2]
    assert task.rows[0] == task.rows[1] != task.rows[2]
    left, right = task.pictures(0)
    assert left.mean() < right.mean()
    assert [part["type"] for part in task.content(0)] == ["image", "image", "text"]
    path.write_text(json.dumps({"identifier": "a-0", "sentence": "x", "label": "maybe"}), encoding="utf-8")
    with pytest.raises(DataError, match="True or False"):
        load_nlvr2(path, tmp_path, decoding)


def test_read_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    for text, word in (("", "no item"), ("[1]", "JSON object"), ('{"a":1}\n{"a', "line 2")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=word):
            read_jsonl(path)
    with pytest.raises(DataError, match="does not exist"):
        read_jsonl(tmp_path / "none.jsonl")
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="UTF-8"):
        read_jsonl(path)
