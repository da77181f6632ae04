"""What CONTRIBUTING.md says to change is enough: a loss, a metric, a data set, a backbone, a recipe, a selector, a figure."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATCHES = sorted((ROOT / "tests" / "extensions").glob("*.patch"))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the sources with all seven patches, and a way to run `hier` on it."""
    copy = tmp_path_factory.mktemp("copy")
    for source in sorted(ROOT.glob("*/*/src")):
        shutil.copytree(source, copy / source.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"))
    for patch in PATCHES:
        subprocess.run(["git", "apply", "--include=apps/*", "--include=packages/*", str(patch)], cwd=copy, check=True)
    sources = os.pathsep.join(str(path) for path in sorted(copy.glob("*/*/src")))
    env = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def hier(*args: object) -> str:
        words = [sys.executable, "-c", "import sys; from app_train.cli import hier; sys.exit(hier())", *map(str, args)]
        done = subprocess.run(words, cwd=copy, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return hier


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_at_most_three_files(patch):
    files = re.findall(r"^\+\+\+ b/(.*)$", patch.read_text(), re.MULTILINE)
    assert 1 <= len(files) <= 3
    said = (ROOT / "CONTRIBUTING.md").read_text()
    for name in files:
        # A new file stands in a folder, or beside a file, that the table names.
        assert name in said or str(Path(name).parent) in said, f"CONTRIBUTING.md does not name {name}"


def test_all_seven_kinds_have_one():
    kinds = {"loss", "metric", "data-set", "backbone", "recipe", "selector", "figure"}
    assert {patch.stem for patch in PATCHES} == kinds


def test_a_new_loss_metric_data_set_backbone_and_figure_run_together(extended, colours, tmp_path):
    out = tmp_path / "run"
    extended(
        "train", "folder", "--data", f"colours:{colours}", "--model", "pip:shades", "--size", 32, "--out", out,
        "--cache-dir", tmp_path / "cache", "--no-tensorboard", "--lora", "--loss.level", 0, "--loss.focal", 1,
        "--fit.lora.epochs", 2, "--fit.lora.batch-size", 8,
    )  # fmt: skip
    rows = json.loads((out / "result.json").read_text())["runs"][0]
    assert rows["product"]["scores"]["chosen"]["near"][0] >= rows["product"]["scores"]["chosen"]["leaf"][0]
    assert rows["neighbour"]["n"] == 8
    lines = (out / "seed-0" / "trained" / "metrics.jsonl").read_text().splitlines()
    assert all("loss/focal" in json.loads(line) for line in lines)
    assert "<h2>How sure</h2>" in (out / "report.html").read_text()


def test_a_new_recipe_runs(extended, tmp_path):
    extended("train", "line", "--out", tmp_path / "run", "--stage.epochs", 60)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["slope"] == pytest.approx(3, abs=0.1)
    assert "line" in extended("recipes")


def test_a_new_selector_chooses(extended, colours, tmp_path):
    query = sorted(colours.rglob("*.png"))[0]
    found = {}
    for method in ("topk", "farthest"):
        extended(
            "select", "--data", colours, "--query", query, "--method", method, "--k", 3, "--out", tmp_path / method,
            "--cache-dir", tmp_path / "cache",
        )  # fmt: skip
        found[method] = json.loads((tmp_path / method).read_text())["queries"][0]["demos"]
    near, far = ({Path(demo["path"]).parent.name for demo in demos} for demos in found.values())
    assert near == {query.parent.name}
    assert query.parent.name not in far
