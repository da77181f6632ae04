"""Write docs/results/hier-lora.md from a study: `python apps/eval lora-page runs/lora-study docs/results/hier-lora.md`.

The first argument may also be the JSON file that an earlier call wrote beside the page: the page needs nothing else.
Sentences that judge are decided by intervals, and where leaf cross-entropy does not beat zero-shot nothing is ranked.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from app_data.store.atomic import write_json
from app_data.store.errors import DataError
from app_eval.measure.paths import LOWER_IS_BETTER, TITLES
from app_eval.show.stories.lora_figures import write_figures
from app_eval.show.stories.lora_results import FORMAT, find, reduce_study

TITLE = {
    "zero_shot": "zero-shot",
    "neighbour": "picture nearest neighbour (control)",
    "leaf_ce": "leaf CE",
    "level_ce": "level CE",
    "tp_kl": "TP-KL",
    "hisce": "HiSCE",
    "both": "TP-KL + HiSCE",
}
DATA = {"emoji": "emoji", "cifar100": "few-shot CIFAR-100"}
MAIN_COLUMNS = (
    "leaf@bottom_up", "fpa@level_argmax", "fpa@bottom_up", "fpa@joint_path", "tice@level_argmax", "level_1@level_argmax",
    "severity@bottom_up", "ahd@bottom_up", "hca@bottom_up", "mta@bottom_up",
)  # fmt: skip
JUDGED = (
    "fpa@joint_path", "fpa@bottom_up", "fpa@level_argmax", "level_1@level_argmax", "severity@bottom_up", "ahd@bottom_up",
    "ahd@joint_path", "hca@bottom_up", "mta@bottom_up",
)  # fmt: skip
SHORT = ("leaf@bottom_up", "fpa@joint_path", "fpa@level_argmax", "tice@level_argmax", "ahd@bottom_up")
COMMAND = """python apps/train lora-study --data DIR
python apps/eval lora-page runs/lora-study docs/results/hier-lora.md"""


def write_study_page(source: Path, page: Path) -> None:
    """Write the page, its JSON and its figures beside each other.

    Args:
        source: a study folder, or the JSON file of an earlier page.
        page: the Markdown file.

    Raises:
        DataError: if there is nothing to show, or the file is of another kind.
    """
    if source.is_file():
        try:
            study = json.loads(source.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{source} is damaged: {error}") from error
        if not isinstance(study, dict) or study.get("format") != FORMAT or "rows" not in study:
            raise DataError(f"{source} is no reduced study: give the study folder, or the JSON beside the page")
    else:
        study = reduce_study(source)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json(page.with_suffix(".json"), study)
    figures = write_figures(study, page.with_suffix(""))
    page.write_text(render(study, figures, page.stem), encoding="utf-8")


def render(study: dict, figures: Mapping[str, str], stem: str) -> str:
    """The page as Markdown."""
    parts = [
        "# hier-lora: what hierarchy-aware fine-tuning does on two data sets",
        f"Generated from stored runs; no number on this page was typed by hand ([the numbers]({stem}.json)):",
        f"```\n{COMMAND}\n```",
        _setting(study),
    ]
    for name in study["data"]:
        parts += _main(study, name)
    parts += _sweeps(study, figures)
    parts += _consistency(study)
    parts += _update(study, figures)
    parts += _rewired(study, figures)
    parts += _towers(study)
    parts += _others(study)
    parts += ["## Not run", _not_run(study)]
    parts.append(
        "Twemoji graphics are licensed under CC BY 4.0, OpenMoji under CC BY-SA 4.0, Noto Emoji under OFL 1.1; CIFAR-100: "
        "Krizhevsky, 2009; its tree and cuts: ProTeCt, Wu et al., 2024. No picture of theirs is part of this repository."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(study: dict) -> str:
    lines = []
    for name, data in study["data"].items():
        sizes = "/".join(map(str, data["levels"]))
        rates = {row: min(trials, key=trials.get) for row, trials in study["rates"].get(name, {}).items()}
        chosen = ", ".join(f"{TITLE[row]} {rate}" for row, rate in rates.items())
        lines.append(
            f"- **{DATA[name]}**: {data['train']} training and {data['test']} test pictures at {data['pixels']} px, {data['leaves']} "
            f"leaves, levels {sizes}. Learning rates, by AHD@1 on validation: {chosen or 'not tuned'}."
        )
    return (
        "EfficientNet-Lite0 and MiniLM joined by a closed-form projection (no CLIP weights can be had offline). **Unless a row "
        "says LoRA, only the projection and the scale of the cosines are trained, on frozen picture features**: that is the "
        "first stage of every recipe here and it costs seconds, so that many rows and seeds fit. Emoji: trained on two artists "
        "(three styles), tested on an artist never seen, whose pictures are centred on their own mean; validation withholds 15 % "
        "of the leaves. CIFAR-100: 20 pictures per class, five of them for validation, under the WordNet tree and the 25 cuts of "
        "ProTeCt.\n\n"
        + "\n".join(lines)
        + "\n\nBrackets are 95 % bootstrap intervals over the test pictures, the same resamples for "
        "all rows and seeds. Leaf CE trains nothing above the leaves and is read bottom-up in every comparison, where its TICE is "
        f"0 by construction. All runs together took {study['seconds'] / 60:.0f} CPU minutes."
    )


def _title(column: str) -> str:
    score, decoder = column.split("@")
    name = "top level" if score == "level_1" else TITLES[score]
    return name if score in ("hca", "mta") else f"{name}, `{decoder}`"


def _cell(values: Sequence[float | None] | None, sign: str = "") -> str:
    if values is None or values[0] is None:
        return "n/a"
    value, low, high = values
    return f"{value:{sign}.3f}" if low is None else f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _table(entries: Mapping[str, dict | None], columns: Sequence[str], first: str = "") -> str:
    lines = [f"| {first} | seeds | " + " | ".join(map(_title, columns)) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, entry in entries.items():
        if entry is None:
            lines.append(f"| {name} | | not run |" + " |" * (len(columns) - 1))
            continue
        cells = " | ".join(_cell(entry["scores"][c]) for c in columns)
        seeds = "-" if entry["kind"] == "fixed" else len(entry["seeds"])
        lines.append(f"| {name} | {seeds} | {cells} |")
    return "\n".join(lines)


def verdict(column: str, found: Sequence[float | None]) -> str:
    """Judge a difference: better or worse where its interval excludes 0, else no difference shown."""
    value, low, high = found
    if value is None or low is None or low <= 0 <= high:
        return "no difference shown"
    return "better" if (value < 0) == (column.split("@")[0] in LOWER_IS_BETTER) else "worse"


def _judge(entry: dict) -> str:
    said: dict[str, list[str]] = {"better": [], "worse": [], "no difference shown": []}
    for column in JUDGED:
        said[verdict(column, entry["against leaf CE"][column])].append(_title(column).replace(", ", " by "))
    return "; ".join(f"{word}: {', '.join(which)}" for word, which in said.items() if which)


def beats_zero_shot(study: dict, name: str) -> bool | None:
    """Whether leaf CE beats zero-shot at the leaves beyond the interval; None if either was not run."""
    entry = find(study, "main", name, "zero_shot")
    if entry is None or "against leaf CE" not in entry:
        return None
    high = entry["against leaf CE"]["leaf@bottom_up"][2]
    return high is not None and high < 0


def _main(study: dict, name: str) -> list[str]:
    entries = {TITLE[row]: find(study, "main", name, row) for row in TITLE}
    parts = [f"## {DATA[name]}: the main table", _table(entries, MAIN_COLUMNS)]
    known = beats_zero_shot(study, name)
    if not known:
        why = "was not compared with" if known is None else "does not beat"
        return [*parts, f"**Inconclusive.** Leaf CE {why} zero-shot here, so nothing is ranked."]
    compared = [(title, e) for title, e in entries.items() if e and e["kind"] == "head" and "against leaf CE" in e]
    lines = [
        "| difference to leaf CE, bottom-up | " + " | ".join(map(_title, JUDGED)) + " |",
        "|---" * (len(JUDGED) + 1) + "|",
    ]
    for title, entry in compared:
        lines.append(f"| {title} | " + " | ".join(_cell(entry["against leaf CE"][c], "+") for c in JUDGED) + " |")
    words = [f"- {title}: {_judge(entry)}." for title, entry in compared]
    by_seed = _by_seed(entries)
    return [*parts, "\n".join(lines), "\n".join(words), by_seed]


def _by_seed(entries: Mapping[str, dict | None]) -> str:
    rows = [(t, e) for t, e in entries.items() if e and e["kind"] == "head"]
    lines = ["Seed by seed: leaf accuracy (`bottom_up`), FPA (`joint_path`).\n", "| | each seed |", "|---|---|"]
    for title, entry in rows:
        pairs = zip(entry["by_seed"]["leaf@bottom_up"], entry["by_seed"]["fpa@joint_path"], strict=True)
        lines.append(f"| {title} | " + "; ".join(f"{a:.3f}, {b:.3f}" for a, b in pairs) + " |")
    return "\n".join(lines)


def _sweeps(study: dict, figures: Mapping[str, str]) -> list[str]:
    parts = [
        "## One weight at a time, on emoji",
        "alpha weighs TP-KL, lambda HiSCE, eps is the siblings' share; the others stay at 1, 1 and 0.1.",
    ]
    both = find(study, "main", "emoji", "both")
    for experiment, base in (("alpha", "1"), ("lambda", "1"), ("eps", "0.1")):
        values = _values(study, experiment, "emoji") or {}
        entries = {**values, base: both}
        ordered = {f"{experiment} = {k}": entries[k] for k in sorted(entries, key=float)}
        parts.append(_table(ordered, SHORT) if values else f"{experiment}: not run.")
    return [*parts, figures.get("weights", "")]


def _values(study: dict, experiment: str, data: str) -> dict[str, dict]:
    return {e["row"]: e for e in study["rows"] if e["experiment"] == experiment and e["data"] == data}


def _consistency(study: dict) -> list[str]:
    parts = [
        "## Does the parent-child penalty lower TICE?",
        "Added to TP-KL + HiSCE with a weight; the control permutes the parents within each level, "
        "in the penalty alone.",
    ]
    for name in study["data"]:
        entries: dict[str, dict | None] = {"0": find(study, "main", name, "both")}
        for weight in ("0.1", "1", "10"):
            entries[weight] = find(study, "consistency", name, weight)
            entries[f"{weight}, permuted parents"] = find(study, "consistency", name, f"{weight}-permuted")
        parts += [f"**{DATA[name]}**", _table(entries, SHORT, "weight")]
    return parts


def _update(study: dict, figures: Mapping[str, str]) -> list[str]:
    parts = [
        "## Classes added without retraining",
        "Some classes are hidden while training (leaves, or whole groups of leaves with their parent), then added with "
        "`update_taxonomy`; old classes keep their text features. `k-shot`: a third of the epochs at a third of the rate on k "
        "pictures of every class, old and new. All nodes are candidates. Hidden classes differ from seed to seed.",
    ]
    for name in study["data"]:
        rows = [e for e in study["rows"] if e["experiment"] == "update" and e["data"] == name]
        lines = [
            "| hidden | trained with | shots | seeds | FPA old | FPA new | TICE old | TICE new | AHD@1 old | AHD@1 new |",
            "|---" * 10 + "|",
        ]
        for entry in rows:
            if entry["pictures"] != "old":
                continue
            unit, share, loss = entry["row"].split("-")
            new = find(study, "update", name, entry["row"], entry["part"], "new")
            what = f"{float(share):.0%} of the {'leaves' if unit == 'leaf' else 'groups'}"
            cells = [
                _cell(e["scores"][column])
                for column in (
                    "fpa@joint_path" if loss != "leaf_ce" else "fpa@bottom_up",
                    "tice@level_argmax",
                    "ahd@bottom_up",
                )
                for e in (entry, new)
            ]
            lines.append(
                f"| {what} | {TITLE[loss]} | {entry['facts']['shots']} | {len(entry['seeds'])} | "
                + " | ".join(cells)
                + " |"
            )
        drift = max((e["facts"]["largest change of an old text feature"] for e in rows), default=None)
        note = "" if drift is None else f"Largest change of a stored old text feature in these runs: {drift:g}."
        parts += [
            f"**{DATA[name]}** (FPA of leaf CE bottom-up, else `joint_path`)",
            "\n".join(lines) if rows else "not run",
            note,
        ]
    return [*parts, figures.get("update", "")]


def _rewired(study: dict, figures: Mapping[str, str]) -> list[str]:
    parts = [
        "## Wrong edges",
        "A share of the edges leads to another parent of the same level while training; "
        "scores are those of the clean tree.",
    ]
    for name in study["data"]:
        entries = {}
        for row in ("both", "level_ce"):
            entries[f"{TITLE[row]}, 0 %"] = find(study, "main", name, row)
            for share in ("0.05", "0.1", "0.2"):
                entries[f"{TITLE[row]}, {float(share):.0%}"] = find(study, "rewired", name, f"{row}-{share}")
        parts += [f"**{DATA[name]}**", _table(entries, SHORT, "edges changed")]
    return [*parts, figures.get("rewired", "")]


def _towers(study: dict) -> list[str]:
    entries = {}
    for row in ("both", "leaf_ce"):
        for towers, words in (
            ("head", "head only"),
            ("vision", "LoRA on vision"),
            ("text", "LoRA on text"),
            ("both", "LoRA on both"),
        ):
            entries[f"{TITLE[row]}, {words}"] = find(study, "towers", "cifar100", f"{towers}-{row}")
    costs = [
        f"{name.split(', ')[1]}: {e['facts']['LoRA weights']:,}"
        for name, e in entries.items()
        if e and e["facts"]["LoRA weights"]
    ]
    note = f"LoRA weights: {'; '.join(dict.fromkeys(costs))}." if costs else ""
    return [
        "## LoRA on one tower or both, on few-shot CIFAR-100",
        "The head first, then one epoch of head and LoRA layers (rank 4), on the pictures; scored on 20 test pictures per class.",
        _table(entries, SHORT),
        note,
    ]


def _others(study: dict) -> list[str]:
    sizes = {}
    for size in ("100", "300"):
        for row in ("leaf_ce", "both"):
            sizes[f"{size} leaves, {TITLE[row]}"] = find(study, "sizes", "emoji", f"{size}-{row}")
    for row in ("leaf_ce", "both"):
        sizes[f"853 leaves, {TITLE[row]}"] = find(study, "main", "emoji", row)
    tail = {TITLE[row]: find(study, "tail", "cifar100", row) for row in ("leaf_ce", "both")}
    return [
        "## More and more classes, on emoji",
        _table(sizes, SHORT),
        "## A long tail, on few-shot CIFAR-100",
        "Pictures per class fall geometrically from 20 to 1; the test set is balanced, so its accuracy is the macro average.",
        _table(tail, SHORT),
    ]


def _not_run(study: dict) -> str:
    wanted: list[tuple[str, Callable[[], bool]]] = [
        (f"{experiment} on {DATA[name]}", lambda e=experiment, n=name: bool(_values(study, e, n)))
        for experiment, names in (
            ("main", ("emoji", "cifar100")), ("alpha", ("emoji",)), ("lambda", ("emoji",)), ("eps", ("emoji",)),
            ("consistency", ("emoji", "cifar100")), ("update", ("emoji", "cifar100")), ("rewired", ("emoji", "cifar100")),
            ("towers", ("cifar100",)), ("sizes", ("emoji",)), ("tail", ("cifar100",)),
        )
        for name in names
    ]  # fmt: skip
    lines = [f"- {name}" for name, done in wanted if not done()]
    lines += [
        "- the grid over alpha and lambda together, tree depth and lone-child rate (one factor at a time only)",
        "- LoRA in the main table (only the towers table trains LoRA layers)",
        "- iNaturalist 2021, ImageNet-21K-P, CUB, Aircraft, Butterfly-200, ChestX-ray14, and any model with CLIP weights: "
        "the machines that run this project reach none of them; the recipes exist",
    ]
    return "\n".join(lines)


__all__ = ["beats_zero_shot", "render", "verdict", "write_study_page"]
