"""What must turn red: one safeguard after the other is broken in a copy of the sources, and the faults it is for are tried there."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CORE = "apps/train/src/app_train/core"
_STORE = "apps/data/src/app_data/store"


@dataclass(frozen=True)
class Mutation:
    """A safeguard, how it is broken, and what must notice.

    Attributes:
        what: the safeguard.
        file: where it stands.
        old, new: text that stands there once, and what replaces it.
        kind: the faults that must end badly then.
        family: the recipe they are tried on.
    """

    what: str
    file: str
    old: str
    new: str
    kind: str
    family: str = "mat-clip"


MUTATIONS = (
    Mutation(
        "a checkpoint appears whole",
        f"{_CORE}/checkpoint.py",
        "    with new_folder(final) as temporary:\n",
        "    final.mkdir(parents=True, exist_ok=True)\n    (final / MARKER).touch()\n    for temporary in (final,):\n",
        "killed",
    ),
    Mutation(
        "a checkpoint holds the optimizer's state",
        f"{_CORE}/fit.py",
        "made.load_state_dict(state)",
        "pass",
        "killed",
        "mini-clip",  # mat-clip trains by SGD without momentum, which has no state to lose
    ),
    Mutation("records are cut after the checkpoint", f"{_CORE}/records.py", "os.truncate(self.path, len(before))", "pass", "killed"),
    Mutation("records are those that were written", f"{_CORE}/records.py", "if known and", "if False and", "damaged", "mini-clip"),
    Mutation("spoilt weights are not kept", f"{_CORE}/fit.py", "loop.check(step)", "pass", "not a number", "mini-clip"),
    Mutation(
        "a cache index is sealed",
        f"{_STORE}/cache.py",
        "read_sealed(",
        "(lambda path, **_: json.loads(path.read_text()))(",
        "damaged",
    ),
    Mutation(
        "a finished row speaks for its files",
        "apps/eval/src/app_eval/measure/cells.py",
        "if broken := seal_broken(path):",
        "if broken := '':",
        "damaged",
    ),
    Mutation(
        "a finished run speaks for its files",
        f"{_CORE}/run_folder.py",
        "if any(file_digest(self.out / name) != known for name, known in sums.items()):",
        "if not sums:",
        "damaged at the end",
    ),
    Mutation(
        "a folder has one writer",
        f"{_CORE}/run_folder.py",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "two writers",
    ),
    Mutation("ranks agree on the end", f"{_CORE}/fit.py", "int(table[:, -1].max())", "asked", "ranks", "folder"),
)  # fmt: skip


def mutate(only: str = "") -> int:
    """Break each safeguard; gives the number of those that nothing noticed.

    Args:
        only: a part of the name of a safeguard.
    """
    missed = 0
    for mutation in (m for m in MUTATIONS if only in m.what):
        with tempfile.TemporaryDirectory(prefix="mutated-") as folder:
            noticed, said = _noticed(mutation, Path(folder))
        missed += not noticed
        print(f"{'noticed' if noticed else 'MISSED '}  {mutation.what}: {said}", flush=True)
    return missed


def _noticed(mutation: Mutation, copy: Path) -> tuple[bool, str]:
    for name in ("packages", "apps", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times: the mutation needs it once"
        )
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    sources = os.pathsep.join(str(folder) for folder in sorted(copy.glob("*/*/src")))
    command = [
        sys.executable,
        str(copy / "tests" / "faults"),
        "--families",
        mutation.family,
        "--kinds",
        mutation.kind,
        "--density",
        "2",
        "--first",
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": sources}, cwd=copy, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    told = next(
        (line.strip() for line in lines if line.startswith(f"{mutation.family}: {mutation.kind}: ")),
        done.stderr.strip()[-200:],
    )
    return done.returncode == 1 and any(line.startswith(mutation.family) for line in lines), told
