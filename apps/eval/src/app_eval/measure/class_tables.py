"""Two tables of what a classifier did, for spreadsheets: class by class, and which class is taken for which."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from app_data.store.atomic import new_file
from hier_losses import Taxonomy
from hier_losses.functional import lca_height

CLASSES, CONFUSION, UNDECIDED = "classes.csv", "confusion.csv", "(undecided)"


def write_class_tables(folder: Path, answers: Sequence[int], targets: Sequence[int], tax: Taxonomy) -> None:
    """Write `classes.csv` and `confusion.csv`.

    The first has one line for each class that is true or answered at least once; the second one for each pair of a true class and
    another answer that occurs, the most frequent first.

    Args:
        folder: Receives the two files.
        answers: Node of each answer; an inner node is an answer that stopped early, -1 one that stopped at the root.
        targets: True leaf of each picture, a node.
        tax: The taxonomy of the nodes.
    """
    path = {node: "/".join(tax.path_of(node)) if node >= 0 else UNDECIDED for node in {*answers, *targets}}
    pairs = Counter(zip(targets, answers, strict=True))
    true, said = torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2).unbind(1)
    heights = torch.where(said < 0, tax.num_levels, lca_height(said.clamp(min=0), true, tax))
    height = dict(zip(pairs, heights.tolist(), strict=True))
    there, answered, total = Counter(targets), Counter(answers), Counter()
    taken_for: dict[int, tuple[int, str]] = {}
    for (truth, answer), count in pairs.items():
        total[truth] += count * height[truth, answer]
        if answer != truth:
            taken_for[truth] = max(taken_for.get(truth, (0, "")), (count, path[answer]))
    rows = []
    for node in sorted(path, key=path.__getitem__):
        right, (times, most) = pairs[node, node], taken_for.get(node, ("", ""))
        rows.append(
            [
                path[node], there[node], right, _share(right, there[node]), answered[node],
                _share(right, answered[node]), _share(total[node], there[node]), most, times,
            ]
        )  # fmt: skip
    head = ["class", "pictures", "right", "recall", "answered", "precision", "ahd", "most_taken_for", "times"]
    _write(folder / CLASSES, head, rows)
    mistakes = sorted(
        ((path[a], path[b], n, height[a, b]) for (a, b), n in pairs.items() if a != b), key=lambda row: (-row[2], *row)
    )
    _write(folder / CONFUSION, ["class", "answer", "pictures", "lca_height"], mistakes)


def safe_cell(cell: str) -> str:
    """A cell that no spreadsheet program takes for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _share(part: float, whole: int) -> float | str:
    return round(part / whole, 4) if whole else ""


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with new_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(head)
        table.writerows([safe_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
