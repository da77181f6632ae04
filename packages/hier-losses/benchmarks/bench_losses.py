"""Time and memory of the losses against the dense methods they replace, side by side in one process.

    python bench_losses.py --json OUT.json [--quick] [--only NAME]

Peers are our own rewrites of the published methods, or the installed package named in the row. Times are the best of
several runs of forward + backward. Memory is the peak of tensor allocations over one forward + backward as the
profiler (CPU) or the allocator (CUDA) counts it; buffers that a method keeps between steps are added.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hier_losses import functional as F
from hier_losses.taxonomy import Taxonomy

INAT21 = (3, 13, 51, 273, 1103, 4900, 10000)
QUICK = (3, 8, 20, 60, 150)
MIB = 2**20


class Bench:
    def __init__(self, device: str, quick: bool, only: str | None):
        self.device, self.quick, self.only = device, quick, only
        self.batch = 8 if quick else 64
        self.repeats = 2 if quick else 11
        self.rows: list[dict] = []
        self.tax = Taxonomy.synthetic(QUICK if quick else INAT21, None if quick else 0.3175, seed=0).to(device)

    def wanted(self, name: str) -> bool:
        return self.only is None or self.only in name

    def inputs(self, tax: Taxonomy, leaf: bool = False) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        target = tax.leaf.cpu()[torch.randint(tax.num_leaves, (self.batch,), generator=generator)]
        logits = torch.randn(self.batch, tax.num_leaves if leaf else tax.num_nodes, generator=generator)
        return logits.to(self.device), target.to(self.device)

    def step(self, function: Callable[[Tensor], Tensor], logits: Tensor) -> None:
        z = logits.detach().requires_grad_()
        function(z).sum().backward()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, *cases: tuple[Callable[[Tensor], Tensor], Tensor]) -> list[float]:
        """Best milliseconds of forward + backward; the cases take turns, so that a busy machine hits all alike."""
        for case in cases:
            self.step(*case)
        spent: list[list[float]] = [[] for _ in cases]
        for _ in range(self.repeats):
            for case, times in zip(cases, spent, strict=True):
                start = time.perf_counter()
                self.step(*case)
                times.append(1e3 * (time.perf_counter() - start))
        return [min(times) for times in spent]

    def peak(self, function: Callable[[Tensor], Tensor], logits: Tensor, kept: int = 0) -> float:
        """Peak MiB of forward + backward, plus `kept` bytes of buffers."""
        self.step(function, logits)
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(function, logits)
            return (torch.cuda.max_memory_allocated() - before + kept) / MIB
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.step(function, logits)
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return (highest + kept) / MIB

    def add(self, name: str, setting: str, ours: float, peer: float | None, unit: str, limit: float | None) -> None:
        ratio = None if peer is None else ours / peer
        row = {
            "name": name,
            "setting": setting,
            "ours": ours,
            "peer": peer,
            "unit": unit,
            "ratio": ratio,
            "target": None if limit is None else f"ours/peer <= {limit:g}",
            "device": self.device,
            "command": " ".join(["python", *sys.argv]),
            "status": "measured" if peer is not None else "ours only",
        }
        self.rows.append(row)
        shown = ["-" if x is None else f"{x:.4g}" for x in (ours, peer, ratio)]
        print(f"{name:44s} {shown[0]:>10s} {shown[1]:>10s} {unit:4s} {shown[2]:>9s}  {row['target'] or ''}", flush=True)

    def pair(self, name, setting, ours, peer, logits, time_limit=None, memory_limit=None, kept=0) -> None:
        """Add the time row and the memory row of two functions of the same logits."""
        torch.testing.assert_close(ours(logits).sum(), peer(logits).sum(), rtol=1e-3, atol=1e-3)
        self.add(f"{name}, time", setting, *self.time((ours, logits), (peer, logits)), "ms", time_limit)
        mine, theirs = self.peak(ours, logits), self.peak(peer, logits, kept)
        self.add(f"{name}, memory", setting, mine, theirs, "MiB", memory_limit)


def ragged(num_internal: int, num_leaves: int, max_depth: int, seed: int = 0) -> Taxonomy:
    """A tree of the size and depth of the WordNet tree over ImageNet-1K."""
    generator = torch.Generator().manual_seed(seed)
    parents, depth = [-1], [1]
    for _ in range(num_internal - 1):
        up = int(torch.randint(-1, len(parents), (1,), generator=generator))
        while up >= 0 and depth[up] >= max_depth - 1:
            up = parents[up]
        parents.append(up)
        depth.append(1 if up < 0 else depth[up] + 1)
    childless = sorted(set(range(num_internal)) - set(parents))
    extra = torch.randint(num_internal, (num_leaves - len(childless),), generator=generator).tolist()
    parents += childless + extra
    return Taxonomy([f"n{i}" for i in range(len(parents))], parents)


def bench_path_losses(bench: Bench) -> None:
    tax, (z, y) = bench.tax, bench.inputs(bench.tax)
    dense = []
    for level in range(tax.num_levels):
        first = int(tax.level_ptr[level])
        parent = tax.parent[first : int(tax.level_ptr[level + 1])]
        near = (parent[:, None] == parent).float()
        near.fill_diagonal_(0)
        size = near.sum(1, keepdim=True)
        matrix = torch.where(size > 0, 0.1 * near / size.clamp(min=1), 0.0)
        matrix.diagonal().copy_(torch.where(size[:, 0] > 0, 0.9, 1.0))
        dense.append((first, matrix))
    path = tax.paths[y]

    def peer(logits: Tensor) -> Tensor:
        target = torch.zeros_like(logits).scatter(1, path, 1 / tax.num_levels)
        loss = torch.nn.functional.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
        for level, part in enumerate(logits.split(tax.level_sizes, 1)):
            first, matrix = dense[level]
            loss = loss - (matrix[path[:, level] - first] * part.log_softmax(1)).sum(1)
        return loss.mean()

    kept = sum(matrix.numel() * 4 for _, matrix in dense)
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: dense target and dense T of {kept / MIB:.0f} MiB"
    bench.pair("tp_kl + hisce", setting, lambda x: F.hierarchy_aware_loss(x, y, tax), peer, z, 1.0, None, kept)
    unit = bench.batch * tax.num_nodes * 4 / MIB
    mine = bench.peak(lambda x: F.hierarchy_aware_loss(x, y, tax), z)
    bench.add("tp_kl + hisce, memory over logits", "peak / (B N floats)", mine, unit * tax.num_levels, "MiB", 1.0)


def bench_conditional(bench: Bench) -> None:
    tax, (z, y) = bench.tax, bench.inputs(bench.tax)
    groups = (tax.group_size > 0).nonzero()[:, 0]
    slot = torch.arange(tax.max_group_size, device=z.device)
    inside = slot < tax.group_size[groups][:, None]
    member = torch.where(inside, tax.group_start[groups][:, None] + slot, 0)
    rank = torch.zeros_like(tax.group_size).index_put((groups,), torch.arange(len(groups), device=z.device))
    path = tax.paths[y]
    row = rank[tax.parent[path] + 1]
    column = path - tax.group_start[tax.parent[path] + 1]
    flat = row * tax.max_group_size + column

    def padded(logits: Tensor) -> Tensor:
        table = torch.where(inside, logits[:, member], -torch.inf).log_softmax(-1)
        return -table.flatten(1).gather(1, flat).sum(1).mean()

    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: padded softmax {len(groups)} x {tax.max_group_size}"
    bench.pair("conditional_softmax_nll", setting, lambda x: F.conditional_softmax_nll(x, y, tax), padded, z, 0.1)
    try:
        from hierarchicalsoftmax import HierarchicalSoftmaxLoss, SoftmaxNode
    except ImportError:
        print("hierarchicalsoftmax is not installed: row left out")
        return
    root = SoftmaxNode("root")
    nodes: list = []
    for name, parent in zip(tax.names, tax.parent.tolist(), strict=True):
        nodes.append(SoftmaxNode(name, parent=root if parent < 0 else nodes[parent]))
    root.set_indexes()
    loss = HierarchicalSoftmaxLoss(root=root).to(z.device)
    labels = root.get_node_ids_tensor([nodes[v] for v in y.tolist()]).to(z.device)
    scores = torch.randn(bench.batch, root.layer_size, device=z.device)
    times = bench.time((lambda x: F.conditional_softmax_nll(x, y, tax), z), (lambda x: loss(x, labels), scores))
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: hierarchicalsoftmax {root.layer_size} outputs"
    bench.add("conditional_softmax_nll vs package, time", setting, *times, "ms", 0.1)


def bench_ancestor_sum(bench: Bench) -> None:
    tax, (z, _) = bench.tax, bench.inputs(bench.tax)
    matrix = torch.zeros(tax.num_nodes, tax.num_nodes, device=z.device)
    valid = tax.paths >= 0
    matrix[valid.nonzero()[:, 0], tax.paths[valid]] = 1
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: dense matrix of {matrix.numel() * 4 / MIB:.0f} MiB"
    kept = matrix.numel() * 4
    bench.pair("ancestor_sum", setting, lambda x: F.ancestor_sum(x, tax), lambda x: x @ matrix.T, z, 0.05, None, kept)


def bench_hxe(bench: Bench) -> None:
    tax = ragged(40, 100, 6) if bench.quick else ragged(371, 1000, 15)
    tax = tax.to(bench.device)
    z, y = bench.inputs(tax, leaf=True)
    paths = tax.paths[tax.leaf]
    steps = torch.cat([torch.full_like(paths[:, :1], -1), paths], 1)
    valid = paths >= 0
    # in_step[t, k, l]: leaf k lies below the l-th node of the path of leaf t; column 0 is the root.
    in_step = torch.ones(tax.num_leaves, tax.num_leaves, tax.num_levels + 1, device=z.device)
    for level in range(1, tax.num_levels + 1):
        in_step[..., level] = ((steps[:, level, None] == steps[:, level]) & valid[:, None, level - 1]).float()
    numerator, denominator = in_step[..., 1:].contiguous(), in_step[..., :-1].contiguous()
    del in_step
    weight = torch.where(valid, torch.exp(-0.1 * torch.arange(1, tax.num_levels + 1, device=z.device)), 0.0)
    row = tax.leaf_index[y]

    def peer(logits: Tensor) -> Tensor:
        p = logits.softmax(1)[:, None]
        top = torch.bmm(p, numerator[row]).squeeze(1)
        bottom = torch.bmm(p, denominator[row]).squeeze(1)
        seen = (top > 0) & (bottom > 0)
        edge = torch.where(seen, torch.where(seen, top, 1.0) / torch.where(seen, bottom, 1.0), 1.0)
        return -(weight[row] * edge.log()).sum(1).mean()

    kept = 2 * numerator.numel() * 4
    setting = (
        f"K={tax.num_leaves}, D={tax.num_levels}, B={bench.batch}; peer: two (K, K, D) buffers, {kept / MIB:.0f} MiB"
    )
    bench.pair("hxe", setting, lambda x: F.hxe(x, y, tax), peer, z, 2.0, 0.02, kept)
    z, y = bench.inputs(bench.tax, leaf=True)
    mine = bench.peak(lambda x: F.hxe(x, y, bench.tax), z)
    size = 2 * bench.tax.num_leaves**2 * bench.tax.num_levels * 4 / MIB
    setting = f"K={bench.tax.num_leaves}; peer: size of its buffers, computed, not run"
    bench.add("hxe on the large tree, memory", setting, mine, size, "MiB", 0.02)
    bench.add("hxe on the large tree, time", "", *bench.time((lambda x: F.hxe(x, y, bench.tax), z)), None, "ms", None)


def bench_mcm(bench: Bench) -> None:
    sizes = (2, 8, 30, 100) if bench.quick else (4, 16, 60, 420, 1500)
    tax = Taxonomy.synthetic(sizes, seed=0).to(bench.device)
    z, _ = bench.inputs(tax)
    reach = torch.zeros(tax.num_nodes, tax.num_nodes, dtype=torch.bool, device=z.device)
    valid = tax.paths >= 0
    reach[tax.paths[valid], valid.nonzero()[:, 0]] = True

    def dense(scores: Tensor) -> Tensor:
        return torch.where(reach, scores[:, None], -torch.inf).amax(2)

    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: (B, N, N)"
    bench.pair("mcm", setting, lambda x: F.mcm(x, tax), dense, z, None, 0.01, reach.numel())


def bench_soft_labels(bench: Bench) -> None:
    sizes = ((2, 5, 20, 60), QUICK) if bench.quick else ((2, 7, 25, 90, 300, 1000), INAT21)
    for size in sizes:
        tax = Taxonomy.synthetic(size, seed=0).to(bench.device)
        z, y = bench.inputs(tax, leaf=True)
        distance = F.lca_height(tax.leaf[:, None].cpu(), tax.leaf.cpu(), tax.to("cpu")).to(z.device)
        table = (-10.0 * distance / distance.max()).softmax(1)
        row = tax.leaf_index[y]
        setting = f"K={tax.num_leaves}, B={bench.batch}; peer: rows of a K x K table, {table.numel() * 4 / MIB:.0f} MiB"
        bench.pair(
            f"soft_label_ce K={tax.num_leaves}",
            setting,
            lambda x, y=y, tax=tax: F.soft_label_ce(x, y, tax),
            lambda x, table=table, row=row: -(table[row] * x.log_softmax(1)).sum(1).mean(),
            z,
            None,
            0.25,
            table.numel() * 4,
        )
        del table, distance


def bench_many_leaves(bench: Bench) -> None:
    sizes = (10, 100, 1000) if bench.quick else (20, 200, 2000, 12000, 45000, 100000)
    tax = Taxonomy.synthetic(sizes, seed=0).to(bench.device)
    z, y = bench.inputs(tax)
    setting = f"K={tax.num_leaves}, N={tax.num_nodes}, B={bench.batch}"
    for name, weight in (("", 0.0), (" with consistency", 1.0)):
        loss = lambda x, weight=weight: F.hierarchy_aware_loss(x, y, tax, consistency_weight=weight)  # noqa: E731
        bench.add(f"many leaves{name}, time", setting, *bench.time((loss, z)), None, "ms", None)
        size = z.numel() * 4 / MIB
        note = f"{setting}; peer: D copies of the logits"
        bench.add(f"many leaves{name}, memory", note, bench.peak(loss, z), size * tax.num_levels, "MiB", None)


BENCHES = {
    "path": bench_path_losses,
    "conditional": bench_conditional,
    "ancestor": bench_ancestor_sum,
    "hxe": bench_hxe,
    "mcm": bench_mcm,
    "soft": bench_soft_labels,
    "leaves": bench_many_leaves,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", choices=sorted(BENCHES), help="one group of rows")
    args = parser.parse_args()
    rows: list[dict] = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            rows += [
                {**row, "device": "cuda", **dict.fromkeys(("ours", "peer", "ratio")), "status": "not measured"}
                for row in rows
            ]
            break
        bench = Bench(device, args.quick, args.only)
        for name, run in BENCHES.items():
            if bench.wanted(name):
                run(bench)
        rows += bench.rows
    with open(args.json, "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
