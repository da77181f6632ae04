"""The attention functions that are registered with transformers, and what they look up on the calling module.

References: Vaswani et al., "Attention is all you need", NeurIPS 2017, eq. 1. transformers calls a registered function
with the module and the rotated, cached queries and keys; whatever should change an attention call therefore sits on that
module, never in keyword arguments, which leak into vision towers and which `generate` refuses.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import compile_friendly_flex_attention, flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, flex_attention_mask, sdpa_mask

# "sdpa" and "flex_attention" inside a name would trigger transformers' capability checks of those backends.
NAMES = {
    "sdpa": "hyper_icl",
    "eager": "hyper_icl_eager",
    "flex": "hyper_icl_flex",
    "augmented": "hyper_icl_augmented",
}
_ATTRIBUTE = "_hyper_icl"


@dataclass
class Hooks:
    """What an attention module carries: a bias by segment, a rewrite of the queries, and a record of the masses."""

    bias: Any = None
    adapter: Any = None
    collector: Any = None


def hooks_of(module: nn.Module) -> Hooks | None:
    """The module's hooks, if any."""
    return module.__dict__.get(_ATTRIBUTE)


def set_hook(module: nn.Module, name: str, value: Any) -> Any:
    """Set one hook and return what it replaces; an attribute of the object, so that no state dict ever holds it."""
    hooks = hooks_of(module) or Hooks()
    before = getattr(hooks, name)
    setattr(hooks, name, value)
    empty = hooks == Hooks()
    if empty:
        module.__dict__.pop(_ATTRIBUTE, None)
    else:
        object.__setattr__(module, _ATTRIBUTE, hooks)
    return before


def register_attention() -> None:
    """Register `hyper_icl`, `hyper_icl_eager`, `hyper_icl_flex` and `hyper_icl_augmented` with transformers; idempotent.

    A name without a mask function would get no mask at all, and left padding would leak into the answers.
    """
    for backend, function, mask in (
        ("sdpa", _sdpa, sdpa_mask),
        ("eager", _eager, eager_mask),
        ("flex", _flex, flex_attention_mask),
        ("augmented", _augmented, sdpa_mask),
    ):
        AttentionInterface.register(NAMES[backend], function)
        AttentionMaskInterface.register(NAMES[backend], mask)


def _hooked(
    plain: Callable, biased: Callable
) -> Callable[..., tuple[Float[Tensor, "b t h d"], Float[Tensor, "b h t s"] | None]]:
    """An attention function that applies the module's hooks, and is `plain` where there are none."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        hooks = hooks_of(module)
        if hooks is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if hooks.adapter is not None:
            query = hooks.adapter.rewrite(module.layer_idx, query, scaling)
        if hooks.bias is not None:
            hooks.bias.check_call(module.layer_idx, query, key)
        if hooks.collector is not None:
            hooks.collector.record(module.layer_idx, query, key, attention_mask, scaling, hooks.bias)
        if hooks.bias is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return biased(hooks.bias, module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


def causal_rows(query: Tensor, key: Tensor, start: int) -> Tensor:
    """Boolean (rows, keys) of the causal pattern for query rows start.. when the queries are the last positions."""
    position = torch.arange(query.shape[2], device=query.device)[start:] + key.shape[2] - query.shape[2]
    return torch.arange(key.shape[2], device=query.device) <= position.unsqueeze(-1)


def rows_mask(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, start: int, is_causal: bool
) -> Float[Tensor, "b 1 r s"]:
    """The mask of query rows start.. as numbers to add: 0 or the lowest number of the query's dtype."""
    lowest = torch.finfo(query.dtype).min
    if attention_mask is None:
        if not is_causal:
            return query.new_zeros(1, 1, query.shape[2] - start, key.shape[2])
        allowed = causal_rows(query, key, start)[None, None]
    else:
        attention_mask = attention_mask[:, :, start:, : key.shape[2]]
        if attention_mask.dtype != torch.bool:
            return attention_mask.to(query.dtype)
        allowed = attention_mask
    return torch.zeros((), dtype=query.dtype, device=query.device).where(allowed, lowest)


def _is_causal(module: nn.Module, kwargs: dict) -> bool:
    stated = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if stated is None else stated


def _biased_sdpa(bias, module, query, key, value, attention_mask, *, scaling, **kwargs):
    """Biased rows are computed apart, with a mask of their own, and replace those of a plain call.

    The rows before the query thus keep their bits, and no (T, T) mask is made: only (rows of the query, T).
    """
    start = bias.first_biased_row(query, key)
    if start >= query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    mask = rows_mask(query, key, attention_mask, start, _is_causal(module, kwargs)) + bias.rows(query, key, start)
    tail = query[:, :, start:]
    calibrated, _ = sdpa_attention_forward(module, tail, key, value, mask, scaling=scaling, **kwargs)
    keep = bias.unbiased(query, key, start)
    if start == 0 and keep is None:
        return calibrated, None
    plain, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if keep is not None:
        calibrated = torch.where(keep[:, :, None, None], plain[:, start:], calibrated)
    return torch.cat((plain[:, :start], calibrated), dim=1), None


