"""What the recipe `blip-mini` tells: retrieval, captions and radii of a small BLIP-2 on emoji, for several similarities."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from app_data.store.errors import DataError
from app_eval.measure.interval import Interval, over_seeds, paired_difference, resamples
from app_eval.show.commands import read_json
from app_eval.show.page import FIRST_ROWS, Claim, Claims, Column, Figure, Page, Row, Section, Table
from app_eval.show.stories import EMOJI_CREDIT
from app_eval.show.stories.blip import plan


def collect(sources: Sequence[Path]) -> dict[str, dict]:
    """The studies {"settings", "result"} of run folders and JSON files, in the order of the page."""
    return {"": {"format": 2, "studies": [study for source in sources for study in _read(source)]}}


def _read(source: Path) -> list[dict]:
    if source.is_file():
        stored = read_json(source)
        studies = stored["studies"] if "studies" in stored else [{k: stored[k] for k in ("settings", "result")}]
        for found in (row for study in studies for seed in study["result"]["runs"] for row in seed.values()):
            if "controls" not in found.get("captions", {}):
                found.pop("captions", None)  # scored with the prompt: a caption of any picture had a BLEU-4 of 0.6
        return studies
    result = read_json(source / "result.json")
    if result.get("recipe", "blip-mini") != "blip-mini":
        raise DataError(f"{source} is a run of {result['recipe']}, not of blip-mini")
    settings = yaml.safe_load((source / "config.resolved.yaml").read_text(encoding="utf-8"))
    settings["config"] = {k: v for k, v in settings["config"].items() if k not in ("out", "cache_dir", "coco_mini")}
    for seed, rows in enumerate(result["runs"]):
        for row, found in rows.items():
            records = source / f"seed-{seed}" / row / "train-1" / "metrics.jsonl"
            if records.exists():
                text = records.read_text(encoding="utf-8").splitlines()
                lines = [json.loads(line) for line in text[-plan.LAST_STEPS :]]
                found["diagnostics"] = {key: lines[-1][key] for key in plan.DIAGNOSTICS}
                found["diagnostics"]["loss/itm"] = statistics.fmean(line["loss/itm"] for line in lines)
    return [{"settings": settings, "result": result}]


def tell(content: Mapping[str, dict]) -> Page:
    """The page."""
    studies = content[""]["studies"]
    first, config = studies[0]["result"], studies[0]["settings"]["config"]
    runs, num = first["runs"], first["n"]
    # Claims of studies from another start stand beside their tables: the page stays short.
    here = [study for study in studies if study["settings"]["config"].get("start") == config.get("start")]
    rows = [row for row in plan.FIRST if row in runs[0]]
    known = {**first.get("controls", {}), **({"start": None} if runs[0].get("euclidean", {}).get("start") else {})}
    controls = [name for name in plan.CONTROLS if name in known]
    listed = rows if controls else plan.FIRST
    shown = list(plan.SHOWN.items())
    right = {row: f"{statistics.fmean(_numbers(runs, row, plan.TEXT)):.1f} %" for row in rows}
    said = [f"{name} for {right[row]}" for row, name in plan.SPOKEN.items() if row in rows]
    if "ridge" in controls:
        said.append(f"ridge regression on the same features for {_get(known['ridge'], 'itc/txt_r1'):.1f} %")
    values = {r: tuple(over_seeds(_numbers(runs, r, where)) for _, where in shown) for r in rows}
    values |= {
        name: tuple(_get({"retrieval": known[name]}, where) for _, where in shown) for name in controls if known[name]
    }
    if "start" in controls:
        places = [where.replace("retrieval/", "start/", 1) for _, where in shown]
        values["start"] = tuple(over_seeds(_numbers(runs, "euclidean", where)) for where in places)
    last = [Row(plan.CONTROLS[name], values[name]) for name in controls]
    last.append(Row(plan.GUESS, (100 / num, 100 / num, None)))
    return Page(
        title="hyper-blip: a small BLIP-2 on emoji",
        outcome=f"Given a picture by an artist never seen, {_list(said)} of the pictures: that often the first of {num} texts is right.",
        figure=Figure(
            f"first answers that are right, {_title(studies[0])}",
            tuple((title, {plan.ROWS[r]: values[r][i] for r in rows}) for i, (title, _) in enumerate(shown)),
        ),
        table=Table(
            tuple(Column(title, 1) for title, _ in shown),
            (*(Row(plan.ROWS[r], values.get(r, ()), _command(studies[0], [r])) for r in listed), *last)[:FIRST_ROWS],
            first=_title(studies[0]),
            note=f"Means over {first['seeds']} seeds, by the contrastive similarity; brackets are 95 % intervals over seeds (Student's t).",
        ),
        control=plan.CONTROLS[controls[0]] if controls else plan.ROWS["euclidean"],
        body=(_setting(config), *(_judged(study, study is studies[0]) for study in here), _not_run(studies)),
        tables=tuple(
            section for number, study in enumerate(studies) for section in _tables(study, number + 1, study not in here)
        ),
        commands=(_command(studies[0]), "hier page blip RUN... docs/results/hyper-blip.md"),
        terms=plan.TERMS,
        credits=(EMOJI_CREDIT,),
    )  # fmt: skip


def _list(said: Sequence[str]) -> str:
    """Words in a row: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


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
    if config.get("match", {}).get("epochs"):
        losses = "contrastive loss first, matching last"
    tested = f"; tested on {config['test_artist']}" if config.get("test_artist", plan.ARTIST) != plan.ARTIST else ""
    start = plan.START[config.get("start", "fresh")]
    return f"{losses}{', then captions' if config['stage2']['epochs'] and config.get('captioned', True) else ''}; {start}{tested}"


