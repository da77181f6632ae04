"""The part of the page `icl` that tells the study of a taxonomy: whether the model reads, and which selectors help it at which level."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from app_data.sets.levels import QUESTIONS
from app_eval.ask.demonstration_task import COSINE, OURS, UNSEEDED, WITH, WITHOUT, ZERO
from app_eval.ask.level_task import ANCHORS, CURVED, EUCLIDEAN, SHUFFLED
from app_eval.measure.interval import Interval
from app_eval.show.page import Claim, Claims, Column, Row, Section, Table, tally
from app_eval.show.stories.icl.cells import bits, difference, mean

__all__ = ["commands", "short", "tables"]

_PATH, _TITLE = "docs/results/hyper-icl-taxonomy.json", "A pool with a real taxonomy"
_FIRST = ("random", "RICES", COSINE, EUCLIDEAN, OURS, SHUFFLED)
_LEVELS = {"all levels": None, **{level: at for at, level in enumerate(QUESTIONS)}}
# What is compared: with the model, or "share" and "vote" of the chosen demonstrations without it.
_COMPARED = (
    (OURS, EUCLIDEAN),
    (OURS, COSINE),
    (OURS, SHUFFLED),
    (OURS, f"{OURS}, mu 0"),
    (OURS, CURVED),
    (f"{OURS}, mu 0", EUCLIDEAN),
)


def commands(content: Mapping) -> tuple[str, ...]:
    """How it is made."""
    card, task = content["model"], content["tasks"][0]
    shots = " ".join(map(str, card["shots"]))
    return (
        f"hier train icl-mini --data taxonomy {card['options']} --shots {shots} --out runs/icl-taxonomy",
        f"hier eval icl runs/icl-taxonomy --queries {task['num_queries']} --out {_PATH}",
    )


def _found(task: Mapping, selector: str, what: str, level: int | None) -> np.ndarray | None:
    """(seeds, pictures) in [0, 1], the mean over the levels if none is given; None if it was not run.

    Args:
        task: Of the study's JSON.
        selector: Name.
        what: "model" for right answers; without a model "share" or "some" of the demonstrations being right, or "vote".
        level: Position in `QUESTIONS`.
    """
    k = _k(task)
    if what == "model":
        found = bits(task, selector, 0 if selector == ZERO else k)
    else:
        cells = [
            c["vote" if what == "vote" else "hits"] for c in task["selection"]["cells"] if c["selector"] == selector
        ]
        found = np.array([[float(digit) for digit in cell] for cell in cells]) if cells else None
        if found is not None:
            found = found / k if what == "share" else np.minimum(found, 1)
    if found is None:
        return None
    # Three queries of one picture stand together; pictures are what is drawn again for an interval.
    by_level = found.reshape(len(found), -1, len(QUESTIONS))
    return by_level.mean(-1) if level is None else by_level[..., level]


def _k(task: Mapping) -> int:
    return task["selection"]["cells"][0]["k"]


def _claim(task: Mapping, ours: str, other: str, what: str, level: int | None = None) -> Claim:
    a, b = (_found(task, name, what, level) for name in (ours, other))
    return difference(f"{ours} against {other}", a, b, not {ours, other} <= set(UNSEEDED))


def _claims(task: Mapping, what: str, level: int | None) -> tuple[Claim, ...]:
    """Every comparison; the model reads one curvature alone."""
    return tuple(_claim(task, *pair, what, level) for pair in _COMPARED if what != "model" or CURVED not in pair)


def _tally(task: Mapping, other: str | None = None) -> str:
    """The words of every comparison at every level and by every score; of those with one other alone, if it is named."""
    told = [c for what in ("model", "share", "vote") for at in _LEVELS.values() for c in _claims(task, what, at)]
    return tally([c for c in told if other is None or c.text.endswith(f" against {other}")])


def short(content: Mapping) -> Section:
    """Whether the model reads, a table of selectors, and the comparisons that were asked for."""
    task = content["tasks"][0]
    read = [f"{name} {_said(mean(_found(task, name, 'model', None)))}" for name in (WITH, WITHOUT)]
    word, chance, selection = _claim(task, WITH, WITHOUT, "model").word(), 100 / _k(task), task["selection"]
    num_seeds = len({cell["seed"] for cell in selection["cells"]})
    text = (
        f"Percent right: {', '.join(read)} (one against none: {word}; copying any of them would give {chance:g}). Emoji of subgroups that "
        f"never trained are asked what they are, of what kind (subgroup) and of what sort (group): {task['num_queries']} queries of an "
        f"unseen artist, {task['num_pool']:,} demonstrations by three others, {_k(task)} shown, exact answers. One model, "
        f"{content['model']['steps']} steps, {len(content['seeds'])} seeds; without it {selection['num_queries']:,} queries, {num_seeds} "
        "seeds. Anchors train on the pool's answers at all levels; the shuffled tree puts each leaf in another's place. RICES shows the "
        "nearest picture under every question, which only what reads the question can use."
    )
    columns = ("right, %", "vote, no language model, %")
    rows = tuple(
        Row(name, tuple(mean(_found(task, name, what, None)) for what in ("model", "vote"))) for name in _FIRST
    )
    claims = tuple(_claim(task, *pair, "model") for pair in _COMPARED[:3])
    share = _claim(task, *_COMPARED[-1], "share")
    return Section(
        _TITLE,
        (
            text,
            Table(tuple(Column(name, 1) for name in columns), rows),
            Claims((*claims, replace(share, text=f"share of right demonstrations: {share.text}"))),
            f"At every level and by every score: {_tally(task)}; hyperbolic against Euclidean alone: {_tally(task, EUCLIDEAN)}.",
        ),
    )


def _against_vote(task: Mapping) -> Claim:
    """The model and the vote, of the same demonstrations for the same pictures."""
    ours, vote = _found(task, OURS, "model", None), _found(task, OURS, "vote", None)
    if ours is not None and vote is not None:
        vote = vote[: len(ours), : ours.shape[1]]
    return difference(f"{OURS} against their vote", ours, vote, True)


def _said(value: Interval | None) -> str:
    return "not run" if value is None else f"{value.value:.1f} [{value.low:.1f}, {value.high:.1f}]"


def tables(content: Mapping) -> Section:
    """Every selector at every level, and every comparison."""
    task, parts = content["tasks"][0], []
    for what, said, names in (
        ("model", "right, %", (ZERO, *task["selectors"])),
        ("share", "right demonstrations, %, no model", ("random", "RICES", COSINE, *ANCHORS)),
        ("some", "queries with a right demonstration, %, no model", ("random", "RICES", COSINE, *ANCHORS)),
        ("vote", "vote, % right, no model", ("random", "RICES", COSINE, *ANCHORS)),
    ):
        rows = []
        for name in names:
            cells = tuple(mean(_found(task, name, what, level)) for level in _LEVELS.values())
            known = _found(task, name, what, None)
            rows.append(Row(name, () if known is None else (len(known), *cells)))
        heads = (Column("seeds"), *(Column(name, 1) for name in _LEVELS))
        parts.append(Table(heads, tuple(rows), title=said))
        if what != "some":
            for name, level in _LEVELS.items():
                parts.append(Claims(_claims(task, what, level), f"{said}: {name}"))
    return Section(
        _TITLE, (*parts, Claims((_against_vote(task),), "The model against the vote of the same demonstrations"))
    )
