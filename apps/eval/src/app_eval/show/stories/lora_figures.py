"""The figures of the hier-lora results page, from a reduced study."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from app_eval.show.figures import COLOURS, _axes
from app_eval.show.stories.lora_results import find


def write_figures(study: Mapping, stem: Path) -> dict[str, str]:
    """Draw what the study has runs for, as `<stem>-<name>.png`.

    Returns:
        Markdown that shows each figure, by name.
    """
    found = {}
    for name, alt, draw in (
        ("weights", "FPA and TICE against alpha and lambda", _weights),
        ("update", "old and new classes after a taxonomy update", _update),
        ("rewired", "scores as edges are rewired", _rewired),
    ):
        figure = draw(study)
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
            found[name] = f"![{alt}]({path.name})"
    return found


def _line(axis, points: Sequence[tuple[float, Sequence[float]]], label: str, colour: str, style: str = "-") -> None:
    points = sorted((x, v) for x, v in points if v[0] is not None)
    x, value = [p[0] for p in points], [p[1][0] for p in points]
    axis.plot(x, value, style, color=colour, marker="o", markersize=3.5, label=label)
    if all(p[1][1] is not None for p in points):
        axis.fill_between(x, [p[1][1] for p in points], [p[1][2] for p in points], color=colour, alpha=0.15)


def _weights(study: Mapping):
    base = find(study, "main", "emoji", "both")
    sweeps = {}
    for name, centre in (("alpha", 1.0), ("lambda", 1.0)):
        rows = [(float(e["row"]), e) for e in study["rows"] if e["experiment"] == name]
        if rows:
            sweeps[name] = [*rows, *([(centre, base)] if base else [])]
    if not sweeps:
        return None
    figure, axes = _axes(4.4 * len(sweeps), 3.2, len(sweeps))
    for axis, (name, entries) in zip(axes, sweeps.items(), strict=True):
        for colour, (column, label) in zip(
            COLOURS,
            (("fpa@joint_path", "FPA, joint_path"), ("fpa@level_argmax", "FPA, level_argmax"), ("tice@level_argmax", "TICE, level_argmax")),
            strict=False,
        ):  # fmt: skip
            _line(axis, [(x, e["scores"][column]) for x, e in entries], label, colour)
        axis.set(xlabel=name, title=f"emoji, {name} (the other weight is 1)", ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
    return figure


def _update(study: Mapping):
    names = [n for n in study["data"] if any(e["experiment"] == "update" and e["data"] == n for e in study["rows"])]
    if not names:
        return None
    figure, axes = _axes(4.6 * len(names), 3.2, len(names))
    for axis, name in zip(axes, names, strict=True):
        rows = [e for e in study["rows"] if e["experiment"] == "update" and e["data"] == name]
        colours = iter(COLOURS)
        for loss, column, label in (
            ("both", "fpa@joint_path", "TP-KL + HiSCE"),
            ("leaf_ce", "fpa@bottom_up", "leaf CE"),
        ):
            colour = next(colours)
            for pictures, style in (("old", "-"), ("new", "--")):
                chosen = [e for e in rows if e["row"] == f"leaf-0.3-{loss}" and e["pictures"] == pictures]
                points = [(e["facts"]["shots"], e["scores"][column]) for e in chosen]
                if points:
                    _line(axis, points, f"{label}, {pictures}", colour, style)
        axis.set(
            xlabel="pictures per class after the update",
            ylabel="FPA",
            title=f"{name}: 30 % of the leaves added",
            ylim=(0, None),
        )
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
    return figure


def _rewired(study: Mapping):
    names = [n for n in study["data"] if any(e["experiment"] == "rewired" and e["data"] == n for e in study["rows"])]
    if not names:
        return None
    figure, axes = _axes(4.6 * len(names), 3.2, len(names))
    for axis, name in zip(axes, names, strict=True):
        colours = iter(COLOURS)
        for row, label in (("both", "TP-KL + HiSCE"), ("level_ce", "level CE")):
            entries = [(0.0, find(study, "main", name, row))]
            entries += [
                (float(e["row"].split("-")[1]), e)
                for e in study["rows"]
                if e["experiment"] == "rewired" and e["data"] == name and e["row"].startswith(f"{row}-")
            ]
            points = [(100 * x, e) for x, e in entries if e is not None]
            if len(points) < 2:
                continue
            colour = next(colours)
            _line(axis, [(x, e["scores"]["fpa@joint_path"]) for x, e in points], f"FPA, {label}", colour)
            _line(axis, [(x, e["scores"]["tice@level_argmax"]) for x, e in points], f"TICE, {label}", colour, "--")
        axis.set(
            xlabel="% of the edges rewired while training", title=f"{name}, scored on the clean tree", ylim=(0, None)
        )
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
    return figure
