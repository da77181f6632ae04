"""Command lines with any options: each ends with 0 or with one sentence and exit status 2, never in a traceback.

Nothing here trains: every path that is named is missing, empty, or holds something else.
"""

import contextlib
import io
import os
import traceback
import warnings
from pathlib import Path
from random import Random

from app_train.cli import guarded, hier, main, parse
from app_train.commands import COMMANDS
from app_train.recipes import RECIPES

_NEED_DATA = {"icl-adapter", "folder", "cub", "aircraft", "butterfly", "inaturalist", "chest"}
_AT_ONCE = {"eval selection"}  # computes without any argument
WORDS = (
    "",
    "0",
    "-1",
    "1",
    "nan",
    "inf",
    "1e400",
    "x",
    "a b",
    "\u00e9",
    "$HOME",
    "../x",
    "--",
    "[1]",
    "{}",
    "None",
    "true",
    "9" * 30,
)


def fuzz_commands(count: int, seed: int, folder: Path) -> list[str]:
    """What went wrong, one line each.

    Args:
        count: command lines.
        seed: of the choices.
        folder: an empty folder to work in.
    """
    places = _places(folder)
    wrong = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number in range(count):
            draw = Random(f"{seed} {number}")
            program, argv = _command(draw, places)
            said = _end(program, argv)
            if said:
                wrong.append(f"{' '.join(map(repr, argv))}: {said}")
    finally:
        os.chdir(before)
    return wrong


def _places(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    (folder / "text.json").write_text("[1, {")
    (folder / "list.json").write_text("[]")
    (folder / "object.json").write_text("{}")
    (folder / "rows.jsonl").write_text("{}\n1\n")
    (folder / "bytes.bin").write_bytes(bytes(range(256)))
    (folder / "settings.yaml").write_text("epochs: [\n")
    (folder / "classes" / "a").mkdir(parents=True)
    (folder / "classes" / "a" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    names = sorted(path.name for path in folder.iterdir())
    return [*names, "missing", "missing/deep", "/proc/self/mem", "http://127.0.0.1:9/x"]


def _command(draw: Random, places: list[str]):
    if draw.random() < 0.5:
        name = draw.choice(sorted(RECIPES))
        # What finds its data by itself would begin to train.
        return main if name in _NEED_DATA else _parsed, [name, *_options(RECIPES[name].kind(), draw, places)]
    name = draw.choice(sorted(set(COMMANDS) - _AT_ONCE))
    return hier, [*name.split(), *_options(COMMANDS[name].kind(), draw, places)]


def _options(kind: type, draw: Random, places: list[str]) -> list[str]:
    """Some options of a settings class, each with a value that may fit, and now and then a word of no option."""
    # Where a run would go is missing or a file, so that none begins.
    argv = ["--out", "bytes.bin"] if "out" in _fields(kind) else []
    for name in draw.sample(_fields(kind), min(len(_fields(kind)), draw.randint(0, 4))):
        if name not in ("out", "cache_dir", "device"):
            argv += [f"--{name.replace('_', '-')}", draw.choice((*WORDS, *places))]
    while draw.random() < 0.3:
        argv.insert(draw.randint(0, len(argv)), draw.choice((*WORDS, *places)))
    return argv


def _parsed(argv: list[str]) -> int:
    """Read the settings of a recipe, and leave it at that."""

    def work() -> int:
        parse(argv[0], RECIPES[argv[0]].kind(), argv[1:])
        return 0

    return guarded(work)


def _fields(kind: type) -> list[str]:
    import dataclasses

    if dataclasses.is_dataclass(kind):
        return sorted(field.name for field in dataclasses.fields(kind))
    return sorted(kind.model_fields)


def _end(program, argv: list[str]) -> str:
    """What is wrong with the end of a command; "" if nothing is."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            status = program(list(argv))
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            return traceback.format_exc().strip().splitlines()[-1][:300]
    if status not in (0, None, 2):
        return f"exit status {status}"
    last = (err.getvalue().strip().splitlines() or [""])[-1]
    if status == 2 and not last.startswith("error: ") and "usage" not in (out.getvalue() + err.getvalue()).lower():
        return f"exit status 2 without a sentence: {last[:200]}"
    return ""
