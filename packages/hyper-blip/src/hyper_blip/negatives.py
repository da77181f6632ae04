"""Which pairs belong together, and which wrong ones the matching loss sees.

References: Li et al., "BLIP-2", ICML 2023, section 3.2 (hard negatives in proportion to the similarity); the masks are ours.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyper_blip.gather import gather_rows, world
from hyper_blip.sampling import text_keys


def positives(
    num: int, image_ids: Tensor | None, text_ids: Tensor | None, device: torch.device | str = "cpu"
) -> Bool[Tensor, "batch all"]:
    """E: which of all N pairs count as the pair of each of this rank's `num` rows."""
    rank, size = world()
    found = torch.zeros(num, num * size, dtype=torch.bool, device=device)
    found.diagonal(rank * num).fill_(True)
    for name, ids in (("image_ids", image_ids), ("text_ids", text_ids)):
        if ids is None:
            continue
        if ids.shape[0] != num:
            raise ValueError(f"{name} must have {num} rows, got {ids.shape[0]}")
        keys = text_keys(ids, (ids != 0).long()) if ids.ndim == 2 else ids
        found |= keys[:, None] == gather_rows(keys, False)[None, :]
    return found


def matching_positives(
    image_ids: Int[Tensor, " ids"] | None, captions: Sequence[Int[Tensor, " batch"]]
) -> Bool[Tensor, "batch all"]:
    """Which pairs the matching loss must not call wrong.

    A pair is out if its pictures show the same thing, or if one form of a caption equals one form of the other. The forms are
    the whole caption and the pruned one: what pruning made different still describes both pictures, and a pruned caption may
    be somebody's whole one.

    Args:
        image_ids: equal for pictures that show the same thing.
        captions: the keys of one form of every caption each (see `hyper_blip.sampling.text_keys`), at least one.

    Returns:
        True where a pair is no negative.
    """
    found = positives(len(captions[0]), image_ids, None, captions[0].device)
    for other in captions:
        everyone = gather_rows(other, False)
        for own in captions:
            found |= own[:, None] == everyone[None, :]
    return found


def hard_negatives(
    sim_i2t: Float[Tensor, "batch all"],
    sim_t2i: Float[Tensor, "texts all_images"],
    positive: Bool[Tensor, "rows columns"],
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Draw a wrong picture for each text and a wrong text for each picture, the more alike the likelier.

    Probabilities softmax(logits) over the pairs that are not positive. (A finite mask such as -10,000 would draw a positive
    where a row has no negative; such rows are reported instead.)

    Args:
        sim_i2t: logits of pictures to texts.
        sim_t2i: logits of texts to pictures.
        positive: pairs that must not be drawn.
        generator: source of randomness on the logits' device.

    Returns:
        Picture for each text, text for each picture, and whether the row has a negative at all; `(batch)` each.

    Raises:
        ValueError: shapes that differ.
    """
    if not sim_i2t.shape == sim_t2i.shape == positive.shape:
        raise ValueError(
            f"sim_i2t, sim_t2i and positive must have one shape, got {tuple(sim_i2t.shape)}, {tuple(sim_t2i.shape)} and "
            f"{tuple(positive.shape)}"
        )
    valid = ~positive.all(1)

    def draw(logits: Tensor) -> Tensor:
        weights = logits.detach().float().masked_fill(positive, -torch.inf).softmax(1)
        # NaN logits are reported with the loss; here they would end the process on a GPU.
        weights = torch.where((valid & weights.isfinite().all(1))[:, None], weights, 1.0)
        return torch.multinomial(weights, 1, generator=generator)[:, 0] if len(weights) else valid.long()

    return draw(sim_t2i), draw(sim_i2t), valid
