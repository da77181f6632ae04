"""The attention functions that are registered with transformers.

References: Vaswani et al., "Attention is all you need", NeurIPS 2017, eq. 1; Gemma Team, "Gemma 2", 2024 (soft cap); Xiao
et al., "Efficient streaming language models with attention sinks", ICLR 2024. transformers calls a registered function
with the module and the rotated, cached queries and keys; what should change the call is looked up in `_hooks`.
"""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import compile_friendly_flex_attention, flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, flex_attention_mask, sdpa_mask

from hyper_icl._hooks import hooks_of, is_active, outside_graphs

# "sdpa" and "flex_attention" inside a name would trigger transformers' capability checks of those backends.
NAMES = {
    "sdpa": "hyper_icl",
    "eager": "hyper_icl_eager",
    "flex": "hyper_icl_flex",
    "augmented": "hyper_icl_augmented",
}


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

    # Out of the graph: what is compiled knows nothing of threads and blocks, and would keep the plan of its first call.
    @outside_graphs
    def with_hooks(module, query, key, value, attention_mask, scaling=None, **kwargs):
        hooks = hooks_of(module)
        if hooks is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if hooks.adapter is not None:
            query = hooks.adapter.rewrite(module.layer_idx, query, scaling)
        placed = None if hooks.bias is None else hooks.bias.place(query, key)
        if hooks.collector is not None:
            if _has_extras(kwargs) or kwargs.get("position_bias") is not None:
                raise ValueError(
                    "model must have plain attention while masses are collected, got softcap, s_aux or position_bias"
                )
            hooks.collector.record(module.layer_idx, query, key, attention_mask, scaling, placed)
        if placed is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return biased(placed, module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        call = with_hooks if is_active(module) else plain
        return call(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


def causal_rows(query: Tensor, key: Tensor, start: int) -> Tensor:
    """Boolean (rows, keys) of the causal pattern for query rows start.. when the queries are the last positions."""
    position = torch.arange(query.shape[2], device=query.device)[start:] + key.shape[2] - query.shape[2]
    return torch.arange(key.shape[2], device=query.device) <= position.unsqueeze(-1)


def rows_mask(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, start: int, causal: Tensor | None
) -> Float[Tensor, "b 1 r s"]:
    """The mask of query rows start.. as numbers to add: 0 or the lowest number of the query's dtype.

    `causal` (rows, keys) stands for a mask that is None; None for an attention that looks both ways.
    """
    lowest = torch.finfo(query.dtype).min
    if attention_mask is None:
        if causal is None:
            return query.new_zeros(1, 1, query.shape[2] - start, key.shape[2])
        allowed = causal[None, None]
    else:
        attention_mask = attention_mask[:, :, start:, : key.shape[2]]
        if attention_mask.dtype != torch.bool:
            return attention_mask.to(query.dtype)
        allowed = attention_mask
    return torch.zeros((), dtype=query.dtype, device=query.device).where(allowed, lowest)


def _is_causal(module: nn.Module, kwargs: dict) -> bool:
    stated = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if stated is None else stated


def _biased_mask(placed, module, query, key, attention_mask, start, kwargs):
    causal = placed.causal(start) if _is_causal(module, kwargs) else None
    return rows_mask(query, key, attention_mask, start, causal) + placed.rows(query.dtype, start)


def _has_extras(kwargs: dict) -> bool:
    """Whether the model puts a soft cap or attention sinks on its scores, which sdpa refuses or leaves out in silence."""
    return kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None


def _of_rows(kwargs: dict, start: int) -> dict:
    """The arguments of a call with query rows start.. alone: a bias by position of the model's own has rows too."""
    own = kwargs.get("position_bias")
    return kwargs if own is None or own.shape[2] == 1 else {**kwargs, "position_bias": own[:, :, start:]}


def _plain_sdpa(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
    if not _has_extras(kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    num, causal = query.shape[2], None
    if attention_mask is None and num > 1 and _is_causal(module, kwargs):
        # Without a mask the queries are the first positions: a static cache is longer than what it holds.
        key, value = key[:, :, :num], value[:, :, :num]
        causal = causal_rows(query, key, 0)
    mask = rows_mask(query, key, attention_mask, 0, causal)
    return _attend(module, query, key, value, mask, scaling=scaling, **kwargs)


def _biased_sdpa(placed, module, query, key, value, attention_mask, *, scaling, **kwargs):
    """Biased rows are computed apart, with a mask of their own, and replace those of a plain call.

    The rows before the query thus keep their bits, and no (T, T) mask is made: only (rows of the query, T).
    """
    start = placed.first_biased_row()
    if start >= query.shape[2]:
        return _plain_sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    mask = _biased_mask(placed, module, query, key, attention_mask, start, kwargs)
    tail = query[:, :, start:]
    attend = _attend if _has_extras(kwargs) else sdpa_attention_forward
    calibrated, _ = attend(module, tail, key, value, mask, scaling=scaling, **_of_rows(kwargs, start))
    keep = placed.unbiased(start)
    if start == 0 and keep is None:
        return calibrated, None
    plain, _ = _plain_sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if keep is not None:
        calibrated = torch.where(keep[:, :, None, None], plain[:, start:], calibrated)
    return torch.cat((plain[:, :start], calibrated), dim=1), None


def _attend(
    module,
    query,
    key,
    value,
    mask,
    *,
    scaling=None,
    dropout=0.0,
    softcap=None,
    s_aux=None,
    position_bias=None,
    **kwargs,
):
    """Explicit attention with its weights; softmax in fp32; `s_aux` holds a sink's score for every head."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    for added in (position_bias, mask):
        if added is not None:
            scores = scores + added[..., : key.shape[2]]
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _biased_eager(placed, module, query, key, value, attention_mask, *, scaling, **kwargs):
    mask = _biased_mask(placed, module, query, key, attention_mask, 0, kwargs)
    return _attend(module, query, key, value, mask, scaling=scaling, **kwargs)


def _biased_flex(placed, module, query, key, value, attention_mask, *, scaling, **kwargs):
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            "attention_mask must be 2-D with backend 'flex', got a 4-D mask: use backend 'sdpa' for masks of your own"
        )
    if _has_extras(kwargs):
        raise ValueError("backend must be 'sdpa' or 'eager' for a model with softcap or s_aux (sinks), got 'flex'")
    table, row, column = placed.table, placed.row, placed.column
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


def _biased_augmented(placed, module, query, key, value, attention_mask, *, scaling, **kwargs):
    if _has_extras(kwargs):
        raise ValueError("backend must be 'sdpa' or 'eager' for a model with softcap or s_aux (sinks), got 'augmented'")
    wide = augment_qk(query, key, value, placed.table, placed.column, scaling, query_segments=placed.row)
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
        ValueError: there are more queries than keys and no query_segments, or shapes that do not agree, or (on the CPU) a segment
            that the table does not have.
    """
    num = table.shape[-1]
    batched = (
        table.ndim == 4 and table.shape[0] == len(q) and table.shape[1] in (1, q.shape[1]) and table.shape[2] == num
    )
    if not batched or segments.shape != (len(k), k.shape[2]) or len(k) != len(q):
        raise ValueError(
            f"table (b, h or 1, z, z) and segments (b, s) must fit q and k, got {tuple(table.shape)} and {tuple(segments.shape)} for "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[1] % max(1, k.shape[1]) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q, k and v must share heads and keys, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, found in (("segments", segments), ("query_segments", query_segments)):
        if found is None or found.device.type != "cpu" or torch.compiler.is_compiling() or not found.numel():
            continue
        if int(found.min()) < 0 or int(found.max()) >= num:
            raise ValueError(f"{name} must lie in [0, {num}), got {int(found.min())}..{int(found.max())}")
    if query_segments is None:
        if q.shape[2] > k.shape[2]:
            raise ValueError(f"query_segments must be given for {q.shape[2]} queries and {k.shape[2]} keys, got None")
        query_segments = segments[:, k.shape[2] - q.shape[2] :]
    if query_segments.shape != (len(q), q.shape[2]):
        raise ValueError(f"query_segments must have shape {(len(q), q.shape[2])}, got {tuple(query_segments.shape)}")
    pad = -(q.shape[-1] + num) % 8
    batch = torch.arange(len(q), device=q.device).unsqueeze(-1)
    extra_q = table[batch, :, query_segments].permute(0, 2, 1, 3).expand(*q.shape[:3], num) / scaling
    extra_k = F.one_hot(segments, num).unsqueeze(1).expand(*k.shape[:3], num)
    return (
        F.pad(torch.cat((q, extra_q.to(q.dtype)), dim=-1), (0, pad)),
        F.pad(torch.cat((k, extra_k.to(k.dtype)), dim=-1), (0, pad)),
        F.pad(v, (0, num + pad)),
    )


_sdpa = _hooked(_plain_sdpa, _biased_sdpa)
_eager = _hooked(_attend, _biased_eager)
_flex = _hooked(flex_attention_forward, _biased_flex)
_augmented = _hooked(_plain_sdpa, _biased_augmented)
