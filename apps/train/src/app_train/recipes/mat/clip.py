"""Recipe `mat-clip`: Modality Alignment across Trees on CLIP weights, as published or with one part exchanged.

    python apps/train mat-clip --published cifar100-16-maple --images DIR --tree trees/cifar100.json --weights FILE

DIR holds train/<leaf>/ and test/<leaf>/. Without --weights open_clip downloads its own. One card trains CIFAR-100, 16
shots, in hours: not measured here, where such weights cannot be had; the path runs in tests on small random models.
--released repeats the defects of the released code, for reproduction.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from app_data.read.folder import load_folder
from app_data.read.pictures import PictureSet
from app_data.sets.cifar100 import StoredTree, read_stored_tree, take_shots
from app_data.store.atomic import write_json
from app_eval.measure.tree_scores import tree_scores
from app_train.core.checkpoint import Checkpoint, load_checkpoint, remove_checkpoints, save_checkpoint
from app_train.core.config import Frozen, claim_folder
from app_train.core.errors import Interrupted, NonFiniteGradient, RunError
from app_train.core.interrupt import StopFlag
from app_train.core.records import Records
from app_train.recipes.mat.published import PUBLISHED, PublishedConfig
from app_train.recipes.mat.rows import VARIANTS, VariantName
from mat_align import (
    GaussianPromptAverage,
    MaPLePrompts,
    MATModel,
    MATObjective,
    PromptSRCPrompts,
    PromptSRCRegularizer,
    released,
)

_AVERAGE = "average."


class MATClipConfig(Frozen):
    """Train one published configuration on CLIP weights."""

    published: Literal[tuple(PUBLISHED)] = "cifar100-16-maple"  # type: ignore[valid-type]
    """data-shots-method."""
    images: Path | None = None
    """Folder with train/<leaf>/ and test/<leaf>/ (required)."""
    tree: Path | None = None
    """JSON tree with its cuts, in ProTeCt's form (required)."""
    weights: Path | None = None
    """Weights file for the model; open_clip's own download if not given."""
    model: str | None = None
    """Another open_clip model than the published one; `local-dir:FOLDER` is one that `mini-clip` wrote, with its weights."""
    variant: VariantName = "HETEROGENEOUS"
    released: bool = False
    """Repeat the defects of the released code."""
    epochs: int | None = Field(None, ge=1)
    """In place of the published number."""
    out: Path = Path("runs/mat-clip")
    cache_dir: Path | None = None


def run(config: MATClipConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.images is None or config.tree is None:
        raise RunError("--images and --tree are missing: name the folder of pictures and the JSON file of the tree")
    settings = PUBLISHED[config.published]()
    changes = {"epochs": config.epochs, "model": config.model}
    settings = settings.model_copy(update={k: v for k, v in changes.items() if v is not None})
    stored = read_stored_tree(config.tree)
    clip = load_clip(settings, config.weights)
    size = clip.visual.image_size[0]
    parts = load_folder(config.images, stored.taxonomy, size=size, cache_dir=config.cache_dir)
    missing = [part for part in ("train", "test") if part not in parts]
    if missing:
        raise RunError(f"{config.images} has no folder {missing[0]}: give train/<leaf>/ and test/<leaf>/")
    kept, _ = take_shots(parts["train"], settings.shots, settings.seed)
    train = parts["train"].select(kept)
    claim_folder(config.out, config, f"{train.fingerprint}-{parts['test'].fingerprint}")
    with StopFlag() as stop:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = build_model(settings, clip, config.variant, config.released).to(device)
        fit(model, settings, train, stored, config.out, stop, config.released)
        model.save_pretrained(config.out / "model")
        scores = evaluate(model, parts["test"], stored)
    content = {
        "format": 1,
        "recipe": "mat-clip",
        "published": config.published,
        "variant": model.variant.name,
        "n": len(parts["test"]),
        "scores": {name: float(values.mean()) for name, values in scores.items()},
        "curvatures": [c().item() for c in (model.c_img, model.c_txt) if c is not None],
    }
    write_json(config.out / "result.json", content)
    remove_checkpoints(config.out)
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
    """Constant warm-up, then a cosine over the epochs.

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
    return settings.lr * 0.5 * (1 + math.cos(math.pi * at / settings.epochs))


def epoch_order(settings: PublishedConfig, num: int, epoch: int, as_released: bool = False) -> np.ndarray:
    """Order of the pictures; the released code repeats the first one in every epoch."""
    return np.random.default_rng([settings.seed, 0 if as_released else epoch]).permutation(num)


def fit(
    model: MATModel,
    settings: PublishedConfig,
    train: PictureSet,
    stored: StoredTree,
    folder: Path,
    stop: StopFlag,
    as_released: bool = False,
) -> None:
    """Train in place; go on from the newest checkpoint below `folder` if there is one.

    Raises:
        Interrupted: after a signal; the state is saved.
        NonFiniteGradient: before the step that would have spoilt the weights.
    """
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
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    optimizer = kinds[settings.optimizer](parameters.values(), lr=settings.lr, weight_decay=0.0)
    average = GaussianPromptAverage(settings.epochs, settings.average_mean, settings.average_std) if source else None
    position = _resume(folder, parameters, optimizer, average, settings, len(train))
    per_epoch = math.ceil(len(train) / settings.batch_size)
    records = Records(folder, position)

    def save(number: int) -> None:
        records.flush()
        kept = {} if average is None else {f"{_AVERAGE}{name}": v for name, v in average.average.items()}
        save_checkpoint(folder, Checkpoint({**parameters, **kept}, optimizer.state_dict(), number))

    device = model.logit_scale.device
    targets = torch.from_numpy(train.targets).to(device)
    try:
        for number in tqdm(range(position, per_epoch * settings.epochs), desc="training", disable=None, leave=False):
            epoch, batch = divmod(number, per_epoch)
            order = epoch_order(settings, len(train), epoch, as_released)
            rows = order[batch * settings.batch_size : (batch + 1) * settings.batch_size]
            rate = learning_rate(settings, epoch, number, as_released)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(1_000_003 * settings.seed + number)
            images = preprocess(model.clip, train.batch(rows)).to(device)
            losses = objective(model, images, targets[torch.from_numpy(rows).to(device)], generator)
            losses.total.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
            if not bool(norm.isfinite()):
                raise NonFiniteGradient(f"the gradient norm of step {number + 1} is {norm.item()}")
            optimizer.step()
            model.head.clamp_()
            values = {name: value.item() for name, value in losses._asdict().items() if bool(value.isfinite())}
            records.add(number + 1, lr=rate, **values)
            if batch == per_epoch - 1 and average is not None:
                average.update(model.named_parameters())
            status = stop.exit_status  # read once: a signal between two reads would leave without saving
            if batch == per_epoch - 1 or status is not None:
                save(number + 1)
            if status is not None:
                raise Interrupted(status)
    finally:
        records.close()
    if average is not None:
        average.copy_to(model)


def _resume(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: GaussianPromptAverage | None,
    settings: PublishedConfig,
    num: int,
) -> int:
    found = load_checkpoint(folder)
    if found is None:
        return 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found.weights[name])
    optimizer.load_state_dict(found.optimizer)
    if average is not None:
        kept = {k.removeprefix(_AVERAGE): v for k, v in found.weights.items() if k.startswith(_AVERAGE)}
        average.average = {name: value.to(parameters[name].device) for name, value in kept.items()}
        average.num_updates = found.position // math.ceil(num / settings.batch_size)
    return found.position


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
    for start in tqdm(range(0, len(pictures), batch_size), desc="encoding", disable=None, leave=False):
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
