"""Losses and tree operations as pure functions; `hier_losses.losses` has each loss as a module."""

from hier_losses.functional.conditional import conditional_softmax_nll, hce, hrn_tree_loss
from hier_losses.functional.consistency import parent_child_consistency
from hier_losses.functional.leaf import hxe, soft_label_ce
from hier_losses.functional.level import hisce, level_cross_entropy, semantic_softmax, semantic_softmax_weights
from hier_losses.functional.multilabel import mc_loss, mcm
from hier_losses.functional.path import path_probs, tp_kl
from hier_losses.functional.total import hierarchy_aware_loss, hierarchy_aware_parts
from hier_losses.functional.tree_ops import (
    ancestor_sum,
    conditional_log_softmax,
    group_logsumexp,
    lca_depth,
    lca_height,
    leaves_to_nodes,
    path_lca_depth,
    subtree_logsumexp,
    subtree_max,
    subtree_sum,
)

__all__ = [
    "ancestor_sum",
    "conditional_log_softmax",
    "conditional_softmax_nll",
    "group_logsumexp",
    "hce",
    "hierarchy_aware_loss",
    "hierarchy_aware_parts",
    "hisce",
    "hrn_tree_loss",
    "hxe",
    "lca_depth",
    "lca_height",
    "leaves_to_nodes",
    "level_cross_entropy",
    "mc_loss",
    "mcm",
    "parent_child_consistency",
    "path_lca_depth",
    "path_probs",
    "semantic_softmax",
    "semantic_softmax_weights",
    "soft_label_ce",
    "subtree_logsumexp",
    "subtree_max",
    "subtree_sum",
    "tp_kl",
]
