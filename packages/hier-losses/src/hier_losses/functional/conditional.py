"""Losses on conditional and subtree probabilities of node logits.

References: Redmon and Farhadi (2017, "YOLO9000", section 4, softmax per sibling group); Cultrera di Montesano et al.
(2026, "Improving atlas-scale single-cell annotation models with hierarchical cross-entropy loss", Nature Computational
Science); Deng et al. (2014, "Large-Scale Object Classification Using Label Relation Graphs", eq. 2) and Chen et al.
(2022, "Label Relation Graphs Enhanced Hierarchical Residual Network", CVPR, the probabilistic loss).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._inputs import (
    Reduction,
    check_choice,
    check_matrix,
    check_reduction,
    check_target,
    reduce_batch,
)
from hier_losses.functional._kernels import safe_logsumexp
from hier_losses.functional._terms import group_lse, over_sibling_groups
from hier_losses.functional.tree_ops import ancestor_sum
from hier_losses.graph import LabelGraph


def conditional_softmax_nll(
    logits: Float[Tensor, "batch nodes"],
    target: Tensor,
    tax: Tree,
    *,
    alpha: float = 0.0,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Negative log-likelihood of the path when each sibling group has a softmax of its own.

    $\sum_{l \le L} e^{-\alpha(l-1)}\,[lse(group(v_l)) - z_{v_l}]$; for alpha = 0 it is $-\log P(y)$, and the leaf
    probabilities sum to 1. Only the groups on the path are read. A lone child has probability 1 and no gradient.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B,) integer node ids; an internal target is the likelihood of its subtree.
        tax: the tree.
        alpha: discount per level, finite.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B,) for "none"; at least 0.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer, an alpha that is not finite.

    >>> from hier_losses.taxonomy import Taxonomy
    >>> tax = Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])
    >>> round(conditional_softmax_nll(torch.zeros(1, 4), torch.tensor([1]), tax).item(), 4)  # log 2
    0.6931
    """
    check_reduction(reduction)
    if not abs(alpha) < float("inf"):
        raise ValueError(f"alpha must be finite, got {alpha}")
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    target = check_target(target, logits.shape[0], tax)
    path = tax.paths[target]
    valid, path = path >= 0, path.clamp(min=0)
    nll = over_sibling_groups(logits, path, tax, group_lse) - logits.gather(1, path)
    discount = torch.exp(-alpha * torch.arange(tax.num_levels, device=logits.device, dtype=logits.dtype))
    return reduce_batch(torch.where(valid, nll * discount, 0.0).sum(1), reduction)


def hce(
    logits: Float[Tensor, "batch nodes"],
    target: Tensor,
    graph: Tree | LabelGraph,
    *,
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Hierarchical cross-entropy: the softmax mass of the target and everything below it.

    $HCE = lse(z) - lse_{u \preceq y}(z_u)$ over node logits, without the constant that the published code adds inside
    the logarithm. For a leaf of a tree it is the cross-entropy over all nodes.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B,) integer node ids.
        graph: a tree, or a label graph with several parents per node, where each descendant counts once.
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B,) for "none"; at least 0.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer.
    """
    check_reduction(reduction)
    logits = check_matrix("logits", logits, graph.num_nodes)
    graph = graph.to(logits.device)
    target = check_target(target, logits.shape[0], graph)
    inside = torch.where(descendant_mask(target, graph), logits, -torch.inf)
    return reduce_batch(logits.logsumexp(1) - safe_logsumexp(inside), reduction)


def hrn_tree_loss(
    logits: Float[Tensor, "batch nodes"],
    target: Tensor,
    tax: Tree,
    *,
    activation: str = "sigmoid",
    reduction: Reduction | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Negative log marginal of a node over the legal label sets of a tree.

    A legal set is empty or a path from the top, so $Z = 1 + \sum_v e^{s_v}$, $s_v = \sum_{u \succeq v} f_u$ summed over
    ancestors-or-self, and $P(y) = \sum_{v \preceq y} e^{s_v} / Z$. The hierarchical residual network uses
    $f = \sigma(z)$ and adds a leaf cross-entropy where the label is a leaf; label relation graphs use f = z.

    Args:
        logits: one logit per node; half precision is computed in float32.
        target: (B,) integer node ids, internal nodes included.
        tax: the tree.
        activation: "sigmoid" (Chen et al. 2022) or "identity" (Deng et al. 2014).
        reduction: "mean", "sum" or "none" over samples.

    Returns:
        A scalar, or (B,) for "none"; at least 0. With "sigmoid" it cannot reach 0: potentials are below 1.

    Raises:
        ValueError: a wrong width, a target outside [0, N) or not integer, an unknown activation.
    """
    check_choice("activation", activation, ("sigmoid", "identity"))
    check_reduction(reduction)
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    target = check_target(target, logits.shape[0], tax)
    score = ancestor_sum(logits.sigmoid() if activation == "sigmoid" else logits, tax)
    inside = torch.where(descendant_mask(target, tax), score, -torch.inf)
    lse = torch.logaddexp(score.logsumexp(1), torch.zeros_like(score[:, 0]))
    return reduce_batch(lse - safe_logsumexp(inside), reduction)


def descendant_mask(target: Tensor, graph: Tree | LabelGraph) -> Tensor:
    """Mark the descendants-or-self of each target, (B, N) bool."""
    if isinstance(graph, Tree):
        # Leaf intervals nest, and a lone chain shares its interval: the depth tells its nodes apart.
        start = graph.leaf_start[target][:, None]
        inside = (graph.leaf_start >= start) & (graph.leaf_start < start + graph.n_leaves[target][:, None])
        return inside & (graph.depth >= graph.depth[target][:, None])
    hit = (graph.descendant_row[:, None] == target).int()
    return hit.new_zeros(graph.num_nodes, len(target)).index_add(0, graph.descendant, hit).T > 0
