"""Time of decoders and metrics against the dense or listed methods they replace, side by side in one process.

    python tools/bench.py packages/hier-losses/benchmarks/bench_metrics.py --json OUT.json [--quick]

Peers are our own rewrites of the usual methods: a K x K cost matrix for conditional risk minimisation, a list of valid
paths for the inconsistency rate, a per-sample loop over the path for consistent accuracy.
"""

import torch
from _tree_bench import TreeBench, main
from torchmetrics import MetricCollection

from hier_losses import metrics as M
from hier_losses.decoding import bottom_up, crm, joint_path, level_argmax, top_down
from hier_losses.functional.tree_ops import lca_height
from hier_losses.treecuts import sample_cuts


def samples(bench: TreeBench, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two leaf nodes a sample."""
    generator = torch.Generator().manual_seed(1)
    tax = bench.tax
    return tuple(
        tax.leaf[torch.randint(tax.num_leaves, (num,), generator=generator).to(bench.device)] for _ in range(2)
    )


def bench_crm(bench: TreeBench) -> None:
    tax, (z, _) = bench.tax, bench.inputs(bench.tax)
    # Row by row: K x K paths of D nodes at once would need gigabytes.
    leaf = tax.leaf
    cost = torch.cat([lca_height(row[:, None], leaf, tax).float() for row in leaf.split(64)])

    def dense() -> torch.Tensor:
        return tax.paths[leaf[(z[:, leaf].softmax(1) @ cost).argmin(1)]]

    # Equal up to near ties, which single precision breaks either way.
    assert (crm(z, tax)[:, 0] == dense()[:, 0]).float().mean() > 0.9
    size = cost.numel() * 4 / 2**20
    setting = f"K={tax.num_leaves}, B={bench.batch}; peer: K x K matrix of {size:.0f} MiB"
    spent, ratio = bench.medians(lambda: crm(z, tax), dense)
    bench.row("crm", setting, *spent, limit=1 / 1.5, ratio=ratio)


def bench_tice(bench: TreeBench) -> None:
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
    pred = torch.where(consistent[:, None], tax.paths[samples(bench, num)[0]], pred)
    valid, rows = tax.paths[tax.leaf].tolist(), pred.tolist()
    # The peer takes seconds, so that only a slice is timed and scaled.
    part = rows[: max(20, num // 50)]

    def listed() -> float:
        return sum(row not in valid for row in part) / len(part)

    assert abs(M.tice(pred[: len(part)], tax).item() - listed()) < 1e-9
    (ours, peer), ratio = bench.medians(lambda: M.tice(pred, tax), listed)
    scale = num / len(part)
    setting = f"{num} paths, K={tax.num_leaves}; peer: membership in a list of paths, {len(part)} timed and scaled"
    bench.row("tice", setting, ours, peer * scale, limit=1 / 50, ratio=ratio / scale)


def bench_hca(bench: TreeBench) -> None:
    tax, (z, y) = bench.tax, bench.inputs(bench.tax)
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
    spent, ratio = bench.medians(lambda: M.hca(z, y, tax), loop)
    bench.row("hca", setting, *spent, ratio=ratio)


def bench_decoders(bench: TreeBench) -> None:
    tax, (z, _) = bench.tax, bench.inputs(bench.tax)
    setting = f"N={tax.num_nodes}, B={bench.batch}"
    for decode in (level_argmax, bottom_up, top_down, joint_path):
        bench.row(decode.__name__, setting, *bench.medians(lambda decode=decode: decode(z, tax))[0])


def bench_throughput(bench: TreeBench) -> None:
    tax, num = bench.tax, 64 if bench.quick else 4096
    y, other = samples(bench, num)
    pred = tax.paths[other]
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
        (spent,), _ = bench.medians(lambda metric=metric: metric.update(pred, y))
        bench.row(f"{name} update", setting, num / spent, None, "samples/ms")
    together = MetricCollection(metrics).to(bench.device)
    (spent,), _ = bench.medians(lambda: together.update(pred, y))
    bench.row("all of these in a collection", setting, num / spent, None, "samples/ms")
    z, y = bench.inputs(tax)
    (spent,), _ = bench.medians(lambda: sample_cuts(tax))
    bench.row("sample 25 cuts", f"N={tax.num_nodes}", spent, None)
    mta = M.MTA(tax, sample_cuts(tax)).to(bench.device)
    setting = f"N={tax.num_nodes}, B={bench.batch}"
    for name, metric in {"MTA over 25 cuts": mta, "HCA": M.HCA(tax).to(bench.device)}.items():
        (spent,), _ = bench.medians(lambda metric=metric: metric.update(z, y))
        bench.row(f"{name} update", setting, bench.batch / spent, None, "samples/ms")


if __name__ == "__main__":
    main(__doc__, [bench_crm, bench_tice, bench_hca, bench_decoders, bench_throughput])
