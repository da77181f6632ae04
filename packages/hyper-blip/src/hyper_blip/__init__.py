"""BLIP-2 in hyperbolic space: both training stages, retrieval, captions, and the radius as uncertainty."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining

from hyper_blip.__about__ import __version__
from hyper_blip.captioning import caption_batch, generate_captions
from hyper_blip.config import HyperBlip2Config, HyperbolicConfig
from hyper_blip.generation import HyperBlip2ForConditionalGeneration
from hyper_blip.losses import (
    MixSchedule,
    entailment_loss,
    image_text_contrastive_loss,
    image_text_matching_loss,
    query_diversity_penalty,
    text_generation_loss,
)
from hyper_blip.negatives import hard_negatives
from hyper_blip.pretraining import HyperBlip2ForPretraining, PretrainingOutput
from hyper_blip.projection import HyperbolicFeatures, HyperbolicProjector, Temperature, ball_radius
from hyper_blip.retrieval import RetrievalScores, recall_at_k, retrieval_scores
from hyper_blip.sampling import RandomQuerySelection, RandomTextPruning
from hyper_blip.similarity import aggregate_queries, pairwise_similarity, query_midpoint
from hyper_blip.trainer import StepCallback
from hyper_blip.uncertainty import aurc, calibration_bins, error_auroc, kendall, radius_report, spearman
from hyper_blip.vision import VisionAdapter, external_vision_config, register_locator
from hyper_blip.weights import LoadingInfo

AutoConfig.register(HyperBlip2Config.model_type, HyperBlip2Config)
# The stage is read from `architectures` in the configuration.
AutoModel.register(HyperBlip2Config, (HyperBlip2ForPretraining, HyperBlip2ForConditionalGeneration))
AutoModelForPreTraining.register(HyperBlip2Config, HyperBlip2ForPretraining)
AutoModelForImageTextToText.register(HyperBlip2Config, HyperBlip2ForConditionalGeneration)

__all__ = [
    "HyperBlip2Config",
    "HyperBlip2ForConditionalGeneration",
    "HyperBlip2ForPretraining",
    "HyperbolicConfig",
    "HyperbolicFeatures",
    "HyperbolicProjector",
    "LoadingInfo",
    "MixSchedule",
    "PretrainingOutput",
    "RandomQuerySelection",
    "RandomTextPruning",
    "RetrievalScores",
    "StepCallback",
    "Temperature",
    "VisionAdapter",
    "__version__",
    "aggregate_queries",
    "aurc",
    "ball_radius",
    "calibration_bins",
    "caption_batch",
    "entailment_loss",
    "error_auroc",
    "external_vision_config",
    "generate_captions",
    "hard_negatives",
    "image_text_contrastive_loss",
    "image_text_matching_loss",
    "kendall",
    "pairwise_similarity",
    "query_diversity_penalty",
    "query_midpoint",
    "radius_report",
    "recall_at_k",
    "register_locator",
    "retrieval_scores",
    "spearman",
    "text_generation_loss",
]
