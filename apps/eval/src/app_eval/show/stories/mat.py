"""What the recipes `mat` and `mat-mini` tell: which parts of Modality Alignment across Trees earn their keep."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from app_data.store.errors import DataError
from app_eval.measure.interval import Interval, unpaired
from app_eval.measure.solvers import solvers_at_the_end
from app_eval.measure.tree_scores import SCORES
from app_eval.show.commands import read_json
from app_eval.show.page import Claim, Claims, Column, Figure, Page, Row, Section, Table, tally
from app_eval.show.stories import EMOJI_CREDIT

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

Key = tuple[str, int, str, str]


def collect(sources: Sequence[Path]) -> dict[str, object]:
    """All results, one for each run, later sources replacing earlier ones; beside them the paper's numbers, if given."""
    found, published = {}, {}
    for source in sources:
        files = sorted(source.glob("result-*.json")) if source.is_dir() else [source]
        if not files:
            raise DataError(f"{source} holds no finished result: finish the run first with hier train mat")
        for file in files:
            stored = read_json(file)
            if isinstance(stored, dict) and "published" in stored:
                published = {"-published": stored}
                continue
            entries = [stored] if isinstance(stored, dict) else stored
            found |= {(entry["data"], entry["shots"], entry["tower"], entry["study"]): entry for entry in entries}
    return {"": [found[key] for key in sorted(found)], **published}


def tell(content: Mapping) -> Page:
    """The page."""
    found = _joined({(e["data"], e["shots"], e["tower"], e["study"]): e for e in content[""]})
    main = {key: found[key] for key in PLANNED if key in found and key[3] == "main"}
    if not main:
        raise DataError("no run of the variants is at hand: run hier train mat first")
    shown = next((key for key in [("cifar100-fewshot", 16, "lite0", "main")] if key in main), next(iter(main)))
    judged = [key for key in main if _block(found, key, ()).premise.word() == "better"]
    silent = [_name(key) for key in main if key not in judged]
    rows = found[shown]["rows"]
    told = {name: f"{_percent(rows[name], 'hca').value:.1f} %" if name in rows else "(not run)" for name in FIRST}
    table = Table(
        tuple(Column(f"{TITLES[s]} ({ABBREVIATED[s]}), %", 1) for s in SCORES),
        tuple(
            Row(
                n, tuple(_percent(rows[n], s) for s in SCORES) if n in rows else (), _absent(shown, found[shown], FIRST)
            )
            for n in FIRST
        ),
        first=_name(shown),
        note="Means over seeds; brackets are 95 % bootstrap intervals over the test pictures. The choice is among siblings, on every step "
        "from the top to the leaf; a cut is a set of nodes that covers every leaf once. Always naming the majority member of each cut is "
        f"right over {100 * found[shown]['mta_majority']:.1f} %.",
    )
    panels = {f"{TITLES[s]}, %": {n: _percent(rows[n], s) for n in FIRST if n in rows} for s in SCORES}
    strongest = max(
        ("nearest picture", *(n for n in FITTED if n in rows)), key=lambda n: _percent(rows[n], "hca").value
    )
    frozen = [key for key in judged if not key[2].startswith("mini-")]
    lower = [_lower(found, frozen, score) for score in SCORES]
    return Page(
        title="Modality Alignment across Trees on towers that are reachable",
        outcome=f"On frozen features the whole method ({WHOLE}) scores below tree losses alone ({PLAIN}) in {lower[0]} of {len(frozen)} "
        f"runs at the leaf, in {lower[1]} over every choice down the tree and in {lower[2]} over tree cuts; on {_name(shown)} it gets "
        f"every choice right for {told[WHOLE]} of the test pictures, and the strongest control, {strongest}, for "
        f"{_percent(rows[strongest], 'hca').value:.1f} %.",
        figure=Figure(f"scores of the rows on {_name(shown)}", tuple(panels.items())),
        table=table,
        control=strongest,
        body=(
            _known(found, judged, frozen),
            _setting(),
            _parts(found, judged, silent),
            _studies(found),
            _not_run(found),
        ),
        tables=(*(_run(found, key) for key in PLANNED if key[3] != "controls"), _solvers(main), *_published(content.get("-published"))),
        commands=(PAGE,),
        terms=TERMS,
        credits=(EMOJI_CREDIT,),
    )  # fmt: skip


