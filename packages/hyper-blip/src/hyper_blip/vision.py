"""Vision encoders and language models from elsewhere: named by a locator, so that a saved model need not hold their weights."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

Loader = Callable[[str], nn.Module]
_LOADERS: dict[str, Loader] = {}


def register_locator(prefix: str, loader: Loader) -> None:
    """Make `load_module("<prefix>:<name>")` call `loader(name)`.

    Args:
        prefix: the part before the colon.
        loader: takes the part after it and returns a vision module `(B, 3, H, W) -> (B, M, C)`, or a causal language model
            of `transformers`.

    Raises:
        ValueError: the prefix is empty or holds a colon.
    """
    if not prefix or ":" in prefix:
        raise ValueError(f"prefix must be a non-empty word without ':', got {prefix!r}")
    _LOADERS[prefix] = loader


def load_module(locator: str) -> nn.Module:
    """The module that a locator names: "hf-lm:<name>" (a language model), "hf-vision:<name>", or a registered prefix.

    Raises:
        ValueError: the prefix is unknown; the message lists the known ones.
    """
    prefix, colon, name = locator.partition(":")
    if not colon or not name or prefix not in _LOADERS:
        raise ValueError(f"locator must be '<prefix>:<name>' with a prefix of {sorted(_LOADERS)}, got {locator!r}")
    return _LOADERS[prefix](name)


def _hf_language_model(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(name).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name)


def _hf_vision_model(name: str) -> nn.Module:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(name)
    return getattr(model, "vision_model", model)


register_locator("hf-lm", _hf_language_model)
register_locator("hf-vision", _hf_vision_model)


class VisionAdapter(nn.Module):
    """Any vision module in the place of BLIP-2's own encoder, with a LayerNorm of its own behind it.

    BLIP-2 trains the LayerNorm behind its frozen encoder; features of another encoder need one as much.

    Args:
        module: from `(B, 3, H, W)` to `(B, M, C)`, or to an output with such a `last_hidden_state`.
        width: C.
        layer_norm: put the LayerNorm behind it.
    """

    def __init__(self, module: nn.Module, width: int, layer_norm: bool = True) -> None:
        super().__init__()
        self.module = module
        self.width = width
        self.post_layernorm = nn.LayerNorm(width, eps=1e-6) if layer_norm else nn.Identity()

    def forward(
        self, pixel_values: Float[Tensor, "batch channels height width"], **ignored: Any
    ) -> BaseModelOutputWithPooling:
        """The features as `last_hidden_state` `(B, M, C)`.

        Raises:
            ValueError: the module returns another shape.
        """
        found = self.module(pixel_values.to(_dtype(self.module, pixel_values.dtype)))
        found = getattr(found, "last_hidden_state", found)
        if found.ndim != 3 or found.shape[-1] != self.width:
            raise ValueError(f"the vision module must return (B, M, {self.width}), got {tuple(found.shape)}")
        found = self.post_layernorm(found.to(_dtype(self.post_layernorm, found.dtype)))
        return BaseModelOutputWithPooling(last_hidden_state=found, pooler_output=found[:, 0])


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), default)


def external_vision_config(width: int, qformer: Blip2QFormerConfig, **more: Any) -> Blip2Config:
    """A BLIP-2 configuration for a vision encoder that brings its own weights.

    Args:
        width: C of the encoder's features `(B, M, C)`.
        qformer: of the Q-Former; its `encoder_hidden_size` becomes `width`.
        more: further fields of `transformers.Blip2Config`.

    Returns:
        The configuration; its own vision encoder has no layers and is replaced.
    """
    vision = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=0,
        num_attention_heads=1,
        image_size=14,
        patch_size=14,
    )
    return Blip2Config(vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), **more)
