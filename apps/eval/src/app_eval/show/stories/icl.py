"""The section "With a language model" of `docs/results/hyper-icl.md`, from the JSON of `python apps/eval icl-study`."""

import numpy as np

from app_data.store.errors import DataError
from app_eval.measure.paths import resamples

__all__ = ["distilled_section", "model_section"]

ZERO, BLIND = "no demonstrations", "no demonstrations, no picture"
OURS = "anchors, hyperbolic"
# Selectors whose choice depends on the seed: by chance, or by the training of the lift.
SEEDED = ("random", OURS, "anchors, Euclidean")
# Name of the row, selector, calibration.
ABLATION = (
    ("neither (random demonstrations)", "random", "none"),
    ("anchors only", OURS, "none"),
    ("calibration only (random demonstrations)", "random", "lorentz"),
    ("anchors, calibration with Euclidean anchors", OURS, "euclidean"),
    ("both", OURS, "lorentz"),
    ("Euclidean metric throughout", "anchors, Euclidean", "euclidean"),
)


def model_section(study: dict) -> str:
    """The section.

    Raises:
        DataError: The JSON is of another kind, or of a quick run, or holds no rows.
    """
    if study.get("format") != 1 or study.get("study") != "icl-mini":
        raise DataError("the second JSON must come from icl-study")
    if study["quick"]:
        raise DataError("the second JSON is of a --quick run: run icl-study in full")
    if not any(task["rows"] for task in study["tasks"]):
        raise DataError("the second JSON holds no row yet: let icl-study go on")
    card, strength = study["model"], study["lambda"]
    chosen = ", ".join(
        f"{kind} {strength[kind]['lambda']:g} (of {', '.join(strength[kind]['accuracy'])}; accuracies "
        f"{', '.join(f'{v:.2f}' for v in strength[kind]['accuracy'].values())}, uncalibrated {strength['none']['accuracy']:.2f})"
        for kind in ("lorentz", "euclidean")
    )
    parts = [
        "## With a language model",
        "One trained model (recipe `icl-mini`: frozen EfficientNet-Lite0 and SmolLM2-135M in a LLaVA, one token a picture; trained are "
        f"the connector and LoRA of rank {card['rank']}, {_steps(card)} on episodes of {_listed(card['shots'])} "
        f"demonstrations), so nothing here says how another training would come out. {len(study['seeds'])} demonstration seeds are planned "
        "for random demonstrations and for the training of the anchors (the tables say how many were run); the other selectors have no "
        "chance in them. Answers are scored by "
        "likelihood over the closed set. Intervals are 95 % bootstrap intervals over the queries; differences are paired by query. "
        f"Calibration strength, chosen on {strength['n']} held-out training questions with {strength['k']} random demonstrations: "
        f"{chosen}; calibration was tried at that K alone. "
        f"The study took {study['seconds'] / 60:.0f} minutes on one core and {study['peak_memory_mib']:,} MiB.",
        f"Commands: `python apps/train icl-mini {card.get('options', '')}`, then `python apps/eval icl-study runs/icl-mini --json "
        "docs/results/hyper-icl-model.json`.".replace(" `,", "`,"),
    ]
    if not study["complete"]:
        parts.append("**Cut short:** selectors and numbers of demonstrations that are missing below were not run.")
    for task in study["tasks"]:
        if task["rows"]:
            parts.append(_task(task, len(study["seeds"])))
    return "\n\n".join(parts)


def _steps(card: dict) -> str:
    planned = card.get("planned_steps", card["steps"])
    return f"{card['steps']} steps" if planned == card["steps"] else f"stopped after {card['steps']} of {planned} steps"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"


def _by(task: dict) -> dict[tuple[str, int, str], dict]:
    return {(row["selector"], row["k"], row["calibration"]): row for row in task["rows"]}


