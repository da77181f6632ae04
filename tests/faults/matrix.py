"""The faults: each ends in the numbers of an undisturbed run, bit for bit, or in one sentence whose remedy leads there."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import children
from faults.children import End, Inject
from faults.families import Family, digests
from faults.together import pair

# Kind of fault -> what it does, for the table.
KINDS = {
    "killed": "killed (SIGKILL) before a write, a rename, a step, then the same command",
    "killed, cold": "the same with empty caches, so that caches are being written too",
    "killed twice": "killed, killed again while it goes on, then the same command",
    "asked to stop": "SIGTERM at the start, in training, in scoring, while the end is written",
    "disk full": "a disk of one of ten sizes, then room",
    "read-only": "a disk that cannot be written, then one that can",
    "vanished": "the run folder or the caches deleted under a running command",
    "two writers": "a second command into the same folder; two cold commands on the same caches",
    "damaged": "one file of a stopped run or of the caches with a flipped byte, cut in half, or empty; an index with two entries swapped",
    "damaged at the end": "one file of a finished run with a flipped byte or cut in half, then the same command",
    "other version": "caches of another version of the format",
    "clock": "a clock that goes back three days between two commands",
    "not a number": "NaN in a weight, in the loss, in the optimizer's state, in an update that is about to be saved",
    "ranks": "two processes: SIGTERM to the first, to the second, to both; then the same command",
}
SIZES = 10
COMMON = 12  # steps of the recipe folder that both processes take, the last of all
SENTENCE = re.compile(r"error: [^\n]+")


@dataclass(frozen=True)
class Fault:
    """One fault of one family: what happens, and the function that tries it and says what went wrong, or ""."""

    kind: str
    label: str
    attempt: Callable[[Family, Path], str]
    cold: bool = False


def faults(family: Family, density: float = 1.0) -> Iterator[Fault]:
    """All faults of a family.

    Args:
        family: with its undisturbed run.
        density: scales how many moments are tried.
    """

    def some(count: int, of: int, shift: float = 0.5) -> list[int]:
        wanted = max(1, round(count * density))
        return sorted({int((i + shift) * of / wanted) for i in range(wanted)})

    def each(count: int, moments: list[children.Moment], shift: float = 0.5) -> list[int]:
        """Moments of every kind before one kind is tried twice: a kind is what happens to which file."""
        kinds: dict[str, list[int]] = {}
        for n in range(len(moments)):
            kinds.setdefault(re.sub(r"[.]tmp-[0-9a-f]+|[0-9a-f]{12,}|[0-9]+", "", " ".join(moments[n])), []).append(n)
        firsts = [found[int(shift * len(found))] for found in kinds.values()]
        more = some(count, len(moments), shift)
        return sorted(
            {*(firsts[i] for i in some(count, len(firsts), shift)), *(more if len(more) > len(firsts) else ())}
        )

    whole = len(family.moments)
    for n in each(16, family.moments):
        yield Fault("killed", _named(family.moments, n), lambda f, p, n=n: _killed(f, p, [n]))
    for n in each(8, family.cold, 0.3):
        yield Fault("killed, cold", _named(family.cold, n), lambda f, p, n=n: _killed(f, p, [n]), cold=True)
    for n in some(6, whole, 0.7):
        for again in (3, 25):
            label = f"{_named(family.moments, n)}, then {again} moments later"
            yield Fault("killed twice", label, lambda f, p, n=n, again=again: _killed(f, p, [n, again]))
    for n in [*some(10, whole, 0.4), 0, whole - 1]:
        yield Fault("asked to stop", _named(family.moments, n), lambda f, p, n=n: _asked(f, p, n))
    if can_mount():
        for size in some(SIZES, SIZES):
            yield Fault("disk full", f"size {size + 1} of {SIZES}", lambda f, p, size=size: _full(f, p, size))
        yield Fault("read-only", "from the start", _read_only)
    for n in some(3, whole):
        for what in ("run", "home"):
            label = f"{what}, {_named(family.moments, n)}"
            yield Fault("vanished", label, lambda f, p, n=n, what=what: _vanished(f, p, n, what))
    yield Fault("two writers", "one folder", _two_writers)
    yield Fault("two writers", "the same caches", _two_caches, cold=True)
    where = family.at("step", 0.7)
    every = max(1, round(1 / density))
    for file, how in _damages(family, where)[::every]:
        yield Fault("damaged", f"{file}, {how}", lambda f, p, a=file, b=how: _damaged(f, p, where, a, b))
    filled = [file for file in family.kept if (family.root / "whole" / "run" / file).stat().st_size]
    for file, how in [(file, how) for file in filled for how in ("flipped", "cut")][::every]:
        yield Fault("damaged at the end", f"{file}, {how}", lambda f, p, a=file, b=how: _damaged_end(f, p, a, b))
    yield Fault("other version", "the caches", _other_version, cold=True)
    yield Fault("clock", "three days back", lambda f, p: _killed(f, p, [where], back=3 * 86400.0))
    for what in ("weight", "loss", "optimizer", "update"):
        for share in (0.3, 0.8)[: 1 if density < 1 else 2]:
            label = f"{what}, after {share:.0%} of the steps"
            yield Fault("not a number", label, lambda f, p, a=what, b=share: _not_finite(f, p, a, b))
    if family.name == "folder":
        # The first process has stages of its own, before and after those of both.
        ours = sum(what == "step" for what, _ in family.moments) - COMMON // 2
        for name, asked in {
            "the first": {0: ours}, "the second": {1: COMMON // 2}, "both": {0: ours, 1: COMMON // 2},
            "the first, while the second waits": {0: 5},
        }.items():  # fmt: skip
            yield Fault("ranks", f"SIGTERM to {name}", lambda f, p, asked=asked: _ranks(f, p, asked))


def _named(moments: list[children.Moment], n: int) -> str:
    what, where = moments[n]
    return f"moment {n} of {len(moments)}: {what} {re.sub(r'[.]tmp-[0-9a-f]+', '', where)}".strip()


def at(number: int, act: Callable[[], object]) -> Inject:
    """Do something at one moment."""

    def inject(n: int, moment: children.Moment) -> None:
        if n == number:
            act()

    return inject


def kill(number: int) -> Inject:
    """SIGKILL at one moment."""
    return at(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _same(family: Family, folder: Path, end: End) -> str:
    """What is wrong with a run that should have ended well."""
    if end.status:
        return f"ended with {end.status}: {end.said[-300:]}"
    return family.differs(folder / "work" / "run")


def _said(end: End, *words: str) -> str:
    """What is wrong with an end that should be one sentence with these words in it."""
    if end.status != 2 or not SENTENCE.fullmatch(end.sentence) or "Traceback" in end.said:
        return f"not one sentence (status {end.status}): {end.said[-300:]}"
    missing = [word for word in words if word not in end.sentence]
    return f"the sentence does not say {missing[0]!r}: {end.sentence}" if missing else ""


def _go_on(family: Family, folder: Path, inject: Inject | None = None) -> str:
    return _same(family, folder, children.run(folder, family.command, inject))


def _killed(family: Family, folder: Path, moments: list[int], back: float = 0.0) -> str:
    for n in moments:
        end = children.run(folder, family.command, kill(n))
        if end.status not in (-signal.SIGKILL, 0):
            return f"ended with {end.status}: {end.said[-300:]}"
    return _go_on(family, folder, _clock(back) if back else None)


def _clock(back: float) -> Inject:
    now = time.time
    return at(0, lambda: setattr(time, "time", lambda: now() - back))


def _asked(family: Family, folder: Path, n: int) -> str:
    end = children.run(folder, family.command, at(n, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    if end.status == 128 + signal.SIGTERM:
        if "the same command goes on" not in end.sentence or "Traceback" in end.said:
            return f"it does not say that the same command goes on: {end.said[-300:]}"
    elif end.status not in (0, -signal.SIGTERM):
        return f"ended with {end.status}: {end.said[-300:]}"
    return _go_on(family, folder)


# -- disks ------------------------------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    try:
        probe = Path("/tmp", f"faults-{os.getpid()}")
        probe.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "faults", str(probe)], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", str(probe)], capture_output=True, check=False)
        probe.rmdir()
    except OSError:
        return False
    return done.returncode == 0


class _Disk:
    """A disk of its own for the working folder of a trial."""

    def __init__(self, folder: Path, size: int) -> None:
        self.work, self.before = folder / "work", folder / "before"
        self.work.rename(self.before)
        self.work.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "faults", str(self.work))
        shutil.copytree(self.before, self.work, dirs_exist_ok=True)

    def __enter__(self) -> "_Disk":
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.work)], check=False)

    def again(self, options: str) -> None:
        self._mount("-o", f"remount,{options}", str(self.work))

    @staticmethod
    def _mount(*args: str) -> None:
        subprocess.run(["mount", *args], check=True, capture_output=True)


def _pages(folder: Path) -> int:
    """Bytes on a tmpfs: whole pages."""
    return sum((p.stat().st_size + 4095) // 4096 * 4096 + 4096 for p in folder.rglob("*"))


def _full(family: Family, folder: Path, size: int) -> str:
    held, needed = _pages(folder / "work"), _pages(family.root / "whole") - _pages(folder / "work")
    with _Disk(folder, held + 65536 + int(needed * size / SIZES)) as disk:
        end = children.run(folder, family.command)
        if end.status and (wrong := _said(end, "No space left on device")):
            return wrong
        disk.again(f"size={4 * (held + needed) + 2**26}")
        return _go_on(family, folder)


def _read_only(family: Family, folder: Path) -> str:
    with _Disk(folder, 4 * _pages(family.root / "whole") + 2**26) as disk:
        disk.again("ro")
        if wrong := _said(children.run(folder, family.command), "Read-only"):
            return wrong
        disk.again("rw")
        return _go_on(family, folder)


def _vanished(family: Family, folder: Path, n: int, what: str) -> str:
    gone = folder / "work" / what
    end = children.run(folder, family.command, at(n, lambda: shutil.rmtree(gone, ignore_errors=True)))
    if end.status and (wrong := _said(end)):
        return wrong
    return _mended(family, folder)


# -- two at once ------------------------------------------------------------------------------------------------------------------


def _two_writers(family: Family, folder: Path) -> str:
    n = family.at("step", 0.5)
    first = children.start(folder, family.command, at(n, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    os.waitpid(first, os.WUNTRACED)
    second = children.run(folder, family.command, env={"FAULTS": "second"})
    os.kill(first, signal.SIGCONT)
    end = children.wait(first, folder)
    return _said(second, "is at work in", f"process {first}") or _same(family, folder, end)


def _two_caches(family: Family, folder: Path) -> str:
    """Two cold commands, stopped in turn so that they write their caches in each other's middle."""
    twins = [folder, folder.with_name(f"{folder.name}-twin")]
    shutil.copytree(folder / "work", twins[1] / "work")
    shutil.rmtree(twins[1] / "work" / "home")
    (twins[1] / "work" / "home").symlink_to(folder / "work" / "home")
    n = next((n for n, (what, where) in enumerate(family.cold) if what == "rename" and "home" in where), 0)
    first = children.start(twins[0], family.command, at(n, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    os.waitpid(first, os.WUNTRACED)
    end = children.run(twins[1], family.command)
    os.kill(first, signal.SIGCONT)
    return _same(family, twins[0], children.wait(first, twins[0])) or _same(family, twins[1], end)


# -- damage -----------------------------------------------------------------------------------------------------------------------


def _damages(family: Family, where: int) -> list[tuple[str, str]]:
    """Files of a stopped run and of the caches, each with a damage; the stopped run is kept in `stopped/`."""
    stopped = family.root / "stopped"
    if not stopped.exists():
        folder = family.trial("stopping")
        children.run(folder, family.command, kill(where))
        shutil.copytree(folder / "work", stopped)
    files = sorted(p for p in stopped.rglob("*") if p.is_file() and p.stat().st_size and ".tmp-" not in str(p))
    names = [
        p.relative_to(stopped).as_posix() for p in files if p.is_relative_to(stopped / "run") or ".cache" in p.parts
    ]
    found = [(name, how) for name in names if not name.endswith(".lock") for how in ("flipped", "cut", "empty")]
    # The pixels stay as they are: two pictures only change their names.
    return found + [
        (name, "two entries swapped") for name in names if name.endswith("/index.json") and ".cache" in name
    ]


def _spoil(path: Path, how: str) -> None:
    if how == "two entries swapped":
        index = json.loads(path.read_text(encoding="utf-8"))
        kept = index["kept"]
        kept[0], kept[-1] = kept[-1], kept[0]
        path.write_text(json.dumps(index), encoding="utf-8")
        return
    content = bytearray(path.read_bytes())
    if how == "flipped":
        # A digit where there is one, so that text stays readable and only says something else.
        digits = [i for i, byte in enumerate(content) if 48 <= byte < 58]
        text = len(digits) > 1 and path.suffix in (".json", ".jsonl", ".yaml", ".md", ".csv")
        place = digits[len(digits) // 2] if text else len(content) * 2 // 3
        content[place] ^= 1
    path.write_bytes(content if how == "flipped" else content[: len(content) // 2] if how == "cut" else b"")


def _damaged(family: Family, folder: Path, where: int, file: str, how: str) -> str:
    shutil.rmtree(folder / "work")
    shutil.copytree(family.root / "stopped", folder / "work")
    _spoil(folder / "work" / file, how)
    return _mended(family, folder)


def _damaged_end(family: Family, folder: Path, file: str, how: str) -> str:
    shutil.rmtree(folder / "work")
    shutil.copytree(family.root / "whole", folder / "work")
    _spoil(folder / "work" / "run" / file, how)
    return _mended(family, folder)


def _mended(family: Family, folder: Path) -> str:
    """The command ends well, or says what to delete, and then it ends well."""
    end = children.run(folder, family.command)
    for _ in range(4):
        if end.status != 2:
            break
        if wrong := _said(end, "delete "):
            return wrong
        target = _to_delete(folder / "work", end.sentence)
        if target is None:
            return f"the sentence names nothing that can be deleted: {end.sentence}"
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        end = children.run(folder, family.command)
    return _same(family, folder, end)


def _to_delete(work: Path, sentence: str) -> Path | None:
    """The file or folder that a sentence says to delete: by name, or what it speaks of."""
    after = sentence.split("delete ", 1)[1].split()[0].rstrip(",;")
    subject = next((word for word in sentence.removeprefix("error: ").split() if (work / word).exists()), "")
    found = work / (subject if after in ("it", "this", "that") else after)
    return found if found != work and found.exists() else None


def _other_version(family: Family, folder: Path) -> str:
    import app_data.store.cache as cache

    known, cache._FORMAT = cache._FORMAT, cache._FORMAT + 1
    try:
        end = children.run(folder, family.command)
    finally:
        cache._FORMAT = known
    if end.status and (wrong := _said(end)):
        return wrong
    shutil.rmtree(folder / "work" / "run")
    return _go_on(family, folder)


# -- numbers ----------------------------------------------------------------------------------------------------------------------


def _not_finite(family: Family, folder: Path, what: str, share: float) -> str:
    steps = [n for n, (kind, _) in enumerate(family.moments) if kind == "step"]
    target = min(int(share * len(steps)), len(steps) - 2)

    def spoil() -> None:
        import app_train.core.fit as loop

        take, seen, spoiled = loop._Loop.take, [], []

        def spoilt(self, step, stop):
            seen.append(step)
            if what == "update":
                done = take(self, step, stop)
                saved = step.number % self.stage.save_every == 0 or step.index == step.total - 1
                if len(seen) > target and saved and not spoiled:
                    spoiled.append(step)
                    _spoil_step(self, "weight")
                return done
            if len(seen) == target + 1:
                _spoil_step(self, what)
            return take(self, step, stop)

        loop._Loop.take = spoilt

    end = children.run(folder, family.command, at(0, spoil))
    if end.status == 0:
        # In the last step of a stage the optimizer's state dies unused.
        return _same(family, folder, end)
    return _said(end) or _go_on(family, folder)


def _spoil_step(loop, what: str) -> None:
    import dataclasses

    import torch

    first = next(iter(loop.chosen.values()))
    if what == "weight":
        with torch.no_grad():
            first.view(-1)[0] = torch.nan
    elif what == "optimizer":
        for state in loop.plain.state.values():
            for value in state.values():
                if torch.is_tensor(value) and value.ndim:
                    value.view(-1)[0] = torch.nan
    else:
        forward = loop.stage.forward

        def spoilt(*args):
            loss, values = forward(*args)
            return loss * torch.nan, values

        loop.stage = dataclasses.replace(loop.stage, forward=spoilt)


# -- ranks ------------------------------------------------------------------------------------------------------------------------


def _ranks(family: Family, folder: Path, asked: dict[int, int]) -> str:
    whole = folder.with_name(f"{folder.name}-whole")
    shutil.copytree(folder / "work", whole / "work")
    ends = pair(whole, family.command)
    if any(end.status for end in ends):
        return f"two undisturbed processes ended with {[end.status for end in ends]}: {ends[0].said[-300:]}"

    def ask_at(step: int) -> Inject:
        seen = []

        def ask(n: int, moment: children.Moment) -> None:
            seen.extend([n] if moment[0] == "step" else [])
            if moment[0] == "step" and len(seen) == step:
                os.kill(os.getpid(), signal.SIGTERM)

        return ask

    ends = pair(folder, family.command, [ask_at(asked[rank]) if rank in asked else None for rank in range(2)])
    # Outside of training a process waits for the first one, and is left by it; the first speaks for all.
    left = [rank > 0 and end.status == 2 for rank, end in enumerate(ends)]
    well = [end.status == 143 or alone for end, alone in zip(ends, left, strict=True)]
    if not all(well) or all(left) or any("Traceback" in end.said for end in ends):
        return f"ended with {[end.status for end in ends]}: {[end.said[-200:] for end in ends]}"
    ends = pair(folder, family.command)
    if any(end.status for end in ends):
        return f"going on ended with {[end.status for end in ends]}: {ends[0].said[-300:]}"
    a, b = digests(whole / "work" / "run"), digests(folder / "work" / "run")
    wrong = [name for name in a if name not in family.numbers and a[name] != b.get(name)]
    return f"{wrong[0]} differs from two undisturbed processes" if wrong else ""
