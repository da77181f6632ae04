"""Timing in turns, peak memory and the rows of a benchmark file; shared by the scripts of this folder."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
COLUMNS = "name", "setting", "ours", "peer", "unit", "ratio", "target", "device", "command", "status"


class Bench:
    """Collects rows; a row's ratio is ours/peer."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict] = []

    def times(self, *steps: Callable[[], object]) -> list[float]:
        """Best milliseconds of each step; the steps take turns, so that a busy machine hits all alike."""
        spent: list[list[float]] = [[] for _ in steps]
        for _ in range(self.repeats + 1):
            for step, times in zip(steps, spent, strict=True):
                synchronize()
                start = time.perf_counter()
                step()
                synchronize()
                times.append(1e3 * (time.perf_counter() - start))
        return [min(times) for times in spent]

    def peak(self, step: Callable[[], object], device: str = "cpu") -> float:
        """Peak MiB of tensors that one step allocates beyond what is there before it."""
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return highest / MIB

    def add(self, name, setting, ours, peer=None, unit="ms", target=None, device="cpu") -> None:
        """One row; `ours` None stands for a row that this machine cannot measure."""
        ratio = ours / peer if ours is not None and peer else None
        status = "not measured" if ours is None else "measured" if peer is not None else "ours only"
        command = " ".join(["python", *sys.argv])
        row = dict(zip(COLUMNS, (name, setting, ours, peer, unit, ratio, target, device, command, status), strict=True))
        self.rows.append(row)
        shown = ["-" if value is None else f"{value:.4g}" for value in (ours, peer, ratio)]
        print(
            f"{name:44s} {setting:34s} {shown[0]:>10s} {shown[1]:>10s} {unit:4s} {shown[2]:>8s}  {target or ''}",
            flush=True,
        )

    def write(self, path: str | None) -> None:
        if path:
            Path(path).write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--cuda-only", action="store_true", help="leave out what runs on the CPU")
    return parser


def header() -> None:
    print(f"{'name':44s} {'setting':34s} {'ours':>10s} {'peer':>10s} {'unit':4s} {'ratio':>8s}  target")
