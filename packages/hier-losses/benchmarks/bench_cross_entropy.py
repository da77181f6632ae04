"""Time of the losses and decoders against torch's cross-entropy and argmax on the same logits, in one process.

    python tools/bench.py packages/hier-losses/benchmarks/bench_cross_entropy.py --json OUT.json [--quick]

A step is forward and backward, one thread. The peer of a loss is one `F.cross_entropy` on logits of the same shape, or
the loop of `F.cross_entropy` over the levels; that of a decoder an argmax over the leaves.
"""

import torch
from _tree_bench import TreeBench, main
from torch import Tensor

from hier_losses import decoding
from hier_losses import functional as F

cross_entropy = torch.nn.functional.cross_entropy


def bench_node_losses(bench: TreeBench) -> None:
    tax, (z, y) = bench.tax, bench.inputs(bench.tax)
    path, first = tax.paths[y], tax.level_ptr.tolist()

    def loop(logits: Tensor) -> Tensor:
        levels = enumerate(logits.split(tax.level_sizes, 1))
        return torch.stack([cross_entropy(part, path[:, i] - first[i]) for i, part in levels]).sum()

    def once(logits: Tensor) -> Tensor:
        return cross_entropy(logits, y)

    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: F.cross_entropy"
    rows = [
        ("level_cross_entropy against the loop over levels", lambda x: F.level_cross_entropy(x, y, tax), loop, 1.0),
        ("tp_kl + hisce", lambda x: F.hierarchy_aware_loss(x, y, tax), once, 1.5),
        ("hrn_tree_loss", lambda x: F.hrn_tree_loss(x, y, tax), once, 3.0),
        ("parent_child_consistency", lambda x: F.parent_child_consistency(x, tax), once, 3.0),
    ]
    for name, ours, peer, limit in rows:
        spent, ratio = bench.medians(bench.step(ours, z), bench.step(peer, z))
        bench.row(f"{name}, time in cross-entropies", setting, *spent, "ms", limit, ratio)


def bench_leaf_losses(bench: TreeBench) -> None:
    tax, (z, y) = bench.tax, bench.inputs(bench.tax, leaf=True)
    row = tax.leaf_index[y]
    setting = f"K={tax.num_leaves}, B={bench.batch}; peer: F.cross_entropy"
    for name, loss in (("hxe", F.hxe), ("soft_label_ce", F.soft_label_ce)):
        ours = bench.step(lambda x, loss=loss: loss(x, y, tax), z)
        spent, ratio = bench.medians(ours, bench.step(lambda x: cross_entropy(x, row), z))
        bench.row(f"{name}, time in cross-entropies", setting, *spent, "ms", 3.0, ratio)


def bench_decoders(bench: TreeBench) -> None:
    tax, (z, _) = bench.tax, bench.inputs(bench.tax)
    leaves = z.index_select(1, tax.leaf)
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: argmax over the leaf logits"
    rows = [
        ("joint_path", lambda: decoding.joint_path(z, tax)),
        ("top_k_paths k=5", lambda: decoding.top_k_paths(z, tax, 5)),
        ("crm", lambda: decoding.crm(z, tax)),
        ("threshold", lambda: decoding.threshold(z, tax, 0.5)),
    ]
    for name, decode in rows:
        spent, ratio = bench.medians(decode, lambda: leaves.argmax(1))
        bench.row(f"{name}, time in argmaxes", setting, *spent, "ms", 3.0, ratio)
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: a stable sort of all leaves"
    by_sort = lambda: leaves.sort(stable=True, dim=1, descending=True).indices[:, :5]  # noqa: E731
    spent, ratio = bench.medians(rows[1][1], by_sort)
    bench.row("top_k_paths k=5 against a sort", setting, *spent, "ms", 0.5, ratio)


if __name__ == "__main__":
    main(__doc__, [bench_node_losses, bench_leaf_losses, bench_decoders])
