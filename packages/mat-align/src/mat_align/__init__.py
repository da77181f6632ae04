"""Modality Alignment across Trees: prompt-tuned CLIP whose image and text paths through a taxonomy agree.

`visual_tree`, `intermediate`, `objective`, `prompts` and `variants` hold the parts; `MATModel` and `FeatureMATModel` put them together.
"""

from mat_align import backbones, intermediate, objective, prompts, variants, visual_tree
from mat_align.__about__ import __version__
from mat_align._base import MATOutput
from mat_align.backbones import Backbone
from mat_align.features import FeatureMATModel
from mat_align.head import MATHead, PathFeatures
from mat_align.model import MATModel
from mat_align.objective import MATLosses, MATObjective, entailment_terms, fraction_met
from mat_align.prompts import GaussianPromptAverage, MaPLePrompts, PromptSRCPrompts, PromptSRCRegularizer
from mat_align.variants import (
    EUCLIDEAN,
    HETEROGENEOUS,
    PROTECT,
    SEPARATE,
    SHARED,
    VANILLA,
    Variant,
    released,
)
from mat_align.visual_tree import LayerTokens, StageTokens, TextQueriedAttention, relative_layers, value_pass_through

__all__ = [
    "EUCLIDEAN",
    "HETEROGENEOUS",
    "PROTECT",
    "SEPARATE",
    "SHARED",
    "VANILLA",
    "Backbone",
    "FeatureMATModel",
    "GaussianPromptAverage",
    "LayerTokens",
    "MATHead",
    "MATLosses",
    "MATModel",
    "MATObjective",
    "MATOutput",
    "MaPLePrompts",
    "PathFeatures",
    "PromptSRCPrompts",
    "PromptSRCRegularizer",
    "StageTokens",
    "TextQueriedAttention",
    "Variant",
    "__version__",
    "backbones",
    "entailment_terms",
    "fraction_met",
    "intermediate",
    "objective",
    "prompts",
    "relative_layers",
    "released",
    "value_pass_through",
    "variants",
    "visual_tree",
]
