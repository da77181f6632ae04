"""Train the image head alone on cached features: the first stage of a run, seconds long, for studies of many runs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app_train.core.config import StageConfig
from app_train.core.fit import fit
from app_train.core.schedule import Stage, Step
from app_train.recipes.lora.losses import LossConfig, loss_parts
from app_train.recipes.lora.objective import HEAD
from app_train.recipes.lora.retree import OtherEdges
from hier_lora import HierLoraCLIP
from hier_losses import Taxonomy
from hier_losses.functional import parent_child_consistency


@dataclass(frozen=True)
class TreeLoss:
    """A loss on the logits of all nodes, each part over a tree of its own.

    Attributes:
        weights: of the parts.
        tax: the clean tree, which numbers logits and targets.
        edges: what all parts but the consistency take for the tree; the clean one if None.
        consistency_edges: what the consistency takes for the tree; the clean one if None.
    """

    weights: LossConfig
    tax: Taxonomy
    edges: OtherEdges | None = None
    consistency_edges: OtherEdges | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The weighted sum."""
        main = self.weights.model_copy(update={"consistency": 0.0})
        z, y, tax = logits, target, self.tax
        if self.edges is not None:
            (z, y), tax = self.edges.carry(logits, target), self.edges.taxonomy
        total = sum(loss_parts(z, y, tax, main).values())
        if self.weights.consistency:
            other = self.consistency_edges
            z, tax = (logits, self.tax) if other is None else (other.carry(logits, target)[0], other.taxonomy)
            total = total + self.weights.consistency * parent_child_consistency(z, tax)
        return total


def start_head(model: HierLoraCLIP, features: Tensor) -> None:
    """Open the head and the scale of a zero-shot model for training, and centre it on these pictures."""
    base = model.dual_encoder
    base.center_images(features)
    for parameter in (*base.projection.parameters(), base.logit_scale):
        parameter.requires_grad_(True)


def head_state(model: HierLoraCLIP) -> dict[str, Tensor]:
    """A copy of what a head run trains."""
    base = model.dual_encoder
    state = {f"projection.{k}": v.detach().clone() for k, v in base.projection.state_dict().items()}
    return state | {"logit_scale": base.logit_scale.detach().clone()}


@torch.no_grad()
def set_head(model: HierLoraCLIP, state: dict[str, Tensor]) -> None:
    """Put a copy back."""
    base = model.dual_encoder
    base.projection.load_state_dict({k.removeprefix("projection."): v for k, v in state.items() if "." in k})
    base.logit_scale.copy_(state["logit_scale"])


def train_head(
    model: HierLoraCLIP,
    features: Tensor,
    targets: np.ndarray,
    loss: Callable[[Tensor, Tensor], Tensor],
    settings: StageConfig,
    seed: int,
) -> None:
    """Train head and scale in place, from where they stand.

    Args:
        model: with a head opened by `start_head`; text cached.
        features: of the frozen picture tower, (n, d).
        targets: node ids, (n,).
        loss: from logits (b, N) and targets (b,) to a scalar.
        settings: of the stage.
        seed: of the order and of dropout.
    """
    truth = torch.from_numpy(np.asarray(targets))

    def forward(wrapped: HierLoraCLIP, step: Step, rows: np.ndarray):
        logits = wrapped.score(F.normalize(wrapped.dual_encoder.project(features[rows]), dim=-1))
        return loss(logits, truth[rows]), {}

    fit(model, [Stage(HEAD, settings, len(truth), forward)], seed=seed)


@torch.inference_mode()
def head_logits(model: HierLoraCLIP, features: Tensor, *, centred: bool) -> Tensor:
    """Logits of all nodes for cached features, (n, N); `centred` as in `app_eval.measure.embed.node_logits`."""
    model.eval()
    embedded = model.dual_encoder.project(features)
    if centred:
        embedded = embedded - embedded.mean(0)
    return model.score(F.normalize(embedded, dim=-1))
