"""The seed note's method: choose demonstrations in hyperbolic space, weigh them, distil the weighing into LoRA.

References stand in the modules. The published paper of the package's title has none of this: see `hyper_icl.published`.
"""

from hyper_icl.demonstrations._selected import DemoSelection
from hyper_icl.demonstrations.anchors import AnchorBank, AnchorLoss, HyperbolicLift, anchor_loss
from hyper_icl.demonstrations.baselines import MmicesSelector, RandomSelector, RicesSelector, TopKClipSelector, knn_vote
from hyper_icl.demonstrations.calibration import (
    CalibrationPlan,
    additive_mask,
    augment_qk,
    calibrate,
    hierarchy_bias,
    register_attention,
    text_attention_modules,
    use_calibrated_attention,
)
from hyper_icl.demonstrations.distill import (
    DistillTerms,
    SegmentDistillLoss,
    SegmentMassCollector,
    base_model,
    lora_config,
    middle_layers,
    segment_kl,
    segment_log_mass,
    tilt,
)
from hyper_icl.demonstrations.diverse import BalancedSelector, DppSelector, MmrSelector, vote_k
from hyper_icl.demonstrations.prompts import format_prompt, insert_demos, postprocess_caption, postprocess_vqa
from hyper_icl.demonstrations.segments import SegmentMap
from hyper_icl.demonstrations.selection import HyperbolicDemoIndex
from hyper_icl.demonstrations.vectors import inner_product_query, inner_product_vectors

__all__ = [
    "AnchorBank",
    "AnchorLoss",
    "BalancedSelector",
    "CalibrationPlan",
    "DemoSelection",
    "DistillTerms",
    "DppSelector",
    "HyperbolicDemoIndex",
    "HyperbolicLift",
    "MmicesSelector",
    "MmrSelector",
    "RandomSelector",
    "RicesSelector",
    "SegmentDistillLoss",
    "SegmentMap",
    "SegmentMassCollector",
    "TopKClipSelector",
    "additive_mask",
    "anchor_loss",
    "augment_qk",
    "base_model",
    "calibrate",
    "format_prompt",
    "hierarchy_bias",
    "inner_product_query",
    "inner_product_vectors",
    "insert_demos",
    "knn_vote",
    "lora_config",
    "middle_layers",
    "postprocess_caption",
    "postprocess_vqa",
    "register_attention",
    "segment_kl",
    "segment_log_mass",
    "text_attention_modules",
    "tilt",
    "use_calibrated_attention",
    "vote_k",
]
