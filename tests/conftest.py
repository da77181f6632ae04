"""Folders of small pictures, and the command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.pictures import colour_folders

ROOT = Path(__file__).parents[1]
# Small enough for a test, large enough that both stages take several steps.
QUICK = ["--size", "32", "--fit.head.epochs", "2", "--fit.head.batch-size", "16", "--fit.lora.epochs", "2"]
QUICK += ["--fit.lora.batch-size", "8", "--save-every", "2", "--no-tensorboard"]


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """Nested folders of 4 classes with 10 noisy pictures each."""
    return colour_folders(tmp_path_factory.mktemp("colours"))


def start(
    *args: str, cwd: Path = ROOT, program: tuple[str, ...] = (sys.executable,), **variables: str
) -> subprocess.Popen:
    """Start a command of this checkout, with these environment variables; warnings of other libraries do not matter here."""
    sources = os.pathsep.join(str(path) for path in sorted(ROOT.glob("*/*/src")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": sources, **variables}
    return subprocess.Popen(
        [*program, *args], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="session")
def command():
    """Run a command to its end: (exit status, standard output, standard error)."""

    def run(*args: str, **kwargs) -> tuple[int, str, str]:
        process = start(*args, **kwargs)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="session")
def started():
    """Start a command and hand back the process."""
    return start


@pytest.fixture(scope="session")
def quick() -> list[str]:
    """Options that make the recipe `folder` take seconds."""
    return list(QUICK)


@pytest.fixture(scope="session")
def trained(colours, command, tmp_path_factory) -> Path:
    """A finished run on the colours."""
    out = tmp_path_factory.mktemp("run") / "colours"
    cache = out.parent / "cache"
    args = ["--data", str(colours), "--cache-dir", str(cache), "--out", str(out)]
    status, _, err = command("apps/train", "folder", *args, *QUICK)
    assert status == 0, err
    return out
