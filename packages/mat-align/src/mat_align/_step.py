"""One token through a block of open_clip in which it sees only itself.

Reference: Modality Alignment across Trees (arXiv 2510.27391); the pass-through of the released code, put right.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mat_align._checks import check_choice, check_width


def value_pass_through(block: nn.Module, h: Float[Tensor, "B m w"], mode: str = "value") -> Float[Tensor, "B m w"]:
    """Carry tokens through a block in which each of them sees only itself.

    h <- h + ls_1(W_O (W_V ln_1(h) + b_V) + b_O);  h <- h + ls_2(mlp(ln_2(h)))

    This is the block on a sequence of one token. mode="released" is what the released code computes,
    h <- h + W_O (W_V h + b_V) + b_O; h <- 2 h + mlp(ln_2(h)), which blows the tokens up (a factor of 221 over seven
    blocks of a random ViT-B/16 against 1.56).

    Args:
        block: a residual attention block of open_clip.
        h: tokens.
        mode: "value" or "released".

    Returns:
        Tokens `(B m w)`.

    Raises:
        ValueError: unknown mode, another width, or a block with other parts.
    """
    check_choice("mode", mode, ("value", "released"))
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        raise ValueError(f"block must hold attn with packed projections, got {type(block).__name__}")
    width = attention.embed_dim
    check_width("h", h, width)
    # in_proj packs q, k, v in this order.
    weight = attention.in_proj_weight[2 * width :]
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
    if mode == "released":
        h = h + attention.out_proj(F.linear(h, weight, bias))
        return 2 * h + block.mlp(block.ln_2(h))
    h = h + block.ls_1(attention.out_proj(F.linear(block.ln_1(h), weight, bias)))
    return h + block.ls_2(block.mlp(block.ln_2(h)))
