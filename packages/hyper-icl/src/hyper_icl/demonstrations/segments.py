"""Which token of a prompt belongs to which demonstration; no reference, the bookkeeping of the other modules."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn import functional as F

from hyper_icl._checks import check_count


@dataclass(frozen=True)
class SegmentMap:
    """The segment of every prompt token: -1 prefix or padding, 0..K-1 demonstrations, K the query.

    The tokens of an image belong to its demonstration. Batches are padded on either side; a prompt with fewer than K
    demonstrations lacks the last of them.

    Attributes:
        ids: segment of every token.
        query_start: position of the first query token.
        num_demos: K.
        query_end: position after the last query token, where padding on the right begins; None for the end of the prompt.

    Raises:
        ValueError: an id is out of range, or the query is not the block from query_start to query_end.
    """

    ids: Int64[Tensor, "b t"]
    query_start: Int64[Tensor, " b"]
    num_demos: int
    query_end: Int64[Tensor, " b"] | None = None

    def __post_init__(self) -> None:
        """Check that the query is one block."""
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 of shape (b, t), got {self.ids.dtype} of {tuple(self.ids.shape)}")
        if self.query_start.shape != self.ids.shape[:1] or self.query_start.dtype != torch.int64:
            raise ValueError(f"query_start must be int64 of shape ({len(self.ids)},), got {self.query_start.shape}")
        if self.ends.shape != self.query_start.shape or self.ends.dtype != torch.int64:
            raise ValueError(f"query_end must be int64 of shape ({len(self.ids)},), got {self.ends.shape}")
        check_count("num_demos", self.num_demos, 0)
        position = torch.arange(self.ids.shape[1], device=self.ids.device)
        is_query = (position >= self.query_start.unsqueeze(-1)) & (position < self.ends.unsqueeze(-1))
        low, high = int(self.ids.min()) if self.ids.numel() else 0, int(self.ids.max()) if self.ids.numel() else 0
        if low < -1 or high > self.num_demos or not torch.equal(is_query, self.ids == self.num_demos):
            raise ValueError(
                f"ids must be -1..{self.num_demos}, with {self.num_demos} from query_start to query_end and nowhere else; "
                f"got {low}..{high}"
            )

    @property
    def length(self) -> int:
        """Number of prompt tokens, padding included."""
        return self.ids.shape[1]

    @property
    def ends(self) -> Int64[Tensor, " b"]:
        """Position after the last query token of every prompt."""
        return torch.full_like(self.query_start, self.length) if self.query_end is None else self.query_end

    @classmethod
    def from_lengths(cls, prefix: Sequence[int], demos: Sequence[Sequence[int]], query: Sequence[int]) -> "SegmentMap":
        """Segments of prompts given by token counts, padded on the left to one length.

        Args:
            prefix: tokens before the first demonstration (bos, system prompt) of every prompt.
            demos: tokens of each demonstration of every prompt, images included; K is the longest prompt's.
            query: tokens of the query of every prompt.

        Raises:
            ValueError: a query has no token, or the arguments differ in length.

        >>> SegmentMap.from_lengths([1, 1], [[2, 1], [1]], [2, 1]).ids
        tensor([[-1,  0,  0,  1,  2,  2],
                [-1, -1, -1, -1,  0,  2]])
        """
        if not len(prefix) == len(demos) == len(query) or not len(query):
            raise ValueError(
                f"prefix, demos and query must have one entry a prompt, got {len(prefix)}, {len(demos)}, {len(query)}"
            )
        if min(query) < 1:
            raise ValueError(f"query must have at least one token in every prompt, got {min(query)}")
        num = max(map(len, demos))
        rows = []
        for head, lengths, tail in zip(prefix, demos, query, strict=True):
            sizes = torch.tensor([head, *lengths, *[0] * (num - len(lengths)), tail])
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
    def from_chats(
        cls, processor: Any, chats: Sequence[Sequence[Mapping[str, Any]]], inputs: Mapping[str, Any], **settings: Any
    ) -> "SegmentMap":
        """Segments of the prompts that a processor made of chats, on whatever side it padded them.

        A chat is system messages, a turn of user and assistant for each demonstration, and the user's question, as
        `insert_demos` makes it. What the template puts before the first turn is found by repeating that turn: a chat of
        two equal turns is longer than one of one turn by the turn alone. If the template treats turns unequally, all
        of it counts as part of the first demonstration.

        Args:
            processor: its `apply_chat_template` makes token ids of the beginnings of each chat.
            chats: what `inputs` were made of, each with one demonstration or more.
            inputs: the processor's output, with "input_ids" and, if anything is padded, "attention_mask".
            settings: options of `apply_chat_template` behind `inputs`, without padding and generation prompt.

        Raises:
            ValueError: turns do not alternate, or see `from_prefixes` and `batch`.

        >>> class Letters:
        ...     def apply_chat_template(self, chat, **_):
        ...         return {"input_ids": torch.tensor([[1, *(ord(x) for m in chat for x in m["content"])]])}
        >>> chat = [{"role": r, "content": c} for r, c in (("user", "ab"), ("assistant", "c"), ("user", "de"))]
        >>> SegmentMap.from_chats(Letters(), [chat], Letters().apply_chat_template(chat)).ids
        tensor([[-1,  0,  0,  0,  1,  1]])
        """
        whole = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(whole)).bool()

        def encoded(chat: Sequence[Mapping[str, Any]]) -> Tensor:
            made = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **settings)
            ids = made["input_ids"][0]
            return ids[made["attention_mask"][0].bool()] if "attention_mask" in made else ids

        maps = []
        for chat, ids, real in zip(chats, whole, mask, strict=True):
            roles = [message["role"] for message in chat]
            start = roles.index("user") if "user" in roles else 0
            num = (len(chat) - start) // 2
            if num < 1 or roles[start:] != ["user", "assistant"] * num + ["user"]:
                raise ValueError(f"chats must be turns of user and assistant and a question of the user, got {roles}")
            prefixes = [encoded(chat[: start + 2 * i]).to(ids.device) for i in range(1, num + 1)]
            first, twice = prefixes[0], encoded([*chat[: start + 2], *chat[start : start + 2]]).to(ids.device)
            head = 2 * len(first) - len(twice)
            if head < 0 or not torch.equal(twice, torch.cat([first, first[head:]])):
                head = 0
            maps.append(cls.from_prefixes(prefixes, ids[real], head))
        return cls.batch(maps, mask)

    @classmethod
    def batch(
        cls, maps: Sequence["SegmentMap"], attention_mask: Int64[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None
    ) -> "SegmentMap":
        """Join the maps of single prompts, padded as a processor padded them; K is the largest of theirs.

        Args:
            maps: one map without padding for every prompt, e.g. of `from_prefixes`.
            attention_mask: the processor's, on whatever side it pads; by default the maps are padded on the left.

        Raises:
            ValueError: a row of the mask does not have as many tokens in one block as its map.

        >>> one, two = (SegmentMap.from_lengths([1], [[1] * k], [1]) for k in (1, 2))
        >>> SegmentMap.batch([one, two], torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])).ids
        tensor([[-1,  0,  2, -1],
                [-1,  0,  1,  2]])
        """
        num = max(m.num_demos for m in maps)
        length = max(m.length for m in maps) if attention_mask is None else attention_mask.shape[1]
        joined = []
        for i, own in enumerate(maps):
            start = length - own.length
            if attention_mask is not None:
                row = attention_mask[i].bool()
                start = int(row.int().argmax())
                if not int(row.sum()) == int(row[start : start + own.length].sum()) == own.length:
                    raise ValueError(
                        f"attention_mask must hold {own.length} tokens in one block in row {i}, got {row.int().tolist()}"
                    )
            renamed = cls(torch.where(own.ids == own.num_demos, num, own.ids), own.query_start, num, own.query_end)
            joined.append(renamed.left_padded(start).right_padded(length - start - own.length))
        ids, starts = torch.cat([m.ids for m in joined]), torch.cat([m.query_start for m in joined])
        ends = torch.cat([m.ends for m in joined])
        return cls(ids, starts, num, None if (ends == length).all() else ends)

    def left_padded(self, num: int) -> "SegmentMap":
        """The map after `num` more padding tokens on the left."""
        check_count("num", num, 0)
        ends = None if self.query_end is None else self.query_end + num
        return SegmentMap(F.pad(self.ids, (num, 0), value=-1), self.query_start + num, self.num_demos, ends)

    def right_padded(self, num: int) -> "SegmentMap":
        """The map before `num` more padding tokens on the right."""
        ids = F.pad(self.ids, (0, check_count("num", num, 0)), value=-1)
        return SegmentMap(ids, self.query_start, self.num_demos, self.ends if num else self.query_end)

    def to(self, device: torch.device | str) -> "SegmentMap":
        """The map on another device."""
        ends = None if self.query_end is None else self.query_end.to(device)
        return SegmentMap(self.ids.to(device), self.query_start.to(device), self.num_demos, ends)

    def query_rows(self, num: int | None = None) -> Int64[Tensor, "b r"]:
        """Positions of the last `num` query tokens of every prompt; by default as many as the shortest query has."""
        shortest = int((self.ends - self.query_start).min())
        num = shortest if num is None else check_count("num", num)
        if num > shortest:
            raise ValueError(f"num must be at most the shortest query, {shortest} tokens, got {num}")
        return self.ends.unsqueeze(-1) + torch.arange(-num, 0, device=self.ids.device)
