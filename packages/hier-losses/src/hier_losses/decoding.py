"""Decoders: from scores to one root-to-node path per sample.

References: Karthik et al. 2021, "No Cost Likelihood Manipulation at Test Time for Making Better Mistakes" (conditional
risk minimisation); Deng et al. 2012, "Hedging Your Bets" (stopping at an internal node); Wu et al. 2020, "Solving
Long-tailed Recognition with Deep Realistic Taxonomic Classifier" (greedy descent with a confidence threshold).

A padded path is a row of D node ids, top node first, with -1 below its last node; the virtual root is a row of -1.
An extended path repeats its leaf instead. Ties go to the smaller node id.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hier_losses.functional._inputs import check_choice, check_matrix
from hier_losses.functional._terms import shallow_logsumexp
from hier_losses.functional.tree_ops import ancestor_sum
from hier_losses.path_ops import paths_of
from hier_losses.probabilities import leaf_columns, node_probabilities
from hier_losses.taxonomy import Taxonomy


def level_argmax(logits: Float[Tensor, "batch nodes"], tax: Taxonomy) -> Int[Tensor, "batch depth"]:
    """Take the best class of every extended level by itself: `h_l = argmax_{v in C_l^ext} z_v`.

    This is the only decoder whose paths can be inconsistent; `tice` counts how often they are.

    Args:
        logits: one score per node.
        tax: the taxonomy.

    Returns:
        Extended paths, entry l in `extended_level(tax, l)`.

    Raises:
        ValueError: wrong width.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> level_argmax(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), tax)
    tensor([[1, 2]])
    """
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    internal = tax.leaf_index < 0
    # The leaves above a level compete on it too: carry the best of them down instead of gathering each extended level.
    best_leaf = logits.new_full((logits.shape[0],), -torch.inf)
    best_leaf_id = torch.full_like(best_leaf, -1, dtype=torch.int64)
    columns, start = [], 0
    for level, size in zip(logits.split(tax.level_sizes, 1), tax.level_sizes, strict=True):
        value, index = level.max(1)
        from_above = (best_leaf >= value) & (best_leaf_id >= 0)
        columns.append(torch.where(from_above, best_leaf_id, index + start))
        value, index = level.masked_fill(internal[start : start + size], -torch.inf).max(1)
        better = (value > best_leaf) | ((best_leaf_id < 0) & (value == best_leaf) & ~internal[index + start])
        best_leaf = torch.where(better, value, best_leaf)
        best_leaf_id = torch.where(better, index + start, best_leaf_id)
        start += size
    return torch.stack(columns, 1)


def bottom_up(logits: Float[Tensor, "batch scores"], tax: Taxonomy) -> Int[Tensor, "batch depth"]:
    """Take the best leaf, `argmax_k z_k`, and its ancestors.

    Args:
        logits: one score per node, of which only the leaves count, or one per leaf.
        tax: the taxonomy.

    Returns:
        Padded paths to leaves.

    Raises:
        ValueError: wrong width.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> bottom_up(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), tax)
    tensor([[0, 2]])
    """
    tax = tax.to(logits.device)
    return tax.paths[tax.leaf[leaf_columns(logits, tax).argmax(1)]]


def top_k_paths(logits: Float[Tensor, "batch scores"], tax: Taxonomy, k: int) -> Int[Tensor, "batch k depth"]:
    """Return the paths of the k best leaves, best first; the first is `bottom_up`.

    Args:
        logits: one score per node, of which only the leaves count, or one per leaf.
        tax: the taxonomy.
        k: number of leaves, in [1, K].

    Returns:
        Padded paths, as the metrics at rank k take them.

    Raises:
        ValueError: wrong width, k out of range.
    """
    tax = tax.to(logits.device)
    if not 1 <= k <= tax.num_leaves:
        raise ValueError(f"k must lie in [1, {tax.num_leaves}], got {k}")
    return tax.paths[tax.leaf[_best(leaf_columns(logits, tax), k)]]


def _best(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest scores, the smaller column first among equals."""
    if not torch.compiler.is_compiling():
        # topk orders ties freely. Without a tie at the last place its set is right, and a small sort orders it.
        values, ranks = scores.topk(k, dim=1)
        if ((scores >= values[:, -1:]).sum(1) == k).all():
            ranks = ranks.sort(dim=1).values
            order = scores.gather(1, ranks).sort(stable=True, dim=1, descending=True).indices
            return ranks.gather(1, order)
    return scores.sort(stable=True, dim=1, descending=True).indices[:, :k]


