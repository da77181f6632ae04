"""Every loss of `hier_losses.functional` as a module; formulas, arguments and references stand with the functions.

Settings are checked on construction. A module has no parameters and no state; it follows the device of its input.
Besides the settings it names, every loss with targets takes the `options` of all of them: `ignore_index`, `classes` and
`class_weights`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hier_losses import functional as F
from hier_losses._tree import Tree
from hier_losses.functional._inputs import PerLevel, Target, check_taxonomy
from hier_losses.graph import LabelGraph


class _Loss(nn.Module):
    """A loss with a tree and settings, which subclasses pass on to their function."""

    takes_graphs = False
    width = "num_nodes"  # of the logits
    tax: Any  # a Taxonomy, or a LabelGraph where `takes_graphs` says so

    def __init__(self, tax: Tree | LabelGraph, **settings):
        super().__init__()
        check_taxonomy(tax, self.takes_graphs)
        self.tax = tax
        self._names = tuple(settings)
        for name, value in settings.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                value = tuple(value)
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self._dry_run()

    def _dry_run(self) -> None:
        """Send an empty batch through, which checks all settings and costs nothing."""
        empty = torch.zeros(0, getattr(self.tax, self.width), device=self.tax.device)
        self(empty, torch.zeros(0, dtype=torch.int64, device=self.tax.device))

    @property
    def settings(self) -> dict:
        """The keyword arguments that the function is called with."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """Return the settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class _NodeLoss(_Loss):
    """A loss on (B, N) logits and (B,) node ids; subclasses name their function."""

    function: Callable[..., Tensor]

    def forward(
        self, logits: Float[Tensor, "batch scores *rest"], target: Target, sample_weight: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Return the loss.

        Args:
            logits: one logit per node, or per leaf for the losses on leaf logits.
            target: (B, ...) integer node ids, class names, or (B, N, ...) shares of nodes.
            sample_weight: weights in the shape of the targets.
        """
        return type(self).function(logits, target, self.tax, sample_weight=sample_weight, **self.settings)


class LevelCrossEntropy(_NodeLoss):
    """Module form of `functional.level_cross_entropy`."""

    function = staticmethod(F.level_cross_entropy)

    def __init__(
        self,
        tax: Tree,
        *,
        levels: str = "ragged",
        level_reduction: str = "sum",
        level_weights: PerLevel | None = None,
        label_smoothing: PerLevel = 0.0,
        focal_gamma: float = 0.0,
        reduction: str = "mean",
        **options: Any,
    ):
        """Keep the settings; see `functional.level_cross_entropy`."""
        super().__init__(
            tax,
            levels=levels,
            level_reduction=level_reduction,
            level_weights=level_weights,
            label_smoothing=label_smoothing,
            focal_gamma=focal_gamma,
            reduction=reduction,
            **options,
        )


class SemanticSoftmax(_NodeLoss):
    """Module form of `functional.semantic_softmax`."""

    function = staticmethod(F.semantic_softmax)

    def __init__(
        self,
        tax: Tree,
        *,
        max_weight: float = 20.0,
        label_smoothing: PerLevel = 0.0,
        reduction: str = "mean",
        **options: Any,
    ):
        """Keep the settings; see `functional.semantic_softmax`."""
        super().__init__(tax, max_weight=max_weight, label_smoothing=label_smoothing, reduction=reduction, **options)


class HiSCE(_NodeLoss):
    """Module form of `functional.hisce`."""

    function = staticmethod(F.hisce)

    def __init__(
        self,
        tax: Tree,
        *,
        eps: PerLevel = 0.1,
        levels: str = "ragged",
        level_reduction: str = "sum",
        level_weights: PerLevel | None = None,
        reduction: str = "mean",
        **options: Any,
    ):
        """Keep the settings; see `functional.hisce`."""
        super().__init__(
            tax,
            eps=eps,
            levels=levels,
            level_reduction=level_reduction,
            level_weights=level_weights,
            reduction=reduction,
            **options,
        )


class TPKL(_Loss):
    """Module form of `functional.tp_kl`."""

    def __init__(
        self,
        tax: Tree,
        *,
        softmax_over: str = "auto",
        temperature: float = 1.0,
        level_weights: PerLevel | None = None,
        label_smoothing: PerLevel = 0.0,
        reduction: str = "mean",
        **options: Any,
    ):
        """Keep the settings; see `functional.tp_kl`."""
        super().__init__(
            tax,
            softmax_over=softmax_over,
            temperature=temperature,
            level_weights=level_weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            **options,
        )

    def forward(
        self,
        logits: Float[Tensor, "batch scores *rest"],
        target: Target | None = None,
        target_probs: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Float[Tensor, "..."]:
        """Return the loss.

        Args:
            logits: one logit per node.
            target: (B, ...) integer node ids, class names, or (B, N, ...) shares of nodes; None with `target_probs`.
            target_probs: (B, N, ...) distributions over nodes.
            sample_weight: weights in the shape of the targets.
        """
        return F.tp_kl(
            logits, target, self.tax, target_probs=target_probs, sample_weight=sample_weight, **self.settings
        )


class HierarchyAwareLoss(_NodeLoss):
    """Module form of `functional.hierarchy_aware_loss`; `parts` gives the summands by name.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> loss = HierarchyAwareLoss(Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)]), consistency_weight=0.1)
    >>> sorted(loss.parts(torch.zeros(2, 4), torch.tensor([2, 1])))
    ['consistency', 'hisce', 'total', 'tp_kl']
    """

    function = staticmethod(F.hierarchy_aware_loss)

    def __init__(
        self,
        tax: Tree,
        alpha: float = 1.0,
        lam: float = 1.0,
        ce_weight: float = 0.0,
        consistency_weight: float = 0.0,
        eps: PerLevel = 0.1,
        *,
        softmax_over: str = "auto",
        level_weights: PerLevel | None = None,
        reduction: str = "mean",
        **options: Any,
    ):
        """Keep the settings; see `functional.hierarchy_aware_parts`."""
        super().__init__(
            tax,
            alpha=alpha,
            lam=lam,
            ce_weight=ce_weight,
            consistency_weight=consistency_weight,
            eps=eps,
            softmax_over=softmax_over,
            level_weights=level_weights,
            reduction=reduction,
            **options,
        )

    def parts(
        self, logits: Float[Tensor, "batch scores *rest"], target: Target, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return "total" and each part whose weight is not 0, before weighting.

        Args:
            logits: one logit per node.
            target: as in `forward`.
            sample_weight: weights in the shape of the targets.
        """
        return F.hierarchy_aware_parts(logits, target, self.tax, sample_weight=sample_weight, **self.settings)


