"""What both stages share: BLIP-2's modules, the frozen parts, the hyperbolic parameters."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Blip2Config, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2PreTrainedModel

from hyper_blip.config import HyperBlip2Config
from hyper_blip.files import SavedModel
from hyper_blip.projection import HyperbolicFeatures, HyperbolicProjector
from hyper_blip.vision import VisionAdapter, load_module
from hyper_blip.weights import (
    borrowed,
    make_own,
)
from hyper_geom import Curvature


class HyperBlip2Model(SavedModel):
    """Base of `HyperBlip2ForPretraining` and `HyperBlip2ForConditionalGeneration`.

    Attributes:
        config: `HyperBlip2Config`.
        blip2: the Hugging Face BLIP-2 model.
        curvature: shared by all projectors.
        image_projector: from projected queries to hyperbolic space.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = Blip2PreTrainedModel._no_split_modules

    def __init__(self, config: HyperBlip2Config, blip2: PreTrainedModel, vision: nn.Module | None) -> None:
        super().__init__(config)
        self.blip2 = blip2
        if vision is not None:
            vision = borrowed(vision)
        if vision is None and config.vision_locator:
            vision = load_module(config.vision_locator)
        self._external_vision = vision is not None
        self._sharded = False
        if vision is not None:
            blip2.vision_model = VisionAdapter(vision, config.blip2.vision_config.hidden_size)
        else:  # the encoder may be of another precision; the adapter casts by itself
            blip2.vision_model.post_layernorm.register_forward_pre_hook(_cast_to_weight)
        hyper = config.hyperbolic
        self.curvature = Curvature(hyper.c, learnable=hyper.learn_c)
        self.image_projector = self._projector()
        self.freeze_vision()

    def _projector(self) -> HyperbolicProjector:
        hyper = self.config.hyperbolic
        return HyperbolicProjector(
            self.config.blip2.image_text_hidden_size,
            self.curvature,
            manifold=hyper.manifold,
            init_scale=hyper.init_scale,
            learn_scale=hyper.learn_scale,
            max_radius=hyper.max_radius,
            compute_dtype=hyper.compute_dtype,
        )

    @property
    def device(self) -> torch.device:
        """Where the queries are."""
        return self.blip2.query_tokens.device

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.blip2.query_tokens.shape[1]

    def freeze_vision(self, frozen: bool = True) -> "HyperBlip2Model":
        """Freeze (or train) the vision encoder; the LayerNorm behind it always trains, as in BLIP-2."""
        self.blip2.vision_model.requires_grad_(not frozen)
        self.blip2.vision_model.post_layernorm.requires_grad_(True)
        self.vision_frozen = frozen
        # What trains is ours; frozen weights may stay shared with the model that they came from.
        make_own(p for p in self.parameters() if p.requires_grad)
        return self.train(self.training)

    def cast_vision(self, dtype: torch.dtype) -> "HyperBlip2Model":
        """Hold the vision encoder in another precision, for one that is frozen; the LayerNorm behind it keeps its own."""
        for name, child in self.blip2.vision_model.named_children():
            if name != "post_layernorm":
                child.to(dtype)
        return self

    def train(self, mode: bool = True) -> "HyperBlip2Model":
        """Set the mode, but leave a frozen vision encoder in evaluation mode: its statistics and dropout are not ours."""
        super().train(mode)
        if self.vision_frozen:
            self.blip2.vision_model.eval()
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> "HyperBlip2Model":
        """Recompute the layers in the backward pass instead of keeping their activations.

        Args:
            gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`; `use_reentrant=False` if None.
            more: further arguments of `transformers.PreTrainedModel.activation_checkpointing_enable`.
        """
        self._activation_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False}, **more)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every module here sets its weights when it is made, and loading never leaves one without."""

    def post_init(self) -> None:
        """The bookkeeping of `PreTrainedModel`, without new values for weights that have theirs."""
        for value in (*self.parameters(), *self.buffers()):
            value._is_hf_initialized = True
        super().post_init()

    def shard_frozen(self, mesh: Any = None) -> "HyperBlip2Model":
        """Spread the frozen layers of the vision encoder and of the language model over all ranks (FSDP2).

        Each rank then holds 1 / ranks of them and gathers one layer at a time. What trains stays whole on every rank, for
        `DistributedDataParallel` or accelerate, which leave the spread layers alone. Call it before either of them; every rank
        must then take part in every forward pass and in `save_pretrained`.

        Args:
            mesh: a one-dimensional `DeviceMesh`; all ranks, on CUDA if there is any, if None.

        Returns:
            This model.

        Raises:
            ValueError: no process group, or no list of layers with frozen weights to spread.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "shard_frozen needs an initialised process group: start with torchrun or accelerate launch"
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        if mesh is None:
            mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
        parts = [self.blip2.vision_model, getattr(self.blip2, "language_model", None)]
        lists = [m for part in parts if part is not None for m in part.modules() if isinstance(m, nn.ModuleList)]
        done: list[nn.Module] = []
        for layer in (layer for layers in lists for layer in layers):
            inside = any(layer is inner for outer in done for inner in outer.modules())
            trained = {p for p in layer.parameters() if p.requires_grad}
            if not inside and any(not p.requires_grad for p in layer.parameters()):
                # Each layer is a root of its own, and a root stays whole after its forward unless told otherwise.
                more = {"ignored_params": trained} if trained else {}
                fully_shard(layer, mesh=mesh, reshard_after_forward=True, **more)
                done.append(layer)
        if not done:
            raise ValueError("shard_frozen found no frozen layers in a ModuleList: there is nothing to spread")
        # DistributedDataParallel reads this attribute; its broadcast at the start knows no DTensor.
        self._ddp_params_and_buffers_to_ignore = [n for n, p in self.named_parameters() if isinstance(p, DTensor)]
        self._sharded = True
        return self

    @torch.no_grad()
    def clamp_(self) -> "HyperBlip2Model":
        """Move curvature, scales and temperature back to their bounds, in place: call it after each optimizer step."""
        for module in self.modules():
            if module is not self and isinstance(module, Curvature | HyperbolicProjector):
                module.clamp_()
        return self

    def no_decay_names(self) -> set[str]:
        """Parameters that weight decay must not touch: curvature, scales, temperature, biases and norms."""
        return {n for n, p in self.named_parameters() if p.ndim < 2}

    def vision_features(
        self, pixel_values: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch patches features"]:
        """Features of the vision encoder behind its LayerNorm; positions are interpolated for another picture size."""
        more = {"interpolate_pos_encoding": True} if self._resized(pixel_values) else {}
        return self.blip2.vision_model(pixel_values=pixel_values, **more).last_hidden_state

    def _resized(self, pixel_values: Tensor) -> bool:
        size = self.config.blip2.vision_config.image_size
        return not self._external_vision and tuple(pixel_values.shape[-2:]) != (size, size)

    def _lift(
        self, projector: HyperbolicProjector, projection: nn.Linear, states: Tensor, name: str
    ) -> HyperbolicFeatures:
        """States through their projection to hyperbolic space."""
        z = projection(states.to(projection.weight.dtype))
        if not self.training and not bool(z.isfinite().all()):
            raise ValueError(f"{name} must give finite features, got NaN or infinity")
        return projector(z)

    @classmethod
    def from_config(cls, config: HyperBlip2Config, **modules: nn.Module) -> "HyperBlip2Model":
        """A model with fresh weights: queries from N(0, 0.02), query feed-forward nets equal to those of the text."""
        return cls(config, **modules)


def _cast_to_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(module.weight.dtype), *args[1:])


