"""What a BLIP-2 needs on one card: weights, gradients, AdamW, and activations at the worst moment of a step.

Reference: Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022 (s b h (34 + 5 a s / h) bytes a
layer in half precision); the rest is counted here, and compared with what small models took.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from hyper_blip import HyperBlip2Config, HyperBlip2ForConditionalGeneration, HyperBlip2ForPretraining

GIB = 2**30


@dataclass(frozen=True)
class MemoryRow:
    """What one part needs on one card, in bytes."""

    part: str
    parameters: int
    trained: bool
    weights: int
    gradients: int
    optimizer: int
    activations: int


def build_on_meta(stage: int, config: HyperBlip2Config | None = None) -> nn.Module:
    """The whole model of a stage without memory for its weights; ViT-g with OPT-2.7B if no configuration is given."""
    config = config or HyperBlip2Config.vit_g_opt()
    with torch.device("meta"):
        if stage == 1:
            return HyperBlip2ForPretraining.from_config(config)
        config.blip2.qformer_config.use_qformer_text_input = False
        return HyperBlip2ForConditionalGeneration.from_config(config)


def count_parts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(parameters, of which trained) of the vision encoder, the Q-Former with its heads, and the language model."""
    found = {"vision": [0, 0], "qformer": [0, 0], "language": [0, 0]}
    for name, p in model.named_parameters():
        part = "vision" if ".vision_model." in name else "language" if ".language_model." in name else "qformer"
        found[part][0] += p.numel()
        found[part][1] += p.numel() if p.requires_grad else 0
    return {part: (a, b) for part, (a, b) in found.items()}


def count_frozen_layers(model: nn.Module) -> dict[str, list[int]]:
    """Frozen parameters of every layer that `shard_frozen` spreads, for each part."""
    found: dict[str, dict[str, int]] = {"vision": {}, "qformer": {}, "language": {}}
    for name, p in model.named_parameters():
        layer = re.match(r".*?\.(vision_model|language_model)\..*?\.\d+\.", name)
        if layer and not p.requires_grad:
            part = found["vision" if layer[1] == "vision_model" else "language"]
            part[layer[0]] = part.get(layer[0], 0) + p.numel()
    return {part: list(layers.values()) for part, layers in found.items()}