class ConditionalSoftmaxNLL(_NodeLoss):
    """Module form of `functional.conditional_softmax_nll`."""

    function = staticmethod(F.conditional_softmax_nll)

    def __init__(
        self, tax: Tree, *, discount: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean", **options: Any
    ):
        """Keep the settings; see `functional.conditional_softmax_nll`."""
        super().__init__(tax, discount=discount, label_smoothing=label_smoothing, reduction=reduction, **options)


class HCE(_NodeLoss):
    """Module form of `functional.hce`."""

    function = staticmethod(F.hce)
    takes_graphs = True

    def __init__(self, graph: Tree | LabelGraph, *, reduction: str = "mean", **options: Any):
        """Keep the settings; see `functional.hce`."""
        super().__init__(graph, reduction=reduction, **options)


class HRNTreeLoss(_NodeLoss):
    """Module form of `functional.hrn_tree_loss`."""

    function = staticmethod(F.hrn_tree_loss)

    def __init__(self, tax: Tree, *, activation: str = "sigmoid", reduction: str = "mean", **options: Any):
        """Keep the settings; see `functional.hrn_tree_loss`."""
        super().__init__(tax, activation=activation, reduction=reduction, **options)


class HXE(_NodeLoss):
    """Module form of `functional.hxe`; takes leaf logits."""

    function = staticmethod(F.hxe)
    width = "num_leaves"

    def __init__(
        self, tax: Tree, *, discount: float = 0.1, normalize: str = "none", reduction: str = "mean", **options: Any
    ):
        """Keep the settings; see `functional.hxe`."""
        super().__init__(tax, discount=discount, normalize=normalize, reduction=reduction, **options)


class SoftLabelCE(_NodeLoss):
    """Module form of `functional.soft_label_ce`; takes leaf logits."""

    function = staticmethod(F.soft_label_ce)
    width = "num_leaves"

    def __init__(self, tax: Tree, *, beta: float = 10.0, reduction: str = "mean", **options: Any):
        """Keep the settings; see `functional.soft_label_ce`."""
        super().__init__(tax, beta=beta, reduction=reduction, **options)


class ParentChildConsistency(_Loss):
    """Module form of `functional.parent_child_consistency`; takes no target."""

    def __init__(self, tax: Tree, *, kind: str = "jsd", margin: float = 0.0, reduction: str = "mean"):
        """Keep the settings; see `functional.parent_child_consistency`."""
        super().__init__(tax, kind=kind, margin=margin, reduction=reduction)

    def _dry_run(self) -> None:
        self(torch.zeros(0, self.tax.num_nodes, device=self.tax.device))

    def forward(
        self, logits: Float[Tensor, "batch scores *rest"], sample_weight: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Return the penalty.

        Args:
            logits: one logit per node.
            sample_weight: (B, ...) weights.
        """
        return F.parent_child_consistency(logits, self.tax, sample_weight=sample_weight, **self.settings)


class MCLoss(_Loss):
    """Module form of `functional.mc_loss`."""

    takes_graphs = True

    def __init__(self, graph: Tree | LabelGraph, *, pos_weight: Tensor | None = None, reduction: str = "mean"):
        """Keep the settings; see `functional.mc_loss`."""
        super().__init__(graph, pos_weight=pos_weight, reduction=reduction)

    def _dry_run(self) -> None:
        empty = torch.zeros(0, self.tax.num_nodes, device=self.tax.device)
        self(empty, empty)

    def forward(
        self,
        logits: Float[Tensor, "batch scores *rest"],
        multi_hot: Tensor,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Float[Tensor, "..."]:
        """Return the loss.

        Args:
            logits: one logit per node.
            multi_hot: (B, N) zeros and ones, closed upwards.
            mask: (B, N) or (N,) bool, the entries that count.
            sample_weight: (B, ...) weights.
        """
        return F.mc_loss(logits, multi_hot, self.tax, mask, sample_weight=sample_weight, **self.settings)


class MCM(nn.Module):
    """Module form of `functional.mcm`, to end a network with."""

    def __init__(self, graph: Tree | LabelGraph):
        """Keep the graph."""
        super().__init__()
        check_taxonomy(graph, or_graph=True)
        self.graph = graph

    def forward(self, scores: Float[Tensor, "*batch scores"]) -> Float[Tensor, "*batch scores"]:
        """Return the maximum over descendants-or-self.

        Args:
            scores: one score per node.
        """
        return F.mcm(scores, self.graph)
