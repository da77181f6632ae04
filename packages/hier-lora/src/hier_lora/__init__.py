"""LoRA fine-tuning of CLIP-like models with a taxonomy."""

from hier_lora.__about__ import __version__
from hier_lora.dual_encoder import DualEncoder, load_dual_encoder, register_locator
from hier_lora.lora import LoraOverhead, lora_config, lora_overhead
from hier_lora.model import HierLoraCLIP
from hier_lora.predict import DECODERS, Prediction, predict_paths
from hier_lora.prompts import PromptSet
from hier_lora.towers import HFDualEncoder, OpenClipDualEncoder

__all__ = [
    "DECODERS",
    "DualEncoder",
    "HFDualEncoder",
    "HierLoraCLIP",
    "LoraOverhead",
    "OpenClipDualEncoder",
    "Prediction",
    "PromptSet",
    "__version__",
    "load_dual_encoder",
    "lora_config",
    "lora_overhead",
    "predict_paths",
    "register_locator",
]
