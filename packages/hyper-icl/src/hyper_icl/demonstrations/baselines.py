"""The selectors that hyperbolic selection is compared with; all choose from one pool and return `DemoSelection`.

References: Yang et al., "An empirical study of GPT-3 for few-shot knowledge-based VQA", AAAI 2022 (RICES); Alayrac et
al., "Flamingo", NeurIPS 2022, appendix; Awadalla et al., "OpenFlamingo", 2023 (most similar last); Chen et al.,
"Understanding and improving in-context learning on vision-language models", 2023 (MMICES: images filter, text ranks).
"""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from hyper_icl._checks import check_count, check_groups, check_rows
from hyper_icl.demonstrations._bounds import gamma, products_are_rounded
from hyper_icl.demonstrations._exact import search_by_bound
from hyper_icl.demonstrations._pool_file import fp64_norm
from hyper_icl.demonstrations._selected import DemoSelection, best_first, check_available, in_order

# Queries are searched in blocks whose cosines fit in this many bytes.
_BLOCK_BYTES = 256 << 20


def _exactly(query: Tensor, ids: Tensor, scores: Tensor, num_candidates: int, order: str) -> DemoSelection:
    batch = torch.full((len(query),), num_candidates, dtype=torch.int64, device=ids.device)
    certified = torch.zeros(len(query), dtype=torch.bool, device=ids.device)
    return in_order(ids, scores.double(), torch.zeros_like(scores, dtype=torch.float64), certified, batch, order)


class RandomSelector:
    """Draws K items without replacement; the draw of query number i depends on the seed and i alone.

    Args:
        num_items: size of the pool.
        seed: seed of all draws.
        groups: one number an item; see `exclude`.

    >>> RandomSelector(5, seed=1).search(2, k=3).ids.shape
    torch.Size([2, 3])
    """

    def __init__(self, num_items: int, seed: int = 0, groups: Int64[Tensor, " n"] | None = None) -> None:
        """Keep the settings."""
        self.num_items, self.seed = check_count("num_items", num_items), seed
        self.groups = check_groups("groups", groups, num_items)

    def search(
        self, query: int | Float[Tensor, "b d"], k: int, exclude: Int64[Tensor, " b"] | None = None, first: int = 0
    ) -> DemoSelection:
        """K random items for every query.

        Args:
            query: how many queries, or their features, of which only the number counts.
            k: how many items.
            exclude: for every query a group that must not appear.
            first: number of the first query, so that a batched run draws what one call would.

        Raises:
            ValueError: k is not in 1..pool.
        """
        num = query if isinstance(query, int) else len(query)
        check_count("k", k)
        check_available(k, self.num_items, self.groups, exclude, num)
        ids = torch.empty(num, k, dtype=torch.int64)
        for i in range(num):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + first + i) % (1 << 63))
            drawn = torch.randperm(self.num_items, generator=generator)
            if exclude is not None:
                drawn = drawn[self.groups[drawn] != exclude[i]]
            ids[i] = drawn[:k]
        return _exactly(torch.empty(num, 1), ids, torch.zeros(num, k), 0, "descending")


