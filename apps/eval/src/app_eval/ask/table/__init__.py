"""`hier eval icl`: what demonstrations do for an image-text model, on six tasks, row by row and seed by seed.

A cell is one row of one task, number of demonstrations and seed. Its folder keeps every answer as soon as it is there, then the scores
of every question, so that a stopped command goes on. VQA accuracy, CIDEr-D and exact match are those of `measure`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from app_data.read.labelled import Decoding
from app_data.sets.demonstration_tasks import IclTask
from app_data.sets.miniature import write_miniature
from app_data.sets.six_tasks import TASKS, Parts, load_parts
from app_data.store.atomic import write_json, write_text
from app_data.store.cache import fingerprint
from app_data.store.errors import DataError
from app_data.store.features import weights_digest
from app_eval.ask import demonstration_study
from app_eval.ask.models import LocalModel, is_icl_mini
from app_eval.ask.pool import TrainLift
from app_eval.ask.settings import EvalIcl
from app_eval.ask.table import cost
from app_eval.ask.table.choices import Choices
from app_eval.ask.table.rows import NOT_HERE, Row, resolved, rows
from app_eval.measure import cells
from app_eval.measure.captions import cider_d
from app_eval.measure.vqa import exact_match, vqa_accuracy_each
from hyper_icl import DemoSelection, insert_demos, knn_vote, postprocess_caption, postprocess_vqa

FORMAT = 1
ALL, VOTE = "all", "vote"
SCORES = {"vqa": "VQA accuracy", "cider": "CIDEr-D", "exact": "right"}
# OpenFlamingo's; yes and no take as many as an answer.
_NEW_TOKENS = {"vqa": 5, "cider": 20, "exact": 5}


def each_score(task: IclTask, answers: list[str]) -> np.ndarray:
    """The score of every answer: VQA accuracy and exact match in [0, 1], CIDEr-D in [0, 10].

    Generated text is cut as OpenFlamingo cuts it, at the end of its line at the latest; of yes and no the first word counts.

    Args:
        task: With references.
        answers: As generated, one for each item.
    """
    lines = [text.strip().split("\n", 1)[0] for text in answers]
    keys = range(len(task))
    references = dict(zip(keys, task.references, strict=True))
    if task.score == "cider":
        found = cider_d(references, {i: postprocess_caption(line) for i, line in enumerate(lines)})
    elif task.score == "vqa":
        found = vqa_accuracy_each({i: postprocess_vqa(line) for i, line in enumerate(lines)}, references)
    else:
        first = [(postprocess_vqa(line).split() or [""])[0] for line in lines]
        found = {i: float(exact_match(first[i], references[i])) for i in keys}
    return np.array([found[i] for i in keys], dtype=np.float64)


@dataclass
class _Bench:
    """One task with the model that answers it."""

    config: EvalIcl
    model: LocalModel
    weights: str
    choices: Choices
    out: Path
    known: dict[tuple, str] = field(default_factory=dict)

    @property
    def parts(self) -> Parts:
        return self.choices.parts

    @cached_property
    def new_tokens(self) -> int:
        return _NEW_TOKENS[self.parts.queries.score]

    def cell(self, row: Row, k: int, seed: int) -> Path:
        """Answer what is missing of a cell, score it, and say where it is."""
        home = self.out / self.parts.pool.name / row.name.replace(", ", "-").replace(" ", "-")
        folder = home / (f"k-{k}" if row.select else "k-0") / f"seed-{seed}"
        facts = {
            "row": row.name, "k": k if row.select else 0, "seed": seed, "model": self.weights, "max_new_tokens": self.new_tokens,
            "pool": self.parts.pool.fingerprint, "queries": self.parts.queries.fingerprint,
            "strength": self.config.strength if row.calibrated else 0.0,
            "adapter": weights_digest(self.model.adapter) if row.adapted and self.model.adapter is not None else "",
        }  # fmt: skip
        if cells.finished(folder, facts) is None:
            # The adapter's method shows no demonstrations, not even their answers.
            chosen = None if row.adapted else self.choices.choose(row, k, seed)
            answers = self._answers(row, chosen, seed, folder / f"answers-{fingerprint(facts)}.jsonl")
            scores = {self.parts.queries.score: each_score(self.parts.queries, answers)}
            if row.select and not row.calibrated and chosen is not None:
                voted = [str(answer) for answer in knn_vote(chosen, self.parts.pool.answers)]
                scores[VOTE] = each_score(self.parts.queries, voted)
            cells.keep(folder, {ALL: scores}, facts)
        return folder

    def _answers(self, row: Row, chosen: DemoSelection | None, seed: int, path: Path) -> list[str]:
        """All answers; those that an earlier call wrote are read back, and what was asked before is not asked again."""
        bias: Tensor | None = None
        if row.calibrated and chosen is not None:
            bias = self.choices.bias(row, chosen, seed, self.config.strength)
        queries, ids = self.parts.queries, [] if chosen is None else chosen.ids.tolist()
        shown = [ids[i] if ids else [] for i in range(len(queries))]
        # Anchors of another seed or curvature often choose the same demonstrations.
        keys = [
            (row.adapted, not row.select, i, tuple(own), None if bias is None else tuple(bias[i].tolist()))
            for i, own in enumerate(shown)
        ]
        found = _written(path)
        self.known.update(zip(keys, found, strict=False))
        missing = [i for i in range(len(found), len(queries)) if keys[i] not in self.known]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for start in range(0, len(missing) + 1, self.config.batch):
                batch = missing[start : start + self.config.batch]
                if batch:
                    chats = [
                        insert_demos(
                            [{"role": "user", "content": queries.content(i)}],
                            self.choices.demos(shown[i], bare=not row.select),
                        )
                        for i in batch
                    ]
                    said = self.model.reply(chats, self.new_tokens, None if bias is None else bias[batch], row.adapted)
                    self.known.update(zip((keys[i] for i in batch), said, strict=True))
                while len(found) < len(queries) and keys[len(found)] in self.known:
                    i = len(found)
                    found.append(self.known[keys[i]])
                    demos = [self.parts.pool.ids[j] for j in shown[i]]
                    line = {"id": queries.ids[i], "answer": found[i], "demos": demos}
                    print(json.dumps(line, ensure_ascii=False), file=file)
                file.flush()
        return found


def _written(path: Path) -> list[str]:
    """The answers of an earlier call; what a stop cut off in the middle of a line goes."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    try:
        return [json.loads(line)["answer"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged; delete it and run the same command again") from error


def run_table(config: EvalIcl, train_lift: TrainLift) -> dict:
    """Compute what is missing of a table, and write `result.json` and `table.md`.

    Args:
        config: Resolved settings.
        train_lift: Trains a lift on features and classes.

    Raises:
        DataError: A folder, a file, the model or the adapter cannot be used.
    """
    if config.out is None:
        raise DataError("--out is missing: give a folder for the table")
    if config.out.exists() and not config.out.is_dir():
        raise DataError(f"--out must name a folder, {config.out} is a file")
    places = _places(config)
    calibrated = bool({"calibration", "both"} & set(config.methods))
    model = LocalModel(config.model, calibrated, plain=True, adapter=config.adapter)
    weights = weights_digest(model.model)
    groups = []
    for name in config.tasks:
        decoding = Decoding(model.picture_size, cache_dir=config.cache_dir)
        parts = load_parts(name, places[name], decoding, config.pool or None, config.queries or None)
        if len(parts.queries) < 2:
            raise DataError(
                f"{TASKS[name].title} in {places[name]} has {len(parts.queries)} question: a table needs two"
            )
        bench = _Bench(config, model, weights, Choices(parts, train_lift, config.cache_dir), config.out)
        groups += list(_groups(name, bench))
    content = {
        "format": FORMAT, "study": "icl-table", "model": config.model, "preset": config.preset or "", "seeds": config.seeds,
        "strength": config.strength, "groups": groups,
    }  # fmt: skip
    write_json(config.out / cells.RESULT, content)
    write_text(config.out / "table.md", table(content))
    return content


def _places(config: EvalIcl) -> dict[str, Path]:
    """The folder of each task."""
    found: dict[str, Path] = {}
    for source in config.data:
        name, colon, path = source.partition(":")
        if colon and name in TASKS:
            found[name] = Path(path).expanduser()
        else:
            found |= {task: Path(source) / task for task in config.tasks if task not in found}
    if config.preset == "mini" and not config.data and config.out is not None:
        folder = config.out / "data"
        write_miniature(folder, config.pool or 400, config.queries or 40, cache_dir=config.cache_dir)
        found = {task: folder / task for task in config.tasks}
    lacking = [name for name in config.tasks if name not in found]
    if lacking:
        raise DataError(
            f"--data names no folder for {', '.join(lacking)}: give DIR with a folder for each, or TASK:DIR"
        )
    return found


def _groups(name: str, bench: _Bench) -> Iterator[dict]:
    config, score = bench.config, bench.parts.queries.score
    for k in config.k:
        loaded: dict[str, list[cells.Scores]] = {}
        chosen = {row.name: row for row in rows(config)}
        for seed in range(config.seeds):
            for row in chosen.values():
                if seed == 0 or row.seeded:
                    folder = bench.cell(row, k, seed)
                    loaded.setdefault(row.name, []).append(cells.kept(folder)[ALL])
                    _say(f"{name}, k {k}, {row.name}, seed {seed}: {float(loaded[row.name][-1][score].mean()):.3f}")
        summary = {}
        for row in chosen.values():
            own = loaded[row.name]
            summary[row.name] = {"seeds": len(own), **cells.summary(own, list(own[0]))}
            for key, other in (("against", config.against), ("twin", row.twin)):
                if other and other != row.name:
                    summary[row.name][key] = _compared(own, loaded[other], score)
        yield {
            "task": name, "title": TASKS[name].title, "score": score, "k": k, "baseline": config.against,
            "num_pool": len(bench.parts.pool), "num_queries": len(bench.parts.queries), "rows": summary,
        }  # fmt: skip


def _compared(ours: list[cells.Scores], other: list[cells.Scores], score: str) -> dict:
    """What knows no seed stands against every seed."""
    num = max(len(ours), len(other))
    a, b = (found * num if len(found) < num else found for found in (ours, other))
    return cells.against(a, b, [score], seeded=num > 1)[score]


def table(content: Mapping) -> str:
    """The table in Markdown: percent (CIDEr-D times 100), its deviation over the seeds, the vote of the demonstrations, and verdicts."""
    blocks = []
    for group in content["groups"]:
        score, base = group["score"], group["baseline"]
        head = (
            f"**{group['title']}**, {group['k']} demonstrations of {group['num_pool']}, {group['num_queries']} questions, "
            f"{content['seeds']} seed{'s' * (content['seeds'] > 1)}"
        )
        columns = ("", SCORES[score], "vote, no model", f"against {base}", "against its Euclidean twin", "seeds")
        lines = [head, "", cells.line(columns), "|---" * len(columns) + "|"]
        for name, row in group["rows"].items():
            shown = (cells.cell_value(row.get(score)), cells.cell_value(row.get(VOTE)))
            judged = (cells.cell_difference(row.get("against")), cells.cell_difference(row.get("twin")))
            lines.append(cells.line([name, *shown, *judged, str(row["seeds"])]))
        blocks.append("\n".join(lines))
    notes = [
        "Percent: mean over the seeds +- their standard deviation; CIDEr-D times 100. Differences: 95 % interval over questions, "
        "paired; after the semicolon over seeds, paired; a verdict needs both on one side of 0, and items alone where no seed changes "
        "either row. The vote is the most frequent answer of the demonstrations."
    ]
    if content["preset"] in NOT_HERE:
        notes.append(NOT_HERE[content["preset"]])
    return "\n\n".join([*blocks, *notes]) + "\n"


def run(config: EvalIcl, train_lift: TrainLift) -> int:
    """The command `hier eval icl`."""
    if config.preset is None and not config.data and not config.plan and is_icl_mini(Path(config.model)):
        return demonstration_study.run(config, train_lift)
    config = resolved(config)
    if config.plan:
        _say(cost.plan(config))
        return 0
    _say(table(run_table(config, train_lift)))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
