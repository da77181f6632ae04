"""Class tokens of several ViT layers, carried to the output without further attention.

References: Modality Alignment across Trees (arXiv 2510.27391), the visual tree; deep visual prompts: Jia et al., "Visual
prompt tuning", ECCV 2022.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mat_align._checks import check_choice
from mat_align.backbones import ImageTower, image_tower

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


def initial_mix(layers: Sequence[int], num: int) -> Float[Tensor, "M L"]:
    """Logits of M softmax mixtures of L tokens, each with weight 0.9 on one of the layers."""
    logits = torch.full((len(layers), num), math.log((1 - _START) / max(num - 1, 1)))
    logits[torch.arange(len(layers)), torch.tensor(layers)] = math.log(_START)
    return logits


class LayerTokens(nn.Module):
    """Class tokens of M layers of a vision transformer, in the joint space.

    The class token after block p goes through every later block by `value_pass_through`, then ln_post and proj; the
    token of the last block is the CLIP image feature itself. All M come from one pass over the picture.

    Args:
        visual: an open_clip image tower with a class token, or an `ImageTower` of `mat_align.backbones`. It is not copied,
            and its parameters are not registered here: who builds the model owns them.
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
        visual: nn.Module | ImageTower,
        layers: Sequence[int] | None = None,
        pass_through: str = "value",
        mix: str = "fixed",
    ) -> None:
        """Check the tower and choose the layers."""
        super().__init__()
        self.tower = image_tower(visual) if isinstance(visual, nn.Module) else visual
        num_blocks = self.tower.num_blocks
        self.layers = relative_layers(num_blocks) if layers is None else check_layers(layers, num_blocks)
        self.pass_through = check_choice("pass_through", pass_through, ("value", "released"))
        self.mix = check_choice("mix", mix, ("fixed", "learned"))
        # Whether the last token is the model's own feature.
        self.ends = self.mix == "fixed" and self.layers[-1] == num_blocks - 1
        if mix == "learned":
            self.mix_logits = nn.Parameter(initial_mix(self.layers, num_blocks))

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
        tower, num = self.tower, self.tower.num_blocks
        taken = set(range(num)) if self.mix == "learned" else set(self.layers)
        deeper = () if prompts is None else prompts.deeper
        if len(deeper) >= num:
            raise ValueError(f"prompts must hold at most {num - 1} deeper layers, got {len(deeper)}")
        x = tower.embed(images, None if prompts is None else prompts.first)
        num_learned = 0 if prompts is None else len(prompts.first)
        early = x[:, :0]
        for number in range(num):
            if 1 <= number <= len(deeper):
                learned = deeper[number - 1].to(x.dtype)
                x = torch.cat((x[:, : -len(learned)], learned.expand(len(x), -1, -1)), dim=1)
            x = tower.block(number, x)
            if early.shape[1]:
                early = tower.alone(number, early, self.pass_through)
            if number in taken and number < num - 1:
                early = torch.cat((early, tower.summary(x, num_learned)), dim=1)
        tokens = tower.pool(early) if early.shape[1] else x.new_zeros(len(x), 0, tower.dim)
        if num - 1 in taken:
            tokens = torch.cat((tokens, tower.feature(x, num_learned)), dim=1)
        if self.mix == "learned":
            return self.mix_logits.softmax(dim=-1).to(tokens.dtype) @ tokens
        return tokens
