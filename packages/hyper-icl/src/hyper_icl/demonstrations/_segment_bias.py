"""A bias by segment bound to one layer, and which forward passes a plan admits; both by absolute position.

No reference. A token's position is its place in the sequence, padding counted: the prompt's segments speak of positions
0..length-1, and everything after them counts as query. A call is described by where its queries and its keys begin.
"""

import weakref

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from hyper_icl._hooks import Call, call_of
from hyper_icl.demonstrations.segments import SegmentMap


class Admission:
    """Which forward passes belong to a plan's prompt, and whether any attention call used the plan.

    Args:
        segments: the prompt's segments.
        every_row: rows before the query carry a bias too.
        chunked: the prompt may come in several calls.
    """

    def __init__(self, segments: SegmentMap, every_row: bool, chunked: bool) -> None:
        """Nothing is seen yet."""
        self.segments, self.every_row, self.chunked = segments, every_row, chunked
        self.used = False
        self._length = 0
        self._seen: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()

    def own(self, cache: Cache, length: int) -> None:
        """Note that a cache was filled under this plan."""
        self._seen[cache] = length

    def admit(self, first: int, num: int, cache: Cache | None) -> None:
        """Raise ValueError unless a call of `num` tokens from position `first` can belong to the plan's prompt."""
        length, end = self.segments.length, first + num
        used, self.used = self.used, True
        if cache is None:
            # Without a cache, later calls bring the whole text again with one token more.
            fits = end in (length, self._length + 1)
            self._length = end
        else:
            fits = first >= length or end == length or (self.chunked and end < length)
            # Keys that were made outside the block carry no bias: right for the demonstrations, wrong for the query.
            most = 0 if self.every_row else int(self.segments.query_start.min())
            if fits and first > max(self._seen.get(cache, 0), most):
                raise ValueError(
                    f"cache must be filled inside the block, or hold at most the {most} tokens before the query, got {first} "
                    "tokens"
                )
            self._seen[cache] = end
        if not fits:
            raise ValueError(
                f"plan was made for a prompt of {length} tokens, got tokens {first} to {end - 1}: build SegmentMap from the "
                "processor's own output, padding included (left_padded, right_padded), and say chunked=True if the prompt "
                "comes in pieces"
            )
        # A refusal is heard; an admitted call still has to reach the attention.
        self.used = used


class SegmentBias:
    """The table of one layer and the segments of the prompt, expanded to what an attention call sees.

    Segment s stands at index s + 1 of the table. Tokens after the prompt belong to the query.

    Args:
        table: bias of a row's segment on a column's segment.
        segments: the prompt's segments.
        every_row: rows before the query carry a bias too.
        layer: the text layer.
        decoder: id of the decoder whose calls say the positions.
        admission: is told that the plan was used.
    """

    def __init__(
        self,
        table: Float[Tensor, "b h z z"],
        segments: SegmentMap,
        every_row: bool,
        layer: int = 0,
        decoder: int = 0,
        admission: Admission | None = None,
    ) -> None:
        """Keep the table."""
        self.table, self.segments, self.every_row = table, segments, every_row
        self.layer, self.decoder, self.admission = layer, decoder, admission
        self._first = 0 if every_row else int(segments.query_start.min())
        self._ragged = not every_row and bool(
            (segments.query_start != self._first).any() or (segments.ends != segments.length).any()
        )

    def place(self, query: Tensor, key: Tensor) -> "PlacedBias":
        """The bias of one attention call.

        Raises:
            ValueError: the call cannot belong to the plan's prompt.
        """
        if self.admission is not None:
            self.admission.used = True
        batch, heads = self.table.shape[:2]
        if query.shape[0] % batch:
            raise ValueError(
                f"plan of batch {batch} must divide the model's batch (beams included), got {query.shape[0]}: give every "
                "prompt its row of the bias"
            )
        if heads not in (1, query.shape[1]):
            raise ValueError(f"plan must have a bias for one or for all {query.shape[1]} heads, got {heads}")
        call = call_of(self.decoder, query.shape[2])
        return PlacedBias(self, call, query, key)


class PlacedBias:
    """A bias by segment for the queries and keys of one attention call.

    Args:
        bias: the layer's bias.
        call: where the forward pass stands.
        query: the call's queries.
        key: its keys.
    """

    def __init__(self, bias: SegmentBias, call: Call, query: Tensor, key: Tensor) -> None:
        """Look the segments up."""
        self._bias, self._num, self._device = bias, query.shape[2], query.device
        self.first, self.first_key = call.first, call.first_key(bias.layer, key.shape[2])
        if self.first_key < 0:
            raise ValueError(
                f"cache must hold one key a token under calibrate, got {key.shape[2]} keys for {call.first + call.num} tokens: "
                "use a dynamic or a static cache"
            )
        repeats = query.shape[0] // len(bias.table)
        self.table = bias.table.to(query.device).repeat_interleave(repeats, dim=0)
        self.row = self._segments(self.first, query.shape[2], repeats)
        self.column = self._segments(self.first_key, key.shape[2], repeats)

    def _segments(self, start: int, num: int, repeats: int) -> Int64[Tensor, "b n"]:
        """Index in the table of positions start..start+num-1."""
        parts = self._bias.segments
        ids = F.pad(parts.ids, (0, max(start + num - parts.length, 0)), value=parts.num_demos)
        return (ids[:, start : start + num] + 1).to(self._device).repeat_interleave(repeats, dim=0)

    def rows(self, dtype: torch.dtype, start: int) -> Float[Tensor, "b h r s"]:
        """The bias of query rows start.., in a dtype."""
        row = self.row[:, start:]
        batch = torch.arange(len(row), device=row.device).unsqueeze(-1)
        by_segment = self.table[batch, :, row].permute(0, 2, 1, 3)
        index = self.column[:, None, None, :].expand(*by_segment.shape[:3], self.column.shape[1])
        return by_segment.gather(-1, index).to(dtype)

    def causal(self, start: int) -> Tensor:
        """Boolean (rows, keys): which keys rows start.. may see if nothing but order counts."""
        row = torch.arange(start, self._num, device=self._device) + self.first
        return torch.arange(self.column.shape[1], device=self._device) + self.first_key <= row.unsqueeze(-1)

    def first_biased_row(self) -> int:
        """The first query row of this call that any prompt of the batch biases."""
        return max(self._bias._first - self.first, 0)

    def unbiased(self, start: int) -> Tensor | None:
        """Boolean (b, rows from start) of rows outside their prompt's query; None if there is none."""
        if not self._bias._ragged or self.first >= self._bias.segments.length:
            return None
        return self.row[:, start:] <= self._bias.segments.num_demos
