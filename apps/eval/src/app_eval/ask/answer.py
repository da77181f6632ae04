"""`hier answer`: answers to questions about pictures, after demonstrations from a pool of one's own.

The model is transformers' or speaks through a server with OpenAI's interface; its own chat template makes the prompt.
"""

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from huggingface_hub import InferenceClient
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from app_data.read.pictures import lies_in, open_picture
from app_data.sets.demonstration_tasks import read_jsonl
from app_data.store.errors import DataError
from app_eval.ask.pool import PoolItem, TrainLift, read_items
from app_eval.ask.select import choose
from app_eval.ask.settings import Answer
from hyper_icl import (
    CalibrationPlan,
    SegmentMap,
    calibrate,
    hierarchy_bias,
    insert_demos,
    use_calibrated_attention,
)

__all__ = ["LocalModel", "Server", "answers", "read_questions"]

_QUALITY = 95  # of the JPEG that a server gets
_SECONDS = 600.0  # that a server may take for one answer


def chat(
    demos: Sequence[PoolItem], picture: Path, question: str, show: Callable[[Path], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Demonstrations and a question as a chat; `show` makes the part of a message that holds a picture."""

    def asked(path: Path, text: str) -> list[dict[str, Any]]:
        return [show(path), {"type": "text", "text": text}]

    turns = [(asked(demo.path, demo.question), [{"type": "text", "text": demo.answer}]) for demo in demos]
    return insert_demos([{"role": "user", "content": asked(picture, question)}], turns)


class LocalModel:
    """An image-text model of transformers with its processor.

    Args:
        name: A folder, or a name on the hub.
        calibrated: Whether answers will be calibrated.

    Raises:
        DataError: It cannot be loaded, its processor has no chat template, or its attention cannot be calibrated.
    """

    def __init__(self, name: str, calibrated: bool = False) -> None:
        if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise DataError(f"the model folder {name} does not exist")
        try:
            self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise DataError(f"the image-text model {name} cannot be loaded: {_first_line(error)}") from error
        if not getattr(self.processor, "chat_template", None) or not hasattr(self.processor, "image_processor"):
            raise DataError(
                f"the model {name} has no chat template for pictures and text: name one that is made for chats"
            )
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        if calibrated:
            try:
                use_calibrated_attention(self.model)
            except ValueError as error:
                raise DataError(f"the model {name} cannot be calibrated: {_first_line(error)}") from error

    @torch.no_grad()
    def answer(
        self, demos: Sequence[PoolItem], picture: Path, question: str, max_new_tokens: int, bias: Tensor | None = None
    ) -> str:
        """The most likely answer; `bias` (k,) weighs the demonstrations."""
        made = chat(demos, picture, question, lambda path: {"type": "image", "image": open_picture(path)})
        inputs = self.processor.apply_chat_template(
            made, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, dtype=self.model.dtype)
        weighed: Any = nullcontext()
        if bias is not None:
            segments = SegmentMap.from_chats(self.processor, [made], inputs)
            weighed = calibrate(self.model, CalibrationPlan(bias.unsqueeze(0).to(self.model.device), segments))
        with weighed:
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = out[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(new, skip_special_tokens=True).strip()


class Server:
    """A server with OpenAI's interface for chats.

    Args:
        url: Where it is, such as http://localhost:8000/v1, and after a # the name of the model, if the server wants one.
    """

    def __init__(self, url: str) -> None:
        self.url, _, name = url.partition("#")
        self.name = name or None
        # Without a key the client would send the user's token for the hub to whoever listens there.
        self.client = InferenceClient(base_url=self.url, api_key="none", timeout=_SECONDS)

    def answer(
        self, demos: Sequence[PoolItem], picture: Path, question: str, max_new_tokens: int, bias: None = None
    ) -> str:
        """The server's answer at temperature 0.

        Raises:
            DataError: The server cannot be reached, or does not answer as OpenAI's would.
        """
        made = chat(demos, picture, question, _data_uri)
        try:
            reply = self.client.chat_completion(made, model=self.name, max_tokens=max_new_tokens, temperature=0.0)
            return (reply.choices[0].message.content or "").strip()
        # Which errors the client raises depends on the HTTP library that it is built on.
        except Exception as error:
            raise DataError(f"the server {self.url} gives no answer: {_first_line(error)}") from error


def _data_uri(path: Path) -> dict[str, Any]:
    file = io.BytesIO()
    open_picture(path).save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")


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
    request, selection, notes = choose(
        items,
        pictures,
        questions,
        train_lift,
        k=config.k,
        method=config.method,
        seed=config.seed,
        cache_dir=config.cache_dir,
    )
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
