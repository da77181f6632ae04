"""Turn stored results of the recipe `mat` into one JSON file and `docs/results/mat-align.md`.

The text that judges is decided by numbers: a row is better or worse only where the interval of its paired difference
excludes 0; where the plain row does not beat zero-shot the page says so and ranks nothing; what is missing is 'not run'.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from app_data.store.atomic import write_json
from app_data.store.errors import DataError
from app_eval.measure.solvers import solver_table
from app_eval.measure.tree_scores import SCORES, TITLES
from app_eval.show.published import published_tables
from app_eval.show.stories.mat_verdicts import CONTROLS, plain_learns, verdicts

VARIANTS = ("VANILLA", "PROTECT", "EUCLIDEAN", "SHARED", "SEPARATE", "HETEROGENEOUS")
PLAIN = ("VANILLA", "zero-shot")
# The runs of the evidence: data, shots or training styles, tower, study.
PLANNED = [
    *[("emoji", 3, tower, "main") for tower in ("lite0", "vit", "mini-maple", "mini-promptsrc")],
    *[("cifar100-fewshot", shots, tower, "main") for tower in ("lite0", "vit") for shots in (1, 16)],
    *[
        ("cifar100-fewshot", 16, "lite0", study)
        for study in ("radius", "intermediate", "layers", "defects", "flat", "cross")
    ],
]
TOWERS = {
    "lite0": "EfficientNet-Lite0 stages",
    "vit": "DINOv2 ViT-S/14 class tokens",
    "mini-maple": "MaPLe prompts on mini-CLIP",
    "mini-promptsrc": "PromptSRC prompts on mini-CLIP",
}
STUDIES = {
    "main": "the variants",
    "radius": "unit features against the features' own radius",
    "intermediate": "how c_mid is found: the chord objective (Taylor), the exact divergences, the means",
    "layers": "which depths give tokens",
    "defects": "the released computation, and its defects one by one",
    "flat": "a data set with no tree",
    "cross": "a second tree with cross-cutting labels",
}


def collect(runs: Sequence[Path], path: Path) -> list[dict]:
    """Add the results in run folders to the JSON file and return its content; one entry for each planned run.

    Args:
        runs: run folders of the recipe.
        path: the file; what it holds already stays unless a run replaces it.

    Raises:
        DataError: a folder without results, or a damaged file.
    """
    known = _entries(path) if path.exists() else []
    found = {_key(entry): entry for entry in known}
    for run in runs:
        files = sorted(run.glob("result-*.json"))
        if not files:
            raise DataError(f"{run} holds no finished result: finish the run first with python apps/train mat")
        for file in files:
            entry = json.loads(file.read_text(encoding="utf-8"))
            found[_key(entry)] = entry
    content = [found[key] for key in sorted(found)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return content


def _entries(path: Path) -> list[dict]:
    """What the file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for entry in found:
            _key(entry)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no collection of mat results ({error}): restore it, or delete it and collect again"
        ) from error
    return found


def write_mat_page(path: Path, page: Path) -> None:
    """Write the page from the JSON file.

    Raises:
        DataError: no such file, or a damaged one.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: collect finished runs first")
    page.parent.mkdir(parents=True, exist_ok=True)
    content = _entries(path)
    curves = _curves(content)
    picture = page.with_name(f"{page.stem}-curvatures.png")
    if curves:
        draw_curvatures(curves, picture)
    page.write_text(render(content, picture.name if curves else None), encoding="utf-8")


def _curves(content: Sequence[Mapping]) -> dict[str, Sequence]:
    """Logged curvatures of HETEROGENEOUS, by seed, under the name of each run of the variants."""
    return {
        _name(_key(entry)).rpartition(":")[0]: entry["rows"]["HETEROGENEOUS"]["curvatures"]
        for entry in content
        if entry["study"] == "main" and "curvatures" in entry["rows"].get("HETEROGENEOUS", {})
    }


def draw_curvatures(curves: Mapping[str, Sequence], picture: Path) -> None:
    """One panel for each run: the two learned curvatures and the one between, a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(curves), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, by_seed) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for number, lines in enumerate(by_seed):
            for place, (name, colour) in enumerate(
                (("c_img", "#2b6cb0"), ("c_txt", "#c05621"), ("c_mid", "#2f855a")), 1
            ):
                axis.plot(
                    [line[0] for line in lines],
                    [line[place] for line in lines],
                    color=colour,
                    linewidth=1.2,
                    label=name if number == 0 else None,
                )
        axis.set_title(title, fontsize=8)
        axis.set(xlabel="step", yscale="log")
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=110, metadata={"Software": None})


def _key(entry: Mapping) -> tuple:
    return entry["data"], entry["shots"], entry["tower"], entry["study"]


