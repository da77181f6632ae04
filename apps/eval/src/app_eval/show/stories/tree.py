"""What the experiment "tree" of the recipe `lora-study` tells: when classifiers on frozen features gain from a tree."""

from collections.abc import Mapping, Sequence

from app_eval.measure.interval import Interval, over_seeds
from app_eval.measure.reduce import find
from app_eval.show.page import Claim, Claims, Column, Figure, Page, Row, Section, Table
from app_eval.show.stories import EMOJI_CREDIT
from app_eval.show.stories.lora import DATA, LOWER, TESTED, column_title, row_of, unit, value_of
from app_eval.show.stories.lora import collect as collect

ROWS = {
    "mean": "nearest class mean", "lda": "linear discriminant analysis (LDA)", "logistic": "logistic regression",
    "leaf_ce": "free head + leaf cross-entropy", "hxe": "free head + HXE", "hxe_shuffled": "free head + HXE, shuffled tree",
    "hxe_10": "free head + HXE, 10 % wrong edges", "hxe_30": "free head + HXE, 30 % wrong edges",
    "tree_lda_star": "TreeLDA without a tree", "tree_lda": "TreeLDA", "tree_lda_shuffled": "TreeLDA, shuffled tree",
    "tree_lda_10": "TreeLDA, 10 % wrong edges", "tree_lda_30": "TreeLDA, 30 % wrong edges",
}  # fmt: skip
FIRST = ("lda", "logistic", "leaf_ce", "hxe", "tree_lda_star", "tree_lda")
# What uses a tree, right or wrong, and the same classifier without one.
TREES = {row: "leaf_ce" for row in ROWS if row.startswith("hxe")}
TREES |= {row: "tree_lda_star" for row in ROWS if row.startswith("tree_lda") and row != "tree_lda_star"}
COLUMNS = ("leaf@bottom_up", "ahd@bottom_up")
COMMAND = "hier train lora-study --data DIR --experiments tree --out runs/tree"


def tell(content: Mapping[str, dict]) -> Page:
    """The page."""
    study = content[""]
    names = [name for name in DATA if name in study["data"]]
    shots = {name: shots_of(study, name) for name in names}
    most = {name: shots[name][-1] for name in names}
    entries = {n: {row: find(study, "tree", n, f"{most[n]}-{row}") for row in ROWS} for n in names}
    panels = {
        f"{DATA[n]}: {column_title(c)}": {ROWS[row]: value_of(e, c) for row in FIRST if (e := entries[n][row])}
        for n in names
        for c in COLUMNS
    }
    said = [
        f"on {TESTED[n]} HXE on the tree takes the distance to the truth from {_number(entries[n]['leaf_ce'])} to "
        f"{_number(entries[n]['hxe'])} and TreeLDA from {_number(entries[n]['tree_lda_star'])} to {_number(entries[n]['tree_lda'])}"
        for n in names
    ]
    return Page(
        title="When does the tree pay? Classifiers on frozen features",
        outcome=f"With all pictures, {', and '.join(said)}; logistic regression has "
        f"{' and '.join(_number(entries[n]['logistic']) for n in names)}.",
        figure=Figure("classifiers with all pictures", tuple(panels.items())),
        table=Table(
            tuple(Column(f"{DATA[n]}: {column_title(c)}", 1 if unit(c) > 1 else 3) for n in names for c in COLUMNS),
            tuple(
                row_of(ROWS[r], [(entries[n][r], c) for n in names for c in COLUMNS], command=COMMAND) for r in FIRST
            ),
            note="All pictures. Means over seeds; brackets are 95 % bootstrap intervals over test pictures. The distance to the truth is "
            "the height of the lowest common ancestor of answer and truth, 0 where the answer is right. HXE weighs each step down the "
            "path, the last one most; TreeLDA shrinks the means of classes along the tree.",
        ),
        control=ROWS["logistic"],
        body=(
            _setting(study, names, shots),
            *(_judged(study, name, shots[name]) for name in names),
            _not_run(study),
        ),
        tables=tuple(_all(study, n, shots[n]) for n in names) + tuple(_differences(study, n, shots[n]) for n in names),
        commands=(COMMAND, "hier page tree runs/tree docs/results/tree.md"),
        terms={
            "HXE": "hierarchical cross-entropy",
            "TreeLDA": "discriminant analysis with class means shrunk along the tree",
        },
        credits=(EMOJI_CREDIT, "CIFAR-100: Krizhevsky, 2009; its tree: ProTeCt, Wu et al., 2024."),
    )