def _task(task: dict, seeds: int) -> str:
    rows = _by(task)
    zero = rows[ZERO, 0, "none"]
    kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in zero["kinds"].items())
    by_kind = f" By kind of question: {kinds}." if len(zero["kinds"]) > 1 else ""
    lines = [
        f"### {task['name']}",
        "",
        f"Pool {task['num_pool']:,}, queries {task['num_queries']:,}, {task['num_answers']} answers.",
        "",
        f"Without demonstrations {_interval(zero['accuracy'])}.{by_kind}",
    ]
    if (BLIND, 0, "none") in rows:
        lines += [
            "",
            f"Without demonstrations and without the picture {_interval(rows[BLIND, 0, 'none']['accuracy'])}.",
        ]
    lines += ["", _verdict(task, seeds)]
    for k in sorted({k for _, k, _ in rows} - {0}):
        heads = ("selector", "seeds", "accuracy", "against none", "against random")
        heads += ("calibrated, Lorentz: change", "calibrated, Euclidean: change", "vote, no language model")
        lines += ["", f"K = {k}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for selector in task["selectors"]:
            row = rows.get((selector, k, "none"))
            if row is None:
                lines.append(f"| {selector} | not run |" + " |" * (len(heads) - 2))
                continue
            changes = [rows.get((selector, k, kind), {}).get("to_uncalibrated") for kind in ("lorentz", "euclidean")]
            cells = [str(row["seeds"]), _interval(row["accuracy"]), _change(row.get("to_zero_shot"))]
            cells += [_change(row.get("to_random")), *map(_change, changes)]
            cells.append(f"{row['vote'][0]:.3f}" if "vote" in row else "")
            lines.append(f"| {selector} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_ablation(rows)])


def _ablation(rows: dict[tuple[str, int, str], dict]) -> list[str]:
    """The parts one by one, at K = 4 (or the K there is)."""
    ks = sorted({k for _, k, _ in rows} - {0})
    if not ks:
        return []
    k = 4 if 4 in ks else ks[-1]
    lines = ["", f"Ablation, K = {k}", "", "| | accuracy | against none |", "|---|---|---|"]
    for title, selector, calibration in ABLATION:
        row = rows.get((selector, k, calibration))
        cells = "not run |" if row is None else f"{_interval(row['accuracy'])} | {_change(row.get('to_zero_shot'))}"
        lines.append(f"| {title} | {cells} |")
    return lines


def _verdict(task: dict, seeds: int) -> str:
    """What the numbers say; where random demonstrations do not help, or seeds are missing, nothing is ranked."""
    rows = _by(task)
    plain = [row for (_, k, calibration), row in rows.items() if k and calibration == "none"]
    if not plain:
        return "Demonstrations: not run."
    if any(row["selector"] in SEEDED and row["seeds"] < seeds for row in plain):
        return (
            f"**Undecided.** Rows with chance in them hold fewer than the {seeds} seeds planned, so nothing is ranked: the intervals "
            "below are over queries, not over draws of demonstrations or trainings of the anchors. The anchors' lift is trained on the "
            "pool's answers, so that their choice is a classifier already: compare with the vote."
        )
    helped = [row for row in plain if row["to_zero_shot"][1] > 0]
    hurt = [row for row in plain if row["to_zero_shot"][2] < 0]
    if not helped:
        best = max(plain, key=lambda row: row["accuracy"][0])
        said = (
            "**Inconclusive.** No demonstrations make this model better than none: the best row, "
            f"*{best['selector']}* with K = {best['k']}, changes its accuracy by {_change(best['to_zero_shot'])}"
        )
        if hurt:
            said += f", and {len(hurt)} of {len(plain)} rows are worse than none"
        return (
            f"{said}"
            ". The model does not learn from its context here, so selectors and calibrations are not ranked; the vote "
            "shows what selection yields without a language model."
        )
    names = "; ".join(f"*{row['selector']}* K = {row['k']} ({_change(row['to_zero_shot'])})" for row in helped)
    said = [f"- Better than no demonstrations ({len(helped)} of {len(plain)} rows): {names}."]
    if hurt:
        names = "; ".join(f"*{row['selector']}* K = {row['k']} ({_change(row['to_zero_shot'])})" for row in hurt)
        said.append(f"- Worse than no demonstrations: {names}.")
    by_chance = max((row for row in plain if row["selector"] == "random"), key=lambda row: row["accuracy"][0])
    ranks = by_chance["to_zero_shot"][1] > 0
    if not ranks:
        said.insert(
            0,
            "**Inconclusive.** Random demonstrations, the plain row, are not better than none (at best, with K = "
            f"{by_chance['k']}: {_change(by_chance['to_zero_shot'])}), so the selectors are not ranked. What the intervals say of each:\n",
        )
    k = max(row["k"] for row in helped)
    for row in (row for row in plain if ranks and row["k"] == k and "to_ours" in row):
        value, low, high = row["to_ours"]
        word = "is no different from" if low <= 0 <= high else "is better than" if value > 0 else "is worse than"
        said.append(f"- K = {k}: *{row['selector']}* {word} *{OURS}* ({_change(row['to_ours'])}).")
    voted = [row for row in plain if "to_vote" in row]
    above, below = (sum(sign * row["to_vote"][at] > 0 for row in voted) for sign, at in ((1, 1), (-1, 2)))
    if voted:
        said.append(
            f"- Against the vote of the same demonstrations, with no language model: better in {above} of {len(voted)} rows, worse in "
            f"{below}. The anchors' lift is trained on the pool's answers, so that their choice is a classifier already."
        )
    weighed = [row for row in rows.values() if row["calibration"] != "none" and "to_uncalibrated" in row]
    up, down = (sum(sign * row["to_uncalibrated"][at] > 0 for row in weighed) for sign, at in ((1, 1), (-1, 2)))
    if weighed:
        said.append(
            f"- Calibration: of {len(weighed)} comparisons {up} are better and {down} worse than uncalibrated attention beyond their "
            f"interval; about {len(weighed) * 0.025:.1f} each way are expected by chance alone."
        )
    return "\n".join(said)


def distilled_section(result: dict) -> str:
    """The section "Distilled against calibrated", from the `result.json` of the recipe `icl-distill`.

    Raises:
        DataError: The JSON is of another kind.
    """
    if result.get("format") != 1 or result.get("recipe") != "icl-distill":
        raise DataError("the third JSON must be the result.json of icl-distill")
    options, masses, num = result["options"], result["masses"], result["num_queries"]
    counts = resamples(num) / num
    lines = [
        "### Distilled against calibrated (easy-vqa)",
        "",
        "Teacher: the model above, its attention calibrated by hyperbolic distance with lambda "
        f"{options['strength']:g}. Student: the same weights and LoRA of rank {options['rank']}, no calibration; "
        f"{options['steps']} steps of {options['batch_size']} training questions with {options['shots']} random demonstrations, rate "
        f"{options['lr']:g}, on the attention masses of layers {result['layers'][0]} to {result['layers'][-1]} "
        f"(weights: masses {options['kl']:g}, answers {options['ce']:g}, closeness to the model {options['base_kl']:g}). One student, so "
        "nothing here says how another would come out. Command: `python apps/train icl-distill`.",
        "",
        f"Divergence of the query's attention masses from the calibrated model, over {masses['n']} test questions with random "
        f"demonstrations: the model {masses['model']:.4g}, the student {masses['student']:.4g} "
        f"({100 * (1 - masses['student'] / masses['model']):.0f} % less)." if masses["model"] > 0 else "",
        "",
        "| demonstrations | seeds | the model | calibrated | distilled | calibrated - model | distilled - calibrated |",
        "|---" * 7 + "|",
    ]  # fmt: skip
    for selector in dict.fromkeys(cell["selector"] for cell in result["cells"]):
        cells = [cell["right"] for cell in result["cells"] if cell["selector"] == selector]
        mean = {
            name: np.array([[int(b) for b in right[name]] for right in cells]).mean(0)
            for name in ("model", "calibrated", "distilled")
        }

        def interval(values: np.ndarray) -> list[float]:
            return [float(values.mean()), *(float(x) for x in np.percentile(counts @ values, (2.5, 97.5)))]

        shown = [_interval(interval(mean[name])) for name in ("model", "calibrated", "distilled")]
        shown += [
            _change(interval(mean[a] - mean[b])) for a, b in (("calibrated", "model"), ("distilled", "calibrated"))
        ]
        lines.append(f"| {selector} | {len(cells)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _interval(values: list[float]) -> str:
    return f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def _change(values: list[float] | None) -> str:
    return "" if values is None else f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]"
