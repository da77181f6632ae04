"""A user's own pool of demonstrations: a folder of pictures, or JSON lines with image, question and answer."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from app_data.read.pictures import SUFFIXES, load_picture, open_picture
from app_data.store.atomic import new_file
from app_data.store.cache import default_cache_dir, fingerprint
from app_data.store.errors import DataError, Skipped, UnreadablePicture
from app_data.store.features import cached_features, tensor_digest, weights_digest
from app_data.store.text import read_jsonl
from app_data.weights.lite0_minilm import lite0, lite0_preprocess
from hier_lora import load_dual_encoder
from hyper_icl import AnchorBank, HyperbolicLift

SIZE = 128
_WIDTH = 1280  # EfficientNet-Lite0's pooled features
_BATCH = 64
_MAX_BAD = 0.01


# From features (n, d) and classes (n,), with options c, steps and seed, to a trained lift; see `app_train.recipes.icl.lift`.
TrainLift = Callable[..., HyperbolicLift]


@dataclass(frozen=True)
class PoolItem:
    """One demonstration.

    Attributes:
        path: Its picture.
        question: What is asked about it; "" in a folder of pictures.
        answer: The answer; in nested folders the name of the picture's folder.
    """

    path: Path
    question: str = ""
    answer: str = ""


@dataclass(frozen=True)
class DemoPool:
    """Readable items, with one row of features each.

    Attributes:
        items: The items.
        features: Pooled features of the pictures, not centred, (n, d).
        groups: Number of each item's picture, int64 (n,).
        skipped: Items left out, with reasons.
    """

    items: tuple[PoolItem, ...]
    features: Tensor
    groups: Tensor
    skipped: tuple[Skipped, ...]

    def group_of(self, path: Path) -> int:
        """Number of this picture in the pool; -1 if it is not in it."""
        wanted = path.resolve()
        return next(
            (int(g) for item, g in zip(self.items, self.groups, strict=True) if item.path.resolve() == wanted), -1
        )


@dataclass(frozen=True)
class PictureEncoder:
    """From picture files to features.

    Attributes:
        key: What the features depend on beside the files.
        width: Of the features.
        read: Opens a file; raises `UnreadablePicture`.
        encode: From a list of what `read` gave to features (n, width).
    """

    key: str
    width: int
    read: Callable[[Path], Any]
    encode: Callable[[list], Tensor]


def picture_encoder(source: str | nn.Module | None = None) -> PictureEncoder:
    """What turns pictures into features.

    Args:
        source: A locator of `hier_lora.load_dual_encoder` (`hf:` and `open_clip:` CLIP, SigLIP and others, `pip:`), whose picture
            tower is used; or EfficientNet-Lite0 itself, which is loaded from its package if None.

    Raises:
        DataError: The locator is unknown, or its weights cannot be loaded.
    """
    if isinstance(source, str):
        return _tower(source)
    model = lite0(0) if source is None else source

    def encode(batch: list) -> Tensor:
        pixels = lite0_preprocess(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2))
        return model(pixels.contiguous(memory_format=torch.channels_last))

    return PictureEncoder(f"{SIZE} {weights_digest(model)}", _WIDTH, lambda path: load_picture(path, SIZE), encode)


def _tower(locator: str) -> PictureEncoder:
    try:
        model: Any = load_dual_encoder(locator).eval()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"--encoder {locator} cannot be loaded: {reason}") from error

    def encode(batch: list) -> Tensor:
        return model.encode_image(torch.stack(batch)).float()

    def read(path: Path) -> Tensor:
        return model.preprocess(open_picture(path))

    def probe() -> int:
        # Pictures of towers without a size of their own keep theirs, so that they cannot be stacked.
        shapes = {tuple(model.preprocess(Image.new("RGB", size)).shape) for size in ((64, 64), (96, 64))}
        if len(shapes) > 1:
            raise DataError(f"--encoder {locator} gives pictures no size: leave --encoder out, or name another")
        return encode([model.preprocess(Image.new("RGB", (64, 64)))]).shape[1]

    with torch.no_grad():
        return PictureEncoder(f"{locator} {weights_digest(model)}", probe(), read, encode)


def encode_pool(items: Sequence[PoolItem], encoder: PictureEncoder, cache_dir: Path | None = None) -> DemoPool:
    """Encode the items whose pictures can be read; features are kept on disk until a file or the encoder changes.

    Args:
        items: What `read_items` found.
        encoder: See `picture_encoder`.
        cache_dir: Where features are kept; the user's cache folder if None.

    Raises:
        DataError: More than 1 % of the pictures (at least 10, or all of them) cannot be read.
    """
    paths = list(dict.fromkeys(item.path for item in items))

    def compute(first: int, end: int) -> Tensor:
        # A picture that cannot be read has a row too, of NaN, so that rows stay those of the paths.
        known, bad = encode_pictures(paths[first:end], encoder)
        lost = {s.path for s in bad}
        rows = torch.full((end - first, encoder.width), torch.nan)
        rows[[str(path) not in lost for path in paths[first:end]]] = known
        return rows

    key = f"ask-1 {encoder.key} {fingerprint({'files': [_stamp(path) for path in paths]})}"
    features = cached_features(key, compute, len(paths), cache_dir)
    good = ~features.isnan().any(-1)
    features, lost = features[good], [path for path, fine in zip(paths, good.tolist(), strict=True) if not fine]
    bad = encode_pictures(lost, encoder)[1]
    budget = max(10, int(_MAX_BAD * len(paths)))
    if len(bad) == len(paths) or len(bad) > budget:
        named = "; ".join(f"{s.path}: {s.reason}" for s in bad[:3])
        raise DataError(f"{len(bad)} of {len(paths)} pictures of the pool cannot be read: {named}")
    row_of = {path: row for row, path in enumerate(path for path in paths if path not in set(lost))}
    kept = tuple(item for item in items if item.path in row_of)
    rows = torch.tensor([row_of[item.path] for item in kept])
    return DemoPool(kept, features[rows], rows, bad)


def _stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    try:
        found = path.stat()
    except OSError:
        return str(path.resolve()), -1, -1
    return str(path.resolve()), found.st_size, found.st_mtime_ns


def read_items(source: str | Path) -> list[PoolItem]:
    """List a pool.

    Args:
        source: A folder, searched with its subfolders, whose names then serve as answers; or a file of JSON lines with
            "image" (relative to the file) and optionally "question" and "answer".

    Raises:
        DataError: Nothing is there, or a line has no image.
    """
    source = Path(source)
    if source.is_dir():
        files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"the folder {source} holds no picture ({', '.join(SUFFIXES)})")
        return [PoolItem(p, answer="" if p.parent == source else p.parent.name) for p in files]
    rows = read_jsonl(source)
    items = []
    for number, row in enumerate(rows, 1):
        image = row.get("image")
        if not isinstance(image, str) or not image:
            raise DataError(f"item {number} of {source} must have the field image, a file name, got {image!r}")
        texts = [row.get(field) or "" for field in ("question", "answer")]
        items.append(PoolItem(source.parent / image, *(str(text) for text in texts)))
    return items


@torch.no_grad()
def encode_pictures(paths: Sequence[Path], encoder: PictureEncoder) -> tuple[Tensor, tuple[Skipped, ...]]:
    """Features of the pictures that can be read, in their order, and the others with reasons."""
    found, bad, batch = [], [], []

    def flush() -> None:
        if batch:
            found.append(encoder.encode(batch))
            batch.clear()

    for path in paths:
        try:
            batch.append(encoder.read(path))
        except UnreadablePicture as error:
            bad.append(Skipped(str(path), str(error)))
        if len(batch) == _BATCH:
            flush()
    flush()
    return torch.cat(found) if found else torch.empty(0, encoder.width), tuple(bad)


def fit_bank(
    pool: DemoPool, train_lift: TrainLift, seed: int = 0, c: float = 1.0
) -> tuple[AnchorBank, HyperbolicLift | None, Tensor, float]:
    """Lift a pool into hyperbolic space.

    Where at least two items share an answer, the lift is trained on that (same answer = positive). Otherwise nothing can
    teach it a norm, and the depth is the distance of the features from their mean, scaled to at most 3.

    Args:
        pool: The pool.
        train_lift: Trains a lift on features and classes.
        seed: Of the lift.
        c: Curvature.

    Returns:
        The bank; the lift, None if untrained; the features' mean; and the scale of the untrained lift.
    """
    mean = pool.features.mean(0)
    centred = pool.features - mean
    counts = Counter(item.answer for item in pool.items if item.answer)
    if len(counts) > 1 and max(counts.values()) > 1:
        lift = train_lift(F.normalize(centred, dim=-1), codes([item.answer for item in pool.items]), c=c, seed=seed)
        with torch.no_grad():
            tangent = lift(F.normalize(centred, dim=-1))
        return AnchorBank(tangent.clone(), lift.c, pool.groups), lift, mean, 1.0
    scale = 3.0 / max(float(centred.norm(dim=-1).max()), 1e-12)
    return AnchorBank(scale * centred, c, pool.groups), None, mean, scale


def kept_lift(train: TrainLift, cache_dir: Path | None = None) -> TrainLift:
    """The same, but a lift that was trained before on the same features, classes and options is read from disk.

    Args:
        train: Trains a lift.
        cache_dir: Where lifts are kept; the user's cache folder if None.
    """
    root = cache_dir if cache_dir is not None else default_cache_dir()

    def kept(features: Tensor, classes: Tensor, **options: Any) -> HyperbolicLift:
        parts = {"features": tensor_digest(features), "classes": classes.tolist(), "options": options}
        path = Path(root) / f"lift-{fingerprint(parts)}.safetensors"
        found = _read_lift(path)
        if found is None:
            found = train(features, classes, **options)
            sizes = {"in_dim": found.in_dim, "out_dim": found.out_dim, "c": found.c, "max_radius": found.max_radius}
            digest = weights_digest(found)
            with new_file(path) as temporary:
                save_file(found.state_dict(), temporary, {"sizes": json.dumps(sizes), "digest": digest})
        return found

    return kept


def _read_lift(path: Path) -> HyperbolicLift | None:
    """A lift that was kept; None if there is none, or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            lift = HyperbolicLift(**json.loads(notes["sizes"]))
            lift.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return lift.eval() if weights_digest(lift) == notes["digest"] else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None


def codes(answers: Sequence[str]) -> Tensor:
    """A number for each answer; items without one get a number of their own."""
    known = {answer: i for i, answer in enumerate(sorted(set(answers) - {""}))}
    return torch.tensor([known.get(answer, len(known) + i) for i, answer in enumerate(answers)])
