"""The way from one taxonomy to another: which nodes stayed, moved, came and went."""

import torch

from hier_losses import LabelGraph, Taxonomy, TaxonomyUpdate


def match_taxonomies(old: Taxonomy | LabelGraph, new: Taxonomy | LabelGraph) -> TaxonomyUpdate:
    """Find every node of an old taxonomy in a new one.

    Nodes with the same full path are the same. Of the others, two nodes with the same name are the same if the name occurs
    once among the unmatched nodes of each side: the node moved. `Taxonomy.extend` and `prune` return such an update
    themselves; this function serves trees that were edited elsewhere, and moves.

    Args:
        old: the taxonomy before.
        new: the taxonomy after; of the same kind.

    Returns:
        The update, for `HierLoraCLIP.update_taxonomy`.

    Raises:
        ValueError: if a tree is matched with a graph.

    >>> old = Taxonomy.from_paths([("pet", "cat"), ("wild", "fox")])
    >>> new = Taxonomy.from_paths([("pet", "fox"), ("pet", "cat"), ("wild", "owl")])
    >>> update = match_taxonomies(old, new)
    >>> [(new.names[v], u) for v, u in enumerate(update.new_to_old.tolist())]
    [('pet', 0), ('wild', 1), ('fox', 3), ('cat', 2), ('owl', -1)]
    """
    if isinstance(old, LabelGraph) != isinstance(new, LabelGraph):
        raise ValueError(f"new must be of the kind of old, {type(old).__name__}, got {type(new).__name__}")
    old_paths = {_path(old, u): u for u in range(old.num_nodes)}
    source = [old_paths.get(_path(new, v), -1) for v in range(new.num_nodes)]
    taken = set(source)
    lost = _once([u for u in range(old.num_nodes) if u not in taken], old.names)
    come = _once([v for v, u in enumerate(source) if u < 0], new.names)
    for name in come.keys() & lost.keys():
        source[come[name]] = lost[name]
    new_to_old = torch.tensor(source, dtype=torch.int64)
    old_to_new = torch.full((old.num_nodes,), -1, dtype=torch.int64)
    kept = new_to_old >= 0
    old_to_new[new_to_old[kept]] = kept.nonzero().squeeze(1)
    return TaxonomyUpdate(new, old_to_new, new_to_old)


def _path(tax: Taxonomy | LabelGraph, node: int) -> tuple[str, ...]:
    return (tax.names[node],) if isinstance(tax, LabelGraph) else tax.path_of(node)


def _once(nodes: list[int], names: tuple[str, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in nodes:
        counts[names[node]] = counts.get(names[node], 0) + 1
    return {names[node]: node for node in nodes if counts[names[node]] == 1}


__all__ = ["match_taxonomies"]
