"""Per-level terms that several losses share: log-sum-exps, target logits and sibling groups along the target's path."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._kernels import safe_logaddexp, safe_logsumexp


class LevelTerms(NamedTuple):
    """What the level losses read; L_b is the number of levels that sample b has a target on.

    Attributes:
        logits: (B, N) at least float32.
        path: (B, D) target node per level, 0 where there is none.
        valid: (B, D) whether there is a target on that level.
        lse: (B, D) log-sum-exp over the classes of each level.
        score: (B, D) logit of the target on each level.
    """

    logits: Tensor
    path: Tensor
    valid: Tensor
    lse: Tensor
    score: Tensor

    @property
    def nll(self) -> Tensor:
        """Cross-entropy per level, (B, D); meaningless where not valid."""
        return self.lse - self.score


def level_terms(logits: Tensor, target: Tensor, tax: Tree, levels: str = "ragged") -> LevelTerms:
    """Return the terms over the nodes of each level, or over each level and the shallower leaves."""
    path = tax.paths[target]
    lse = torch.stack([level.logsumexp(1) for level in logits.split(tax.level_sizes, 1)], 1)
    if levels == "extended":
        repeats = (path < 0) & (tax.leaf_index[target] >= 0)[:, None]
        path = torch.where(repeats, target[:, None], path)
        lse = safe_logaddexp(lse, shallow_logsumexp(logits, tax))
    valid = path >= 0
    path = path.clamp(min=0)
    return LevelTerms(logits, path, valid, lse, logits.gather(1, path))


def shallow_logsumexp(logits: Tensor, tax: Tree) -> Tensor:
    """Log-sum-exp over the leaves above each level, (B, D); -inf where there are none, as on the top level."""
    leaves = torch.where(tax.leaf_index >= 0, logits, -torch.inf).split(tax.level_sizes, 1)
    per_level = torch.stack([safe_logsumexp(level) for level in leaves], 1)
    above = torch.ones(tax.num_levels, tax.num_levels, dtype=torch.bool, device=logits.device).tril(-1)
    return safe_logsumexp(torch.where(above, per_level[:, None], -torch.inf))


def shallow_sum(values: Tensor, tax: Tree) -> Tensor:
    """Sum over the leaves above each level, (B, D)."""
    leaves = torch.where(tax.leaf_index >= 0, values, 0.0).split(tax.level_sizes, 1)
    per_level = torch.stack([level.sum(1) for level in leaves], 1)
    above = torch.ones(tax.num_levels, tax.num_levels, dtype=torch.bool, device=values.device).tril(-1)
    return torch.where(above, per_level[:, None], 0.0).sum(2)


def over_sibling_groups(
    logits: Tensor, path: Tensor, tax: Tree, reduce: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Reduce the sibling group of each path node, (B, D) nodes -> (B, D) values.

    Both ways are deterministic on CUDA: no node is gathered twice in a row, and nothing is added by index.

    Args:
        logits: (B, N).
        path: (B, D) node ids on their own level, clamped to 0 where there is none (the result there is arbitrary).
        tax: the tree.
        reduce: takes values, their node ids, the mask of group members and the path node, of shapes that broadcast,
            and reduces the last dimension; the mask may be empty.
    """
    parent = tax.parent[path]
    if path.shape[1] * tax.max_group_size < tax.num_nodes:
        offset = torch.arange(tax.max_group_size, device=path.device)
        member = offset < tax.group_size[parent + 1][..., None]
        node = torch.where(member, tax.group_start[parent + 1][..., None] + offset, 0)
        return reduce(logits.gather(1, node.flatten(1)).view(node.shape), node, member, path[..., None])
    columns = []
    ids = torch.arange(tax.num_nodes, device=path.device).split(tax.level_sizes)
    above = tax.parent.split(tax.level_sizes)
    for level, values in enumerate(logits.split(tax.level_sizes, 1)):
        columns.append(reduce(values, ids[level], above[level] == parent[:, level, None], path[:, level, None]))
    return torch.stack(columns, 1)


def group_lse(values: Tensor, node: Tensor, member: Tensor, own: Tensor) -> Tensor:
    """Log-sum-exp over a sibling group; a reducer for `over_sibling_groups`."""
    return safe_logsumexp(torch.where(member, values, -torch.inf))
