"""The stored result of one row of an experiment: versioned JSON for people and pages, tensors for paired comparisons."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from app_data.store.atomic import new_file
from app_data.store.sealed import write_sealed
from app_eval.measure.interval import bootstrap, paired_difference, resamples
from app_eval.measure.paths import DECODERS, SCORES, Outcome, per_picture
from hier_losses import Taxonomy
from hier_losses.metrics import mta_majority_baseline
from hier_losses.treecuts import TreeCuts

FORMAT = 1


def summarise(found: Outcome, tax: Taxonomy) -> dict[str, dict[str, list[float]]]:
    """All scores under all decoders as [value, low, high]; the interval is over the test pictures."""
    counts = resamples(len(found.target))
    table = {}
    for decoder in found.paths:
        intervals = bootstrap(per_picture(found, tax, decoder), counts)
        table[decoder] = {name: interval.as_json() for name, interval in intervals.items()}
    return table


def save_row(folder: Path, found: Outcome, tax: Taxonomy, cuts: TreeCuts, **facts: object) -> dict:
    """Write `outcome.safetensors` and `result.json`; the JSON last, so that its presence marks a finished row."""
    save_outcome(folder, found)
    majority = float(mta_majority_baseline(torch.from_numpy(found.target), cuts))
    result = {
        "format": FORMAT,
        **facts,
        "n": len(found.target),
        "mta_majority": majority,
        "scores": summarise(found, tax),
    }
    return write_sealed(folder / "result.json", result, beside=True)


def save_outcome(folder: Path, found: Outcome) -> None:
    """Write `outcome.safetensors`: what one model did, picture by picture."""
    arrays = {"target": found.target, "hca": found.hca, "mta": found.mta, "confidence": found.confidence}
    arrays |= {f"paths.{name}": np.ascontiguousarray(paths) for name, paths in found.paths.items()}
    with new_file(folder / "outcome.safetensors") as temporary:
        save_file(arrays, temporary)


def load_outcome(folder: Path) -> Outcome:
    """Read what `save_outcome` wrote."""
    arrays = load_file(folder / "outcome.safetensors")
    paths = {name.removeprefix("paths."): value for name, value in arrays.items() if name.startswith("paths.")}
    return Outcome(arrays["target"], paths, arrays["hca"], arrays["mta"], arrays["confidence"])


def columns_of(rows: Mapping[str, dict]) -> list[str]:
    """The scores that all rows have: an older run lacks those that came after it."""
    return [name for name in SCORES if all(name in result["scores"]["bottom_up"] for result in rows.values())]


def text_table(rows: dict[str, dict], decoders: tuple[str, ...] = tuple(DECODERS)) -> str:
    """The rows of a run as a table for the terminal: value and half the width of the interval, under each decoder."""
    columns = columns_of(rows)
    width = max(len(name) for name in rows) + 2
    lines = [
        "value and half-width of its 95 % interval over the test pictures; HCA and MTA do not depend on the decoder"
    ]
    for decoder in decoders:
        lines.append(f"\n{'decoded by ' + decoder:<{width}}" + "".join(f"{SCORES[name].title:>15}" for name in columns))
        for name, result in rows.items():
            cells = [result["scores"][decoder][score] for score in columns]
            lines.append(
                f"{name:<{width}}" + "".join(f"{v:>9.3f} +-{(hi - lo) / 2:.2f}"[-15:].rjust(15) for v, lo, hi in cells)
            )
    majority = next(iter(rows.values()))["mta_majority"]
    lines.append(f"\nMTA of the majority member of every cut: {majority:.3f}")
    return "\n".join(lines)


def short_table(rows: dict[str, dict]) -> str:
    """Leaf accuracy and average hierarchical distance of every row; of test pictures together and alone where they differ."""
    width = max(map(len, rows)) + 2
    lines = [
        "leaf: share of right leaves. AHD: mean height of the lowest common ancestor of answer and truth, 0 if right."
    ]
    heads = ["leaf", "AHD"]
    if any("single" in result for result in rows.values()):
        lines.append(
            "Together: all test pictures are centred on their own mean. Alone: each on the mean of the training pictures."
        )
        heads = ["leaf, together", "AHD, together", "leaf, alone", "AHD, alone"]
    lines.append(f"\n{'':<{width}}" + "".join(f"{head:>16}" for head in heads))
    for name, result in rows.items():
        cells = []
        for scores in (result["scores"], result.get("single")):
            best = None if scores is None else scores.get("chosen", scores["bottom_up"])
            cells += ["" if best is None else f"{best[score][0]:.3f}" for score in ("leaf", "ahd")]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells[: len(heads)]).rstrip())
    return "\n".join(lines)


def paired(ours: Outcome, other: Outcome, tax: Taxonomy, decoder: str = "bottom_up") -> dict[str, list[float]]:
    """[difference, low, high] of leaf accuracy and AHD, ours minus the other: 95 % paired bootstrap over the pictures.

    Args:
        ours: the row, under the decoder that was chosen for it if there is one.
        other: the row to compare with.
        tax: the taxonomy.
        decoder: of the other row.
    """
    counts = resamples(len(ours.target))
    mine = per_picture(ours, tax, "chosen" if "chosen" in ours.paths else decoder)
    theirs = per_picture(other, tax, "chosen" if "chosen" in other.paths else decoder)
    return {s: paired_difference([mine[s]], [theirs[s]], counts).as_json() for s in ("leaf", "ahd")}
