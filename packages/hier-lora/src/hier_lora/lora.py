"""LoRA on one or both towers of a dual encoder, and its exact cost in parameters.

LoRA: Hu et al., 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; an adapted layer adds r (d_in + d_out) weights.
"""

from dataclasses import dataclass

from peft import LoraConfig
from torch import nn

TOWERS = ("vision", "text", "both")


def lora_config(
    model: nn.Module,
    *,
    towers: str = "both",
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    targets: str | None = None,
) -> LoraConfig:
    """A `peft.LoraConfig` for the chosen towers of a dual encoder.

    Args:
        model: the dual encoder; its `lora_targets` name the layers of each tower, its `modules_to_save` the heads.
        towers: "vision", "text" or "both".
        r: rank, at least 1.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: dropout on the input of the update, in [0, 1).
        targets: a regular expression over module names that replaces the model's own choice.

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
    chosen = ["vision", "text"] if towers == "both" else [towers]
    pattern = targets or "|".join(f"({model.lora_targets[name]})" for name in chosen)
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=pattern,
        modules_to_save=list(model.modules_to_save) or None,
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
    counts = {name: _count(encoder, tuple(modules)) for name, modules in towers.items()}
    return {**counts, "total": _count(encoder, ("",))}


def _count(encoder: nn.Module, prefixes: tuple[str, ...]) -> LoraOverhead:
    adapter = base = 0
    for name, parameter in encoder.named_parameters():
        if name.startswith(prefixes) and ".modules_to_save." not in name:
            adapter, base = (
                (adapter + parameter.numel(), base) if ".lora_" in name else (adapter, base + parameter.numel())
            )
    return LoraOverhead(adapter, base)
