"""Exact choice of the K demonstrations with the highest -d(x, q) + mu |x|, through one inner-product search.

References: Alipour Talemi et al. describe no selection; the score is that of the unpublished seed note. mu = 1 ranks by
the Gromov product, 2 (x|q)_0 = |x| + |q| - d(x, q) (Gromov, "Hyperbolic groups", 1987). The bounds and certificates,
which make the search exact although it computes in fp32, are ours: see `_bounds`.
"""

import importlib.util
import math
import warnings

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hyper_icl import _bounds
from hyper_icl._checks import check_choice, check_count, check_groups, check_positive, check_rows
from hyper_icl._selected import DemoSelection, best_first, check_available, in_order, marginal_relevance

BACKENDS = ("torch", "faiss")
# cosh(k|x|) cosh(k|q|) must stay below the largest fp64 number, exp(709).
_MAX_RADIUS = 300.0
# Queries are searched in blocks whose upper bounds fit in this many bytes.
_BLOCK_BYTES = 256 << 20
# fp64's own rounding of a score, generously.
_ROUNDING = 1e-12


class HyperbolicDemoIndex:
    """Searches a pool for the items with the highest score s = -d(x, q) + mu |x|, and proves that it found them.

    Both backends score candidates in fp64 and stop when an upper bound of everything else lies below the k-th score;
    otherwise they double the number of candidates. With backend "faiss" the value of mu is built into the index.

    Args:
        tangent: the pool, as Lorentz tangent vectors at the origin; depth = |w|.
        c: curvature parameter.
        mu: weight of the depth; > 0 prefers deep (specific) items, < 0 shallow ones.
        backend: "torch" (any device) or "faiss" (needs faiss-cpu).
        groups: one number an item, e.g. its image; see `search(exclude=...)`.
        faiss_factory: faiss's name of the index; anything but "Flat" is approximate, and never certified.

    Raises:
        ValueError: the pool is empty, not finite or misshapen, c <= 0, or an option is unknown.
        ImportError: faiss is not installed.

    Warns:
        UserWarning: |mu| > 1; depths that do not vary (the ranking is that of cosines); k|w| > 6 with faiss.

    >>> pool = torch.tensor([[0.5, 0.0], [2.0, 0.2], [1.0, 1.0], [0.0, 3.0], [1.2, -0.1]])
    >>> HyperbolicDemoIndex(pool, mu=0.6).search(torch.tensor([[1.0, 0.0]]), 3, order="descending").ids
    tensor([[4, 1, 0]])
    """

    def __init__(
        self,
        tangent: Float[Tensor, "n d"],
        c: float = 1.0,
        mu: float = 0.0,
        backend: str = "torch",
        *,
        groups: Int64[Tensor, " n"] | None = None,
        faiss_factory: str = "Flat",
    ) -> None:
        """Check the pool and, for faiss, build the index."""
        self.tangent = check_rows("tangent", tangent).detach()
        if len(tangent) == 0:
            raise ValueError("tangent must hold at least one item, got an empty pool")
        if tangent.dtype not in (torch.float32, torch.float64):
            self.tangent = self.tangent.float()
        self.c, self.mu = check_positive("c", c), float(mu)
        if not math.isfinite(self.mu):
            raise ValueError(f"mu must be finite, got {mu}")
        self.backend = check_choice("backend", backend, BACKENDS)
        self.groups = check_groups("groups", groups, len(tangent))
        self.depth = _fp64_norm(self.tangent)
        radius = math.sqrt(self.c) * float(self.depth.max())
        if radius > _MAX_RADIUS:
            raise ValueError(f"tangent must have sqrt(c)|w| <= {_MAX_RADIUS:g}, got {radius:g}")
        self._warn(radius)
        self.exact = backend == "torch" or faiss_factory == "Flat"
        self._nearest = None
        if backend == "faiss":
            self._factory = faiss_factory
            self._index, self._max_norm = _build(self.tangent, self.c, self.mu, faiss_factory)

    def _warn(self, radius: float) -> None:
        if abs(self.mu) > 1:
            warnings.warn(f"mu = {self.mu:g}: beyond 1 the depth outweighs any distance along a ray", stacklevel=3)
        if len(self.depth) > 1 and float(self.depth.std()) <= 1e-6 * float(self.depth.mean()):
            warnings.warn(
                "all depths are equal, so every mu ranks as cosine does: equivalent to TopK-CLIP; learn the norm "
                "(HyperbolicLift with anchor_loss)",
                stacklevel=3,
            )
        if self.backend == "faiss" and radius > 6:
            warnings.warn(
                f"sqrt(c)|w| reaches {radius:.1f} > 6: fp32 products resolve little there, searches may scan the whole "
                "pool; prefer backend='torch'",
                stacklevel=3,
            )

    def __len__(self) -> int:
        """Size of the pool."""
        return len(self.tangent)

    @torch.no_grad()
    def search(
        self,
        query: Float[Tensor, "b d"],
        k: int,
        exclude: Int64[Tensor, " b"] | None = None,
        order: str = "ascending",
        diversity: float = 0.0,
    ) -> DemoSelection:
        """The k best items for every query.

        Args:
            query: Lorentz tangent vectors at the origin.
            k: how many, at most the pool (less the excluded group).
            exclude: for every query a group that must not appear, e.g. the query's own image.
            order: "ascending" puts the most relevant last, next to the query in the prompt; "descending" first.
            diversity: in [0, 1]; > 0 re-ranks the best 4k by maximal marginal relevance.

        Returns:
            The selection; equal scores are ordered by the smaller id. `certified` speaks of the k best, or with
            `diversity` of the 4k candidates.

        Raises:
            ValueError: k is not in 1..pool, or a shape or option does not fit.
        """
        check_rows("query", query, dim=self.tangent.shape[1])
        check_count("k", k)
        check_choice("order", order, ("ascending", "descending"))
        if not 0 <= diversity <= 1:
            raise ValueError(f"diversity must be in [0, 1], got {diversity}")
        check_available(k, len(self), self.groups, exclude, len(query))
        query = query.detach().to(self.tangent.device).double()
        radius = math.sqrt(self.c) * float(query.norm(dim=-1).max()) if len(query) else 0.0
        if radius > _MAX_RADIUS:
            raise ValueError(f"query must have sqrt(c)|w| <= {_MAX_RADIUS:g}, got {radius:g}")
        wanted = k
        if diversity > 0:
            most = len(self) if exclude is None else int((self.groups != exclude.unsqueeze(-1)).sum(-1).min())
            wanted = min(4 * k, most)
        block = max(1, _BLOCK_BYTES // (8 * len(self))) if self.backend == "torch" else max(len(query), 1)
        find = self._search_torch if self.backend == "torch" else self._search_faiss
        parts = [
            find(query[i : i + block], wanted, None if exclude is None else exclude[i : i + block])
            for i in range(0, len(query), block)
        ] or [find(query, wanted, exclude)]
        ids, scores, certified, num = (torch.cat(part) for part in zip(*parts, strict=True))
        if diversity > 0:
            kept = marginal_relevance(self.tangent[ids].double(), scores, k, diversity, self.c)
            ids, scores = ids.gather(-1, kept), scores.gather(-1, kept)
        return in_order(ids, scores, self.depth[ids], certified, num, order)

    def _allowed(self, ids: Tensor, exclude: Tensor | None) -> Tensor:
        if exclude is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return self.groups[ids] != exclude.unsqueeze(-1)

    def _best(self, query: Tensor, ids: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k best of some candidates by fp64 score; candidates that are not allowed score -inf."""
        scores = _bounds.exact_scores(query, self.tangent[ids], self.c, self.mu)
        scores = scores.masked_fill(~self._allowed(ids, exclude), -torch.inf)
        kept = best_first(scores, ids)[:, :k]
        return ids.gather(-1, kept), scores.gather(-1, kept)

    def _search_torch(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, ...]:
        keys = _bounds.upper_keys(self.tangent, self.depth, query, self.c, self.mu)
        if exclude is not None:
            keys.masked_fill_(self.groups == exclude.unsqueeze(-1), torch.inf)
        result = _Results(query, k)
        m = min(4 * k, len(self))
        while len(result.open):
            rows = result.open
            # One more than is scored: its bound covers everything that is not.
            some_keys = keys if len(rows) == len(keys) else keys[rows]
            top = some_keys.topk(min(m + 1, len(self)), dim=-1, largest=False)
            some = None if exclude is None else exclude[rows]
            ids, scores = self._best(query[rows], top.indices[:, :m], k, some)
            if m == len(self):
                done = torch.ones(len(rows), dtype=torch.bool, device=query.device)
            else:
                done = _below(_bounds.upper_scores(top.values[:, m], self.c), scores[:, -1])
            result.take(ids, scores, done, m)
            m = min(2 * m, len(self))
        return result.parts()

    def _search_faiss(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, ...]:
        asked = _bounds.tilted_query(query, self.c)
        if not torch.isfinite(asked.float()).all():
            raise ValueError("query is too deep for fp32 products (backend 'faiss'): use backend 'torch'")
        eps = _bounds.gamma(query.shape[1]) * self._max_norm * asked.norm(dim=-1)
        least_tilt = float((self.mu * self.depth).min())
        result = _Results(query, k)
        m = min(4 * k, len(self))
        while len(result.open):
            rows = result.open
            some = None if exclude is None else exclude[rows]
            products, ids = self._index.search(asked[rows].float().cpu().numpy(), m)
            ids = torch.from_numpy(ids).to(query.device)
            if not self.exact:
                # Approximate indexes pad with -1 when they find too few.
                ids, scores = self._best_found(query[rows], ids, k, some)
                result.take(ids, scores, torch.ones(len(rows), dtype=torch.bool, device=query.device), m)
                break
            ids, scores = self._best(query[rows], ids, k, some)
            last = -torch.from_numpy(products[:, -1]).to(query.device).double()
            bound = _bounds.lower_score(last - eps[rows], self.c)
            distance = _bounds.least_distance(bound, least_tilt, self.c)
            done = _below(bound + _bounds.gap(distance, self.c), scores[:, -1]) | (m == len(self))
            if not done.all():
                distance = torch.maximum(distance, self._nearest_distance(query[rows]))
                done |= _below(bound + _bounds.gap(distance, self.c), scores[:, -1])
            result.take(ids, scores, done, m)
            m = min(2 * m, len(self))
        ids, scores, certified, num = result.parts()
        return ids, scores, certified & self.exact, num

    def _best_found(self, query: Tensor, ids: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = _bounds.exact_scores(query, self.tangent[ids.clamp(min=0)], self.c, self.mu)
        usable = (ids >= 0) & self._allowed(ids.clamp(min=0), exclude)
        if int(usable.sum(-1).min()) < k:
            raise ValueError(
                f"faiss_factory {self._factory!r} found fewer than k = {k} items: use 'Flat' or a smaller k"
            )
        scores = scores.masked_fill(~usable, -torch.inf)
        kept = best_first(scores, ids)[:, :k]
        return ids.gather(-1, kept), scores.gather(-1, kept)

    def _nearest_distance(self, query: Tensor) -> Tensor:
        """A lower bound of the distance from each query to the pool, from the best product of an index with mu = 0."""
        if self._nearest is None:
            tilt_free = (self._index, self._max_norm) if self.mu == 0 else _build(self.tangent, self.c, 0.0, "Flat")
            self._nearest = tilt_free
        index, max_norm = self._nearest
        asked = _bounds.tilted_query(query, self.c)
        products, _ = index.search(asked.float().cpu().numpy(), 1)
        least = -torch.from_numpy(products[:, 0]).to(query.device).double()
        least = self.c * (least - _bounds.gamma(query.shape[1]) * max_norm * asked.norm(dim=-1))
        return least.clamp(min=1.0).acosh() / math.sqrt(self.c)


class _Results:
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


def _below(bound: Tensor, score: Tensor) -> Tensor:
    """Strictly below, beyond fp64's own rounding; equal scores must not be left out, or ties would break otherwise."""
    return bound < score - _ROUNDING * (1 + score.abs())


def _fp64_norm(tangent: Tensor) -> Tensor:
    """Row norms in fp64 without a copy of the whole pool in fp64."""
    return torch.cat([part.double().norm(dim=-1) for part in tangent.split(1 << 16)])


def _build(tangent: Tensor, c: float, mu: float, factory: str):
    if importlib.util.find_spec("faiss") is None:
        raise ImportError("backend 'faiss' needs faiss: pip install 'hyper-icl[faiss]'")
    import faiss

    index = faiss.index_factory(tangent.shape[1] + 1, factory, faiss.METRIC_INNER_PRODUCT)
    max_norm, parts = 0.0, tangent.split(1 << 16)
    for part in parts:
        rows = _bounds.tilted_rows(part, c, mu)
        if not torch.isfinite(rows.float()).all():
            raise ValueError("tangent is too deep for fp32 products (backend 'faiss'): use backend 'torch'")
        max_norm = max(max_norm, float(rows.norm(dim=-1).max()))
        if not index.is_trained:
            index.train(_bounds.tilted_rows(tangent, c, mu).float().cpu().numpy())
        index.add(rows.float().cpu().numpy())
    return index, max_norm
