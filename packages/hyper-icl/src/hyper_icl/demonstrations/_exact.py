"""Exact top-K from cheap upper bounds: score the best candidates in fp64, and stop when nothing else can reach them.

No reference; the doubling search that `HyperbolicDemoIndex` and the cosine selectors share.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# fp64's own rounding of a score, generously.
_ROUNDING = 1e-12


class Results:
    """Collects the rows of a search as they are certified; `open` holds those that are not yet."""

    def __init__(self, query: Tensor, k: int) -> None:
        num, device = len(query), query.device
        self.ids = torch.zeros(num, k, dtype=torch.int64, device=device)
        self.scores = torch.zeros(num, k, dtype=torch.float64, device=device)
        self.certified = torch.zeros(num, dtype=torch.bool, device=device)
        self.num = torch.zeros(num, dtype=torch.int64, device=device)
        self.open = torch.arange(num, device=device)

    def take(self, ids: Tensor, scores: Tensor, done: Tensor, num_candidates: int) -> None:
        """Write the rows that are done."""
        rows = self.open[done]
        self.ids[rows], self.scores[rows] = ids[done], scores[done]
        self.certified[rows], self.num[rows] = True, num_candidates
        self.open = self.open[~done]

    def parts(self) -> tuple[Tensor, ...]:
        """ids, scores, certified, num_candidates."""
        return self.ids, self.scores, self.certified, self.num


def below(bound: Tensor, score: Tensor) -> Tensor:
    """Strictly below, beyond fp64's own rounding; equal scores must not be left out, or ties would break otherwise."""
    return bound < score - _ROUNDING * (1 + score.abs())


def search_by_bound(
    query: Tensor,
    k: int,
    keys: Tensor,
    upper: Callable[[Tensor], Tensor],
    best: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """The k best of every row, proven.

    Args:
        query: the queries, (b, ...).
        k: how many.
        keys: (b, n), small for items whose score may be high.
        upper: makes keys into upper bounds of the scores.
        best: gives the k best (ids, fp64 scores) of some queries' rows and their candidates, ties by the smaller id.

    Returns:
        ids, scores, certified, number of candidates.
    """
    result, size = Results(query, k), keys.shape[1]
    m = min(4 * k, size)
    while len(result.open):
        rows = result.open
        # One more than is scored: its bound covers everything that is not.
        some_keys = keys if len(rows) == len(keys) else keys[rows]
        top = some_keys.topk(min(m + 1, size), dim=-1, largest=False)
        ids, scores = best(rows, top.indices[:, :m])
        if m == size:
            done = torch.ones(len(rows), dtype=torch.bool, device=query.device)
        else:
            done = below(upper(top.values[:, m]), scores[:, -1])
        result.take(ids, scores, done, m)
        m = min(2 * m, size)
    return result.parts()
