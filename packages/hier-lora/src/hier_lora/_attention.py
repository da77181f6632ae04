"""Multi-head attention with a linear layer for each projection, so that LoRA can adapt queries and values by themselves.

Attention: Vaswani et al., 2017. `torch.nn.MultiheadAttention` keeps queries, keys and values in one parameter and reads the
weight of `out_proj` without calling it, so LoRA layers put around its parts are never used; peft can wrap it only whole,
and then adds and subtracts the update around every pass, which moves the frozen weights by a rounding error each time.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectedAttention(nn.Module):
    """The same function as a `torch.nn.MultiheadAttention`, from its weights.

    Args:
        attention: the module to take over; queries, keys and values must have one width.

    Raises:
        ValueError: if it has other widths for keys or values, or learned extra keys.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if not can_project(attention):
            raise ValueError("attention must use one width for queries, keys and values and no extra keys")
        self.num_heads, self.batch_first, self.dropout = attention.num_heads, attention.batch_first, attention.dropout
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
        for name, weight, bias in zip("qkv", attention.in_proj_weight.detach().chunk(3), biases, strict=True):
            setattr(self, f"{name}_proj", _linear(weight.clone(), None if bias is None else bias.clone()))
        self.out_proj = _linear(attention.out_proj.weight.detach(), attention.out_proj.bias)

    def forward(
        self,
        query: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "..."], None]:
        """Attend; the second result stands for the attention weights, which are not formed.

        Args:
            query, key, value: (batch, tokens, width), or (tokens, batch, width) without `batch_first`.
            need_weights: must be false.
            attn_mask: added to the scores if floating, forbidden where true if boolean; (tokens, tokens) or
                (batch * heads, tokens, tokens).

        Raises:
            ValueError: if the weights are asked for.
        """
        if need_weights:
            raise ValueError("need_weights must be False, got True: the attention weights are not formed")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = [
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        ]
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        found = self.out_proj(found.transpose(1, 2).flatten(2))
        return (found if self.batch_first else found.transpose(0, 1)), None


def can_project(attention: nn.MultiheadAttention) -> bool:
    """Whether `ProjectedAttention` can take a module over."""
    plain = attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn
    return plain and attention._qkv_same_embed_dim


def project_attention(model: nn.Module) -> nn.Module:
    """Replace every `torch.nn.MultiheadAttention` inside a model that can be replaced, in place; the function stays.

    `OpenClipDualEncoder` does it. Its adapters fit a plain open_clip model after the same call:
    `PeftModel.from_pretrained(project_attention(model), folder)`.

    Returns:
        The model itself.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention) and can_project(child):
                setattr(module, name, ProjectedAttention(child).train(child.training))
    return model


def joined_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model after `project_attention`, under the names that they had before."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, ProjectedAttention):
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{name}.{letter}_proj.{kind}", None) for letter in "qkv"]
                if parts[0] is not None:
                    state[f"{name}.in_proj_{kind}"] = torch.cat(parts)
    return state


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