def _joined(found: dict[Key, dict]) -> dict[Key, dict]:
    """The runs, with the classifiers without text beside the variants of the same data and tower."""
    joined = dict(found)
    for key, entry in found.items():
        beside = found.get((*key[:3], "controls"))
        if key[3] == "main" and beside is not None:
            more = {name: beside["rows"][name] for name in FITTED if name in beside["rows"]}
            joined[key] = {**entry, "rows": {**entry["rows"], **more}}
    return joined


def _lower(found: Mapping, keys: Sequence[Key], score: str) -> int:
    """In how many runs the whole method's mean lies below that of the tree losses alone."""
    pairs = [found[key]["rows"] for key in keys]
    return sum(
        rows[WHOLE]["scores"][score][0] < rows[PLAIN]["scores"][score][0]
        for rows in pairs
        if {WHOLE, PLAIN} <= rows.keys()
    )


def _known(found: Mapping, judged: Sequence[Key], frozen: Sequence[Key]) -> Section:
    lines = [
        "the whole method against tree losses alone, by the rule below: "
        + "; ".join(f"{TITLES[s]}: {tally([_claim(found[k], WHOLE, PLAIN, s, '') for k in frozen])}" for s in SCORES)
    ]
    layers = found.get(("cifar100-fewshot", 16, "lite0", "layers"))
    ours, other = "tokens: mean, no text query", "tokens: rule"
    if layers is not None and {ours, other} <= layers["rows"].keys():
        words = _block(
            found, ("cifar100-fewshot", 16, "lite0", "layers"), [_claim(layers, ours, other, s, "") for s in SCORES]
        ).words
        moves = [_percent(layers["rows"][ours], s).value - _percent(layers["rows"][other], s).value for s in SCORES]
        told = ", ".join(f"{TITLES[s]} {m:+.1f} points ({w})" for s, m, w in zip(SCORES, moves, words, strict=True))
        lines.append(f"a plain mean of the tokens against the text query: {told}")
    for name in FITTED:
        beside = [found[key] for key in frozen if name in found[key]["rows"]]
        told = "; ".join(f"{TITLES[s]}: {tally([_claim(e, WHOLE, name, s, '') for e in beside])}" for s in SCORES)
        lines += (
            [f"the whole method against {name}, which reads no text, on the same features: {told}"] if beside else []
        )
    mini = [key for key in found if key[2].startswith("mini-") and key[3] == "main"]
    for key in mini:
        rows = found[key]["rows"]
        lines.insert(
            0,
            f"no figure of prompts here informs: our own CLIP names {_percent(rows['zero-shot'], 'la').value:.1f} % of the leaves before "
            f"tuning and {_percent(rows['VANILLA'], 'la').value:.1f} % with tuned prompts, the nearest picture "
            f"{_percent(rows['nearest picture'], 'la').value:.1f} %; its rows are printed and counted nowhere"
            if key not in judged
            else f"prompts on our own CLIP are judged: {_name(key)}",
        )
    if not mini:
        lines.insert(0, "no figure of prompts here informs: none was run")
    return Section("What is known", (tuple(lines),))


def _name(key: Key) -> str:
    data, shots, tower, study = key
    what = (
        "emoji of an unseen artist" if data == "emoji" else f"CIFAR-100 with {shots} picture{'s' * (shots > 1)} a class"
    )
    return f"{what}, {TOWERS[tower]}" + ("" if study == "main" else f": {STUDIES[study]}")


def _percent(row: Mapping, score: str) -> Interval:
    return Interval.read(row["scores"][score]).times(100)


