"""`hier caption RUN PICTURE...` and `hier search RUN TEXT --data DIR`: a trained small BLIP-2 at work."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from app_data.read.pictures import load_picture
from app_data.store.errors import DataError, MissingAssetError
from app_data.weights.blip2 import PROMPT, caption_ids, language_tokenizer
from app_data.weights.lite0_minilm import lite0_preprocess, to_uint8
from app_eval.ask.settings import Caption, Search
from hyper_blip import HyperBlip2ForConditionalGeneration, HyperBlip2ForPretraining, generate_captions

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SIZE, MAX_TOKENS = 128, 16


def find_stage(run: Path, stage: str) -> Path:
    """The saved model of a stage: the folder itself, or the only one below it.

    Raises:
        DataError: there is none, or there are several.
    """
    if (run / "config.json").exists():
        return run
    found = sorted(p.parent for p in run.glob(f"**/{stage}/config.json"))
    if not found:
        raise DataError(f"{run} holds no trained {stage}: give the folder of a finished run of blip-mini")
    if len(found) > 1:
        listed = ", ".join(str(p.parent) for p in found[:6])
        raise DataError(f"{run} holds {len(found)} trained models: name one of {listed}")
    return found[0]


def _load(kind: type, folder: Path) -> torch.nn.Module:
    try:
        return kind.from_pretrained(folder)
    except (DataError, MissingAssetError):
        raise
    except ValueError as error:
        raise DataError(str(error)) from error


def _read(paths: Sequence[Path]) -> tuple[list[Path], torch.Tensor]:
    """Pictures that can be read, as uint8 (n, 3, size, size); the others are named on standard error."""
    good, arrays = [], []
    for path in paths:
        try:
            arrays.append(load_picture(path, SIZE))
            good.append(path)
        except DataError as error:
            print(f"error: {path}: {error}", file=sys.stderr)  # noqa: T201
    return good, to_uint8(np.stack(arrays)) if arrays else torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8)


def caption(config: Caption) -> int:
    """Print a caption and the radius of each picture; unreadable ones make the exit status 1."""
    model = _load(HyperBlip2ForConditionalGeneration, find_stage(config.run, "stage2"))
    good, pixels = _read(config.pictures)
    if good:
        ready = lite0_preprocess(pixels)
        captions = generate_captions(
            model, ready, language_tokenizer(), prompt=PROMPT, num_beams=3, min_new_tokens=2,
            max_new_tokens=MAX_TOKENS,
        )  # fmt: skip
        for path, text, radius in zip(good, captions, model.radius(ready).tolist(), strict=True):
            print(f"{path}: {PROMPT} {text}   (radius {radius:.3f})")  # noqa: T201
    return 1 if len(good) < len(config.pictures) else 0


@torch.inference_mode()
def search(config: Search) -> int:
    """Print the pictures of a folder that fit a text best, by the contrastive similarity."""
    text, images = config.text, config.data
    if not text.strip():
        raise DataError("the text to search for is empty")
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in PICTURES) if images.is_dir() else []
    if not paths:
        raise DataError(f"{images} holds no pictures ({', '.join(PICTURES)})")
    model = _load(HyperBlip2ForPretraining, find_stage(config.run, "stage1"))
    good, pixels = _read(paths)
    if not good:
        raise DataError(f"no picture in {images} can be read")
    wanted = model.encode_text(*caption_ids([text], MAX_TOKENS))
    scores = torch.cat(
        [model.similarity(model.encode_image(lite0_preprocess(part)), wanted)[:, 0] for part in pixels.split(64)]
    )
    for index in scores.argsort(descending=True)[: config.top].tolist():
        print(f"{scores[index]:.4f}  {good[index]}")  # noqa: T201
    return 1 if len(good) < len(paths) else 0
