"""Prompt learners over open_clip: MaPLe and PromptSRC."""

from mat_align.prompts._learners import MaPLePrompts, PromptLearner, PromptSRCPrompts
from mat_align.prompts._regularizer import GaussianPromptAverage, PromptSRCRegularizer, template_features
from mat_align.prompts._text import encode_text, label_text

__all__ = [
    "GaussianPromptAverage",
    "MaPLePrompts",
    "PromptLearner",
    "PromptSRCPrompts",
    "PromptSRCRegularizer",
    "encode_text",
    "label_text",
    "template_features",
]