def _claim(entry: Mapping, ours: str, other: str, score: str, text: str) -> Claim:
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
        a, b = (_percent(rows[name], score) for name in (ours, other))
        # Of rows that no run compared: as if their pictures were not the same, which is wider.
        half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
        items = Interval(a.value - b.value, a.value - b.value - half, a.value - b.value + half)
    mean = [(rows[n]["scores"][score][0], rows[n]["deviation"][score], entry["seeds"]) for n in (ours, other)]
    return Claim(text, items, unpaired(*mean).times(100), digits=1)


def _block(found: Mapping, key: Key, claims: Sequence[Claim], title: str = "") -> Claims:
    """Claims that are judged only where the plain row of the same data and tower beats zero-shot."""
    entry = found.get((*key[:3], "main"), found[key])
    premise = _claim(
        entry, "VANILLA", "zero-shot", "la", f"VANILLA against zero-shot, leaf right, on {_name((*key[:3], 'main'))}"
    )
    return Claims(tuple(claims), title, premise)


def _compared(entry: Mapping) -> list[tuple[str, str, str]]:
    """(what, row, other row) of everything that a run compares."""
    if entry["study"] == "main":
        return list(PARTS)
    rows = entry["rows"]
    return [
        (f"{n} against {r['baseline']}", n, r["baseline"])
        for n, r in rows.items()
        if n not in (*CONTROLS, r["baseline"])
    ]


def _setting() -> Section:
    return Section(
        "What was held fixed",
        (
            "These are not the paper's experiments: the paper tunes the prompts of CLIP, and no CLIP weights can be had here. The towers "
            "are "
            "frozen. Trained are one linear map for each depth, one of the text, the attention, the curvatures and the scale of the "
            "cosines. VANILLA (cross-entropy of leaves) and PROTECT (VANILLA with losses over tree cuts) train the map of the last depth "
            "alone; EUCLIDEAN adds tokens of several depths, SHARED, SEPARATE and HETEROGENEOUS add entailment cones. So rows with several "
            "tokens have more trainable numbers; the tables print them. One learning rate, set beforehand, serves every row. On mini-CLIP, "
            "a small model of our own, prompts are tuned for few steps. Two classifiers read the features of the last depth and no text: a "
            "free head over the leaves, trained for as many epochs by a loss that knows the tree (HXE), and TreeLDA, in closed form.",
        ),
    )


def _parts(found: Mapping, judged: Sequence[Key], silent: Sequence[str]) -> Section:
    rows = []
    for what, ours, other in PARTS:
        claims = {s: [_claim(found[key], ours, other, s, what) for key in judged] for s in SCORES}
        rows.append(Row(f"{what}: {ours} against {other}", tuple(tally(claims[s]) for s in SCORES)))
    note = (
        f"Verdicts over {len(judged)} runs. A row is better or worse where the interval of its difference excludes 0 both over test "
        "pictures (paired; unpaired, and so wider, against classifiers without text) and over seeds (from the deviations of both rows); "
        "nothing corrects for the number of comparisons."
    )
    more = f"Not counted, because VANILLA does not beat zero-shot at the leaves: {'; '.join(silent)}." if silent else ""
    heads = tuple(Column(TITLES[s]) for s in SCORES)
    return Section(
        "Which parts of the method earn their keep", (Table(heads, tuple(rows), note=note), *([more] if more else []))
    )


def _studies(found: Mapping) -> Section:
    rows = []
    for key in (k for k in PLANNED if k[3] not in ("main", "controls") and k in found):
        for text, ours, other in _compared(found[key]):
            block = _block(found, key, [_claim(found[key], ours, other, s, text) for s in SCORES])
            rows.append(Row(text, block.words))
    place = "on CIFAR-100 with 16 pictures a class, EfficientNet-Lite0"
    heads = tuple(Column(TITLES[s]) for s in SCORES)
    return Section(f"One choice at a time, {place}", (Table(heads, tuple(rows)) if rows else "Not run.",))


def _not_run(found: Mapping) -> Section:
    lines = [_name(key) for key in PLANNED if key not in found] + [
        "the paper's own experiments (their numbers stand in the tables): hier train mat-clip, where CLIP weights are at hand",
        *QUESTIONS,
    ]
    return Section("Not run", (tuple(lines),))


