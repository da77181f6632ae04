"""Folders of small pictures, and the command line in a process of its own."""

import io
import os
import subprocess
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from app_train.cli import hier, main
from helpers.pictures import colour_folders

ROOT = Path(__file__).parents[1]
# Small enough for a test, large enough that both stages take several steps.
QUICK = ["--size", "32", "--fit.head.epochs", "2", "--fit.head.batch-size", "16", "--fit.lora.epochs", "2"]
QUICK += ["--fit.lora.batch-size", "8", "--save-every", "2", "--no-tensorboard", "--lora"]


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
    """Run a command to its end: (exit status, standard output, standard error).

    The two programs run in this process, since importing torch takes longer than most of what they do here; other programs and
    those with options of `start` get one of their own.
    """
    programs = {"apps/train": main, "apps/eval": hier}

    def run(*args: str, **kwargs) -> tuple[int, str, str]:
        if args[0] in programs and not kwargs:
            return _here(lambda: programs[args[0]](args[1:]))
        process = start(*args, **kwargs)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    return run


def _here(work) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    torch.set_num_threads(1)  # as the processes that others are compared with
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            status = work()
        except SystemExit as stop:
            status = stop.code
        except Exception:
            traceback.print_exc()
            status = 1
    return status, out.getvalue(), err.getvalue()


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
    status, printed, err = command("apps/train", "folder", *args, *QUICK)
    assert status == 0, err
    (out.parent / "printed").write_text(printed)
    return out
