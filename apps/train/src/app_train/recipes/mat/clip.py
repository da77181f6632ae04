"""Recipe `mat-clip`: Modality Alignment across Trees on CLIP weights, as published or with one part exchanged.

    hier train mat-clip --published cifar100-16-maple --images DIR --tree trees/cifar100.json --weights FILE

DIR holds train/<leaf>/ and test/<leaf>/. Without --weights open_clip downloads its own. One card trains CIFAR-100, 16
shots, in hours: not measured here, where such weights cannot be had; the path runs in tests on small random models.
--released repeats the defects of the released code, for reproduction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from app_data.read.folder import load_folder
from app_data.read.pictures import PictureSet
from app_data.sets.cifar100 import StoredTree, read_stored_tree, take_shots
from app_data.store.atomic import new_folder
from app_data.store.progress import progress
from app_eval.measure.tree_scores import tree_scores
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import StageConfig
from app_train.core.errors import RunError
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.core.schedule import Stage, Step
from app_train.recipes.mat.fit import step_seed
from app_train.recipes.mat.published import PUBLISHED, PublishedConfig
from app_train.recipes.mat.rows import VARIANTS
from app_train.recipes.mat.settings import MATClipConfig
from mat_align import (
    GaussianPromptAverage,
    MaPLePrompts,
    MATModel,
    MATObjective,
    PromptSRCPrompts,
    PromptSRCRegularizer,
    released,
)


def run(config: MATClipConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.images is None or config.tree is None:
        raise RunError("--images and --tree are missing: name the folder of pictures and the JSON file of the tree")
    settings = PUBLISHED[config.published]()
    changes = {"epochs": config.epochs, "model": config.model}
    settings = settings.model_copy(update={k: v for k, v in changes.items() if v is not None})
    with Run("mat-clip", config, processes=False) as run:
        stored = read_stored_tree(config.tree)
        clip = load_clip(settings, config.weights)
        # Before any picture is decoded: a tower may have too few blocks for the prompts.
        model = build_model(settings, clip, config.variant, config.released)
        size = clip.visual.image_size[0]
        parts = load_folder(config.images, stored.taxonomy, size=size, cache_dir=config.cache_dir)
        if "train" not in parts or "test" not in parts:
            raise RunError(f"{config.images} must hold train/<leaf>/ and test/<leaf>/, it has {', '.join(parts)}")
        kept, _ = take_shots(parts["train"], settings.shots, settings.seed)
        train = parts["train"].select(kept)
        run.claim(f"{train.fingerprint}-{parts['test'].fingerprint}")
        if (known := run.result()) is not None:
            return _show(known)
        model = model.to(run.device)
        train_prompts(model, settings, train, stored, run, config.out, config.released)
        with new_folder(config.out / "model") as target:
            model.save_pretrained(target)
        scores = evaluate(model, parts["test"], stored)
        content = run.finish(
            {
                "published": config.published,
                "variant": model.variant.name,
                "n": len(parts["test"]),
                "scores": {name: float(values.mean()) for name, values in scores.items()},
                "curvatures": [c().item() for c in (model.c_img, model.c_txt) if c is not None],
            }
        )
        remove_checkpoints(config.out)
        run.seal()
        return _show(content)


def _show(content: dict) -> dict:
    print("  ".join(f"{name.upper()} {100 * value:.2f}" for name, value in content["scores"].items()))  # noqa: T201
    return content


def load_clip(settings: PublishedConfig, weights: Path | None) -> nn.Module:
    """The model with its weights, in fp32.

    Raises:
        RunError: open_clip does not know the model, or the weights cannot be read or fetched.
    """
    import open_clip

    name, source = settings.model, settings.pretrained
    if weights is not None:
        source = str(weights)
        if name.startswith("hf-hub:"):
            name = "ViT-B-16"  # BioCLIP's configuration
    elif name.startswith("local-dir:"):
        source = None  # the folder holds its own weights
    try:
        return open_clip.create_model(name, pretrained=source, precision="fp32").eval()
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"the model {name} with weights {source} cannot be loaded ({reason}); give a file with --weights"
        ) from error


def build_model(settings: PublishedConfig, clip: nn.Module, variant: str, as_released: bool = False) -> MATModel:
    """The model of a configuration around given weights; the seed fixes its initialisation."""
    chosen = released(VARIANTS[variant]) if as_released else VARIANTS[variant]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.method == "maple":
            prompts = MaPLePrompts(clip, settings.num_ctx, settings.depth, settings.ctx_init)
        else:
            prompts = PromptSRCPrompts(
                clip,
                settings.num_ctx_text,
                settings.num_ctx_vision,
                settings.depth_text,
                settings.depth_vision,
                settings.ctx_init,
            )
        names = ("scale", "curv_init", "c_img", "c_txt", "min_radius")
        return MATModel(clip, prompts, chosen, **{name: getattr(settings, name) for name in names})


def learning_rate(settings: PublishedConfig, epoch: int, step: int, as_released: bool = False) -> float:
    """Constant warm-up, then a cosine over the epochs that begins at its peak, as the released scheduler does.

    The released code advances the same schedule with every step: the rate swings with a period of 2 epochs steps.

    Args:
        settings: the configuration.
        epoch: 0-based epoch.
        step: 0-based step of the whole run.
        as_released: count steps in place of epochs.
    """
    at = step if as_released else epoch
    if at < settings.warmup_epochs:
        return settings.warmup_lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (at - settings.warmup_epochs) / settings.epochs))


def epoch_order(settings: PublishedConfig, num: int, epoch: int, as_released: bool = False) -> np.ndarray:
    """Order of the pictures; the released code repeats the first one in every epoch."""
    return np.random.default_rng([settings.seed, 0 if as_released else epoch]).permutation(num)


class Average:
    """PromptSRC's average of the prompts over the epochs, kept with the checkpoints."""

    def __init__(self, settings: PublishedConfig, model: MATModel, per_epoch: int) -> None:
        self.model, self.per_epoch = model, per_epoch
        self.average = GaussianPromptAverage(settings.epochs, settings.average_mean, settings.average_std)

    def update(self, step: Step) -> None:
        """Take the prompts of this epoch up."""
        self.average.update(self.model.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The average so far."""
        return self.average.average

    def restore(self, tensors: Mapping[str, Tensor], index: int) -> None:
        """Take it back."""
        device = self.model.logit_scale.device
        self.average.average = {name: value.to(device) for name, value in tensors.items()}
        self.average.num_updates = index // self.per_epoch


def train_prompts(
    model: MATModel,
    settings: PublishedConfig,
    train: PictureSet,
    stored: StoredTree,
    run: Run,
    folder: Path,
    as_released: bool = False,
) -> None:
    """Train in place; go on from the newest checkpoint below `folder` if there is one."""
    source = settings.method == "promptsrc"
    regularizer = PromptSRCRegularizer(settings.text_weight, settings.image_weight, settings.logit_weight)
    objective = MATObjective(
        stored.taxonomy,
        settings.treecut_weight,
        settings.node_weight,
        settings.entail_weight,
        settings.treecut_dropout,
        stored.node_text,
        regularizer if source else None,
    )
    device = model.logit_scale.device
    targets, draw = torch.from_numpy(train.targets).to(device), step_seed(settings.seed)

    def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
        images = preprocess(model.clip, train.batch(rows)).to(device)
        generator = torch.Generator().manual_seed(draw(step))
        losses = objective(wrapped, images, targets[torch.from_numpy(rows).to(device)], generator)
        return losses.total, {name: value for name, value in losses._asdict().items() if bool(value.isfinite())}

    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    stage = Stage(
        "prompts", StageConfig(epochs=settings.epochs, lr=settings.lr, batch_size=settings.batch_size), len(train), forward,
        optimizer=lambda parameters: kinds[settings.optimizer](parameters.values(), lr=1.0, weight_decay=0.0),
        order=lambda epoch: epoch_order(settings, len(train), epoch, as_released),
        # The rate itself, over a peak of 1: the warm-up of the released code is no share of the peak.
        rate=lambda step: learning_rate(settings, step.epoch, step.index, as_released),
        draw=draw, after_step=model.head.clamp_, clip_grad=None,
    )  # fmt: skip
    average = Average(settings, model, stage.per_epoch) if source else None
    stage = replace(
        stage, save_every=stage.per_epoch, keeper=average, after_epoch=None if average is None else average.update
    )
    fit(model, [stage], folder, seed=settings.seed, label="training", stop=run.stop, tensorboard=run.config.tensorboard)
    if average is not None:
        average.average.copy_to(model)


def preprocess(clip: nn.Module, pictures: Tensor) -> Tensor:
    """CLIP's normalisation of uint8 pictures of the model's size."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean = getattr(clip.visual, "image_mean", None) or OPENAI_DATASET_MEAN
    std = getattr(clip.visual, "image_std", None) or OPENAI_DATASET_STD
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pictures.float() / 255 - mean) / std


