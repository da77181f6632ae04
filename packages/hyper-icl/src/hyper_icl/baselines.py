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
from hyper_icl._selected import DemoSelection, check_available, in_order


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
    """The K items whose image features have the highest cosine, most similar first.

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
        """Normalise the pool."""
        if len(check_rows("features", features)) == 0:
            raise ValueError("features must hold at least one item, got an empty pool")
        self.features = F.normalize(features.detach(), dim=-1)
        self.groups = check_groups("groups", groups, len(features))

    def _similarity(self, query: Tensor, exclude: Tensor | None) -> Tensor:
        check_rows("query", query, dim=self.features.shape[1])
        similarity = F.normalize(query.to(self.features.dtype), dim=-1) @ self.features.mT
        if exclude is not None:
            similarity = similarity.masked_fill(self.groups == exclude.unsqueeze(-1), -torch.inf)
        return similarity

    @torch.no_grad()
    def search(self, query: Float[Tensor, "b d"], k: int, exclude: Int64[Tensor, " b"] | None = None) -> DemoSelection:
        """The k most similar items.

        Args:
            query: image features of the queries.
            k: how many.
            exclude: for every query a group that must not appear.

        Raises:
            ValueError: k is not in 1..pool, or shapes do not fit.
        """
        check_count("k", k)
        check_available(k, len(self.features), self.groups, exclude, len(query))
        top = self._similarity(query, exclude).topk(k, dim=-1)
        return _exactly(query, top.indices, top.values, len(self.features), self.order)


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
        """Normalise both pools."""
        self.by_image = TopKClipSelector(images, groups)
        self.texts = F.normalize(check_rows("texts", texts).detach(), dim=-1)
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
        similarity = self.by_image._similarity(query, exclude)
        kept = similarity.topk(min(self.prefilter, len(self.texts)), dim=-1)
        wanted = F.normalize(text.to(self.texts.dtype), dim=-1)
        scores = torch.einsum("bmt,bt->bm", self.texts[kept.indices], wanted)
        scores = scores.masked_fill(kept.values == -torch.inf, -torch.inf)
        top = scores.topk(k, dim=-1)
        return _exactly(query, kept.indices.gather(-1, top.indices), top.values, kept.indices.shape[1], "descending")


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
