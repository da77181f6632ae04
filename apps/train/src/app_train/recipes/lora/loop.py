"""The training loop: two stages, one optimizer each, resumable after any step with bit-identical numbers on CPU."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from app_data.read.pictures import PictureSet
from app_eval.measure.embed import prepare
from app_train.core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from app_train.core.config import FitConfig, LossConfig, StageConfig
from app_train.core.errors import Interrupted, NonFiniteGradient
from app_train.core.interrupt import StopFlag
from app_train.core.records import Records
from app_train.recipes.lora.objective import MultiLabelLoss, Objective
from hier_lora import HierLoraCLIP

HEAD, LORA = "head", "lora"
QUICK = 50


@dataclass(frozen=True)
class Step:
    """One optimizer step: a pure function of the configuration and its number."""

    number: int
    stage: str
    epoch: int
    rows: np.ndarray
    lr: float
    first_of_stage: bool
    last_of_stage: bool


def schedule(config: FitConfig, num_pictures: int, seed: int) -> Iterator[Step]:
    """All steps of a run in order; `number` counts from 1."""
    number = 0
    for index, (name, stage) in enumerate(((HEAD, config.head), (LORA, config.lora))):
        per_epoch = math.ceil(num_pictures / stage.batch_size)
        total = per_epoch * stage.epochs
        for epoch in range(stage.epochs):
            order = np.random.default_rng([seed, index, epoch]).permutation(num_pictures)
            for batch in range(per_epoch):
                done = epoch * per_epoch + batch
                number += 1
                rows = order[batch * stage.batch_size : (batch + 1) * stage.batch_size]
                yield Step(number, name, epoch, rows, _lr(stage, done, total), done == 0, done == total - 1)


def num_steps(config: FitConfig, num_pictures: int) -> int:
    """How many steps `schedule` yields."""
    return sum(s.epochs * math.ceil(num_pictures / s.batch_size) for s in (config.head, config.lora))


def _lr(stage: StageConfig, done: int, total: int) -> float:
    warm = max(1, round(stage.warmup * total))
    if done < warm:
        return stage.lr * (done + 1) / warm
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, total - warm)))


def trainable(everything: dict[str, torch.nn.Parameter], stage: str) -> dict[str, torch.nn.Parameter]:
    """The parameters that a stage trains, by name: LoRA layers join in the second stage."""
    return {name: p for name, p in everything.items() if stage == LORA or ".lora_" not in name}


def fit(
    model: HierLoraCLIP,
    data: PictureSet,
    features: Tensor | None,
    loss: LossConfig | MultiLabelLoss,
    config: FitConfig,
    folder: Path,
    *,
    seed: int,
    stop: StopFlag,
    accelerator: Accelerator,
    label: str,
    tensorboard: bool = False,
    offsets: Tensor | None = None,
) -> None:
    """Train a model in place; go on from the newest checkpoint below `folder` if there is one.

    Args:
        model: zero-shot model with LoRA layers attached; on the accelerator's device afterwards.
        data: training pictures with node ids as targets.
        features: output of the frozen tower for each picture, (n, d); None if there is no first stage.
        loss: weights of the loss parts.
        config: stages, rank and precision.
        folder: run folder; receives checkpoints and `metrics.jsonl`.
        seed: fixes the order of the data.
        stop: read after every step.
        accelerator: device, precision and processes.
        label: shown at the progress bar.
        tensorboard: also write TensorBoard events.
        offsets: taken off the tower's output for each picture, (n, d), in the second stage; `features` come without them.

    Raises:
        Interrupted: after a signal; the state is saved.
        NonFiniteGradient: before the optimizer step that would have spoilt the weights.
    """
    found = load_checkpoint(folder)
    position = 0 if found is None else found.position
    objective = Objective(model, loss).to(accelerator.device)
    # Taken once: later on, the stages switch gradients off and on.
    everything = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if found is not None:
        with torch.no_grad():
            for name, value in found.weights.items():
                everything[name].copy_(value)
    records = Records(folder, position, tensorboard=tensorboard) if accelerator.is_main_process else None
    total = num_steps(config, len(data))
    bar = tqdm(
        total=total, initial=position, desc=label, disable=None if accelerator.is_main_process else True, leave=False
    )
    wrapped, optimizer, state = None, None, None if found is None else found.optimizer
    model.train()

    def save(number: int) -> None:
        if accelerator.is_main_process:
            records.flush()
            weights = {n: p for n, p in everything.items()}
            save_checkpoint(folder, Checkpoint(weights, optimizer.optimizer.state_dict(), number))
        accelerator.wait_for_everyone()

    try:
        for step in schedule(config, len(data), seed):
            if step.number <= position:
                continue
            if wrapped is None or step.first_of_stage:
                chosen = trainable(everything, step.stage)
                for name, parameter in everything.items():
                    parameter.requires_grad_(name in chosen)
                stage = config.head if step.stage == HEAD else config.lora
                plain = torch.optim.AdamW(chosen.values(), lr=stage.lr, weight_decay=stage.weight_decay)
                if state is not None and not step.first_of_stage:
                    plain.load_state_dict(state)
                accelerator.free_memory()
                wrapped, optimizer = accelerator.prepare(objective, plain)
            rows = step.rows[accelerator.process_index :: accelerator.num_processes]
            inputs = (features[rows],) if step.stage == HEAD else (prepare(model.dual_encoder, data.batch(rows)),)
            if step.stage == LORA and offsets is not None:
                inputs = (*inputs, offsets[rows])
            values = _step(
                wrapped, optimizer, accelerator, inputs, data.targets[rows], step, config, seed, list(chosen.values())
            )
            if records is not None:
                records.add(step.number, stage=step.stage, epoch=step.epoch, lr=step.lr, **values)
            bar.update()
            every = config.save_every * (QUICK if step.stage == HEAD else 1)
            if stop.exit_status is not None:
                save(step.number)
                raise Interrupted(stop.exit_status)
            if step.number % every == 0 or step.last_of_stage:
                save(step.number)
    finally:
        bar.close()
        if records is not None:
            records.close()
        for parameter in everything.values():
            parameter.requires_grad_(True)
    model.eval()


def _step(
    wrapped,
    optimizer,
    accelerator,
    inputs: tuple[Tensor, ...],
    targets: np.ndarray,
    step: Step,
    config: FitConfig,
    seed: int,
    parameters,
) -> dict:
    for group in optimizer.param_groups:
        group["lr"] = step.lr
    device = accelerator.device
    # Dropout is a pure function of the step, so that a resumed run draws what the uninterrupted one would have drawn.
    torch.manual_seed(int(np.random.SeedSequence([seed, step.number, accelerator.process_index]).generate_state(1)[0]))
    target = torch.from_numpy(np.asarray(targets)).to(device)
    parts = wrapped(target, *(x.to(device) for x in inputs))
    # Each process sees its share of the batch: weigh by its size, so that the mean over processes is the mean over pictures.
    share = len(targets) * accelerator.num_processes / len(step.rows)
    total = sum(parts.values()) * share
    accelerator.backward(total)
    norm = accelerator.clip_grad_norm_(parameters, config.clip_grad)
    norm = torch.as_tensor(norm)
    if not torch.isfinite(norm) and config.mixed_precision != "fp16":
        raise NonFiniteGradient(
            f"the gradient norm is {float(norm)} in step {step.number} (stage {step.stage}, epoch {step.epoch}, pictures "
            f"{sorted(step.rows.tolist())[:8]}...); the last checkpoint is intact: lower the learning rate or look at these pictures"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "loss": float(total.detach()),
        "grad_norm": float(norm),
        **{f"loss/{k}": float(v.detach()) for k, v in parts.items()},
    }
