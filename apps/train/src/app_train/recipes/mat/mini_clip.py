"""Recipe `mini-clip`: a small open_clip model for the places where no CLIP weights can be had, trained on emoji.

    python apps/train mini-clip                     about 4 minutes on one core
    python apps/train mat-mini                      the variants' prompts on it, scored on an artist it has never seen

A ViT of 6 blocks (96 px, patches of 16, width 128) and a text transformer of 3 blocks, 4.5 M numbers, from random weights.
It sees pictures and captions of the training artists alone. Loss: open_clip's contrastive loss, plus distillation: the
picture feature, through a linear map that is thrown away, follows EfficientNet-Lite0's; the text feature follows MiniLM's.
The result is a folder that `open_clip.create_model("local-dir:FOLDER")` loads. It is a stand-in: it knows 853 things.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from app_data.read.pictures import PictureSet
from app_data.sets.emoji import CONCRETE_GROUPS, emoji_leaves, load_emoji
from app_data.store.atomic import write_json
from app_data.weights.dual_encoder import Lite0MiniLM
from app_data.weights.towers import LITE0_WIDTHS
from app_train.core.checkpoint import Checkpoint, load_checkpoint, remove_checkpoints, save_checkpoint
from app_train.core.config import Frozen, claim_folder
from app_train.core.errors import Interrupted, NonFiniteGradient
from app_train.core.interrupt import StopFlag
from app_train.core.records import Records, read_records
from app_train.recipes.lora.task import style_offsets
from app_train.recipes.mat.clip import preprocess
from app_train.recipes.mat.data import TRAIN_ARTISTS, lite0_features
from app_train.recipes.mat.fit import rate_share
from hier_losses import Taxonomy
from mat_align.prompts import label_text

MODEL: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 96, "layers": 6, "width": 128, "head_width": 32, "patch_size": 16},
    # 24 positions hold the longest name in the longest of PromptSRC's templates.
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
_MOST_SCALE = math.log(100)


class MiniClipConfig(Frozen):
    """Train a small CLIP on emoji of the training artists."""

    out: Path = Path("runs/mini-clip")
    """Run folder; the same command goes on from what it holds. The model is in its folder `model`."""
    epochs: int = Field(30, ge=1)
    """Passes over the leaves; each shows one artist's picture of every leaf."""
    batch_size: int = Field(128, ge=2)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    clip_grad: float = Field(1.0, gt=0)
    image_weight: float = Field(1.0, ge=0)
    """Weight of following EfficientNet-Lite0."""
    text_weight: float = Field(1.0, ge=0)
    """Weight of following MiniLM."""
    seed: int = Field(0, ge=0)
    limit: int | None = Field(None, ge=2)
    """Use so many leaves only (for trials)."""
    cache_dir: Path | None = None
    """Where pictures and features are kept; the user's cache folder if not given."""


