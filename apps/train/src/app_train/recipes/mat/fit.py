"""How a row of the recipe `mat` is trained on cached features: one stage, curvatures at a rate of their own."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from app_train.core.schedule import Stage, Step, shuffled
from app_train.recipes.mat.settings import MATFitConfig
from mat_align import FeatureMATModel, MATObjective


def step_seed(seed: int) -> Callable[[Step], int]:
    """The seed of a step's dropout and tree cuts; it depends on the step alone."""
    return lambda step: 1_000_003 * seed + step.number - 1


def feature_stage(
    model: FeatureMATModel,
    objectives: tuple[MATObjective, ...],
    features: Tensor,
    targets: tuple[Tensor, ...],
    config: MATFitConfig,
    seed: int,
    save_every: int = 200,
) -> Stage:
    """The stage that trains a row.

    Args:
        model: the model.
        objectives: one, or several over different trees whose losses are averaged.
        features: (n, f) features of the training pictures.
        targets: for each objective, (n,) node ids.
        config: the settings.
        seed: fixes the order of the data and the tree cuts.
        save_every: steps between two checkpoints.
    """
    draw = step_seed(seed)

    def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
        generator = torch.Generator().manual_seed(draw(step))
        losses = [o(wrapped, features[rows], y[rows], generator) for o, y in zip(objectives, targets, strict=True)]
        loss = torch.stack([part.total for part in losses]).mean()
        values = {name: value for name, value in losses[0]._asdict().items() if bool(value.isfinite())}
        return loss, {**values, "total": loss}

    def optimizer(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        slow = [p for p in parameters.values() if p.numel() > 1]
        quick = [p for p in parameters.values() if p.numel() == 1]
        return torch.optim.AdamW(
            [{"params": slow, "lr": config.lr}, {"params": quick, "lr": config.curvature_lr, "weight_decay": 0.0}],
            weight_decay=config.weight_decay,
        )

    return Stage(
        "features", config, len(features), forward, optimizer=optimizer, order=shuffled(len(features), seed), draw=draw,
        after_step=model.head.clamp_, clip_grad=config.clip_grad, save_every=save_every,
    )  # fmt: skip
