"""What the recipes `mat` and `mat-mini` tell: which parts of Modality Alignment across Trees earn their keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from app_data.store.errors import DataError
from app_eval.measure.tree_scores import SCORES
from app_eval.show.commands import read_json
from app_eval.show.page import Column, Figure, Page, Row, Section, Table
from app_eval.show.stories import EMOJI_CREDIT
from app_eval.show.stories.mat import plan, tables


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
    main = {key: found[key] for key in plan.PLANNED if key in found and key[3] == "main"}
    if not main:
        raise DataError("no run of the variants is at hand: run hier train mat first")
    shown = next((key for key in [("cifar100-fewshot", 16, "lite0", "main")] if key in main), next(iter(main)))
    judged = [key for key in main if plan.block_of(found, key, ()).premise.word() == "better"]
    silent = [plan.name_of(key) for key in main if key not in judged]
    rows = found[shown]["rows"]
    told = {
        name: f"{plan.percent(rows[name], 'hca').value:.1f} %" if name in rows else "(not run)" for name in plan.FIRST
    }
    table = Table(
        tuple(Column(f"{plan.TITLES[s]} ({plan.ABBREVIATED[s]}), %", 1) for s in SCORES),
        tuple(
            Row(
                n,
                tuple(plan.percent(rows[n], s) for s in SCORES) if n in rows else (),
                plan.absent(shown, found[shown], plan.FIRST),
            )
            for n in plan.FIRST
        ),
        first=plan.name_of(shown),
        note="Means over seeds; brackets are 95 % bootstrap intervals over the test pictures. The choice is among siblings, on every step "
        "from the top to the leaf; a cut is a set of nodes that covers every leaf once. Always naming the majority member of each cut is "
        f"right over {100 * found[shown]['mta_majority']:.1f} %.",
    )
    panels = {f"{plan.TITLES[s]}, %": {n: plan.percent(rows[n], s) for n in plan.FIRST if n in rows} for s in SCORES}
    strongest = max(
        ("nearest picture", *(n for n in plan.FITTED if n in rows)), key=lambda n: plan.percent(rows[n], "hca").value
    )
    frozen = [key for key in judged if not key[2].startswith("mini-")]
    lower = [_lower(found, frozen, score) for score in SCORES]
    return Page(
        title="Modality Alignment across Trees on towers that are reachable",
        outcome=f"On frozen features the whole method ({plan.WHOLE}) scores below tree losses alone ({plan.PLAIN}) in {lower[0]} of "
        f"{len(frozen)} runs at the leaf, in {lower[1]} over every choice down the tree and in {lower[2]} over tree cuts; on "
        f"{plan.name_of(shown)} it gets every choice right for {told[plan.WHOLE]} of the test pictures, and the strongest control, "
        f"{strongest}, for {plan.percent(rows[strongest], 'hca').value:.1f} %.",
        figure=Figure(f"scores of the rows on {plan.name_of(shown)}", tuple(panels.items())),
        table=table,
        control=strongest,
        body=(
            _known(found, judged, frozen),
            _setting(),
            _parts(found, judged, silent),
            _studies(found),
            _not_run(found),
        ),
        tables=(
            *(tables.run_section(found, key) for key in plan.PLANNED if key[3] != "controls"),
            tables.solvers(main), *tables.published(content.get("-published")),
        ),
        commands=(plan.PAGE,),
        terms=plan.TERMS,
        credits=(EMOJI_CREDIT,),
    )  # fmt: skip


def _joined(found: dict[plan.Key, dict]) -> dict[plan.Key, dict]:
    """The runs, with the classifiers without text beside the variants of the same data and tower."""
    joined = dict(found)
    for key, entry in found.items():
        beside = found.get((*key[:3], "controls"))
        if key[3] == "main" and beside is not None:
            more = {name: beside["rows"][name] for name in plan.FITTED if name in beside["rows"]}
            joined[key] = {**entry, "rows": {**entry["rows"], **more}}
    return joined


def _lower(found: Mapping, keys: Sequence[plan.Key], score: str) -> int:
    """In how many runs the whole method's mean lies below that of the tree losses alone."""
    pairs = [found[key]["rows"] for key in keys]
    return sum(
        rows[plan.WHOLE]["scores"][score][0] < rows[plan.PLAIN]["scores"][score][0]
        for rows in pairs
        if {plan.WHOLE, plan.PLAIN} <= rows.keys()
    )


