"""Turn the stored results of `blip-mini` into `docs/results/hyper-blip.md`.

The sentences that judge are decided by numbers: a claim holds here only where every seed agrees and the mean difference is
larger than twice its standard error over seeds; fewer than three seeds are called too few.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from app_data.emoji import CREDITS
from app_data.errors import DataError

ROWS = {
    "euclidean": "Euclidean BLIP-2 (cosine, best query, whole captions)",
    "cosine": "hyperbolic cosine + RQS + RTP (the paper's)",
    "lorentz": "Lorentz distance + RQS + RTP",
    "poincare": "Poincare distance + RQS + RTP",
    "mix": "cosine to Lorentz distance + RQS + RTP",
    "lorentz_max": "Lorentz distance + RTP",
    "lorentz_whole": "Lorentz distance + RQS",
    "lorentz_plain": "Lorentz distance alone",
}
LEAST_SEEDS = 3


def write_blip_page(run: Path, page: Path) -> None:
    """Write the page.

    Args:
        run: the run folder of the recipe `blip-mini`.
        page: the Markdown file.

    Raises:
        DataError: the run is not finished.
    """
    path = run / "result.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: finish the run first with `python apps/train blip-mini`")
    result = json.loads(path.read_text(encoding="utf-8"))
    settings = yaml.safe_load((run / "config.resolved.yaml").read_text(encoding="utf-8"))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(result, settings), encoding="utf-8")


def render(result: dict, settings: dict) -> str:
    """The page as Markdown."""
    runs, config = result["runs"], settings["config"]
    rows = [row for row in ROWS if all(row in seed for seed in runs)]
    absent = [title for row, title in ROWS.items() if row not in rows]
    parts = [
        "# hyper-blip: a small BLIP-2 on emoji",
        f"Generated from the JSON of a run by `python apps/eval blip-page`. Trained on emoji by {', '.join(config['artists'])}, tested "
        f"on {result['n']} pictures by an artist never seen (Twemoji); {result['seeds']} seed(s); stage 1 {config['stage1']['epochs']} "
        f"epochs, stage 2 {config['stage2']['epochs']}; captions of at most {config['max_tokens']} tokens; the matching head re-ranks "
        f"{config['k_test']} candidates. Frozen EfficientNet-Lite0 and SmolLM2-135M, a Q-Former that starts from MiniLM.",
        "A cosine after the exponential map at the origin **is** the Euclidean cosine (the map keeps directions): the row with the "
        "paper's cosine differs from Euclidean BLIP-2 by RQS and RTP alone, and its radius is trained by no contrastive loss.",
        "## Retrieval on the artist never seen",
        _table(
            ("TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "subgroup TR@1", "group TR@1"),
            {ROWS[row]: [[_retrieval(seed[row], c) for seed in runs] for c in range(8)] for row in rows},
        ),
        "TR: pictures ask for texts, IR: texts ask for pictures, in percent, with re-ranking; the last two columns count any text of "
        "the right subgroup or group, by the contrastive similarity.",
        "## Zero-shot on a small COCO",
        _optional(runs, rows, "coco_mini", ("TR@1", "TR@5", "IR@1", "IR@5"), _coco),
        "## Captions",
        _optional(runs, rows, "captions", ("BLEU-4", "ROUGE-L", "CIDEr"), _captions),
        "## Does the radius mean anything?",
        _table(
            (
                "rho with caption length",
                "with crop fraction",
                "with blur",
                "AUROC(error)",
                "AURC",
                "AURC, random",
                "AURC, softmax",
            ),
            {ROWS[row]: [[_radius(seed[row], c) for seed in runs] for c in range(7)] for row in rows},
        ),
        "Spearman correlations of the radius (of the text in the first column, of the picture in the others); AUROC of -radius for "
        "wrong first answers (0.5 is noise), area under risk-coverage (lower is better) beside its controls. The Euclidean row is the "
        "control of the radius itself: there it is a monotone function of the Euclidean norm.",
        "## Which claims hold in this setting",
        *_claims(runs, rows),
        "Not run: " + ("; ".join(absent) if absent else "nothing of the planned rows") + ".",
        "## Attribution\n\n" + "\n\n".join(CREDITS),
    ]
    return "\n\n".join(parts) + "\n"


def _retrieval(found: dict, column: int) -> float:
    table = found["retrieval"]
    if column >= 6:
        return table["levels"]["subgroup" if column == 6 else "group"]["txt_r1"]
    return table["itm"][f"{'txt' if column < 3 else 'img'}_r{(1, 5, 10)[column % 3]}"]


def _coco(found: dict, column: int) -> float:
    return found["coco_mini"]["itm"][("txt_r1", "txt_r5", "img_r1", "img_r5")[column]]


def _captions(found: dict, column: int) -> float:
    table = {k.lower().replace("-", "_"): v for k, v in found["captions"].items()}
    return table[("bleu_4", "rouge_l", "cider")[column]]


def _radius(found: dict, column: int) -> float:
    report = found["radius"]
    if column < 3:
        value = report[("caption_length", "crop", "blur")[column]]["spearman"]
    else:
        name = ("radius", "radius", "random", "largest softmax")[column - 3]
        value = report["scores"][name]["error_auroc" if column == 3 else "aurc"]
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> str:
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "-"
    spread = f" +- {statistics.stdev(known):.3g}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3g}{spread}"


def _table(columns: Sequence[str], rows: dict[str, list[list[float]]]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {title} | " + " | ".join(_mean(cell) for cell in cells) + " |" for title, cells in rows.items()]
    return "\n".join(lines)


def _optional(
    runs: list[dict], rows: list[str], key: str, columns: Sequence[str], value: Callable[[dict, int], float]
) -> str:
    if not all(key in seed[row] for seed in runs for row in rows):
        return "Not run."
    return _table(columns, {ROWS[r]: [[value(seed[r], c) for seed in runs] for c in range(len(columns))] for r in rows})


def _claims(runs: list[dict], rows: list[str]) -> list[str]:
    """One sentence for each claim of the paper."""
    found = [
        (
            "Hyperbolic BLIP-2 retrieves no worse than Euclidean BLIP-2 (TR@1)",
            "cosine",
            "euclidean",
            lambda f: _retrieval(f, 0),
        ),
        (
            "A distance retrieves better than the Euclidean cosine (TR@1)",
            "lorentz",
            "euclidean",
            lambda f: _retrieval(f, 0),
        ),
        ("Hierarchy helps the upper levels (group TR@1)", "lorentz", "euclidean", lambda f: _retrieval(f, 7)),
        ("RQS raises TR@1", "lorentz", "lorentz_max", lambda f: _retrieval(f, 0)),
        ("RTP raises TR@1", "lorentz", "lorentz_whole", lambda f: _retrieval(f, 0)),
        ("RQS and RTP make the radius follow caption length", "lorentz", "lorentz_plain", lambda f: _radius(f, 0)),
        (
            "The radius predicts errors better than that of Euclidean BLIP-2 (AUROC)",
            "lorentz",
            "euclidean",
            lambda f: _radius(f, 3),
        ),
    ]
    lines = []
    for text, ours, other, value in found:
        if ours not in rows or other not in rows:
            lines.append(f"- {text}: **not run**.")
            continue
        differences = [value(seed[ours]) - value(seed[other]) for seed in runs]
        lines.append(f"- {text}: **{verdict(differences)}** (mean difference {statistics.fmean(differences):+.3g}).")
    return ["\n".join(lines)]


def verdict(differences: Sequence[float]) -> str:
    """What the differences over seeds say."""
    if any(math.isnan(d) for d in differences):
        return "undecided (a score is undefined)"
    if len(differences) < LEAST_SEEDS:
        return f"undecided ({len(differences)} seed(s) are too few)"
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    if all(d > 0 for d in differences) and mean > 2 * error:
        return "holds"
    if all(d < 0 for d in differences) and -mean > 2 * error:
        return "does not hold: the opposite shows"
    return "does not show"
