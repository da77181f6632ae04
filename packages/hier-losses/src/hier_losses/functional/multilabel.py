"""Coherent multi-label classification: the max constraint module and its loss.

Reference: Giunchiglia and Lukasiewicz (2020, "Coherent Hierarchical Multi-Label Classification Networks", NeurIPS).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._inputs import (
    Reduction,
    check_class_weights,
    check_reduction,
    check_scores,
    read_samples,
    require,
)
from hier_losses.functional._kernels import segment_max, upcast
from hier_losses.functional.tree_ops import subtree_max
from hier_losses.graph import LabelGraph


def mcm(scores: Float[Tensor, "*batch nodes"], graph: Tree | LabelGraph) -> Float[Tensor, "*batch nodes"]:
    r"""Max constraint module, $MCM_v = \max_{u \preceq v} x_u$ over descendants-or-self.

    The result never puts a child above its parent. It commutes with the sigmoid, so it takes logits or probabilities.
    On a 0/1 target it adds all ancestors.

    Args:
        scores: one score per node.
        graph: a tree, swept level by level, or a label graph, read from its reachability pairs.

    Returns:
        Shape (..., N), float32 for half precision.

    Raises:
        ValueError: the last dimension is not N.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> mcm(torch.tensor([0.0, 1.0, 3.0, 2.0]), Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])).tolist()
    [3.0, 1.0, 3.0, 2.0]
    """
    if isinstance(graph, Tree):
        return subtree_max(scores, graph)
    if scores.ndim == 0 or scores.shape[-1] != graph.num_nodes:
        raise ValueError(f"scores must have {graph.num_nodes} columns, got shape {tuple(scores.shape)}")
    graph = graph.to(scores.device)
    columns = upcast(scores).reshape(-1, graph.num_nodes).T.contiguous()
    highest = segment_max(
        columns.index_select(0, graph.descendant), graph.descendant_row, torch.full_like(columns, -torch.inf)
    )
    return highest.T.reshape(scores.shape)


def mc_loss(
    logits: Float[Tensor, "batch nodes *rest"],
    multi_hot: Tensor,
    graph: Tree | LabelGraph,
    mask: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Binary cross-entropy of the max constraint module, in logit form.

    A negative node is scored by $\max_{u \preceq v} z_u$; a positive node by the maximum over the positive
    $u \preceq v$ only, so that a wrong descendant cannot earn its ancestor's credit.

    Args:
        logits: one logit per node; half precision is computed in float32.
        multi_hot: (B, N, ...) zeros and ones (or bool), with all ancestors of every 1; `mcm` adds them.
        graph: a tree or a label graph.
        mask: (B, N, ...) or (N,) bool, the entries that count; entries left out still take part in the maxima.
        pos_weight: (N,) at least 0, factors of the terms of positive entries, as in
            `torch.nn.functional.binary_cross_entropy_with_logits`.
        sample_weight: (B, ...) at least 0, factors of all entries of a sample; the mean divides by their sum.
        reduction: "mean" over the entries that count, "sum", or "none" for (B, N, ...) with 0 where masked.

    Returns:
        A scalar, or (B, N, ...) for "none"; at least 0.

    Raises:
        ValueError: a wrong shape, entries other than 0 and 1, or a row that is not closed upwards.
    """
    check_reduction(reduction)
    shape = logits.shape
    samples = read_samples("logits", logits, None, graph, sample_weight=sample_weight)
    logits, graph = samples.logits, samples.tax
    if multi_hot.shape != shape:
        raise ValueError(f"multi_hot must have shape {tuple(shape)}, got {tuple(multi_hot.shape)}")
    label = check_scores("multi_hot", multi_hot.to(logits.dtype), graph.num_nodes)
    require(((label == 0) | (label == 1)).all(1), lambda row: f"multi_hot must hold 0 and 1, row {row} does not")
    if not torch.compiler.is_compiling():
        lost = label.index_select(1, graph.edge_child) > label.index_select(1, graph.edge_parent)
        require(~lost.any(1), lambda row: _not_closed(lost, row, graph))
    if pos_weight is not None:
        pos_weight = check_class_weights(pos_weight, logits, graph.num_nodes, "pos_weight")
    positive = label == 1
    right = mcm(torch.where(positive, logits, -torch.inf), graph)
    score = torch.where(positive, right, mcm(logits, graph))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(score, label, pos_weight=pos_weight, reduction="none")
    weight = torch.ones_like(loss) if samples.weight is None else samples.weight[:, None].expand_as(loss)
    loss = loss * weight
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in (shape, shape[1:2]):
            raise ValueError(
                f"mask must be bool of shape {tuple(shape)} or {tuple(shape[1:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        mask = mask if mask.ndim == 1 else mask.movedim(1, -1).reshape(loss.shape)
        loss, weight = torch.where(mask, loss, 0.0), torch.where(mask, weight, 0.0)
    if reduction == "none":
        return loss if len(shape) == 2 else loss.view(*samples.shape, -1).movedim(-1, 1)
    mass = weight.sum()
    return loss.sum() if reduction == "sum" else loss.sum() / torch.where(mass > 0, mass, 1.0)


def _not_closed(lost: Tensor, row: int, graph: Tree | LabelGraph) -> str:
    edge = int(lost[row].nonzero()[0, 0])
    child, parent = int(graph.edge_child[edge]), int(graph.edge_parent[edge])
    return (
        f"multi_hot must be closed upwards: row {row} has node {child} ({graph.names[child]!r}) "
        f"without its parent {parent} ({graph.names[parent]!r}); see mcm"
    )
