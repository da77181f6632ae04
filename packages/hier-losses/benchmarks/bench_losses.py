"""Time and memory of the losses on node logits against the dense methods they replace, side by side in one process.

    python tools/bench.py packages/hier-losses/benchmarks/bench_losses.py --json OUT.json [--quick]

Peers are our own rewrites of the published methods, or the installed package named in the row. A step is forward and
backward. Memory is the peak of tensor allocations in one step as the profiler (CPU) or the allocator (CUDA) counts it;
buffers that a method keeps between steps are added.
"""

import math

import torch
from _tree_bench import TreeBench, main
from bench import MIB
from torch import Tensor

from hier_losses import functional as F


def bench_path_losses(bench: TreeBench) -> None:
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
    path, cross_entropy = tax.paths[y], torch.nn.functional.cross_entropy

    def written(logits: Tensor) -> Tensor:
        """The formulas as they are printed."""
        target = torch.zeros_like(logits).scatter(1, path, 1 / tax.num_levels)
        loss = torch.nn.functional.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
        for level, part in enumerate(logits.split(tax.level_sizes, 1)):
            first, matrix = dense[level]
            loss = loss - (matrix[path[:, level] - first] * part.log_softmax(1)).sum(1)
        return loss.mean()

    def path_part(logits: Tensor) -> Tensor:
        target = torch.zeros_like(logits).scatter(1, path, 1 / tax.num_levels)
        return cross_entropy(logits, target) - math.log(tax.num_levels)

    def fused(logits: Tensor) -> Tensor:
        """The same through torch's cross-entropy with soft targets, the fastest dense form."""
        loss = path_part(logits)
        for level, part in enumerate(logits.split(tax.level_sizes, 1)):
            first, matrix = dense[level]
            loss = loss + cross_entropy(part, matrix[path[:, level] - first])
        return loss

    def ours(logits: Tensor) -> Tensor:
        return F.hierarchy_aware_loss(logits, y, tax)

    kept = sum(matrix.numel() * 4 for _, matrix in dense)
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: dense target, dense T of {kept / MIB:.0f} MiB"
    bench.pair("tp_kl + hisce against the formulas as printed", setting, ours, written, z, 1.0, None, kept)
    bench.pair("tp_kl + hisce against soft-target cross_entropy", setting, ours, fused, z, 1.0, None, kept)
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: dense target"
    bench.pair("tp_kl against soft-target cross_entropy", setting, lambda x: F.tp_kl(x, y, tax), path_part, z)


def bench_conditional(bench: TreeBench) -> None:
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
    mine = bench.step(lambda x: F.conditional_softmax_nll(x, y, tax), z)
    spent, ratio = bench.medians(mine, bench.step(lambda x: loss(x, labels), scores))
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: hierarchicalsoftmax {root.layer_size} outputs"
    bench.row("conditional_softmax_nll against the package, time", setting, *spent, "ms", 0.1, ratio)


if __name__ == "__main__":
    main(__doc__, [bench_path_losses, bench_conditional])
