"""Cells of a table: kept whole or not at all, paired, and judged by the one rule."""

import numpy as np
import pytest

from app_data.store.atomic import write_json
from app_data.store.errors import DataError
from app_eval.measure.cells import (
    against,
    cell_difference,
    cell_value,
    differences,
    finished,
    judged,
    keep,
    kept,
    means,
    summary,
)
from app_eval.measure.interval import Interval

SCORES = ("la", "hca", "mta")


def test_means_and_differences():
    a = [{s: np.array([1.0, 0.0, 1.0, 1.0]) for s in SCORES}] * 2
    b = [{s: np.array([0.0, 0.0, 1.0, 1.0]) for s in SCORES}] * 2
    assert means(a, SCORES)["la"].value == 0.75
    found = differences(a, b, SCORES)["hca"]
    assert found.value == 0.25
    assert found.low == 0 <= found.high <= 1


def test_rows_belong_to_their_settings(tmp_path):
    write_json(tmp_path / "result.json", {"row": "a", "config": "1"})
    assert finished(tmp_path, {"row": "a"})["config"] == "1"
    assert finished(tmp_path / "none", {}) is None
    with pytest.raises(DataError, match="config differ"):
        finished(tmp_path, {"row": "a", "config": "2"})
    (tmp_path / "result.json").write_text('{"row"')
    with pytest.raises(DataError, match="damaged"):
        finished(tmp_path, {"row": "a"})


def test_a_cell_comes_back(tmp_path):
    parts = {"all": {"a": np.array([0.0, 1.0]), "b": np.array([0.5, 0.5])}}
    result = keep(tmp_path / "cell", parts, {"row": "x"})
    assert result["scores"] == {"all": {"a": 0.5, "b": 0.5}}
    assert finished(tmp_path / "cell", {"row": "x"}) == result
    back = kept(tmp_path / "cell")
    assert back.keys() == parts.keys()
    assert all(np.array_equal(back["all"][s], parts["all"][s]) for s in "ab")


def test_items_and_seeds_are_paired():
    draw = np.random.default_rng(0)
    hard = draw.random(300)
    other = [{"s": np.clip(hard + 0.1 * draw.normal(size=300), 0, 1)} for _ in range(3)]
    ours = [{"s": found["s"] + 0.05} for found in other]
    found = against(ours, other, ["s"])["s"]
    assert found["word"] == "better"
    # The gain is the same everywhere: pairing leaves no width, whatever the items' spread.
    assert found["items"] == pytest.approx([0.05] * 3, abs=1e-6)
    assert found["seeds"] == pytest.approx([0.05] * 3, abs=1e-6)
    assert against(ours[:1], other[:1], ["s"])["s"]["word"] == "undecided"
    assert summary(ours, ["s"])["s"]["mean"][0] == pytest.approx(np.mean([x["s"].mean() for x in ours]), abs=1e-6)
    assert cell_difference(found) == "+5.00 [+5.00, +5.00]; [+5.00, +5.00] better"


def test_what_is_not_there_is_blank():
    assert cell_value(None) == cell_difference(None) == ""
    assert cell_value({"mean": [0.5], "deviation": None}) == "50.00"
    assert cell_value({"mean": [0.5], "deviation": 0.01}) == "50.00 +- 1.00"
    assert judged(None, [1.0])["seeds"] is None
    assert judged(Interval(0.1, 0.05, 0.2), [0.1, 0.1])["word"] == "better"
