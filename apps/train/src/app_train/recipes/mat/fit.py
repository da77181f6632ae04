"""Training of one row of the recipe `mat` on cached features: short, and resumable after any epoch."""

import math
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from app_train.core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from app_train.core.config import Frozen
from app_train.core.errors import Interrupted, NonFiniteGradient
from app_train.core.interrupt import StopFlag
from app_train.core.records import Records
from mat_align import FeatureMATModel, MATObjective


class MATFitConfig(Frozen):
    """AdamW on cached features, a cosine from `lr` to 0 after a linear warm-up."""

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    curvature_lr: float = Field(1e-2, gt=0)
    """Rate of the curvatures, the radii and the logit scale."""
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    clip_grad: float = Field(1.0, gt=0)
    node_weight: float = Field(0.5, ge=0)
    entail_weight: float = Field(0.5, ge=0)
    treecut_dropout: float = Field(0.1, ge=0, lt=1)
    scale: float = Field(1.0, gt=0)
    min_radius: float = Field(0.1, gt=0)
    curv_init: float = Field(0.05, gt=0)
    c_img: float = Field(0.05, gt=0)
    c_txt: float = Field(0.025, gt=0)
    dropout: float = Field(0.5, ge=0, lt=1)
    """Share of the pooled features that a step does not see: without it the maps learn few pictures by heart."""
    ridge: float = Field(0.1, gt=0)
    """Penalty of the closed-form maps of the stages."""

    def head(self) -> dict[str, float]:
        """Settings of the model's head."""
        names = ("scale", "min_radius", "curv_init", "c_img", "c_txt")
        return {name: getattr(self, name) for name in names}


def fit_row(
    model: FeatureMATModel,
    objectives: tuple[MATObjective, ...],
    features: Tensor,
    targets: tuple[Tensor, ...],
    config: MATFitConfig,
    folder: Path,
    *,
    seed: int,
    stop: StopFlag,
    label: str,
) -> None:
    """Train a model in place; go on from the newest checkpoint below `folder` if there is one.

    Args:
        model: the model.
        objectives: one, or several over different trees whose losses are averaged.
        features: (n, f) features of the training pictures.
        targets: for each objective, (n,) node ids.
        config: the settings.
        folder: receives checkpoints and `metrics.jsonl`.
        seed: fixes the order of the data and the tree cuts.
        stop: read after every step.
        label: shown at the progress bar.

    Raises:
        Interrupted: after a signal; the state is saved.
        NonFiniteGradient: before the step that would have spoilt the weights.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slow = [p for name, p in parameters.items() if p.numel() > 1]
    quick = [p for p in parameters.values() if p.numel() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": slow, "lr": config.lr}, {"params": quick, "lr": config.curvature_lr, "weight_decay": 0.0}],
        weight_decay=config.weight_decay,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    found = load_checkpoint(folder)
    position = 0 if found is None else found.position
    if found is not None:
        with torch.no_grad():
            for name, value in found.weights.items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(found.optimizer)
    per_epoch = math.ceil(len(features) / config.batch_size)
    total = per_epoch * config.epochs
    records = Records(folder, position)

    def save(number: int) -> None:
        records.flush()
        save_checkpoint(folder, Checkpoint(dict(parameters), optimizer.state_dict(), number))

    model.train()
    try:
        for number in tqdm(range(position, total), desc=label, disable=None, leave=False):
            epoch, batch = divmod(number, per_epoch)
            order = np.random.default_rng([seed, epoch]).permutation(len(features))
            rows = torch.from_numpy(order[batch * config.batch_size : (batch + 1) * config.batch_size])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_share(number, total, config.warmup)
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(1_000_003 * seed + number)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1_000_003 * seed + number)  # dropout depends on the step alone
                losses = [
                    o(model, features[rows], y[rows], generator) for o, y in zip(objectives, targets, strict=True)
                ]
            loss = torch.stack([part.total for part in losses]).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_grad)
            if not bool(norm.isfinite()):
                raise NonFiniteGradient(f"{label}: the gradient norm of step {number + 1} is {norm.item()}")
            optimizer.step()
            model.head.clamp_()
            values = {name: value.item() for name, value in losses[0]._asdict().items() if bool(value.isfinite())}
            records.add(
                number + 1,
                **{**values, "total": loss.item(), "lr": rates[0] * rate_share(number, total, config.warmup)},
            )
            if stop.exit_status is not None:
                save(number + 1)
                raise Interrupted(stop.exit_status)
            if batch == per_epoch - 1 and (epoch + 1) % 5 == 0:
                save(number + 1)
    finally:
        records.close()


def rate_share(done: int, total: int, warmup: float) -> float:
    """Share of the highest rate at a step: a linear warm-up, then a cosine to 0."""
    warm = max(1, round(warmup * total))
    if done < warm:
        return (done + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, total - warm)))
