"""The losses of hier-losses by name, and the settings that weigh them; the module is light, for `--help`.

To add one: a line of `LOSSES`. The settings, the help text and the tables follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, create_model

from app_train.core.config import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from hier_losses import Taxonomy


@dataclass(frozen=True)
class Loss:
    """A loss on the logits of all nodes.

    Attributes:
        title: in tables.
        about: what it is, for the help text.
        compute: from logits (B, N), target node ids (B,), taxonomy and settings to a scalar.
    """

    title: str
    about: str
    compute: Callable[[Tensor, Tensor, Taxonomy, LossSettings], Tensor]


class LossSettings(Frozen):
    """Settings of single losses."""

    eps: float = Field(0.1, ge=0, lt=1)
    """Share of the target that HiSCE gives to the siblings."""
    discount: float = Field(0.5, ge=0)
    """How fast HXE's weights fall from the leaves to the root."""
    beta: float = Field(10.0, gt=0)
    """How sharply soft labels fall with the distance in the tree."""
    levels: Literal["ragged", "extended"] = "ragged"
    """Whether level CE and HiSCE let a shallow leaf compete with the nodes below its level; decoders do."""


def _of(name: str, *settings: str, leaves: bool = False) -> Callable[[Tensor, Tensor, Taxonomy, LossSettings], Tensor]:
    """The function of this name in `hier_losses.functional`, called with these settings."""

    def compute(logits: Tensor, target: Tensor, tax: Taxonomy, config: LossSettings) -> Tensor:
        from hier_losses import functional

        chosen = {setting: getattr(config, setting) for setting in settings}
        return getattr(functional, name)(logits[:, tax.leaf] if leaves else logits, target, tax, **chosen)

    return compute


def _leaf(logits: Tensor, target: Tensor, tax: Taxonomy, config: LossSettings) -> Tensor:
    from torch.nn import functional

    return functional.cross_entropy(logits[:, tax.leaf], tax.leaf_index[target])


def _consistency(logits: Tensor, target: Tensor, tax: Taxonomy, config: LossSettings) -> Tensor:
    from hier_losses.functional import parent_child_consistency

    return parent_child_consistency(logits, tax)


LOSSES: dict[str, Loss] = {
    "leaf": Loss("leaf CE", "Cross-entropy over the leaves alone: the plain baseline.", _leaf),
    "level": Loss(
        "level CE", "Cross-entropy on every level, summed over levels.", _of("level_cross_entropy", "levels")
    ),
    "tp_kl": Loss("TP-KL", "Tree-Path KL divergence over all nodes.", _of("tp_kl")),
    "hisce": Loss(
        "HiSCE", "Hierarchy-Sibling Smoothed Cross-Entropy, summed over levels.", _of("hisce", "eps", "levels")
    ),
    "consistency": Loss(
        "consistency", "Jensen-Shannon divergence between each level and the one below it.", _consistency
    ),
    "hxe": Loss("HXE", "Hierarchical cross-entropy of the leaves.", _of("hxe", "discount", leaves=True)),
    "soft_label": Loss(
        "soft labels", "Cross-entropy with soft labels over the leaves.", _of("soft_label_ce", "beta", leaves=True)
    ),
    "semantic": Loss("semantic softmax", "Level CE that weighs lower levels more.", _of("semantic_softmax")),
    "conditional": Loss(
        "conditional softmax", "Cross-entropy among siblings along the path.", _of("conditional_softmax_nll")
    ),
    "hce": Loss("HCE", "Sigmoid loss after the max constraint.", _of("hce")),
    "hrn": Loss("HRN", "Marginal likelihood of the paths of the tree.", _of("hrn_tree_loss")),
}

LossConfig = cast(
    Any,
    create_model(
        "LossConfig",
        __base__=LossSettings,
        __doc__="Which losses are added up, and with which weight.",
        **{name: (float, Field(0.0, ge=0, description=loss.about)) for name, loss in LOSSES.items()},
    ),
)


def loss_parts(logits: Tensor, target: Tensor, tax: Taxonomy, config: LossConfig) -> dict[str, Tensor]:
    """The weighted parts of the loss that are switched on; their sum is the loss.

    Args:
        logits: scores of all nodes, (B, N).
        target: node ids of the leaves, (B,).
        tax: the taxonomy, on the same device.
        config: the weights.
    """
    weights = {name: getattr(config, name) for name in LOSSES}
    return {
        name: weight * LOSSES[name].compute(logits, target, tax, config) for name, weight in weights.items() if weight
    }


@dataclass(frozen=True)
class Row:
    """One line of a results table: a loss, and what the table calls it."""

    title: str
    loss: LossConfig


ROWS: dict[str, Row] = {
    "leaf_ce": Row("leaf CE", LossConfig(leaf=1)),
    "level_ce": Row("level CE", LossConfig(level=1)),
    "tp_kl": Row("TP-KL", LossConfig(tp_kl=1)),
    "hisce": Row("HiSCE", LossConfig(hisce=1)),
    "both": Row("TP-KL + HiSCE", LossConfig(tp_kl=1, hisce=1)),
    "both_consistency": Row("TP-KL + HiSCE + consistency", LossConfig(tp_kl=1, hisce=1, consistency=1)),
}


class MultiLabelLoss(Frozen):
    """The loss of pictures with several labels: MCLoss (Giunchiglia and Lukasiewicz, 2020)."""

    mc: float = Field(1.0, gt=0)
    """Weight of the loss."""