def _command(key: Key, entry: Mapping | None = None) -> str:
    """The command of a run, or of one that is still to be made."""
    data, shots, tower, study = key
    mini = tower.startswith("mini-")
    if entry is None:
        fit = (
            {"method": tower.removeprefix("mini-"), "epochs": 1, "batch_size": 128, "lr": 4e-3}
            if mini
            else {"epochs": 12, "lr": 2e-3}
        )
        size = 128 if (data, tower) == ("emoji", "lite0") else 96
        entry = {"rows": {}, "seeds": 3, "size": size, "settings": fit}
    rows, fit = (
        [
            f'"{name}"' if study != "main" else name
            for name in entry["rows"]
            if name not in CONTROLS and (study == "controls" or name not in FITTED)
        ],
        entry["settings"],
    )
    words = [
        *(["--study", study] if study != "main" else []),
        *(["--rows" if study != "main" else "--variant", *rows] if rows else []),
    ]
    words += ["--seeds", str(entry["seeds"])]
    if mini:
        words += [
            "--method",
            fit["method"],
            "--epochs",
            str(fit["epochs"]),
            "--batch-size",
            str(fit["batch_size"]),
            "--lr",
            f"{fit['lr']:g}",
        ]
        words += [] if fit["method"] == "maple" else ["--out", f"runs/mat/emoji-{tower}"]
        return "hier train mini-clip && hier train mat-mini " + " ".join(words)
    start = ["--data", data, *([] if data == "emoji" else ["--source", "DIR", "--shots", str(shots)])]
    # Without a tree the data are others, so the folder is another; the other studies share their rows.
    out = f"runs/mat/{data}-{shots}-{tower}" + ("-flat" if study == "flat" else "")
    words += ["--fit.epochs", str(fit["epochs"]), "--fit.lr", f"{fit['lr']:g}", "--out", out]
    return "hier train mat " + " ".join([*start, "--size", str(entry["size"]), "--tower", tower, *words])


def _absent(key: Key, entry: Mapping, names: Sequence[str]) -> str:
    """The command that runs what a run lacks of these rows."""
    return _command(key, {**entry, "rows": dict.fromkeys(n for n in names if n not in entry["rows"])})


def _run(found: Mapping, key: Key) -> Section:
    entry = found.get(key)
    heads = (
        *(Column(f"{TITLES[s]}, %", 1) for s in SCORES),
        Column("deviation over seeds, %"),
        Column("trained numbers"),
    )
    if entry is None:
        return Section(_name(key), (Table(heads, (Row("all rows", command=_command(key)),)),))
    rows = []
    for name, row in entry["rows"].items():
        spread = ", ".join("-" if row["deviation"][s] is None else f"{100 * row['deviation'][s]:.1f}" for s in SCORES)
        trained = row["num_trained"][0] if "num_trained" in row else ""
        rows.append(Row(name, (*(_percent(row, s) for s in SCORES), spread, trained)))
    fit = entry["settings"]
    note = (
        f"{entry['num_train']} training and {entry['num_test']} test pictures, {entry['num_nodes']} nodes, {entry['seeds']} seeds; AdamW, "
        f"{fit['epochs']} epochs of batches of {fit['batch_size']}, rate {fit['lr']:g}; curvatures start at {fit['c_img']:g} and "
        f"{fit['c_txt']:g}. The majority member of each cut is right over {100 * entry['mta_majority']:.1f} %."
    )
    claims = [_claim(entry, a, b, s, f"{what}, {TITLES[s]}") for what, a, b in _compared(entry) for s in SCORES]
    absent = [name for name in VARIANTS if key[3] == "main" and name not in entry["rows"]]
    rows += [Row(name, command=_absent(key, entry, absent)) for name in absent]
    if key[3] == "main" and not key[2].startswith("mini-"):
        # One picture a class has no spread within its class, which TreeLDA measures.
        absent = [n for n in FITTED if n not in entry["rows"] and (n != "TreeLDA" or key[1] > 1)]
        beside = _command((*key[:3], "controls"), {**entry, "rows": dict.fromkeys(absent)})
        rows += [Row(name, command=beside) for name in absent]
    tables = (Table(heads, tuple(rows)), _block(found, key, claims), *_geometry(entry), *_second(entry))
    return Section(_name(key), (note, *tables), _command(key, entry))


