"""From one picture to one visual feature per label: tokens of several layers, and attention over them asked by the text."""

from mat_align._step import value_pass_through
from mat_align.visual_tree._attention import TextQueriedAttention
from mat_align.visual_tree._layers import LayerTokens, VisualPrompts, relative_layers
from mat_align.visual_tree._stages import StageTokens

__all__ = [
    "LayerTokens",
    "StageTokens",
    "TextQueriedAttention",
    "VisualPrompts",
    "relative_layers",
    "value_pass_through",
]
