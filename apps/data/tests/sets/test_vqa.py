import json
from collections import Counter

import numpy as np
import pytest

from app_data.read.labelled import Decoding
from app_data.sets.vqa import load_easy_vqa, load_vqa
from app_data.store import assets
from app_data.store.errors import DataError, MissingAssetError


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def release(tmp_path, make_picture):
    """Three questions about two pictures in VQAv2's form, with OK-VQA's extra field."""
    for i in (42, 7):
        make_picture(tmp_path / "val2014" / f"COCO_val2014_{i:012d}.jpg", value=i)
    asked = [(420, 42, "Is it red?"), (421, 42, "How many dogs?"), (70, 7, "What is this?")]
    questions = {
        "data_subtype": "val2014",
        "questions": [{"question_id": q, "image_id": i, "question": text} for q, i, text in asked],
    }
    notes = [
        {
            "question_id": q,
            "image_id": i,
            "answer_type": kind,
            "question_type": "what",
            "multiple_choice_answer": f"{q}",
            "answers": [
                {"answer": f"{q} {n}", "raw_answer": f"{q} raw {n}", "answer_id": n, "answer_confidence": "yes"}
                for n in range(1, 11)
            ],
        }
        for (q, i, _), kind in zip(asked, ["yes/no", "number", "other"], strict=True)
    ]
    return (
        write(tmp_path / "questions.json", questions),
        write(tmp_path / "annotations.json", {"annotations": notes[::-1]}),
        tmp_path,
    )


def test_release(release, decoding):
    data = load_vqa(*release, decoding)
    assert data.ids == (420, 421, 70)
    assert data.image_ids == (42, 42, 7)
    assert data.kinds == ("yes/no", "number", "other")
    assert data.answers[1] == tuple(f"421 {n}" for n in range(1, 11))
    assert data.questions[2] == "What is this?"
    assert len(data.store) == 2, "two questions share one stored picture"
    assert np.array_equal(data[0].pixels, data[1].pixels)
    assert not np.array_equal(data[0].pixels, data[2].pixels)
    assert 40 <= data[0].pixels.mean() <= 75
    assert data.batch([2, 0]).shape == (2, 3, 8, 8)
    assert load_vqa(*release, decoding, answer_field="raw_answer").answers[0][0] == "420 raw 1"


def test_selections_of_one_picture_differ(release, decoding):
    data = load_vqa(*release, decoding)
    first, second = data.select([0]), data.select([1])
    assert first.fingerprint != second.fingerprint
    assert (second.ids, second.questions, second.kinds) == ((421,), ("How many dogs?",), ("number",))
    assert data.select(np.array([False, False, True])).image_ids == (7,)


def test_without_answers_and_with_other_names(release, decoding, make_picture):
    questions, _, root = release
    data = load_vqa(questions, None, root, decoding)
    assert data.answers == ((), (), ())
    assert data.kinds == ("", "", "")
    for i in (42, 7):
        make_picture(root / "flat" / f"{i:012d}.jpg")
    assert len(load_vqa(questions, None, root / "flat", decoding, name="{image_id:012d}.jpg")) == 3
    for path in (root / "val2014").iterdir():
        path.rename(root / path.name)
    (root / "val2014").rmdir()
    assert len(load_vqa(questions, None, root, decoding)) == 3


def test_questions_about_bad_pictures_are_left_out(release, decoding):
    (release[2] / "val2014" / "COCO_val2014_000000000042.jpg").unlink()
    data = load_vqa(*release, decoding)
    assert data.ids == (70,)
    assert [(bad.path, bad.reason) for bad in data.skipped] == [("COCO_val2014_000000000042.jpg", "it does not exist")]
    assert data.answers[0][0] == "70 1"


def test_files_that_do_not_fit(release, decoding, tmp_path):
    questions, annotations, root = release
    with pytest.raises(DataError, match=r"question 420 of .* has no annotation"):
        load_vqa(questions, write(tmp_path / "a.json", {"annotations": []}), root, decoding)
    with pytest.raises(DataError, match="not in the VQA release's form"):
        load_vqa(annotations, None, root, decoding)
    with pytest.raises(DataError, match="not in the VQA release's form"):
        load_vqa(questions, annotations, root, decoding, answer_field="text")
    with pytest.raises(DataError, match="holds no question"):
        load_vqa(write(tmp_path / "q.json", {"questions": []}), None, root, decoding)
    with pytest.raises(DataError, match="does not exist"):
        load_vqa(tmp_path / "none.json", None, root, decoding)


def test_easy_vqa(easy_vqa_assets, tmp_path):
    parts = load_easy_vqa(Decoding(size=64, cache_dir=tmp_path))
    assert {part: (len(data), len(data.store)) for part, data in parts.items()} == {
        "train": (38575, 4000),
        "test": (9673, 1000),
    }
    test = parts["test"]
    assert test.skipped == ()
    assert len({answers for data in parts.values() for answers in data.answers}) == 13
    assert Counter(test.kinds)["yes/no"] == 7136
    assert (test.questions[0], test.answers[0], test.image_ids[0]) == ("what is the red shape?", ("triangle",), 0)
    assert test.ids == tuple(range(9673))
    # The picture of the first question shows something red on a light ground.
    red, green, blue = test[0].pixels.reshape(-1, 3).astype(int).T
    assert ((red > green + 80) & (red > blue + 80)).sum() > 50


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(MissingAssetError, match=r'pip install "easy-vqa==1\.0"'):
        load_easy_vqa()
