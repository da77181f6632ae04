"""Dual encoders over Hugging Face CLIP / SigLIP models and over open_clip models.

CLIP: Radford et al., 2021. SigLIP: Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training".
"""

from collections.abc import Sequence

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


def load_hf(name: str) -> HFDualEncoder:
    """Load a CLIP or SigLIP model and its processor with `from_pretrained`."""
    from transformers import AutoModel, AutoProcessor

    return HFDualEncoder(AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)).eval()


class OpenClipDualEncoder(nn.Module):
    """A model of `open_clip` with its evaluation transform and tokenizer.

    LoRA adapts the MLP layers (`c_fc`, `c_proj`): peft wraps `torch.nn.MultiheadAttention` only whole, and an `out_proj`
    wrapped alone is ignored by its forward pass.
    """

    def __init__(self, model: nn.Module, transform, tokenizer) -> None:
        super().__init__()
        self.model = model
        self.transform = transform
        self.tokenizer = tokenizer
        self.locator = ""
        self.lora_targets = {
            "vision": r"model\.visual\..*\.(c_fc|c_proj)",
            "text": r"model\.(text\.)?transformer\..*\.(c_fc|c_proj)",
        }
        text = (
            ["model.text."]
            if hasattr(model, "text")
            else ["model.transformer.", "model.token_embedding.", "model.ln_final."]
        )
        loose = [] if hasattr(model, "text") else ["model.positional_embedding", "model.text_projection"]
        self.tower_modules = {"vision": ["model.visual."], "text": text + loose}
        self.modules_to_save: list[str] = []

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor on the cosines."""
        return self.model.logit_scale

    def encode_image(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Embed preprocessed pictures; not normalised."""
        return self.model.encode_image(pixels)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "num_texts dim"]:
        """Embed sentences; not normalised."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.logit_scale.device))

    def preprocess(self, picture: Image.Image | np.ndarray) -> Float[Tensor, "channels height width"]:
        """Resize, crop and normalise one RGB picture as the model expects."""
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        return self.transform(picture.convert("RGB"))


def load_open_clip(name: str) -> OpenClipDualEncoder:
    """Load `<architecture>[@<pretrained tag or file>]`; without a tag the weights are random.

    Raises:
        ImportError: if open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("open_clip models need the extra: pip install 'hier-lora[open-clip]'") from error
    architecture, _, pretrained = name.partition("@")
    model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=pretrained or None)
    return OpenClipDualEncoder(model, transform, open_clip.get_tokenizer(architecture)).eval()


register_locator("hf", load_hf)
register_locator("open_clip", load_open_clip)

__all__ = ["HFDualEncoder", "OpenClipDualEncoder", "load_hf", "load_open_clip"]
