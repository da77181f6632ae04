"""Random Query Selection and Random Text Pruning as pure functions of (seed, step, rank).

Reference: Mandica et al., arXiv:2408.05097, section 3 (the ideas; sampling laws and probabilities are not published and
are ours). Nothing is stored between steps, so a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib
import random
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hyper_blip.config import RQS_MODES, RTP_MODES, check_choice, check_fraction

Priority = Callable[[list], Sequence[float]]


def stateless_seed(purpose: str, *numbers: int) -> int:
    """A seed in [0, 2^63) from a name and integers, the same on every machine."""
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class RandomQuerySelection:
    """One random query of each picture for the contrastive loss of a step.

    With probability p, idx_b ~ U{0..Q-1}; the same index serves both directions.

    Args:
        p: probability of a step with selection.
        mode: "per_sample", or "per_batch" for one index for all pictures of a rank.
        seed: of the draws.

    Raises:
        ValueError: p outside [0, 1], or an unknown mode.

    >>> RandomQuerySelection(seed=1)(4, 8, step=0, rank=0).shape
    torch.Size([4])
    """

    def __init__(self, p: float = 1.0, mode: str = "per_sample", seed: int = 0) -> None:
        check_fraction("p", p)
        check_choice("mode", mode, RQS_MODES)
        self.p, self.mode, self.seed = p, mode, seed

    def __call__(self, batch_size: int, num_queries: int, step: int, rank: int = 0) -> Int[Tensor, " batch"] | None:
        """Draw.

        Args:
            batch_size: B.
            num_queries: Q.
            step: number of the optimizer step.
            rank: of this process. Whether there is a selection does not depend on it: ranks gather equal shapes.

        Returns:
            Query indices `(B)` in [0, Q) on the CPU, or None when this step uses all queries.
        """
        if random.Random(stateless_seed("rqs-step", self.seed, step)).random() >= self.p:
            return None
        generator = torch.Generator().manual_seed(stateless_seed("rqs", self.seed, step, rank))
        if self.mode == "per_batch":
            return torch.randint(num_queries, (1,), generator=generator).expand(batch_size).clone()
        return torch.randint(num_queries, (batch_size,), generator=generator)


class RandomTextPruning:
    """Shorten captions at random.

    With probability p a caption of n words keeps k ~ U{1..n} of them: the first k ("prefix"), a random subset in order
    ("drop"), a window ("span"), or the k that `priority` ranks highest, in order ("priority"). Never empty.

    Args:
        p: probability for each caption.
        mode: "prefix", "drop", "span" or "priority".
        seed: of the draws.
        priority: takes the words of a caption (or, from `prune_ids`, tuples of token ids) and returns a score for each.

    Raises:
        ValueError: p outside [0, 1], an unknown mode, or "priority" without a `priority`.

    >>> RandomTextPruning(p=1.0, mode="priority", priority=lambda words: [len(w) for w in words])(["a big elephant"], step=3)
    ['elephant']
    """

    def __init__(self, p: float = 0.5, mode: str = "prefix", seed: int = 0, priority: Priority | None = None) -> None:
        check_fraction("p", p)
        check_choice("mode", mode, RTP_MODES)
        if mode == "priority" and priority is None and p > 0:
            raise ValueError("mode 'priority' needs a function `priority` that ranks words, got None")
        self.p, self.mode, self.seed, self.priority = p, mode, seed, priority

    def __call__(self, captions: Sequence[str], step: int, rank: int = 0) -> list[str]:
        """Prune captions at white space.

        Args:
            captions: sentences of at least one word.
            step: number of the optimizer step.
            rank: of this process.

        Returns:
            One caption for each, of at least one word.

        Raises:
            ValueError: an empty caption.
        """
        found = []
        for row, caption in enumerate(captions):
            words = caption.split()
            if not words:
                raise ValueError(f"captions must not be empty, got {caption!r} at position {row}")
            found.append(" ".join(words[i] for i in self._kept(words, step, rank, row)))
        return found

    def prune_ids(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"],
        special_ids: Sequence[int],
        step: int,
        rank: int = 0,
        *,
        pad_id: int = 0,
        starts_word: Tensor | None = None,
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Prune tokenised captions; special tokens stay where they are in the order.

        Args:
            input_ids: token ids, padded.
            attention_mask: 1 at tokens, 0 at padding.
            special_ids: ids that are never removed, such as [CLS] and [SEP].
            step: number of the optimizer step.
            rank: of this process.
            pad_id: fills the freed places at the end.
            starts_word: Bool table over the vocabulary, False at ids that continue a word (BERT's "##..."); then whole
                words stay or go. Without it every token is a word.

        Returns:
            Pruned ids and their mask, of the same shape and device.

        Raises:
            ValueError: a caption without a word.
        """
        ids, mask = input_ids.tolist(), attention_mask.tolist()
        special = set(special_ids)
        starts = None if starts_word is None else starts_word.tolist()
        out_ids, out_mask = torch.full_like(input_ids, pad_id), torch.zeros_like(attention_mask)
        for row, (tokens, valid) in enumerate(zip(ids, mask, strict=True)):
            tokens = [t for t, v in zip(tokens, valid, strict=True) if v]
            words: list[list[int]] = []
            for position, token in enumerate(tokens):
                if token in special:
                    continue
                follows = words and words[-1][-1] == position - 1
                if starts is not None and follows and not starts[token]:
                    words[-1].append(position)
                else:
                    words.append([position])
            if not words:
                raise ValueError(f"input_ids must hold a word in every row, got none in row {row}")
            kept = self._kept([tuple(tokens[p] for p in word) for word in words], step, rank, row)
            stay = {p for i in kept for p in words[i]}
            left = [t for p, t in enumerate(tokens) if p in stay or t in special]
            out_ids[row, : len(left)] = torch.tensor(left, dtype=out_ids.dtype)
            out_mask[row, : len(left)] = 1
        return out_ids, out_mask

    def _kept(self, words: list, step: int, rank: int, row: int) -> list[int]:
        """Positions of the words that stay, ascending."""
        num = len(words)
        draw = random.Random(stateless_seed("rtp", self.seed, step, rank, row))
        if draw.random() >= self.p:
            return list(range(num))
        k = draw.randint(1, num)
        if self.mode == "prefix":
            return list(range(k))
        if self.mode == "drop":
            return sorted(draw.sample(range(num), k))
        if self.mode == "span":
            start = draw.randint(0, num - k)
            return list(range(start, start + k))
        scores = list(self.priority(words))
        if len(scores) != num:
            raise ValueError(f"priority must return a score for each of the {num} words, got {len(scores)}")
        return sorted(sorted(range(num), key=lambda i: (-scores[i], i))[:k])


def text_keys(
    input_ids: Int[Tensor, "batch tokens"], attention_mask: Int[Tensor, "batch tokens"]
) -> Int[Tensor, " batch"]:
    """One integer for each caption, equal for equal captions: 8 bytes to gather in place of the ids.

    A sum of ids times fixed odd 64-bit numbers modulo 2^64; two different captions agree with a chance of about 2^-60.

    Args:
        input_ids: token ids.
        attention_mask: 1 at tokens; what stands at padding does not count.

    Returns:
        Keys `(batch)`, int64.
    """
    table = _factors(input_ids.shape[1], input_ids.device)
    return ((input_ids.long() + 1) * attention_mask.long() * table).sum(-1)


def _factors(num: int, device: torch.device) -> Tensor:
    return _FACTORS[:num].to(device) if num <= len(_FACTORS) else torch.tensor(_odd(num), device=device)


def _odd(num: int) -> list[int]:
    """Fixed odd numbers of 63 bits."""
    draw = random.Random(0x5EED)
    return [draw.getrandbits(63) | 1 for _ in range(num)]


# As long as BERT's captions can be: a compiled step draws no numbers.
_FACTORS = torch.tensor(_odd(512), dtype=torch.int64)
