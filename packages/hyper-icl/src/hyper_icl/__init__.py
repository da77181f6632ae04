"""Choosing, weighing and distilling demonstrations for multimodal in-context learning, in hyperbolic space.

Two methods live here under their own names. The seed-note system: `HyperbolicLift`, `AnchorBank`, `HyperbolicDemoIndex`,
`calibrate`, `SegmentDistillLoss`. The published Hyper-ICL (arXiv 2606.04434): `LogitAdapter`, `LorentzAnchorLoss`.
"""

from hyper_icl.__about__ import __version__
from hyper_icl._selected import DemoSelection
from hyper_icl.adapter import LogitAdapter, attach
from hyper_icl.anchors import AnchorBank, AnchorLoss, HyperbolicLift, anchor_loss
from hyper_icl.baselines import MmicesSelector, RandomSelector, RicesSelector, TopKClipSelector, knn_vote
from hyper_icl.calibration import (
    CalibrationPlan,
    additive_mask,
    augment_qk,
    calibrate,
    hierarchy_bias,
    register_attention,
    text_attention_modules,
    use_calibrated_attention,
)
from hyper_icl.distill import (
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
from hyper_icl.diverse import BalancedSelector, DppSelector, MmrSelector, vote_k
from hyper_icl.lorentz_anchor_loss import LorentzAnchorLoss, align_suffix, lorentz_anchor_loss
from hyper_icl.prompts import format_prompt, insert_demos, postprocess_caption, postprocess_vqa
from hyper_icl.segments import SegmentMap
from hyper_icl.selection import HyperbolicDemoIndex
from hyper_icl.vectors import inner_product_query, inner_product_vectors

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
    "LogitAdapter",
    "LorentzAnchorLoss",
    "MmicesSelector",
    "MmrSelector",
    "RandomSelector",
    "RicesSelector",
    "SegmentDistillLoss",
    "SegmentMap",
    "SegmentMassCollector",
    "TopKClipSelector",
    "__version__",
    "additive_mask",
    "align_suffix",
    "anchor_loss",
    "attach",
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
    "lorentz_anchor_loss",
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