def _command(study: Mapping, rows: Sequence[str] = ()) -> str:
    config, result = study["settings"]["config"], study["result"]
    words = {
        "seeds": result["seeds"],
        "rows": " ".join(rows or result["runs"][0]),
        "losses": " ".join(config["losses"]),
        "start": config.get("start", "fresh"),
    }
    stages = ("stage1", *(("match",) if config.get("match", {}).get("epochs") else ()), "stage2")
    words |= {f"{s}.{key}": config[s][key] for s in stages for key in ("epochs", "batch_size", "lr")}
    words |= {key: config[key] for key in ("num_layers", "num_queries", "max_tokens", "num_captions", "k_test")}
    # Settings that runs before them do not have, where they are not the defaults.
    words |= {key: config[key] for key, default in plan.LATER.items() if config.get(key, default) != default}
    if (pictures := config["stage2"].get("pictures")) is not None:
        words["stage2.pictures"] = pictures
    words |= {f"temperature.{k}": v for k, v in config.get("temperature", {}).items() if v not in (None, 0.07)}
    if "captioned" in config and set(config["captioned"]) != set(plan.ROWS):
        words["captioned"] = " ".join(config["captioned"])
    if config.get("radius") is False:
        words["no-radius"] = ""
    if config.get("test_artist", plan.ARTIST) != plan.ARTIST:
        words |= {"artists": " ".join(config["artists"]), "test_artist": config["test_artist"]}
    words |= {"coco_mini": "FILE"} if "coco_mini" in next(iter(result["runs"][0].values())) else {}
    return "hier train blip-mini " + " ".join(f"--{k.replace('_', '-')} {v}".strip() for k, v in words.items())


