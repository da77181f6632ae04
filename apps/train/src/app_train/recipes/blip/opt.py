"""Recipe `blip2-opt-2.7b`: the real model, frozen ViT-g and OPT-2.7B, on COCO with the Karpathy splits, on several cards.

    hier train blip2-opt-2.7b --plan-only                      print the memory table, load nothing
    accelerate launch --num_processes 8 apps/train blip2-opt-2.7b --annotations dataset_coco.json --pictures coco/ --stage 1
    accelerate launch --num_processes 8 apps/train blip2-opt-2.7b --annotations dataset_coco.json --pictures coco/ --stage 2
    accelerate launch --num_processes 8 apps/train blip2-opt-2.7b --data coco/ cc3m/ laion/ --weights 1 3 6 --stage 1

--data names webdataset shards: nothing is unpacked, and a run goes on at any step without reading what came before. --shard spreads
the layers of the frozen parts over the cards (FSDP2); what trains stays whole on each of them.

Settings of Li et al., "BLIP-2", ICML 2023, where they are published; the hyperbolic part is a reconstruction of Mandica et
al., arXiv:2408.05097. NOT RUN by us: no machine here can hold the weights or reach the hub that has them. What is tested is
the memory table against a build of the whole model on the meta device, and every step of the loop on small models.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Blip2Config, Blip2Processor, BlipImageProcessor

from app_data.read.labelled import Decoding
from app_data.sets.coco import load_karpathy
from app_data.sets.shards import Shards, Stream
from app_train.core.errors import RunError
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.core.schedule import Step
from app_train.recipes.blip.pairs import Decoded, Streamed
from app_train.recipes.blip.settings import Blip2OptConfig
from app_train.recipes.blip.stage import blip_stage, pretraining_parts
from hyper_blip import (
    HyperBlip2Config,
    HyperBlip2ForConditionalGeneration,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    caption_batch,
)
from hyper_blip.losses import IGNORED

GIB = 2**30
# CLIP's mean and standard deviation, which BLIP-2's processor applies to pixels in [0, 1].
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_TOKEN_ID = 50265


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


def build_on_meta(stage: int) -> nn.Module:
    """The whole model of a stage without memory for its weights."""
    config = HyperBlip2Config.vit_g_opt()
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


def memory_plan(
    stage: int, *, pairs: int, tokens: int = 32, checkpointing: bool = True, shards: int = 1
) -> list[MemoryRow]:
    """Bytes on one card for weights, gradients, AdamW and activations, part by part.

    Frozen parts are held in bf16 and have no gradients; trained ones in fp32 with two fp32 moments. Activations of a layer
    with width h, a heads and s tokens: s b h (34 + 5 a s / h) bytes in half precision (Korthikanti et al., 2022), or 2 s b h
    with checkpointing and one layer whole. A frozen part has them only where gradients pass through it: the language model in
    stage 2, not the vision encoder. Of frozen layers that are spread, a card holds its share, the layer at work and the one
    fetched meanwhile; embeddings stay whole. The contrastive matrix and temporary buffers are not counted.

    Args:
        stage: 1 or 2.
        pairs: pictures on one card.
        tokens: of a caption.
        checkpointing: recompute layers.
        shards: cards over which the frozen parts are spread; 1 for a whole copy on each.

    Returns:
        One `MemoryRow` for each part.
    """
    model = build_on_meta(stage)
    counts, layered = count_parts(model), count_frozen_layers(model)

    def layers(num: int, s: int, b: int, h: int, a: int) -> int:
        whole = int(s * b * h * (34 + 5 * a * s / h))
        return 2 * num * s * b * h + whole if checkpointing else num * whole

    activations = {"vision": 0, "language": 0}
    queries, q = 32, (768, 12)
    if stage == 1:
        # The fused pass, and the matching pass on three times as many pairs.
        activations["qformer"] = layers(12, queries + 2 * tokens, pairs, *q) + layers(
            12, queries + tokens, 3 * pairs, *q
        )
    else:
        activations["qformer"] = layers(12, queries, pairs, *q)
        activations["language"] = layers(32, queries + tokens, pairs, 2560, 32) + 6 * pairs * (queries + tokens) * 50304
    rows = []
    for part, (total, trained) in counts.items():
        if total:
            frozen = total - trained
            if shards > 1 and layered[part]:
                frozen += -(-sum(layered[part]) // shards) - sum(layered[part]) + 2 * max(layered[part])
            weights = 2 * frozen + 4 * trained
            rows.append(
                MemoryRow(part, total, trained > total // 2, weights, 4 * trained, 8 * trained, activations[part])
            )
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


def run(config: Blip2OptConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    pairs = max(1, config.fit.batch_size // config.cards)
    plan = memory_plan(
        config.stage,
        pairs=pairs,
        tokens=config.max_tokens,
        checkpointing=config.checkpointing,
        shards=config.cards if config.shard else 1,
    )
    spread = ", frozen layers spread over them" if config.shard else ""
    print(f"stage {config.stage}, {pairs} pairs a card, {config.cards} cards{spread}\n{memory_table(plan)}")  # noqa: T201
    if config.plan_only:
        return {"plan": [row.__dict__ for row in plan]}
    if config.data and (config.annotations is not None or config.pictures is not None):
        raise RunError("--data streams shards in place of --annotations and --pictures: leave these out")
    if not config.data and (config.annotations is None or config.pictures is None):
        raise RunError(
            "--annotations and --pictures are missing: name dataset_coco.json and the folder of COCO's pictures, or shards with --data"
        )
    if config.weights and not config.data:
        raise RunError("--weights share --data, and there are none")
    # A run folder for each stage: their settings differ, and the second reads the model of the first.
    run_config = config.model_copy(update={"out": config.out / f"run-{config.stage}"})
    precision = "bf16" if torch.cuda.is_available() else "no"
    free = ("cards", "readers")
    with Run("blip2-opt-2.7b", run_config, free, mixed_precision=precision, unused_parameters=True) as run:
        if config.shard and run.accelerator.num_processes < 2:
            raise RunError("--shard needs several processes: start with accelerate launch or torchrun")
        size = Blip2Config.from_pretrained(config.source).vision_config.image_size
        data = _pairs(config, size, run.accelerator.process_index, run.accelerator.num_processes)
        run.claim(data.fingerprint)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # new weights are the same for the same command
            model, processor, forward = (_first if config.stage == 1 else _second)(config, data, run.device)
        if config.checkpointing:
            model.gradient_checkpointing_enable()
        if config.shard:
            model.shard_frozen()
        label = f"stage {config.stage}"
        stage = blip_stage(
            model, label, config.fit, len(data), forward, 0, config.save_every,
            order=data.order if isinstance(data, Streamed) else None, micro_batches=config.micro_batches,
        )  # fmt: skip
        try:
            fit(
                model, [stage], run.out / "train", seed=0, label=label, stop=run.stop, accelerator=run.accelerator,
                tensorboard=config.tensorboard,
            )  # fmt: skip
        finally:
            if isinstance(data, Streamed):
                data.close()
        # Of sharded layers every process holds a part: all of them save.
        folder = config.out / f"stage{config.stage}"
        if config.shard or run.main:
            model.save_pretrained(folder)
        if not run.main:
            return {}
        processor.save_pretrained(folder)
        result = run.finish({"stage": config.stage, "n": len(data)})
        run.seal()
    return result


def _pairs(config: Blip2OptConfig, size: int, rank: int, world: int) -> Decoded | Streamed:
    """What is trained on, at the size of the vision encoder."""
    if config.data:
        sets = [Shards(source, config.cache_dir) for source in config.data]
        stream = Stream(sets, config.weights, window=config.window)
        return Streamed(stream, size, augment=config.augment, readers=config.readers, rank=rank, world=world)
    parts = load_karpathy(config.annotations, config.pictures, Decoding(size=size, cache_dir=config.cache_dir))
    return Decoded(parts["train"], rank, world)


def _scaled(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    x = pixels.to(device).float() / 255
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std


def _processor(tokenizer: Any, size: int, queries: int | None = None) -> Blip2Processor:
    scaling = {"size": {"height": size, "width": size}, "image_mean": list(MEAN), "image_std": list(STD)}
    return Blip2Processor(BlipImageProcessor(**scaling), copy.deepcopy(tokenizer), num_query_tokens=queries)


def _first(config: Blip2OptConfig, data: Decoded | Streamed, device: torch.device):
    # Each process reads the vision encoder alone, in half precision and to its own device.
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    ids = {
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "dec_token_id": len(tokenizer),
    }
    model = HyperBlip2ForPretraining.from_bert(
        config.source, config.tokenizer, HyperbolicConfig(similarity=config.similarity), ids=ids, device_map=device
    )
    model.config.max_tokens = config.max_tokens
    model.use_tokenizer(tokenizer)
    processor = _processor(tokenizer, model.config.blip2.vision_config.image_size)

    def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
        pairs = data.piece(step, rows)
        made = tokenizer(
            pairs.captions, padding="max_length", truncation=True, max_length=config.max_tokens, return_tensors="pt"
        )
        ids, mask = (made[k].to(device) for k in ("input_ids", "attention_mask"))
        pixels, same = _scaled(pairs.pixels, device), pairs.same.to(device)
        out = wrapped(pixels, ids, mask, image_ids=same, step=step.number, progress=step.share)
        return out.loss, {**pretraining_parts(out), **out.diagnostics}

    return model, processor, forward


def _second(config: Blip2OptConfig, data: Decoded | Streamed, device: torch.device):
    first = HyperBlip2ForPretraining.from_pretrained(config.out / "stage1", device_map=device)
    settings = Blip2Config.from_pretrained(config.source)
    language = AutoModelForCausalLM.from_pretrained(
        config.source, config=settings.text_config, key_mapping={r"^language_model\.": ""}, dtype=torch.bfloat16,
        device_map=device,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(config.source)
    token = settings.image_token_index or IMAGE_TOKEN_ID
    model = HyperBlip2ForConditionalGeneration.from_pretraining(first, language, image_token_id=token)
    model.config.max_tokens = config.max_tokens
    processor = _processor(tokenizer, settings.vision_config.image_size, model.num_queries)

    def texts(captions: Sequence[str]) -> dict[str, torch.Tensor]:
        return caption_batch(
            captions, tokenizer, num_queries=model.num_queries, image_token_id=token, prompt=model.config.prompt,
            max_tokens=config.max_tokens,
        )  # fmt: skip

    def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
        pairs, share = data.piece(step, rows), data.share(step)
        batch = texts(pairs.captions)
        loss = wrapped(_scaled(pairs.pixels, device), **{k: v.to(device) for k, v in batch.items()}).loss
        if len(rows) < len(share.captions):
            # The loss is a mean over words, and pieces of equally many captions have unequally many of them.
            words, all_words = (
                int((labels != IGNORED).sum()) for labels in (batch["labels"], texts(share.captions)["labels"])
            )
            loss = loss * (words / all_words * len(share.captions) / len(rows))
        return loss, {}

    return model, processor, forward
