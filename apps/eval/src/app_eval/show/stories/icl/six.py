"""The part of the page `icl` that tells the table of `hier eval icl`: tasks, rows, and what each comparison came to."""

from collections.abc import Mapping

from app_eval.measure.interval import Interval
from app_eval.show.page import Claim, Claims, Column, Row, Section, Table, tally

__all__ = ["COMMAND", "short", "tables"]

COMMAND = "hier eval icl runs/icl-mini --preset mini --seeds 2 --out runs/icl-six"
_TITLE = "Six tasks in miniature"
_COMPARED = (("against", "the baseline"), ("twin", "its Euclidean twin"))


def _claims(group: Mapping, key: str) -> tuple[Claim, ...]:
    found = []
    for name, row in group["rows"].items():
        if key in row:
            shown = (Interval.read(row[key][side]) for side in ("items", "seeds"))
            items, seeds = (None if x is None else x.times(100) for x in shown)
            other = group["baseline"] if key == "against" else "its Euclidean twin"
            found.append(Claim(f"{name} against {other}", items, seeds, digits=1))
    return tuple(found)


def _best(group: Mapping, key: str) -> float:
    return max(row[key]["mean"][0] for row in group["rows"].values() if key in row)


def short(content: Mapping) -> Section:
    """The tasks in one paragraph, with the count of each verdict."""
    groups = content["groups"]
    counted = {key: tally([claim for group in groups for claim in _claims(group, key)]) for key, _ in _COMPARED}
    first, ahead = groups[0], sum(_best(group, "vote") > _best(group, group["score"]) for group in groups)
    text = (
        f"{', '.join(group['title'] for group in groups)}: {first['num_queries']} questions each, {first['k']} demonstrations from "
        f"{first['num_pool']}, {content['seeds']} seeds; answers are generated, by a model that was trained again with the options "
        f"below. Against {first['baseline']}: {counted['against']}. Hyperbolic against Euclidean: {counted['twin']}. In {ahead} of "
        f"{len(groups)} tasks the best vote of demonstrations, without a model, is ahead of every row of the model."
    )
    return Section(_TITLE, (text,))


def tables(content: Mapping) -> tuple[Section, ...]:
    """A table of every task, and its comparisons."""
    told = []
    for group in content["groups"]:
        score, rows = group["score"], []
        for name, row in group["rows"].items():
            cells = tuple(
                None if key not in row else Interval.read(row[key]["mean"]).times(100)  # type: ignore[union-attr]
                for key in (score, "vote")
            )
            rows.append(Row(name, (row["seeds"], *cells)))
        heads = {"vqa": "VQA accuracy, %", "cider": "CIDEr-D x 100", "exact": "right, %"}
        columns = (Column("seeds"), Column(heads[score], 1), Column("vote, no language model", 1))
        claims = [Claims(found, f"Against {what}") for key, what in _COMPARED if (found := _claims(group, key))]
        note = f"{group['num_queries']} questions, {group['k']} demonstrations from {group['num_pool']}."
        told.append(Section(f"{_TITLE}: {group['title']}", (note, Table(columns, tuple(rows)), *claims)))
    return tuple(told)
