"""Class tokens of several ViT layers, carried to the output without further attention.

References: Modality Alignment across Trees (arXiv 2510.27391), the visual tree; the pass-through through later blocks
is that of the released code, put right; deep visual prompts: Jia et al., "Visual prompt tuning", ECCV 2022.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mat_align._checks import check_choice, check_width

# Share of a learned mix that starts on the layer that the depth rule names.
_START = 0.9


class VisualPrompts(NamedTuple):
    """Learned tokens of the image tower.

    Attributes:
        first: (m, w), appended after the patch tokens, before `ln_pre`.
        deeper: one (m, w) for each of the blocks 1, 2, ..., where they replace the last m tokens.
    """

    first: Tensor
    deeper: tuple[Tensor, ...] = ()


def relative_layers(num_blocks: int, fractions: Sequence[float] = (5 / 12, 2 / 3, 1.0)) -> tuple[int, ...]:
    """Layers at given fractions of the depth.

    floor(f L + 1/2) - 1, which is (4, 7, 11), the published choice, for L = 12.

    Args:
        num_blocks: number of blocks L of the tower.
        fractions: ascending depths in (0, 1]; 1 is the last block.

    Returns:
        0-based block numbers, ascending.

    Raises:
        ValueError: num_blocks < 1, a fraction out of range, or so few blocks that two fractions meet.

    >>> relative_layers(12), relative_layers(24)
    ((4, 7, 11), (9, 15, 23))
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise ValueError(f"fractions must lie in (0, 1], got {tuple(fractions)}")
    # 1e-9: a product such as 2.4999999999999996 stands for 2.5.
    layers = tuple(math.floor(f * num_blocks + 0.5 + 1e-9) - 1 for f in fractions)
    return check_layers(layers, num_blocks)


def check_layers(layers: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Return ascending, different block numbers of a tower of `num_blocks`; else ValueError."""
    layers = tuple(int(layer) for layer in layers)
    ascending = all(a < b for a, b in itertools.pairwise(layers))
    if not layers or not ascending or layers[0] < 0 or layers[-1] >= num_blocks:
        raise ValueError(f"layers must be ascending, different and in [0, {num_blocks - 1}], got {layers}")
    return layers


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


def initial_mix(layers: Sequence[int], num: int) -> Float[Tensor, "M L"]:
    """Logits of M softmax mixtures of L tokens, each with weight 0.9 on one of the layers."""
    logits = torch.full((len(layers), num), math.log((1 - _START) / max(num - 1, 1)))
    logits[torch.arange(len(layers)), torch.tensor(layers)] = math.log(_START)
    return logits


class LayerTokens(nn.Module):
    """Class tokens of M layers of an open_clip vision transformer, in the joint space.

    The class token after block p goes through every later block by `value_pass_through`, then ln_post and proj; the
    token of the last block is the CLIP image feature itself. All M come from one pass over the picture.

    Args:
        visual: the image tower, with a class token and its own pooling (no attention pool). It is not copied, and its
            parameters are not registered here: who builds the model owns them.
        layers: 0-based blocks, ascending; `relative_layers` of the depth if None.
        pass_through: see `value_pass_through`.
        mix: "fixed", or "learned" for M softmax mixtures of the tokens of all blocks, which start with weight 0.9 on
            the given layers.

    Attributes:
        mix_logits: (M, L), present for mix="learned".

    Raises:
        ValueError: layers unsorted, repeated or outside the tower; no class token; unknown pass_through or mix.
    """

    def __init__(
        self,
        visual: nn.Module,
        layers: Sequence[int] | None = None,
        pass_through: str = "value",
        mix: str = "fixed",
    ) -> None:
        """Check the tower and choose the layers."""
        super().__init__()
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        pooled = getattr(visual, "attn_pool", None) is not None or getattr(visual, "pool_type", "tok") != "tok"
        if blocks is None or getattr(visual, "class_embedding", None) is None or pooled:
            raise ValueError(
                f"visual must be an open_clip vision transformer with a class token, got {type(visual).__name__}"
            )
        if not visual.transformer.batch_first:
            raise ValueError("visual must keep the batch first, got batch_first=False")
        self._visual = (visual,)  # in a tuple, which keeps it out of the modules
        num_blocks = len(blocks)
        self.layers = relative_layers(num_blocks) if layers is None else check_layers(layers, num_blocks)
        self.pass_through = check_choice("pass_through", pass_through, ("value", "released"))
        self.mix = check_choice("mix", mix, ("fixed", "learned"))
        # Whether the last token is the model's own feature.
        self.ends = self.mix == "fixed" and self.layers[-1] == num_blocks - 1
        if mix == "learned":
            self.mix_logits = nn.Parameter(initial_mix(self.layers, num_blocks))

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return self._visual[0]

    @property
    def num_tokens(self) -> int:
        """The number M of tokens of a picture."""
        return len(self.layers)

    def forward(
        self, images: Float[Tensor, "B 3 height width"], prompts: VisualPrompts | None = None
    ) -> Float[Tensor, "B M d"]:
        """Encode pictures once.

        Args:
            images: preprocessed pictures of the tower's size.
            prompts: learned tokens.

        Returns:
            Tokens `(B M d)`, not normalised; the last of them belongs to the last of the layers.

        Raises:
            ValueError: more deep prompts than blocks after the first.
        """
        visual, blocks = self.visual, self.visual.transformer.resblocks
        taken = set(range(len(blocks))) if self.mix == "learned" else set(self.layers)
        deeper = () if prompts is None else prompts.deeper
        if len(deeper) >= len(blocks):
            raise ValueError(f"prompts must hold at most {len(blocks) - 1} deeper layers, got {len(deeper)}")
        x = self._embed(images, prompts)
        early = x[:, :0]
        for number, block in enumerate(blocks):
            if 1 <= number <= len(deeper):
                learned = deeper[number - 1].to(x.dtype)
                x = torch.cat((x[:, : -len(learned)], learned.expand(len(x), -1, -1)), dim=1)
            x = block(x)
            if early.shape[1]:
                early = value_pass_through(block, early, self.pass_through)
            if number in taken:
                early = torch.cat((early, x[:, :1]), dim=1)
        tokens = visual.ln_post(early)
        tokens = tokens if visual.proj is None else tokens @ visual.proj
        if self.mix == "learned":
            return self.mix_logits.softmax(dim=-1).to(tokens.dtype) @ tokens
        return tokens

    def _embed(self, images: Tensor, prompts: VisualPrompts | None) -> Tensor:
        visual = self.visual
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        x = visual.patch_dropout(x + visual.positional_embedding.to(x.dtype))
        if prompts is not None:
            x = torch.cat((x, prompts.first.to(x.dtype).expand(len(x), -1, -1)), dim=1)
        return visual.ln_pre(x)
