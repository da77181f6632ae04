"""A bias by segment bound to one layer: lookup tables for any batch of beams and any number of generated tokens."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from hyper_icl.segments import SegmentMap


class SegmentBias:
    """The table of one layer and the segments of the prompt, expanded to what an attention call sees.

    Segment s stands at index s + 1 of the table. Tokens after the prompt belong to the query.

    Args:
        table: bias of a row's segment on a column's segment.
        segments: the prompt's segments.
        every_row: rows before the query carry a bias too.
    """

    def __init__(self, table: Float[Tensor, "b h z z"], segments: SegmentMap, every_row: bool) -> None:
        """Keep the table."""
        self.table, self.segments, self.every_row = table, segments, every_row
        self._first = 0 if every_row else int(segments.query_start.min())
        self._ragged = not every_row and int(segments.query_start.max()) != self._first
        self._length = 0

    def check_call(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Raise ValueError unless this attention call can belong to the plan's prompt."""
        batch, heads = self.table.shape[:2]
        if query.shape[0] % batch:
            raise ValueError(
                f"plan of batch {batch} must divide the model's batch (beams included), got {query.shape[0]}: give every "
                "prompt its row of the bias"
            )
        if heads not in (1, query.shape[1]):
            raise ValueError(f"plan must have a bias for one or for all {query.shape[1]} heads, got {heads}")
        num_keys, first = key.shape[2], key.shape[2] - query.shape[2]
        length = self.segments.length
        # A first call brings the whole prompt; without a cache, later ones bring it again with one token more.
        fits = first >= length if first else num_keys in (length, self._length + 1)
        if not fits:
            raise ValueError(
                f"plan was made for a prompt of {length} tokens, got {num_keys} keys of which {first} are cached: build "
                "SegmentMap from the processor's own output, padding included (left_padded), and pass the prompt in one "
                f"forward (layer {layer})"
            )
        self._length = num_keys

    def _segments_of(self, query: Tensor, key: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Table rows of the queries from `start` on, and table columns of all keys."""
        ids = self.segments.ids.to(query.device) + 1
        more = key.shape[2] - ids.shape[1]
        ids = F.pad(ids, (0, more), value=self.segments.num_demos + 1)
        ids = ids.repeat_interleave(query.shape[0] // len(ids), dim=0)
        return ids[:, key.shape[2] - query.shape[2] + start :], ids

    def lookup(self, query: Tensor, key: Tensor) -> tuple[Tensor, Int64[Tensor, "b t"], Int64[Tensor, "b s"]]:
        """The table for the batch, and the table rows and columns of all queries and keys."""
        table = self.table.to(query.device)
        table = table.repeat_interleave(query.shape[0] // len(table), dim=0)
        return table, *self._segments_of(query, key, 0)

    def rows(self, query: Tensor, key: Tensor, start: int) -> Float[Tensor, "b h r s"]:
        """The bias of query rows start.., in the query's dtype."""
        table, _, _ = self.lookup(query, key)
        row, column = self._segments_of(query, key, start)
        batch = torch.arange(len(row), device=row.device).unsqueeze(-1)
        by_segment = table[batch, :, row].permute(0, 2, 1, 3)
        index = column[:, None, None, :].expand(*by_segment.shape[:3], column.shape[1])
        return by_segment.gather(-1, index).to(query.dtype)

    def first_biased_row(self, query: Tensor, key: Tensor) -> int:
        """The first query row of this call that any prompt of the batch biases."""
        return max(self._first - (key.shape[2] - query.shape[2]), 0)

    def unbiased(self, query: Tensor, key: Tensor, start: int) -> Tensor | None:
        """Boolean (b, rows from start) of rows before their prompt's query; None if there is none."""
        if not self._ragged or key.shape[2] - query.shape[2] >= self.segments.length:
            return None
        row, _ = self._segments_of(query, key, start)
        return row <= self.segments.num_demos
