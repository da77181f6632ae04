"""Time and memory of TreeLDA: a fit, a step of the estimation of v, predictions and updates, up to 100,000 leaves.

    python tools/bench.py packages/hier-losses/benchmarks/bench_discriminant.py --json OUT.json [--quick]

Peers, in the same process: plain LDA (class means and the same covariance, nothing shrunk) for a fit; a fit of all pictures
anew for an update; the product of features and one weight row per leaf for predictions. Memory stands beside ten copies of
one float64 row per node: nothing may grow faster than N d. A fit that estimates v is 30 to 60 steps of the estimation.
"""

import time
from collections.abc import Callable

import torch
from _tree_bench import TreeBench, main
from bench import MIB, synchronize
from torch import Tensor

from hier_losses.discriminant import TreeLDA
from hier_losses.taxonomy import Taxonomy


def pictures(tax: Taxonomy, dim: int, each: int) -> tuple[Tensor, Tensor]:
    """Features that walk down the tree with steps of v = 0.25, `each` a leaf, and their leaves."""
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(tax.num_nodes, dim)
    start = 0
    for level, size in enumerate(tax.level_sizes):
        here = slice(start, start + size)
        means[here] = torch.randn(size, dim, generator=generator) / 2
        if level:
            means[here] += means[tax.parent[here].cpu()]
        start += size
    target = tax.leaf.cpu().repeat(each)
    features = means[target] + torch.randn(len(target), dim, generator=generator)
    return features.to(tax.device), target.to(tax.device)


def plain_lda(features: Tensor, target: Tensor, tax: Taxonomy) -> Tensor:
    """Weights of LDA with the covariance of TreeLDA, one row a leaf."""
    x, leaf = features.double(), tax.leaf_index[target]
    count = torch.bincount(leaf, minlength=tax.num_leaves).double()
    mean = x.new_zeros(tax.num_leaves, x.shape[1]).index_add_(0, leaf, x) / count[:, None]
    inside = x - mean[leaf]
    within = inside.T @ inside / (len(x) - tax.num_leaves)
    cov = 0.6 * within + 0.4 * within.trace() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.cholesky_solve(mean.T, torch.linalg.cholesky(cov)).T


def once(function: Callable[[], object], bench: TreeBench) -> float:
    """Milliseconds of a single call, for steps of many seconds."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def bench_inat21_size(bench: TreeBench) -> None:
    tax, dim, each = bench.tax, 16 if bench.quick else 64, 3
    features, target = pictures(tax, dim, each)
    setting = f"K={tax.num_leaves}, N={tax.num_nodes}, {len(target)} pictures, {dim} features"
    fitted = once(lambda: TreeLDA(tax).fit(features, target).to(bench.device), bench)
    plain = once(lambda: plain_lda(features, target, tax), bench)
    bench.row("iNat21 size, fit, time", f"{setting}; peer: plain LDA, nothing shrunk", fitted, plain)
    model = TreeLDA(tax).to(bench.device).fit(features, target)
    query, moved = features[: bench.batch], tax.extend([("a new class",)])

    def add() -> None:
        model.partial_fit(features[:1], target[:1])

    def add_and_predict() -> None:
        add()
        model.log_prob(features[:1])

    (spent,), _ = bench.medians(add)
    bench.row("iNat21 size, one more picture, time", f"{setting}; peer: a fit", spent, fitted)
    note = f"{setting}; v estimated anew; peer: a fit"
    bench.row("iNat21 size, one more picture and a prediction, time", note, once(add_and_predict, bench), fitted)
    weights = plain_lda(features, target, tax)
    spent, ratio = bench.medians(lambda: model.log_prob(query), lambda: query.double() @ weights.T)
    note = f"{setting}, B={bench.batch}; peer: one matrix product"
    bench.row("iNat21 size, log_prob, time", note, *spent, ratio=ratio)
    spent = once(lambda: model.update_taxonomy(moved), bench)
    bench.row("iNat21 size, one more class, time", f"{setting}; peer: a fit", spent, fitted)


def bench_many_leaves(bench: TreeBench) -> None:
    sizes = (10, 100, 1000) if bench.quick else (20, 200, 2000, 12000, 45000, 100000)
    tax, dim, each = Taxonomy.synthetic(sizes, seed=0).to(bench.device), 16 if bench.quick else 512, 2
    features, target = pictures(tax, dim, each)
    setting = f"K={tax.num_leaves}, N={tax.num_nodes}, {len(target)} pictures, {dim} features"
    model = TreeLDA(tax).to(bench.device)
    bench.row("many leaves, fit, time", setting, once(lambda: model.fit(features, target), bench))
    walk, query = model._whitened_walk(), features[: bench.batch]
    bench.row("many leaves, one step of the estimation of v, time", setting, once(lambda: walk.em_step(model.v), bench))
    bench.row("many leaves, log_prob, time", f"{setting}, B={bench.batch}", once(lambda: model.log_prob(query), bench))
    copies = 10 * tax.num_nodes * dim * 8 / MIB
    peak = bench.peak(lambda: walk.em_step(model.v), bench.device)
    note = f"{setting}; peer: 10 float64 rows per node"
    bench.row("many leaves, one step of the estimation of v, memory", note, peak, copies, "MiB", 1.0)
    given = TreeLDA(tax, v=model.v).to(bench.device)
    peak = bench.peak(lambda: given.fit(features, target), bench.device)
    bench.row("many leaves, fit with v given, memory", note, peak, copies, "MiB", 1.0)


if __name__ == "__main__":
    main(__doc__, [bench_inat21_size, bench_many_leaves])
