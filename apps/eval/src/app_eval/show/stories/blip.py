"""What the recipe `blip-mini` tells: retrieval, captions and radii of a small BLIP-2 on emoji, for several similarities."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from app_data.store.errors import DataError
from app_eval.measure.interval import over_seeds
from app_eval.show.commands import read_json
from app_eval.show.page import Claim, Claims, Column, Figure, Page, Row, Section, Table
from app_eval.show.stories import EMOJI_CREDIT

ROWS = {
    "euclidean": "Euclidean BLIP-2 (control)",
    "cosine": "hyperbolic cosine + RQS + RTP (the paper's)",
    "lorentz": "Lorentz distance + RQS + RTP",
    "poincare": "Poincare distance + RQS + RTP",
    "mix": "cosine to Lorentz distance + RQS + RTP",
    "lorentz_max": "Lorentz distance + RTP",
    "lorentz_whole": "Lorentz distance + RQS",
    "lorentz_plain": "Lorentz distance alone",
}
FIRST = ("euclidean", "cosine", "lorentz_plain", "lorentz", "poincare")
GUESS = "guessing"
# Diagnostics of stage 1, by their name in the records.
DIAGNOSTICS = {
    "radius_image_mean": "radius, pictures", "radius_text_mean": "radius, texts", "clipped_image": "clipped, pictures",
    "clipped_text": "clipped, texts", "query_entropy": "query entropy / ln Q", "query_cosine": "cosine between queries",
    "tau": "temperature", "c": "curvature",
}  # fmt: skip
# Steps over which the matching loss is averaged; the loss of a head that always says "one in three".
LAST_STEPS, CONSTANT_LOSS = 20, math.log(3) - 2 / 3 * math.log(2)
TEXT, PICTURE, GROUP = "retrieval/itc/txt_r1", "retrieval/itc/img_r1", "retrieval/levels/group/txt_r1"
KINDS = (("text", "txt"), ("picture", "img"))
LENGTH, ERROR = "radius/caption_length/spearman", "radius/scores/radius/error_auroc"
# Title of a table, what it needs, its note, and (title, where) of its columns; "answers" are those after re-ranking, if there was any.
TABLES = (
    ("Retrieval", "retrieval", "In percent; of the subgroup and the group any text counts.",
     [*((f"{what} in the first {k}", f"retrieval/answers/{name}_r{k}") for what, name in KINDS for k in (1, 5, 10)),
      ("subgroup of the first text", "retrieval/levels/subgroup/txt_r1"), ("group of the first text", GROUP),
      ("first text, contrastive alone", TEXT), ("first picture, contrastive alone", PICTURE)]),
    ("Ranked by the cosine of the same features", "retrieval",
     "In percent, by the contrastive similarity. A text that is the first answer of many pictures is a hub: for a distance, texts of small "
     "radius are near to everything.",
     [("first text", TEXT), ("by cosine", "retrieval/cosine/txt_r1"), ("first picture", PICTURE), ("by cosine", "retrieval/cosine/img_r1"),
      ("commonest first answer, share", "retrieval/commonest_answer")]),
    ("Photographs of COCO, never seen in training", "coco_mini", "In percent.",
     [(f"{what} in the first {k}", f"coco_mini/answers/{name}_r{k}") for what, name in KINDS for k in (1, 5)]),
    ("Captions", "captions", "Each caption is also scored as that of another picture, the control for what common words earn.",
     [("BLEU-4", "captions/bleu_4"), ("ROUGE-L", "captions/rouge_l"), ("CIDEr", "captions/cider"),
      ("CIDEr, other picture", "captions/cider_other"), ("exactly right, share", "captions/exact"),
      ("different captions, share", "captions/distinct")]),
    ("The radius", "radius",
     "Rank correlations of the radius (of texts with their length, of pictures with a crop or blur); how well a small "
     "radius tells wrong first answers (0.5 is noise); area under risk against coverage (lower is better); straightness of recall over ten "
     "bins of the radius (1 is a rising line); shares of texts nearer to the origin than their picture, and of group words nearer than "
     "their text. In the Euclidean row the radius is a monotone function of the Euclidean norm: it is the control.",
     [("with caption length", LENGTH), ("with crop", "radius/crop/spearman"), ("with blur", "radius/blur/spearman"),
      ("tells errors", ERROR), ("risk", "radius/scores/radius/aurc"), ("risk, random", "radius/scores/random/aurc"),
      ("risk, largest softmax", "radius/scores/largest softmax/aurc"),
      ("straightness", "radius/scores/radius/minus_s_r2"), ("straightness, largest softmax", "radius/scores/largest softmax/minus_s_r2"),
      ("text below picture", "radius/text_below_image"), ("group word below text", "radius/group_word_below_caption")]),
    ("At the last step", "diagnostics", "", [(title, f"diagnostics/{key}") for key, title in DIAGNOSTICS.items()]),
)  # fmt: skip
# (claim, row, its number, other row, its number); without another row the number itself is judged.
CLAIMS = (
    ("hyperbolic cosine against Euclidean, first text right, %", "cosine", TEXT, "euclidean", TEXT),
    ("Lorentz distance alone against Euclidean, first text right, %", "lorentz_plain", TEXT, "euclidean", TEXT),
    ("Lorentz distance + RQS + RTP against Euclidean, first text right, %", "lorentz", TEXT, "euclidean", TEXT),
    ("the same, group of the first text right, %", "lorentz", GROUP, "euclidean", GROUP),
    ("Lorentz features ranked by cosine against by distance, first text right, %", "lorentz", "retrieval/cosine/txt_r1", "lorentz", TEXT),
    ("RQS added to Lorentz + RTP, first text right, %", "lorentz", TEXT, "lorentz_max", TEXT),
    ("RTP added to Lorentz + RQS, first text right, %", "lorentz", TEXT, "lorentz_whole", TEXT),
    ("RQS and RTP added to Lorentz, correlation of radius and caption length", "lorentz", LENGTH, "lorentz_plain", LENGTH),
    ("radius of Lorentz against Euclidean, telling wrong first answers", "lorentz", ERROR, "euclidean", ERROR),
    ("correlation of a picture's radius with the share that a crop keeps, Lorentz", "lorentz", "radius/crop/spearman", "", ""),
    ("correlation of a picture's radius with blur, Lorentz (lower is better)", "lorentz", "radius/blur/spearman", "", ""),
    ("re-ranking by the matching head, Euclidean, first text right, %", "euclidean", "retrieval/itm/txt_r1", "euclidean", TEXT),
    ("captions of Euclidean against captions of other pictures, CIDEr", "euclidean", "captions/cider", "euclidean", "captions/cider_other"),
)  # fmt: skip
TERMS = {
    "RQS": "random query selection: one query at random in place of the best",
    "RTP": "random text pruning: captions are cut short at random",
    "CIDEr": "agreement of word sequences, rare ones counting more",
    "BLEU-4": "precision of word sequences up to four",
    "ROUGE-L": "longest common word sequence",
    "COCO": "Common Objects in Context",
}


def collect(sources: Sequence[Path]) -> dict[str, dict]:
    """The studies {"settings", "result"} of run folders and JSON files, in the order of the page."""
    return {"": {"format": 2, "studies": [study for source in sources for study in _read(source)]}}


def _read(source: Path) -> list[dict]:
    if source.is_file():
        stored = read_json(source)
        return stored["studies"] if "studies" in stored else [{k: stored[k] for k in ("settings", "result")}]
    result = read_json(source / "result.json")
    if result.get("recipe", "blip-mini") != "blip-mini":
        raise DataError(f"{source} is a run of {result['recipe']}, not of blip-mini")
    settings = yaml.safe_load((source / "config.resolved.yaml").read_text(encoding="utf-8"))
    settings["config"] = {k: v for k, v in settings["config"].items() if k not in ("out", "cache_dir", "coco_mini")}
    for seed, rows in enumerate(result["runs"]):
        for row, found in rows.items():
            records = source / f"seed-{seed}" / row / "train-1" / "metrics.jsonl"
            if records.exists():
                lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()[-LAST_STEPS:]]
                found["diagnostics"] = {key: lines[-1][key] for key in DIAGNOSTICS}
                found["diagnostics"]["loss/itm"] = statistics.fmean(line["loss/itm"] for line in lines)
    return [{"settings": settings, "result": result}]


def tell(content: Mapping[str, dict]) -> Page:
    """The page."""
    studies = content[""]["studies"]
    first, config = studies[0]["result"], studies[0]["settings"]["config"]
    runs, num = first["runs"], first["n"]
    rows = [row for row in FIRST if row in runs[0]]
    shown = [
        ("first text right, %", TEXT),
        ("first picture right, %", PICTURE),
        ("group of the first text right, %", GROUP),
    ]
    right = {
        row: f"{statistics.fmean(_numbers(runs, row, TEXT)):.1f} %" if row in rows else "(not run)" for row in FIRST
    }
    values = {r: tuple(over_seeds(_numbers(runs, r, where)) for _, where in shown) for r in rows}
    return Page(
        title="hyper-blip: a small BLIP-2 on emoji",
        outcome=f"Given a picture by an artist never seen, Euclidean BLIP-2 finds its text among {num} for {right['euclidean']} of the "
        f"pictures, the paper's hyperbolic cosine for {right['cosine']}, and the Lorentz distance alone for {right['lorentz_plain']}.",
        figure=Figure(
            f"first answers that are right, {_title(studies[0])}",
            tuple((title, {ROWS[r]: values[r][i] for r in rows}) for i, (title, _) in enumerate(shown)),
        ),
        table=Table(
            tuple(Column(title, 1) for title, _ in shown),
            (
                *(Row(ROWS[r], values.get(r, ()), _command(studies[0], [r])) for r in FIRST),
                Row(GUESS, (100 / num, 100 / num, None)),
            ),
            first=_title(studies[0]),
            note=f"Means over {first['seeds']} seeds, by the contrastive similarity; brackets are 95 % intervals over seeds (Student's t).",
        ),
        control=ROWS["euclidean"],
        body=(_setting(config), *(_judged(study) for study in studies), _not_run(studies)),
        tables=tuple(section for number, study in enumerate(studies) for section in _tables(study, number + 1)),
        commands=(_command(studies[0]), "hier page blip RUN... docs/results/hyper-blip.md"),
        terms=TERMS,
        credits=(EMOJI_CREDIT,),
    )  # fmt: skip


def _get(found: Mapping, where: str) -> float:
    """A number by its place; undefined if it is missing or null."""
    value: object = found
    for key in where.split("/"):
        if key == "answers":
            key = "itm" if "itm" in value else "itc"
        if key == "cosine" and key not in value and "itc" in value:
            key = "itc"  # there the similarity is the cosine
        value = value.get(key) if isinstance(value, Mapping) else None
    return math.nan if value is None else value


def _numbers(runs: Sequence[Mapping], row: str, where: str) -> list[float]:
    return [_get(seed[row], where) for seed in runs]


def _title(study: Mapping) -> str:
    config = study["settings"]["config"]
    losses = "stage 1 in full" if {"itc", "itm", "lm"} <= set(config["losses"]) else "contrastive loss alone"
    start = "towers tied by least squares at the start" if config.get("start") == "pairs" else "fresh start"
    return f"{losses}{', then captions' if config['stage2']['epochs'] else ''}; {start}"


def _command(study: Mapping, rows: Sequence[str] = ()) -> str:
    config, result = study["settings"]["config"], study["result"]
    words = {
        "seeds": result["seeds"],
        "rows": " ".join(rows or result["runs"][0]),
        "losses": " ".join(config["losses"]),
        "start": config.get("start", "fresh"),
    }
    words |= {f"{s}.{key}": config[s][key] for s in ("stage1", "stage2") for key in ("epochs", "batch_size", "lr")}
    words |= {key: config[key] for key in ("num_layers", "num_queries", "max_tokens", "num_captions", "k_test")}
    words |= {"coco_mini": "FILE"} if "coco_mini" in next(iter(result["runs"][0].values())) else {}
    return "hier train blip-mini " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in words.items())


def _setting(config: Mapping) -> Section:
    return Section(
        "What was held fixed",
        (
            f"The model is trained on emoji by {', '.join(config['artists'])} and tested on pictures by an artist never seen (Twemoji). "
            "EfficientNet-Lite0 and SmolLM2-135M are frozen; a Q-Former that starts from MiniLM is trained "
            f"({config['num_layers']} layers, {config['num_queries']} queries, captions of at most {config['max_tokens']} tokens).",
            "A cosine after the exponential map at the origin is the Euclidean cosine, because the map keeps directions. So the row with "
            "the "
            "paper's cosine differs from Euclidean BLIP-2 by RQS and RTP alone, and no contrastive loss trains its radius. The Lorentz "
            "row with RQS and RTP differs by three things at once.",
            "A claim is better or worse where its interval over seeds excludes 0; nothing was kept picture by picture, and nothing "
            "corrects for the "
            "number of claims. First texts are judged by the contrastive similarity, before any re-ranking.",
        ),
    )


def _judged(study: Mapping) -> Section:
    result = study["result"]
    runs, guess = result["runs"], 100 / result["n"]
    claims = []
    for text, ours, where, other, place in CLAIMS:
        seeds = None
        if {ours, other or ours} <= runs[0].keys():
            values = _numbers(runs, ours, where)
            differences = (
                [a - b for a, b in zip(values, _numbers(runs, other, place), strict=True)] if other else values
            )
            # A place that no seed has was not measured; one that some seed lacks is undefined.
            seeds = None if all(map(math.isnan, differences)) else over_seeds(differences)
        claims.append(Claim(text, None, seeds, "lower" in text, digits=2))
    plain = "euclidean" if "euclidean" in runs[0] else next(iter(runs[0]))
    premise = Claim(
        f"{ROWS[plain]} against guessing, first text right",
        None,
        over_seeds([x - guess for x in _numbers(runs, plain, TEXT)]),
    )
    return Section(_title(study).capitalize(), (Claims(tuple(claims), premise=premise), *_warnings(runs)))


def _warnings(runs: Sequence[Mapping]) -> list[str]:
    """What makes the numbers of a study mean less than they seem to."""
    said, rows = [], list(runs[0])
    found = [
        seed[row] for seed in runs for row in rows if "itm" in seed[row]["retrieval"] and "diagnostics" in seed[row]
    ]
    if losses := [one["diagnostics"]["loss/itm"] for one in found]:
        said.append(
            f"The matching head saw few steps: its loss over the last {LAST_STEPS} is {statistics.fmean(losses):.3f}, and a constant has "
            f"{CONSTANT_LOSS:.3f}."
        )
    clipped = [ROWS[row] for row in rows if min(_numbers(runs, row, "diagnostics/clipped_text")) > 0.5]
    if clipped:
        said.append(
            f"In training, more than half of the texts sit at the largest radius in: {'; '.join(clipped)}. There the radius was not "
            f"trained, and "
            "distances are distances to one sphere."
        )
    same = [ROWS[row] for row in rows if statistics.fmean(_numbers(runs, row, "captions/distinct")) < 0.5]
    if same:
        said.append(
            f"The captions hardly depend on the picture (fewer than half of them differ) in: {'; '.join(same)}."
        )
    return said


def _not_run(studies: Sequence[Mapping]) -> Section:
    lines = []
    for study in studies:
        absent = [title for row, title in ROWS.items() if row not in study["result"]["runs"][0]]
        lines.append(f"{_title(study)}: {'; '.join(absent) or 'nothing of the planned rows'}")
    return Section("Not run", (tuple(lines),))


def _tables(study: Mapping, number: int) -> list[Section]:
    runs, sections = study["result"]["runs"], []
    absent = [row for row in ROWS if row not in runs[0]]
    for title, needs, note, columns in TABLES:
        heads = tuple(Column(head, 1 if "_r" in where and "minus" not in where else 3) for head, where in columns)
        rows = [
            Row(
                name,
                tuple(over_seeds(_numbers(runs, row, where)) for _, where in columns)
                if needs in runs[0].get(row, {})
                else (),
            )
            for row, name in ROWS.items()
            if row in runs[0]
        ]
        if absent and not sections:
            rows.append(Row("; ".join(ROWS[row] for row in absent), command=_command(study, absent)))
        if any(row.values for row in rows):
            sections.append(Table(heads, tuple(rows), title=title, note=note))
    samples = {row: runs[0][row]["samples"][:6] for row in ROWS if runs[0].get(row, {}).get("samples")}
    if samples:
        lines = zip(*samples.values(), strict=True)
        told = tuple(Row(line[0]["reference"], tuple(s["caption"] for s in line)) for line in lines)
        sections.append(
            Table(tuple(Column(ROWS[row]) for row in samples), told, "What the first seed says", "reference")
        )
    return [Section(f"Study {number}: {_title(study)}", tuple(sections), _command(study))]
