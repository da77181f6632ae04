"""How prompts are tuned on CLIP and scored: the published optimisation, with one part exchanged where a row says so.

References: Modality Alignment across Trees (arXiv 2510.27391) and its released configurations; see `published`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from app_data.read.pictures import PictureSet
from app_data.sets.cifar100 import StoredTree
from app_data.store.progress import progress
from app_train.core.config import StageConfig
from app_train.core.errors import RunError
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.core.schedule import Stage, Step
from app_train.recipes.mat.fit import step_seed
from app_train.recipes.mat.published import PublishedConfig
from app_train.recipes.mat.rows import Row, depths
from app_train.recipes.mat.second_tree import SecondTree
from mat_align import (
    Backbone,
    GaussianPromptAverage,
    MaPLePrompts,
    MATModel,
    MATObjective,
    PromptSRCPrompts,
    PromptSRCRegularizer,
)


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


def build_model(
    settings: PublishedConfig,
    clip: nn.Module,
    row: Row,
    layers: Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> MATModel:
    """The model of a row around given weights; the seed fixes its initialisation.

    Args:
        settings: the configuration.
        clip: the model with its weights.
        row: what is computed.
        layers: in place of the published ones, where the row's own are the rule.
        chunk_size: see `MATModel`.

    Raises:
        ValueError: the tower has too few blocks, or layers that the regularizer of PromptSRC cannot use.
    """
    if row.variant.feature == "last" or row.variant.mix == "learned":
        layers = None
    elif row.layers != "rule":
        layers = depths(row.layers, Backbone(clip).image.num_blocks)
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
        head = {name: getattr(settings, name) for name in names}
        model = MATModel(clip, prompts, row.variant, layers, row.radius, chunk_size, **head)
    if settings.method == "promptsrc" and not model.layers.ends:
        raise ValueError(
            f"layers must end with the last block, unmixed, for PromptSRC, whose regularizer reads its feature, got "
            f"{model.layers.layers}{' in a learned mix' if model.layers.mix == 'learned' else ''}"
        )
    return model


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
    *,
    accumulate: int = 1,
    second: SecondTree | None = None,
    trees: str = "first",
    label: str = "training",
) -> None:
    """Train in place; go on from the newest checkpoint below `folder` if there is one.

    Args:
        model: what is trained, on its device.
        settings: the configuration.
        train: the pictures.
        stored: their tree with its texts.
        run: precision, signals and records.
        folder: receives checkpoints and `metrics.jsonl`.
        as_released: repeat the order and the schedule of the released code.
        accumulate: pieces of a batch, one after the other.
        second: another tree over the same leaves.
        trees: trained on are the "first", the "second", or "both", whose losses are averaged.
        label: shown with the progress.
    """
    source = settings.method == "promptsrc"
    regularizer = PromptSRCRegularizer(settings.text_weight, settings.image_weight, settings.logit_weight)
    device = model.logit_scale.device
    trained_on = [(stored.taxonomy, stored.node_text, torch.from_numpy(train.targets))]
    if second is not None and trees != "first":
        trained_on = [*trained_on * (trees == "both"), (second.taxonomy, second.names, second.train_target)]
    sides = [
        (
            MATObjective(
                tree, settings.treecut_weight, settings.node_weight, settings.entail_weight, settings.treecut_dropout,
                names, regularizer if source else None,
            ),
            target.to(device),
        )
        for tree, names, target in trained_on
    ]  # fmt: skip
    draw = step_seed(settings.seed)

    def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
        images = preprocess(model.clip, train.batch(rows)).to(device)
        generator = torch.Generator().manual_seed(draw(step))
        picked = torch.from_numpy(rows).to(device)
        with run.accelerator.autocast():
            losses = [objective(wrapped, images, target[picked], generator) for objective, target in sides]
        total = torch.stack([part.total for part in losses]).mean()
        return total, {n: value for n, value in losses[0]._asdict().items() if bool(value.isfinite())}

    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    stage = Stage(
        "prompts", StageConfig(epochs=settings.epochs, lr=settings.lr, batch_size=settings.batch_size), len(train), forward,
        optimizer=lambda parameters: kinds[settings.optimizer](parameters.values(), lr=1.0, weight_decay=0.0),
        order=lambda epoch: epoch_order(settings, len(train), epoch, as_released),
        # The rate itself, over a peak of 1: the warm-up of the released code is no share of the peak.
        rate=lambda step: learning_rate(settings, step.epoch, step.index, as_released),
        draw=draw, after_step=model.head.clamp_, clip_grad=None, micro_batches=accumulate,
    )  # fmt: skip
    average = Average(settings, model, stage.per_epoch) if source else None
    stage = replace(
        stage, save_every=run.config.save_every, keeper=average, after_epoch=None if average is None else average.update
    )
    fit(model, [stage], folder, seed=settings.seed, label=label, stop=run.stop, tensorboard=run.config.tensorboard)
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