def built(kind: type[PreTrainedModel], settings: Blip2Config, vision: nn.Module | None, **parts: nn.Module) -> Any:
    """A Hugging Face BLIP-2 around parts that exist already: they are borrowed, and no others are built in their place."""
    shell = copy.deepcopy(settings)
    if vision is not None:
        shell.vision_config.num_hidden_layers = 0
        parts["vision_model"] = vision
    if "language_model" in parts:
        for layers in ("num_hidden_layers", "num_decoder_layers"):
            if hasattr(shell.text_config, layers):
                setattr(shell.text_config, layers, 0)
        shell.text_config.vocab_size = max(settings.text_config.pad_token_id or 0, 0) + 1
    model = kind(shell if parts else settings)
    for name, part in parts.items():
        setattr(model, name, borrowed(part))
    model.config.vision_config, model.config.text_config = settings.vision_config, settings.text_config
    model.config.image_token_index = settings.image_token_index
    return model


@torch.no_grad()
def start_queries(blip2: nn.Module, std: float = 0.02) -> None:
    """Queries from N(0, std): Hugging Face leaves them 0 in a model built from its configuration."""
    blip2.query_tokens.normal_(std=std)


@torch.no_grad()
def copy_text_ffn(qformer: nn.Module) -> None:
    """Give the queries the feed-forward nets of the text."""
    for layer in qformer.encoder.layer:
        layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
        layer.output_query.load_state_dict(layer.output.state_dict())


__all__ = ["HyperBlip2Model", "copy_text_ffn", "start_queries"]
