"""What the page `mat` compares: rows, runs, the commands that make them, and how a difference is judged."""

import math
from collections.abc import Mapping, Sequence

from app_eval.measure.interval import Interval, unpaired
from app_eval.measure.tree_scores import SCORES
from app_eval.show.page import Claim, Claims, Column, tally

CONTROLS = ("zero-shot", "nearest picture")
VARIANTS = ("VANILLA", "PROTECT", "EUCLIDEAN", "SHARED", "SEPARATE", "HETEROGENEOUS")
# Classifiers of hier-lora on the same frozen features, without text.
FITTED = ("free head", "TreeLDA")
FIRST = ("nearest picture", *FITTED, "PROTECT", "EUCLIDEAN", "HETEROGENEOUS")
WHOLE, PLAIN = "HETEROGENEOUS", "PROTECT"
TOWERS = {
    "lite0": "EfficientNet-Lite0",
    "vit": "DINOv2 ViT-S/14",
    "mini-maple": "mini-CLIP, MaPLe prompts",
    "mini-promptsrc": "mini-CLIP, PromptSRC prompts",
}
STUDIES = {
    "main": "the variants",
    "radius": "unit features or their own radius",
    "intermediate": "how c_mid is found",
    "layers": "which depths give tokens",
    "defects": "the released computation",
    "flat": "no tree",
    "cross": "a second tree",
    "controls": "classifiers without text",
}
# The runs of the evidence: data, shots or training styles, tower, study.
PLANNED = [
    *[("emoji", 3, tower, "main") for tower in TOWERS],
    *[("cifar100-fewshot", shots, tower, "main") for tower in ("lite0", "vit") for shots in (1, 16)],
    *[("cifar100-fewshot", 16, "lite0", study) for study in STUDIES if study not in ("main", "controls")],
    *[(*key, "controls") for key in (("emoji", 3, "lite0"), ("emoji", 3, "vit"))],
    *[("cifar100-fewshot", shots, tower, "controls") for tower in ("lite0", "vit") for shots in (1, 16)],
]
# What a part of the method is, and the two rows that tell.
PARTS = (
    ("tree losses", "PROTECT", "VANILLA"),
    ("tokens of several depths, asked by the text", "EUCLIDEAN", "PROTECT"),
    ("entailment cones, one curvature", "SHARED", "EUCLIDEAN"),
    ("entailment cones, three curvatures", "SEPARATE", "EUCLIDEAN"),
    ("entailment cones, c_mid derived", "HETEROGENEOUS", "EUCLIDEAN"),
    ("two manifolds in place of one", "HETEROGENEOUS", "SHARED"),
    ("the whole method over tree losses", WHOLE, PLAIN),
    ("the whole method over a classifier without text", WHOLE, FITTED[0]),
    ("the whole method over the tree in closed form", WHOLE, FITTED[1]),
)
QUESTIONS = (
    "open, without figures: captions of COCO as queries. They have no hierarchy, so that tree losses and cones have nothing to go by; what "
    "is left of the method is the text query over layer tokens",
    "open, without figures: pictures with several labels. A picture then has several paths, while cut and node losses ask for one member "
    "of each cut and one child of each node",
)
PAGE = "hier page mat docs/results/mat-align.json docs/results/mat-align-published.json runs/mat/* docs/results/mat-align.md"
TERMS = {"c_mid": "the curvature between that of pictures and that of texts"}
TITLES = {"la": "leaf right", "hca": "every choice right", "mta": "right over tree cuts"}
ABBREVIATED = {"la": "LA", "hca": "HCA", "mta": "MTA"}

HEADS = tuple(Column(title) for title in TITLES.values())

Key = tuple[str, int, str, str]


def name_of(key: Key) -> str:
    """What a run is called."""
    data, shots, tower, study = key
    what = (
        "emoji of an unseen artist" if data == "emoji" else f"CIFAR-100 with {shots} picture{'s' * (shots > 1)} a class"
    )
    return f"{what}, {TOWERS[tower]}" + ("" if study == "main" else f": {STUDIES[study]}")


def percent(row: Mapping, score: str) -> Interval:
    """A score of a row in percent."""
    return Interval.read(row["scores"][score]).times(100)


