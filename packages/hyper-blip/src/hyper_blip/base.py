"""What both stages share: BLIP-2's modules, the frozen parts, the hyperbolic parameters, saving and loading."""

import contextlib
import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Blip2Config, GenerationConfig, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2PreTrainedModel

from hyper_blip.config import HyperBlip2Config
from hyper_blip.projection import HyperbolicFeatures, HyperbolicProjector
from hyper_blip.vision import VisionAdapter, load_module
from hyper_blip.weights import (
    LoadingInfo,
    borrowed,
    incomplete,
    load_into,
    make_own,
    own_state,
    read_folder,
    read_lavis,
)
from hyper_geom import Curvature

_OURS = ("image_projector.", "text_projector.", "curvature.", "temperature.")
HUB = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only", "proxies")
# What `AutoModel` hands on besides; it has done its work with them.
_OF_AUTO = ("adapter_kwargs", "code_revision", "trust_remote_code", "_from_auto", "_commit_hash")


class HyperBlip2Model(PreTrainedModel):
    """Base of `HyperBlip2ForPretraining` and `HyperBlip2ForConditionalGeneration`.

    Attributes:
        config: `HyperBlip2Config`.
        blip2: the Hugging Face BLIP-2 model.
        curvature: shared by all projectors.
        image_projector: from projected queries to hyperbolic space.
    """

    config_class = HyperBlip2Config
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
                fully_shard(layer, mesh=mesh, **({"ignored_params": trained} if trained else {}))
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

    def _left_out(self) -> tuple[str, ...]:
        """Prefixes of parameters that a locator brings."""
        located = (("blip2.vision_model.module.", self.config.vision_locator),)
        located += (("blip2.language_model.", self.config.language_locator),)
        return tuple(prefix for prefix, locator in located if locator)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **more: Any
    ) -> None:
        """Write `model.safetensors`, `config.json` and, in stage 2, `generation_config.json`.

        Frozen parameters of a module that has a locator are not written. After `shard_frozen` call it on every rank: rank 0 writes.

        Args:
            save_directory: the folder.
            state_dict: weights to write in place of the model's own, under the same names.
            more: further arguments of `transformers.PreTrainedModel.save_pretrained`, such as `push_to_hub`.

        Raises:
            ValueError: the vision module was given without a locator in the configuration.
        """
        if self._external_vision and not self.config.vision_locator:
            raise ValueError("config.vision_locator must name where the vision module comes from, got ''")
        state = own_state(self, self._left_out())
        if state_dict is not None:
            state = {n: state_dict[n] for n in state if n in state_dict}
        if self._sharded:
            # One weight after the other leaves the device before the next is gathered.
            state = {n: v.full_tensor().cpu() if hasattr(v, "full_tensor") else v for n, v in state.items()}
            if dist.get_rank():
                return
        state = {n: v.detach().contiguous() for n, v in state.items()}
        super().save_pretrained(save_directory, state_dict=state, save_original_format=False, **more)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: HyperBlip2Config | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        vision: nn.Module | None = None,
        language_model: PreTrainedModel | None = None,
        **more: Any,
    ) -> Any:
        """Load what `save_pretrained` wrote, from a folder or from the hub.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository on the hub.
            config: in place of the saved one.
            dtype: precision of all parts but the hyperbolic ones; None or "auto" keeps the saved ones.
            device_map: a device, or a map or plan of accelerate.
            output_loading_info: also return a `LoadingInfo`.
            vision: in place of what `config.vision_locator` names.
            language_model: in stage 2, in place of what `config.language_locator` names.
            more: `revision`, `subfolder`, `token`, `cache_dir`, `force_download`, `local_files_only`, `proxies`;
                `attn_implementation`.

        Returns:
            The model in evaluation mode, and the `LoadingInfo` if asked.

        Raises:
            ValueError: missing or damaged files, another kind of model, an unknown locator or argument.
        """
        hub = {name: more.pop(name) for name in HUB if name in more}
        attention = more.pop("attn_implementation", None)
        unknown = sorted(name for name in more if name not in _OF_AUTO)
        if unknown:
            raise ValueError(f"from_pretrained knows no argument {unknown[0]!r}")
        name = pretrained_model_name_or_path
        if config is None:
            try:
                config = HyperBlip2Config.from_pretrained(name, **hub)
            except OSError as error:
                raise incomplete(name, error) from error
        kinds = config.architectures or [cls.__name__]
        if cls.__name__ not in kinds:
            raise ValueError(f"folder must hold a {cls.__name__}, got {kinds[0]} in {name}")
        given = {"vision": vision, "language_model": language_model}
        model = cls(config, **{k: v for k, v in given.items() if v is not None})
        info = load_into(model, read_folder(name, **hub), model._left_out(), take_dtype=True)
        model.name_or_path = str(name)
        if attention is not None:
            model.blip2.set_attn_implementation(attention)
        if model.can_generate():
            with contextlib.suppress(OSError):  # not every checkpoint has one
                model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        if dtype not in (None, "auto"):
            model.cast(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if device_map is not None:
            model = placed(model, device_map)
        return _finished(model, info, output_loading_info)

    def cast(self, dtype: torch.dtype) -> "HyperBlip2Model":
        """Hold everything but the hyperbolic parameters in another precision; the geometry stays in single precision."""
        kept = {name: p.data for name, p in self.named_parameters() if name.startswith(_OURS)}
        kept |= {name: b for name, b in self.named_buffers() if name.startswith(_OURS)}
        self.to(dtype)
        for name, value in kept.items():
            self.get_parameter_or_buffer(name).data = value
        return self

    @classmethod
    def from_lavis(
        cls,
        path: str | Path,
        config: HyperBlip2Config | None = None,
        *,
        output_loading_info: bool = False,
        **modules: nn.Module,
    ) -> Any:
        """Load a `.pth` of LAVIS, with `weights_only`.

        Args:
            path: the checkpoint, with or without its frozen parts.
            config: the configuration that fits it; `HyperBlip2Config.vit_g_opt()` if None.
            output_loading_info: also return a `LoadingInfo`.
            modules: as in `from_pretrained`.

        Returns:
            The model in evaluation mode, and the `LoadingInfo` if asked.

        Raises:
            ValueError: a file that needs unsafe loading or does not fit.
        """
        model = cls(config or HyperBlip2Config.vit_g_opt(), **modules)
        info = load_into(model, read_lavis(path), model._left_out())
        return _finished(model, info, output_loading_info)

    @classmethod
    def from_config(cls, config: HyperBlip2Config, **modules: nn.Module) -> "HyperBlip2Model":
        """A model with fresh weights: queries from N(0, 0.02), query feed-forward nets equal to those of the text."""
        return cls(config, **modules)


def placed(model: HyperBlip2Model, device_map: Any) -> HyperBlip2Model:
    """The model on a device, or dispatched by accelerate over several."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    plan = device_map in ("auto", "balanced", "balanced_low_0", "sequential") if isinstance(device_map, str) else False
    if not plan and not isinstance(device_map, dict):
        return model.to(device_map)
    from accelerate import dispatch_model, infer_auto_device_map

    if plan:
        device_map = infer_auto_device_map(model, no_split_module_classes=sorted(model._no_split_modules))
    return dispatch_model(model, device_map)


def _cast_to_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(module.weight.dtype), *args[1:])


def _finished(model: HyperBlip2Model, info: LoadingInfo, output_loading_info: bool) -> Any:
    # The hyperbolic parameters are ours: no foreign checkpoint has them.
    absent = [name for name in info.missing if not name.startswith(_OURS)]
    if "vision_projection.weight" in absent:  # of stage 2: random directions have a radius, but it means nothing
        model.config.has_radius = False
    if absent:
        shown = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        warnings.warn(f"initialised afresh, because the source does not hold them: {shown}", stacklevel=3)
    return (model.eval(), info) if output_loading_info else model.eval()


def built(kind: type[PreTrainedModel], settings: Blip2Config, vision: nn.Module | None, **parts: nn.Module) -> Any:
    """A Hugging Face BLIP-2 around parts that exist already: they are borrowed, and no others are built in their place."""
    shell = copy.deepcopy(settings)
    if vision is not None:
        shell.vision_config.num_hidden_layers = 0
        parts["vision_model"] = vision
    if "language_model" in parts:
        shell.text_config.num_hidden_layers = 0
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
