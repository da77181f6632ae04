"""Dual encoders over models of open_clip (Ilharco et al., 2021), an optional dependency."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from hier_lora._attention import joined_state, project_attention
from hier_lora.dual_encoder import register_locator

PREPROCESSING, WEIGHTS = "open_clip_preprocess.json", "open_clip_model.safetensors"


class OpenClipDualEncoder(nn.Module):
    """A model of `open_clip` with its evaluation transform and tokenizer.

    Its `torch.nn.MultiheadAttention` modules are replaced by `ProjectedAttention`, the same function with a linear layer
    for each projection, so that LoRA adapts queries and values as in the Hugging Face models.

    Args:
        model: a model of `open_clip`; changed in place.
        transform: from a PIL picture to the input of the model.
        tokenizer: from sentences to token ids, padded to the context length.
        settings: what the transform was made from, saved beside an adapter.
    """

    model: Any  # an nn.Module of open_clip, which has no types

    def __init__(self, model: nn.Module, transform, tokenizer, settings: dict | None = None) -> None:
        super().__init__()
        project_attention(model)
        self.model = model
        self.transform = transform
        self.tokenizer = tokenizer
        self.settings = settings or {}
        self.locator = ""
        layers = r"(q_proj|v_proj|qkv|query|value)"
        self.lora_targets = {
            "vision": rf"visual\..*\.{layers}",
            "text": rf"(text\.)?transformer\..*\.{layers}",
        }
        loose = ["transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection"]
        text = ["text."] if hasattr(model, "text") else loose
        self.tower_modules = {"vision": ["visual."], "text": text}
        self.modules_to_save: list[str] = []

    @property
    def plain_model(self) -> nn.Module:
        """The model of `open_clip`, with `ProjectedAttention` inside: an adapter uses its names."""
        return self.model

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor on the cosines."""
        return self.model.logit_scale

    def encode_image(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Embed preprocessed pictures; not normalised."""
        return self.model.encode_image(pixels)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "num_texts dim"]:
        """Embed sentences, cut after the longest of them where the tower is causal; not normalised."""
        tokens = self.tokenizer(list(texts)).to(self.logit_scale.device)
        pooled = getattr(self.model, "text_pool_type", None)
        # A causal tower that is read at the end token does not see the padding behind it.
        if pooled != "argmax" or self.model.attn_mask is None:
            return self.model.encode_text(tokens)
        length = int(tokens.argmax(1).max()) + 1
        tokens, model = tokens[:, :length], self.model
        states = model.token_embedding(tokens) + model.positional_embedding[:length]
        states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask[:length, :length]))
        states = states[torch.arange(len(tokens), device=tokens.device), tokens.argmax(1)]
        projection = model.text_projection
        if projection is None:
            return states
        return projection(states) if isinstance(projection, nn.Linear) else states @ projection

    def preprocess(self, picture: Image.Image | np.ndarray) -> Float[Tensor, "channels height width"]:
        """Resize, crop and normalise one RGB picture as the model expects."""
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        return self.transform(picture.convert("RGB"))

    def save_preprocessing(self, folder: Path) -> None:
        """Write the settings of the transform and of the tokenizer."""
        (folder / PREPROCESSING).write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")

    def save_merged(self, folder: Path) -> None:
        """Write the weights under open_clip's own names; see `HierLoraCLIP.save_merged`."""
        state = {name: value.detach().cpu().contiguous() for name, value in joined_state(self.model).items()}
        save_file(state, folder / WEIGHTS)
        self.save_preprocessing(folder)


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
    settings = {
        "architecture": architecture,
        "pretrained": pretrained,
        "preprocess": dict(getattr(model.visual, "preprocess_cfg", {})),
        "context_length": getattr(model, "context_length", None),
    }
    return OpenClipDualEncoder(model, transform, open_clip.get_tokenizer(architecture), settings).eval()


register_locator("open_clip", load_open_clip)

__all__ = ["OpenClipDualEncoder", "load_open_clip"]