def claim_of(entry: Mapping, ours: str, other: str, score: str, text: str) -> Claim:
    """Paired over pictures where that is stored; over seeds from the deviations of the two rows, which were not paired."""
    rows = entry["rows"]
    if not {ours, other} <= rows.keys():
        return Claim(text, None, None, digits=1)
    items = None
    for a, b, sign in ((ours, other, 1), (other, ours, -1)):
        stored = rows[a].get("against baseline" if rows[a]["baseline"] == b else f"against {b}")
        if items is None and stored is not None:
            items = Interval.read(stored[score]).times(100) if sign == 1 else -Interval.read(stored[score]).times(100)
    if items is None:
        a, b = (percent(rows[name], score) for name in (ours, other))
        # Of rows that no run compared: as if their pictures were not the same, which is wider.
        half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
        items = Interval(a.value - b.value, a.value - b.value - half, a.value - b.value + half)
    mean = [(rows[n]["scores"][score][0], rows[n]["deviation"][score], entry["seeds"]) for n in (ours, other)]
    return Claim(text, items, unpaired(*mean).times(100), digits=1)


def claims_of(entry: Mapping, ours: str, other: str, text: str = "") -> list[Claim]:
    """A claim for every score."""
    return [claim_of(entry, ours, other, score, text) for score in SCORES]


def tallies(entries: Sequence[Mapping], ours: str, other: str) -> dict[str, str]:
    """What every score says of two rows, over several runs, by its title."""
    return {TITLES[s]: tally([claim_of(entry, ours, other, s, "") for entry in entries]) for s in SCORES}


def listed(found: Mapping[str, str]) -> str:
    """The same as text."""
    return "; ".join(f"{title}: {words}" for title, words in found.items())


def block_of(found: Mapping, key: Key, claims: Sequence[Claim], title: str = "") -> Claims:
    """Claims that are judged only where the plain row of the same data and tower beats zero-shot."""
    entry = found.get((*key[:3], "main"), found[key])
    premise = claim_of(
        entry, "VANILLA", "zero-shot", "la", f"VANILLA against zero-shot, leaf right, on {name_of((*key[:3], 'main'))}"
    )
    return Claims(tuple(claims), title, premise)


def compared(entry: Mapping) -> list[tuple[str, str, str]]:
    """(what, row, other row) of everything that a run compares."""
    if entry["study"] == "main":
        return list(PARTS)
    rows = entry["rows"]
    return [
        (f"{n} against {r['baseline']}", n, r["baseline"])
        for n, r in rows.items()
        if n not in (*CONTROLS, r["baseline"])
    ]


def command_of(key: Key, entry: Mapping | None = None) -> str:
    """The command of a run, or of one that is still to be made."""
    data, shots, tower, study = key
    mini, main = tower.startswith("mini-"), study == "main"
    if entry is None:
        prompts = {"method": tower.removeprefix("mini-"), "epochs": 1, "batch_size": 128, "lr": 4e-3}
        size = 128 if (data, tower) == ("emoji", "lite0") else 96
        entry = {"rows": {}, "seeds": 3, "size": size, "settings": prompts if mini else {"epochs": 12, "lr": 2e-3}}
    fit = entry["settings"]
    names = [n for n in entry["rows"] if n not in CONTROLS and (study == "controls" or n not in FITTED)]
    rows = {"variant": " ".join(names)} if main else {"study": study, "rows": " ".join(f'"{n}"' for n in names)}
    rows |= {"seeds": entry["seeds"]}
    if mini:
        out = "" if fit["method"] == "maple" else f"runs/mat/emoji-{tower}"
        rows |= {
            "method": fit["method"],
            "epochs": fit["epochs"],
            "batch-size": fit["batch_size"],
            "lr": f"{fit['lr']:g}",
            "out": out,
        }
        return f"hier train mini-clip && hier train mat-mini {_flags(rows)}"
    start = {"data": data} | ({} if data == "emoji" else {"source": "DIR", "shots": shots})
    # Without a tree the data are others, so the folder is another; the other studies share their rows.
    out = f"runs/mat/{data}-{shots}-{tower}" + ("-flat" if study == "flat" else "")
    fitted = {"fit.epochs": fit["epochs"], "fit.lr": f"{fit['lr']:g}", "out": out}
    return f"hier train mat {_flags(start | {'size': entry['size'], 'tower': tower} | rows | fitted)}"


def _flags(words: Mapping[str, object]) -> str:
    return " ".join(f"--{name} {value}" for name, value in words.items() if value != "")


def absent(key: Key, entry: Mapping, names: Sequence[str]) -> str:
    """The command that runs what a run lacks of these rows."""
    return command_of(key, {**entry, "rows": dict.fromkeys(n for n in names if n not in entry["rows"])})
