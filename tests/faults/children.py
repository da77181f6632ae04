"""Commands in forked children: everything is imported already, and a chosen thing goes wrong at a chosen moment."""

import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# What Python announces before it changes something on disk, with the path as the first argument.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR

SECONDS = 300  # more is a hang: the system ends the child then

Moment = tuple[str, str]  # what was about to happen, and to which file
Inject = Callable[[int, Moment], None]


@dataclass(frozen=True)
class End:
    """How a command ended.

    Attributes:
        status: its exit status; minus the number of the signal that killed it.
        said: what stood on its standard error.
    """

    status: int
    said: str

    @property
    def sentence(self) -> str:
        """The last line of what it said."""
        lines = self.said.strip().splitlines()
        return lines[-1] if lines else ""


def warm(modules: Sequence[str]) -> None:
    """Import what children will need; a module that cannot be imported by name is theirs to import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            with suppress(Exception):
                importlib.import_module(name)


def start(
    folder: Path, command: Sequence[str], inject: Inject | None = None, env: Mapping[str, str] | None = None
) -> int:
    """Fork a child that runs a command of `apps/train`; gives its process number.

    Args:
        folder: holds `work/`, its working folder, with `home/` in it as its home folder, and receives what it says.
        command: the recipe and its options.
        inject: called before every change below `work/` and before every training step, with the number of the moment, from 0.
        env: environment variables.
    """
    work = folder / "work"
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update({"HOME": str(work / "home"), **(env or {})})
        os.chdir(work)
        said = os.open(folder / f"said-{(env or {}).get('RANK', '0')}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        signal.alarm(SECONDS)
        status = _work(work, command, inject)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _work(work: Path, command: Sequence[str], inject: Inject | None) -> int:
    import torch

    from app_train.cli import main

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if inject is not None:
        _watch(work, inject)
    return main(list(command))


def wait(child: int, folder: Path, rank: int = 0) -> End:
    """Wait for a child to end."""
    _, status = os.waitpid(child, 0)
    said = (folder / f"said-{rank}").read_text(encoding="utf-8", errors="replace")
    return End(os.waitstatus_to_exitcode(status), said)


def run(
    folder: Path, command: Sequence[str], inject: Inject | None = None, env: Mapping[str, str] | None = None
) -> End:
    """Run a command to its end."""
    return wait(start(folder, command, inject, env), folder)


def _watch(work: Path, inject: Inject) -> None:
    """Call `inject` before every moment of this process."""
    import app_train.core.fit as loop

    count, inside, above = [0], [False], f"{work}{os.sep}"

    def moment(what: str, path: object) -> None:
        if inside[0]:
            return
        inside[0] = True
        try:
            inject(count[0], (what, str(path)))
        finally:
            count[0] += 1
            inside[0] = False

    def hook(event: str, args: tuple) -> None:
        if inside[0] or (event != "open" and event not in CHANGES) or not isinstance(args[0], (str, bytes)):
            return
        if event == "open" and not (args[2] or 0) & WRITING:
            return
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.startswith(above):
            moment(event.removeprefix("os."), os.path.relpath(path, work))

    sync, take = os.fsync, loop._Loop.take

    def synced(handle: int) -> None:
        moment("sync", "")
        sync(handle)

    def taken(self, step, stop):
        moment("step", str(step.number))
        return take(self, step, stop)

    os.fsync, loop._Loop.take = synced, taken
    sys.addaudithook(hook)
