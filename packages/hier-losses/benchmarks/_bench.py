"""Timing in turns, peak memory and the rows of a benchmark file; shared by the scripts of this folder.

One thread. Two methods take turns in one process; the ratio is the median of the ratios of neighbouring runs, so that a
machine that is busy with other work slows both sides of each ratio. Milliseconds are medians.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hier_losses.taxonomy import Taxonomy

MIB = 2**20
COLUMNS = "name", "setting", "ours", "peer", "unit", "ratio", "target", "device", "command", "status"
INAT21 = (3, 13, 51, 273, 1103, 4900, 10000)
QUICK = (3, 8, 20, 60, 150)


class Bench:
    """Collects rows; a row's ratio is ours/peer."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.batch = 8 if quick else 64
        self.rows: list[dict] = []
        # The sizes and the rate of lone leaves of iNaturalist 2021.
        self.tax = Taxonomy.synthetic(QUICK if quick else INAT21, None if quick else 0.3175, seed=0).to(device)

    def inputs(self, tax: Taxonomy, leaf: bool = False) -> tuple[Tensor, Tensor]:
        """Logits over nodes or leaves, and leaf targets."""
        generator = torch.Generator().manual_seed(0)
        target = tax.leaf.cpu()[torch.randint(tax.num_leaves, (self.batch,), generator=generator)]
        logits = torch.randn(self.batch, tax.num_leaves if leaf else tax.num_nodes, generator=generator)
        return logits.to(self.device), target.to(self.device)

    def step(self, function: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], None]:
        """Forward and backward."""

        def run() -> None:
            function(logits.detach().requires_grad_()).sum().backward()

        return run

    def times(self, *steps: Callable[[], object]) -> tuple[list[float], float | None]:
        """Median milliseconds of each step, and the median of the first over the second."""
        for step in steps:
            step()
        spent: list[list[float]] = [[] for _ in steps]
        begin = time.perf_counter()
        low, high = (2, 2) if self.quick else (3, 41)
        while len(spent[0]) < low or (len(spent[0]) < high and time.perf_counter() - begin < 6):
            for step, found in zip(steps, spent, strict=True):
                self.wait()
                start = time.perf_counter()
                step()
                self.wait()
                found.append(1e3 * (time.perf_counter() - start))
        ratios = [a / b for a, b in zip(*spent[:2], strict=True)] if len(steps) > 1 else []
        return [statistics.median(found) for found in spent], statistics.median(ratios) if ratios else None

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self, step: Callable[[], object]) -> tuple[float, float]:
        """Peak MiB that one step holds beyond what is there before it, and its largest single tensor (CPU only)."""
        step()
        if self.device == "cuda":
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

    def add(self, name, setting, ours, peer=None, unit="ms", limit=None, ratio=None) -> None:
        """One row; `limit` is the largest ratio that meets the target."""
        if ratio is None and peer is not None:
            ratio = ours / peer
        limit = None if self.quick else limit  # the targets are for the real sizes
        status = "measured" if peer is not None else "ours only"
        target = None if limit is None else f"ratio <= {limit:.3g}"
        command = " ".join(["python", *sys.argv])
        values = (name, setting, ours, peer, unit, ratio, target, self.device, command, status)
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        shown = ["-" if x is None else f"{x:.4g}" for x in (ours, peer, ratio)]
        missed = " MISSED" if limit is not None and ratio > limit else ""
        print(
            f"{name:48s} {shown[0]:>10s} {shown[1]:>10s} {unit:10s} {shown[2]:>9s}  {target or ''}{missed}", flush=True
        )

    def pair(self, name, setting, ours, peer, logits, time_limit=None, memory_limit=None, kept=0) -> None:
        """The time row and the memory row of two functions of the same logits; `kept`: bytes the peer holds all along."""
        torch.testing.assert_close(ours(logits).sum(), peer(logits).sum(), rtol=1e-3, atol=1e-3)
        mine, theirs = self.step(ours, logits), self.step(peer, logits)
        spent, ratio = self.times(mine, theirs)
        self.add(f"{name}, time", setting, *spent, "ms", time_limit, ratio)
        peaks = self.memory(mine)[0], self.memory(theirs)[0] + kept / MIB
        self.add(f"{name}, memory", setting, *peaks, "MiB", memory_limit)


def main(description: str, benches: list[Callable[[Bench], None]]) -> None:
    """Run the benchmarks on the CPU, and on CUDA where there is one; write the rows after each of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--cuda-only", action="store_true", help="leave out what runs on the CPU")
    names = [run.__name__.removeprefix("bench_") for run in benches]
    parser.add_argument("--only", choices=names, help="one of the benchmarks; its rows replace those in the file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices[args.cuda_only :]:
        bench = Bench(device, args.quick)
        for name, run in zip(names, benches, strict=True):
            if args.only in (None, name):
                run(bench)
                if args.json:
                    write(Path(args.json), bench.rows, devices)


def write(path: Path, rows: list[dict], devices: list[str]) -> None:
    """Put rows into the file in place of those of the same name; what has no CUDA device to run on is kept as such."""
    empty = {**dict.fromkeys(("ours", "peer", "ratio")), "device": "cuda", "status": "not measured"}
    rows = rows + ([] if "cuda" in devices else [{**row, **empty} for row in rows])
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    new = {(row["name"], row["device"]) for row in rows}
    rows = [row for row in known if (row["name"], row["device"]) not in new] + rows
    rows.sort(key=lambda row: row["device"])
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
