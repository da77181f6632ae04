"""Dual encoders over the CLIP and SigLIP families of Hugging Face transformers.

CLIP: Radford et al., 2021. SigLIP: Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training".
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from hier_lora.dual_encoder import register_locator


class HFDualEncoder(nn.Module):
    """A CLIP or SigLIP model of `transformers` with its own preprocessing and tokenizer.

    Args:
        model: `CLIPModel`, `SiglipModel` or a model with the same `get_image_features` / `get_text_features`.
        processor: the matching processor (image processor and tokenizer).
    """

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.locator = ""
        self.lora_targets = {
            "vision": r"model\.vision_model\..*\.(q_proj|v_proj)",
            "text": r"model\.text_model\..*\.(q_proj|v_proj)",
        }
        self.tower_modules = {
            "vision": ["model.vision_model.", "model.visual_projection."],
            "text": ["model.text_model.", "model.text_projection."],
        }
        self.modules_to_save: list[str] = []

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
        self.processor = type(self.processor).from_pretrained(folder, local_files_only=True)


def load_hf(name: str) -> HFDualEncoder:
    """Load a CLIP or SigLIP model and its processor with `from_pretrained`."""
    from transformers import AutoModel, AutoProcessor

    return HFDualEncoder(AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)).eval()


register_locator("hf", load_hf)

__all__ = ["HFDualEncoder", "load_hf"]
