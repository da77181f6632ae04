"""LoRA on one or both towers of a dual encoder, and its exact cost in parameters.

LoRA: Hu et al., 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; an adapted layer adds r (d_in + d_out) weights.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from hier_lora.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

TOWERS = ("vision", "text", "both")
ALL_LINEAR = "all-linear"


def lora_config(
    model: nn.Module,
    *,
    towers: str = "both",
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    targets: str | None = None,
) -> "LoraConfig":
    """A `peft.LoraConfig` for the chosen towers of a dual encoder.

    Args:
        model: the dual encoder; its `lora_targets` name the layers of each tower, its `modules_to_save` the heads.
        towers: "vision", "text" or "both".
        r: rank, at least 1.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: dropout on the input of the update, in [0, 1).
        targets: a regular expression over module names that replaces the model's own choice, such as
            `r".*\\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"` for all six linear layers of CLIP's blocks; or "all-linear".
            Names are those of the plain model: `vision_model.encoder...` for CLIP in transformers.

    Returns:
        A config for `HierLoraCLIP(model, tax, lora=...)`.

    Raises:
        ValueError: for an unknown tower, a rank below 1, or a dropout outside [0, 1).
    """
    if towers not in TOWERS:
        raise ValueError(f"towers must be one of {TOWERS}, got {towers!r}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
    encoder = cast(DualEncoder, model)
    chosen = ["vision", "text"] if towers == "both" else [towers]
    pattern = targets or "|".join(f"({encoder.lora_targets[name]})" for name in chosen)
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=pattern,
        modules_to_save=list(encoder.modules_to_save) or None,
    )


@dataclass(frozen=True)
class LoraOverhead:
    """What adapters cost: `adapter` and `base` count parameters, `percent` is 100 adapter / base."""

    adapter: int
    base: int

    @property
    def percent(self) -> float:
        """Adapter parameters in percent of the base parameters."""
        return 100.0 * self.adapter / self.base


def lora_overhead(model: nn.Module) -> dict[str, LoraOverhead]:
    """Count LoRA and base parameters, tower by tower.

    Heads that train in full (`modules_to_save`) are counted once, with the base. Works on the meta device.

    Args:
        model: a dual encoder, or a `HierLoraCLIP` around one; its `tower_modules` name the submodules of each tower.

    Returns:
        Counts under "vision", "text" and "total".

    Raises:
        ValueError: if the model does not say which modules belong to which tower.
    """
    encoder = getattr(model, "dual_encoder", model)
    towers = getattr(encoder, "tower_modules", None)
    if towers is None:
        raise ValueError(f"model must have `tower_modules`, got {type(encoder).__name__}")
    plain = plain_model(encoder)
    counts = {name: _count(plain, tuple(modules)) for name, modules in towers.items()}
    return {**counts, "total": _count(plain, ("",))}


def _count(plain: nn.Module, prefixes: tuple[str, ...]) -> LoraOverhead:
    adapter = base = 0
    for name, parameter in plain.named_parameters():
        if name.startswith(prefixes) and ".modules_to_save." not in name:
            adapter, base = (
                (adapter + parameter.numel(), base) if ".lora_" in name else (adapter, base + parameter.numel())
            )
    return LoraOverhead(adapter, base)


def plain_model(encoder: nn.Module) -> nn.Module:
    """The module whose names an adapter uses: the library's own model inside a wrapper, else the dual encoder itself."""
    return getattr(encoder, "plain_model", encoder)


def add_lora(encoder: nn.Module, lora: "LoraConfig") -> "PeftModel":
    """Put adapters into the plain model of a dual encoder, in place. peft costs more to import than all the rest."""
    from peft import get_peft_model

    with quiet():
        return get_peft_model(plain_model(encoder), lora)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what nobody here can change: peft 0.21 asks transformers 5.23 for a property that has a new name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def check_targets(model: nn.Module, lora: "LoraConfig", *, text_is_frozen: bool) -> None:
    """Refuse LoRA layers that would never be used, before peft changes the model.

    Args:
        model: the dual encoder.
        lora: the configuration.
        text_is_frozen: text features are computed once, so layers on the text tower would have no effect.

    Raises:
        ValueError: naming the first such layer.
    """
    plain, prefixes = plain_model(model), tuple(getattr(model, "tower_modules", {}).get("text", ()))
    ignored = {f"{name}.out_proj" for name, m in plain.named_modules() if isinstance(m, nn.MultiheadAttention)}
    chosen = set(target_names(plain, lora.target_modules))
    for name in sorted(chosen & ignored):
        if name.rpartition(".")[0] not in chosen:
            raise ValueError(
                f"targets must not name {name}: torch.nn.MultiheadAttention reads its weight without calling it, so LoRA "
                "there has no effect; leave it out, or name the whole attention module"
            )
    frozen = sorted(name for name in chosen if text_is_frozen and prefixes and name.startswith(prefixes))
    if frozen:
        raise ValueError(
            f"text must be 'live', 'chunked' or 'sampled' when LoRA adapts the text tower ({frozen[0]}), got 'cached'"
        )


def target_names(model: nn.Module, targets: str | set[str] | list[str] | None) -> list[str]:
    """The modules of a model that peft's `target_modules` means: a regular expression, names or their ends, "all-linear"."""
    modules = dict(model.named_modules())
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        return [name for name in modules if re.fullmatch(targets, name)]
    return [name for name in modules if any(f".{name}".endswith(f".{target}") for target in targets or ())]
