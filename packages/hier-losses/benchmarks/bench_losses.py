"""Time and memory of the losses against the dense methods they replace, side by side in one process.

    python bench_losses.py --json OUT.json [--quick]

Peers are our own rewrites of the published methods, or the installed package named in the row. A step is forward and
backward. Memory is the peak of tensor allocations in one step as the profiler (CPU) or the allocator (CUDA) counts it;
buffers that a method keeps between steps are added.
"""

import math

import torch
from _bench import INAT21, MIB, QUICK, Bench, main
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
    bench.pair("tp_kl + hisce", f"{setting}, as printed", ours, written, z, 1.0, None, kept)
    bench.pair("tp_kl + hisce", f"{setting}, soft-target cross_entropy", ours, fused, z, 1.0, None, kept)
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: dense target, soft-target cross_entropy"
    bench.pair("tp_kl alone", setting, lambda x: F.tp_kl(x, y, tax), path_part, z)


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
    mine = bench.step(lambda x: F.conditional_softmax_nll(x, y, tax), z)
    spent, ratio = bench.times(mine, bench.step(lambda x: loss(x, labels), scores))
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: hierarchicalsoftmax {root.layer_size} outputs"
    bench.add("conditional_softmax_nll against the package, time", setting, *spent, "ms", 0.1, ratio)


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
    mine = bench.memory(bench.step(lambda x: F.hxe(x, y, bench.tax), z))[0]
    size = 2 * bench.tax.num_leaves**2 * bench.tax.num_levels * 4 / MIB
    setting = f"K={bench.tax.num_leaves}; peer: size of its buffers, computed, not run"
    bench.add("hxe on the large tree, memory", setting, mine, size, "MiB", 0.02)


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


if __name__ == "__main__":
    main(__doc__, [bench_path_losses, bench_conditional, bench_hxe, bench_soft_labels])