def shots_of(study: Mapping, name: str) -> list[int]:
    """Pictures a class, ascending."""
    found = (e for e in study["rows"] if (e["experiment"], e["data"]) == ("tree", name))
    return sorted({int(e["row"].split("-")[0]) for e in found})


def claim_of(study: Mapping, name: str, shots: int, row: str, column: str) -> Claim:
    """A row against the same classifier without a tree, on the same pictures."""
    entry, base = (find(study, "tree", name, f"{shots}-{r}") for r in (row, TREES[row]))
    title, factor, lower = (
        f"{shots} a class, {ROWS[row]}: {column_title(column)}",
        unit(column),
        column.split("@")[0] in LOWER,
    )
    if entry is None or base is None or "against" not in entry:
        return Claim(title, None, None, lower)
    theirs = dict(zip(base["seeds"], base["by_seed"][column], strict=True))
    ours = dict(zip(entry["seeds"], entry["by_seed"][column], strict=True))
    seeds = over_seeds([factor * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs])
    return Claim(title, Interval.read(entry["against"][column]).times(factor), seeds, lower, 3 if factor == 1 else 1)


def _number(entry: Mapping | None) -> str:
    return "(not run)" if entry is None else f"{value_of(entry, COLUMNS[1]).value:.3f}"


def _setting(study: Mapping, names: Sequence[str], shots: Mapping[str, Sequence[int]]) -> Section:
    lines = [
        f"{DATA[n]}: {study['data'][n]['test']} test pictures of {study['data'][n]['pixels']} pixels, {study['data'][n]['leaves']} leaves, "
        f"{len(study['data'][n]['levels'])} levels; {', '.join(map(str, shots[n]))} training pictures a class."
        for n in names
    ]
    seeds = max((len(e["seeds"]) for e in study["rows"]), default=0)
    return Section(
        "What was held fixed",
        (
            f"Features of EfficientNet-Lite0, frozen. {seeds} seeds; each draws the training pictures, the shuffled tree, the wrong edges "
            "and the order of training. No setting was chosen on these pictures: the shrinkage is .4 everywhere, heads train as in the "
            "recipe folder. Emoji are tested on an artist never seen and centred on their own mean.",
            tuple(lines),
            "The shuffled tree hands the children of each level round: the sizes of all groups stay, their members do not.",
        ),
    )


def _judged(study: Mapping, name: str, shots: Sequence[int]) -> Section:
    """Words for every number of pictures; each row against the same classifier without a tree."""
    tables = []
    for column in COLUMNS:
        rows = []
        for row, other in TREES.items():
            words = tuple(
                claim_of(study, name, k, row, column).word() if find(study, "tree", name, f"{k}-{row}") else "not run"
                for k in shots
            )
            rows.append(Row(f"{ROWS[row]} (against {ROWS[other]})", words))
        tables.append(
            Table(
                tuple(Column(f"{k} a class") for k in shots), tuple(rows), title=column_title(column).replace(", %", "")
            )
        )
    return Section(f"{DATA[name]}: does the tree pay?", tuple(tables))


def _differences(study: Mapping, name: str, shots: Sequence[int]) -> Section:
    claims = tuple(
        claim_of(study, name, k, row, c)
        for row in TREES for c in COLUMNS for k in shots if find(study, "tree", name, f"{k}-{row}")
    )  # fmt: skip
    return Section(f"{DATA[name]}: differences to the same classifier without a tree", (Claims(claims),))


def _all(study: Mapping, name: str, shots: Sequence[int]) -> Section:
    columns = tuple(Column(f"{k} a class: {column_title(c)}", 1 if unit(c) > 1 else 3) for c in COLUMNS for k in shots)
    rows = tuple(
        row_of(title, [(find(study, "tree", name, f"{k}-{row}"), c) for c in COLUMNS for k in shots], command=COMMAND)
        for row, title in ROWS.items()
    )
    return Section(f"{DATA[name]}: learning curves", (Table(columns, rows),))


def _not_run(study: Mapping) -> Section:
    lines = [f"{DATA[n]}: {COMMAND}" for n in DATA if n not in study["data"]]
    lines += [
        "TreeLDA and LDA with one picture a class (nothing is known of the spread within a class);",
        "other depths of the tree; LoRA on these trees; photographs at full size (none with several pictures a class can be had here).",
    ]
    return Section("Not run", (tuple(lines),))