def _descend(scores: Tensor, tax: Taxonomy) -> Tensor:
    """Follow the best child from the root to a leaf; only the groups on the way are read."""
    offset = torch.arange(tax.max_group_size, device=scores.device)
    group = torch.zeros_like(scores[:, 0], dtype=torch.int64)
    columns = []
    for _ in range(tax.num_levels):
        start, size = tax.group_start[group], tax.group_size[group]
        member = offset < size[:, None]
        values = scores.gather(1, torch.where(member, start[:, None] + offset, 0))
        child = start + torch.where(member, values, -torch.inf).argmax(1)
        columns.append(torch.where(size > 0, child, -1))
        # A finished path stays at its leaf, whose group is empty.
        group = torch.where(size > 0, child + 1, group)
    return torch.stack(columns, 1)


def top_down(logits: Float[Tensor, "batch nodes"], tax: Taxonomy) -> Int[Tensor, "batch depth"]:
    """Walk from the root, each time to the best child, until a leaf.

    Args:
        logits: one score per node; only comparisons among siblings count.
        tax: the taxonomy.

    Returns:
        Padded paths to leaves.

    Raises:
        ValueError: wrong width.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> top_down(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), tax)
    tensor([[ 1, -1]])
    """
    tax = tax.to(logits.device)
    return _descend(check_matrix("logits", logits, tax.num_nodes), tax)


def joint_path_scores(logits: Float[Tensor, "batch nodes"], tax: Taxonomy) -> Float[Tensor, "batch leaves"]:
    """Score every leaf by the product of the level softmaxes along its path.

    `s_k = sum_l log p^l(E_l(k))`, with p^l the softmax over the extended level l and E_l(k) the ancestor of k on level
    l, or k itself where k lies above l.

    Args:
        logits: one score per node.
        tax: the taxonomy.

    Returns:
        Log scores <= 0, in the order of `tax.leaf`.

    Raises:
        ValueError: wrong width.
    """
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    level_lse = torch.stack([level.logsumexp(1) for level in logits.split(tax.level_sizes, 1)], 1)
    norm = torch.logaddexp(level_lse, shallow_logsumexp(logits, tax)).sum(1)
    return _path_sums(logits, tax) - norm[:, None]


def _path_sums(logits: Tensor, tax: Taxonomy) -> Tensor:
    """Sum of the logits along the extended path of every leaf, (B, K): the joint score but for a constant of the row."""
    # Row by row down the levels: parents stand in order, so that each step reads memory in order.
    levels, parents = list(logits.split(tax.level_sizes, 1)), tax.parent.split(tax.level_sizes)
    first = 0
    for level in range(1, tax.num_levels):
        levels[level] = levels[level] + levels[level - 1].index_select(1, parents[level] - first)
        first += tax.level_sizes[level - 1]
    if tax.leaves_on_one_level:
        return levels[-1]  # no leaf above the last level
    repeats = tax.num_levels - tax.depth[tax.leaf]
    along_path = torch.cat(levels, 1).index_select(1, tax.leaf)
    # Where nothing is repeated 0 * -inf would turn a masked leaf into NaN.
    again = torch.where(repeats > 0, repeats * logits.index_select(1, tax.leaf), 0.0)
    return along_path + again


def joint_path(logits: Float[Tensor, "batch nodes"], tax: Taxonomy) -> Int[Tensor, "batch depth"]:
    """Take the consistent path with the largest product of level softmaxes, `argmax_k sum_l log p^l(E_l(k))`.

    Args:
        logits: one score per node.
        tax: the taxonomy.

    Returns:
        Padded paths to leaves.

    Raises:
        ValueError: wrong width.
    """
    logits = check_matrix("logits", logits, tax.num_nodes)
    tax = tax.to(logits.device)
    return tax.paths[tax.leaf[_path_sums(logits, tax).argmax(1)]]


