"""Text features of the nodes: how many sentences pass through the text tower at a time, and which of them keep a graph.

`chunked` recomputes each chunk in the backward pass: Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost";
Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup". `sampled` estimates the
partition function from a sample of the classes: Bengio and Senecal, 2003; Jean et al., 2015.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hier_losses import Taxonomy

TEXT_MODES = ("cached", "live", "chunked", "sampled")
# Sentences in one pass without a graph: nothing is stored for a backward pass, so it can be larger than a training chunk.
PLAIN_CHUNK = 1024
# The logit of a node outside the sample: exp(ABSENT) is 0, and unlike -inf it gives no NaN where a whole level is absent.
ABSENT = -1e4

Encode = Callable[[Sequence[str]], Tensor]


def embed_sentences(
    encode: Encode, sentences: Sequence[Sequence[str]], *, chunk: int | None = None, recompute: bool = False
) -> Float[Tensor, "nodes dim"]:
    """Embed the sentences of nodes: unit vectors, averaged over the sentences of a node (not scaled to unit length again).

    Args:
        encode: from sentences to embeddings.
        sentences: for each node the same number of sentences.
        chunk: sentences in one pass; all at once if None. Passes hold whole nodes.
        recompute: forget what the backward pass of each chunk needs and compute it again there, so that only one chunk is
            in memory at a time. The result and its gradients are those without `recompute`, dropout included.

    Returns:
        One row a node, of length at most 1.
    """
    num_templates = len(sentences[0])

    def embed(flat: Sequence[str]) -> Tensor:
        unit = F.normalize(encode(flat).float(), dim=-1)
        return unit.reshape(-1, num_templates, unit.shape[-1]).mean(1)

    nodes_per_pass = len(sentences) if chunk is None else max(1, chunk // num_templates)
    parts = []
    for start in range(0, len(sentences), nodes_per_pass):
        flat = [sentence for row in sentences[start : start + nodes_per_pass] for sentence in row]
        parts.append(checkpoint(embed, flat, use_reentrant=False) if recompute else embed(flat))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class NodeSample(NamedTuple):
    """Nodes to embed for one batch, and for each the logarithm of how many nodes it stands for."""

    nodes: Int[Tensor, " sampled"]
    log_weight: Float[Tensor, " sampled"]


def sample_nodes(target: Int[Tensor, " batch"], tax: Taxonomy, num_negatives: int) -> NodeSample:
    """Draw the nodes that a batch needs: its paths, their sibling groups, and random ones of the rest.

    A random negative stands for R / m nodes (m drawn out of R), and log(R / m) is added to its logit. The expectation of
    the sum of exp(logit) over the sample, on every level and over all nodes, is then the sum over all nodes, so each
    log-sum-exp is an estimate of the true one, from below on average (the logarithm is concave). Path nodes and their
    siblings always take part: the sibling smoothing of HiSCE and the logits of the path are exact.

    Args:
        target: node ids.
        tax: the taxonomy, on the device of the target.
        num_negatives: random nodes, at most; at least 0. Drawn with torch's generator on the CPU.

    Returns:
        Ascending node ids and their weights.

    Raises:
        ValueError: a target that holds no node ids.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")])
    >>> sample_nodes(torch.tensor([2]), tax, 0).nodes.tolist()
    [0, 1, 2, 3]
    """
    if target.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target must hold integer node ids, got {target.dtype}")
    if not bool(((target >= 0) & (target < tax.num_nodes)).all()):
        raise ValueError(f"target must hold node ids in [0, {tax.num_nodes}), got {target.tolist()}")
    path = tax.paths[target]
    groups = torch.unique(tax.parent[path[path >= 0]] + 1)
    kept = torch.isin(tax.parent + 1, groups)
    rest = (~kept).nonzero().squeeze(1)
    drawn = rest[torch.randperm(len(rest))[:num_negatives].to(rest.device)]
    weight = torch.zeros(tax.num_nodes, device=kept.device)
    if len(drawn):
        weight[drawn] = torch.log(torch.tensor(len(rest) / len(drawn)))
        kept[drawn] = True
    nodes = kept.nonzero().squeeze(1)
    return NodeSample(nodes, weight[nodes])


def spread(logits: Float[Tensor, "batch sampled"], sample: NodeSample, num_nodes: int) -> Float[Tensor, "batch nodes"]:
    """Put the logits of a sample, weights added, into one row over all nodes; the others get `ABSENT`."""
    everywhere = logits.new_full((logits.shape[0], num_nodes), ABSENT)
    return everywhere.index_copy(1, sample.nodes, logits + sample.log_weight.to(logits.dtype))


__all__ = ["ABSENT", "PLAIN_CHUNK", "TEXT_MODES", "NodeSample", "embed_sentences", "sample_nodes", "spread"]
