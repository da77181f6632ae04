"""Time and memory of the tree operations against dense ancestor matrices, side by side in one process.

python bench_tree_ops.py --json OUT.json [--quick]
"""

import torch
from _tree_bench import TreeBench, main
from bench import MIB
from torch import Tensor

from hier_losses import functional as F
from hier_losses.taxonomy import Taxonomy


def bench_ancestor_sum(bench: TreeBench) -> None:
    tax, (z, _) = bench.tax, bench.inputs(bench.tax)
    matrix = torch.zeros(tax.num_nodes, tax.num_nodes, device=z.device)
    valid = tax.paths >= 0
    matrix[valid.nonzero()[:, 0], tax.paths[valid]] = 1
    setting = f"N={tax.num_nodes}, B={bench.batch}; peer: dense matrix of {matrix.numel() * 4 / MIB:.0f} MiB"
    kept = matrix.numel() * 4
    bench.pair("ancestor_sum", setting, lambda x: F.ancestor_sum(x, tax), lambda x: x @ matrix.T, z, 0.05, None, kept)


def bench_mcm(bench: TreeBench) -> None:
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


if __name__ == "__main__":
    main(__doc__, [bench_ancestor_sum, bench_mcm])
