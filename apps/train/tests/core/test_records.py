"""What a run writes while it goes is only ever appended, and cut back to the checkpoint."""

import subprocess
import sys

import pytest

from app_train.core.errors import RunError
from app_train.core.records import Records, read_records


def test_records_drop_what_comes_after_the_checkpoint(tmp_path):
    records = Records(tmp_path, 0)
    for step in range(1, 6):
        records.add(step, loss=float(step))
    records.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    records = Records(tmp_path, 3)
    records.add(4, loss=40.0)
    records.close()
    assert [(line["step"], line["loss"]) for line in read_records(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_lines_before_the_checkpoint_must_be_those_that_were_written(tmp_path):
    records = Records(tmp_path, 0)
    for step in range(1, 4):
        records.add(step, loss=float(step))
    known = records.digest
    records.add(4, loss=4.0)
    records.close()
    again = Records(tmp_path, 3, known)
    assert again.digest == known
    again.close()
    text = records.path.read_text()
    for damaged in (text.replace('"loss": 2.0', '"loss": 3.0'), text[:30], ""):
        records.path.write_text(damaged)
        with pytest.raises(RunError, match=r"metrics.jsonl is damaged, .*; delete .* and run the same command again"):
            Records(tmp_path, 3, known)
        assert records.path.read_text() == damaged


KILLED = """
import os, sys
from pathlib import Path
from app_train.core.records import Records
records = Records(Path(sys.argv[1]), int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, int(sys.argv[3]) + 1):
    records.add(step, loss=float(step))
os._exit(9)
"""


def test_kills_in_a_row_lose_no_line_before_the_checkpoint(tmp_path):
    for position, end, kept in ((0, 5, 5), (3, 3, 3), (3, 3, 3), (3, 4, 4)):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(position), str(end)], check=False)
        lines = read_records(tmp_path / "metrics.jsonl")
        assert [(line["step"], line["loss"]) for line in lines] == [(n, float(n)) for n in range(1, kept + 1)]


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    records = Records(tmp_path, 0)
    records.add(1, loss=1.0)
    assert [line["step"] for line in read_records(tmp_path / "metrics.jsonl")] == [1]
    records.close()
