"""The table of `docs/reliability.md`, from the ends of all faults."""

import json
from collections.abc import Sequence
from pathlib import Path

from faults.families import NAMES
from faults.matrix import KINDS

ROOT = Path(__file__).parents[2]
PAGE, STORED = ROOT / "docs" / "reliability.md", ROOT / "docs" / "reliability.json"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def write(ends: Sequence[dict]) -> None:
    """Store how many faults of the tried families ended well and which did not, and write the table into the page."""
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"counts": {}, "wrong": []}
    tried = {end["family"] for end in ends}
    counts = {kind: {n: c for n, c in row.items() if n not in tried} for kind, row in stored["counts"].items()}
    for end in ends:
        cell = counts.setdefault(end["kind"], {}).setdefault(end["family"], [0, 0])
        cell[0] += not end["wrong"]
        cell[1] += 1
    wrong = [one for one in stored["wrong"] if one["family"] not in tried]
    wrong += [{k: end[k] for k in ("family", "kind", "label", "wrong")} for end in ends if end["wrong"]]
    STORED.write_text(json.dumps({"counts": counts, "wrong": wrong}, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")


def table() -> str:
    """The table of the stored counts, in Markdown: faults that ended well, of those that were tried."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
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
