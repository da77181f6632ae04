"""`hier caption RUN PICTURE...` and `hier search RUN TEXT --data DIR`: a trained BLIP-2 at work.

Pictures and texts are prepared by the processor that the run saved beside its model.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Blip2Processor

from app_data.read.pictures import load_picture
from app_data.store.errors import DataError, MissingAssetError
from app_eval.ask.settings import Caption, Search
from hyper_blip import HyperBlip2ForConditionalGeneration, HyperBlip2ForPretraining, generate_captions

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


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


def _load(kind: type, folder: Path) -> tuple[torch.nn.Module, Blip2Processor]:
    """The model and its processor."""
    import app_data.weights.blip2  # noqa: F401  (the locators of small runs)

    try:
        return kind.from_pretrained(folder), Blip2Processor.from_pretrained(folder)
    except (DataError, MissingAssetError):
        raise
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


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
    model, processor = _load(HyperBlip2ForConditionalGeneration, find_stage(config.run, "stage2"))
    good, ready = _read(config.pictures, processor)
    if good:
        captions = generate_captions(
            model, ready, processor.tokenizer, num_beams=3, min_new_tokens=2, max_new_tokens=model.config.max_tokens
        )
        prompt = model.config.prompt.strip()
        for path, text, radius in zip(good, captions, model.radius(ready).tolist(), strict=True):
            print(f"{path}: {f'{prompt} {text}'.strip()}   (radius {radius:.3f})")  # noqa: T201
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
    model, processor = _load(HyperBlip2ForPretraining, find_stage(config.run, "stage1"))
    good, ready = _read(paths, processor)
    if not good:
        raise DataError(f"no picture in {images} can be read")
    made = processor.tokenizer([text], truncation=True, max_length=model.config.max_tokens, return_tensors="pt")
    wanted = model.encode_text(made["input_ids"], made["attention_mask"])
    scores = torch.cat([model.similarity(model.encode_image(part), wanted)[:, 0] for part in ready.split(64)])
    for index in scores.argsort(descending=True)[: config.top].tolist():
        print(f"{scores[index]:.4f}  {good[index]}")  # noqa: T201
    return 1 if len(good) < len(paths) else 0
