"""Text towers in parts: open_clip's, transformers' CLIP and SigLIP.

References: Radford et al., 2021 (a causal tower, pooled at the end token); Zhai et al., ICCV 2023 (SigLIP: all words see
each other, pooled at the last position).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mat_align.backbones._layer import Masked

Tokenizer = Callable[[Sequence[str]], Tensor]


class TextTower:
    """A text tower in parts.

    Attributes:
        module: the tower itself.
        num_blocks: number of blocks.
        embedding: of the words.
        length: number of positions.
        start: position of a sentence's first word.
        causal: no position sees later ones, so that what follows the end token may be left out.
        dim: of the features.
    """

    def __init__(
        self, module: nn.Module, blocks: nn.ModuleList | list, embedding: nn.Module, length: int, start: int, dim: int,
        tokenizer: Tokenizer | None,
    ) -> None:  # fmt: skip
        self.module, self.blocks, self.embedding, self.length = module, blocks, embedding, length
        self.start, self.dim, self.num_blocks, self._tokenizer = start, dim, len(blocks), tokenizer
        self.causal = False

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "n length"]:
        """Ids of texts."""
        return token_ids(texts, self.length) if self._tokenizer is None else self._tokenizer(texts)

    def words(self, text: str) -> Int[Tensor, " k"]:
        """Ids of a text without those of the empty text."""
        ids, empty = self.tokenize([text])[0], self.tokenize([""])[0]
        return ids[~torch.isin(ids, empty)]

    def positions(self) -> Float[Tensor, "length w"]:
        """Embeddings of the positions."""
        raise NotImplementedError

    def end(self, ids: Int[Tensor, "n length"]) -> Int[Tensor, " n"]:
        """The position at which each sentence is pooled."""
        raise NotImplementedError

    def block(self, number: int, x: Float[Tensor, "n length w"]) -> Float[Tensor, "n length w"]:
        """One block."""
        raise NotImplementedError

    def pool(self, x: Float[Tensor, "n length w"], ids: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        """Features from the states after the last block."""
        raise NotImplementedError


class OpenClipText(TextTower):
    """open_clip's text transformer that pools at the end token."""

    def __init__(self, tower: nn.Module, tokenizer: Tokenizer | None = None) -> None:
        projection, width = tower.text_projection, tower.token_embedding.weight.shape[1]
        linear = isinstance(projection, nn.Linear)
        dim = width if projection is None else projection.out_features if linear else projection.shape[1]
        length, blocks = tower.positional_embedding.shape[0], tower.transformer.resblocks
        super().__init__(tower, blocks, tower.token_embedding, length, 1, dim, tokenizer)
        self.causal = tower.attn_mask is not None

    def positions(self) -> Float[Tensor, "length w"]:
        """See `TextTower`."""
        return self.module.positional_embedding

    def block(self, number: int, x: Float[Tensor, "n length w"]) -> Float[Tensor, "n length w"]:
        """See `TextTower`."""
        num, mask = x.shape[1], self.module.attn_mask
        return self.blocks[number](x, attn_mask=None if mask is None else mask[:num, :num])

    def end(self, ids: Int[Tensor, "n length"]) -> Int[Tensor, " n"]:
        """See `TextTower`."""
        eos = getattr(self.module, "text_eos_id", getattr(self.module, "eos_id", None))
        return ids.argmax(dim=1) if text_pool(self.module) == "argmax" else (ids == eos).int().argmax(dim=1)

    def pool(self, x: Float[Tensor, "n length w"], ids: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        """See `TextTower`."""
        x = self.module.ln_final(x)[torch.arange(len(x), device=x.device), self.end(ids)]
        projection = self.module.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


class HFText(TextTower):
    """The text transformer of transformers' CLIP, causal and pooled at the end token, or SigLIP, pooled at the last position."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer | None = None) -> None:
        tower = model.text_model
        causal = hasattr(model, "text_projection")
        if not causal and tokenizer is None:
            raise ValueError("tokenizer must be given for SigLIP: texts to ids (n, length), padded as it was trained")
        self.projection = model.text_projection if causal else tower.head
        blocks, embeddings = [Masked(layer) for layer in tower.encoder.layers], tower.embeddings
        length, dim = embeddings.position_embedding.num_embeddings, self.projection.out_features
        super().__init__(tower, blocks, embeddings.token_embedding, length, int(causal), dim, tokenizer)
        self.causal = causal

    def positions(self) -> Float[Tensor, "length w"]:
        """See `TextTower`."""
        return self.module.embeddings.position_embedding.weight

    def block(self, number: int, x: Float[Tensor, "n length w"]) -> Float[Tensor, "n length w"]:
        """See `TextTower`."""
        mask = x.new_full((x.shape[1], x.shape[1]), -torch.inf).triu_(1)[None, None] if self.causal else None
        return self.blocks[number](x, mask)

    def end(self, ids: Int[Tensor, "n length"]) -> Int[Tensor, " n"]:
        """See `TextTower`."""
        if not self.causal:
            return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        eos = self.module.config.eos_token_id
        # Configurations from before the end token was named hold 2; it is the largest number of each sentence.
        return ids.argmax(dim=1) if eos == 2 else (ids == eos).int().argmax(dim=1)

    def pool(self, x: Float[Tensor, "n length w"], ids: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        """See `TextTower`."""
        x = self.module.final_layer_norm(x)
        return self.projection(x[torch.arange(len(x), device=x.device), self.end(ids)])


def text_tower(model: nn.Module, tokenizer: Tokenizer | None = None) -> TextTower:
    """The text tower of a model in parts.

    Raises:
        ValueError: a tower of another kind, or one whose tokenizer is not known.
    """
    if hasattr(model, "text_model"):
        return HFText(model, tokenizer)
    tower = getattr(model, "text", model)
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    missing = [part for part in parts if not hasattr(tower, part)]
    if missing or getattr(tower, "cls_emb", None) is not None or text_pool(tower) not in ("argmax", "eos"):
        raise ValueError(f"clip must have a text transformer that pools at the end token, got {type(tower).__name__}")
    return OpenClipText(tower, tokenizer)


def text_pool(tower: nn.Module) -> str | None:
    """How an open_clip text tower pools."""
    return getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))


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
