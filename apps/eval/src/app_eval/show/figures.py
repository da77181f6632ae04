"""The figures of a report, as SVG data URIs: training curves, where mistakes fall in the tree, confusion of the top level."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from app_eval.measure.paths import Outcome, per_picture
from hier_losses import Taxonomy

# Top nodes that a confusion figure has room for.
TOP = 20
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#c53030", "#4a5568")
BY_DISTANCE = ("#2f855a", "#90cdf4", "#f6ad55", "#e53e3e", "#742a2a", "#4a5568")


def png_uri(picture: Image.Image | np.ndarray) -> str:
    """A picture as a data URI."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _finish(figure) -> str:
    import matplotlib

    buffer = io.BytesIO()
    # Text stays text, so that the reader's own fonts show any script; matplotlib has none for Chinese and warns while it measures.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _name(text: str) -> str:
    """A name as matplotlib text: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def _axes(width: float, height: float, columns: int = 1):
    # The object interface needs no pyplot, hence no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def training_curves(records: Mapping[str, Sequence[dict]]) -> str:
    """Loss over steps for every trained row, stage by stage (each row minimises a loss of its own: compare shapes, not heights).

    Args:
        records: the lines of `metrics.jsonl` by row name.
    """
    stages = list(dict.fromkeys(line["stage"] for lines in records.values() for line in lines))
    figure, axes = _axes(4.6 * max(1, len(stages)), 3.1, max(1, len(stages)))
    for axis, stage in zip(axes, stages, strict=False):
        for colour, (name, lines) in zip(COLOURS, records.items(), strict=False):
            chosen = [line for line in lines if line["stage"] == stage]
            steps, loss = [line["step"] for line in chosen], np.array([line["loss"] for line in chosen])
            axis.plot(steps, loss, color=colour, alpha=0.18, linewidth=0.8)
            window = max(1, len(loss) // 25)
            if len(loss) >= window:
                smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
                axis.plot(steps[window - 1 :], smooth, color=colour, label=_name(name), linewidth=1.6)
        axis.set(title=_name(f"stage: {stage}"), xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=7, frameon=False)
    return _finish(figure)


def mistake_bars(outcomes: Mapping[str, Outcome], tax: Taxonomy, decoder: str = "bottom_up") -> str:
    """Share of pictures whose predicted leaf is right, or lies so many levels away, for every row.

    The height of the lowest common ancestor says how far: 1 is a sibling, D another top node.
    """
    figure, (axis,) = _axes(8.2, 0.42 * len(outcomes) + 1.3)
    highest = tax.num_levels
    names = list(outcomes)
    left = np.zeros(len(names))
    for height in range(highest + 1):
        share = np.array([(per_picture(o, tax, decoder)["ahd"][0] == height).mean() for o in outcomes.values()])
        label = (
            "right"
            if height == 0
            else ("sibling" if height == 1 else "another top node" if height == highest else f"height {height}")
        )
        axis.barh(
            list(map(_name, names)), share, left=left, color=BY_DISTANCE[min(height, len(BY_DISTANCE) - 1)], label=label
        )
        for row, value in enumerate(share):
            if value > 0.04:
                axis.text(
                    left[row] + value / 2,
                    row,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white",
                )
        left += share
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel=f"share of test pictures, decoded by {decoder}")
    axis.legend(ncols=highest + 1, fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _finish(figure)


def top_confusion(outcomes: Mapping[str, Outcome], tax: Taxonomy, decoder: str = "bottom_up") -> str:
    """Row-normalised confusion of the top level, one panel for each outcome; of many nodes, those with the most errors."""
    num = tax.level_sizes[0]
    tables = []
    for found in outcomes.values():
        table = np.zeros((num, num))
        np.add.at(table, (tax.paths[found.target][:, 0].numpy(), found.paths[decoder][:, 0]), 1)
        tables.append(table)
    wrong = sum(table.sum(1) - table.diagonal() for table in tables)
    shown = np.sort(np.argsort(-wrong, kind="stable")[:TOP])
    small = [_name(tax.names[v][:16]) for v in shown]
    figure, axes = _axes(0.9 + max(3.6, 0.24 * len(shown)) * len(outcomes), max(3.4, 0.24 * len(shown)), len(outcomes))
    for axis, title, table in zip(axes, outcomes, tables, strict=True):
        share = (table / np.maximum(table.sum(1, keepdims=True), 1))[np.ix_(shown, shown)]
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(shown)), small, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(shown)), small if axis is axes[0] else [], fontsize=7)
        if len(shown) <= 12:
            for (i, j), value in np.ndenumerate(share):
                colour = "white" if value > 0.5 else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
        more = f"\nthe {TOP} of {num} top nodes with the most errors" if num > TOP else ""
        axis.set_title(_name(title) + more, fontsize=9)
    return _finish(figure)