def _moments(
    model: nn.Module, stage: int, pairs: int, tokens: int, checkpointing: bool, width: int
) -> list[dict[str, float]]:
    """Bytes by part at the moments of a step at which a card may hold most."""
    settings = model.config.blip2
    vision, qformer, queries = settings.vision_config, settings.qformer_config, settings.num_query_tokens
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    h, heads, layers = qformer.hidden_size, qformer.num_attention_heads, qformer.num_hidden_layers
    # Behind the encoder's LayerNorm, which trains: single precision, and a gradient.
    features = 4 * pairs * patches * vision.hidden_size
    # Of the frozen encoder nothing is kept; one layer at work needs room.
    encoder = {"vision": width * pairs * patches * (4 * vision.hidden_size + 2 * vision.intermediate_size)}
    # Logits, their copy in single precision, log-softmax, gradient.
    number = 14 if width == 2 else 12

    def passed(positions: int, num: int) -> tuple[float, float]:
        """What a pass of the Q-Former keeps, and what one layer needs when it is computed again."""
        layer = width * num * positions * (17 * h + 2.5 * heads * positions)
        # Keys and values of every patch, and autocast's copies of the features for both.
        keys = 2 * patches * h + (2 * patches * vision.hidden_size if width == 2 else 0)
        cross = width * num * (keys + 8 * queries * h + 2.5 * heads * queries * patches)
        if checkpointing:
            return 4 * layers * positions * num * h, layer + cross
        return layers * layer + -(-layers // qformer.cross_attention_frequency) * cross, 0

    if stage == 1:
        fused, fused_again = passed(queries + 2 * tokens, pairs)
        matching, matching_again = passed(queries + tokens, 3 * pairs)
        words = pairs * tokens * qformer.vocab_size * number
        # Gradients of the matching pass wait in buffers for those of the fused pass; the word embeddings' are two whole tables.
        tables = 8 * qformer.vocab_size * h
        waiting = tables + 4 * sum(p.numel() for n, p in model.named_parameters() if ".qformer." in n)
        return [
            encoder,
            # Features before and behind the LayerNorm, and three times as many for the matching pass.
            {"qformer": fused + matching + 5 * features + words},
            # And their gradients, three times as large, of one layer and of all layers so far.
            {"qformer": fused + matching + matching_again + 14 * features + tables},
            {"qformer": fused + fused_again + 8 * features + waiting},
        ]
    text = settings.text_config
    kept, again = passed(queries, pairs)
    positions = queries + tokens
    # Frozen and in evaluation mode: without inputs of its matrix products or dropout masks, and never computed again.
    language = text.num_hidden_layers * width * pairs * positions * 10 * text.hidden_size
    language += pairs * positions * text.vocab_size * number
    return [encoder, {"qformer": kept + 2 * features, "language": language}, {"qformer": kept + again + 4 * features}]


def memory_plan(
    stage: int,
    config: HyperBlip2Config | None = None,
    *,
    pairs: int,
    tokens: int = 32,
    checkpointing: bool = True,
    shards: int = 1,
    width: int = 2,
) -> list[MemoryRow]:
    """Bytes on one card for weights, gradients, AdamW and activations, part by part.

    Frozen parts are held in bf16 and have no gradients; trained ones in fp32 with two fp32 moments. Activations are those of the
    moment that needs most: after the forward pass (logits), in the matching pass's backward (tripled features and their gradients),
    before the fused pass's backward (gradients that wait), or in the vision encoder. A layer keeps s b h (34 + 5 a s / h) bytes in
    half precision, or its input alone with checkpointing; the frozen language model keeps 20 s b h a layer. Of frozen layers that
    are spread, a card holds its share, the layer at work and the one fetched meanwhile; embeddings stay whole. The contrastive matrix
    and what the allocator loses are not counted. For small models the plan is 83 to 113 % of what a step took on a CPU.

    Args:
        stage: 1 or 2.
        config: of the model; ViT-g with OPT-2.7B if None.
        pairs: pictures on one card.
        tokens: of a caption.
        checkpointing: recompute the layers of the Q-Former.
        shards: cards over which the frozen parts are spread; 1 for a whole copy on each.
        width: bytes of what matrix products give: 2 under autocast, 4 without.

    Returns:
        One `MemoryRow` for each part.
    """
    model = build_on_meta(stage, config)
    counts, layered = count_parts(model), count_frozen_layers(model)
    worst = max(_moments(model, stage, pairs, tokens, checkpointing, width), key=lambda moment: sum(moment.values()))
    rows = []
    for part, (total, trained) in counts.items():
        if total:
            frozen = total - trained
            if shards > 1 and layered[part]:
                frozen += -(-sum(layered[part]) // shards) - sum(layered[part]) + 2 * max(layered[part])
            weights, activations = 2 * frozen + 4 * trained, int(worst.get(part, 0))
            rows.append(MemoryRow(part, total, trained > total // 2, weights, 4 * trained, 8 * trained, activations))
    return rows


def memory_table(rows: list[MemoryRow]) -> str:
    """The plan as text, in GiB."""
    lines = [
        f"{'part':<12}{'parameters':>14}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}   GiB a card"
    ]
    columns = ("weights", "gradients", "optimizer", "activations")
    for row in rows:
        lines.append(f"{row.part:<12}{row.parameters:>14,}" + _cells([getattr(row, c) for c in columns]))
    totals = [sum(getattr(row, c) for row in rows) for c in columns]
    lines.append(f"{'all':<12}{sum(r.parameters for r in rows):>14,}" + _cells(totals) + f"   {sum(totals) / GIB:.1f}")
    return "\n".join(lines)


def _cells(values: list[int]) -> str:
    return "".join(f"{v / GIB:>{width}.2f}" for v, width in zip(values, (10, 11, 11, 13), strict=True))