def _known(found: Mapping, judged: Sequence[plan.Key], frozen: Sequence[plan.Key]) -> Section:
    runs = [found[key] for key in frozen]
    whole = plan.listed(plan.tallies(runs, plan.WHOLE, plan.PLAIN))
    lines = [f"the whole method against tree losses alone, by the rule below: {whole}"]
    place = ("cifar100-fewshot", 16, "lite0", "layers")
    ours, other = "tokens: mean, no text query", "tokens: rule"
    if place in found and {ours, other} <= found[place]["rows"].keys():
        claims = plan.claims_of(found[place], ours, other)
        words = plan.block_of(found, place, claims).words
        rows = [found[place]["rows"][name] for name in (ours, other)]
        moves = [plan.percent(rows[0], s).value - plan.percent(rows[1], s).value for s in SCORES]
        told = [f"{plan.TITLES[s]} {m:+.1f} points ({w})" for s, m, w in zip(SCORES, moves, words, strict=True)]
        lines.append(f"a plain mean of the tokens against the text query: {', '.join(told)}")
    for name in plan.FITTED:
        if beside := [run for run in runs if name in run["rows"]]:
            told = plan.listed(plan.tallies(beside, plan.WHOLE, name))
            lines.append(f"the whole method against {name}, which reads no text, on the same features: {told}")
    mini = [key for key in found if key[2].startswith("mini-") and key[3] == "main"]
    for key in mini:
        names = ("zero-shot", "VANILLA", "nearest picture")
        before, tuned, near = (f"{plan.percent(found[key]['rows'][name], 'la').value:.1f} %" for name in names)
        lines.insert(
            0,
            f"no figure of prompts here informs: our own CLIP names {before} of the leaves before tuning and {tuned} with tuned prompts, "
            f"the nearest picture {near}; its rows are printed and counted nowhere"
            if key not in judged
            else f"prompts on our own CLIP are judged: {plan.name_of(key)}",
        )
    if not mini:
        lines.insert(0, "no figure of prompts here informs: none was run")
    return Section("What is known", (tuple(lines),))


def _setting() -> Section:
    return Section(
        "What was held fixed",
        (
            "These are not the paper's experiments: the paper tunes the prompts of CLIP, and no CLIP weights can be had here. The towers "
            "are frozen. Trained are one linear map for each depth, one of the text, the attention, the curvatures and the scale of the "
            "cosines. VANILLA (cross-entropy of leaves) and PROTECT (VANILLA with losses over tree cuts) train the map of the last depth "
            "alone; EUCLIDEAN adds tokens of several depths, SHARED, SEPARATE and HETEROGENEOUS add entailment cones. So rows with several "
            "tokens have more trainable numbers; the tables print them. One learning rate, set beforehand, serves every row. On mini-CLIP, "
            "a small model of our own, prompts are tuned for few steps. Two classifiers read the features of the last depth and no text: a "
            "free head over the leaves, trained for as many epochs by a loss that knows the tree (HXE), and TreeLDA, in closed form.",
        ),
    )


def _parts(found: Mapping, judged: Sequence[plan.Key], silent: Sequence[str]) -> Section:
    rows = []
    for what, ours, other in plan.PARTS:
        words = plan.tallies([found[key] for key in judged], ours, other)
        rows.append(Row(f"{what}: {ours} against {other}", tuple(words.values())))
    note = (
        f"Verdicts over {len(judged)} runs. A row is better or worse where the interval of its difference excludes 0 both over test "
        "pictures (paired; unpaired, and so wider, against classifiers without text) and over seeds (from the deviations of both rows); "
        "nothing corrects for the number of comparisons."
    )
    more = f"Not counted, because VANILLA does not beat zero-shot at the leaves: {'; '.join(silent)}." if silent else ""
    return Section(
        "Which parts of the method earn their keep",
        (Table(plan.HEADS, tuple(rows), note=note), *([more] if more else [])),
    )


def _studies(found: Mapping) -> Section:
    rows = []
    for key in (k for k in plan.PLANNED if k[3] not in ("main", "controls") and k in found):
        for text, ours, other in plan.compared(found[key]):
            rows.append(Row(text, plan.block_of(found, key, plan.claims_of(found[key], ours, other, text)).words))
    place = "on CIFAR-100 with 16 pictures a class, EfficientNet-Lite0"
    return Section(f"One choice at a time, {place}", (Table(plan.HEADS, tuple(rows)) if rows else "Not run.",))


def _not_run(found: Mapping) -> Section:
    lines = [plan.name_of(key) for key in plan.PLANNED if key not in found] + [
        "the paper's own experiments (their numbers stand in the tables): hier train mat-clip, where CLIP weights are at hand",
        *plan.QUESTIONS,
    ]
    return Section("Not run", (tuple(lines),))
