"""What every selector returns, and the greedy re-rank that trades relevance against redundancy.

Reference: Carbonell and Goldstein, "The use of MMR, diversity-based reranking", SIGIR 1998 (maximal marginal relevance).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from hyper_geom import lorentz
from hyper_icl._checks import check_choice

ORDERS = ("ascending", "descending")


@dataclass(frozen=True)
class DemoSelection:
    """K demonstrations for each of B queries.

    Attributes:
        ids: rows of the pool, in prompt order.
        scores: the selector's score of each.
        depth: distance of each from the origin; 0 for selectors without geometry.
        certified: the selection is proven equal to a search of the whole pool in fp64.
        num_candidates: how many items were scored in fp64.
        order: "ascending" puts the most relevant last, next to the query; "descending" puts it first.
    """

    ids: Int64[Tensor, "b k"]
    scores: Float64[Tensor, "b k"]
    depth: Float64[Tensor, "b k"]
    certified: Bool[Tensor, " b"]
    num_candidates: Int64[Tensor, " b"]
    order: str

    def most_relevant_first(self) -> Int64[Tensor, "b k"]:
        """The ids with the most relevant first, whatever the prompt order."""
        return self.ids.flip(-1) if self.order == "ascending" else self.ids

    def reordered(self, order: str) -> "DemoSelection":
        """The same demonstrations with the most relevant last ("ascending") or first ("descending").

        Raises:
            ValueError: the order is unknown.
        """
        if check_choice("order", order, ORDERS) == self.order:
            return self
        turned = {name: getattr(self, name).flip(-1) for name in ("ids", "scores", "depth")}
        return replace(self, order=order, **turned)


def in_order(
    ids: Tensor, scores: Tensor, depth: Tensor, certified: Tensor, num_candidates: Tensor, order: str
) -> DemoSelection:
    """Build a selection from rows that run from the most to the least relevant."""
    check_choice("order", order, ORDERS)
    if order == "ascending":
        ids, scores, depth = ids.flip(-1), scores.flip(-1), depth.flip(-1)
    return DemoSelection(ids, scores, depth, certified, num_candidates, order)


def best_first(scores: Float[Tensor, "b m"], ids: Int64[Tensor, "b m"]) -> Tensor:
    """Positions that sort each row by score from high to low, ties by the smaller id.

    Equal items may differ in the last bit, because vectorised and left-over elements of one tensor go through different
    code; scores closer than 1e-14 therefore count as equal.
    """
    order = scores.argsort(dim=-1, descending=True)
    ranked = scores.gather(-1, order)
    step = ranked[:, :-1] - ranked[:, 1:]
    # -inf - -inf is NaN, and such items are equal too.
    apart = (step > 1e-14 * (1 + ranked[:, :-1].abs())) | torch.isposinf(step)
    tie = torch.cat((torch.zeros_like(order[:, :1]), apart.cumsum(-1)), -1)
    by_id = ids.gather(-1, order).argsort(-1)
    return order.gather(-1, by_id.gather(-1, tie.gather(-1, by_id).argsort(dim=-1, stable=True)))


def check_available(k: int, num: int, groups: Tensor | None, exclude: Tensor | None, batch: int) -> None:
    """Raise ValueError unless every query finds k items that it may use."""
    if k > num:
        raise ValueError(f"k must be at most the pool's size {num}, got {k}")
    if exclude is None:
        return
    if groups is None:
        raise ValueError("exclude must be None for a pool without groups: give groups when building the index")
    if exclude.dtype != torch.int64 or exclude.shape != (batch,):
        raise ValueError(f"exclude must be int64 of shape ({batch},), got {exclude.dtype} {tuple(exclude.shape)}")
    kept = num - (groups == exclude.unsqueeze(-1)).sum(-1)
    if batch and k > int(kept.min()):
        raise ValueError(f"k must be at most {int(kept.min())}, what exclude leaves of the pool, got {k}")


def marginal_relevance(
    tangent: Float[Tensor, "b m d"], scores: Float[Tensor, "b m"], k: int, diversity: float, c: float
) -> Int64[Tensor, "b k"]:
    """Positions of k of m candidates: each next one maximises (1-diversity) s_i + diversity min_j d(i, chosen j).

    Args:
        tangent: candidates, most relevant first.
        scores: their scores.
        k: how many to choose.
        diversity: weight of the distance to what is chosen already, in [0, 1].
        c: curvature parameter.
    """
    batch = torch.arange(scores.shape[0], device=scores.device)
    chosen = torch.zeros(scores.shape[0], 1, dtype=torch.int64, device=scores.device)
    open_ = torch.ones_like(scores, dtype=torch.bool)
    open_[:, 0] = False
    nearest = torch.full_like(scores, torch.inf)
    while chosen.shape[1] < k:
        last = tangent[batch, chosen[:, -1]].unsqueeze(1)
        nearest = torch.minimum(nearest, lorentz.tangent0_dist(tangent, last, c=c))
        value = ((1 - diversity) * scores + diversity * nearest).masked_fill(~open_, -torch.inf)
        best = value.argmax(-1)
        open_[batch, best] = False
        chosen = torch.cat((chosen, best.unsqueeze(-1)), -1)
    return chosen
