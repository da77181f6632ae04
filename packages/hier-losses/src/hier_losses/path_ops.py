"""Padded and extended paths: rows of D node ids, as decoders return them and metrics take them.

A padded path lists the nodes from the top down to its last node, then -1; the virtual root is a row of -1. An extended
path repeats its leaf on the levels below it, so that every level of a ragged tree has a class.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from hier_losses.taxonomy import Taxonomy


def paths_of(nodes: Int[Tensor, "*shape"], tax: Taxonomy) -> Int[Tensor, "*shape depth"]:
    """Return the padded path of each node; the virtual root, written -1, gives a row of -1.

    Args:
        nodes: node ids in [-1, N).
        tax: the taxonomy.

    Returns:
        Node ids, top node first, -1 below the node itself.
    """
    tax = tax.to(nodes.device)
    return torch.where(nodes[..., None] >= 0, tax.paths[nodes.clamp(min=0)], -1)


def extend_paths(paths: Int[Tensor, "*shape depth"], tax: Taxonomy) -> Int[Tensor, "*shape depth"]:
    """Fill the levels below a shallow leaf with that leaf; paths that end at an internal node keep their -1.

    Args:
        paths: padded or extended paths.
        tax: the taxonomy.

    Returns:
        Extended paths.
    """
    tax = tax.to(paths.device)
    slot = torch.arange(paths.shape[-1], device=paths.device)
    last = torch.where(paths >= 0, slot, 0).cummax(-1).values
    node = paths.gather(-1, last)
    is_leaf = tax.leaf_index[node.clamp(min=0)] >= 0
    return torch.where((paths < 0) & (node >= 0) & is_leaf, node, paths)


def end_of_paths(paths: Int[Tensor, "*shape depth"]) -> Int[Tensor, "*shape"]:
    """Return the deepest entry of each path, -1 for the virtual root.

    Args:
        paths: padded or extended paths.

    Returns:
        Node ids in [-1, N).
    """
    slot = torch.arange(paths.shape[-1], device=paths.device)
    last = torch.where(paths >= 0, slot, 0).amax(-1, keepdim=True)
    return paths.gather(-1, last).squeeze(-1)