def _setting(config: Mapping) -> Section:
    size, pool, views = (config.get(key, plan.LATER[key]) for key in ("size", "pool", "views"))
    width, reader = config.get("width", plan.LATER["width"]), config.get("text", plan.LATER["text"])
    seen = f"{size} pixels" + (f", {pool} x {pool} places to a token" if pool > 1 else "")
    seen += f", {views} views of each" if views > 1 else ""
    lines = [
        f"The model is trained on emoji by {', '.join(config['artists'])} and tested on pictures by an artist never seen (Twemoji). "
        "EfficientNet-Lite0 and SmolLM2-135M are frozen; a Q-Former that starts from MiniLM is trained "
        f"({config['num_layers']} layers, {config['num_queries']} queries, captions of at most {config['max_tokens']} tokens; the first "
        f"table: pictures of {seen}, features of {width} numbers"
        + (", captions read by MiniLM as it is" if reader == "minilm" else "")
        + ").",
        "A cosine after the exponential map at the origin is the Euclidean cosine, because the map keeps directions. So the row with the "
        "paper's cosine differs from Euclidean BLIP-2 by RQS and RTP alone, and no contrastive loss trains its radius. The Lorentz row "
        "with RQS and RTP differs by three things at once.",
        "A claim is better or worse where every interval at hand excludes 0. CIDEr alone was kept picture by picture; nothing corrects "
        "for the number of claims. First texts are judged by the contrastive similarity, before any re-ranking.",
    ]
    if config.get("start") == "linear":
        tau = config["temperature"]
        lines.append(
            "Picture size, start, reader of the captions and temperatures of the first table were chosen with OpenMoji left out of "
            "training and asked for, never on Twemoji; the rates were not tuned "
            "(docs/adr/0004-hyper-blip.md). The temperature starts at "
            f"{tau['cosine']} for cosines and at {tau['distance']} for distances, with a rate of its own "
            f"({tau['lr'] or config['stage1']['lr']}; that of the weights is {config['stage1']['lr']}). In the other studies all "
            "similarities share 0.07 and the rate of the weights, at which a short training cannot move it."
        )
    return Section("What was held fixed", tuple(lines))


def _judged(study: Mapping, whole: bool = True) -> Section:
    """The claims of a study; those that were not run in it only on demand."""
    result = study["result"]
    runs, guess = result["runs"], 100 / result["n"]
    known = {"controls": result.get("controls", {})}
    runs = [{"half": {}} | {row: {**found, **known} for row, found in seed.items()} for seed in runs]
    claims = []
    for text, ours, where, other, place in plan.CLAIMS:
        items = seeds = None
        if {ours, other or ours} <= runs[0].keys():
            values = _numbers(runs, ours, where)
            constant = {"half": 0.5, "": 0.0}.get(other)
            rest = _numbers(runs, other, place) if constant is None else [constant] * len(values)
            differences = [a - b for a, b in zip(values, rest, strict=True)]
            items = _over_pictures([seed[ours] for seed in runs], place)
            # A place that no seed has was not measured; one that some seed lacks is undefined.
            seeds = None if all(map(math.isnan, differences)) else over_seeds(differences)
        if whole or seeds is not None:
            claims.append(Claim(text, items, seeds, "lower" in text, digits=2))
    runs = result["runs"]
    plain = "euclidean" if "euclidean" in runs[0] else next(iter(runs[0]))
    premise = Claim(
        f"{plan.ROWS[plain]} against guessing, first text right",
        None,
        over_seeds([x - guess for x in _numbers(runs, plain, plan.TEXT)]),
    )
    return Section(_title(study).capitalize(), (Claims(tuple(claims), premise=premise), *_warnings(runs)))


def _over_pictures(seeds: Sequence[Mapping], place: str) -> Interval | None:
    """Interval over pictures of CIDEr against that of a control, where both were kept for each picture."""
    control = place.removeprefix("captions/controls/").removesuffix("/cider")
    kept = [seed.get("captions", {}).get("each", {}) for seed in seeds]
    if not place.startswith("captions/controls/") or not all(control in each for each in kept):
        return None
    pairs = [[(np.array(each[name]), np.ones(len(each[name]))) for each in kept] for name in ("own", control)]
    return paired_difference(pairs[0], pairs[1], resamples(len(kept[0]["own"])))


