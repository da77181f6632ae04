"""Per-level terms that several losses share: log-sum-exps, target logits and sibling groups along the target's path.

Level cross-entropy, tree-path KL, HiSCE and their weighted sum are linear in the terms of one autograd function, whose
forward and backward each read the logits once: that is what lets them cost about as much as one cross-entropy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional._kernels import can_look, finite, safe_logaddexp, safe_logsumexp


class LevelTerms(NamedTuple):
    """What the level losses read; sample b has a target on some of the D levels.

    Attributes:
        logits: (B, N) at least float32.
        path: (B, D) target node per level, 0 where there is none.
        valid: (B, D) whether there is a target on that level.
        lse: (B, D) log-sum-exp over the classes of each level.
        score: (B, D) logit of the target on each level.
        others: over the siblings of the target on each level, (B, D) each: weighted sum of their logits, sum of their
            weights and number; None unless asked for. A sibling with logit -inf is no class and left out.
    """

    logits: Tensor
    path: Tensor
    valid: Tensor
    lse: Tensor
    score: Tensor
    others: tuple[Tensor, ...] | None

    @property
    def nll(self) -> Tensor:
        """Cross-entropy per level, (B, D); meaningless where not valid."""
        return self.lse - self.score


def level_terms(
    logits: Tensor,
    target: Tensor,
    tax: Tree,
    levels: str = "ragged",
    siblings: bool = False,
    class_weights: Tensor | None = None,
) -> LevelTerms:
    """Return the terms over the nodes of each level, or over each level and the shallower leaves."""
    own_level = tax.paths[target]
    own = own_level.clamp(min=0)
    path = own_level
    if levels == "extended":
        repeats = (path < 0) & (tax.leaf_index[target] >= 0)[:, None]
        path = torch.where(repeats, target[:, None], path)
    valid = path >= 0
    path = path.clamp(min=0)
    padded = siblings and own.shape[1] * tax.max_group_size < tax.num_nodes
    node, member = _siblings(own, tax) if padded else (own[..., None][..., :0], valid[..., None][..., :0])
    share = None if class_weights is None else class_weights[node]
    lse, score, total, alive = _PathTerms.apply(logits, path, node, member, share, tax.level_sizes)
    if levels == "extended":
        lse = safe_logaddexp(lse, shallow_logsumexp(logits, tax))
    others: tuple[Tensor, ...] | None = None
    if padded:
        count = alive.sum(-1).to(logits.dtype)
        others = total, count if share is None else torch.where(alive, share, 0.0).sum(-1), count
    elif siblings:
        others = over_sibling_groups(logits, own, tax, _sums_of_others(class_weights)).unbind(-1)
    if others is not None and levels == "extended":
        # Below its own level a repeated leaf shares with those siblings that are leaves.
        leaves = over_sibling_groups(logits, own, tax, _sums_of_others(class_weights, tax.leaf_index >= 0))
        last = (tax.depth[target] - 1)[:, None, None].expand(-1, 1, 3)
        below = leaves.gather(1, last).unbind(-1)
        others = tuple(torch.where(own_level >= 0, a, b) for a, b in zip(others, below, strict=True))
    return LevelTerms(logits, path, valid, lse, score, others)


def _siblings(path: Tensor, tax: Tree) -> tuple[Tensor, Tensor]:
    """Padded ids of the siblings of each path node, itself not among them, and which are real."""
    group = tax.parent[path] + 1
    offset = torch.arange(tax.max_group_size, device=path.device)
    node = tax.group_start[group][..., None] + offset
    member = (offset < tax.group_size[group][..., None]) & (node != path[..., None])
    return torch.where(member, node, 0), member


def _sums_of_others(weights: Tensor | None, allowed: Tensor | None = None) -> Callable[..., Tensor]:
    """Make a reducer for `over_sibling_groups`: the three entries of `LevelTerms.others`."""

    def reduce(values: Tensor, node: Tensor, member: Tensor, own: Tensor) -> Tensor:
        others = member & (node != own) & (values != -torch.inf)
        if allowed is not None:
            others = others & allowed[node]
        count = others.sum(-1).to(values.dtype)
        if weights is None:
            return torch.stack([torch.where(others, values, 0.0).sum(-1), count, count], -1)
        weight = weights[node]
        total = torch.where(others, weight * values, 0.0).sum(-1)
        return torch.stack([total, torch.where(others, weight, 0.0).sum(-1), count], -1)

    return reduce


class _PathTerms(torch.autograd.Function):
    """Log-sum-exp of each level, logits along the path and sums over siblings, in one pass each way.

    The backward pass writes one (B, N) gradient, where autograd would add up one per term, and recomputes the softmax
    instead of keeping it. It consists of differentiable operations, so second derivatives work.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, path: Tensor, node: Tensor, member: Tensor, share: Tensor | None, sizes: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lse = []
        for level in logits.split(sizes, 1):
            peak = finite(level.amax(1, keepdim=True))
            lse.append((level - peak).exp_().sum(1, keepdim=True).log_().add_(peak))
        values = logits.gather(1, node.flatten(1)).view(node.shape)
        # Not "> -inf", so that NaN stays in.
        alive = member & (values != -torch.inf)
        total = torch.where(alive, values if share is None else share * values, 0.0).sum(-1)
        return torch.cat(lse, 1), logits.gather(1, path), total, alive

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        logits, path, node, _, share, ctx.sizes = inputs
        lse, _, _, alive = output
        ctx.mark_non_differentiable(alive)
        ctx.save_for_backward(logits, path, node, share, alive, lse)

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, grad_score: Tensor, grad_total: Tensor, _: Any) -> tuple:
        logits, path, node, share, alive, lse = ctx.saved_tensors
        shift = finite(lse)
        columns = list(zip(logits.split(ctx.sizes, 1), shift.split(1, 1), grad_lse.split(1, 1), strict=True))
        each = torch.where(alive, grad_total[..., None] if share is None else share * grad_total[..., None], 0.0)
        # Apart from zeros no entry is added to twice, so the order of the additions does not matter.
        flat = node.shape[0], node.shape[1] * node.shape[2]
        index = torch.cat([path, node.view(flat)], 1)
        added = torch.cat([grad_score, each.view(flat)], 1)
        if not torch.is_grad_enabled() and can_look(logits, grad_lse):
            # One buffer: fresh memory costs more here than the exponentials.
            grad = torch.empty_like(logits)
            for (level, at, scale), rows in zip(columns, grad.split(ctx.sizes, 1), strict=True):
                torch.sub(level, at, out=rows).exp_().mul_(scale)
            return grad.scatter_add_(1, index, added), None, None, None, None, None
        grad = torch.cat([(level - at).exp() * scale for level, at, scale in columns], 1)
        # Not in place: torch 2.6 has no rule for that under vmap.
        return grad.scatter_add(1, index, added), None, None, None, None, None


def nll_over(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row and its entry at the target, (B,) each, whose gradients are written as one."""
    nothing = target[:, None, None][..., :0]
    lse, score, _, _ = _PathTerms.apply(values, target[:, None], nothing, nothing.bool(), None, (values.shape[1],))
    return lse[:, 0], score[:, 0]


def shallow_logsumexp(logits: Tensor, tax: Tree) -> Tensor:
    """Log-sum-exp over the leaves above each level, (B, D); -inf where there are none, as on the top level."""
    if tax.leaves_on_one_level:
        return logits.new_full((logits.shape[0], tax.num_levels), -torch.inf)
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


def group_mean(values: Tensor, node: Tensor, member: Tensor, own: Tensor) -> Tensor:
    """Mean over a sibling group without its classes of logit -inf; a reducer for `over_sibling_groups`."""
    alive = member & (values != -torch.inf)
    return torch.where(alive, values, 0.0).sum(-1) / alive.sum(-1).clamp(min=1)
