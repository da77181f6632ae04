"""The losses of a run on the logits of all nodes, by name, and the module that distributed training wraps."""

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from app_train.core.config import Frozen, LossConfig
from hier_lora import HierLoraCLIP
from hier_losses import Taxonomy
from hier_losses.functional import hisce, level_cross_entropy, mc_loss, parent_child_consistency, tp_kl


def loss_parts(logits: Tensor, target: Tensor, tax: Taxonomy, config: LossConfig) -> dict[str, Tensor]:
    """The weighted parts of the loss that are switched on; their sum is the loss.

    Args:
        logits: scores of all nodes, (B, N).
        target: node ids of the leaves, (B,).
        tax: the taxonomy, on the same device.
        config: the weights.
    """
    parts = {}
    if config.leaf:
        parts["leaf"] = config.leaf * F.cross_entropy(logits[:, tax.leaf], tax.leaf_index[target])
    if config.level:
        parts["level"] = config.level * level_cross_entropy(logits, target, tax)
    if config.tp_kl:
        parts["tp_kl"] = config.tp_kl * tp_kl(logits, target, tax)
    if config.hisce:
        parts["hisce"] = config.hisce * hisce(logits, target, tax, eps=config.eps)
    if config.consistency:
        parts["consistency"] = config.consistency * parent_child_consistency(logits, tax)
    return parts


class MultiLabelLoss(Frozen):
    """The loss of pictures with several labels: MCLoss (Giunchiglia and Lukasiewicz, 2020)."""

    mc: float = Field(1.0, gt=0)
    """Weight of the loss."""


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
        if isinstance(self.config, MultiLabelLoss):
            return {"mc": self.config.mc * mc_loss(logits, target, self.model.tax.to(logits.device))}
        return loss_parts(logits, target, self.model.tax.to(logits.device), self.config)
