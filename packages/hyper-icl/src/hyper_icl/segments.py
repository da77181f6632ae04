"""Which token of a prompt belongs to which demonstration; no reference, the bookkeeping of the other modules."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from hyper_icl._checks import check_count


@dataclass(frozen=True)
class SegmentMap:
    """The segment of every prompt token: -1 prefix or padding, 0..K-1 demonstrations, K the query.

    The tokens of an image belong to its demonstration. Batches are padded on the left, so that all queries end together.

    Attributes:
        ids: segment of every token.
        query_start: position of the first query token.
        num_demos: K.

    Raises:
        ValueError: an id is out of range, or the query is not the tail that starts at query_start.
    """

    ids: Int64[Tensor, "b t"]
    query_start: Int64[Tensor, " b"]
    num_demos: int

    def __post_init__(self) -> None:
        """Check that the query is one block at the end."""
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 of shape (b, t), got {self.ids.dtype} of {tuple(self.ids.shape)}")
        if self.query_start.shape != self.ids.shape[:1] or self.query_start.dtype != torch.int64:
            raise ValueError(f"query_start must be int64 of shape ({len(self.ids)},), got {self.query_start.shape}")
        check_count("num_demos", self.num_demos, 0)
        position = torch.arange(self.ids.shape[1], device=self.ids.device)
        is_query = position >= self.query_start.unsqueeze(-1)
        low, high = int(self.ids.min()) if self.ids.numel() else 0, int(self.ids.max()) if self.ids.numel() else 0
        if low < -1 or high > self.num_demos or not torch.equal(is_query, self.ids == self.num_demos):
            raise ValueError(
                f"ids must be -1..{self.num_demos}, with {self.num_demos} from query_start to the end and nowhere else; "
                f"got {low}..{high}"
            )

    @property
    def length(self) -> int:
        """Number of prompt tokens, padding included."""
        return self.ids.shape[1]

    @classmethod
    def from_lengths(cls, prefix: Sequence[int], demos: Sequence[Sequence[int]], query: Sequence[int]) -> "SegmentMap":
        """Segments of prompts given by token counts, padded on the left to one length.

        Args:
            prefix: tokens before the first demonstration (bos, system prompt) of every prompt.
            demos: tokens of each demonstration of every prompt, images included.
            query: tokens of the query of every prompt.

        Raises:
            ValueError: a query has no token, or prompts differ in their number of demonstrations.

        >>> SegmentMap.from_lengths([1, 1], [[2, 1], [1, 1]], [2, 1]).ids
        tensor([[-1,  0,  0,  1,  2,  2],
                [-1, -1, -1,  0,  1,  2]])
        """
        if not len(prefix) == len(demos) == len(query) or not len(query):
            raise ValueError(
                f"prefix, demos and query must have one entry a prompt, got {len(prefix)}, {len(demos)}, {len(query)}"
            )
        counts = {len(d) for d in demos}
        if len(counts) != 1:
            raise ValueError(f"demos must give every prompt the same number of demonstrations, got {sorted(counts)}")
        if min(query) < 1:
            raise ValueError(f"query must have at least one token in every prompt, got {min(query)}")
        num = counts.pop()
        rows = []
        for head, lengths, tail in zip(prefix, demos, query, strict=True):
            sizes = torch.tensor([head, *lengths, tail])
            rows.append(torch.arange(-1, num + 1).repeat_interleave(sizes))
        length = max(map(len, rows))
        ids = torch.stack([F.pad(row, (length - len(row), 0), value=-1) for row in rows])
        return cls(ids, length - torch.tensor(list(query)), num)

    @classmethod
    def from_prefixes(
        cls, prefixes: Sequence[Int64[Tensor, " _"]], full: Int64[Tensor, " t"], head: int = 0
    ) -> "SegmentMap":
        """Segments of one prompt from the token ids of its beginnings, as a processor returns them.

        Each demonstration ends where the ids of the prompt cut off after it stop agreeing with the full prompt: a
        tokenizer may merge characters across the cut, and the longest common prefix gives the merged token to the part
        after it.

        Args:
            prefixes: ids of the prompt cut off after 1, 2, ..., K demonstrations, without padding.
            full: ids of the whole prompt, without padding.
            head: tokens before the first demonstration, e.g. 1 for bos.

        Raises:
            ValueError: a demonstration or the query would have no token.
        """
        ends = [head]
        for i, prefix in enumerate(prefixes):
            shared = min(len(prefix), len(full))
            differs = (prefix[:shared] != full[:shared]).nonzero()
            ends.append(int(differs[0]) if len(differs) else shared)
            if ends[-1] <= ends[-2]:
                raise ValueError(
                    f"prefixes must grow: demonstration {i} ends at token {ends[-1]}, not after {ends[-2]}; tokenize "
                    "every prefix with the same images and settings as the full prompt"
                )
        if ends[-1] >= len(full):
            raise ValueError(
                f"full must go on after the last demonstration, which ends at token {ends[-1]} of {len(full)}"
            )
        demos = [b - a for a, b in itertools.pairwise(ends)]
        made = cls.from_lengths([head], [demos], [len(full) - ends[-1]])
        return cls(made.ids.to(full.device), made.query_start.to(full.device), made.num_demos)

    @classmethod
    def batch(cls, maps: Sequence["SegmentMap"]) -> "SegmentMap":
        """Join maps of the same K, padded on the left to one length."""
        if len({m.num_demos for m in maps}) != 1:
            raise ValueError(f"maps must have the same number of demonstrations, got {[m.num_demos for m in maps]}")
        length = max(m.length for m in maps)
        padded = [m.left_padded(length - m.length) for m in maps]
        return cls(torch.cat([m.ids for m in padded]), torch.cat([m.query_start for m in padded]), maps[0].num_demos)

    def left_padded(self, num: int) -> "SegmentMap":
        """The map after `num` more padding tokens on the left."""
        check_count("num", num, 0)
        return SegmentMap(F.pad(self.ids, (num, 0), value=-1), self.query_start + num, self.num_demos)

    def to(self, device: torch.device | str) -> "SegmentMap":
        """The map on another device."""
        return SegmentMap(self.ids.to(device), self.query_start.to(device), self.num_demos)

    def query_rows(self, num: int | None = None) -> Int64[Tensor, "b r"]:
        """Positions of the last `num` query tokens of every prompt; by default as many as the shortest query has."""
        shortest = int((self.length - self.query_start).min())
        num = shortest if num is None else check_count("num", num)
        if num > shortest:
            raise ValueError(f"num must be at most the shortest query, {shortest} tokens, got {num}")
        rows = torch.arange(self.length - num, self.length, device=self.ids.device)
        return rows.expand(len(self.ids), num)
