"""Dual encoders over the CLIP-like families of Hugging Face transformers.

CLIP: Radford et al., 2021. SigLIP: Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from hier_lora.dual_encoder import one_sentence, register_locator

# Model types whose adapters a test puts back on the plain model. SigLIP2 checkpoints of a fixed size are of type "siglip".
FAMILIES = (
    "aimv2", "altclip", "chinese_clip", "clip", "groupvit", "metaclip_2", "siglip", "vision-text-dual-encoder",
)  # fmt: skip
_REASONS = {
    "siglip2": ": SigLIP2 NaFlex takes pictures as lists of patches; take a SigLIP2 of a fixed size",
    "align": ": ALIGN has a temperature where the others have a scale of the cosines",
    "xclip": ": X-CLIP embeds videos",
}


class HFDualEncoder(nn.Module):
    """A CLIP-like model of `transformers` with its own preprocessing and tokenizer.

    Args:
        model: `CLIPModel`, `SiglipModel` or another model whose `config.model_type` is in `FAMILIES`.
        processor: the matching processor (image processor and tokenizer).

    Raises:
        ValueError: for a model of another family.
    """

    model: Any  # an nn.Module of one of the families, which have no class in common

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__()
        self.model = model
        check_family(self.model.config.model_type)
        self.processor = processor
        self.locator = ""
        self.options: dict[str, str] = {}
        layers = r"(q_proj|v_proj|query|value)"
        self.lora_targets = {"vision": rf"vision_model\..*\.{layers}", "text": rf"text_model\..*\.{layers}"}
        self.tower_modules = {
            "vision": ["vision_model.", "visual_projection."],
            "text": ["text_model.", "text_projection."],
        }
        self.modules_to_save: list[str] = []

    @property
    def plain_model(self) -> nn.Module:
        """The model of `transformers`: an adapter uses its names, so that peft alone can put it back."""
        return self.model

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor on the cosines."""
        return self.model.logit_scale

    def encode_image(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Embed preprocessed pictures; not normalised."""
        return self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "num_texts dim"]:
        """Embed sentences, padded to the longest of them; not normalised."""
        # SigLIP was trained on sentences padded to 64 tokens and pools the last position; CLIP ignores padding.
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        tokens = self.processor.tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
        inputs = {k: v.to(self.logit_scale.device) for k, v in tokens.items() if k in ("input_ids", "attention_mask")}
        if padding == "max_length":
            inputs.pop("attention_mask", None)
        return self.model.get_text_features(**inputs, return_dict=True).pooler_output

    def preprocess(self, picture: Image.Image | np.ndarray) -> Float[Tensor, "channels height width"]:
        """Resize, crop and normalise one RGB picture as the model's own processor does."""
        if isinstance(picture, Image.Image):
            picture = picture.convert("RGB")
        return self.processor.image_processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def save_preprocessing(self, folder: Path) -> None:
        """Write the image processor and the tokenizer in the format of `transformers`."""
        self.processor.save_pretrained(folder)

    def load_preprocessing(self, folder: Path) -> None:
        """Take the image processor and the tokenizer that were saved with an adapter."""
        with one_sentence(str(folder)):
            self.processor = type(self.processor).from_pretrained(folder, local_files_only=True)

    def save_merged(self, folder: Path) -> None:
        """Write model and processor as `transformers` reads them; see `HierLoraCLIP.save_merged`."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def check_family(model_type: str) -> None:
    """Refuse a model that would fail later, or give other numbers than its authors'.

    Raises:
        ValueError: if no test covers the family.
    """
    if model_type not in FAMILIES:
        reason = _REASONS.get(model_type, "")
        raise ValueError(f"model must be of one of the families {FAMILIES}, got {model_type!r}{reason}")


def load_hf(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: object = None,
    quantization_config: object = None,
) -> HFDualEncoder:
    """Load a CLIP-like model and its processor with `from_pretrained`, which gets the options that are not None.

    Raises:
        ValueError: for a model of another family, before its weights are read.
    """
    from transformers import AutoConfig, AutoModel, AutoProcessor

    source = {} if revision is None else {"revision": revision}
    check_family(AutoConfig.from_pretrained(name, **source).model_type)
    chosen = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    model, loaded = AutoModel.from_pretrained(name, **source, **chosen, output_loading_info=True)
    if lacking := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"model must bring all of its weights, {name} lacks {len(lacking)}, such as {lacking[0]}, which would be random numbers"
        )
    encoder = HFDualEncoder(model, AutoProcessor.from_pretrained(name, **source)).eval()
    # Where the weights lie and how they are packed belongs to a machine; what they are belongs to the adapter.
    encoder.options = source | ({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})
    return encoder


register_locator("hf", load_hf)

__all__ = ["FAMILIES", "HFDualEncoder", "check_family", "load_hf"]
