"""`hier caption RUN PICTURE...` and `hier search RUN TEXT --data DIR`: a trained BLIP-2 at work.

Pictures and texts are prepared by the processor that the run saved beside its model.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Blip2Processor

from app_data.read.pictures import load_picture
from app_data.store.errors import DataError
from app_data.weights.blip2.files import find_stage, load_stage
from app_eval.ask.settings import Caption, Search
from hyper_blip import generate_captions

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def _read(paths: Sequence[Path], processor: Blip2Processor) -> tuple[list[Path], torch.Tensor]:
    """Pictures that can be read, ready for the model (n, 3, size, size); the others are named on standard error."""
    prepare = processor.image_processor
    size = prepare.size["height"]
    good, ready = [], []
    for path in paths:
        try:
            picture = load_picture(path, size)
        except DataError as error:
            print(f"error: {path}: {error}", file=sys.stderr)  # noqa: T201
            continue
        good.append(path)
        ready.append(prepare(picture.copy(), return_tensors="pt")["pixel_values"])
    return good, torch.cat(ready) if ready else torch.zeros(0, 3, size, size)


def caption(config: Caption) -> int:
    """Print a caption and the radius of each picture; unreadable ones make the exit status 1."""
    model, processor, _ = load_stage(find_stage(config.run, "stage2"), "stage2")
    good, ready = _read(config.pictures, processor)
    if good:
        captions = generate_captions(
            model, ready, processor.tokenizer, num_beams=3, min_new_tokens=2, max_new_tokens=model.config.max_tokens
        )
        prompt = model.config.prompt.strip()
        radii = model.radius(ready).tolist() if model.config.has_radius else [None] * len(good)
        for path, text, radius in zip(good, captions, radii, strict=True):
            end = "" if radius is None else f"   (radius {radius:.3f})"
            print(f"{path}: {f'{prompt} {text}'.strip()}{end}")  # noqa: T201
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
    model, processor, _ = load_stage(find_stage(config.run, "stage1"), "stage1")
    good, ready = _read(paths, processor)
    if not good:
        raise DataError(f"no picture in {images} can be read")
    made = processor.tokenizer([text], truncation=True, max_length=model.config.max_tokens, return_tensors="pt")
    wanted = model.encode_text(made["input_ids"], made["attention_mask"])
    scores = torch.cat([model.similarity(model.encode_image(part), wanted)[:, 0] for part in ready.split(64)])
    for index in scores.argsort(descending=True)[: config.top].tolist():
        print(f"{scores[index]:.4f}  {good[index]}")  # noqa: T201
    return 1 if len(good) < len(paths) else 0
