"""Saving and loading in Hugging Face's form, with parts that a locator brings left out, and LAVIS checkpoints.

Reference: LAVIS names at 506965b, see `hyper_blip.weights`.
"""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from hyper_blip.config import HyperBlip2Config
from hyper_blip.weights import (
    LoadingInfo,
    incomplete,
    load_into,
    own_state,
    read_folder,
    read_lavis,
)

_OURS = ("image_projector.", "text_projector.", "curvature.", "temperature.")
HUB = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only", "proxies")
# What `AutoModel` hands on besides; it has done its work with them.
_OF_AUTO = ("adapter_kwargs", "code_revision", "trust_remote_code", "_from_auto", "_commit_hash")


class SavedModel(PreTrainedModel):
    """A `PreTrainedModel` that reads its weights itself: each in the precision it was written in, around modules by locator."""

    config_class = HyperBlip2Config
    _external_vision = False
    _sharded = False

    def _left_out(self) -> tuple[str, ...]:
        """Prefixes of parameters that a locator brings."""
        located = (("blip2.vision_model.module.", self.config.vision_locator),)
        located += (
            ("blip2.language_model.", self.config.language_locator),
            ("text_encoder.", self.config.text_locator),
        )
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
            device_map: one device, or {"": device}.
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
        return finished(model, info, output_loading_info)

    def cast(self, dtype: torch.dtype) -> "SavedModel":
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
        return finished(model, info, output_loading_info)


def placed(model: SavedModel, device_map: Any) -> SavedModel:
    """The model on the one device that a map names."""
    device = device_map[""] if isinstance(device_map, dict) and set(device_map) == {""} else device_map
    if isinstance(device, dict) or device in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError(
            f"device_map must be one device, or {{'': device}}, got {device_map!r}: spread layers by shard_frozen"
        )
    return model.to(device)


def finished(model: SavedModel, info: LoadingInfo, output_loading_info: bool) -> Any:
    """The loaded model in evaluation mode, with one warning about what its source did not hold."""
    # The hyperbolic parameters are ours: no foreign checkpoint has them.
    absent = [name for name in info.missing if not name.startswith(_OURS)]
    if "vision_projection.weight" in absent:  # of stage 2: random directions have a radius, but it means nothing
        model.config.has_radius = False
    if absent:
        shown = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        warnings.warn(f"initialised afresh, because the source does not hold them: {shown}", stacklevel=3)
    return (model.eval(), info) if output_loading_info else model.eval()
