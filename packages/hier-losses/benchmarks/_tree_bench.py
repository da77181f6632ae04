"""Benchmarks on a tree of the size of iNaturalist 2021; shared by the scripts of this folder.

One thread. Two methods take turns in one process; the ratio is the median of the ratios of neighbouring runs, so that a
machine that is busy with other work slows both sides of each ratio. Milliseconds are medians.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import MIB, Bench, arguments
from torch import Tensor

from hier_losses.taxonomy import Taxonomy

INAT21 = (3, 13, 51, 273, 1103, 4900, 10000)
QUICK = (3, 8, 20, 60, 150)


class TreeBench(Bench):
    """Rows of one device."""

    def __init__(self, device: str, quick: bool) -> None:
        super().__init__(repeats=2)
        self.device, self.quick = device, quick
        self.batch = 8 if quick else 64
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

    def medians(self, *steps: Callable[[], object]) -> tuple[list[float], float | None]:
        """Median milliseconds of each step, and the median of the first over the second."""
        begin = time.perf_counter()
        low, high = (2, 2) if self.quick else (3, 41)
        spent = self.turns(steps, lambda done: done < low or (done < high and time.perf_counter() - begin < 6))
        ratios = [a / b for a, b in zip(*spent[:2], strict=True)] if len(steps) > 1 else []
        return [statistics.median(times) for times in spent], statistics.median(ratios) if ratios else None

    def row(self, name, setting, ours, peer=None, unit="ms", limit=None, ratio=None) -> None:
        """One row; `limit` is the largest ratio that meets the target, which is one for the real sizes."""
        target = None if limit is None or self.quick else f"ratio <= {limit:.3g}"
        self.add(name, setting, ours, peer, unit, target, self.device, ratio)

    def pair(self, name, setting, ours, peer, logits, time_limit=None, memory_limit=None, kept=0) -> None:
        """The time row and the memory row of two functions of the same logits; `kept`: bytes the peer holds all along."""
        torch.testing.assert_close(ours(logits).sum(), peer(logits).sum(), rtol=1e-3, atol=1e-3)
        mine, theirs = self.step(ours, logits), self.step(peer, logits)
        spent, ratio = self.medians(mine, theirs)
        self.row(f"{name}, time", setting, *spent, "ms", time_limit, ratio)
        peaks = self.peak(mine, self.device), self.peak(theirs, self.device) + kept / MIB
        self.row(f"{name}, memory", setting, *peaks, "MiB", memory_limit)


def main(description: str, benches: list[Callable[[TreeBench], None]]) -> None:
    """Run the benchmarks on the CPU, and on CUDA where there is one; write the rows after each of them."""
    parser = arguments(description)
    names = [run.__name__.removeprefix("bench_") for run in benches]
    parser.add_argument("--only", choices=names, help="one of the benchmarks; its rows replace those in the file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices[args.cuda_only :]:
        bench = TreeBench(device, args.quick)
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
