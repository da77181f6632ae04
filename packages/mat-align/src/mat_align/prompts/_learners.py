"""MaPLe and PromptSRC: the learned tokens of both towers of a frozen CLIP.

References: Khattak et al., "MaPLe: Multi-modal prompt learning", CVPR 2023; Khattak et al., "Self-regulating prompts:
foundational model adaptation without forgetting" (PromptSRC), ICCV 2023.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mat_align.backbones import Backbone, backbone
from mat_align.visual_tree import VisualPrompts

LEARNERS: dict[str, type["PromptLearner"]] = {}


class PromptLearner(nn.Module):
    """Learned tokens of one or both towers; the base of `MaPLePrompts`, `PromptSRCPrompts` and learners of your own.

    The model is read for widths, depths and the embeddings of the initial words; it is not kept. A subclass with a `kind`
    is known to `MATModel.from_pretrained` from its definition on: `kind(clip, **settings)` must build it again.

    Attributes:
        ctx_init: words before the label: "{ctx_init} {label}."; the first of them are replaced by learned tokens.
        settings: what rebuilds the learner, as JSON can hold it.
    """

    kind = ""
    ctx_init: str
    settings: dict

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the learner under its kind."""
        super().__init_subclass__(**kwargs)
        if cls.kind:
            LEARNERS[cls.kind] = cls

    def text_prompts(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens of the text tower's input, and of its blocks 1, 2, ..."""
        raise NotImplementedError

    def visual_prompts(self) -> VisualPrompts | None:
        """Tokens of the image tower; none for a learner of the text alone, such as CoOp."""
        return None

    def prompt(self, text: str) -> str:
        """The sentence of a label's text."""
        return f"{self.ctx_init} {text}."


def initial_context(clip: nn.Module | Backbone, ctx_init: str, num_ctx: int) -> Float[Tensor, "num_ctx w"]:
    """Embeddings of the first `num_ctx` tokens of the initial words, in fp32.

    Raises:
        ValueError: fewer words.
    """
    tower = backbone(clip).text
    words = tower.words(ctx_init)
    if num_ctx < 1 or len(words) < num_ctx:
        raise ValueError(
            f"ctx_init must have at least num_ctx = {num_ctx} >= 1 tokens, got {len(words)} in {ctx_init!r}"
        )
    with torch.no_grad():
        return tower.embedding(words[:num_ctx].to(tower.embedding.weight.device)).float().clone()


def _depth_of(name: str, depth: int, num_blocks: int) -> int:
    if not 1 <= depth <= num_blocks:
        raise ValueError(f"{name} must lie in 1..{num_blocks}, got {depth}")
    return depth


def _vectors(num: int, num_ctx: int, width: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(0.02 * torch.randn(num_ctx, width)) for _ in range(num))


class MaPLePrompts(PromptLearner):
    """MaPLe: text tokens are learned, the image tower sees their linear images.

    `ctx` replaces text positions 1..num_ctx, and its image follows the patch tokens before `ln_pre`; the blocks
    1..depth-1 of both towers get tokens of their own and their images.

    Args:
        clip: the model, see `mat_align.backbones`.
        num_ctx: learned tokens of each input.
        depth: number of inputs with learned tokens, from 1 to the smaller number of blocks.
        ctx_init: words before the label; their first num_ctx tokens initialise `ctx`, the rest of the words stays.

    Raises:
        ValueError: ctx_init has fewer than num_ctx tokens, or depth is out of range.
    """

    kind = "maple"

    def __init__(
        self, clip: nn.Module | Backbone, num_ctx: int = 2, depth: int = 3, ctx_init: str = "a photo of a"
    ) -> None:
        """Make the tokens and the maps."""
        super().__init__()
        parts = backbone(clip)
        _depth_of("depth", depth, min(parts.text.num_blocks, parts.image.num_blocks))
        self.ctx_init = ctx_init
        self.settings = {"num_ctx": num_ctx, "depth": depth, "ctx_init": ctx_init}
        self.ctx = nn.Parameter(initial_context(parts, ctx_init, num_ctx))
        width, visual_width = self.ctx.shape[1], parts.image.width
        self.deeper = _vectors(depth - 1, num_ctx, width)
        self.maps = nn.ModuleList(nn.Linear(width, visual_width) for _ in range(depth))

    def text_prompts(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`ctx`, and the tokens of the blocks 1..depth-1."""
        return self.ctx, tuple(self.deeper)

    def visual_prompts(self) -> VisualPrompts:
        """The linear images of the text tokens."""
        first, *rest = (m(x) for m, x in zip(self.maps, (self.ctx, *self.deeper), strict=True))
        return VisualPrompts(first, tuple(rest))


class PromptSRCPrompts(PromptLearner):
    """PromptSRC: independent learned tokens of both towers.

    Args:
        clip: the model, see `mat_align.backbones`.
        num_ctx_text: learned tokens of each text input.
        num_ctx_vision: learned tokens of each image input.
        depth_text: number of text inputs with learned tokens, from 1 to the number of blocks.
        depth_vision: the same for the image tower.
        ctx_init: words before the label, whose tokens initialise the text input.

    Raises:
        ValueError: ctx_init has fewer than num_ctx_text tokens, or a depth is out of range.
    """

    kind = "promptsrc"

    def __init__(
        self,
        clip: nn.Module | Backbone,
        num_ctx_text: int = 4,
        num_ctx_vision: int = 4,
        depth_text: int = 9,
        depth_vision: int = 9,
        ctx_init: str = "a photo of a",
    ) -> None:
        """Make the tokens."""
        super().__init__()
        if num_ctx_vision < 1:
            raise ValueError(f"num_ctx_vision must be at least 1, got {num_ctx_vision}")
        parts = backbone(clip)
        _depth_of("depth_text", depth_text, parts.text.num_blocks)
        _depth_of("depth_vision", depth_vision, parts.image.num_blocks)
        self.ctx_init = ctx_init
        self.settings = {
            "num_ctx_text": num_ctx_text,
            "num_ctx_vision": num_ctx_vision,
            "depth_text": depth_text,
            "depth_vision": depth_vision,
            "ctx_init": ctx_init,
        }
        self.ctx = nn.Parameter(initial_context(parts, ctx_init, num_ctx_text))
        self.deeper = _vectors(depth_text - 1, num_ctx_text, self.ctx.shape[1])
        self.visual = _vectors(depth_vision, num_ctx_vision, parts.image.width)

    def text_prompts(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`ctx`, and the tokens of the blocks 1..depth_text-1."""
        return self.ctx, tuple(self.deeper)

    def visual_prompts(self) -> VisualPrompts:
        """The image tower's own tokens."""
        first, *rest = self.visual
        return VisualPrompts(first, tuple(rest))