def run(config: MiniClipConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    pictures = load_emoji(TRAIN_ARTISTS, size=128, cache_dir=config.cache_dir)
    if config.limit is not None:
        pictures = pictures.select(np.isin(pictures.targets, np.unique(pictures.targets)[: config.limit]))
    claim_folder(config.out, config, pictures.fingerprint)
    texts, own = captions(pictures)
    with StopFlag() as stop:

        def check() -> None:
            if stop.exit_status is not None:
                raise Interrupted(stop.exit_status)

        base = Lite0MiniLM()
        teacher = lite0_features(base, pictures, config.cache_dir, check)[:, -LITE0_WIDTHS[-1] :]
        teacher = F.normalize(teacher - teacher.mean(0) - style_offsets(teacher, pictures.styles), dim=-1)
        with torch.no_grad():
            words = base.encode_text(texts)
        model = student(config.seed)
        last = fit(model, pictures, teacher, texts, own, F.normalize(words - words.mean(0), dim=-1), config, stop)
    write_model(model.clip, config.out / "model")
    content = {
        "format": 1,
        "recipe": "mini-clip",
        "num_pictures": len(pictures),
        "num_texts": len(texts),
        "num_trained": sum(p.numel() for p in model.clip.parameters()),
        "steps": last["step"],
        "losses": {name: last[name] for name in ("contrastive", "image", "text")},
    }
    write_json(config.out / "result.json", content)
    remove_checkpoints(config.out)
    print(json.dumps(content, indent=1))  # noqa: T201
    print(f"model: {config.out / 'model'}")  # noqa: T201
    return content


def captions(pictures: PictureSet) -> tuple[list[str], dict[int, list[int]]]:
    """All texts, and for each leaf the positions of those that name it and nothing else.

    The prompts of all nodes and the other names of the emoji; subgroups and groups are named by no picture.
    """
    tax: Taxonomy = pictures.taxonomy
    seen = set(pictures.targets.tolist())
    names: dict[int, list[str]] = {node: [tax.names[node]] for node in range(tax.num_nodes)}
    for leaf in emoji_leaves():
        names[tax.index(leaf.path)] += [word for word in leaf.short_names if word != leaf.name]
    place: dict[str, int] = {}
    own = {}
    for node, found in names.items():
        if tax.leaf_index[node] >= 0 and node not in seen:
            continue
        sentences = [f"a photo of a {label_text(name)}." for name in found]
        own[node] = [place.setdefault(sentence, len(place)) for sentence in sentences]
    return list(place), {node: own[node] for node in sorted(seen)}


class Student(nn.Module):
    """The model, and the map onto the teacher of its pictures that is thrown away.

    Args:
        clip: the open_clip model.
        width: features of the teacher.
    """

    def __init__(self, clip: nn.Module, width: int = LITE0_WIDTHS[-1]) -> None:
        super().__init__()
        self.clip = clip
        self.follow = nn.Linear(MODEL["embed_dim"], width)


def student(seed: int) -> Student:
    """A student with random weights."""
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student(CLIP(**MODEL))


def fit(
    model: Student,
    pictures: PictureSet,
    teacher: Tensor,
    texts: list[str],
    own: dict[int, list[int]],
    words: Tensor,
    config: MiniClipConfig,
    stop: StopFlag,
) -> dict:
    """Train in place; go on from the newest checkpoint if there is one.

    Args:
        model: the student.
        pictures: the training pictures.
        teacher: unit picture features to follow, one for each picture.
        texts: all texts.
        own: positions of the texts of each leaf.
        words: unit text features to follow, one for each text.
        config: the settings.
        stop: read after every step.

    Returns:
        The numbers of the last step.
    """
    from open_clip.loss import ClipLoss
    from open_clip.tokenizer import SimpleTokenizer

    contrastive = ClipLoss()
    ids = SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(texts)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    found = load_checkpoint(config.out)
    position = 0 if found is None else found.position
    if found is not None:
        with torch.no_grad():
            for name, value in found.weights.items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(found.optimizer)
    leaves = np.unique(pictures.targets)
    per_epoch = math.ceil(len(leaves) / config.batch_size)
    total = per_epoch * config.epochs
    records, values = Records(config.out, position), {}
    model.train()
    try:
        for number in tqdm(range(position, total), desc="mini-clip", disable=None, leave=False):
            epoch, batch = divmod(number, per_epoch)
            chosen = epoch_pictures(pictures.targets, config.seed, epoch)
            rows = chosen[batch * config.batch_size : (batch + 1) * config.batch_size]
            draw = np.random.default_rng([config.seed, 1, number])
            said = [draw.choice(own[leaf]) for leaf in pictures.targets[rows].tolist()]
            also = draw.integers(0, len(texts), len(rows) // 2)
            read = torch.from_numpy(np.concatenate([said, also]).astype(np.int64))
            rate = config.lr * rate_share(number, total, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            images = augmented(pictures.batch(rows), MODEL["vision_cfg"]["image_size"], draw)
            image = model.clip.encode_image(preprocess(model.clip, images))
            text = F.normalize(model.clip.encode_text(ids[read]), dim=-1)
            parts = {
                "contrastive": contrastive(F.normalize(image, dim=-1), text[: len(rows)], model.clip.logit_scale.exp()),
                "image": 1 - F.cosine_similarity(model.follow(image), teacher[torch.from_numpy(rows)]).mean(),
                "text": 1 - (text * words[read]).sum(-1).mean(),
            }
            loss = parts["contrastive"] + config.image_weight * parts["image"] + config.text_weight * parts["text"]
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip_grad)
            if not bool(norm.isfinite()):
                raise NonFiniteGradient(f"mini-clip: the gradient norm of step {number + 1} is {norm.item()}")
            optimizer.step()
            with torch.no_grad():
                model.clip.logit_scale.clamp_(0, _MOST_SCALE)
            values = {name: part.item() for name, part in parts.items()} | {"total": loss.item(), "lr": rate}
            records.add(number + 1, **values)
            status = stop.exit_status  # read once: a signal between two reads would leave without saving
            if status is not None or (batch == per_epoch - 1 and (epoch + 1) % 10 == 0):
                records.flush()
                save_checkpoint(config.out, Checkpoint(parameters, optimizer.state_dict(), number + 1))
            if status is not None:
                raise Interrupted(status)
    finally:
        records.close()
    if not values:  # every step was taken before
        values = read_records(records.path)[-1]
    model.eval()
    return values | {"step": total}


def epoch_pictures(targets: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Positions of one picture of every leaf, in random order: no batch holds a leaf twice, so no negative is false."""
    mixed = np.random.default_rng([seed, 0, epoch]).permutation(len(targets))
    _, first = np.unique(targets[mixed], return_index=True)
    return mixed[np.sort(first)]


def augmented(pixels: Tensor, size: int, draw: np.random.Generator) -> Tensor:
    """Random square crops of at least 60 % of the area, half of them mirrored, in faded colours; uint8 (b, 3, size, size).

    Artists differ in colour more than in shape; the outlines of one have no colour at all.
    """
    num = len(pixels)
    side = np.sqrt(draw.uniform(0.6, 1, num))
    shift = draw.uniform(-1, 1, (num, 2)) * (1 - side)[:, None]
    mirror = draw.choice([-1.0, 1.0], num)
    zero = np.zeros(num)
    matrix = np.stack([side * mirror, zero, shift[:, 0], zero, side, shift[:, 1]], axis=1).reshape(num, 2, 3)
    grid = F.affine_grid(torch.from_numpy(matrix).float(), [num, 3, size, size], align_corners=False)
    x = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    fade, gain = (torch.from_numpy(draw.uniform(*r, (num, 1, 1, 1))).float() for r in ((0, 1), (0.7, 1.3)))
    x = torch.lerp(x, x.mean(1, keepdim=True), fade)
    return (255 - (255 - x) * gain).clamp(0, 255).round().to(torch.uint8)


def write_model(clip: nn.Module, folder: Path) -> None:
    """Write a folder that open_clip loads by `local-dir:`: configuration, weights (safetensors), and a card."""
    from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    write_json(folder / HF_CONFIG_NAME, {"model_cfg": MODEL, "preprocess_cfg": preprocessing})
    (folder / "README.md").write_text(_CARD.format(groups=", ".join(CONCRETE_GROUPS)), encoding="utf-8")
    unfinished = folder / f"{HF_SAFE_WEIGHTS_NAME}.unfinished"
    save_file({name: value.detach().contiguous() for name, value in clip.state_dict().items()}, unfinished)
    os.replace(unfinished, folder / HF_SAFE_WEIGHTS_NAME)


_CARD = """---
library_name: open_clip
license: apache-2.0
---
# mini-clip

A small CLIP (ViT, 96 px) for tests and small studies where no CLIP weights can be had. Made by `python apps/train mini-clip`
from random weights on emoji ({groups}) drawn by OpenMoji (CC BY-SA 4.0) and Noto Emoji (OFL 1.1), distilled from
EfficientNet-Lite0 and MiniLM (both Apache-2.0). It knows 853 emoji and nothing else; do not use it for anything but studies.
"""
