"""The runs of the hier-lora study, most important first: what varies, and what everything else is held at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from app_train.recipes.lora import losses
from app_train.recipes.lora.losses import LossConfig

ROWS = {name: losses.ROWS[name].loss for name in ("leaf_ce", "level_ce", "tp_kl", "hisce", "both")}
# Peak learning rates of the head that validation chooses among, the same for every row.
RATES = (3e-3, 1e-2)
ALPHAS = LAMBDAS = (0.0, 0.5, 2.0, 4.0)
EPSILONS = (0.0, 0.05, 0.2)
CONSISTENCY = (0.1, 1.0, 10.0)
REWIRED = (0.05, 0.1, 0.2)
HIDDEN = (0.3, 0.1, 0.5)
SHOTS = {"emoji": (1, 3), "cifar100": (1, 5, 16)}
SIZES = (100, 300)
# Classifiers on frozen features, in the experiment "tree": (what is fitted, over which tree, the row it is compared with).
TREE_SHOTS = {"emoji": (1, 2, 3), "cifar100": (1, 3, 10, 20)}
TREE_ROWS = {
    "mean": ("mean", "star", "leaf_ce"), "lda": ("lda", "star", "leaf_ce"), "logistic": ("logistic", "tree", "leaf_ce"),
    "leaf_ce": ("head", "star", ""), "hxe": ("head", "tree", "leaf_ce"), "hxe_shuffled": ("head", "shuffled", "leaf_ce"),
    "hxe_10": ("head", "10", "leaf_ce"), "hxe_30": ("head", "30", "leaf_ce"), "tree_lda_star": ("tree_lda", "star", ""),
    "tree_lda": ("tree_lda", "tree", "tree_lda_star"), "tree_lda_shuffled": ("tree_lda", "shuffled", "tree_lda_star"),
    "tree_lda_10": ("tree_lda", "10", "tree_lda_star"), "tree_lda_30": ("tree_lda", "30", "tree_lda_star"),
}  # fmt: skip
TAIL_RATIO = 16
# CPU seconds of one run on one thread, measured on one machine; for the estimate that is printed first.
SECONDS = {"fixed": 3, "head": 6, "update": 12, "towers": 60, "frozen": 5}


@dataclass(frozen=True)
class Trial:
    """One trial: `folder` below the study's own says which.

    Attributes:
        experiment, data, row, seed: identify it.
        kind: how it is carried out: "fixed", "head", "update", "towers" or "frozen".
        loss: weights of the loss.
        rate_of: the row whose tuned learning rate it takes.
        options: what else varies.
    """

    experiment: str
    data: str
    row: str
    seed: int
    kind: str = "head"
    loss: LossConfig = field(default_factory=LossConfig)
    rate_of: str = "both"
    options: dict = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Relative folder."""
        return f"{self.experiment}/{self.data}/{self.row}/seed-{self.seed}"


def plan(data: Sequence[str], seeds: int, few: int) -> list[Trial]:
    """All runs in the order of their importance.

    Args:
        data: of "emoji" and "cifar100", those at hand.
        seeds: of the main table.
        few: seeds of everything else.
    """
    return [run for part in (_main, _grid, _update, _consistency, _rewired, _tail, _sizes, _towers, _tree)
            for run in part(data, seeds, few)]  # fmt: skip


def tuning_plan(data: Sequence[str]) -> list[Trial]:
    """One run for each data set, row and learning rate, scored on validation."""
    return [
        Trial("tuning", name, f"{row}-{rate:g}", 0, loss=loss, rate_of=row, options={"rate": rate})
        for name in data
        for row, loss in ROWS.items()
        for rate in RATES
    ]


def estimate(runs: Sequence[Trial]) -> str:
    """The cost of runs as text, by experiment."""
    lines, total = [], 0
    for name in dict.fromkeys(run.experiment for run in runs):
        chosen = [run for run in runs if run.experiment == name]
        seconds = sum(SECONDS[run.kind] for run in chosen)
        total += seconds
        lines.append(f"  {name:<14}{len(chosen):>4} runs {seconds / 60:>6.1f} CPU minutes")
    return "\n".join([*lines, f"  {'together':<14}{len(runs):>4} runs {total / 60:>6.1f} CPU minutes on one thread"])


