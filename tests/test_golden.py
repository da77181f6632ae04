"""Every recipe still computes what `tests/golden/*.json` says; `python tests/golden/record.py --check` compares digit for digit.

The cases run in one process of their own: tokenizers, thread counts and the home folder of this one are not theirs.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app_train.cli import RECIPES as COMMANDS
from golden import record
from golden.recipes import RECIPES

HERE = Path(record.__file__).parent
CASES = {name: case for name, case in RECIPES.items() if not record.missing(case)}


@pytest.fixture(scope="session")
def recorded(request, tmp_path_factory) -> Path:
    """Recordings of all cases that were asked for."""
    asked = [item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_a_recipe[")]
    folder = tmp_path_factory.mktemp("golden")
    names = [name for name in asked if name in CASES]
    command = [sys.executable, str(HERE / "record.py"), "--into", str(folder), *names]
    made = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert made.returncode == 0, made.stdout + made.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name, request):
    if name not in CASES:
        pytest.skip(f"not installed: {', '.join(record.missing(RECIPES[name]))}")
    known = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    found = json.loads((request.getfixturevalue("recorded") / f"{name}.json").read_text(encoding="utf-8"))
    if RECIPES[name].portable:
        lines = record.differences(known, found, RECIPES[name].rtol)
    else:
        old, new = (
            {key for part in recording.values() for key, _ in record.flat(part)} for recording in (known, found)
        )
        lines = sorted(old ^ new)
    assert not lines, "\n".join([f"{len(lines)} differences", *lines[:20]])


def test_every_recipe_has_a_recording():
    assert not set(COMMANDS) - set(RECIPES)
    stored = {path.stem: path.stat().st_size for path in HERE.glob("*.json")}
    assert set(stored) == set(RECIPES)
    assert max(stored.values()) < 60_000
    for name in RECIPES:
        known = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        assert known["steps"], name
        assert known["scores"], name


def test_differences_are_found():
    known = {"steps": {"a/seed-0": {"count": 2, "loss": [1.0, None]}}, "scores": {"a/seed-0": {"hca": 0.5}}}

    def changed(part, key, value):
        return record.differences(known, {**known, part: {"a/seed-0": {**known[part]["a/seed-0"], key: value}}})

    assert record.differences(known, known, exact=True) == []
    assert changed("steps", "loss", [1.0001, None]) == []
    assert "loss/1 was 1.0, is 1.001" in changed("steps", "loss", [1.001, None])[0]
    assert "loss/2 was None, is 2.0" in changed("steps", "loss", [1.0, 2.0])[0]
    assert "loss/2 is gone" in changed("steps", "loss", [1.0])[0]
    assert changed("scores", "hca", 0.51) == []
    assert "hca was 0.5, is 0.53" in changed("scores", "hca", 0.53)[0]
    assert changed("scores", "mta", 0.5) == []  # a new number beside the old ones is no difference
    near = {**known, "steps": {"a/seed-0": {"count": 2, "loss": [1.00000001, None]}}}
    assert len(record.differences(known, near, exact=True)) == 1


def test_results_become_numbers():
    content = {"format": 1, "n": 3, "scores": {"leaf": [0.5, 0.25, 1.0]}, "right": "0110", "name": "x", "ok": True}
    expected = {"n": 3, "scores.leaf.0": 0.5, "scores.leaf.1": 0.25, "scores.leaf.2": 1.0, "right": 0.5}
    assert record.leaves(content) == expected
    assert record.number(float("nan")) is None
    assert record.number(1 / 3) == 0.333333333
    assert record.columns([{"step": 1, "loss": 0.5}, {"step": 2, "lr": 1.0}]) == {
        "loss": [0.5, None],
        "lr": [None, 1.0],
    }
