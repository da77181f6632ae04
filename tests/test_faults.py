"""A few faults of every kind on the quickest recipe; `nox -s faults` tries hundreds on eight, and its table stands in the docs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults import matrix, mutations, report

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_some_faults_of_every_kind_end_well():
    pytest.importorskip("open_clip")
    sources = os.pathsep.join(str(path) for path in sorted(ROOT.glob("*/*/src")))
    command = [
        sys.executable,
        str(ROOT / "tests" / "faults"),
        "--families",
        "mat-clip",
        "--density",
        "0.07",
        "--jobs",
        "1",
    ]
    env = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.split()[-7]) >= 20, done.stdout[-200:]


def test_every_mutation_has_its_place():
    """A safeguard that moves takes its mutation along."""
    for mutation in mutations.MUTATIONS:
        assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation.what
        assert mutation.kind in matrix.KINDS


def test_the_page_shows_what_is_stored():
    text = report.PAGE.read_text(encoding="utf-8")
    assert f"{report.BEGIN}\n{report.table()}{report.END}" in text
    assert f"{report.RANKS_BEGIN}\n{report.table_together()}{report.RANKS_END}" in text
    stored = json.loads(report.STORED.read_text(encoding="utf-8"))
    assert stored["counts"].keys() <= matrix.KINDS.keys()
    for mutation in mutations.MUTATIONS:
        assert f"| {mutation.what} | {mutation.kind} |" in text