def _main(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    for name in data:
        for row in ("zero_shot", "neighbour"):
            yield Trial("main", name, row, 0, kind="fixed")
    for seed in range(seeds):
        for name in data:
            for row, loss in ROWS.items():
                yield Trial("main", name, row, seed, loss=loss, rate_of=row)


def _grid(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    if "emoji" not in data:
        return
    for seed in range(few):
        for alpha in ALPHAS:
            yield Trial("alpha", "emoji", f"{alpha:g}", seed, loss=LossConfig(tp_kl=alpha, hisce=1))
        for lam in LAMBDAS:
            yield Trial("lambda", "emoji", f"{lam:g}", seed, loss=LossConfig(tp_kl=1, hisce=lam))
        for eps in EPSILONS:
            yield Trial("eps", "emoji", f"{eps:g}", seed, loss=LossConfig(tp_kl=1, hisce=1, eps=eps))


def _update(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    for seed in range(few):
        for name in reversed(data):
            for unit in ("leaf", "parent"):
                for share in HIDDEN:
                    if share != HIDDEN[0] and (unit == "parent" or seed):
                        continue
                    for row in ("both", "leaf_ce"):
                        label = f"{unit}-{share:g}-{row}"
                        yield Trial(
                            "update", name, label, seed, "update", ROWS[row], row, {"unit": unit, "share": share}
                        )


def _consistency(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    for seed in range(few):
        for name in data:
            for weight in CONSISTENCY:
                for permuted in (False, True):
                    label = f"{weight:g}{'-permuted' if permuted else ''}"
                    loss = LossConfig(tp_kl=1, hisce=1, consistency=weight)
                    yield Trial("consistency", name, label, seed, loss=loss, options={"permuted": permuted})


def _rewired(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    for seed in range(few):
        for name in data:
            for row in ("both", "level_ce"):
                for share in REWIRED:
                    options, label = {"share": share}, f"{row}-{share:g}"
                    yield Trial("rewired", name, label, seed, loss=ROWS[row], rate_of=row, options=options)


def _tail(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    if "cifar100" not in data:
        return
    for seed in range(few):
        for row in ("leaf_ce", "both"):
            yield Trial("tail", "cifar100", row, seed, loss=ROWS[row], rate_of=row, options={"tail": TAIL_RATIO})


def _sizes(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    if "emoji" not in data:
        return
    for seed in range(few):
        for size in SIZES:
            for row in ("leaf_ce", "both"):
                yield Trial("sizes", "emoji", f"{size}-{row}", seed, loss=ROWS[row], rate_of=row, options={"leaves": size})  # fmt: skip


def _towers(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    if "cifar100" not in data:
        return
    for seed in range(few):
        for row in ("both", "leaf_ce"):
            for towers in ("head", "vision", "both", "text"):
                yield Trial("towers", "cifar100", f"{towers}-{row}", seed, "towers", ROWS[row], row, {"towers": towers})


def _tree(data: Sequence[str], seeds: int, few: int) -> Iterator[Trial]:
    for seed in range(seeds):
        for name in data:
            for shots in TREE_SHOTS[name]:
                for row, (expert, tree, other) in TREE_ROWS.items():
                    # One picture a class says nothing of the spread within classes; wrong edges are tried with all pictures.
                    spread, wrong = expert in ("lda", "tree_lda"), tree.isdigit()
                    if (spread and shots == 1) or (wrong and shots != TREE_SHOTS[name][-1]):
                        continue
                    options = {
                        "shots": shots,
                        "expert": expert,
                        "tree": tree,
                        "against": f"{shots}-{other}" if other else "",
                    }
                    yield Trial("tree", name, f"{shots}-{row}", seed, "frozen", options=options)
