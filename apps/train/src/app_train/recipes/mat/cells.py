"""The cells of the paper's table: what was scored, what the seeds of a row give together, and the table.

A cell is a row of one data set, base, number of shots and seed. Its parts are the label sets it is scored on: all classes, or
those it was trained on and new ones, whose accuracies a harmonic mean joins (Xian et al., 2017).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from app_data.store.sealed import read_sealed
from app_eval.measure import cells as general
from app_eval.measure.cells import RESULT, Parts, cell_difference, cell_value, deviation, judged, kept, line
from app_eval.measure.tree_scores import SCORES, TITLES
from app_train.recipes.mat.published import published_scores
from app_train.recipes.mat.results import CONTROLS, folder_name

ALL, BASE, NOVEL = "all", "base", "novel"


def cell_folder(out: Path, data: str, base: str, row: str, shots: int, seed: int, novel: bool) -> Path:
    """Where a cell is kept; nothing changes the zero-shot model."""
    kind = "-novel" if novel else ""
    if row == CONTROLS[0]:
        return out / data / f"{folder_name(row)}{kind}"
    above = out / data if row in CONTROLS else out / data / base
    return above / folder_name(row) / f"shots-{shots}{kind}" / f"seed-{seed}"


def harmonic(parts: Parts) -> dict[str, float]:
    """Harmonic mean of the accuracies on base and novel classes; 0 where one of them is."""
    pairs = {score: [float(parts[part][score].mean()) for part in (BASE, NOVEL)] for score in SCORES}
    return {score: 2 * a * b / (a + b) if a and b else 0.0 for score, (a, b) in pairs.items()}


def compared(cells: Mapping[str, Sequence[Path]], facts: Mapping[str, object]) -> dict:
    """All rows of one data set, base and number of shots over the seeds.

    Every row is compared with PROTECT, or with the first row where that is missing: pictures are paired, and so are seeds, which
    share their shots.

    Args:
        cells: the folders of each row, one for each seed; a row that knows no seed has one.
        facts: what describes the group, with "data", "shots" and "base".
    """
    loaded = {row: [kept(folder) for folder in folders] for row, folders in cells.items()}
    rows = [row for row in cells if row not in CONTROLS]
    baseline = "PROTECT" if "PROTECT" in rows else rows[0]
    summary = {}
    for row, own in loaded.items():
        other = loaded[baseline]
        # What knows no seed stands against every seed.
        ours = own if len(own) == len(other) else own * len(other)
        summary[row] = {
            "parts": {part: general.summary([p[part] for p in own], SCORES) for part in own[0]},
            "against": {} if row == baseline else _against(ours, other),
        }
        if NOVEL in own[0]:
            summary[row]["parts"]["harmonic"] = _harmonic(own)
        elif row not in CONTROLS:
            where = (str(facts["data"]), int(facts["shots"]), str(facts["base"]))  # type: ignore[call-overload]
            summary[row]["published"] = published_scores(*where, row)
        more = [read_sealed(folder / RESULT).get("second") for folder in cells[row]]
        if all(more):
            summary[row]["second"] = {name: float(np.mean([found[name] for found in more])) for name in more[0]}
    return {**facts, "baseline": baseline, "rows": summary}


def _harmonic(own: list[Parts]) -> dict:
    by_seed = [harmonic(parts) for parts in own]
    return {
        s: {
            "mean": [round(float(np.mean([x[s] for x in by_seed])), 6)],
            "deviation": deviation([x[s] for x in by_seed]),
        }
        for s in SCORES
    }


def _against(ours: list[Parts], other: list[Parts]) -> dict:
    found = {part: general.against([p[part] for p in ours], [p[part] for p in other], SCORES) for part in ours[0]}
    if NOVEL in ours[0]:
        pairs = [(harmonic(a), harmonic(b)) for a, b in zip(ours, other, strict=True)]
        found["harmonic"] = {s: judged(None, [a[s] - b[s] for a, b in pairs]) for s in SCORES}
    return found


def table(content: Mapping) -> str:
    """The table in Markdown: percent, mean over the seeds and its deviation, the published number beside it, and the verdicts."""
    blocks = []
    for group in content["groups"]:
        seeds = f"seed{'s 1 to' if content['seeds'] > 1 else ''} {content['seeds']}"
        parts = list(next(iter(group["rows"].values()))["parts"])
        columns = [(part, score) for part in parts for score in SCORES]
        heads = [f"{'' if part == ALL else part + ' '}{TITLES[score]}" for part, score in columns]
        beside = ["published"] if parts == [ALL] else []
        lines = [
            f"{group['data']}, {group['shots']} shot{'s' * (group['shots'] > 1)}, {group['base']}, {seeds}; "
            f"{group['num_train']} training pictures, tested on {group['num_test']}, {group['num_nodes']} nodes",
            "",
            line(["", *heads, *beside, *(f"{head} against {group['baseline']}" for head in heads)]),
            "|---" * (1 + 2 * len(heads) + len(beside)) + "|",
        ]
        second: list[str] = []
        for row, facts in group["rows"].items():
            cells = [cell_value(facts["parts"].get(part, {}).get(score)) for part, score in columns]
            known = facts.get("published", {})
            published = ["/".join(f"{known[s]:.2f}" if s in known else "-" for s in SCORES) if known else ""]
            against = [cell_difference(facts["against"].get(part, {}).get(score)) for part, score in columns]
            lines.append(line([row, *cells, *(published if beside else []), *against]))
            second += (
                [f"{row}: " + ", ".join(f"{n} {v:.3f}" for n, v in facts["second"].items())]
                if "second" in facts
                else []
            )
        lines += ["", "On the second tree, mean over the seeds: " + "; ".join(second) + "."] if second else []
        blocks.append("\n".join(lines))
    note = (
        "Percent: mean over the seeds +- their standard deviation; published: LA/HCA/MTA of one run of the authors. Differences: 95 % "
        "interval over pictures, paired; after the semicolon over seeds, paired; a verdict needs both on one side of 0: one seed decides "
        "nothing."
    )
    return "\n\n".join([*blocks, note]) + "\n"
