"""Which parts of Modality Alignment across Trees earn their keep, decided by paired differences alone.

A part is judged only where the plain row beats zero-shot on leaf accuracy: a tower that learns nothing ranks nothing.
"""

from collections.abc import Iterator, Mapping

from app_eval.measure.tree_scores import SCORES, TITLES

CONTROLS = ("zero-shot", "nearest picture")
# Part, row, comparison that holds it, and whether the comparison is the other way round.
_PARTS = (
    ("tree losses: PROTECT against VANILLA", "VANILLA", "against baseline", True),
    ("layer tokens asked by the text: EUCLIDEAN against PROTECT", "EUCLIDEAN", "against baseline", False),
    ("entailment, one curvature: SHARED against EUCLIDEAN", "SHARED", "against EUCLIDEAN", False),
    ("entailment, three curvatures: SEPARATE against EUCLIDEAN", "SEPARATE", "against EUCLIDEAN", False),
    ("entailment, c_mid derived: HETEROGENEOUS against EUCLIDEAN", "HETEROGENEOUS", "against EUCLIDEAN", False),
    ("two manifolds in place of one: HETEROGENEOUS against SHARED", "HETEROGENEOUS", "against SHARED", False),
    ("the whole method: HETEROGENEOUS against PROTECT", "HETEROGENEOUS", "against baseline", False),
)
KEEP, COST, MIXED, NONE = "earns its keep", "costs", "mixed", "no effect shown"


def plain_learns(found: Mapping[tuple, Mapping], key: tuple) -> bool:
    """Whether the plain row of a run, or of the variants on the same data and tower, beats zero-shot on leaf accuracy."""
    for at in (key, (*key[:3], "main")):
        row = found[at]["rows"].get("VANILLA") if at in found else None
        if row is not None:
            return row["against zero-shot"]["la"][1] > 0
    return False


def word(interval: tuple[float, float, float]) -> str:
    """What an interval of a paired difference says."""
    _, low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else NONE


def judgement(differences: Mapping[str, tuple[float, float, float]]) -> str:
    """One judgement from all scores: mixed where one is better and another worse."""
    words = {word(differences[score]) for score in SCORES}
    if {"better", "worse"} <= words:
        return MIXED
    return KEEP if "better" in words else COST if "worse" in words else NONE


def compared(entry: Mapping) -> Iterator[tuple[str, Mapping]]:
    """The comparisons of a run: what is judged, and the difference of every score."""
    rows = entry["rows"]
    if entry["study"] == "main":
        for part, name, comparison, reverse in _PARTS:
            against = rows.get(name, {}).get(comparison)
            if against is not None and rows[name]["baseline"] != name:
                yield (
                    part,
                    {s: (-v, -high, -low) if reverse else (v, low, high) for s, (v, low, high) in against.items()},
                )
        return
    for name, row in rows.items():
        if name not in (*CONTROLS, row["baseline"]):
            yield f"{name} against {row['baseline']}", row["against baseline"]


def verdicts(found: Mapping[tuple, Mapping], order: list[tuple], name_of: Mapping[tuple, str]) -> str:
    """The section of the page: a table of judgements, and one sentence for each part of the method.

    Args:
        found: runs by key.
        order: keys in the order of the page.
        name_of: a run's name by key.
    """
    lines = [
        "| what | where | " + " | ".join(TITLES[s] for s in SCORES) + " | judgement |",
        "|---" * (len(SCORES) + 3) + "|",
    ]
    counted: dict[str, list[str]] = {}
    silent = []
    for key in order:
        if key not in found:
            continue
        if not plain_learns(found, key):
            silent.append(name_of[key])
            continue
        for part, differences in compared(found[key]):
            cells = [f"{v:+.3f} [{low:+.3f}, {high:+.3f}]" for v, low, high in (differences[score] for score in SCORES)]
            said = judgement(differences)
            lines.append(f"| {part} | {name_of[key]} | " + " | ".join(cells) + f" | {said} |")
            if key[3] == "main":
                counted.setdefault(part, []).append(said)
    told = [
        f"- {part}: "
        + ", ".join(
            f"{said} in {words.count(said)} of {len(words)}" for said in (KEEP, COST, MIXED, NONE) if said in words
        )
        + "."
        for part, words in counted.items()
    ]
    head = (
        "## Which parts of the method earn their keep here\n\nBy rule: *earns its keep* where the interval of the paired difference "
        "excludes 0 on the good side for at least one score and on the bad side for none; *costs* the other way round; *mixed* where "
        "both happen. Intervals are over test pictures, not over seeds, and nothing corrects for the number of comparisons."
    )
    parts = [head]
    if told:
        parts += ["Runs of the variants:", "\n".join(told)]
    if silent:
        parts.append("Inconclusive, because the plain row does not beat zero-shot on LA: " + "; ".join(silent) + ".")
    if len(lines) > 2:
        parts.append("\n".join(lines))
    if len(parts) == 1:
        parts.append("Nothing has been run.")
    return "\n\n".join(parts)
