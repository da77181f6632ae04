"""The recipes in their smallest setting, what an undisturbed run of each leaves, and when it changes something."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from faults import children
from golden.recipes import RECIPES
from golden.record import leaves

NAMES = ("folder", "emoji", "mat", "mat-clip", "mini-clip", "blip-mini", "icl-mini", "icl-distill")
_QUIET = ["--no-tensorboard"]
# Written anew by every command, or of this command alone.
_APART = {".lock", "manifest.json", "config.resolved.yaml"}


@dataclass
class Family:
    """A recipe and its undisturbed run.

    Attributes:
        name: of the recipe.
        root: holds its data, `before/` (what its earlier commands leave) and `whole/` (its run, with filled caches).
        earlier: commands that come before.
        command: the recipe's own, which writes to `run`.
        moments: what happened with filled caches, and `cold` from the beginning, in order.
        kept: digest of each file of the run that is the same each time.
        numbers: the numbers of JSON files that also hold times.
        modules: what its process had imported.
    """

    name: str
    root: Path
    earlier: list[list[str]]
    command: list[str]
    moments: list[children.Moment] = field(default_factory=list)
    cold: list[children.Moment] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, dict] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)

    def trial(self, name: str, *, cold: bool = False) -> Path:
        """A new folder in which the command can run."""
        folder = self.root / "trials" / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root / ("before" if cold else "warm"), folder / "work")
        return folder

    def differs(self, run: Path) -> str:
        """What differs from the undisturbed run; "" if nothing does."""
        found = digests(run)
        for name, known in self.kept.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != known and name not in self.numbers:
                return f"{name} differs"
        for name, known in self.numbers.items():
            if _numbers(run / name) != known:
                return f"numbers of {name} differ"
        more = sorted(set(found) - set(self.kept))
        return f"{more[0]} was left behind" if more else ""

    def at(self, what: str, share: float) -> int:
        """Number of the moment of a kind, by its share of all of that kind."""
        chosen = [n for n, (kind, _) in enumerate(self.moments) if kind == what]
        return chosen[min(int(share * len(chosen)), len(chosen) - 1)]


def settle(home: Path) -> None:
    """Miniature packages and one thread, for this process and its children."""
    from golden import record

    for key, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}.items():
        os.environ[key] = value
    record.settle(home)


def prepare(name: str, root: Path) -> Family:
    """Run a recipe three times undisturbed: what differs then is no result."""
    given = root / "given"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        *earlier, command = RECIPES[name].prepare(given)
    own = [part if part != str(given / "run") else "run" for part in command]
    family = Family(name, root, earlier, [*own, "--save-every", "2", *_QUIET[: "--no-tensorboard" not in own]])
    (root / "before" / "home").mkdir(parents=True)
    for number, argv in enumerate(earlier):
        _must(children.run(family.trial(f"earlier-{number}", cold=True), argv), argv)
    first = family.trial("first", cold=True)
    family.cold = _record(first, family.command)
    shutil.copytree(first / "work", root / "warm", ignore=shutil.ignore_patterns("run"))
    second, third = family.trial("second"), family.trial("third")
    family.moments = _record(second, family.command)
    _record(third, family.command)
    runs = [folder / "work" / "run" for folder in (first, second, third)]
    found = [digests(run) for run in runs]
    if not found[0].keys() == found[1].keys() == found[2].keys():
        raise RuntimeError(f"two runs of {name} leave other files: {sorted(found[0].keys() ^ found[1].keys())}")
    family.kept = found[0]
    timed = [n for n in found[0] if n.endswith(".json") and b"second" in (runs[0] / n).read_bytes()]
    for file in {*timed, *(n for n in found[0] if not found[0][n] == found[1][n] == found[2][n])}:
        family.numbers[file] = _numbers(runs[0] / file)
    family.modules = (first / "modules").read_text().split()
    if wrong := [said for run in runs[1:] if (said := family.differs(run))]:
        raise RuntimeError(f"two undisturbed runs of {name} differ: {wrong[0]}")
    shutil.copytree(second / "work", root / "whole")
    return family


def _must(end: children.End, argv: list[str]) -> None:
    if end.status:
        raise RuntimeError(f"{' '.join(argv)} ended with {end.status}:\n{end.said[-2000:]}")


def _record(folder: Path, command: list[str]) -> list[children.Moment]:
    """The moments of an undisturbed run."""
    log = folder / "moments"

    def note(number: int, moment: children.Moment) -> None:
        with log.open("a") as file:
            file.write(json.dumps(moment) + "\n")
        if moment[0] == "rename" and "manifest.json" in moment[1]:
            (folder / "modules").write_text("\n".join(sorted(sys.modules)))

    _must(children.run(folder, command, note), command)
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def digests(run: Path) -> dict[str, str]:
    """The sha256 of each file of a run that is a result."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name not in _APART] if run.exists() else []
    return {p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def _numbers(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in leaves(content).items() if "second" not in k}
