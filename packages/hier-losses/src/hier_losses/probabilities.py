"""Probabilities of nodes and levels out of node or leaf scores.

Reference for the product of conditional softmaxes: Redmon and Farhadi 2017, "YOLO9000", section 4.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hier_losses.functional._inputs import check_choice, check_matrix
from hier_losses.functional.tree_ops import (
    ancestor_sum,
    conditional_log_softmax,
    leaves_to_nodes,
    subtree_logsumexp,
    subtree_sum,
)
from hier_losses.taxonomy import Taxonomy


def leaf_columns(logits: Float[Tensor, "batch scores"], tax: Taxonomy) -> Float[Tensor, "batch leaves"]:
    """Return the leaf scores out of one score per node or per leaf, in at least single precision.

    Args:
        logits: one score per node, or one per leaf.
        tax: the taxonomy.

    Returns:
        Scores in the order of `tax.leaf`.

    Raises:
        ValueError: another width.
    """
    tax = tax.to(logits.device)
    if logits.ndim == 2 and logits.shape[1] == tax.num_nodes:
        nodes = check_matrix("logits", logits, tax.num_nodes)
        return nodes[:, -tax.num_leaves :] if tax.leaves_on_one_level else nodes.index_select(1, tax.leaf)
    if logits.ndim == 2 and logits.shape[1] == tax.num_leaves:
        return check_matrix("logits", logits, tax.num_leaves)
    raise ValueError(
        f"logits must have shape (batch, {tax.num_nodes}), one score per node, or (batch, {tax.num_leaves}), one per "
        f"leaf, got {tuple(logits.shape)}"
    )


def leaf_to_node_logits(leaf_logits: Float[Tensor, "batch leaves"], tax: Taxonomy) -> Float[Tensor, "batch nodes"]:
    """Give a leaf-only classifier a score for every node: `z_v = log sum_{leaves k under v} exp z_k`.

    The softmax over any set of nodes that partitions the leaves (a level, a sibling group, a tree cut) then equals the
    sums of the leaf probabilities, so every decoder and metric for node logits applies.

    Args:
        leaf_logits: one score per leaf, in the order of `tax.leaf`.
        tax: the taxonomy.

    Returns:
        One score per node, at least single precision.

    Raises:
        ValueError: wrong width.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> z = torch.tensor([[0.0, 1.0, 1.0]])  # leaves in the order b, x, y
    >>> leaf_to_node_logits(z, tax).softmax(-1).shape
    torch.Size([1, 4])
    """
    leaf_logits = check_matrix("leaf_logits", leaf_logits, tax.num_leaves)
    return subtree_logsumexp(leaves_to_nodes(leaf_logits, tax, -torch.inf), tax)


def node_probabilities(
    logits: Float[Tensor, "batch scores"], tax: Taxonomy, *, probabilities: str = "leaf"
) -> Float[Tensor, "batch nodes"]:
    """Return P(v), the probability that the true leaf lies at or below each node.

    leaf: the softmax over all leaves, summed below v. conditional: the product over the path of v of the softmax among
    siblings, as `conditional_softmax_nll` trains it.

    Args:
        logits: one score per node (leaf: only the leaves count, and one score per leaf is enough).
        tax: the taxonomy.
        probabilities: "leaf" or "conditional".

    Returns:
        Values in [0, 1]; each sibling group sums to its parent's, the top nodes to 1.

    Raises:
        ValueError: wrong width, unknown probabilities.
    """
    check_choice("probabilities", probabilities, ("leaf", "conditional"))
    tax = tax.to(logits.device)
    if probabilities == "conditional":
        return ancestor_sum(conditional_log_softmax(check_matrix("logits", logits, tax.num_nodes), tax), tax).exp()
    return subtree_sum(leaves_to_nodes(leaf_columns(logits, tax).softmax(-1), tax), tax)


def extended_level(tax: Taxonomy, level: int) -> Int[Tensor, " classes"]:
    """Return the classes of an extended level: the nodes of the level and all shallower leaves, ascending.

    Args:
        tax: the taxonomy.
        level: 1 (top) to D.

    Returns:
        Node ids; their subtrees partition the leaves.

    Raises:
        ValueError: no such level.
    """
    if not 1 <= level <= tax.num_levels:
        raise ValueError(f"level must lie in [1, {tax.num_levels}], got {level}")
    shallow = tax.leaf[tax.depth[tax.leaf] < level]
    nodes = torch.arange(sum(tax.level_sizes[: level - 1]), sum(tax.level_sizes[:level]), device=tax.device)
    return torch.cat([shallow, nodes])


def level_probabilities(logits: Float[Tensor, "batch nodes"], tax: Taxonomy) -> list[Float[Tensor, "batch classes"]]:
    """Return the softmax over each extended level.

    Args:
        logits: one score per node.
        tax: the taxonomy.

    Returns:
        D tensors, top level first; the columns of level l are the nodes of `extended_level(tax, l)`. Rows sum to 1 in
        at least single precision.

    Raises:
        ValueError: wrong width.
    """
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    levels = range(1, tax.num_levels + 1)
    return [logits.index_select(1, extended_level(tax, level)).softmax(-1) for level in levels]