def render(content: Sequence[Mapping], picture: str | None = None) -> str:
    """The page as Markdown, with the picture of the curvatures if there is one."""
    found = {_key(entry): entry for entry in content}
    parts = [
        "# Modality Alignment across Trees on towers that are reachable",
        "Generated from [mat-align.json](mat-align.json); no number was typed by hand. The command of a run stands below its heading; "
        "then\n\n```\npython apps/eval mat-page docs/results/mat-align.json docs/results/mat-align.md runs/mat/*\n```",
        "**These are not the paper's experiments.** The paper tunes the prompts of CLIP; no CLIP weights can be had here. The towers "
        "are frozen, their outputs cached; trained are one linear map for each depth, one of the text, the attention, the curvatures "
        "and the logit scale. VANILLA and PROTECT train the map of the last depth alone. So rows with several tokens have more "
        "trainable numbers, which is printed. On mini-CLIP, a small open_clip model made by `python apps/train mini-clip`, prompts are "
        "tuned instead, for few steps. Values are means over seeds; brackets are 95 % percentile bootstraps over the test "
        "pictures, the same resamples for all rows and seeds; sd is the standard deviation over seeds.",
        _tuning(found),
        verdicts(found, PLANNED, {key: _name(key).removesuffix(": the variants") for key in found}),
        *[_section(found, key) for key in PLANNED],
        "" if picture is None else f"## Curvatures over the steps (HETEROGENEOUS)\n\n![Learned curvatures]({picture})",
        solver_table(_curves(content)),
        _in_words(found),
        published_tables(),
        "Twemoji graphics are licensed under CC BY 4.0, OpenMoji under CC BY-SA 4.0, Noto Emoji under OFL 1.1; no picture is part of "
        "this repository.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _name(key: tuple) -> str:
    data, shots, tower, study = key
    what = (
        f"emoji, {shots} training styles, an unseen artist"
        if data == "emoji"
        else f"CIFAR-100, {shots} shot{'s' * (shots > 1)}"
    )
    return f"{what}, {TOWERS[tower]}: {STUDIES[study]}"


def _tuning(found: Mapping) -> str:
    lines = []
    for key, entry in found.items():
        if key[3] == "tuning":
            trials = "; ".join(
                f"{lr}: " + ", ".join(f"{row} " + "/".join(f"{v[s]:.3f}" for s in SCORES) for row, v in rows.items())
                for lr, rows in entry["trials"].items()
            )
            lines.append(f"{key[0]}, {TOWERS[key[2]]}: chosen {entry['chosen']} (LA/HCA/MTA by rate: {trials})")
    if not lines:
        return "Learning rates were not tuned: one rate, set beforehand, serves every row."
    return (
        "Learning rates were compared on pictures cut out of the training set; one rate serves every row:\n\n"
        + "\n".join(f"- {line}" for line in lines)
    )


def _section(found: Mapping, key: tuple) -> str:
    head = f"## {_name(key)}"
    entry = found.get(key)
    if entry is None:
        return f"{head}\n\nNot run. The command:\n\n```\n{_command(key, None)}\n```"
    lines = [
        head,
        f"```\n{_command(key, entry)}\n```",
        f"{entry['num_train']} training and {entry['num_test']} test pictures, {entry['num_nodes']} nodes, {entry['seeds']} seeds. "
        f"MTA of always naming the majority member of each cut: {entry['mta_majority']:.3f}. {_settings(entry['settings'])}",
        _table(entry),
    ]
    missing = [name for name in VARIANTS if name not in entry["rows"]] if key[3] == "main" else []
    if missing:
        lines.append(f"Not run here: {', '.join(missing)}.")
    if any("curvatures" in row for row in entry["rows"].values()):
        lines.append(_curvatures(entry))
    if any("attention" in row for row in entry["rows"].values()):
        lines.append(_attention(entry))
    if any("second" in row for row in entry["rows"].values()):
        lines.append(_second(entry))
    return "\n\n".join(lines)


def _command(key: tuple, entry: Mapping | None) -> str:
    """The command of a run, or of one that is still to be made."""
    data, shots, tower, study = key
    if entry is None:
        mini = {"method": tower.removeprefix("mini-"), "epochs": 1, "batch_size": 128, "lr": 4e-3}
        plain = {"epochs": 8 if data == "emoji" else 150 if shots == 1 else 12, "lr": 0.002}
        size = 128 if (data, tower) == ("emoji", "lite0") else 96
        entry = {"rows": {}, "seeds": 3, "size": size, "settings": mini if tower.startswith("mini-") else plain}
    rows, fit = [name for name in entry["rows"] if name not in CONTROLS], entry["settings"]
    if study == "main":
        words = ["--variant", *rows] if rows else []
    else:
        words = ["--study", study, *(["--rows", *(f'"{name}"' for name in rows)] if rows else [])]
    words += ["--seeds", str(entry["seeds"])]
    if tower.startswith("mini-"):
        words += ["--method", fit["method"], "--epochs", str(fit["epochs"])]
        words += ["--batch-size", str(fit["batch_size"]), "--lr", f"{fit['lr']:g}"]
        words += [] if fit["method"] == "maple" else ["--out", f"runs/mat/emoji-{tower}"]
        return "python apps/train mini-clip\npython apps/train mat-mini " + " ".join(words)
    start = ["--data", data, *([] if data == "emoji" else ["--source", "DIR", "--shots", str(shots)])]
    start += ["--size", str(entry["size"]), "--tower", tower]
    # Without a tree the data are others, so the folder is another; the other studies share their rows.
    out = f"runs/mat/{data}-{shots}-{tower}" + ("-flat" if study == "flat" else "")
    words += ["--fit.epochs", str(fit["epochs"]), "--fit.lr", f"{fit['lr']:g}", "--out", out]
    return "python apps/train mat " + " ".join([*start, *words])


def _settings(fit: Mapping) -> str:
    start = f"c_img {fit['c_img']:g}, c_txt {fit['c_txt']:g}, scale {fit['scale']:g} at the start."
    how = f"AdamW, {fit['epochs']} epochs of batches of {fit['batch_size']}, rate {fit['lr']:g}"
    if "dropout" not in fit:
        return f"{how}, {start}"
    return f"{how} (curvatures and logit scale {fit['curvature_lr']:g}), dropout {fit['dropout']:g}, {start}"


def _second(entry: Mapping) -> str:
    rows = {name: row["second"] for name, row in entry["rows"].items() if "second" in row}
    scores = list(next(iter(rows.values()))[0])
    lines = ["| mean over seeds | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for name, by_seed in rows.items():
        cells = [f"{sum(found[s] for found in by_seed) / len(by_seed):.3f}" for s in scores]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table(entry: Mapping) -> str:
    trained = {name: row["num_trained"][0] for name, row in entry["rows"].items() if "num_trained" in row}
    lines = [
        "| | "
        + " | ".join(f"{TITLES[s]}" for s in SCORES)
        + " | against "
        + _baseline(entry)
        + ": HCA | trained numbers |",
        "|---" * (len(SCORES) + 3) + "|",
    ]
    for name, row in entry["rows"].items():
        cells = []
        for score in SCORES:
            value, low, high = row["scores"][score]
            spread = row["deviation"][score]
            cells.append(f"{value:.3f} [{low:.3f}, {high:.3f}]" + ("" if not spread else f" sd {spread:.3f}"))
        value, low, high = row["against baseline"]["hca"]
        difference = "" if name == row["baseline"] else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells += [difference, f"{trained[name]:,}" if name in trained else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _baseline(entry: Mapping) -> str:
    return next(iter(entry["rows"].values()))["baseline"]


def _curvatures(entry: Mapping) -> str:
    lines = [
        "| | c_img, c_txt, c_mid: first step | last step (by seed) | steps with c_mid between | cone constraints met on test pictures: "
        "visual / textual / cross |",
        "|---|---|---|---|---|",
    ]
    for name, row in entry["rows"].items():
        if "curvatures" not in row:
            continue
        first = ", ".join(f"{c:.4f}" for c in row["curvatures"][0][0][1:])
        last = "; ".join(", ".join(f"{c:.4f}" for c in curve[-1][1:]) for curve in row["curvatures"])
        between = "; ".join(f"{100 * x:.0f} %" for x in row["c_mid_between"])
        counted = ("/".join("-" if x != x else f"{100 * x:.1f} %" for x in m.values()) for m in row.get("met", []))
        met = "; ".join(counted) or "not counted"
        lines.append(f"| {name} | {first} | {last} | {between} | {met} |")
    note = (
        "Cones are counted in fp64. With unit features of one scale no pair of different directions lies in its cone, so there only "
        "the features' own radius can meet a constraint."
    )
    return "\n".join([*lines, "", note])


def _attention(entry: Mapping) -> str:
    shares = {
        name: [
            sum(seed[i] for seed in row["attention"]) / len(row["attention"]) for i in range(len(row["attention"][0]))
        ]
        for name, row in entry["rows"].items()
        if "attention" in row
    }
    listed = "; ".join(f"{name} {' / '.join(f'{x:.2f}' for x in values)}" for name, values in shares.items())
    return f"Mean attention on the tokens, shallow to deep, over the nodes on the paths of the test pictures: {listed}."


def _in_words(found: Mapping) -> str:
    lines = ["## In words", "*better* and *worse* mean that the interval of the paired difference excludes 0."]
    for key in PLANNED:
        if key[3] != "main" or key not in found:
            continue
        lines.append(f"**{_name(key)}**")
        rows = found[key]["rows"]
        if not plain_learns(found, key):
            lines.append("Inconclusive: the plain row does not beat zero-shot on LA, so nothing is ranked.")
            continue
        said = [_verdict(name, "PROTECT", row["against baseline"]) for name, row in rows.items() if name not in PLAIN]
        said += [
            _verdict(name, "EUCLIDEAN", row["against EUCLIDEAN"])
            for name, row in rows.items()
            if name in ("SHARED", "SEPARATE", "HETEROGENEOUS") and "against EUCLIDEAN" in row
        ]
        lines.append("\n".join(f"- {line}" for line in said if line))
    if len(lines) == 2:
        lines.append("Nothing has been run.")
    return "\n\n".join(lines)


def _verdict(name: str, other: str, differences: Mapping) -> str:
    if name == other:
        return ""
    words = {}
    for score in SCORES:
        _, low, high = differences[score]
        word = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        words.setdefault(word, []).append(TITLES[score])
    return f"{name} against {other}: " + "; ".join(f"{word}: {', '.join(which)}" for word, which in words.items()) + "."