def _refuse_extras(kwargs: dict) -> None:
    """Refuse what some text models add to attention, rather than leave it out in silence; sdpa refuses on its own."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"backend cannot compute this model's {name!r}: use a model without it")


def _attend(module, query, key, value, mask, *, scaling, dropout=0.0, **kwargs):
    """Explicit attention with its weights; softmax in fp32."""
    _refuse_extras(kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.mT * scaling
    if mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _biased_eager(bias, module, query, key, value, attention_mask, *, scaling, **kwargs):
    mask = rows_mask(query, key, attention_mask, 0, _is_causal(module, kwargs)) + bias.rows(query, key, 0)
    return _attend(module, query, key, value, mask, scaling=scaling, **kwargs)


def _biased_flex(bias, module, query, key, value, attention_mask, *, scaling, **kwargs):
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            "attention_mask must be 2-D with backend 'flex', got a 4-D mask: use backend 'sdpa' for masks of your own"
        )
    _refuse_extras(kwargs)
    table, row, column = bias.lookup(query, key)
    last_head = table.shape[1] - 1

    def add_bias(score, b, h, q, k):
        return score + table[b, h if last_head else 0, row[b, q], column[b, k]].to(score.dtype)

    options = {"score_mod": add_bias, "block_mask": attention_mask, "enable_gqa": True, "scale": scaling}
    if query.device.type == "cpu":
        # Not compiled: torch 2.15 writes C++ that does not compile for a score_mod with this many sizes.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            output = flex_attention(query, key, value, **options)
    else:
        output = compile_friendly_flex_attention(query, key, value, training=module.training, **options)
    return output.transpose(1, 2).contiguous(), None


def _biased_augmented(bias, module, query, key, value, attention_mask, *, scaling, **kwargs):
    table, row, column = bias.lookup(query, key)
    wide = augment_qk(query, key, value, table, column, scaling, query_segments=row)
    output, _ = sdpa_attention_forward(module, *wide, attention_mask, scaling=scaling, **kwargs)
    return output[..., : value.shape[-1]].contiguous(), None


def augment_qk(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    table: Float[Tensor, " b #h z z"],
    segments: Int64[Tensor, "b s"],
    scaling: float,
    *,
    query_segments: Int64[Tensor, "b t"] | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b g s e"], Float[Tensor, "b g s e"]]:
    """Write a bias by segments into the vectors, so that any attention kernel without a mask argument applies it.

    q' = [q, table[seg(q), :]/scaling], k' = [k, onehot(seg(k))]: scaling q'.k' = scaling q.k + table[seg(q), seg(k)].
    Apply it after rotary embeddings, keep the scaling of the width d, and cut the output back to the width of v.

    Args:
        q: queries.
        k: keys, with as many or fewer heads (GQA).
        v: values; zeros are appended.
        table: bias of a row's segment on a column's segment.
        segments: row of the table of every key, 0..z-1.
        scaling: factor on the scores.
        query_segments: the same of every query; by default the queries are the last t keys.

    Returns:
        q', k', v', of width d + z rounded up to a multiple of 8.

    Raises:
        ValueError: there are more queries than keys and no query_segments.
    """
    if query_segments is None:
        if q.shape[2] > k.shape[2]:
            raise ValueError(f"query_segments must be given for {q.shape[2]} queries and {k.shape[2]} keys, got None")
        query_segments = segments[:, k.shape[2] - q.shape[2] :]
    num = table.shape[-1]
    pad = -(q.shape[-1] + num) % 8
    batch = torch.arange(len(q), device=q.device).unsqueeze(-1)
    extra_q = table[batch, :, query_segments].permute(0, 2, 1, 3).expand(*q.shape[:3], num) / scaling
    extra_k = F.one_hot(segments, num).unsqueeze(1).expand(*k.shape[:3], num)
    return (
        F.pad(torch.cat((q, extra_q.to(q.dtype)), dim=-1), (0, pad)),
        F.pad(torch.cat((k, extra_k.to(k.dtype)), dim=-1), (0, pad)),
        F.pad(v, (0, num + pad)),
    )


_sdpa = _hooked(sdpa_attention_forward, _biased_sdpa)
_eager = _hooked(_attend, _biased_eager)
_flex = _hooked(flex_attention_forward, _biased_flex)
_augmented = _hooked(sdpa_attention_forward, _biased_augmented)
