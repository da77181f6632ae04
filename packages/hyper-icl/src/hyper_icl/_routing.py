"""Which modules of a model are its text attention, and how their calls come to the registered functions; no reference.

Both rooms need it: the demonstrations' calibration, and the published method's adapter.
"""

from torch import nn

from hyper_icl._attention import NAMES, register_attention
from hyper_icl._checks import check_choice
from hyper_icl._hooks import prepare


def decoder_of(model: nn.Module) -> nn.Module:
    """The language model inside a transformers model, or a peft model around one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (base.get_decoder() if hasattr(base, "get_decoder") else None) or base


def text_attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention modules of the language model by layer; no vision tower, no resampler, no cross-attention.

    Args:
        model: a transformers model, or a peft model around one.

    Raises:
        ValueError: there is none.
    """
    decoder = decoder_of(model)
    found = {
        module.layer_idx: module
        for name, module in decoder.named_modules()
        if name.endswith("self_attn")
        and isinstance(getattr(module, "layer_idx", None), int)
        and not getattr(module, "is_cross_attention", False)
        and "vision" not in name
    }
    if not found:
        raise ValueError(
            f"model must have text layers with a 'self_attn' that knows its layer, got {type(decoder).__name__}"
        )
    return dict(sorted(found.items()))


def check_routed(modules: dict[int, nn.Module]) -> None:
    """Raise ValueError unless the modules' attention is one of ours."""
    for module in modules.values():
        used = module.config._attn_implementation
        if used not in NAMES.values():
            raise ValueError(
                f"model must use one of {tuple(NAMES.values())}, got {used!r}: call use_calibrated_attention first"
            )


def use_calibrated_attention(model: nn.Module, backend: str = "sdpa") -> None:
    """Route the language model's attention through the registered functions; vision towers keep theirs.

    Without a plan the model computes what it computed before, bit for bit; models with a soft cap or attention sinks, which
    transformers computes explicitly, to rounding.

    Args:
        model: a transformers model, or a peft model around one.
        backend: "sdpa"; "eager", which also returns attention weights; "flex" (FlexAttention, compiled on a GPU); "augmented",
            which writes the bias into queries and keys, so that flash kernels stay available.

    Raises:
        ValueError: the backend is unknown, or the model has no text layers that can be routed.
    """
    name = NAMES[check_choice("backend", backend, NAMES)]
    register_attention()
    prepare(decoder_of(model), list(text_attention_modules(model).values()))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    subs = {key: getattr(config, key, None) for key in config.sub_configs}
    text = config.get_text_config(decoder=True)
    key = next((key for key, sub in subs.items() if sub is text), None)
    if key is not None:
        base.set_attn_implementation({key: name})
        return
    # The text settings are the model's own (Idefics-1, text-only models): name every other tower explicitly.
    others = {key: sub._attn_implementation or "sdpa" for key, sub in subs.items() if sub is not None}
    base.set_attn_implementation({"": name, **others})
