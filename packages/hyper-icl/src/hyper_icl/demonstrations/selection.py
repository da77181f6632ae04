"""Exact choice of the K demonstrations with the highest -d(x, q) + mu |x|, through one inner-product search.

References: Alipour Talemi et al. describe no selection; the score is that of the unpublished seed note. mu = 1 ranks by
the Gromov product, 2 (x|q)_0 = |x| + |q| - d(x, q) (Gromov, "Hyperbolic groups", 1987). The bounds and certificates,
which make the search exact although it computes in fp32, are ours: see `_bounds`.
"""

import importlib.util
import math
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from hyper_icl._checks import check_choice, check_count, check_groups, check_positive, check_rows
from hyper_icl.demonstrations import _bounds
from hyper_icl.demonstrations._exact import Results, below, search_by_bound
from hyper_icl.demonstrations._pool_file import fp64_norm, read_pool, write_pool
from hyper_icl.demonstrations._selected import DemoSelection, best_first, check_available, in_order, marginal_relevance

BACKENDS = ("auto", "torch", "faiss")
# cosh(k|x|) cosh(k|q|) must stay below the largest fp64 number, exp(709).
_MAX_RADIUS = 300.0
# Queries are searched in blocks whose upper bounds fit in this many bytes.
_BLOCK_BYTES = 256 << 20
# FAISS reads a large pool for one query faster than torch's product of one row does; in a smaller one it saves nothing.
_FAISS_NUMBERS = 1 << 24


