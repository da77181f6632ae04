"""A sealed file or folder notices that one of its bytes has changed."""

import json

import pytest

from app_data.store.errors import DataError
from app_data.store.sealed import (
    MANIFEST,
    check_sealed,
    file_digest,
    is_whole,
    new_sealed_folder,
    read_sealed,
    seal_broken,
    seal_folder,
    write_sealed,
)


def test_a_sealed_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "facts.json"
    assert write_sealed(path, {"shape": (2, 3), "name": "\u00e9"}) == {"shape": [2, 3], "name": "\u00e9"}
    assert read_sealed(path) == {"shape": [2, 3], "name": "\u00e9"}
    assert seal_broken(path) == ""


@pytest.mark.parametrize(("old", "new"), [("2", "4"), ("name", "nome"), ("}", ""), ('"content": "', '"content": "0')])
def test_every_changed_byte_is_noticed(tmp_path, old, new):
    path = tmp_path / "facts.json"
    write_sealed(path, {"shape": [2, 3], "name": "x"})
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=r"facts.json is damaged; delete it and run the same command again"):
        read_sealed(path)


def test_a_file_without_a_seal_is_read_unless_it_must_have_one(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"a": 1}')
    assert read_sealed(path) == {"a": 1}
    assert seal_broken(path) == ""
    with pytest.raises(DataError, match="damaged"):
        read_sealed(path, required=True)
    path.write_text("[1]")
    with pytest.raises(DataError, match="damaged"):
        read_sealed(path)


def test_the_format_of_a_later_version_is_named(tmp_path):
    path = tmp_path / "result.json"
    write_sealed(path, {"format": 2})
    with pytest.raises(DataError, match=r"result.json has format 2, this version reads 1"):
        read_sealed(path)


def test_the_files_beside_are_sealed_but_not_what_passes(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"abc")
    for passing in ("checkpoint-3", "tensorboard", ".hidden"):
        (tmp_path / passing).mkdir()
        (tmp_path / passing / "x").write_text("x")
    path = tmp_path / "result.json"
    write_sealed(path, {"a": 1}, beside=True)
    assert list(json.loads(path.read_text())["seal"]["files"]) == ["model/weights"]
    (tmp_path / "checkpoint-3" / "x").unlink()
    assert seal_broken(path) == ""
    (tmp_path / "model" / "weights").write_bytes(b"abd")
    assert seal_broken(path) == "model/weights"
    (tmp_path / "model" / "weights").unlink()
    assert seal_broken(path) == "model/weights"


def test_the_seal_of_a_folder_below_is_sealed_too(tmp_path):
    with new_sealed_folder(tmp_path / "adapter") as target:
        (target / "weights").write_bytes(b"abc")
    path = tmp_path / "result.json"
    write_sealed(path, {"a": 1}, beside=True)
    seal = tmp_path / "adapter" / ".seal.json"
    seal.write_text(seal.read_text().replace("1", "0"))
    assert seal_broken(path) == "adapter/.seal.json"


def test_a_sealed_folder_is_whole_or_says_what_is_not(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("{}\n")
    done = tmp_path / "model"
    assert not is_whole(done)
    with new_sealed_folder(done, [log]) as target:
        (target / "weights").write_bytes(b"abc")
    assert is_whole(done)
    log.write_text("{1\n")
    with pytest.raises(DataError, match=r"metrics.jsonl is damaged or missing; delete .*model and run"):
        is_whole(done)
    log.write_text("{}\n")
    (done / "weights").write_bytes(b"abd")
    with pytest.raises(DataError, match=r"weights is damaged or missing; delete .*model and run"):
        is_whole(done)
    for path in done.iterdir():
        path.unlink()
    assert not is_whole(done)  # nobody says that it was finished


@pytest.mark.parametrize("own", [True, False])
def test_a_saved_model_is_checked_by_its_own_seal_or_by_the_result_above_it(tmp_path, own):
    model = tmp_path / "seed-0" / "row" / "model"
    model.mkdir(parents=True)
    (model / "weights").write_bytes(b"right")
    (model / "README.md").write_text("a card")
    if own:
        seal_folder(model)
    else:
        write_sealed(model.parent / "result.json", {}, beside=True)
    (model.parent / "scores").write_text("of no model")
    (model / "README.md").write_text("a card, filled in")
    check_sealed(model)
    (model / "weights").write_bytes(b"wrong")
    again = "model" if own else "row"  # a row is made again as a whole
    with pytest.raises(DataError, match=f"weights is damaged, changed or missing: restore it, or delete .*{again} and"):
        check_sealed(model)
    (model / "weights").unlink()
    with pytest.raises(DataError, match="weights is damaged, changed or missing"):
        check_sealed(model)


def test_a_folder_that_nobody_sealed_passes(tmp_path):
    (tmp_path / "weights").write_bytes(b"of a person")
    (tmp_path / "result.json").write_text('{"seal": 3}')
    check_sealed(tmp_path)


def test_the_manifest_of_a_run_speaks_where_nothing_nearer_does(tmp_path):
    """A row that is made again may differ from a manifest of before; a model without a seal of its own has only that."""
    for name in ("row", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"old")
    sums = {f"{name}/weights": file_digest(tmp_path / name / "weights") for name in ("row", "model")}
    write_sealed(tmp_path / MANIFEST, {"sha256": sums})
    check_sealed(tmp_path / "model")
    for name in ("row", "model"):
        (tmp_path / name / "weights").write_bytes(b"new")
    write_sealed(tmp_path / "row" / "result.json", {}, beside=True)
    check_sealed(tmp_path / "row")
    with pytest.raises(DataError, match=r"model.weights is damaged, changed or missing"):
        check_sealed(tmp_path / "model")
