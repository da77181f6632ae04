"""The examples run, and what they claim holds on a small scale."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not beside the tests")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # geoopt 0.5.1 at import
@pytest.mark.parametrize("optimizer", ["tangent", "riemannian"])
def test_embed_tree(run, optimizer):
    if optimizer == "riemannian":
        pytest.importorskip("geoopt")
    printed = run("embed_tree.py", "--depth", "4", "--steps", "60", "--optimizer", optimizer)
    lines = {line.split(":")[0].strip(): line for line in printed.splitlines() if ":" in line}
    distortion = {
        space: float(lines[space].split("distortion")[1].split("%")[0]) for space in ("euclidean", "hyperbolic")
    }
    assert distortion["hyperbolic"] < 0.5 * distortion["euclidean"]
    assert "tree itself: 0.000" in printed


def test_contrastive_step(run):
    printed = run("contrastive_step.py", "--steps", "40")
    losses = [float(line.split("contrastive")[1].split()[0]) for line in printed.splitlines() if "contrastive" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert "inside its cone" in printed