def _warnings(runs: Sequence[Mapping]) -> list[str]:
    """What makes the numbers of a study mean less than they seem to."""
    said, rows = [], list(runs[0])
    found = [
        seed[row] for seed in runs for row in rows if "itm" in seed[row]["retrieval"] and "diagnostics" in seed[row]
    ]
    if losses := [one["diagnostics"]["loss/itm"] for one in found]:
        mean = statistics.fmean(losses)
        said.append(
            ("The matching head saw few steps: its" if mean > 0.98 * plan.CONSTANT_LOSS else "The matching head's")
            + f" loss over the last {plan.LAST_STEPS} is {mean:.3f}, and a constant has {plan.CONSTANT_LOSS:.3f}."
        )
    clipped = [plan.ROWS[row] for row in rows if min(_numbers(runs, row, "diagnostics/clipped_text")) > 0.5]
    if clipped:
        said.append(
            f"In training, more than half of the texts sit at the largest radius in: {'; '.join(clipped)}. There the radius was not "
            "trained, and distances are distances to one sphere."
        )
    same = [plan.ROWS[row] for row in rows if statistics.fmean(_numbers(runs, row, "captions/distinct")) < 0.5]
    if same:
        said.append(
            f"The captions hardly depend on the picture (fewer than half of them differ) in: {'; '.join(same)}."
        )
    return said


def _not_run(studies: Sequence[Mapping]) -> Section:
    lines = []
    for study in studies:
        absent = [title for row, title in plan.ROWS.items() if row not in study["result"]["runs"][0]]
        lines.append(f"{_title(study)}: {'; '.join(absent) or 'nothing of the planned rows'}")
        row = next(iter(study["result"]["runs"][0].values()))
        if "samples" in row and "captions" not in row:
            lines.append(
                "captions in that study: they were scored with the given prompt, which those of any picture share"
            )
    if len(studies) > 1:
        lines.append(
            "what the first study compares and a later one does not list (studies from another start stand with all tables)"
        )
    if studies[0]["settings"]["config"].get("start") == "linear":
        lines.append(
            "5,000 steps of 512 pairs, about 1.5 hours a row and seed on one core; LoRA or a trained last block of the vision encoder, "
            "which needs its activations in place of kept feature maps (docs/adr/0004-hyper-blip.md)"
        )
    return Section("Not run", (tuple(lines),))


def _tables(study: Mapping, number: int, claims: bool = False) -> list[Section]:
    runs, sections = study["result"]["runs"], []
    absent = [row for row in plan.ROWS if row not in runs[0]]
    for title, needs, note, columns in plan.TABLES:
        heads = tuple(Column(head, 1 if "_r" in where and "minus" not in where else 3) for head, where in columns)
        rows = []
        for row in (row for row in plan.ROWS if row in runs[0]):
            places = [where for _, where in columns] if needs in runs[0][row] else []
            rows.append(Row(plan.ROWS[row], tuple(over_seeds(_numbers(runs, row, where)) for where in places)))
        if absent and not sections:
            rows.append(Row("; ".join(plan.ROWS[row] for row in absent), command=_command(study, absent)))
        if any(row.values for row in rows):
            sections.append(Table(heads, tuple(rows), title=title, note=note))
    samples = {row: runs[0][row]["samples"][:6] for row in plan.ROWS if runs[0].get(row, {}).get("samples")}
    if samples:
        lines = zip(*samples.values(), strict=True)
        told = tuple(Row(line[0]["reference"], tuple(s["caption"] for s in line)) for line in lines)
        sections.append(
            Table(tuple(Column(plan.ROWS[row]) for row in samples), told, "What the first seed says", "reference")
        )
    judged = _judged(study, whole=False).parts if claims else ()
    return [Section(f"Study {number}: {_title(study)}", (*judged, *sections), _command(study))]