def _geometry(entry: Mapping) -> list[Table | str]:
    rows = []
    for name, row in entry["rows"].items():
        curves, met = row.get("curvatures"), row.get("met", [])
        ends = (
            ["", ""]
            if curves is None
            else [
                ", ".join(f"{c:.4f}" for c in curves[0][0][1:]),
                "; ".join(", ".join(f"{c:.4f}" for c in x[-1][1:]) for x in curves),
            ]
        )
        between = "; ".join(f"{100 * x:.0f}" for x in row.get("c_mid_between", []))
        cones = "; ".join("/".join("-" if x != x else f"{100 * x:.1f}" for x in m.values()) for m in met)
        looked = row.get("attention", [])
        shares = " / ".join(f"{sum(x) / len(looked):.2f}" for x in zip(*looked, strict=True))
        if curves is not None or looked:
            rows.append(Row(name, (*ends, between, cones, shares)))
    heads = ("c_img, c_txt, c_mid at the first step", "at the last step, by seed", "steps with c_mid between, %",
             "cones met, %: pictures/texts/across", "attention on tokens, shallow to deep")  # fmt: skip
    note = "Cones are counted in fp64. With unit features of one scale, only the features' own radius can meet a cone."
    return [Table(tuple(Column(h) for h in heads), tuple(rows), note=note)] if rows else []


def _second(entry: Mapping) -> list[Table]:
    rows = {name: row["second"] for name, row in entry["rows"].items() if "second" in row}
    if not rows:
        return []
    scores = tuple(next(iter(rows.values()))[0])
    means = tuple(Row(n, tuple(sum(x[s] for x in by) / len(by) for s in scores)) for n, by in rows.items())
    return [Table(tuple(Column(s) for s in scores), means, title="The second tree, mean over seeds")]


def _solvers(main: Mapping) -> Section:
    ends = {
        _name(key): solvers_at_the_end(entry["rows"]["HETEROGENEOUS"]["curvatures"])
        for key, entry in main.items()
        if "curvatures" in entry["rows"].get("HETEROGENEOUS", {})
    }
    heads = tuple(Column(name, 4) for name in next(iter(ends.values()), {}))
    note = (
        "At the curvatures of the last step, mean over seeds. Exact: the minimiser of the summed Kullback-Leibler divergences of wrapped "
        "normals in 384 dimensions, deviation 384^-1/2, space components identified. This says how much the answer moves, not whether a "
        "model gets better by it."
    )
    rows = tuple(Row(name, tuple(found.values())) for name, found in ends.items())
    return Section(
        "Where the other ways to find c_mid would put it", (Table(heads, rows, note=note) if rows else "Not run.",)
    )


def _published(stored: Mapping | None) -> list[Section]:
    if stored is None:
        return []
    rows = [
        Row(f"{r['shots']} shot, {r['method']}", tuple("/".join(f"{x:.2f}" for x in v) for v in r["values"]))
        for r in stored["rows"]
    ]
    rows.append(Row("MTA of the majority", tuple(f"{x:.1f}" for x in stored["majority MTA"])))
    title = next(name for name in stored if name.startswith("HCA"))
    ablation = tuple(Row(name, tuple(values)) for name, values in stored[title].items())
    note = f"LA/HCA/MTA in percent, from {stored['published']}; {stored['models']}. Other models and test sets: compare nothing across."
    places = title.rpartition(" on ")[2].split(", ")
    first, second = (tuple(Column(name, 2) for name in names) for names in (stored["data"], places))
    return [
        Section(
            "Published numbers (the paper's, not ours)",
            (note, Table(first, tuple(rows)), Table(second, ablation, title=title)),
        )
    ]
