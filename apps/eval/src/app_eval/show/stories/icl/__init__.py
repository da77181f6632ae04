"""What `icl-study`, `icl-distill` and `selection-study` tell: choosing, weighing and distilling demonstrations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from app_data.store.errors import DataError
from app_eval.ask.demonstration_task import BLIND, OURS, ZERO
from app_eval.measure.interval import unpaired
from app_eval.show.commands import read_json
from app_eval.show.page import Claim, Claims, Column, Figure, Page, Row, Section, Table, tally
from app_eval.show.stories.icl import six as six_tasks
from app_eval.show.stories.icl import taxonomy
from app_eval.show.stories.icl.cells import bits, claim, mean

__all__ = [
    "OURS",
    "collect",
    "distilled_section",
    "tell",
]  # the recipe icl-distill takes the name of the selector from here

EUCLIDEAN, KS = "anchors, Euclidean", 4
TURNED = "TopK-CLIP"  # RICES in the other order: the tables have it
TITLES = {"random": "random demonstrations", OURS: "hyperbolic anchors", EUCLIDEAN: "Euclidean anchors"}
VOTE = "vote of the best selector, no language model (control)"
FIRST = (ZERO, "random", "RICES", EUCLIDEAN, OURS)
# Without a language model: what is compared, the two rows.
HYPERBOLIC = "anchors, hyperbolic, mu "
COMPARED = (
    ("hyperbolic anchors against nearest pictures", HYPERBOLIC + "0", "cosine of pictures (TopK-CLIP, RICES)"),
    ("hyperbolic anchors against nearest pictures and questions", HYPERBOLIC + "0", "cosine of picture and question"),
    ("hyperbolic against Euclidean anchors", HYPERBOLIC + "0", EUCLIDEAN),
    ("depth at all against directions alone", HYPERBOLIC + "0", "anchors, directions alone (depth does not vary)"),
    ("depth weighed by 0.3 against 0", HYPERBOLIC + "0.3", HYPERBOLIC + "0"),
    ("depth weighed by 0.9 against 0", HYPERBOLIC + "0.9", HYPERBOLIC + "0"),
    ("curvature 2 against 0.5", HYPERBOLIC + "0.3, c 2", HYPERBOLIC + "0.3, c 0.5"),
)
# (title, selector, calibration) of the parts one by one.
ABLATION = (
    ("neither", "random", "none"), ("anchors only", OURS, "none"), ("calibration only", "random", "lorentz"), ("both", OURS, "lorentz"),
    ("anchors, calibration with Euclidean anchors", OURS, "euclidean"), ("Euclidean throughout", EUCLIDEAN, "euclidean"),
)  # fmt: skip
LEVELS = {"easy-vqa": ("kind of answer", "answer"), "emoji": ("group", "subgroup", "leaf")}
STUDY = "hier eval icl runs/icl-mini --out docs/results/hyper-icl-model.json"
TERMS = {
    "RICES": "the pictures nearest to the query's",
    "MMICES": "nearest pictures, then nearest questions",
    "LoRA": "low-rank adaptation of the weights",
}


def collect(sources: Sequence[Path]) -> dict[str, dict]:
    """The JSON of selection-study and of icl-study; if given, those of icl-distill on that model, of the taxonomy and of six tasks."""
    found: dict[str, dict] = {}
    for source in sources:
        stored = read_json(source / "result.json" if source.is_dir() else source)
        kinds = {"icl-distill": "-distilled", "icl-mini": "-model", "icl-table": "-six", "icl-taxonomy": "-taxonomy"}
        kind = kinds.get(stored.get("recipe") or stored.get("study"), "")
        if stored.get("format") != 1 or (not kind and "studies" not in stored):
            raise DataError(
                f"{source} is no JSON of selection-study, icl-study, icl-distill or a table of hier eval icl"
            )
        if stored.get("quick"):
            raise DataError(f"{source} is of a --quick run: run the study in full")
        found[kind] = stored
    for kind, study in (("", "selection-study"), ("-model", "icl-study")):
        if kind not in found:
            raise DataError(f"the JSON of {study} is missing: give it as well")
    if not any(task["rows"] for task in found["-model"]["tasks"]):
        raise DataError("the JSON of icl-study holds no row yet: let icl-study go on")
    if found.get("-distilled", found["-model"])["model"] != found["-model"]["model"]:
        raise DataError("icl-distill must have been run on the model of icl-study: give both JSON files of one model")
    return found


def tell(content: Mapping[str, dict]) -> Page:
    """The page."""
    chosen, model, distilled = content[""], content["-model"], content.get("-distilled")
    six, tree = ([content[key]] if key in content else [] for key in ("-six", "-taxonomy"))
    tasks = [task for task in model["tasks"] if task["rows"]]
    columns = tuple(Column(f"{t['name']} with {_k(t)} demonstrations: right, %", 1) for t in tasks)
    values = {s: tuple(mean(bits(t, s, 0 if s == ZERO else _k(t))) for t in tasks) for s in FIRST}
    votes = [
        [mean(bits(t, s, _k(t), "vote")) for s in t["selectors"] if bits(t, s, _k(t), "vote") is not None]
        for t in tasks
    ]
    values[VOTE] = tuple(max(found, key=lambda v: v.value) if found else None for found in votes)
    told = [
        ", ".join(f"{words} {v[i].value:.1f} %" if v[i] else f"{words} (not run)" for words, v in (
            ("without demonstrations", values[ZERO]), ("with those that hyperbolic anchors choose", values[OURS]),
            ("the vote of the best ones, without the model,", values[VOTE])))
        for i in range(len(tasks))
    ]  # fmt: skip
    rows = tuple(Row(TITLES.get(s, s), v if any(v) else (), STUDY) for s, v in values.items())
    panels = ((c.title, {TITLES.get(s, s): v[i] for s, v in values.items() if v[i]}) for i, c in enumerate(columns))
    return Page(
        title="hyper-icl: choosing demonstrations",
        outcome="A small language model answers correctly: "
        + "; ".join(f"on {t['name']} {w}" for t, w in zip(tasks, told, strict=True))
        + ".",
        figure=Figure("right answers of every row", tuple(panels)),
        table=Table(
            columns, rows, note="Brackets are 95 % bootstrap intervals over the queries, seeds averaged first."
        ),
        control=VOTE,
        body=(
            _setting(model), *map(_judged, tasks), distilled_section(distilled), *(six_tasks.short(x) for x in six),
            *(taxonomy.short(x) for x in tree), _selection(chosen),
            _not_run(tasks),
        ),
        tables=(
            *map(_task_tables, tasks), *(section for x in six for section in six_tasks.tables(x)),
            *(taxonomy.tables(x) for x in tree),
            *map(_study_tables, chosen["studies"]),
        ),
        commands=(
            "hier eval selection --out docs/results/hyper-icl.json",
            f"hier train icl-mini {model['model'].get('options', '')}".strip(),
            STUDY,
            "hier train icl-distill",
            *(six_tasks.COMMAND for _ in six),
            *(line for x in tree for line in taxonomy.commands(x)),
            f"hier page icl docs/results/hyper-icl.json {'docs/results/hyper-icl-six.json ' * len(six)}"
            f"{'docs/results/hyper-icl-taxonomy.json ' * len(tree)}docs/results/hyper-icl.md --model "
            "docs/results/hyper-icl-model.json --distilled docs/results/hyper-icl-distilled.json",
        ),
        terms=TERMS,
    )  # fmt: skip


def _k(task: Mapping) -> int:
    """The number of demonstrations that the page shows."""
    ks = {cell["k"] for cell in task["cells"]}
    return KS if KS in ks else max(ks)


def _setting(model: Mapping) -> Section:
    card, strength = model["model"], model["lambda"]
    planned = card.get("planned_steps", card["steps"])
    steps = (
        f"{card['steps']} steps" if planned == card["steps"] else f"stopped after {card['steps']} of {planned} steps"
    )
    chosen = ", ".join(f"{strength[kind]['lambda']:g} ({kind})" for kind in ("lorentz", "euclidean"))
    how = (
        f"was chosen on {strength['n']} questions, which is noise; `hier eval icl` now fixes it at 1"
        if "n" in strength
        else "is fixed"
    )
    said = (
        f"One model was trained (EfficientNet-Lite0 and SmolLM2-135M frozen; a connector and LoRA of rank {card['rank']}, {steps}), so "
        "nothing here says how another training would come out. A seed draws random demonstrations and trains the anchors; "
        f"{len(model['seeds'])} were planned. Anchors train on the answers of the pool, so their choice is a classifier already: compare "
        "it with the vote. Answers are scored by likelihood over the closed set. Calibration weighs demonstrations by their distance in "
        f"the attention; its strength, {chosen}, {how}.",
    )
    cut = "The study was cut short: selectors and numbers of demonstrations that are missing were not run."
    return Section("What was held fixed", (*said, *(() if model["complete"] else (cut,))))


def _judged(task: Mapping) -> Section:
    k = _k(task)
    plain = {
        s: claim(f"{TITLES.get(s, s)} against none", task, (s, k, "none"), (ZERO, 0, "none")) for s in task["selectors"]
    }
    others = [
        (f"hyperbolic anchors against {TITLES.get(s, s)}", (OURS, k, "none"), (s, k, "none"))
        for s in task["selectors"]
        if s not in (OURS, TURNED)
    ]
    others += [
        (f"calibration of {TITLES[s]} against none", (s, k, "lorentz"), (s, k, "none")) for s in ("random", OURS)
    ]
    plain["vote"] = claim("hyperbolic anchors against their vote", task, (OURS, k, "none"), (OURS, k, "vote"))
    ranked = tuple(claim(text, task, a, b) for text, a, b in others)
    zero, blind = (mean(bits(task, name, 0)) for name in (ZERO, BLIND))
    facts = f"{task['num_queries']} queries, a pool of {task['num_pool']:,}, {task['num_answers']} answers, {k} demonstrations."
    if zero and blind:
        facts += (
            f" Without demonstrations {zero.value:.1f} % are right, without the picture as well {blind.value:.1f} %."
        )
    return Section(
        f"{task['name']}: percent right",
        (facts, Claims(tuple(plain.values())), Claims(ranked, premise=plain.get("random"))),
    )


def distilled_section(result: Mapping | None) -> Section:
    """A student against the calibrated model that it learned from."""
    title = "Distilled against calibrated attention"
    if result is None:
        return Section(title, (Table((Column(""),), (Row("distilled", command="hier train icl-distill"),)),))
    options, masses, claims = result["options"], result["masses"], []
    for selector in dict.fromkeys(cell["selector"] for cell in result["cells"]):
        task = {"cells": [{**cell, "k": 0} for cell in result["cells"] if cell["selector"] == selector]}
        for a, b in (("calibrated", "the model"), ("distilled", "calibrated")):
            cells = ((selector, 0, "model" if name == "the model" else name) for name in (a, b))
            claims.append(claim(f"{a} against {b}, {TITLES.get(selector, selector)}", task, *cells))
    text = (
        f"A student learns the attention of the calibrated model (strength {options['strength']:g}) by LoRA of rank {options['rank']}, in "
        f"{options['steps']} steps of {options['batch_size']} questions. Over {masses['n']} test questions its attention diverges from the "
        f"calibrated model's by {masses['student']:.4g}, that of the uncalibrated model by {masses['model']:.4g}. One student was trained."
    )
    return Section(title, (text, Claims(tuple(claims))))


def _votes(row: Mapping, queries: int) -> tuple[tuple, tuple]:
    """(mean, deviation, number) of a vote over queries, and over seeds, where the stored range bounds the deviation from above."""
    share, seeds = row["scores"]["vote"], row["seeds"]
    half = seeds // 2
    widest = row["spread"]["vote"] * math.sqrt(half * (seeds - half) / (seeds * (seeds - 1))) if seeds > 1 else 0.0
    return (share, math.sqrt(share * (1 - share)), queries), (share, widest, seeds)


def _compared(study: Mapping) -> Claims:
    largest, claims = max((row["k"] for row in study["rows"]), default=0), []
    rows = {row["name"]: _votes(row, study["num_queries"]) for row in study["rows"] if row["k"] == largest}
    for text, ours, other in COMPARED:
        if {ours, other} <= rows.keys():
            items, seeds = (unpaired(a, b).times(100) for a, b in zip(rows[ours], rows[other], strict=True))
            claims.append(Claim(text, items, seeds, digits=1))
    return Claims(tuple(claims), f"{study['name']}, vote of {largest} demonstrations, percent right")


def _selection(chosen: Mapping) -> Section:
    told = "; ".join(f"{study['name']} {tally(_compared(study).claims)}" for study in chosen["studies"])
    text = (
        f"Features are frozen (EfficientNet-Lite0, MiniLM); only the anchors are trained, {chosen['steps']} steps, with "
        f"{len(chosen['seeds'])} seeds. The vote is the most frequent answer of the chosen demonstrations."
        + (f" Comparisons of votes, by selector, depth and curvature: {told} (all in the tables)." if told else "")
    )
    return Section("Without a language model", (text,))


def _not_run(tasks: Sequence[Mapping]) -> Section:
    absent = [f"{t['name']}: {s} ({STUDY})" for t in tasks for s in t["selectors"] if bits(t, s, _k(t)) is None]
    lines = (
        "the published adapter with a frozen teacher, Idefics-9B and Idefics2-8B (their weights are out of reach)",
        "a fixed scale of the lift against a learned one",
    )
    return Section("Not run", ((*lines, *absent),))


def _task_tables(task: Mapping) -> Section:
    heads = ("right, %", "with Lorentz calibration", "with Euclidean calibration", "vote, no language model")
    kinds, none, zero = np.array(task["kinds"]), (ZERO, 0, "none"), bits(task, ZERO, 0)
    shares = [f"{kind} {100 * zero.mean(0)[kinds == kind].mean():.1f} %" for kind in dict.fromkeys(task["kinds"])]
    parts: list = [f"Without demonstrations, by kind of question: {', '.join(shares)}."]
    for k in sorted({cell["k"] for cell in task["cells"]} - {0}):
        rows, claims = [], []
        for s in task["selectors"]:
            known = bits(task, s, k)
            cells = tuple(mean(bits(task, s, k, c)) for c in ("none", "lorentz", "euclidean", "vote"))
            rows.append(Row(s, () if known is None else (len(known), *cells), STUDY))
            claims += [
                claim(f"{s} against {w}", task, (s, k, "none"), o)
                for w, o in (("none", none), ("its vote", (s, k, "vote")))
            ]
        table = Table((Column("seeds"), *(Column(h, 1) for h in heads)), tuple(rows), title=f"{k} demonstrations")
        turned = claim(f"{OURS} against {TURNED}", task, (OURS, k, "none"), (TURNED, k, "none"))
        parts += [table, f"In all: {tally(claims)}.", Claims((*claims, turned))]
    against = [claim(title, task, (s, _k(task), c), none) for title, s, c in ABLATION]
    parts.append(Claims(tuple(against), f"The parts one by one, {_k(task)} demonstrations, against none"))
    return Section(f"{task['name']}, with a language model", tuple(parts))


def _study_tables(study: Mapping) -> Section:
    levels = LEVELS.get(study["name"], ())
    levels = levels if len(levels) == study["levels"] else tuple(f"level {i + 1}" for i in range(study["levels"]))
    heads = ("seeds", *(f"agreement: {level}" for level in levels), "some demonstration has it", "vote")
    keys, tables = (*(f"level_{i + 1}" for i in range(len(levels))), "any", "vote"), []
    for k in sorted({row["k"] for row in study["rows"]}):
        rows = []
        for row in (row for row in study["rows"] if row["k"] == k):
            cells = (
                f"{row['scores'][x]:.3f}" + (f" +- {row['spread'][x]:.3f}" if row["seeds"] > 1 else "") for x in keys
            )
            rows.append(Row(row["name"], (row["seeds"], *cells)))
        tables.append(Table(tuple(map(Column, heads)), tuple(rows), title=f"{k} demonstrations"))
    note = f"Pool {study['num_pool']:,}, queries {study['num_queries']:,}. Shares; behind +- stands the largest difference between seeds."
    unpaired_note = (
        "Answers were not kept query by query, so these intervals are unpaired, wider than paired ones: over queries from the shares, over "
        "seeds from the stored ranges."
    )
    return Section(f"{study['name']}, without a language model", (note, *tables, unpaired_note, _compared(study)))
