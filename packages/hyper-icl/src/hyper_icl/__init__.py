"""Choosing, weighing and distilling demonstrations for multimodal in-context learning, in hyperbolic space."""

from hyper_icl.__about__ import __version__
from hyper_icl._selected import DemoSelection
from hyper_icl.anchors import AnchorBank, AnchorLoss, HyperbolicLift, anchor_loss
from hyper_icl.baselines import MmicesSelector, RandomSelector, RicesSelector, TopKClipSelector, knn_vote
from hyper_icl.segments import SegmentMap
from hyper_icl.selection import HyperbolicDemoIndex

__all__ = [
    "AnchorBank",
    "AnchorLoss",
    "DemoSelection",
    "HyperbolicDemoIndex",
    "HyperbolicLift",
    "MmicesSelector",
    "RandomSelector",
    "RicesSelector",
    "SegmentMap",
    "TopKClipSelector",
    "__version__",
    "anchor_loss",
    "knn_vote",
]
