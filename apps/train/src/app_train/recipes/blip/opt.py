"""Recipe `blip2-opt-2.7b`: the real model, frozen ViT-g and OPT-2.7B, on COCO with the Karpathy splits, on several cards.

    hier train blip2-opt-2.7b --plan-only                      print the memory table, load nothing
    accelerate launch --num_processes 8 apps/train blip2-opt-2.7b --annotations dataset_coco.json --pictures coco/ --stage 1
    accelerate launch --num_processes 8 apps/train blip2-opt-2.7b --annotations dataset_coco.json --pictures coco/ --stage 2
    accelerate launch --num_processes 8 apps/train blip2-opt-2.7b --data coco/ cc3m/ laion/ --weights 1 3 6 --stage 1

--data names webdataset shards: nothing is unpacked, and a run goes on at any step without reading what came before. --shard spreads
the layers of the frozen parts over the cards (FSDP2); what trains stays whole on each of them.

Settings of Li et al., "BLIP-2", ICML 2023, where they are published; the hyperbolic part is a reconstruction of Mandica et
al., arXiv:2408.05097. NOT RUN by us: no machine here can hold the weights or reach the hub that has them. What is tested is
the memory table, against a build of the whole model on the meta device and against what small models took, and every step
of the loop on small models.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Blip2Config, Blip2Processor, BlipImageProcessor

from app_data.read.labelled import Decoding
from app_data.sets.captions import caption_sets
from app_data.sets.coco import find_captions
from app_data.sets.shards import Shards
from app_data.sets.stream import Stream
from app_train.core.errors import RunError
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.core.schedule import Step
from app_train.recipes.blip.memory import memory_plan, memory_table
from app_train.recipes.blip.pairs import Decoded, Streamed
from app_train.recipes.blip.settings import Blip2OptConfig
from app_train.recipes.blip.stage import blip_stage, pretraining_parts
from hyper_blip import (
    HyperBlip2ForConditionalGeneration,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    caption_batch,
)
from hyper_blip.gather import mean_of_all
from hyper_blip.losses import IGNORED

# CLIP's mean and standard deviation, which BLIP-2's processor applies to pixels in [0, 1].
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_TOKEN_ID = 50265


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
    files = find_captions(config.annotations, config.pictures, split="train", cache_dir=config.cache_dir)
    (train,) = caption_sets(files, Decoding(size=size, cache_dir=config.cache_dir)).values()
    return Decoded(train, rank, world)


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
        # The loss is a mean over words, and pieces and processes of equally many captions have unequally many of them.
        whole = batch if len(rows) == len(share.captions) else texts(share.captions)
        words, all_words = (int((labels != IGNORED).sum()) for labels in (batch["labels"], whole["labels"]))
        piece = loss * (words / all_words * len(share.captions) / len(rows))
        return mean_of_all(piece, all_words), {}

    return model, processor, forward
