"""Turn the stored results of `nox -s train -- --seeds 3` into `docs/results/first-light.md`.

The text that judges is decided by numbers: a row is called better or worse only where the interval of its paired
difference excludes 0, and if plain LoRA does not beat zero-shot the page says "inconclusive" and ranks nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from app_data.sets.emoji import emoji_taxonomy
from app_data.store.errors import DataError
from app_eval.measure.paths import (
    DECODERS,
    LOGIT_SCORES,
    LOWER_IS_BETTER,
    PATH_SCORES,
    TITLES,
    Interval,
    Outcome,
    mean_over_seeds,
    paired_difference,
    per_picture,
    resamples,
)
from app_eval.measure.results import load_outcome
from hier_losses import Taxonomy

BASELINE, ZERO_SHOT = "leaf_ce", "zero_shot"
ROWS = {
    "neighbour": "picture nearest neighbour (control)",
    "zero_shot": "zero-shot",
    "leaf_ce": "LoRA + leaf CE",
    "level_ce": "LoRA + level CE",
    "tp_kl_hisce": "LoRA + TP-KL + HiSCE",
    "tp_kl_hisce_consistency": "LoRA + TP-KL + HiSCE + consistency",
}
# What is compared with what: (score, decoder of the row, decoder of leaf CE).
COMPARISONS = (
    ("fpa", "level_argmax", "bottom_up"),
    ("fpa", "joint_path", "bottom_up"),
    ("fpa", "bottom_up", "bottom_up"),
    ("tice", "level_argmax", "level_argmax"),
    ("severity", "bottom_up", "bottom_up"),
    ("severity", "joint_path", "bottom_up"),
    ("ahd", "bottom_up", "bottom_up"),
    ("ahd", "joint_path", "bottom_up"),
)


def write_first_light(run: Path, page: Path) -> None:
    """Write the page.

    Args:
        run: the run folder of the recipe `emoji`.
        page: the Markdown file.

    Raises:
        DataError: if the run is not finished.
    """
    path = run / "result.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: finish the run first with `nox -s train -- --seeds 3`")
    result = json.loads(path.read_text(encoding="utf-8"))
    settings = yaml.safe_load((run / "config.resolved.yaml").read_text(encoding="utf-8"))
    outcomes = {
        row: [load_outcome(run / f"seed-{seed}" / row) for seed in range(result["seeds"])]
        for row in ROWS
        if all(row in seeds for seeds in result["runs"])
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(result, settings, outcomes), encoding="utf-8")


def render(result: dict, settings: dict, outcomes: Mapping[str, list[Outcome]]) -> str:
    """The page as Markdown."""
    tax = emoji_taxonomy()
    counts = resamples(result["n"])

    def pairs(row: str, decoder: str, score: str) -> list:
        return [per_picture(found, tax, decoder)[score] for found in outcomes[row]]

    def difference(row: str, decoder: str, score: str, other: str, other_decoder: str) -> Interval:
        return paired_difference(pairs(row, decoder, score), pairs(other, other_decoder, score), counts)

    config, num = settings["config"], result["seeds"]
    parts = [
        "# First light: emoji by an artist never seen",
        "This page is generated from stored results; no number on it was typed by hand:",
        f"```\nnox -s train -- --seeds {num}\npython apps/eval page runs/emoji docs/results/first-light.md\n```",
        f"EfficientNet-Lite0 and MiniLM with a closed-form projection, LoRA of rank {config['fit']['rank']} on the pointwise "
        f"convolutions, trained on {', '.join(config['artists'])}, tested on {result['n']} pictures by Twemoji, which are centred on "
        "their own mean before scoring (this uses the whole unlabelled test set, and no label). "
        f"Seeds: {num} (LoRA initialisation, data order, dropout). Values are means over seeds; intervals are 95 % percentile "
        "bootstraps over the test pictures, the same resamples for all rows and seeds. Learning rates were chosen on withheld leaves "
        f"of the training artists, by the same trials for every row ([all trials](first-light-tuning.json)): {_rates(config)}.",
    ]
    inconclusive = difference(BASELINE, "bottom_up", "leaf", ZERO_SHOT, "bottom_up").low <= 0
    for decoder in DECODERS:
        parts.append(
            f"## Decoded by `{decoder}`\n\n{_table(outcomes, lambda r, s, d=decoder: mean_over_seeds(pairs(r, d, s), counts))}"
        )
    majority = result["runs"][0][BASELINE]["mta_majority"]
    parts.append(f"MTA of always naming the majority member of each cut: {majority:.3f}.")
    parts.append(_levels(outcomes, pairs, counts, tax.num_levels))
    parts.append(_by_seed(outcomes, tax, num))
    parts.append("## Do the hierarchy-aware rows beat LoRA + leaf CE?")
    if inconclusive:
        parts.append(
            "**Inconclusive.** LoRA + leaf CE does not beat zero-shot on the unseen artist, so this page ranks nothing."
        )
        return "\n\n".join(parts) + "\n"
    parts.append(
        "Paired differences to LoRA + leaf CE. Leaf CE trains nothing above the leaves, so its FPA, severity and AHD@1 are taken "
        "bottom-up, where its TICE is 0 by construction; TICE is compared under `level_argmax` only, where leaf CE loses by "
        "construction. *better* and *worse* mean that the interval excludes 0."
    )
    found = {}
    for row in outcomes:
        if row in ("neighbour", ZERO_SHOT, BASELINE):
            continue
        for score, decoder, other in COMPARISONS:
            found[row, score, decoder, other] = difference(row, decoder, score, BASELINE, other)
    parts.append(_comparison_table(found))
    parts.append("## In words\n\n" + "\n".join(f"- {line}" for line in _verdicts(found)))
    parts.append(
        "Twemoji graphics are licensed under CC BY 4.0, OpenMoji under CC BY-SA 4.0, Noto Emoji under OFL 1.1; no picture is part of "
        "this repository."
    )
    return "\n\n".join(parts) + "\n"


def _rates(config: dict) -> str:
    return "; ".join(f"{ROWS[row]} {head:g} (head), {lora:g} (LoRA)" for row, (head, lora) in config["lr"].items())


def _table(outcomes: Mapping[str, list[Outcome]], value) -> str:
    columns = (*PATH_SCORES, *LOGIT_SCORES)
    arrows = {s: "lower" if s in LOWER_IS_BETTER else "higher" for s in columns}
    lines = [
        "| | " + " | ".join(f"{TITLES[s]} ({arrows[s]})" for s in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in outcomes:
        cells = []
        for score in columns:
            v = value(row, score)
            cells.append(f"{v.value:.3f} [{v.low:.3f}, {v.high:.3f}]")
        lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _levels(outcomes: Mapping[str, list[Outcome]], pairs, counts, num_levels: int) -> str:
    head = " | ".join(f"level {level + 1}, `{d}`" for d in DECODERS for level in range(num_levels))
    lines = ["## Accuracy level by level (level 1 is the top)\n", f"| | {head} |", "|---" * (3 * num_levels + 1) + "|"]
    for row in outcomes:
        cells = [
            f"{mean_over_seeds(pairs(row, d, f'level_{level + 1}'), counts).value:.3f}"
            for d in DECODERS
            for level in range(num_levels)
        ]
        lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_seed(outcomes: Mapping[str, list[Outcome]], tax: Taxonomy, num: int) -> str:
    lines = ["## Seed by seed, decoded by `bottom_up`\n"]
    lines += [
        "| | " + " | ".join(f"leaf acc. / AHD@1, seed {seed}" for seed in range(num)) + " |",
        "|---" * (num + 1) + "|",
    ]
    for row, seeds in outcomes.items():
        cells = []
        for found in seeds:
            scores = per_picture(found, tax, "bottom_up")
            cells.append(" / ".join(f"{scores[name][0].sum() / scores[name][1].sum():.3f}" for name in ("leaf", "ahd")))
        lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(score: str, found: Interval) -> str:
    if found.low <= 0 <= found.high:
        return "no difference shown"
    lower = found.value < 0
    return "better" if lower == (score in LOWER_IS_BETTER) else "worse"


def _comparison_table(found: Mapping[tuple, Interval]) -> str:
    lines = ["| row | score | decoded by | leaf CE decoded by | difference | |", "|---|---|---|---|---|---|"]
    for (row, score, decoder, other), value in found.items():
        lines.append(
            f"| {ROWS[row]} | {TITLES[score]} | `{decoder}` | `{other}` | {value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}] | "
            f"{_verdict(score, value)} |"
        )
    return "\n".join(lines)


def _verdicts(found: Mapping[tuple, Interval]) -> list[str]:
    lines = []
    for row in dict.fromkeys(key[0] for key in found):
        said = {"better": [], "worse": [], "no difference shown": []}
        for (name, score, decoder, _), value in found.items():
            if name == row:
                said[_verdict(score, value)].append(f"{TITLES[score]} ({decoder})")
        parts = [f"{verdict}: {', '.join(which)}" for verdict, which in said.items() if which]
        lines.append(f"{ROWS[row]} against LoRA + leaf CE: {'; '.join(parts)}.")
    return lines
