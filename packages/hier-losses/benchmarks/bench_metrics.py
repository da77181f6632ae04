"""Time of decoders and metrics against the dense or listed methods they replace, side by side in one process.

    python bench_metrics.py --json OUT.json [--quick]

Peers are our own rewrites of the usual methods: a K x K cost matrix for conditional risk minimisation, a list of valid
paths for the inconsistency rate, a per-sample loop over the path for consistent accuracy. Times are medians.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torchmetrics import MetricCollection

from hier_losses import metrics as M
from hier_losses.decoding import bottom_up, crm, joint_path, level_argmax, top_down
from hier_losses.functional.tree_ops import lca_height
from hier_losses.taxonomy import Taxonomy
from hier_losses.treecuts import sample_cuts

INAT21 = (3, 13, 51, 273, 1103, 4900, 10000)
QUICK = (3, 8, 20, 60, 150)


class Bench:
    def __init__(self, device: str, quick: bool):
        self.device, self.quick = device, quick
        self.batch = 8 if quick else 64
        self.repeats = 2 if quick else 11
        self.rows: list[dict] = []
        self.tax = Taxonomy.synthetic(QUICK if quick else INAT21, None if quick else 0.3175, seed=0).to(device)

    def logits(self, num: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(num, self.tax.num_nodes, generator=generator).to(self.device)

    def targets(self, num: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return self.tax.leaf[torch.randint(self.tax.num_leaves, (num,), generator=generator).to(self.device)]

    def run(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def time(self, *functions: Callable[[], object]) -> list[float]:
        """Median milliseconds; the functions take turns, so that a busy machine hits all alike."""
        for function in functions:
            self.run(function)
        spent = [[self.run(function) for function in functions] for _ in range(self.repeats)]
        return [statistics.median(times) for times in zip(*spent, strict=True)]

    def add(
        self, name: str, setting: str, ours: float, peer: float | None, unit: str = "ms", limit: float | None = None
    ) -> None:
        ratio = None if peer is None else ours / peer
        row = {
            "name": name,
            "setting": setting,
            "ours": ours,
            "peer": peer,
            "unit": unit,
            "ratio": ratio,
            "target": None if limit is None else f"ours/peer <= {limit:.3g}",
            "device": self.device,
            "command": " ".join(["python", *sys.argv]),
            "status": "measured" if peer is not None else "ours only",
        }
        self.rows.append(row)
        shown = ["-" if x is None else f"{x:.4g}" for x in (ours, peer, ratio)]
        print(f"{name:44s} {shown[0]:>10s} {shown[1]:>10s} {unit:9s} {shown[2]:>9s}  {row['target'] or ''}", flush=True)


def bench_crm(bench: Bench) -> None:
    tax, z = bench.tax, bench.logits(bench.batch)
    # Row by row: K x K paths of D nodes at once would need gigabytes.
    leaf = tax.leaf
    cost = torch.cat([lca_height(row[:, None], leaf, tax).float() for row in leaf.split(64)])

    def dense() -> torch.Tensor:
        return tax.paths[leaf[(z[:, leaf].softmax(1) @ cost).argmin(1)]]

    # Equal up to near ties, which single precision breaks either way.
    assert (crm(z, tax)[:, 0] == dense()[:, 0]).float().mean() > 0.9
    size = cost.numel() * 4 / 2**20
    setting = f"K={tax.num_leaves}, B={bench.batch}; peer: K x K matrix of {size:.0f} MiB"
    bench.add("crm", setting, *bench.time(lambda: crm(z, tax), dense), limit=1 / 1.5)


def bench_tice(bench: Bench) -> None:
    tax, num = bench.tax, 200 if bench.quick else 5000
    generator = torch.Generator().manual_seed(2)
    pred = torch.stack(
        [
            first + torch.randint(size, (num,), generator=generator)
            for first, size in zip(tax.level_ptr[:-1].cpu(), tax.level_sizes, strict=True)
        ],
        1,
    ).to(bench.device)
    consistent = torch.arange(num, device=bench.device) % 2 == 0
    pred = torch.where(consistent[:, None], tax.paths[bench.targets(num)], pred)
    valid, rows = tax.paths[tax.leaf].tolist(), pred.tolist()
    # The peer takes seconds, so that only a slice is timed and scaled.
    part = rows[: max(20, num // 50)]

    def listed() -> float:
        return sum(row not in valid for row in part) / len(part)

    assert abs(M.tice(pred[: len(part)], tax).item() - listed()) < 1e-9
    ours, peer = bench.time(lambda: M.tice(pred, tax), listed)
    setting = f"{num} paths, K={tax.num_leaves}; peer: membership in a list of paths, {len(part)} timed and scaled"
    bench.add("tice", setting, ours, peer * num / len(part), limit=1 / 50)


def bench_hca(bench: Bench) -> None:
    tax, z, y = bench.tax, bench.logits(bench.batch), bench.targets(bench.batch)
    start, size, paths = tax.group_start.tolist(), tax.group_size.tolist(), tax.paths.tolist()

    def loop() -> float:
        hits = 0
        for row, target in zip(z, y.tolist(), strict=True):
            ok = int(tax.leaf[row[tax.leaf].argmax()]) == target
            group = 0
            for node in paths[target]:
                if node < 0:
                    break
                ok &= start[group] + int(row[start[group] : start[group] + size[group]].argmax()) == node
                group = node + 1
            hits += ok
        return hits / len(z)

    assert abs(M.hca(z, y, tax).item() - loop()) < 1e-9
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: loop over samples and path"
    bench.add("hca", setting, *bench.time(lambda: M.hca(z, y, tax), loop))


def bench_decoders(bench: Bench) -> None:
    tax, z = bench.tax, bench.logits(bench.batch)
    setting = f"N={tax.num_nodes}, B={bench.batch}"
    for decode in (level_argmax, bottom_up, top_down, joint_path):
        bench.add(decode.__name__, setting, *bench.time(lambda decode=decode: decode(z, tax)), None)


def bench_throughput(bench: Bench) -> None:
    tax, num = bench.tax, 64 if bench.quick else 4096
    y = bench.targets(num)
    pred = tax.paths[bench.targets(num).roll(1)]
    metrics = {
        "FullPathAccuracy": M.FullPathAccuracy(tax),
        "TICE": M.TICE(tax),
        "LevelAccuracy": M.LevelAccuracy(tax),
        "LeafAccuracy": M.LeafAccuracy(tax),
        "WeightedAveragePrecision": M.WeightedAveragePrecision(tax),
        "MistakeSeverity": M.MistakeSeverity(tax),
        "AverageHierarchicalDistance": M.AverageHierarchicalDistance(tax),
        "HierarchicalPRF": M.HierarchicalPRF(tax),
        "LCAMetrics": M.LCAMetrics(tax),
        "EdgeDistance": M.EdgeDistance(tax),
    }
    metrics = {name: metric.to(bench.device) for name, metric in metrics.items()}
    setting = f"N={tax.num_nodes}, batches of {num}"
    for name, metric in metrics.items():
        (spent,) = bench.time(lambda metric=metric: metric.update(pred, y))
        bench.add(f"{name} update", setting, num / spent, None, "samples/ms")
    together = MetricCollection(metrics).to(bench.device)
    (spent,) = bench.time(lambda: together.update(pred, y))
    bench.add("all of these in a collection", setting, num / spent, None, "samples/ms")
    z, y = bench.logits(bench.batch), bench.targets(bench.batch)
    (spent,) = bench.time(lambda: sample_cuts(tax))
    bench.add("sample 25 cuts", f"N={tax.num_nodes}", spent, None)
    mta = M.MTA(tax, sample_cuts(tax)).to(bench.device)
    setting = f"N={tax.num_nodes}, B={bench.batch}"
    for name, metric in {"MTA over 25 cuts": mta, "HCA": M.HCA(tax).to(bench.device)}.items():
        (spent,) = bench.time(lambda metric=metric: metric.update(z, y))
        bench.add(f"{name} update", setting, bench.batch / spent, None, "samples/ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    rows: list[dict] = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            rows += [
                {**row, "device": "cuda", **dict.fromkeys(("ours", "peer", "ratio")), "status": "not measured"}
                for row in rows
            ]
            break
        bench = Bench(device, args.quick)
        for run in (bench_crm, bench_tice, bench_hca, bench_decoders, bench_throughput):
            run(bench)
        rows += bench.rows
    with open(args.json, "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