def crm_risk(
    logits: Float[Tensor, "batch scores"], tax: Taxonomy, *, distance: str = "height", probabilities: str = "leaf"
) -> Float[Tensor, "batch nodes"]:
    """Return the expected distance between each node and the true leaf, in O(B N).

    height: `R(k) = h(root) - sum_{v on path(k)} P(v) (h(parent v) - h(v))`, the mean of d = h(LCA);
    edge: `R(k) = E[depth(y)] + sum_{v on path(k)} (1 - 2 P(v))`, the mean number of edges between k and y.

    Args:
        logits: one score per node, or per leaf, see `node_probabilities`.
        tax: the taxonomy.
        distance: "height" or "edge".
        probabilities: where P comes from, see `node_probabilities`.

    Returns:
        Risk of every node, at least 0 up to rounding.

    Raises:
        ValueError: wrong width, unknown distance or probabilities.
    """
    check_choice("distance", distance, ("height", "edge"))
    tax = tax.to(logits.device)
    return _risk(node_probabilities(logits, tax, probabilities=probabilities), tax, distance)


def _risk(marginals: Tensor, tax: Taxonomy, distance: str) -> Tensor:
    if distance == "height":
        above = torch.where(tax.parent >= 0, tax.height[tax.parent.clamp(min=0)], tax.root_height)
        return tax.root_height - ancestor_sum(marginals * (above - tax.height).to(marginals.dtype), tax)
    # Each ancestor-or-self of the true leaf is one edge below the root: E[depth(y)] is the sum of all marginals.
    return marginals.sum(1, keepdim=True) + ancestor_sum(1 - 2 * marginals, tax)


def crm(
    logits: Float[Tensor, "batch scores"],
    tax: Taxonomy,
    *,
    candidates: str = "leaves",
    distance: str = "height",
    probabilities: str = "leaf",
) -> Int[Tensor, "batch depth"]:
    """Take the node of least expected distance to the truth (conditional risk minimisation).

    With `distance="height"` no node has a smaller risk than its best child, so `candidates="nodes"` still ends in a
    leaf wherever probabilities do not vanish. To let the decoder stop early use `distance="edge"`: among all nodes and
    the root it then follows the branch that holds more than half of the probability.

    Args:
        logits: one score per node, or per leaf, see `node_probabilities`.
        tax: the taxonomy.
        candidates: "leaves", or "nodes" for every node and the virtual root.
        distance: "height" or "edge", see `crm_risk`.
        probabilities: where P comes from, see `node_probabilities`.

    Returns:
        Padded paths.

    Raises:
        ValueError: wrong width, unknown candidates, distance or probabilities.
    """
    check_choice("candidates", candidates, ("leaves", "nodes"))
    check_choice("distance", distance, ("height", "edge"))
    tax = tax.to(logits.device)
    marginals = node_probabilities(logits, tax, probabilities=probabilities)
    risk = _risk(marginals, tax, distance)
    if candidates == "leaves":
        return tax.paths[tax.leaf[leaf_columns(risk, tax).argmin(1)]]
    if distance == "height":
        root = torch.full_like(risk[:, :1], tax.root_height)
    else:
        root = marginals.sum(1, keepdim=True)
    return paths_of(torch.cat([root, risk], 1).argmin(1) - 1, tax)


def threshold(
    logits: Float[Tensor, "batch scores"], tax: Taxonomy, tau: float, *, probabilities: str = "leaf"
) -> Int[Tensor, "batch depth"]:
    """Walk down along the largest P(v) and stop before it falls below tau.

    Args:
        logits: one score per node, or per leaf, see `node_probabilities`.
        tax: the taxonomy.
        tau: least probability of the returned node, in (0, 1].
        probabilities: where P comes from, see `node_probabilities`.

    Returns:
        Padded paths to leaves or internal nodes; a row of -1 where no top node reaches tau.

    Raises:
        ValueError: wrong width, tau out of range, unknown probabilities.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> threshold(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), tax, tau=0.6)
    tensor([[ 0, -1]])
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau must lie in (0, 1], got {tau}")
    tax = tax.to(logits.device)
    marginals = node_probabilities(logits, tax, probabilities=probabilities)
    # The top nodes hold all the mass by definition, but only up to rounding: tau = 1 above a lone top node needs 1.
    total = marginals[:, : tax.level_sizes[0]].sum(1, keepdim=True)
    paths = _descend(marginals, tax)
    reached = marginals.gather(1, paths.clamp(min=0)) / total >= tau
    return torch.where(reached, paths, -1)
