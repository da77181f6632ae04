"""LoRA fine-tuning of CLIP-like models with a taxonomy."""

from hier_lora.__about__ import __version__
from hier_lora._attention import project_attention
from hier_lora.calibration import fit_sigmoid, fit_temperature, fit_temperatures
from hier_lora.dual_encoder import DualEncoder, load_dual_encoder, register_locator
from hier_lora.experts import Expert, PoolSettings, ProductOfExperts, choose, pool
from hier_lora.heads import LinearHead, Neighbours
from hier_lora.hf_encoder import HFDualEncoder
from hier_lora.lora import LoraOverhead, lora_config, lora_overhead
from hier_lora.model import HierLoraCLIP
from hier_lora.open_clip_encoder import OpenClipDualEncoder
from hier_lora.predict import DECODERS, LabelPrediction, Prediction, label_probabilities, predict_paths, predict_top
from hier_lora.prompts import PromptSet
from hier_lora.text import NodeSample, embed_sentences, sample_nodes
from hier_losses import match_taxonomies

__all__ = [
    "DECODERS",
    "DualEncoder",
    "Expert",
    "HFDualEncoder",
    "HierLoraCLIP",
    "LabelPrediction",
    "LinearHead",
    "LoraOverhead",
    "Neighbours",
    "NodeSample",
    "OpenClipDualEncoder",
    "PoolSettings",
    "Prediction",
    "ProductOfExperts",
    "PromptSet",
    "__version__",
    "choose",
    "embed_sentences",
    "fit_sigmoid",
    "fit_temperature",
    "fit_temperatures",
    "label_probabilities",
    "load_dual_encoder",
    "lora_config",
    "lora_overhead",
    "match_taxonomies",
    "pool",
    "predict_paths",
    "predict_top",
    "project_attention",
    "register_locator",
    "sample_nodes",
]