class HyperbolicDemoIndex:
    """Searches a pool for the items with the highest score s = -d(x, q) + mu |x|, and proves that it found them.

    Both backends score candidates in fp64 and stop when an upper bound of everything else lies below the k-th score;
    otherwise they double the number of candidates. With backend "faiss" the value of mu is built into the index.

    Args:
        tangent: the pool, as Lorentz tangent vectors at the origin; depth = |w|.
        c: curvature parameter.
        mu: weight of the depth; > 0 prefers deep (specific) items, < 0 shallow ones.
        backend: "torch" (any device), "faiss" (needs faiss-cpu), or "auto": torch, but FAISS for a single query of a large
            pool on a CPU where it is installed. FAISS keeps a copy of the pool, which "auto" makes at the first such query.
        groups: one number an item, e.g. its image; see `search(exclude=...)`.
        faiss_factory: faiss's name of the index; anything but "Flat" is approximate, and never certified.
        depth: |w| of every item in fp64 if it is known; the pool is then neither read nor checked before the first search.

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
        backend: str = "auto",
        *,
        groups: Int64[Tensor, " n"] | None = None,
        faiss_factory: str = "Flat",
        depth: Float64[Tensor, " n"] | None = None,
    ) -> None:
        """Check the pool and, for faiss, build the index."""
        self.tangent = (check_rows("tangent", tangent) if depth is None else tangent).detach()
        if len(tangent) == 0:
            raise ValueError("tangent must hold at least one item, got an empty pool")
        if tangent.dtype not in (torch.float32, torch.float64):
            self.tangent = self.tangent.float()
        self.c, self.mu = check_positive("c", c), float(mu)
        if not math.isfinite(self.mu):
            raise ValueError(f"mu must be finite, got {mu}")
        self.backend = check_choice("backend", backend, BACKENDS)
        self.groups = check_groups("groups", groups, len(tangent))
        self.depth = fp64_norm(self.tangent) if depth is None else depth
        if self.depth.shape != (len(tangent),):
            raise ValueError(f"depth must have shape ({len(tangent)},), got {tuple(self.depth.shape)}")
        self._radius = math.sqrt(self.c) * float(self.depth.max())
        if self._radius > _MAX_RADIUS:
            raise ValueError(f"tangent must have sqrt(c)|w| <= {_MAX_RADIUS:g}, got {self._radius:g}")
        self._warn(self._radius)
        self.exact = self.backend != "faiss" or faiss_factory == "Flat"
        self._factory, self._index, self._nearest = faiss_factory, None, None
        if self.backend == "faiss":
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

    def add(self, tangent: Float[Tensor, "m d"], groups: Int64[Tensor, " m"] | None = None) -> None:
        """Put items at the end of the pool.

        Args:
            tangent: the new points.
            groups: their groups, if the pool has groups.

        Raises:
            ValueError: widths differ, values are not finite or too deep, or groups are missing or superfluous.
        """
        rows = check_rows("tangent", tangent, dim=self.tangent.shape[1]).detach().to(self.tangent)
        if (groups is None) != (self.groups is None):
            raise ValueError("groups must be given exactly where the pool has groups")
        more = None if groups is None else torch.cat((self.groups, check_groups("groups", groups, len(rows))))
        self._replace(torch.cat((self.tangent, rows)), torch.cat((self.depth, fp64_norm(rows))), more)

    def remove(self, ids: Int64[Tensor, " m"]) -> None:
        """Take items out of the pool by their rows; later rows move up.

        Raises:
            ValueError: a row is not in the pool, or nothing is left.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self):
            raise ValueError(f"ids must be rows 0..{len(self) - 1}, got {int(ids.min())}..{int(ids.max())}")
        kept = torch.ones(len(self), dtype=torch.bool, device=self.tangent.device)
        kept[ids] = False
        if not kept.any():
            raise ValueError("ids must leave at least one item, got the whole pool")
        self._replace(self.tangent[kept], self.depth[kept], None if self.groups is None else self.groups[kept])

    def _replace(self, tangent: Tensor, depth: Tensor, groups: Tensor | None) -> None:
        made = HyperbolicDemoIndex(
            tangent, self.c, self.mu, self.backend, groups=groups, faiss_factory=self._factory, depth=depth
        )
        self.__dict__ = made.__dict__

    def save(self, folder: str | Path) -> None:
        """Write the pool and the settings into a folder; `AnchorBank.load` reads the pool too."""
        facts = {"c": repr(self.c), "mu": repr(self.mu), "backend": self.backend, "factory": self._factory}
        write_pool(folder, self.tangent.split(1 << 15), self.groups, None, facts)

    @classmethod
    def load(cls, folder: str | Path) -> "HyperbolicDemoIndex":
        """Open what `save` wrote; rows stay in the file until they are used, but for FAISS's copy.

        Raises:
            ValueError: the file is missing or damaged, or holds a bank.
        """
        tensors, facts, _ = read_pool(folder)
        if "mu" not in facts:
            raise ValueError(
                f"folder must hold a saved index, got a bank in {folder}: use AnchorBank.load(folder).index(mu)"
            )
        return cls(
            tensors["tangent"],
            float(facts["c"]),
            float(facts["mu"]),
            facts["backend"],
            groups=tensors.get("groups"),
            faiss_factory=facts["factory"],
            depth=tensors["depth"],
        )

    @torch.no_grad()
    def rescore(
        self, query: Float[Tensor, "b d"], candidates: Int64[Tensor, "b m"], k: int, order: str = "ascending"
    ) -> DemoSelection:
        """The k best of candidates that another store found (see `inner_product_vectors`), by their exact scores.

        Args:
            query: Lorentz tangent vectors at the origin.
            candidates: rows of the pool for every query, without repetition.
            k: how many.
            order: as in `search`.

        Returns:
            The selection, never certified: what the store left out is not known.

        Raises:
            ValueError: k is not in 1..m, or shapes do not fit.
        """
        check_rows("query", query, dim=self.tangent.shape[1])
        if candidates.shape[:1] != query.shape[:1] or not 1 <= k <= candidates.shape[1]:
            raise ValueError(
                f"candidates must be (b, m) with b = {len(query)} and m >= k = {k}, got {tuple(candidates.shape)}"
            )
        ids, scores = self._best(query.double(), candidates, k, None)
        num = torch.full((len(ids),), candidates.shape[1], dtype=torch.int64)
        return in_order(ids, scores, self.depth[ids], torch.zeros(len(ids), dtype=torch.bool), num, order)

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
        through_faiss = self.backend == "faiss" or self._prefers_faiss(query)
        block = max(len(query), 1) if through_faiss else max(1, _BLOCK_BYTES // (8 * len(self)))
        find = self._search_faiss if through_faiss else self._search_torch
        parts = [
            find(query[i : i + block], wanted, None if exclude is None else exclude[i : i + block])
            for i in range(0, len(query), block)
        ] or [find(query, wanted, exclude)]
        ids, scores, certified, num = (torch.cat(part) for part in zip(*parts, strict=True))
        if diversity > 0:
            kept = marginal_relevance(self.tangent[ids].double(), scores, k, diversity, self.c)
            ids, scores = ids.gather(-1, kept), scores.gather(-1, kept)
        return in_order(ids, scores, self.depth[ids], certified, num, order)

    def _prefers_faiss(self, query: Tensor) -> bool:
        """Whether "auto" takes FAISS, whose fp32 products resolve little beyond sqrt(c)|w| = 6."""
        if self.backend != "auto" or len(query) != 1 or self.tangent.device.type != "cpu":
            return False
        if self.tangent.numel() < _FAISS_NUMBERS or max(self._radius, math.sqrt(self.c) * float(query.norm())) > 6:
            return False
        if self._index is None and importlib.util.find_spec("faiss") is not None:
            self._index, self._max_norm = _build(self.tangent, self.c, self.mu, "Flat")
        return self._index is not None

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

        def best(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            return self._best(query[rows], ids, k, None if exclude is None else exclude[rows])

        return search_by_bound(query, k, keys, lambda values: _bounds.upper_scores(values, self.c), best)

    def _search_faiss(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, ...]:
        asked = _bounds.tilted_query(query, self.c)
        if not torch.isfinite(asked.float()).all():
            raise ValueError("query is too deep for fp32 products (backend 'faiss'): use backend 'torch'")
        eps = _bounds.gamma(query.shape[1]) * self._max_norm * asked.norm(dim=-1)
        least_tilt = float((self.mu * self.depth).min())
        result = Results(query, k)
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
            done = below(bound + _bounds.gap(distance, self.c), scores[:, -1]) | (m == len(self))
            if not done.all():
                distance = torch.maximum(distance, self._nearest_distance(query[rows]))
                done |= below(bound + _bounds.gap(distance, self.c), scores[:, -1])
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
