"""Model and loss as the module that distributed training wraps, and the two stages that train it."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app_data.read.pictures import PictureSet
from app_eval.measure.embed import prepare
from app_train.core.schedule import Stage, Step
from app_train.recipes.lora.losses import LossConfig, MultiLabelLoss, loss_parts
from app_train.recipes.lora.settings import FitConfig
from hier_lora import HierLoraCLIP
from hier_losses.functional import mc_loss

HEAD, LORA = "head", "lora"
# Steps of the head, which are quick, that count as one step of LoRA between two checkpoints.
QUICK = 50


class Objective(nn.Module):
    """Model and loss in one `forward`, for pictures or for cached features of the frozen tower."""

    def __init__(self, model: HierLoraCLIP, config: LossConfig | MultiLabelLoss) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, target: Tensor, inputs: Tensor, offsets: Tensor | None = None) -> dict[str, Tensor]:
        """Loss parts for pictures (B, 3, H, W) or for features (B, d); `offsets` (B, d) are taken off the features of pictures."""
        base = self.model.dual_encoder
        if inputs.ndim == 2:
            logits = self.model.score(F.normalize(base.project(inputs), dim=-1), target)
        elif offsets is not None:
            logits = self.model.score(F.normalize(base.project(base.vision(inputs) - offsets), dim=-1), target)
        else:
            logits = self.model(inputs, target)
        tax = self.model.tax.to(logits.device)
        if isinstance(self.config, MultiLabelLoss):
            return {"mc": self.config.mc * mc_loss(logits, target, tax)}
        return loss_parts(logits, target, tax, self.config)


def stages(
    model: HierLoraCLIP,
    data: PictureSet,
    features: Tensor | None,
    config: FitConfig,
    *,
    offsets: Tensor | None = None,
    seed: int = 0,
    save_every: int = 20,
) -> list[Stage]:
    """Head first, then LoRA.

    Args:
        model: zero-shot model with LoRA layers attached.
        data: training pictures with node ids as targets.
        features: output of the frozen tower for each picture, (n, d); without them there is no first stage.
        config: epochs and rates of both.
        offsets: taken off the tower's output for each picture, (n, d), in the second stage; `features` come without them.
        seed: of the run, for the variation of pictures.
        save_every: steps of the second stage between two checkpoints.
    """
    targets = torch.from_numpy(np.asarray(data.targets))

    def head(wrapped: nn.Module, step: Step, rows: np.ndarray):
        return _sum(wrapped, targets[rows], features[rows])

    def lora(wrapped: nn.Module, step: Step, rows: np.ndarray):
        batch = data.batch(rows)
        if config.augment:
            # torchvision takes a second to import, and few runs vary their pictures.
            from app_train.recipes.lora.augment import augmented

            batch = augmented(batch, rows, config.augment, seed, step.number)
        pictures = prepare(model.dual_encoder, batch)
        return _sum(wrapped, targets[rows], pictures, *([] if offsets is None else [offsets[rows]]))

    first = config.head if features is not None else config.head.model_copy(update={"epochs": 0})
    return [
        Stage(
            HEAD, first, len(data), head, trains=lambda name: ".lora_" not in name,
            save_every=QUICK * save_every, clip_grad=config.clip_grad,
        ),
        Stage(
            LORA, config.lora, len(data), lora, save_every=save_every, clip_grad=config.clip_grad,
            micro_batches=config.accumulate,
        ),
    ]  # fmt: skip


def _sum(wrapped: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    device = next(wrapped.parameters()).device
    parts = wrapped(*(x.to(device) for x in inputs))
    return sum(parts.values()), {f"loss/{name}": value for name, value in parts.items()}
