"""The text tower with learned tokens in its input and in its first blocks.

References: Khattak et al., "MaPLe: Multi-modal prompt learning", CVPR 2023, and "Self-regulating prompts", ICCV 2023
(deep text prompts); Radford et al., 2021 (the tower).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mat_align.backbones import Backbone, text_tower


def label_text(name: str, drop_digits: bool = False) -> str:
    """The text of a node's name: a trailing underscore is dropped, and underscores become spaces.

    Args:
        name: a node's name, or a text that is finished already.
        drop_digits: drop digits first, as the released code does, which numbers nodes of one name; "737-300" and
            "747-200" are then one text.

    >>> label_text("maple_tree_"), label_text("737-300"), label_text("crane_2", drop_digits=True)
    ('maple tree', '737-300', 'crane')
    """
    kept = "".join(ch for ch in name if not ch.isdigit()) if drop_digits else name
    return kept.removesuffix("_").replace("_", " ")


def encode_text(
    clip: nn.Module | Backbone, ids: Int[Tensor, "n length"], first: Tensor | None = None, deeper: Sequence[Tensor] = ()
) -> Float[Tensor, "n d"]:
    """Text features, with learned tokens in place of the first words.

    Args:
        clip: the model, see `mat_align.backbones`.
        ids: tokens, see `TextTower.tokenize`; a causal tower takes them without the padding that all share, too.
        first: (m, w) embeddings that replace those of the first m words.
        deeper: (m, w) for each of the blocks 1, 2, ..., which replace the states there.

    Returns:
        Features `(n d)`, not normalised; without learned tokens those of `clip.encode_text`.

    Raises:
        ValueError: no text.
    """
    if len(ids) == 0:
        raise ValueError("ids must hold at least one text, got n = 0")
    tower = clip.text if isinstance(clip, Backbone) else text_tower(clip)
    x = tower.embedding(ids)
    if first is not None:
        x = _replaced(x, first, tower.start)
    x = x + tower.positions()[: x.shape[1]].to(x.dtype)
    for number in range(tower.num_blocks):
        if 1 <= number <= len(deeper):
            x = _replaced(x, deeper[number - 1], tower.start)
        x = tower.block(number, x)
    return tower.pool(x, ids)


def _replaced(x: Tensor, learned: Tensor, start: int) -> Tensor:
    parts = (x[:, :start], learned.to(x.dtype).expand(len(x), -1, -1), x[:, start + len(learned) :])
    return torch.cat(parts, dim=1)
