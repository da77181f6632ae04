"""What the recipe `lora-study` tells: losses, weights, growing and wrong trees, towers, on emoji and few-shot CIFAR-100."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from app_data.store.errors import DataError
from app_eval.measure.interval import Interval, over_seeds
from app_eval.measure.reduce import FORMAT, SHOWN, find, reduce_study
from app_eval.show.commands import read_json
from app_eval.show.page import Claim, Claims, Column, Figure, Page, Row, Section, Table
from app_eval.show.stories import EMOJI_CREDIT

ROWS = {
    "neighbour": "nearest training picture (control)", "zero_shot": "zero-shot", "leaf_ce": "leaf cross-entropy",
    "level_ce": "level cross-entropy", "tp_kl": "TP-KL", "both": "TP-KL + HiSCE", "hisce": "HiSCE",
}  # fmt: skip
FIRST_ROWS, TRAINED = tuple(ROWS)[:-1], {row: ROWS[row] for row in ("level_ce", "tp_kl", "hisce", "both")}
COMPARED = {"neighbour": ROWS["neighbour"], **TRAINED}
DATA = {"emoji": "emoji", "cifar100": "few-shot CIFAR-100"}
TESTED = {"emoji": "the unseen artist's emoji", "cifar100": "the test pictures of few-shot CIFAR-100"}
SCORES = {
    "leaf": "leaf right, %", "fpa": "whole path right, %", "tice": "path broken, %", "level_1": "top level right, %", "ahd": "distance "
    "to the truth",
    "severity": "height of a mistake", "hca": "every choice right, %", "mta": "right over tree cuts, %",
}  # fmt: skip
DECODERS = {"level_argmax": "level by level", "bottom_up": "bottom-up", "joint_path": "by best path"}
LOWER, LENGTHS = ("tice", "severity", "ahd"), ("severity", "ahd")
FIRST = ("leaf@bottom_up", "fpa@joint_path", "tice@level_argmax")
SHORT = ("leaf@bottom_up", "fpa@joint_path", "fpa@level_argmax", "tice@level_argmax", "ahd@bottom_up")
ALL = tuple(f"{s}@{d}" for s, d in SHOWN)
JUDGED = tuple(c for c in ALL if not c.startswith("tice") and c != "level_1@bottom_up")
COMMAND = "hier train lora-study --data DIR"
# What was varied besides the loss: title, note, data.
EXPERIMENTS = {
    "alpha": ("The weight of TP-KL (alpha)", "The row TP-KL + HiSCE has alpha 1.", ("emoji",)),
    "lambda": ("The weight of HiSCE (lambda)", "The row TP-KL + HiSCE has lambda 1.", ("emoji",)),
    "eps": ("The share of siblings in HiSCE (eps)", "The row TP-KL + HiSCE has eps 0.1.", ("emoji",)),
    "consistency": ("A penalty on children without their parent", "With its weight; the control permutes the parents.", tuple(DATA)),
    "rewired": (
        "Wrong edges", "With the share of edges that is wrong in training; scores are those of the right tree.", tuple(DATA)
    ),
    "towers": ("LoRA on one tower or both", "After the projection, one epoch with LoRA layers of rank 4.", ("cifar100",)),
    "sizes": ("More and more classes", "With the number of leaves.", ("emoji",)),
    "tail": (
        "A long tail", "Pictures a class fall from 20 to 1 in geometric steps; the test set is balanced.", ("cifar100",)
    ),
}  # fmt: skip
TOWERS = {"head": "no LoRA", "vision": "LoRA on pictures", "text": "LoRA on text", "both": "LoRA on both"}
# {experiment/data/row/score/part/pictures} stands for a value.
SEEN = (
    "Leaf cross-entropy never trains the upper nodes: on CIFAR-100, read level by level, {main/cifar100/leaf_ce/tice@level_argmax} of "
    "its paths break, and {main/cifar100/both/tice@level_argmax} with TP-KL + HiSCE.",
    "With the penalty on children without their parent at weight 10, {consistency/cifar100/10/tice@level_argmax} of the paths break, "
    "with permuted parents {consistency/cifar100/10-permuted/tice@level_argmax}.",
    "Of CIFAR-100 classes added after training (30 % of the leaves), leaf cross-entropy classifies "
    "{update/cifar100/leaf-0.3-leaf_ce/leaf@bottom_up/shots-0/new} correctly without a picture and "
    "{update/cifar100/leaf-0.3-leaf_ce/leaf@bottom_up/shots-16/new} with 16 pictures a class; TP-KL + HiSCE "
    "{update/cifar100/leaf-0.3-both/leaf@bottom_up/shots-0/new} and {update/cifar100/leaf-0.3-both/leaf@bottom_up/shots-16/new}.",
    "With 20 % of the edges wrong, {rewired/cifar100/both-0.2/tice@level_argmax} of the paths of TP-KL + HiSCE break, and "
    "{rewired/cifar100/both-0.2/leaf@bottom_up} of its leaves are right ({main/cifar100/both/leaf@bottom_up} with the right tree).",
    "LoRA on both towers for one epoch: {towers/cifar100/both-leaf_ce/leaf@bottom_up} right with leaf cross-entropy, without LoRA "
    "{towers/cifar100/head-leaf_ce/leaf@bottom_up}.",
    "With a long tail, {tail/cifar100/leaf_ce/leaf@bottom_up} right with leaf cross-entropy, {tail/cifar100/both/leaf@bottom_up} with "
    "TP-KL + HiSCE.",
    "With 100 emoji to choose from, leaf cross-entropy classifies {sizes/emoji/100-leaf_ce/leaf@bottom_up} correctly; with 300, "
    "{sizes/emoji/300-leaf_ce/leaf@bottom_up}.",
)
TERMS = {
    "TP-KL": "Kullback-Leibler divergence to the path in the tree",
    "HiSCE": "cross-entropy smoothed over siblings",
    "LoRA": "low-rank adaptation of the weights",
}


def collect(sources: Sequence[Path]) -> dict[str, dict]:
    """The reduced study of a run folder, or of a JSON file."""
    if len(sources) != 1:
        raise DataError(f"the page lora takes one source, got {len(sources)}")
    study = reduce_study(sources[0]) if sources[0].is_dir() else read_json(sources[0])
    if not isinstance(study, dict) or study.get("format") != FORMAT or "rows" not in study:
        raise DataError(f"{sources[0]} is no reduced study: give the study folder, or the JSON beside the page")
    return {"": study}


def tell(content: Mapping[str, dict]) -> Page:
    """The page."""
    study = content[""]
    names = [name for name in DATA if name in study["data"]]
    entries = {name: {row: find(study, "main", name, row) for row in ROWS} for name in names}
    panels = {
        f"{DATA[n]}: {column_title(c)}": {ROWS[r]: value_of(e, c) for r in FIRST_ROWS if (e := entries[n][r])}
        for n in names
        for c in FIRST[:2]
    }
    where = " and {} of ".join(TESTED[n] for n in names)
    right = {row: [_said(entries[n][row], FIRST[0]) for n in names] for row in ROWS}
    return Page(
        title="hier-lora: what losses that know the tree do on two data sets",
        outcome=f"Leaf cross-entropy classifies {right['leaf_ce'][0]} of {where.format(*right['leaf_ce'][1:])} correctly, TP-KL + HiSCE "
        f"{' and '.join(right['both'])}, and the nearest training picture, without any training, {' and '.join(right['neighbour'])}.",
        figure=Figure("right leaves and paths of every row", tuple(panels.items())),
        table=Table(
            tuple(Column(f"{DATA[n]}: {column_title(c)}", 1) for n in names for c in FIRST),
            tuple(row_of(ROWS[r], [(entries[n][r], c) for n in names for c in FIRST]) for r in FIRST_ROWS),
            note="Means over seeds; brackets are 95 % bootstrap intervals over test pictures. A path is broken where a predicted node is "
            "not the child of the one above it. Level by level, each level names its likeliest node; bottom-up, the likeliest leaf gives "
            "the path; by best path, the path with the largest sum wins.",
        ),
        control=ROWS["neighbour"],
        body=(
            _setting(study, names),
            *(_judged(study, name) for name in names),
            Section(
                "What else was seen",
                (_seen(study), "These are values without a verdict; their intervals stand in the tables."),
            ),
            _not_run(study),
        ),
        tables=(
            *(_main(study, n, entries[n]) for n in names),
            *(_update(study, n) for n in names),
            *(_varied(study, experiment) for experiment in EXPERIMENTS),
        ),
        commands=(COMMAND, "hier page lora runs/lora-study docs/results/hier-lora.md"),
        terms=TERMS,
        credits=(EMOJI_CREDIT, "CIFAR-100: Krizhevsky, 2009; its tree and cuts: ProTeCt, Wu et al., 2024."),
    )


def column_title(column: str) -> str:
    """The title of score@decoder."""
    score, decoder = column.split("@")
    return SCORES[score] if score in ("hca", "mta") else f"{SCORES[score]}, {DECODERS[decoder]}"


def unit(column: str) -> float:
    """What a stored value is multiplied by: shares are shown in percent."""
    return 1.0 if column.split("@")[0] in LENGTHS else 100.0


def columns_of(columns: Sequence[str], prefixes: Sequence[str] = ("",)) -> tuple[Column, ...]:
    """Columns for scores, each under every prefix."""
    return tuple(Column(prefix + column_title(c), 3 if unit(c) == 1 else 1) for c in columns for prefix in prefixes)


def value_of(entry: Mapping, column: str) -> Interval:
    """Mean over seeds with its interval over pictures."""
    return Interval.read(entry["scores"][column]).times(unit(column))


def _said(entry: Mapping | None, column: str) -> str:
    return "(not run)" if entry is None else f"{value_of(entry, column).value:.1f} %"


def row_of(title: str, cells: Sequence[tuple[Mapping | None, str]], before: tuple = (), command: str = COMMAND) -> Row:
    """A row of a table; not run if every entry is missing."""
    if not any(entry for entry, _ in cells):
        return Row(title, command=command)
    return Row(title, (*before, *(None if e is None else value_of(e, c) for e, c in cells)))


def claim_of(study: Mapping, name: str, row: str, column: str, text: str) -> Claim:
    """A row of the main table against leaf cross-entropy, which is read bottom-up."""
    entry, base = (find(study, "main", name, r) for r in (row, "leaf_ce"))
    score, factor = column.split("@")[0], unit(column)
    if entry is None or "against leaf CE" not in entry:
        return Claim(text, None, None, score in LOWER)
    # A path read bottom-up is right where its leaf is.
    other = f"{'leaf' if score == 'fpa' else score}@bottom_up"
    seeds = None
    if column in entry["by_seed"] and other in base["by_seed"]:
        theirs = dict(zip(base["seeds"], base["by_seed"][other], strict=True))
        ours = dict(zip(entry["seeds"], entry["by_seed"][column], strict=True))
        if entry["kind"] == "fixed":  # the same for every seed
            ours = dict.fromkeys(theirs, entry["by_seed"][column][0])
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        seeds = over_seeds([float("nan") if None in pair else factor * (pair[0] - pair[1]) for pair in pairs])
    items = Interval.read(entry["against leaf CE"][column]).times(factor)
    return Claim(text, items, seeds, score in LOWER, 3 if factor == 1 else 1)


def claims_of(study: Mapping, name: str, columns: Sequence[str], titles: Mapping[str, str]) -> Claims:
    """Rows of the main table, by title, against leaf cross-entropy; judged only where that beats zero-shot."""
    zero = claim_of(study, name, "zero_shot", "leaf@bottom_up", "")
    premise = Claim(
        "leaf cross-entropy against zero-shot, leaf right,", zero.items and -zero.items, zero.seeds and -zero.seeds
    )
    claims = (
        claim_of(study, name, r, c, f"{title}: {column_title(c)}") for r, title in titles.items() for c in columns
    )
    return Claims(tuple(claims), premise=premise)


def _judged(study: Mapping, name: str) -> Section:
    words = []
    for column in JUDGED:
        block = claims_of(study, name, [column], TRAINED)
        words.append(Row(column_title(column).replace(", %", ""), block.words))
    table = Table(tuple(Column(ROWS[row]) for row in TRAINED), tuple(words), first="against leaf cross-entropy")
    return Section(f"{DATA[name]}: against leaf cross-entropy", (claims_of(study, name, FIRST[:1], COMPARED), table))


def _setting(study: Mapping, names: Sequence[str]) -> Section:
    lines = []
    for name in names:
        data, rates = study["data"][name], study["rates"].get(name, {})
        chosen = ", ".join(f"{ROWS[r]} {min(rates[r], key=rates[r].get)}" for r in ROWS if r in rates) or "not tuned"
        lines.append(
            f"{DATA[name]}: {data['train']} training and {data['test']} test pictures of {data['pixels']} pixels, {data['leaves']} leaves, "
            f"{len(data['levels'])} levels. Learning rates: {chosen}."
        )
    return Section(
        "What was held fixed",
        (
            "EfficientNet-Lite0 sees the pictures, MiniLM reads the names, and a projection in closed form joins them; no weights of "
            "CLIP can be had here. Only the projection and the scale of the cosines "
            "are trained, on frozen features, unless a row says LoRA. Emoji "
            "are trained on two artists (three styles) and tested on an artist never seen, whose pictures are centred on their own mean. "
            "CIFAR-100 has 20 pictures a class, five of them for validation, under the WordNet tree and the 25 cuts of ProTeCt. Every "
            "row tries the same learning rates and takes the one with the smallest distance to the truth on validation pictures.",
            tuple(lines),
            "Leaf cross-entropy trains nothing above the leaves, so comparisons read it bottom-up, where no path can break. Scores whose "
            f"values seed by seed were not kept have an interval over items alone. All runs took {study['seconds'] / 60:.0f} CPU minutes.",
        ),
    )


def _seen(study: Mapping) -> tuple[str, ...]:
    def value(found: re.Match) -> str:
        experiment, data, row, column, *more = found[1].split("/")
        return _said(find(study, experiment, data, row, *more), column)

    drift = [
        e["facts"].get("largest change of an old text feature", 0) for e in study["rows"] if e["experiment"] == "update"
    ]
    said = [f"Adding classes changes the stored text features of old ones by at most {max(drift):g}."] if drift else []
    return (*(re.sub(r"\{([^}]+)\}", value, line) for line in SEEN), *said)


def _not_run(study: Mapping) -> Section:
    known = {(e["experiment"], e["data"]) for e in study["rows"]}
    wanted = {"main": tuple(DATA), "update": tuple(DATA)} | {name: told[2] for name, told in EXPERIMENTS.items()}
    lines = [f"{what} on {DATA[n]}: {COMMAND}" for what, data in wanted.items() for n in data if (what, n) not in known]
    lines += [
        "alpha and lambda together, other depths of the tree, LoRA in the main table (one factor was varied at a time);",
        "iNaturalist 2021, ImageNet-21K-P, CUB, Aircraft, Butterfly-200, ChestX-ray14, and any model with CLIP weights: the machines "
        "that run this project reach none of them; the recipes exist.",
    ]
    return Section("Not run", (tuple(lines),))


def _main(study: Mapping, name: str, entries: Mapping[str, dict | None]) -> Section:
    rows = tuple(row_of(ROWS[row], [(e, c) for c in ALL]) for row, e in entries.items())
    seeds = [
        Row(ROWS[r], (", ".join(f"{100 * x:.1f}" for x in e["by_seed"][FIRST[0]]),)) for r, e in entries.items() if e
    ]
    by_seed = Table((Column("leaf right, %, seed by seed"),), tuple(seeds))
    return Section(
        f"{DATA[name]}: all rows",
        (Table(columns_of(ALL), rows), by_seed, claims_of(study, name, JUDGED, COMPARED)),
    )


def _varied(study: Mapping, experiment: str) -> Section:
    """All rows of an experiment under those of the main table that they vary."""
    title, note, data = EXPERIMENTS[experiment]
    names, tables = (TOWERS | ROWS if experiment != "towers" else ROWS | TOWERS), []
    for name in data:
        found = [e for e in study["rows"] if (e["experiment"], e["data"]) == (experiment, name)]
        rows = [(ROWS[r], e) for r in ("leaf_ce", "both") if (e := find(study, "main", name, r))]
        for entry in sorted(
            found, key=lambda e: [(not p.isdigit(), float(p) if p[:1].isdigit() else 0, p) for p in e["row"].split("-")]
        ):
            first, *rest = entry["row"].split("-")
            rows.append((", ".join([names.get(first, first), *(ROWS.get(p, p) for p in rest)]), entry))
        shown = tuple(row_of(words, [(e, c) for c in SHORT], (len(e["seeds"]),)) for words, e in rows)
        shown += () if found else (Row(experiment, command=COMMAND),)
        tables.append(Table((Column("seeds"), *columns_of(SHORT)), shown, title=DATA[name]))
    return Section(title, (note, *tables))


def _update(study: Mapping, name: str) -> Section:
    columns, rows = ("fpa@bottom_up", "fpa@joint_path", "tice@level_argmax", "ahd@bottom_up"), []
    for old in (e for e in study["rows"] if (e["experiment"], e["data"], e["pictures"]) == ("update", name, "old")):
        new = find(study, "update", name, old["row"], old["part"], "new")
        kind, share, loss = old["row"].split("-")
        title = f"{float(share):.0%} of the {'leaves' if kind == 'leaf' else 'groups'}, {ROWS[loss]}, {old['facts']['shots']} pictures"
        rows.append(row_of(title, [(e, c) for c in columns for e in (old, new)], (len(old["seeds"]),)))
    note = (
        "Some classes are hidden in training and added afterwards; then a third of the epochs at a third of the rate follows, on so many "
        "pictures of every class. All nodes are candidates. Hidden classes differ from seed to seed, so the pictures of all seeds are "
        "joined."
    )
    table = Table(
        (Column("seeds"), *columns_of(columns, ("old: ", "new: "))), tuple(rows) or (Row("update", command=COMMAND),)
    )
    return Section(f"{DATA[name]}: classes added after training", (note, table))
