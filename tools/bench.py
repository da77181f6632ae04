"""Run a benchmark of a package: `python tools/bench.py packages/hyper-geom/benchmarks/bench_pairwise.py --quick`.

What the scripts share stands here, outside the packages: timing in turns, peak memory, the rows of a benchmark file. A row's ratio is
ours / peer.
"""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
COLUMNS = "name", "setting", "ours", "peer", "unit", "ratio", "target", "device", "command", "status"


class Bench:
    """Collects rows."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict] = []

    def turns(
        self, steps: tuple[Callable[[], object], ...], again: Callable[[int], bool], warm: bool = True
    ) -> list[list[float]]:
        """Milliseconds of each step; the steps take turns, after one run of each, so that a busy machine hits all alike."""
        for step in steps if warm else ():
            step()
        spent: list[list[float]] = [[] for _ in steps]
        while again(len(spent[0])):
            for step, times in zip(steps, spent, strict=True):
                synchronize()
                start = time.perf_counter()
                step()
                synchronize()
                times.append(1e3 * (time.perf_counter() - start))
        return spent

    def times(self, *steps: Callable[[], object]) -> list[float]:
        """Best milliseconds of each step; of 0 repeats its one run, for steps of minutes."""
        spent = self.turns(steps, lambda done: done < max(1, self.repeats), warm=self.repeats > 0)
        return [min(times) for times in spent]

    def allocated(self, step: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
        """Peak MiB of tensors that one step allocates beyond what is there before it, and its largest one (CPU only)."""
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / MIB, float("nan")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = highest = largest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            highest, largest = max(highest, held), max(largest, event.nbytes())
        return highest / MIB, largest / MIB

    def peak(self, step: Callable[[], object], device: str = "cpu") -> float:
        """Peak MiB of tensors that one step allocates beyond what is there before it."""
        return self.allocated(step, device)[0]

    def add(self, name, setting, ours, peer=None, unit="ms", target=None, device="cpu", ratio=None) -> None:
        """One row; `ours` None stands for a row that this machine cannot measure."""
        if ratio is None and ours is not None and peer:
            ratio = ours / peer
        status = "not measured" if ours is None else "measured" if peer is not None else "ours only"
        command = " ".join(["python", "tools/bench.py", *sys.argv])
        values = (name, setting, ours, peer, unit, ratio, target, device, command, status)
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        shown = ["-" if value is None else f"{value:.4g}" for value in (ours, peer, ratio)]
        print(
            f"{name:46s} {setting:40s} {shown[0]:>10s} {shown[1]:>10s} {unit:6s} {shown[2]:>8s}  {target or ''}",
            flush=True,
        )

    def write(self, path: str | None) -> None:
        """Write the rows, if there is a place for them."""
        if path:
            Path(path).write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def synchronize() -> None:
    """Wait for the graphics card, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def header() -> None:
    """Titles of what `Bench.add` prints."""
    print(f"{'name':46s} {'setting':40s} {'ours':>10s} {'peer':>10s} {'unit':6s} {'ratio':>8s}  target")


def arguments(description: str) -> argparse.ArgumentParser:
    """Flags that every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--cuda-only", action="store_true", help="leave out what runs on the CPU")
    return parser


def main() -> None:
    """Run the script that stands first, with the other arguments; it finds this file by the name bench."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit("name a script first, such as packages/hyper-geom/benchmarks/bench_pairwise.py")
    del sys.argv[0]
    sys.path.insert(1, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
