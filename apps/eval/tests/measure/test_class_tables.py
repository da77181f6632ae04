"""The two tables against counts by hand, and cells that spreadsheets would take for formulas."""

import csv

from app_eval.measure.class_tables import safe_cell, write_class_tables
from hier_losses import Taxonomy


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_counts_by_hand(tmp_path):
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "=z")])
    a, _, x, y, z = range(5)
    assert tax.path_of(z) == ("b", "=z")
    # x: right, taken for y twice, for its group once; y: right; z: taken for x, and undecided.
    targets, answers = [x, x, x, x, y, z, z], [x, y, y, a, y, x, -1]
    write_class_tables(tmp_path / "new", answers, targets, tax)
    rows = {row["class"]: row for row in read(tmp_path / "new" / "classes.csv")}
    assert set(rows) == {"a", "a/x", "a/y", "b/=z", "(undecided)"}
    found = rows["a/x"]
    assert (found["pictures"], found["right"], found["recall"], found["answered"]) == ("4", "1", "0.25", "2")
    assert (found["precision"], found["most_taken_for"], found["times"]) == ("0.5", "a/y", "2")
    assert float(found["ahd"]) == (0 + 1 + 1 + 1) / 4
    assert (rows["a/y"]["recall"], rows["a/y"]["precision"]) == ("1.0", "0.3333")
    assert float(rows["b/=z"]["ahd"]) == 2.0
    pairs = [
        (row["class"], row["answer"], row["pictures"], row["lca_height"])
        for row in read(tmp_path / "new/confusion.csv")
    ]
    assert pairs[0] == ("a/x", "a/y", "2", "1")
    assert set(pairs[1:]) == {("a/x", "a", "1", "1"), ("b/=z", "a/x", "1", "2"), ("b/=z", "(undecided)", "1", "2")}


def test_no_picture_at_all(tmp_path):
    write_class_tables(tmp_path, [], [], Taxonomy.from_paths([("a",), ("b",)]))
    assert read(tmp_path / "classes.csv") == read(tmp_path / "confusion.csv") == []


def test_a_cell_is_no_formula():
    assert [safe_cell(cell) for cell in ("=1+1", "@a", "a=b")] == ["'=1+1", "'@a", "a=b"]
