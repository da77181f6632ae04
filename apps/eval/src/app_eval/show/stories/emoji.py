"""What the recipe `emoji` tells (first light): losses on emoji by an artist never seen, rows in the order of the run's titles."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from app_data.store.errors import DataError
from app_eval.measure.reduce import find, reduce_rows
from app_eval.show.commands import read_json
from app_eval.show.page import Column, Figure, Page, Row, Section, Table
from app_eval.show.stories import EMOJI_CREDIT
from app_eval.show.stories.lora import ALL, FIRST, TERMS, claims_of, column_title, columns_of, value_of

CONTROL, ZERO, BASELINE = "neighbour", "zero_shot", "leaf_ce"


def collect(sources: Sequence[Path]) -> dict[str, dict]:
    """All rows of a finished run folder, each against leaf cross-entropy; or the JSON of an earlier page."""
    if len(sources) != 1:
        raise DataError(f"the page emoji takes one source, got {len(sources)}")
    run = sources[0]
    stored = read_json(run / "result.json" if run.is_dir() else run)
    if stored.get("recipe", "emoji") != "emoji" or not {CONTROL, ZERO, BASELINE} <= stored["titles"].keys():
        raise DataError(
            f"{run} is no run of the recipe emoji: give the folder of a finished one, or the JSON beside its page"
        )
    if run.is_dir():
        from app_data.sets.emoji import emoji_taxonomy
        from app_eval.measure.results import load_outcome

        outcomes = {
            row: [load_outcome(run / f"seed-{i}" / row) for i in range(stored["seeds"])] for row in stored["titles"]
        }
        kept = {"format": 1, "recipe": "emoji", **{key: stored[key] for key in ("n", "seeds", "titles")}}
        stored = {**kept, "rows": reduce_rows(outcomes, emoji_taxonomy(), "emoji")}
    return {"": stored}


def tell(content: Mapping[str, dict]) -> Page:
    """The page."""
    run = content[""]
    titles = run["titles"] | {CONTROL: run["titles"][CONTROL] + " (control)"}
    rows = {row: find(run, "main", "emoji", row) for row in titles}
    right = {row: f"{value_of(entry, FIRST[0]).value:.1f} %" for row, entry in rows.items()}
    trained = [row for row in titles if row not in (CONTROL, ZERO, BASELINE)]
    compared = {row: titles[row] for row in (CONTROL, *trained)}

    def table(columns: Sequence[str], which: Sequence[str], note: str = "") -> Table:
        return Table(
            columns_of(columns),
            tuple(Row(titles[r], tuple(value_of(rows[r], c) for c in columns)) for r in which),
            note=note,
        )

    by_seed = {r: ", ".join(f"{100 * x:.1f}" for x in rows[r]["by_seed"][FIRST[0]]) for r in titles}
    seeds = Table((Column("leaf right, %, seed by seed"),), tuple(Row(titles[r], (by_seed[r],)) for r in titles))
    note = f"Means over {run['seeds']} seeds; brackets are 95 % bootstrap intervals over {run['n']} test pictures."
    return Page(
        title="First light: emoji by an artist never seen",
        outcome=f"{titles[BASELINE]} classifies {right[BASELINE]} of the unseen artist's emoji correctly, "
        + "".join(f"{titles[r]} {right[r]}, " for r in trained)
        + f"the untrained model {right[ZERO]}, and the nearest training picture {right[CONTROL]}.",
        figure=Figure(
            "right leaves and paths of every row",
            tuple((column_title(c), {titles[r]: value_of(rows[r], c) for r in titles}) for c in FIRST[:2]),
        ),
        table=table(FIRST, list(titles)[:6], note),
        control=titles[CONTROL],
        body=(Section(f"Against {titles[BASELINE]}, read bottom-up", (claims_of(run, "emoji", FIRST[:2], compared),)),),
        tables=(Section("All scores", (table(ALL, list(titles)), seeds, claims_of(run, "emoji", ALL, compared))),),
        commands=("nox -s train -- --seeds 3", "python apps/eval page emoji runs/emoji docs/results/first-light.md"),
        terms=TERMS | {"CE": "cross-entropy"},
        credits=(EMOJI_CREDIT,),
    )
