"""Memory and time of one training step on large trees: every loss on a tree of the size of iNaturalist 2021 and on one of
100,000 leaves.

    python tools/bench.py packages/hier-losses/benchmarks/bench_scale.py --json OUT.json [--quick]

Memory is the peak of what forward and backward allocate beyond the logits, beside one dense float matrix over pairs of
nodes (of leaves for the losses on leaf logits), which is computed, not run: 1 GiB on the smaller tree, 94 GiB on the
larger one. The largest single buffer stands beside D copies of the logits: nothing may grow faster than B N D. The unit
of time is `torch.nn.functional.cross_entropy` over as many classes as the loss has logits. A training step is a linear
head, the loss, backward and AdamW.
"""

import torch
from _tree_bench import TreeBench, main
from bench import MIB

from hier_losses import functional as F
from hier_losses.taxonomy import Taxonomy

NODE = {
    "level_cross_entropy": F.level_cross_entropy,
    "tp_kl": F.tp_kl,
    "hisce": F.hisce,
    "hierarchy_aware_loss": F.hierarchy_aware_loss,
    "parent_child_consistency": lambda z, y, tax: F.parent_child_consistency(z, tax),
    "conditional_softmax_nll": F.conditional_softmax_nll,
    "hce": F.hce,
    "hrn_tree_loss": F.hrn_tree_loss,
    "mc_loss": lambda z, y, tax: F.mc_loss(z, F.mcm(torch.zeros_like(z).scatter(1, y[:, None], 1.0), tax), tax),
}
LEAF = {"hxe": F.hxe, "soft_label_ce": F.soft_label_ce}


def measure_losses(bench: TreeBench, tax: Taxonomy, name: str) -> None:
    setting = f"K={tax.num_leaves}, N={tax.num_nodes}, D={tax.num_levels}, B={bench.batch}"
    for title, loss in {**NODE, **LEAF}.items():
        z, y = bench.inputs(tax, leaf=title in LEAF)
        step = bench.step(lambda x, loss=loss, y=y: loss(x, y, tax), z)
        width, copies = z.shape[1], tax.num_levels * z.numel() * z.element_size() / MIB
        peak, largest = bench.allocated(step, bench.device)
        note = f"{setting}; peer: one {width} x {width} matrix"
        bench.row(f"{name}, {title}, peak memory", note, peak, width**2 * z.element_size() / MIB, "MiB", 0.05)
        if bench.device == "cpu":
            note = f"{setting}; peer: {tax.num_levels} copies of the logits"
            bench.row(f"{name}, {title}, largest buffer", note, largest, copies, "MiB", 1.0)
        flat = tax.leaf_index[y] if title in LEAF else y
        unit = bench.step(lambda x, flat=flat: torch.nn.functional.cross_entropy(x, flat), z)
        spent, ratio = bench.medians(step, unit)
        bench.row(
            f"{name}, {title}, time", f"{setting}; peer: cross_entropy of {width} classes", *spent, "ms", None, ratio
        )


def measure_training_step(bench: TreeBench, tax: Taxonomy, name: str) -> None:
    _, y = bench.inputs(tax)
    head = torch.nn.Linear(64, tax.num_nodes, device=bench.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    features = torch.randn(bench.batch, 64, generator=torch.Generator().manual_seed(0)).to(bench.device)
    found = []

    def step() -> None:
        optimizer.zero_grad()
        loss = F.hierarchy_aware_loss(head(features), y, tax, consistency_weight=1.0)
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))

    (spent,), _ = bench.medians(step)
    assert found[-1] < found[0]
    setting = f"K={tax.num_leaves}, N={tax.num_nodes}, B={bench.batch}, 64 features"
    bench.row(f"{name}, training step of hierarchy_aware_loss, time", setting, spent)


def bench_inat21_size(bench: TreeBench) -> None:
    measure_losses(bench, bench.tax, "iNat21 size")
    measure_training_step(bench, bench.tax, "iNat21 size")


def bench_many_leaves(bench: TreeBench) -> None:
    sizes = (10, 100, 1000) if bench.quick else (20, 200, 2000, 12000, 45000, 100000)
    tax = Taxonomy.synthetic(sizes, seed=0).to(bench.device)
    measure_losses(bench, tax, "many leaves")
    measure_training_step(bench, tax, "many leaves")


if __name__ == "__main__":
    main(__doc__, [bench_inat21_size, bench_many_leaves])
