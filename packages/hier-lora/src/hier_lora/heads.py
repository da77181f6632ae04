"""Classifiers on picture features: free weights for leaves or nodes, and the nearest picture of each leaf.

They take the features of any backbone. Beside them stands `hier_losses.discriminant.TreeLDA`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hier_losses import Taxonomy, TaxonomyUpdate, match_taxonomies
from hier_losses.decoding import joint_path_scores
from hier_losses.functional import subtree_sum

OVER = ("leaves", "nodes")


class LinearHead(nn.Module):
    """Free weights: features to one logit per leaf, or per node. Not trained here: a loop outside steps its parameters.

    Args:
        tax: the taxonomy.
        dim: width of the features.
        over: "leaves" for one distribution over leaves (train with `hxe` or any loss on leaf logits), "nodes" for one logit
            per node (train with a loss on node logits; `levels="extended"` lets shallow leaves compete with deep ones).
        dropout: share of the features that training drops, in [0, 1).

    Raises:
        ValueError: an unknown `over`, a number out of range.
    """

    def __init__(self, tax: Taxonomy, dim: int, over: str = "leaves", dropout: float = 0.0) -> None:
        super().__init__()
        if over not in OVER:
            raise ValueError(f"over must be one of {OVER}, got {over!r}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.tax, self.dim, self.over, self.dropout = tax, dim, over, float(dropout)
        width = tax.num_leaves if over == "leaves" else tax.num_nodes
        self.weight = nn.Parameter(torch.zeros(width, dim))
        self.bias = nn.Parameter(torch.zeros(width))

    @classmethod
    def from_prompts(
        cls,
        tax: Taxonomy,
        node_features: Float[Tensor, "nodes dim"],
        scale: float,
        over: str = "leaves",
        dropout: float = 0.0,
    ) -> "LinearHead":
        """Start from the prompts of a model whose towers share a space, so that zero-shot is the floor.

        Untrained it is the expert that knows the prompts alone.

        Args:
            tax: the taxonomy.
            node_features: unit text features of all nodes, such as `HierLoraCLIP.node_features`.
            scale: of the cosines, such as `logit_scale.exp()`.
            over: as for the class.
            dropout: as for the class.

        Raises:
            ValueError: features of another number of nodes.
        """
        if len(node_features) != tax.num_nodes:
            raise ValueError(f"node_features must cover {tax.num_nodes} nodes, got {len(node_features)}")
        head = cls(tax, node_features.shape[1], over, dropout)
        rows = node_features if over == "nodes" else node_features[tax.leaf.to(node_features.device)]
        with torch.no_grad():
            head.weight.copy_(scale * rows)
        return head

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch scores"]:
        """Logits of the leaves in the order of `tax.leaf`, or of all nodes: what the losses take."""
        return F.linear(F.dropout(features, self.dropout, self.training), self.weight, self.bias)

    def log_prob(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch leaves"]:
        """Log-probabilities of the leaves; over nodes those of whole paths, see `joint_path_scores`."""
        logits = self(features)
        if self.over == "nodes":
            logits = joint_path_scores(logits, self.tax)
        return logits.log_softmax(1)

    @torch.no_grad()
    def update_taxonomy(
        self, update: TaxonomyUpdate | Taxonomy, node_features: Float[Tensor, "nodes dim"] | None = None
    ) -> TaxonomyUpdate:
        """Change the classes; those that stay keep their weights. The parameters are new objects: make optimizers anew.

        A new class starts with the mean weights below its closest ancestor that has any, or with `node_features`.

        Args:
            update: from `Taxonomy.extend`, `prune` or `match_taxonomies`; or the new taxonomy.
            node_features: scaled prompts of all new nodes, for a head that was started from prompts.

        Returns:
            The update.
        """
        update = as_update(self.tax, update)
        old, new = self.tax.to(self.weight.device), update.taxonomy.to(self.weight.device)
        rows = torch.cat([self.weight, self.bias[:, None]], 1)
        known = rows.new_ones(len(rows), 1)
        if self.over == "leaves":
            rows = rows.new_zeros(old.num_nodes, rows.shape[1]).index_copy(0, old.leaf, rows)
            known = known.new_zeros(old.num_nodes, 1).index_copy(0, old.leaf, known)
        rows, known = update.transfer(rows), update.transfer(known)
        number = subtree_sum(known.T, new).T
        value = torch.where(known > 0, rows, subtree_sum((rows * known).T, new).T / number.clamp(min=1))
        everything = (rows * known).sum(0) / known.sum().clamp(min=1)
        for level in range(new.num_levels):
            here = slice(int(new.level_ptr[level]), int(new.level_ptr[level + 1]))
            above = value[new.parent[here]] if level else everything
            value[here] = torch.where(number[here] > 0, value[here], above)
        if node_features is not None:
            fresh = torch.cat([node_features, node_features.new_zeros(len(node_features), 1)], 1).to(value)
            value = torch.where(known > 0, value, fresh)
        if self.over == "leaves":
            value = value[new.leaf]
        self.tax = update.taxonomy
        self.weight, self.bias = nn.Parameter(value[:, :-1].contiguous()), nn.Parameter(value[:, -1].contiguous())
        return update


class Neighbours(nn.Module):
    """The nearest picture of each leaf by cosine: scale times the largest cosine, normalised over the leaves.

    Args:
        tax: the taxonomy.
        features: (n, dim) of the pictures that are kept; centre them as those that are asked about.
        target: (n,) node ids of leaves.
        scale: of the cosines, above 0.

    Raises:
        ValueError: no picture, targets that are not leaves, a scale that is not positive.
    """

    features: Tensor
    target: Tensor

    def __init__(
        self, tax: Taxonomy, features: Float[Tensor, "pictures dim"], target: Tensor, scale: float = 100.0
    ) -> None:
        super().__init__()
        if not len(features) or target.shape != (len(features),):
            raise ValueError(
                f"target must hold a node id for each picture, got {tuple(target.shape)} for {len(features)}"
            )
        if (tax.leaf_index.to(target.device)[target] < 0).any():
            raise ValueError("target must hold leaves, got an inner node")
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.tax, self.scale = tax, float(scale)
        self.register_buffer("features", F.normalize(features, dim=1))
        self.register_buffer("target", target)

    def log_prob(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch leaves"]:
        """Log-probabilities of the leaves; -inf for those without pictures."""
        cosine = F.normalize(features, dim=1) @ self.features.T
        leaf = self.tax.to(self.target.device).leaf_index[self.target].expand(len(features), -1)
        best = cosine.new_full((len(features), self.tax.num_leaves), -torch.inf)
        return (self.scale * best.scatter_reduce(1, leaf, cosine, "amax")).log_softmax(1)

    def update_taxonomy(self, update: TaxonomyUpdate | Taxonomy) -> TaxonomyUpdate:
        """Change the classes: pictures follow their leaf, those of removed classes and of leaves that got children go.

        Raises:
            ValueError: nothing is left.
        """
        update = as_update(self.tax, update)
        new = update.old_to_new.to(self.target.device)[self.target]
        kept = (new >= 0) & (update.taxonomy.to(new.device).leaf_index[new.clamp(min=0)] >= 0)
        if not kept.any():
            raise ValueError("update must keep a leaf with pictures")
        self.tax, self.features, self.target = update.taxonomy, self.features[kept], new[kept]
        return update


def as_update(tax: Taxonomy, update: TaxonomyUpdate | Taxonomy) -> TaxonomyUpdate:
    """Match a new taxonomy; check that an update starts from this one.

    Raises:
        ValueError: an update of a taxonomy of another size.
    """
    if not isinstance(update, TaxonomyUpdate):
        return match_taxonomies(tax, update)
    if len(update.old_to_new) != tax.num_nodes:
        raise ValueError(f"update must start from the {tax.num_nodes} nodes of the head, got {len(update.old_to_new)}")
    return update


__all__ = ["LinearHead", "Neighbours"]
