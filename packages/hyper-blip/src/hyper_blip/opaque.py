"""The random draws of a training step as operators that torch.compile does not look into: a compiled step draws what an eager one draws.

They hash the step's number and draw on the CPU, which no graph can hold. The number comes as a tensor, so that a new step is no new graph.
"""

import torch
from torch import Tensor

from hyper_blip.negatives import hard_negatives
from hyper_blip.sampling import RandomQuerySelection, RandomTextPruning, stateless_seed

__all__ = ["compiling", "drawn_negatives", "drawn_queries", "pruned_captions", "step_tensor"]


def compiling() -> bool:
    """Whether torch.compile is at work: what looks at values, such as a check, is then left out."""
    return torch.compiler.is_compiling()


def step_tensor(step: int | None) -> Tensor | None:
    """The number of a step as the operators take it."""
    return None if step is None else torch.full((), step, dtype=torch.int64)


@torch.library.custom_op("hyper_blip::drawn_queries", mutates_args=())
def drawn_queries(step: Tensor, batch: int, queries: int, mode: str, seed: int, rank: int) -> Tensor:
    """`RandomQuerySelection` with p = 1."""
    return RandomQuerySelection(1.0, mode, seed)(batch, queries, int(step), rank)


@drawn_queries.register_fake
def _(step: Tensor, batch: int, queries: int, mode: str, seed: int, rank: int) -> Tensor:
    return step.new_empty(batch)


@torch.library.custom_op("hyper_blip::pruned_captions", mutates_args=())
def pruned_captions(
    ids: Tensor, mask: Tensor, special: list[int], step: Tensor, p: float, mode: str, seed: int, rank: int, pad_id: int,
    starts_word: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`RandomTextPruning.prune_ids`."""
    pruning = RandomTextPruning(p, mode, seed)
    return pruning.prune_ids(ids, mask, special, int(step), rank, pad_id=pad_id, starts_word=starts_word)


@pruned_captions.register_fake
def _(
    ids: Tensor, mask: Tensor, special: list[int], step: Tensor, p: float, mode: str, seed: int, rank: int, pad_id: int,
    starts_word: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(ids), torch.empty_like(mask)


@torch.library.custom_op("hyper_blip::drawn_negatives", mutates_args=())
def drawn_negatives(
    i2t: Tensor, t2i: Tensor, positive: Tensor, step: Tensor | None, seed: int, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`hard_negatives`, with the generator of the step."""
    generator = None
    if step is not None:
        generator = torch.Generator(i2t.device).manual_seed(stateless_seed("itm", seed, int(step), rank))
    return hard_negatives(i2t, t2i, positive, generator)


@drawn_negatives.register_fake
def _(
    i2t: Tensor, t2i: Tensor, positive: Tensor, step: Tensor | None, seed: int, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = positive.new_empty(len(positive), dtype=torch.int64)
    return rows, torch.empty_like(rows), positive.new_empty(len(positive))
