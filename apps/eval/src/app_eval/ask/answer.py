"""`hier answer`: answers to questions about pictures, after demonstrations from a pool of one's own.

The model is transformers' or speaks through a server with OpenAI's interface; its own chat template makes the prompt.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from app_data.read.pictures import lies_in
from app_data.store.errors import DataError
from app_data.store.text import read_jsonl
from app_eval.ask.models import LocalModel, Server
from app_eval.ask.pool import PoolItem, TrainLift, read_items
from app_eval.ask.select import choose
from app_eval.ask.settings import Answer
from hyper_icl import hierarchy_bias


def read_questions(config: Answer) -> list[tuple[Path, str]]:
    """Pictures and what is asked about them.

    Raises:
        DataError: Neither or both of `batch` and of pictures with a question are given, or a line lacks a field.
    """
    if config.batch is None:
        if not config.image or not config.question.strip():
            raise DataError("give --image and --question, or --batch with a file of both")
        return [(path, config.question) for path in config.image]
    if config.image or config.question:
        raise DataError("--batch brings its own pictures and questions: leave out --image and --question")
    rows, found = read_jsonl(config.batch), []
    lines = config.batch.read_text(encoding="utf-8-sig").splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    for number, row in zip(numbers, rows, strict=True):
        for field in ("image", "question"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise DataError(f"line {number} of {config.batch} must have the field {field}, got {row.get(field)!r}")
        found.append((config.batch.parent / row["image"], row["question"]))
    return found


def read_pool(source: Path) -> list[PoolItem]:
    """The pool's items, each with an answer, and with a question unless the pool is a folder.

    Raises:
        DataError: An item lacks one.
    """
    items, folder = read_items(source), source.is_dir()
    for number, item in enumerate(items, 1):
        if not item.answer.strip():
            remedy = "put pictures into folders named after their answers" if folder else "give every item one"
            raise DataError(f"item {number} of {source}, {item.path}, has no answer: {remedy}")
        if not folder and not item.question.strip():
            raise DataError(f"item {number} of {source}, {item.path}, has no question: give every item one")
    return items


def _check_places(config: Answer, demos: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Refuse files that would send any picture of this machine to a server."""
    places = [(config.pool, demos), *([] if config.batch is None else [(config.batch, pictures)])]
    for file, named in places:
        root = file if file.is_dir() else file.parent
        path = next((path for path in named if not lies_in(root, path)), None)
        if path is not None:
            raise DataError(
                f"{file} names {path}, which does not lie in {root}: say --outside if the server may get it"
            )


def answers(config: Answer, train_lift: TrainLift) -> Iterator[dict[str, Any]]:
    """Answer one question after the other.

    Args:
        config: What is asked of which model, and how demonstrations are chosen.
        train_lift: Trains a lift, for method "hyperbolic" and for calibration.

    Raises:
        DataError: Pool, pictures, questions or model cannot be used.
    """
    asked = read_questions(config)
    served = config.model.startswith(("http://", "https://"))
    if config.calibrate and served:
        raise DataError("--calibrate changes the attention inside the model: give --model as a folder or hub name")
    if config.calibrate and config.k < 2:
        raise DataError(f"--calibrate weighs demonstrations against each other: k must be at least 2, got {config.k}")
    if config.max_new_tokens < 1:
        raise DataError(f"max_new_tokens must be at least 1, got {config.max_new_tokens}")
    items = read_pool(config.pool)
    if served and not config.outside:
        _check_places(config, [item.path for item in items], [picture for picture, _ in asked])
    model = Server(config.model) if served else LocalModel(config.model, config.calibrate)
    pictures, questions = [list(column) for column in zip(*asked, strict=True)]
    request, selection, notes = choose(items, pictures, questions, train_lift, config)
    for skipped in request.pool.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", file=sys.stderr)  # noqa: T201
    for warning in notes.get("warnings", ()):
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
    bias: Sequence[Tensor | None] = [None] * len(asked)
    if config.calibrate:
        bank, query, _ = request.lifted
        bias = list(hierarchy_bias(query, bank.tangent[selection.ids], bank.c))
    for (picture, question), ids, own in zip(asked, selection.ids.tolist(), bias, strict=True):
        # In a folder of pictures the demonstrations are asked what is asked about the picture.
        demos = [replace(item, question=item.question or question) for item in (request.pool.items[i] for i in ids)]
        yield {
            "image": str(picture),
            "question": question,
            "answer": model.answer(demos, picture, question, config.max_new_tokens, own),
            "demos": [{"path": str(demo.path), "answer": demo.answer} for demo in demos],
            "model": config.model,
            "method": config.method,
            "calibrated": config.calibrate,
        }


def run(config: Answer, train_lift: TrainLift) -> int:
    """The command: a JSON line for every answer as soon as it is there."""
    out: TextIO = sys.stdout
    with ExitStack() as files:
        for row in answers(config, train_lift):
            # Opened late: an error in the settings must not empty the file of an earlier call.
            if config.out is not None and out is sys.stdout:
                config.out.parent.mkdir(parents=True, exist_ok=True)
                out = files.enter_context(config.out.open("w", encoding="utf-8"))
            print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
    return 0
