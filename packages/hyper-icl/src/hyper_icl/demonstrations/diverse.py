"""Selectors that weigh a demonstration by its company: MMR, a determinantal process, labels in turn; and a pool by votes.

References: Carbonell and Goldstein, "The use of MMR", SIGIR 1998; Chen, Zhang and Zhou, "Fast greedy MAP inference for
determinantal point process", NeurIPS 2018, algorithm 1; Ye et al., "Compositional exemplars for in-context learning", ICML
2023 (relevance in the kernel); Su et al., "Selective annotation makes language models better few-shot learners", ICLR 2023
(vote-k). Similarity is the cosine, and equal values go to the more relevant item, or to the smaller row.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from hyper_icl._checks import check_choice, check_count, check_positive, check_rows
from hyper_icl.demonstrations._selected import ORDERS, DemoSelection, in_order
from hyper_icl.demonstrations.baselines import TopKClipSelector


class _Rerank:
    """Chooses k of the most similar items; a subclass says which and in which order of relevance.

    Args:
        features: image features of the pool, or of picture and question together, normalised or not.
        groups: one number an item; see `exclude`.
        prefilter: how many of the most similar items take part.
        order: "ascending" puts the first choice last, next to the query; "descending" first.
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        groups: Int64[Tensor, " n"] | None = None,
        prefilter: int = 200,
        order: str = "ascending",
    ) -> None:
        """Keep the pool."""
        self.by_cosine = TopKClipSelector(features, groups)
        self.prefilter = check_count("prefilter", prefilter)
        self.order = check_choice("order", order, ORDERS)

    @torch.no_grad()
    def search(self, query: Float[Tensor, "b d"], k: int, exclude: Int64[Tensor, " b"] | None = None) -> DemoSelection:
        """The k chosen items of every query, the first choice nearest to the query where the order is "ascending".

        Args:
            query: features of the queries.
            k: how many, at most prefilter.
            exclude: for every query a group that must not appear.

        Returns:
            The selection; scores are cosines; `certified` speaks of the candidates.

        Raises:
            ValueError: k is not in 1..min(pool, prefilter), or shapes do not fit.
        """
        if k > self.prefilter:
            raise ValueError(f"k must be at most prefilter = {self.prefilter}, got {k}")
        size, groups = len(self.by_cosine.features), self.by_cosine.groups
        if exclude is not None and groups is not None and len(exclude):
            size = int((groups != exclude.unsqueeze(-1)).sum(-1).min())
        found = self.by_cosine.search(query, max(k, min(self.prefilter, size)), exclude)
        unit = F.normalize(self.by_cosine.features[found.ids].double(), dim=-1)
        kept = self._choose(unit, found, k)
        ids, scores = found.ids.gather(-1, kept), found.scores.gather(-1, kept)
        return in_order(ids, scores, torch.zeros_like(scores), found.certified, found.num_candidates, self.order)

    def _choose(self, unit: Float64[Tensor, "b m d"], found: DemoSelection, k: int) -> Int64[Tensor, "b k"]:
        """Positions among the candidates, which run from the most to the least similar."""
        raise NotImplementedError


class MmrSelector(_Rerank):
    """Maximal marginal relevance: each next item maximises (1 - diversity) cos(q, i) - diversity max_j cos(i, chosen j).

    Args:
        features: see `DppSelector`.
        diversity: weight of the likeness to what is chosen, in [0, 1].
        groups: one number an item.
        prefilter: how many of the most similar items take part.
        order: prompt order.

    Raises:
        ValueError: diversity is not in [0, 1], or the pool cannot be used.

    >>> pool = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.6, 0.8]])
    >>> MmrSelector(pool, 0.7, order="descending").search(torch.tensor([[1.0, 0.1]]), 2).ids
    tensor([[1, 2]])
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        diversity: float = 0.5,
        groups: Int64[Tensor, " n"] | None = None,
        prefilter: int = 200,
        order: str = "ascending",
    ) -> None:
        """Keep the pool and the weight."""
        super().__init__(features, groups, prefilter, order)
        if not 0 <= diversity <= 1:
            raise ValueError(f"diversity must be in [0, 1], got {diversity}")
        self.diversity = diversity

    def _choose(self, unit: Tensor, found: DemoSelection, k: int) -> Tensor:
        likest = torch.full_like(found.scores, -torch.inf)
        open_ = torch.ones_like(found.scores, dtype=torch.bool)
        chosen: list[Tensor] = []
        while len(chosen) < k:
            value = found.scores if not chosen else (1 - self.diversity) * found.scores - self.diversity * likest
            best = value.masked_fill(~open_, -torch.inf).argmax(-1, keepdim=True)
            open_.scatter_(-1, best, False)
            chosen.append(best)
            likest = torch.maximum(likest, _cosines(unit, best))
        return torch.cat(chosen, -1)


class DppSelector(_Rerank):
    """The greedy most probable set of a determinantal process: log det S + relevance sum_i cos(q, i), S the cosines.

    Each next item maximises log of its squared distance from the span of what is chosen, plus relevance cos(q, i).

    Args:
        features: image features of the pool, or of picture and question together, normalised or not.
        relevance: weight of the likeness to the query beside the volume, > 0.
        groups: one number an item.
        prefilter: how many of the most similar items take part.
        order: prompt order.

    Raises:
        ValueError: relevance is not positive, or the pool cannot be used.

    >>> pool = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.6, 0.8]])
    >>> DppSelector(pool, order="descending").search(torch.tensor([[1.0, 0.1]]), 2).ids
    tensor([[1, 2]])
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        relevance: float = 5.0,
        groups: Int64[Tensor, " n"] | None = None,
        prefilter: int = 200,
        order: str = "ascending",
    ) -> None:
        """Keep the pool and the weight."""
        super().__init__(features, groups, prefilter, order)
        self.relevance = check_positive("relevance", relevance)

    def _choose(self, unit: Tensor, found: DemoSelection, k: int) -> Tensor:
        left = torch.ones_like(found.scores)
        open_ = torch.ones_like(found.scores, dtype=torch.bool)
        rows = found.scores.new_zeros(*found.scores.shape, 0)
        chosen: list[Tensor] = []
        while len(chosen) < k:
            # A copy of what is chosen has no volume left; rounding must not make it negative.
            value = left.clamp(min=1e-12).log() + self.relevance * found.scores
            best = value.masked_fill(~open_, -torch.inf).argmax(-1, keepdim=True)
            open_.scatter_(-1, best, False)
            chosen.append(best)
            # One more column of the Cholesky factor of S.
            own = rows.gather(1, best.unsqueeze(-1).expand(-1, 1, rows.shape[-1]))
            column = (_cosines(unit, best) - (rows * own).sum(-1)) / left.gather(-1, best).clamp(min=1e-12).sqrt()
            rows = torch.cat((rows, column.unsqueeze(-1)), -1)
            left = left - column.square()
        return torch.cat(chosen, -1)


