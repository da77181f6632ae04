"""The text tower of open_clip with learned tokens in its input and in its first blocks.

References: Khattak et al., "MaPLe: Multi-modal prompt learning", CVPR 2023, and "Self-regulating prompts", ICCV 2023
(deep text prompts); Radford et al., 2021 (the tower).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


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


def text_tower(clip: nn.Module) -> nn.Module:
    """The module that holds the text tower's parts: open_clip's CLIP itself, or `.text` of its CustomTextCLIP.

    Raises:
        ValueError: another kind of text tower, such as one with a class token or from transformers.
    """
    tower = getattr(clip, "text", clip)
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    missing = [part for part in parts if not hasattr(tower, part)]
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if missing or getattr(tower, "cls_emb", None) is not None or pool not in ("argmax", "eos"):
        raise ValueError(f"clip must have a text transformer that pools at the end token, got {type(tower).__name__}")
    return tower


def context_length(clip: nn.Module) -> int:
    """The number of positions of the text tower."""
    return text_tower(clip).positional_embedding.shape[0]


def token_ids(texts: Sequence[str], length: int) -> Int[Tensor, "n length"]:
    """CLIP's byte-pair tokens between start and end, padded with 0.

    Raises:
        ValueError: a text that needs more than `length` tokens.
    """
    # Imported here: open_clip takes seconds, and only text needs it.
    from open_clip.tokenizer import _tokenizer

    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        tokens = [_tokenizer.sot_token_id, *_tokenizer.encode(text), _tokenizer.eot_token_id]
        if len(tokens) > length:
            raise ValueError(f"label text must fit into {length} tokens, got {len(tokens)} for {text!r}")
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def encode_text(
    clip: nn.Module, ids: Int[Tensor, "n length"], first: Tensor | None = None, deeper: Sequence[Tensor] = ()
) -> Float[Tensor, "n d"]:
    """Text features, with learned tokens in positions 1..m.

    Args:
        clip: the open_clip model.
        ids: tokens, see open_clip's tokenizer.
        first: (m, w) embeddings that replace those of positions 1..m.
        deeper: (m, w) for each of the blocks 1, 2, ..., which replace the states there.

    Returns:
        Features `(n d)`, not normalised; without learned tokens those of `clip.encode_text`.

    Raises:
        ValueError: no text.
    """
    if len(ids) == 0:
        raise ValueError("ids must hold at least one text, got n = 0")
    tower = text_tower(clip)
    x = tower.token_embedding(ids).to(tower.transformer.get_cast_dtype())
    if first is not None:
        x = _replaced(x, first)
    x = x + tower.positional_embedding.to(x.dtype)
    mask = tower.attn_mask
    for number, block in enumerate(tower.transformer.resblocks):
        if 1 <= number <= len(deeper):
            x = _replaced(x, deeper[number - 1])
        x = block(x, attn_mask=mask)
    x = tower.ln_final(x)
    eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    end = ids.argmax(dim=1) if pool == "argmax" else (ids == eos).int().argmax(dim=1)
    x = x[torch.arange(len(x), device=x.device), end]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _replaced(x: Tensor, learned: Tensor) -> Tensor:
    num = len(learned)
    return torch.cat((x[:, :1], learned.to(x.dtype).expand(len(x), -1, -1), x[:, 1 + num :]), dim=1)
