"""The table of `docs/reliability.md`, from the ends of all faults."""

import json
from collections.abc import Sequence
from pathlib import Path

from faults.families import NAMES
from faults.matrix import KINDS
from golden.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGE, STORED = ROOT / "docs" / "reliability.md", ROOT / "docs" / "reliability.json"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
RANKS_BEGIN, RANKS_END = "<!-- processes: begin -->", "<!-- processes: end -->"


def write(ends: Sequence[dict]) -> None:
    """Store how many faults of the tried families and kinds ended well and which did not, and write the table into the page."""
    stored = _stored()
    tried = {(end["family"], end["kind"]) for end in ends}
    counts = {kind: {n: c for n, c in row.items() if (n, kind) not in tried} for kind, row in stored["counts"].items()}
    for end in ends:
        cell = counts.setdefault(end["kind"], {}).setdefault(end["family"], [0, 0])
        cell[0] += not end["wrong"]
        cell[1] += 1
    wrong = [one for one in stored["wrong"] if (one["family"], one["kind"]) not in tried]
    wrong += [{k: end[k] for k in ("family", "kind", "label", "wrong")} for end in ends if end["wrong"]]
    _store({**stored, "counts": counts, "wrong": wrong})
    _show(BEGIN, table(), END)


def write_together(found: Sequence[dict]) -> None:
    """Store how far two processes lay from one, and write the table into the page."""
    stored = _stored()
    known = {one["recipe"]: one for one in [*stored.get("together", []), *found]}
    _store({**stored, "together": [known[name] for name in RECIPES if name in known]})
    _show(RANKS_BEGIN, table_together(), RANKS_END)


def _stored() -> dict:
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"counts": {}, "wrong": []}


def _store(content: dict) -> None:
    STORED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _show(begin: str, content: str, end: str) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    PAGE.write_text(f"{before}{begin}\n{content}{end}{rest.partition(end)[2]}", encoding="utf-8")


def table_together() -> str:
    """The table of two processes against one, in Markdown."""
    lines = ["| recipe | steps | largest relative difference of loss and gradient norm |", "|---|---|---|"]
    refused = []
    for one in _stored().get("together", []):
        if one["says"] == "refused":
            refused.append(one["recipe"])
        else:
            lines.append(f"| {one['recipe']} | {one.get('steps', '')} | {one['says'] or format(one['apart'], '.1e')} |")
    said = f"Refused in one sentence, since they run in one process: {', '.join(refused)}." if refused else ""
    return "\n".join([*lines, "", said]) + "\n\n"


def table() -> str:
    """The table of the stored counts, in Markdown: faults that ended well, of those that were tried."""
    stored = _stored()
    counts = stored["counts"]
    names = [name for name in NAMES if any(name in row for row in counts.values())]
    lines = [f"| fault | what happens | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for kind, what in KINDS.items():
        cells = [counts.get(kind, {}).get(name) for name in names]
        shown = ["" if cell is None else f"{cell[0]} of {cell[1]}" for cell in cells]
        lines.append(f"| {kind} | {what} | {' | '.join(shown)} |")
    total = sum(cell[1] for row in counts.values() for cell in row.values())
    bad = [f"- {one['family']}, {one['kind']}, {one['label']}: {one['wrong']}" for one in stored["wrong"]]
    said = f"{total} faults, {len(bad)} ended badly." if bad else f"{total} faults, all ended well."
    rest = [name for name in NAMES if name not in names]
    if rest:
        said += f" Not run: {', '.join(rest)}."
    return "\n".join([*lines, "", said, *bad]) + "\n\n"
