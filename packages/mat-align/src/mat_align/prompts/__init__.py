"""Prompt learners: MaPLe, PromptSRC, and the base of your own."""

from mat_align.prompts._learners import MaPLePrompts, PromptLearner, PromptSRCPrompts, initial_context
from mat_align.prompts._regularizer import GaussianPromptAverage, PromptSRCRegularizer, template_features
from mat_align.prompts._text import encode_text, label_text

__all__ = [
    "GaussianPromptAverage",
    "MaPLePrompts",
    "PromptLearner",
    "PromptSRCPrompts",
    "PromptSRCRegularizer",
    "encode_text",
    "initial_context",
    "label_text",
    "template_features",
]
