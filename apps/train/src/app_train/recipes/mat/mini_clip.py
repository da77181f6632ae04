"""Recipe `mini-clip`: a small open_clip model for the places where no CLIP weights can be had, trained on emoji.

    hier train mini-clip                     about 4 minutes on one core
    hier train mat-mini                      the variants' prompts on it, scored on an artist it has never seen

A ViT of 6 blocks (96 px, patches of 16, width 128) and a text transformer of 3 blocks, 4.5 M numbers, from random weights.
It sees pictures and captions of the training artists alone. Loss: open_clip's contrastive loss, plus distillation: the
picture feature, through a linear map that is thrown away, follows EfficientNet-Lite0's; the text feature follows MiniLM's.
The result is a folder that `open_clip.create_model("local-dir:FOLDER")` loads. It is a stand-in: it knows 853 things.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from app_data.read.pictures import PictureSet
from app_data.sets.emoji import load_emoji
from app_data.sets.emoji_leaves import CONCRETE_GROUPS, emoji_leaves
from app_data.store.atomic import new_file, write_json, write_text
from app_data.weights.dual_encoder import Lite0MiniLM
from app_data.weights.towers import LITE0_WIDTHS
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.fit import fit
from app_train.core.records import read_records
from app_train.core.run_folder import Run
from app_train.core.schedule import Stage, Step
from app_train.recipes.lora.task import style_offsets
from app_train.recipes.mat.data import TRAIN_ARTISTS, lite0_features
from app_train.recipes.mat.settings import MiniClipConfig
from app_train.recipes.mat.tune import preprocess
from hier_losses import Taxonomy
from mat_align.prompts import label_text

MODEL: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 96, "layers": 6, "width": 128, "head_width": 32, "patch_size": 16},
    # 24 positions hold the longest name in the longest of PromptSRC's templates.
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
_MOST_SCALE = math.log(100)


def run(config: MiniClipConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    with Run("mini-clip", config, processes=False) as run:
        pictures = load_emoji(TRAIN_ARTISTS, size=128, cache_dir=config.cache_dir)
        if config.limit is not None:
            pictures = pictures.select(np.isin(pictures.targets, np.unique(pictures.targets)[: config.limit]))
        run.claim(pictures.fingerprint)
        if (known := run.result()) is not None:
            return known
        texts, own = captions(pictures)
        base = Lite0MiniLM()
        teacher = lite0_features(base, pictures, config.cache_dir, run.check)[:, -LITE0_WIDTHS[-1] :]
        teacher = F.normalize(teacher - teacher.mean(0) - style_offsets(teacher, pictures.styles), dim=-1)
        with torch.no_grad():
            words = base.encode_text(texts)
        model = student(config.seed)
        stage = distil_stage(model, pictures, teacher, texts, own, F.normalize(words - words.mean(0), dim=-1), config)
        fit(
            model, [stage], config.out, seed=config.seed, label="mini-clip", stop=run.stop,
            tensorboard=config.tensorboard,
        )  # fmt: skip
        last = read_records(config.out / "metrics.jsonl")[-1]
        write_model(model.clip, config.out / "model")
        content = run.finish(
            {
                "num_pictures": len(pictures),
                "num_texts": len(texts),
                "num_trained": sum(p.numel() for p in model.clip.parameters()),
                "steps": last["step"],
                "losses": {name: last[name] for name in ("contrastive", "image", "text")},
            }
        )
        remove_checkpoints(config.out)
        run.seal()
    print(f"{content['steps']} steps, losses {content['losses']}\nmodel: {config.out / 'model'}")  # noqa: T201
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


def distil_stage(
    model: Student,
    pictures: PictureSet,
    teacher: Tensor,
    texts: list[str],
    own: dict[int, list[int]],
    words: Tensor,
    config: MiniClipConfig,
) -> Stage:
    """The stage that trains the student.

    Args:
        model: the student.
        pictures: the training pictures.
        teacher: unit picture features to follow, one for each picture.
        texts: all texts.
        own: positions of the texts of each leaf.
        words: unit text features to follow, one for each text.
        config: the settings.
    """
    from open_clip.loss import ClipLoss
    from open_clip.tokenizer import SimpleTokenizer

    contrastive = ClipLoss()
    ids = SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(texts)

    def forward(wrapped: Student, step: Step, rows: np.ndarray):
        draw = np.random.default_rng([config.seed, 1, step.index])
        said = [draw.choice(own[leaf]) for leaf in pictures.targets[rows].tolist()]
        also = draw.integers(0, len(texts), len(rows) // 2)
        read = torch.from_numpy(np.concatenate([said, also]).astype(np.int64))
        clip = wrapped.clip
        image = clip.encode_image(preprocess(clip, augmented(pictures.batch(rows), clip.visual.image_size[0], draw)))
        text = F.normalize(clip.encode_text(ids[read]), dim=-1)
        parts = {
            "contrastive": contrastive(F.normalize(image, dim=-1), text[: len(rows)], clip.logit_scale.exp()),
            "image": 1 - F.cosine_similarity(wrapped.follow(image), teacher[torch.from_numpy(rows)]).mean(),
            "text": 1 - (text * words[read]).sum(-1).mean(),
        }
        return parts["contrastive"] + config.image_weight * parts["image"] + config.text_weight * parts["text"], parts

    @torch.no_grad()
    def clamp() -> None:
        model.clip.logit_scale.clamp_(0, _MOST_SCALE)

    return Stage(
        "distil", config, len(np.unique(pictures.targets)), forward,
        order=lambda epoch: epoch_pictures(pictures.targets, config.seed, epoch),
        after_step=clamp, clip_grad=config.clip_grad, save_every=config.save_every,
    )  # fmt: skip


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

    preprocessing = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    write_json(folder / HF_CONFIG_NAME, {"model_cfg": MODEL, "preprocess_cfg": preprocessing})
    write_text(folder / "README.md", _CARD.format(groups=", ".join(CONCRETE_GROUPS)))
    with new_file(folder / HF_SAFE_WEIGHTS_NAME) as unfinished:
        save_file({name: value.detach().contiguous() for name, value in clip.state_dict().items()}, unfinished)


_CARD = """---
library_name: open_clip
license: apache-2.0
---
# mini-clip

A small CLIP (ViT, 96 px) for tests and small studies where no CLIP weights can be had. Made by `hier train mini-clip`
from random weights on emoji ({groups}) drawn by OpenMoji (CC BY-SA 4.0) and Noto Emoji (OFL 1.1), distilled from
EfficientNet-Lite0 and MiniLM (both Apache-2.0). It knows 853 emoji and nothing else; do not use it for anything but studies.
"""
