"""Random trees against brute force: everything that a taxonomy says, from its edges alone."""

import io
import itertools
from random import Random

import torch

from fuzz.arguments import random_tree
from hier_losses import Taxonomy
from hier_losses.decoding import bottom_up, top_down
from hier_losses.functional import hisce, lca_depth, lca_height, leaves_to_nodes, subtree_sum, tp_kl
from hier_losses.metrics import average_hierarchical_distance, leaf_accuracy


def fuzz_tree(seed: int) -> str:
    """What is wrong with a random tree; "" if nothing is."""
    draw = Random(seed)
    tax = random_tree(draw, most=draw.choice((3, 8, 20, 40)))
    for check in (_structure, _ancestors, _round_trip, _sums, _decoders, _losses):
        try:
            wrong = check(tax, draw)
        except Exception as error:  # what is looked for
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            return f"tree {seed}, {check.__name__}: {wrong}"
    return ""


def _up(tax: Taxonomy) -> list[list[int]]:
    """Each node's path from its top node to itself, by following parents."""
    parent = tax.parent.tolist()
    paths = []
    for node in range(tax.num_nodes):
        path = [node]
        while parent[path[0]] >= 0:
            path.insert(0, parent[path[0]])
        paths.append(path)
    return paths


def _structure(tax: Taxonomy, draw: Random) -> str:
    paths, parent = _up(tax), tax.parent.tolist()
    children = [[c for c in range(tax.num_nodes) if parent[c] == node] for node in range(tax.num_nodes)]
    padded = [path + [-1] * (tax.num_levels - len(path)) for path in paths]
    if tax.paths.tolist() != padded:
        return "paths"
    if tax.num_levels != max(map(len, paths)) or list(tax.level_sizes) != [
        sum(len(path) == level + 1 for path in paths) for level in range(tax.num_levels)
    ]:
        return "levels"
    if tax.leaf.tolist() != [node for node in range(tax.num_nodes) if not children[node]]:
        return "leaves"

    def height(node: int) -> int:
        return 1 + max(map(height, children[node])) if children[node] else 0

    return "" if tax.height.tolist() == [height(node) for node in range(tax.num_nodes)] else "heights"


def _ancestors(tax: Taxonomy, draw: Random) -> str:
    paths, height = _up(tax), tax.height.tolist()
    root = 1 + max(height[node] for node in range(tax.num_nodes) if tax.parent[node] < 0)
    pairs = list(itertools.product(range(tax.num_nodes), repeat=2))
    pairs = draw.sample(pairs, min(60, len(pairs)))
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    shared = [sum(x == y for x, y in zip(paths[i], paths[j], strict=False)) for i, j in pairs]
    if lca_depth(a, b, tax).tolist() != shared:
        return "depth of the lowest common ancestor"
    heights = [0 if i == j else height[paths[i][n - 1]] if n else root for (i, j), n in zip(pairs, shared, strict=True)]
    return "" if lca_height(a, b, tax).tolist() == heights else "height of the lowest common ancestor"


def _round_trip(tax: Taxonomy, draw: Random) -> str:
    for again in (Taxonomy.from_json(tax.to_json()), Taxonomy.from_edges(_edges(tax, draw))):
        if _named_paths(again) != _named_paths(tax):
            return "another tree comes back"
    return ""


def _named_paths(tax: Taxonomy) -> set[tuple[str, ...]]:
    return {tuple(tax.names[node] for node in path) for path in _up(tax)}


def _edges(tax: Taxonomy, draw: Random) -> list:
    parent = tax.parent.tolist()
    edges = [(tax.names[p] if p >= 0 else None, tax.names[n]) for n, p in enumerate(parent)]
    draw.shuffle(edges)
    return edges


def _sums(tax: Taxonomy, draw: Random) -> str:
    values = torch.rand(
        2, tax.num_leaves, dtype=torch.float64, generator=torch.Generator().manual_seed(draw.randrange(99))
    )
    found = subtree_sum(leaves_to_nodes(values, tax), tax)
    paths, leaves = _up(tax), tax.leaf.tolist()
    for node in range(tax.num_nodes):
        below = [i for i, leaf in enumerate(leaves) if node in paths[leaf]]
        if not torch.allclose(found[:, node], values[:, below].sum(1)):
            return f"sum below node {node}"
    return ""


def _decoders(tax: Taxonomy, draw: Random) -> str:
    generator = torch.Generator().manual_seed(draw.randrange(99))
    logits = torch.randn(4, tax.num_nodes, generator=generator)
    target = tax.leaf[torch.randint(tax.num_leaves, (4,), generator=generator)]
    parent, heights = tax.parent.tolist(), lambda a, b: int(lca_height(torch.tensor(a), torch.tensor(b), tax))
    for decode in (top_down, bottom_up):
        found = decode(logits, tax)
        for row in found.tolist():
            nodes = [node for node in row if node >= 0]
            if any(parent[below] != above for above, below in itertools.pairwise(nodes)) or parent[nodes[0]] >= 0:
                return f"{decode.__name__} gives no path: {row}"
        ends = [[node for node in row if node >= 0][-1] for row in found.tolist()]
        away = sum(heights(a, b) for a, b in zip(ends, target.tolist(), strict=True)) / 4
        if abs(float(average_hierarchical_distance(found, target, tax)) - away) > 1e-6:
            return f"distance under {decode.__name__}"
        right = sum(a == b for a, b in zip(ends, target.tolist(), strict=True)) / 4
        if abs(float(leaf_accuracy(found, target, tax)) - right) > 1e-6:
            return f"leaf accuracy under {decode.__name__}"
    return ""


def _losses(tax: Taxonomy, draw: Random) -> str:
    logits = torch.randn(
        3, tax.num_nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(draw.randrange(99))
    )
    logits.requires_grad_()
    target = tax.leaf[torch.randint(tax.num_leaves, (3,), generator=torch.Generator().manual_seed(draw.randrange(99)))]
    for loss in (tp_kl, hisce):
        value = loss(logits, target, tax)
        (slope,) = torch.autograd.grad(value, logits)
        if not (bool(value.isfinite()) and float(value.detach()) >= -1e-9 and bool(slope.isfinite().all())):
            return f"{loss.__name__} is {float(value.detach())}"
    return ""


def drawn(tax: Taxonomy) -> str:
    """The tree as text, for a message."""
    out = io.StringIO()
    print(tax, file=out)
    return out.getvalue()
