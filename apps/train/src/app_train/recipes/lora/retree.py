"""Taxonomies with wrong edges over the same nodes, to see how much a method leans on the tree being right.

A tree with other edges numbers its nodes anew, so it comes with the order that carries logits and targets over.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hier_losses import Taxonomy


@dataclass(frozen=True)
class OtherEdges:
    """A tree over the nodes of another one.

    Attributes:
        taxonomy: the tree with other edges; its node u is node `order[u]` of the original.
        order: original node of each node here, (N,).
        position: node here of each original node, (N,).
        changed: number of edges that differ.
    """

    taxonomy: Taxonomy
    order: Tensor
    position: Tensor
    changed: int

    def carry(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets in the numbering of this tree."""
        return logits[:, self.order], self.position[target]


def with_parents(tax: Taxonomy, parents: list[int]) -> OtherEdges:
    """The tree over the same nodes with these parents (-1 for top nodes)."""
    # Names only tell nodes apart here: the losses read edges, not names.
    edges = [(None if up < 0 else f"v{up}", f"v{node}") for node, up in enumerate(parents)]
    other = Taxonomy.from_edges(edges)
    order = torch.tensor([int(name[1:]) for name in other.names])
    changed = int((torch.tensor(parents) != tax.parent).sum())
    return OtherEdges(other, order, order.argsort(), changed)


def rewire(tax: Taxonomy, share: float, seed: int) -> OtherEdges:
    """Give a share of the nodes another parent on the level of their own one.

    Levels keep their nodes, every internal node keeps a child, and what lies below a node moves along.

    Args:
        tax: the taxonomy.
        share: of the edges, in [0, 1]; rounded to whole edges.
        seed: decides which edges, and the new parents.

    Raises:
        ValueError: if the share lies outside.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    draw = np.random.default_rng([seed, 1])
    parents = tax.parent.tolist()
    children = [0] * tax.num_nodes
    for up in parents:
        if up >= 0:
            children[up] += 1
    depth = tax.depth.tolist()
    on_level: dict[int, list[int]] = {}
    for node in range(tax.num_nodes):
        if children[node]:
            on_level.setdefault(depth[node], []).append(node)
    left = round(share * len(tax.edge_child))
    for node in draw.permutation(tax.num_nodes).tolist():
        up = parents[node]
        if left == 0:
            break
        if up < 0 or children[up] < 2 or len(on_level[depth[up]]) < 2:
            continue
        choices = [other for other in on_level[depth[up]] if other != up]
        parents[node] = int(draw.choice(choices))
        children[up] -= 1
        children[parents[node]] += 1
        left -= 1
    return with_parents(tax, parents)


def permute_parents(tax: Taxonomy, seed: int) -> OtherEdges:
    """Hand the parents of each level's nodes round at random: the sizes of all sibling groups stay, their members do not."""
    draw = np.random.default_rng([seed, 2])
    parents, start = tax.parent.numpy().copy(), tax.level_ptr.tolist()
    for level in range(1, tax.num_levels):
        parents[start[level] : start[level + 1]] = draw.permutation(parents[start[level] : start[level + 1]])
    return with_parents(tax, parents.tolist())
