"""The command line: `hier COMMAND ...`, and `hier train RECIPE ...` for its command `train`."""

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TypeVar

import tyro
from pydantic import ValidationError

from app_data.store.errors import DataError, MissingAssetError
from app_train.commands import COMMANDS
from app_train.core.config import RunConfig, explain, read_yaml
from app_train.core.errors import Interrupted, RunError
from app_train.recipes import ALIASES, RECIPES

T = TypeVar("T")


def hier(argv: Sequence[str] | None = None) -> int:
    """Run a command of `hier`; user errors end in one sentence on standard error and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    known = {
        "train": "run a recipe",
        "recipes": "what each recipe needs, and whether that is here",
        **{name: command.help for name, command in COMMANDS.items()},
    }
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hier COMMAND ...   (hier COMMAND --help says more)\n")  # noqa: T201
        for name, text in known.items():
            print(f"  {name:<16}{text}")  # noqa: T201
        return 0 if argv else 2
    if argv[0] == "train":
        return main(argv[1:])
    if argv[0] == "recipes":
        return list_recipes()
    # "eval icl" is a command of two words.
    name = next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), None)
    if name is None:
        return _fail(f"unknown command {' '.join(argv[:2])!r}; the commands are {', '.join(known)}")
    command = COMMANDS[name]

    def work() -> int:
        config = _read(command.kind(), argv[len(name.split()) :], f"hier {name}")
        return _heavy(lambda: command.function()(config))

    return guarded(work)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; user errors end in one sentence on standard error and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hier train RECIPE [--config FILE] [options]   (RECIPE --help lists them)\n")  # noqa: T201
        for name, recipe in RECIPES.items():
            print(f"  {name:<18}{recipe.help}")  # noqa: T201
        return 0 if argv else 2
    name = ALIASES.get(argv[0], argv[0])
    if name not in RECIPES:
        return _fail(f"unknown recipe {argv[0]!r}; the recipes are {', '.join(RECIPES)}")
    recipe = RECIPES[name]

    def work() -> int:
        config = parse(name, recipe.kind(), argv[1:])
        _heavy(lambda: recipe.function()(config))
        return 0

    return guarded(work)


def _heavy(work: Callable[[], T]) -> T:
    """Do what imports torch, which costs seconds and which no help text needs."""
    from app_data.store.memory import keep_freed_memory

    keep_freed_memory()
    return work()


def guarded(work: Callable[[], int]) -> int:
    """Do the work; whatever a person can mend ends in one sentence on standard error and exit status 2."""
    try:
        return work()
    except Interrupted as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return int(stop.code)
    except (DataError, MissingAssetError, RunError) as error:
        return _fail(str(error))
    except RecursionError:
        return _fail("a file is nested too deep to be read; files that people or this program wrote are not")
    except OSError as error:
        if error.errno is None:  # libraries that say it in their own words
            return _fail(" ".join(str(error).split()))
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}; free or choose another place, and the same command goes on")


def parse(name: str, kind: type[RunConfig], argv: Sequence[str]) -> RunConfig:
    """Settings from the defaults, then a YAML file, then the command line.

    Raises:
        RunError: for a wrong key or value.
    """
    argv = list(argv)
    default = None
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise RunError("--config needs a file")
        default = read_yaml(Path(argv[at + 1]), kind)
        del argv[at : at + 2]
    try:
        return _read(kind, argv, f"hier train {name}", default)
    except ValidationError as error:
        raise RunError(explain(error, kind)) from error


def _read(kind: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Settings from a command line.

    Raises:
        RunError: for a wrong option or value, in one sentence where tyro draws a box.
    """
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            return tyro.cli(kind, args=argv, prog=prog, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise RunError(f"{_sentence(told.getvalue())}; see {prog} --help") from None


def _sentence(box: str) -> str:
    """What a box of tyro says: without its frame, its title, and the help texts in it, which are indented."""
    said = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        text = line.strip("\n|+\u2502\u256d\u256e\u2570\u256f").rstrip()
        if text.lstrip().startswith(("For ful", "For fur", "Argument helptext")):
            break
        if text.strip(" -\u2500") and not text.startswith(" " * 9):
            said.append(text.strip())
    text = " ".join(said).rstrip(".:")
    wrong = re.fullmatch(
        r"Error parsing (\S*): \d+ validation errors? for \w+ (\S+) (.*) \[type=\w+, input_value=(.*), input_type=.*",
        text,
    )
    if wrong is None:
        text = text.removeprefix("Error parsing ").replace(" Perhaps you meant:", "; perhaps you meant")
        return text[:1].lower() + text[1:]
    group, field, rule, value = wrong.groups()
    option = ".".join(part for part in (*group.split("."), field) if part[:1].islower()).replace("_", "-")
    return f"--{option} {rule.removeprefix('Value error, ')}, got {value}".replace("Input should", "should")


def list_recipes() -> int:
    """Print every recipe with what it needs and whether that is here."""
    for name, recipe in RECIPES.items():
        missing = recipe.missing()
        here = f"missing here: {', '.join(missing)}" if missing else "packages: all here"
        print(f"{name}\n  {recipe.help}\n  needs: {recipe.needs}\n  {here}")  # noqa: T201
        print(f"  expect: {recipe.expect or 'nobody has run it here'}\n")  # noqa: T201
    return 0


def _fail(message: str) -> int:
    # Of several processes, one says it.
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return 2