@torch.no_grad()
def evaluate(model: MATModel, test: PictureSet, stored: StoredTree, batch_size: int = 64) -> dict[str, np.ndarray]:
    """LA, HCA and MTA of each test picture."""
    model.eval()
    tokens, text = encode(model, test, batch_size), encode_labels(model, stored.node_text)
    return tree_scores(score(model, tokens, text, batch_size), test.targets, stored.taxonomy, stored.cuts)


@torch.no_grad()
def encode(model: MATModel, pictures: PictureSet, batch_size: int = 64) -> Tensor:
    """Layer tokens of all pictures, on the CPU."""
    device, found = model.logit_scale.device, []
    for start in progress(range(0, len(pictures), batch_size), "encoding"):
        rows = range(start, min(start + batch_size, len(pictures)))
        found.append(model.encode_image(preprocess(model.clip, pictures.batch(rows)).to(device)).cpu())
    return torch.cat(found)


@torch.no_grad()
def encode_labels(model: MATModel, names: Sequence[str], batch_size: int = 64) -> Tensor:
    """Text features of labels, on the model's device."""
    return torch.cat([model.encode_text(names[i : i + batch_size]) for i in range(0, len(names), batch_size)])


@torch.no_grad()
def score(model: MATModel, tokens: Tensor, text: Tensor, batch_size: int = 64) -> Tensor:
    """Logits of encoded pictures, batch by batch, on the CPU."""
    return torch.cat([model.score(part.to(text.device), text).cpu() for part in tokens.split(batch_size)])
