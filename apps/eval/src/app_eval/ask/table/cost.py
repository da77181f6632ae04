"""Memory and hours of the cells of `hier eval icl`: computed, not measured.

Weights are counted on a model without memory. A token costs 2 operations for every weight of the text side and 2 x layers x width for
every token before it; a picture costs 2 for every weight of the vision side and every patch. Hours are operations over the rate that a
card is said to sustain; memory is weights and cache in two bytes a number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Idefics2Config, IdeficsConfig

from app_data.sets.six_tasks import TASKS
from app_data.store.errors import DataError
from app_eval.ask.settings import EvalIcl
from app_eval.ask.table.rows import NOT_HERE, Row, rows

# Words of a question with its answer, as tokens; of NLVR2 and caption editing, whose prompts hold a sentence, twice that.
_TEXT = {"caption-editing": 48, "visual-reasoning": 48, "image-text-matching": 36}
_TEXT_ELSE = 24
_NEW = {"coco-caption": 20, "caption-editing": 20}
# Of the part that is asked, as released; both items of a SugarCrepe entry.
_QUESTIONS = {
    "vqav2": 214_354, "okvqa": 5_046, "coco-caption": 40_504, "caption-editing": 5_366, "image-text-matching": 15_024,
    "visual-reasoning": 6_982,
}  # fmt: skip


def _idefics_9b() -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=32_000, additional_vocab_size=2, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
        num_attention_heads=32, cross_layer_interval=4, qk_layer_norms=True, use_resampler=True,
        vision_config={
            "embed_dim": 1280, "image_size": 224, "intermediate_size": 5120, "patch_size": 14, "num_hidden_layers": 32,
            "num_attention_heads": 16,
        },
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16,
            "resampler_head_dim": 96,
        },
    )  # fmt: skip


def _idefics2_8b() -> Idefics2Config:
    return Idefics2Config(
        vision_config={
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 980,
            "patch_size": 14,
        },
        perceiver_config={"resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16},
        text_config={
            "model_type": "mistral", "vocab_size": 32_003, "hidden_size": 4096, "intermediate_size": 14_336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    )  # fmt: skip


# Sizes of the models that the presets speak of, so that a plan needs no network.
_KNOWN: dict[str, Callable[[], Any]] = {
    "HuggingFaceM4/idefics-9b": _idefics_9b,
    "HuggingFaceM4/idefics2-8b-base": _idefics2_8b,
}


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        text, vision: Weights of the two sides.
        picture: Tokens of a picture in the text.
        patches: What the vision side sees of a picture.
        layers, width: Of the text side.
        cached: Numbers that a token leaves in the cache.
    """

    text: int
    vision: int
    picture: int
    patches: int
    layers: int
    width: int
    cached: int

    def operations(self, prompt: int, new: int, pictures: int) -> float:
        """Of one answer."""
        tokens = prompt + new
        attention = 2 * self.layers * self.width * tokens**2
        return 2.0 * self.text * tokens + attention + 2.0 * self.vision * self.patches * pictures

    def gibibytes(self, tokens: int, batch: int) -> float:
        """Weights and cache in two bytes a number."""
        return 2 * (self.text + self.vision + self.cached * tokens * batch) / 2**30


def cost_of(name: str) -> Cost:
    """What a model costs, by its configuration alone.

    Raises:
        DataError: The configuration is not here.
    """
    try:
        config = _KNOWN[name]() if name in _KNOWN else AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        known = ", ".join(_KNOWN)
        raise DataError(
            f"the configuration of {name} is not here: give a folder, a model that was fetched before, or one of {known}"
        ) from error
    counted = {False: 0, True: 0}
    for key, value in model.named_parameters():
        counted["vision" in key] += value.numel()
    text, vision = config.get_text_config(), getattr(config, "vision_config", config)
    side, patch = getattr(vision, "image_size", 224), getattr(vision, "patch_size", 14)
    patches = (side // patch) ** 2
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = text.num_hidden_layers
    return Cost(
        counted[False],
        counted[True],
        _tokens(config, patches),
        patches,
        layers,
        text.hidden_size,
        2 * layers * heads * width,
    )


def _tokens(config: Any, patches: int) -> int:
    """Tokens of a picture in the text: Idefics' first model reads it by cross-attention, others have latents or merge patches."""
    if config.model_type == "idefics":
        return 3
    latents = getattr(getattr(config, "perceiver_config", None), "resampler_n_latents", None)
    return latents or getattr(config, "image_seq_length", None) or patches // getattr(config, "scale_factor", 1) ** 2


def plan(config: EvalIcl) -> str:
    """The cells with memory and hours, as Markdown."""
    cost, chosen = cost_of(config.model), rows(config)
    lines = [
        f"{config.model}: {(cost.text + cost.vision) / 1e9:.2f} billion weights, {cost.picture} tokens a picture. Computed, not measured: "
        f"at {config.tflops:g} TFLOP/s sustained; a question with its answer is taken for {_TEXT_ELSE} to {max(_TEXT.values())} tokens.",
        "",
        "| task | row | demonstrations | seeds | questions | tokens a prompt | GiB | hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total, num = 0.0, 0
    for task in config.tasks:
        for k in config.k:
            for row in chosen:
                hours, line = _line(config, cost, task, row, k)
                total += hours
                num += config.seeds if row.seeded else 1
                lines.append(line)
    lines += [
        "",
        f"{len(config.tasks) * len(config.k) * len(chosen)} rows, {num} cells with their seeds, {total:.1f} hours.",
    ]
    if config.preset in NOT_HERE:
        lines += ["", NOT_HERE[config.preset]]
    return "\n".join(lines)


def _line(config: EvalIcl, cost: Cost, task: str, row: Row, k: int) -> tuple[float, str]:
    shown = k if row.select else 0
    pictures = (shown + 1) * (2 if task == "visual-reasoning" else 1)
    # Where no picture is shown, two answers are.
    turns = shown + 1 if row.select or row.adapted else 3
    prompt, new = turns * _TEXT.get(task, _TEXT_ELSE) + pictures * cost.picture, _NEW.get(task, 5)
    questions = min(config.queries or _QUESTIONS[task], _QUESTIONS[task])
    seeds = config.seeds if row.seeded else 1
    hours = seeds * questions * cost.operations(prompt, new, pictures) / (config.tflops * 1e12 * 3600)
    memory = cost.gibibytes(prompt + new, config.batch)
    cells = (
        TASKS[task].title,
        row.name,
        shown,
        seeds,
        f"{questions:,}",
        f"{prompt:,}",
        f"{memory:.1f}",
        f"{hours:.2g}",
    )
    return hours, f"| {' | '.join(map(str, cells))} |"
