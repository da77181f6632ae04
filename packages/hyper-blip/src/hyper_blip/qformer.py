"""The Q-Former in one joint pass, and with image keys and values computed once.

References: Li et al., "BLIP-2", ICML 2023, section 3.1-3.2 and figure 2 (three masks over queries and text). Attention of a
token depends only on what its row of the mask allows, so the queries, the text of the language loss and the text of the
contrastive loss can share one call without seeing each other: the fused pass (ours).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

CAUSAL, BIDIRECTIONAL, JOINT = "causal", "bidirectional", "joint"


class Segment(NamedTuple):
    """One text in a joint pass.

    Attributes:
        input_ids: `(batch tokens)`.
        attention_mask: 1 at tokens `(batch tokens)`.
        kind: "causal" text sees all queries and its own earlier tokens; "bidirectional" text sees its own tokens;
            "joint" text and the queries see each other.
    """

    input_ids: Tensor
    attention_mask: Tensor
    kind: str


class ImageKeys(NamedTuple):
    """Cross-attention keys and values of some pictures, `(batch heads patches head)` for each layer that has them.

    Attributes:
        layers: (key, value) by layer number.
    """

    layers: dict[int, tuple[Tensor, Tensor]]

    def select(self, index: Tensor) -> "ImageKeys":
        """The keys and values of pictures `index`."""
        return ImageKeys({n: (k[index], v[index]) for n, (k, v) in self.layers.items()})


def image_keys(qformer: nn.Module, image: Float[Tensor, "batch patches channels"]) -> ImageKeys:
    """Keys and values of all cross-attention layers of a `Blip2QFormerModel`."""
    found = {}
    for number, layer in enumerate(qformer.encoder.layer):
        if layer.has_cross_attention:
            attention = layer.crossattention.attention
            found[number] = tuple(
                _heads(f(image.to(f.weight.dtype)), attention) for f in (attention.key, attention.value)
            )
    return ImageKeys(found)


def _heads(x: Tensor, attention: nn.Module) -> Tensor:
    return x.unflatten(-1, (attention.num_attention_heads, attention.attention_head_size)).transpose(1, 2)


def allowed(
    num_queries: int, segments: Sequence[Segment], batch: int, device: torch.device
) -> Bool[Tensor, "batch rows rows"]:
    """Which positions of [queries; segments...] see which."""
    sizes = [segment.input_ids.shape[1] for segment in segments]
    total = num_queries + sum(sizes)
    found = torch.zeros(batch, total, total, dtype=torch.bool, device=device)
    found[:, :num_queries, :num_queries] = True
    start = num_queries
    for segment, size in zip(segments, sizes, strict=True):
        own = slice(start, start + size)
        valid = segment.attention_mask.bool()[:, None, :].expand(batch, size, size)
        found[:, own, own] = valid.tril() if segment.kind == CAUSAL else valid
        if segment.kind != BIDIRECTIONAL:
            found[:, own, :num_queries] = True
        if segment.kind == JOINT:
            found[:, :num_queries, own] = segment.attention_mask.bool()[:, None, :]
        start += size
    return found


def joint_states(
    blip2: nn.Module,
    image: Float[Tensor, "images patches channels"] | ImageKeys | None,
    segments: Sequence[Segment] = (),
    *,
    queries: bool = True,
) -> list[Float[Tensor, "batch tokens width"]]:
    """Last states of the queries (if any) and of every segment, from one Q-Former call.

    Args:
        blip2: holds `qformer`, `query_tokens` and `embeddings`.
        image: vision features, or their keys and values; None without queries.
        segments: texts.
        queries: put the queries in front.

    Returns:
        One tensor for the queries, then one for each segment.
    """
    qformer = blip2.qformer
    batch = len(segments[0].input_ids) if segments else _num_images(image)
    parts = [blip2.query_tokens.expand(batch, -1, -1)] if queries else []
    # Embedded one by one: positions start at 0 in each.
    parts += [blip2.embeddings(input_ids=segment.input_ids) for segment in segments]
    num_queries = parts[0].shape[1] if queries else 0
    embedded = torch.cat([part.to(parts[0].dtype) for part in parts], dim=1)
    mask = None
    if segments:
        seen = allowed(num_queries, segments, batch, embedded.device)
        # Additive and not Boolean: eager attention would add True as 1 and leak what it should hide.
        mask = torch.zeros(seen.shape, dtype=embedded.dtype, device=embedded.device)
        mask = mask.masked_fill_(~seen, torch.finfo(embedded.dtype).min)[:, None]
    if isinstance(image, ImageKeys):
        states = _run_with_keys(qformer, embedded, num_queries, mask, image)
    else:
        states = qformer(
            query_embeds=embedded, query_length=num_queries, attention_mask=mask, encoder_hidden_states=image
        ).last_hidden_state
    return list(states.split([part.shape[1] for part in parts], dim=1))


def _num_images(image: Tensor | ImageKeys) -> int:
    return len(next(iter(image.layers.values()))[0]) if isinstance(image, ImageKeys) else len(image)


def _run_with_keys(
    qformer: nn.Module, embedded: Tensor, num_queries: int, mask: Tensor | None, keys: ImageKeys
) -> Tensor:
    """The encoder with given image keys; the layers and their parameters are those of the Hugging Face module."""
    hidden = qformer.dropout(qformer.layernorm(embedded.to(qformer.layernorm.weight.dtype)))
    for number, layer in enumerate(qformer.encoder.layer):
        args = (layer, hidden, num_queries, mask, *keys.layers.get(number, ()))
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            hidden = layer._gradient_checkpointing_func(_layer, *args)
        else:
            hidden = _layer(*args)
    return hidden


def _layer(layer: nn.Module, hidden: Tensor, num_queries: int, mask: Tensor | None, *keys: Tensor) -> Tensor:
    hidden = layer.attention(hidden_states=hidden, attention_mask=mask)
    queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
    if keys:
        queries = _cross_attention(layer.crossattention, queries, *keys)
    out = layer.feed_forward_chunk_query(queries)
    return torch.cat([out, layer.feed_forward_chunk(text)], dim=1) if text.shape[1] else out


def _cross_attention(module: nn.Module, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
    attention = module.attention
    batch, num, _ = queries.shape
    # Queries of many texts about one picture are more queries to the same keys: nothing is repeated.
    folded = queries.reshape(len(key), -1, queries.shape[-1])
    query = _heads(attention.query(folded), attention)
    dropout = attention.attention_dropout if attention.training else 0.0
    found = F.scaled_dot_product_attention(
        query, key.to(query.dtype), value.to(query.dtype), dropout_p=dropout, scale=attention.scaling
    )
    found = found.transpose(1, 2).reshape(batch, num, -1)
    return module.output(found, queries)


class LMHead(nn.Module):
    """The prediction head of the language loss: Linear, activation, LayerNorm, then the word embeddings and a bias.

    Args:
        width: of the states.
        vocabulary: number of tokens.
        activation: name of a `transformers` activation.
        eps: of the LayerNorm.
    """

    def __init__(self, width: int, vocabulary: int, activation: str = "gelu", eps: float = 1e-12) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = ACT2FN[activation]
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self, states: Float[Tensor, "*batch width"], embeddings: Float[Tensor, "vocabulary width"]
    ) -> Float[Tensor, "*batch vocabulary"]:
        """Logits of the next token.

        Args:
            states: last states of the text.
            embeddings: the word embeddings, shared with the input.

        Returns:
            Logits.
        """
        return F.linear(self.norm(self.activation(self.dense(states))), embeddings, self.bias)


def decoder_ids(input_ids: Int[Tensor, "batch tokens"], dec_token_id: int) -> Int[Tensor, "batch tokens"]:
    """The ids with [DEC] in the place of [CLS]."""
    found = input_ids.clone()
    found[:, 0] = dec_token_id
    return found