class TopKClipSelector:
    """The K items whose image features have the highest cosine, most similar first; exact, and ties go to the smaller id.

    Args:
        features: image features of the pool, normalised or not.
        groups: one number an item; see `exclude`.

    Raises:
        ValueError: the features are empty, not finite or misshapen.

    >>> TopKClipSelector(torch.eye(3)).search(torch.tensor([[0.1, 0.9, 0.2]]), 2).ids
    tensor([[1, 2]])
    """

    order = "descending"

    def __init__(self, features: Float[Tensor, "n d"], groups: Int64[Tensor, " n"] | None = None) -> None:
        """Keep the pool and its norms."""
        if len(check_rows("features", features)) == 0:
            raise ValueError("features must hold at least one item, got an empty pool")
        wide = features.dtype in (torch.float32, torch.float64)
        self.features = features.detach() if wide else features.detach().float()
        self.groups = check_groups("groups", groups, len(features))
        norm = fp64_norm(self.features)
        self._inverse = torch.where(norm == 0, 0.0, 1 / norm)

    @torch.no_grad()
    def search(self, query: Float[Tensor, "b d"], k: int, exclude: Int64[Tensor, " b"] | None = None) -> DemoSelection:
        """The k most similar items.

        Args:
            query: image features of the queries.
            k: how many.
            exclude: for every query a group that must not appear.

        Returns:
            The selection, certified: the cosines of everything else, with the rounding of fp32, lie below.

        Raises:
            ValueError: k is not in 1..pool, or shapes do not fit.
        """
        check_rows("query", query, dim=self.features.shape[1])
        check_count("k", k)
        check_available(k, len(self.features), self.groups, exclude, len(query))
        block = max(1, _BLOCK_BYTES // (8 * len(self.features)))
        parts = [
            self._search(query[i : i + block], k, None if exclude is None else exclude[i : i + block])
            for i in range(0, max(len(query), 1), block)
        ]
        ids, scores, certified, num = (torch.cat(part) for part in zip(*parts, strict=True))
        return in_order(ids, scores, torch.zeros_like(scores), certified, num, self.order)

    def _search(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, ...]:
        direction = F.normalize(query.double(), dim=-1).to(self.features.device)
        wide = self.features.dtype == torch.float64 or products_are_rounded(self.features.device)
        with torch.autocast(self.features.device.type, enabled=False):
            low = direction if wide else direction.float()
            product = (low @ self.features.to(low.dtype).mT).double()
        keys = product.mul_(self._inverse).neg_()
        if exclude is not None:
            keys.masked_fill_(self.groups == exclude.unsqueeze(-1), torch.inf)

        def best(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            scores = torch.einsum("bmd,bd->bm", self.features[ids].double(), direction[rows]) * self._inverse[ids]
            if exclude is not None:
                scores = scores.masked_fill(self.groups[ids] == exclude[rows].unsqueeze(-1), -torch.inf)
            kept = best_first(scores, ids)[:, :k]
            return ids.gather(-1, kept), scores.gather(-1, kept)

        # A product of fp32 vectors, one of norm 1, divided by the norm of the other (Higham, 2002, section 3.1).
        slack = gamma(self.features.shape[1])
        return search_by_bound(direction, k, keys, lambda values: slack - values, best)


class RicesSelector(TopKClipSelector):
    """As `TopKClipSelector`, with the most similar item last, next to the query (OpenFlamingo's RICES)."""

    order = "ascending"


class MmicesSelector:
    """Image features keep the `prefilter` nearest items, text features rank them; most similar first (MMICES).

    Args:
        images: image features of the pool.
        texts: text features of the pool, e.g. of question and caption.
        prefilter: how many items the images keep.
        groups: one number an item; see `exclude`.

    Raises:
        ValueError: the pools are empty, or of different size, or prefilter < 1.
    """

    def __init__(
        self,
        images: Float[Tensor, "n d"],
        texts: Float[Tensor, "n t"],
        prefilter: int = 200,
        groups: Int64[Tensor, " n"] | None = None,
    ) -> None:
        """Keep both pools."""
        self.by_image = TopKClipSelector(images, groups)
        self.texts = check_rows("texts", texts).detach()
        if len(texts) != len(images):
            raise ValueError(f"texts must have as many rows as images, {len(images)}, got {len(texts)}")
        self.prefilter = check_count("prefilter", prefilter)

    @torch.no_grad()
    def search(
        self,
        query: Float[Tensor, "b d"],
        k: int,
        exclude: Int64[Tensor, " b"] | None = None,
        *,
        text: Float[Tensor, "b t"],
    ) -> DemoSelection:
        """The k items most similar in text among the `prefilter` most similar images.

        Args:
            query: image features of the queries.
            k: how many, at most prefilter.
            exclude: for every query a group that must not appear.
            text: text features of the queries.

        Raises:
            ValueError: k is not in 1..min(pool, prefilter), or shapes do not fit.
        """
        check_rows("text", text, dim=self.texts.shape[1])
        if len(text) != len(query):
            raise ValueError(f"text must have one row a query, {len(query)}, got {len(text)}")
        if k > self.prefilter:
            raise ValueError(f"k must be at most prefilter = {self.prefilter}, got {k}")
        check_count("k", k)
        check_available(k, len(self.texts), self.by_image.groups, exclude, len(query))
        kept = self.by_image.search(query, min(self.prefilter, self._available(exclude)), exclude)
        wanted = F.normalize(text.double(), dim=-1).to(self.texts.device)
        scores = torch.einsum("bmt,bt->bm", F.normalize(self.texts[kept.ids].double(), dim=-1), wanted)
        first = best_first(scores, kept.ids)[:, :k]
        ids, scores = kept.ids.gather(-1, first), scores.gather(-1, first)
        return in_order(ids, scores, torch.zeros_like(scores), kept.certified, kept.num_candidates, "descending")

    def _available(self, exclude: Tensor | None) -> int:
        """How many items every query may use."""
        if exclude is None or not len(exclude):
            return len(self.texts)
        return int((self.by_image.groups != exclude.unsqueeze(-1)).sum(-1).min())


def knn_vote(selection: DemoSelection, answers: Sequence[str]) -> list[str]:
    """The answer that most of the chosen demonstrations carry: what selection yields without any language model.

    Args:
        selection: the chosen demonstrations.
        answers: the answer of every item of the pool.

    Returns:
        One answer a query; of equally frequent ones, that of the more relevant demonstration.

    Raises:
        ValueError: answers is empty or shorter than the pool that was searched.

    >>> pool = TopKClipSelector(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2]]))
    >>> knn_vote(pool.search(torch.tensor([[1.0, 0.0]]), 3), ["red", "blue", "blue"])
    ['blue']
    """
    if not answers or (selection.ids.numel() and int(selection.ids.max()) >= len(answers)):
        raise ValueError(f"answers must give an answer for every item of the pool, got {len(answers)}")
    # Counter keeps insertion order among equal counts.
    return [Counter(answers[i] for i in row).most_common(1)[0][0] for row in selection.most_relevant_first().tolist()]
