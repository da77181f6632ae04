"""Help costs no more than it says: no command imports torch to print it, and it comes within a second or two."""

import resource

import pytest

HIER = ("-c", "from app_train.cli import hier; raise SystemExit(hier())")
# What takes seconds to import.
HEAVY = ("torch", "torchvision", "torchmetrics", "transformers", "peft", "timm", "accelerate", "scipy", "matplotlib")
PROBE = f"""
import contextlib, io, sys
from app_train.cli import hier
from app_train.commands import COMMANDS
from app_train.recipes import RECIPES

for words in ([], ["train"], *(name.split() for name in COMMANDS), *(["train", name] for name in RECIPES)):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            status = hier([*words, "--help"])
        except SystemExit as end:
            status = end.code
    assert not status and said.getvalue().startswith("usage: hier"), (words, status, said.getvalue())
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (words, heavy)
"""


def cpu_seconds(command, *args) -> float:
    """What a command uses of the CPU, in its own process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, out, err = command(*HIER, *args)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert status == 0, err
    assert out.startswith("usage: hier")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    ("words", "most"),
    [((), 1), (("predict",), 2), (("train", "folder"), 2), (("train", "mat-clip"), 2)],
    ids=["hier", "predict", "folder", "mat-clip"],
)
def test_help_comes_quickly(command, words, most):
    seconds = []
    # A busy machine, or a first start that compiles, counts for more than it should: the best of three is meant.
    while not seconds or (min(seconds) > most and len(seconds) < 3):
        seconds.append(cpu_seconds(command, *words, "--help"))
    assert min(seconds) <= most, seconds


def test_no_help_imports_torch(command):
    status, _, err = command("-c", PROBE)
    assert status == 0, err
