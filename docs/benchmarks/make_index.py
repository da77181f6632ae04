"""Write index.md from the JSON files beside this script: every target with what it came to, then all rows, folded away."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
# Where a page says why a target is missed.
WHY = {
    "main-job": "../results/first-light.md#how-it-was-done",
    "hier-losses": "../hier-losses/losses.md#determinism-and-cost",
    "hyper-geom": "../hyper-geom/info-nce.md",
    "hyper-icl": "../../packages/hyper-icl/README.md#measured",
    "hyper-blip": "../../packages/hyper-blip/README.md",
    "mat-align": "../../packages/mat-align/README.md",
}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(rows: Sequence[dict]) -> str:
    lines = ["| | setting | ours | peer | unit | ours / peer | target | device |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        ours = "not measured" if row.get("status") == "not measured" else number(row["ours"])
        cells = [row["name"], row["setting"], ours, number(row["peer"]), row["unit"], number(row["ratio"])]
        lines.append("| " + " | ".join([*cells, row["target"] or "", row["device"]]).replace("\n", " ") + " |")
    return "\n".join(lines)


def reached(row: dict) -> bool | None:
    """Whether a row reaches its target; None if it was not measured, or its target is no bound for it."""
    target = row["target"] or ""
    bound = re.search(r"<= *(?:1/(\d+(?:\.\d+)?)|(\d*\.?\d+))", target)
    if bound is None or row.get("status") == "not measured" or ("(CUDA)" in target and row["device"] != "cuda"):
        return None
    limit = 1 / float(bound[1]) if bound[1] else float(bound[2]) / (100 if "%" in target else 1)
    value = measure(row)
    return None if value is None else value <= limit


def measure(row: dict) -> float | None:
    """What the target of a row bounds."""
    return row["ours"] if "MiB" in (row["target"] or "") else row["ratio"]


def verdict(rows: Sequence[dict], why: str) -> str:
    """How many rows of one target reach it, and the farthest of them."""
    if not rows:
        return ""
    known = [row for row in rows if reached(row) is not None]
    if not known:
        return "see the rows" if any(row.get("status") != "not measured" for row in rows) else "not measured"
    worst = max(known, key=measure)
    good = sum(map(reached, known))
    word = "**reached**" if good == len(known) else f"[missed by {len(known) - good} of {len(known)}]({why})"
    return f"{word}: {number(measure(worst))} ({worst['name']})"


def answers(groups: dict[str, list[dict]]) -> str:
    """One line for each target of each benchmark: on the CPU and on a graphics card, with the row that is farthest from it."""
    lines = ["| benchmark | target | rows | CPU | graphics card |", "|---|---|---|---|---|"]
    for stem, rows in groups.items():
        kinds: dict[str, list[dict]] = {}
        for row in rows:
            if row["target"]:
                kinds.setdefault(row["target"], []).append(row)
        why = WHY[next(name for name in WHY if stem.startswith(name))]
        for target, each in kinds.items():
            sides = [verdict([row for row in each if row["device"] == device], why) for device in ("cpu", "cuda")]
            lines.append(
                f"| [{stem}](#{stem.lower()}) | {target} | {len(each)} | {' | '.join(sides)} |".replace("\n", " ")
            )
    return "\n".join(lines)


def main() -> None:
    groups = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))}
    parts = [
        "# Benchmarks",
        "What was aimed at, and what it came to. Every peer is measured beside ours in the same process: read the ratios, which are those "
        "of one machine with two cores. A target that is missed leads to the page with the reason. Rows that need a graphics card say "
        "*not measured* until somebody runs `python tools/gpu_check.py --out DIR`.",
        answers(groups) if groups else "**Nothing has been recorded yet.**",
        "Below are all rows. `nox -s bench` measures them again and writes this page.",
    ]
    for stem, rows in groups.items():
        head = f"<details markdown='1'>\n<summary>{len(rows)} rows of {stem}</summary>"
        parts.append(f"## {stem}\n\n`{rows[0]['command']}`\n\n{head}\n\n{table(rows)}\n\n</details>")
    (HERE / "index.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
