"""The check for graphics cards: its dry form marks every step, and what it runs runs, here on the CPU."""

import json
import sys

import pytest

from conftest import ROOT


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu_check

    return gpu_check


def test_the_dry_form_marks_every_step(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out"), "--dry"])
    assert gpu_check.main() == 0
    rows = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["tests", *["benchmark"] * len(gpu_check.BENCHMARKS), *["recipe"] * 4]
    assert {(row["status"], row["why"]) for row in rows} == {("not run", "needs a CUDA device")}
    for package, name in gpu_check.BENCHMARKS:
        assert (ROOT / "packages" / package / "benchmarks" / f"bench_{name}.py").exists()


def test_a_recipe_is_stopped_and_goes_on(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "no_card", lambda: "")
    check = gpu_check.Check(tmp_path, minutes=5, dry=False)
    check.recipe("cub")
    (row,) = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert (row["status"], row["why"]) == ("passed", "")
    assert row["facts"]["steps"] > 2


def test_measured_rows_are_taken(gpu_check, tmp_path, monkeypatch):
    row = {"name": "n", "setting": "s", "unit": "ms", "ours": None, "peer": None, "ratio": None, "target": "ratio <= 1"}
    row |= {"device": "cuda", "command": "c", "status": "not measured"}
    docs = tmp_path / "docs" / "benchmarks"
    docs.mkdir(parents=True)
    (docs / "hyper-geom-pairwise.json").write_text(json.dumps([{**row, "device": "cpu"}, row]))
    (docs / "make_index.py").write_text("")
    measured = {**row, "ours": 1.0, "peer": 2.0, "ratio": 0.5, "status": "measured"}
    (tmp_path / "hyper-geom-pairwise.json").write_text(json.dumps([measured]))
    (tmp_path / "gpu_check.json").write_text(json.dumps({"machine": {"device": "a card"}}))
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    assert gpu_check.take(tmp_path) == 1
    kept = json.loads((docs / "hyper-geom-pairwise.json").read_text())
    assert [each["device"] for each in kept] == ["cpu", "cuda"]
    assert (kept[1]["ratio"], kept[1]["machine"]) == (0.5, "a card")