class BalancedSelector(_Rerank):
    """The most similar item of every label in turn, labels in the order of their most similar item; then the second, ...

    Args:
        features: see `DppSelector`.
        labels: label of every item, e.g. its answer.
        groups: one number an item.
        prefilter: how many of the most similar items take part.
        order: prompt order.

    Raises:
        ValueError: labels does not fit, or the pool cannot be used.

    >>> pool = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.6, 0.8]])
    >>> BalancedSelector(pool, ["yes", "yes", "no"], order="descending").search(torch.tensor([[1.0, 0.0]]), 2).ids
    tensor([[0, 2]])
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        labels: Sequence[str],
        groups: Int64[Tensor, " n"] | None = None,
        prefilter: int = 200,
        order: str = "ascending",
    ) -> None:
        """Keep the pool and number the labels."""
        super().__init__(features, groups, prefilter, order)
        if len(labels) != len(features):
            raise ValueError(f"labels must have one entry an item, {len(features)}, got {len(labels)}")
        number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        self.labels = torch.tensor([number[label] for label in labels])

    def _choose(self, unit: Tensor, found: DemoSelection, k: int) -> Tensor:
        label = self.labels[found.ids]
        before = (label.unsqueeze(-1) == label.unsqueeze(-2)).tril(-1).sum(-1)
        # Candidates run from the most similar on, and a stable sort keeps that within a turn.
        return before.argsort(dim=-1, stable=True)[:, :k]


def _cosines(unit: Tensor, best: Tensor) -> Float64[Tensor, "b m"]:
    """Cosine of every candidate with one of them."""
    return torch.einsum("bmd,bd->bm", unit, unit.gather(1, best.unsqueeze(-1).expand(-1, 1, unit.shape[-1]))[:, 0])


@torch.no_grad()
def vote_k(features: Float[Tensor, "n d"], num: int, neighbors: int = 150, rho: float = 10.0) -> Int64[Tensor, " num"]:
    """A small pool that speaks for a large one: greedily the item with the most votes of items not yet spoken for.

    score(u) = sum of rho^-|chosen neighbors of v| over the v, not chosen, with u among their neighbors; the best u is next.

    Args:
        features: features of the large pool, normalised or not.
        num: size of the small pool.
        neighbors: how many most similar items every item votes for.
        rho: how much less a vote counts for every chosen item among the voter's neighbors, > 1.

    Returns:
        Rows in the order of choice; equal scores go to the smaller row.

    Raises:
        ValueError: num is not in 1..n, neighbors is not in 1..n-1, or rho <= 1.

    >>> vote_k(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]]), 2, neighbors=1).tolist()
    [1, 2]
    """
    size = len(check_rows("features", features))
    if not 1 <= num <= size or not 1 <= neighbors < size or not rho > 1:
        raise ValueError(
            f"num must be in 1..{size}, neighbors in 1..{size - 1} and rho > 1, got {num}, {neighbors}, {rho}"
        )
    selector = TopKClipSelector(features, torch.arange(size))
    votes = torch.cat([selector.search(features[i], neighbors, i).ids for i in torch.arange(size).split(1024)])
    weight = torch.ones(size, dtype=torch.float64)
    open_ = torch.ones(size, dtype=torch.bool)
    chosen = []
    for _ in range(num):
        score = torch.zeros(size, dtype=torch.float64).index_add_(
            0, votes.flatten(), weight.repeat_interleave(neighbors)
        )
        best = int(score.masked_fill(~open_, -torch.inf).argmax())
        chosen.append(best)
        open_[best] = False
        weight[best] = 0.0
        weight[(votes == best).any(-1)] /= rho
    return torch.tensor(chosen)
