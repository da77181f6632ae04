"""Time and memory of the losses on leaf logits against the dense methods they replace, side by side in one process.

    python tools/bench.py packages/hier-losses/benchmarks/bench_leaf_losses.py --json OUT.json [--quick]

Peers are our own rewrites of the published methods. A step is forward and backward. Memory is the peak of tensor
allocations in one step; buffers that a method keeps between steps are added.
"""

import torch
from _tree_bench import INAT21, QUICK, TreeBench, main
from bench import MIB
from torch import Tensor

from hier_losses import functional as F
from hier_losses.taxonomy import Taxonomy


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


def bench_hxe(bench: TreeBench) -> None:
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
    mine = bench.peak(bench.step(lambda x: F.hxe(x, y, bench.tax), z), bench.device)
    size = 2 * bench.tax.num_leaves**2 * bench.tax.num_levels * 4 / MIB
    setting = f"K={bench.tax.num_leaves}; peer: size of its buffers, computed, not run"
    bench.row("hxe on the large tree, memory", setting, mine, size, "MiB", 0.02)


def bench_soft_labels(bench: TreeBench) -> None:
    sizes = ((2, 5, 20, 60), QUICK) if bench.quick else ((2, 7, 25, 90, 300, 1000), INAT21)
    for size in sizes:
        tax = Taxonomy.synthetic(size, seed=0).to(bench.device)
        z, y = bench.inputs(tax, leaf=True)
        # Row by row: K x K paths of D nodes at once would need gigabytes.
        distance = torch.cat([F.lca_height(row[:, None], tax.leaf, tax) for row in tax.leaf.split(64)])
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


if __name__ == "__main__":
    main(__doc__, [bench_hxe, bench_soft_labels])
