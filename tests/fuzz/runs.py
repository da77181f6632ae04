"""Commands on finished runs and saved models, with one file damaged at a time: the same answer as before, or one sentence."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from app_train.cli import hier
from fuzz.readers import Reader
from golden import record
from golden.recipes import RECIPES
from helpers import pictures

# What a run keeps for people and for itself; no command reads it.
_FOR_PEOPLE = frozenset({".html", ".svg", ".png", ".jsonl", ".lock", ".md", ".csv"})


_ANSWER = ("predict", "caption", "search")

# Name -> the recipe, the part of its run that the command takes (all if ""), and the command.
COMMANDS = {
    "predict": ("folder", "", "predict run x.png"),
    "predict by an adapter": ("folder", "*/adapter", "predict run x.png"),
    "train folder --from-run": (
        "folder",
        "*/adapter",
        "train folder --data colours --out again --from-run run --size 32 --lora --fit.head.epochs 1 --fit.lora.epochs 1 "
        "--fit.lora.batch-size 32 --no-tensorboard",
    ),
    "caption": ("blip-mini", "", "caption run/seed-0/lorentz x.png"),
    "search": ("blip-mini", "", "search run/seed-0/lorentz grey --data pictures"),
    "eval icl": ("icl-mini", "", "eval icl run --out table.json --queries 2 --no-emoji -k 2 --quick"),
}


def runs() -> dict[str, Reader]:
    """A reader for each command; those whose packages are missing are left out."""
    return {
        name: Reader(_run(recipe, part), _hier(command.split()), "run/**/*", _FOR_PEOPLE)
        for name, (recipe, part, command) in COMMANDS.items()
        if not record.missing(RECIPES[recipe])
    }


def _run(recipe: str, part: str = "") -> Callable[[Path], None]:
    """A writer of a finished run in `run/`, or of a folder of it; made once, then copied."""

    def write(root: Path) -> None:
        made = root.parent.parent / f"made-{recipe}"
        if not made.exists():
            record.run(recipe, made)
        root.mkdir(parents=True)
        whole = made / "run"
        shutil.copytree(next(p for p in sorted(whole.rglob(part)) if p.is_dir()) if part else whole, root / "run")
        if (made / "colours").exists():
            shutil.copytree(made / "colours", root / "colours")
        (root / "pictures").mkdir()
        for place in (root / "x.png", root / "pictures" / "x.png"):
            pictures.grey(place, 90)

    return write


def _hier(argv: list[str]) -> Callable[[Path, object], None]:
    """A command in the folder; its sentence is a ValueError, and another answer than the first one an error."""
    answers: list[str] = []

    def read(root: Path, _: object) -> None:
        out, said, before = io.StringIO(), io.StringIO(), Path.cwd()
        os.chdir(root)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
                status = hier(argv)
        finally:
            os.chdir(before)
        last = (said.getvalue().strip().splitlines() or [""])[-1]
        if status == 2 and last.startswith("error: "):
            raise ValueError(last)
        if status:
            raise RuntimeError(f"exit status {status}: {last}")
        answers.append(out.getvalue())
        if argv[0] in _ANSWER and answers[-1] != answers[0]:
            raise RuntimeError(f"another answer: {answers[-1][:100]!r}")

    return read
