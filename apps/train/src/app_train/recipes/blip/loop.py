"""The loop of both BLIP-2 stages: one optimizer, resumable after any step with bit-identical numbers on CPU."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from app_train.core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from app_train.core.config import StageConfig
from app_train.core.errors import Interrupted, NonFiniteGradient, RunError
from app_train.core.interrupt import StopFlag
from app_train.core.records import Records
from app_train.recipes.lora.loop import _lr as cosine_lr

# (model, rows, epoch, number of the step, share of training that is done) -> loss and numbers to record
Forward = Callable[[nn.Module, np.ndarray, int, int, float], tuple[Tensor, Mapping[str, Tensor]]]


def blip_accelerator(mixed_precision: str = "no") -> Accelerator:
    """Device, precision and processes."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision, kwargs_handlers=[unused])


def blip_schedule(
    config: StageConfig, num_items: int, seed: int
) -> Iterator[tuple[int, int, np.ndarray, float, float]]:
    """(number from 1, epoch, rows, learning rate, share done) of every step; whole batches only, as ranks gather."""
    size = min(config.batch_size, num_items)
    per_epoch = max(1, num_items // size)
    total = per_epoch * config.epochs
    for epoch in range(config.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_items)
        for index in range(per_epoch):
            done = epoch * per_epoch + index
            yield (
                done + 1,
                epoch,
                order[index * size : (index + 1) * size],
                cosine_lr(config, done, total),
                done / total,
            )


def fit_blip(
    model: nn.Module,
    forward: Forward,
    num_items: int,
    config: StageConfig,
    folder: Path,
    *,
    seed: int,
    stop: StopFlag,
    accelerator: Accelerator,
    label: str,
    save_every: int = 50,
    clip_grad: float = 1.0,
    tensorboard: bool = False,
) -> None:
    """Train a model in place; go on from the newest checkpoint below `folder` if there is one.

    Args:
        model: with its trainable parameters marked.
        forward: from rows of the data to a loss.
        num_items: pictures.
        config: epochs, learning rate, batch size over all processes.
        folder: receives checkpoints and `metrics.jsonl`.
        seed: fixes order and dropout.
        stop: read after every step.
        accelerator: device, precision, processes.
        label: shown at the progress bar.
        save_every: steps between checkpoints.
        clip_grad: largest gradient norm.
        tensorboard: also write TensorBoard events.

    Raises:
        Interrupted: after a signal; the state is saved.
        NonFiniteGradient: before the optimizer step that would have spoilt the weights.
        RunError: fewer pictures in a batch than processes.
    """
    if min(config.batch_size, num_items) < accelerator.num_processes:
        raise RunError(
            f"a batch of {config.batch_size} pictures is too small for {accelerator.num_processes} processes"
        )
    found = load_checkpoint(folder)
    position = 0 if found is None else found.position
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if found is not None:
        with torch.no_grad():
            for name, value in found.weights.items():
                trained[name].copy_(value)
    plain = model.no_decay_names()
    groups = [
        {"params": [p for n, p in trained.items() if n not in plain], "weight_decay": config.weight_decay},
        {"params": [p for n, p in trained.items() if n in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    if found is not None:
        optimizer.load_state_dict(found.optimizer)
    model.train()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    main = accelerator.is_main_process
    records = Records(folder, position, tensorboard=tensorboard) if main else None
    steps = list(blip_schedule(config, num_items, seed))
    bar = tqdm(total=len(steps), initial=position, desc=label, disable=None if main else True, leave=False)

    def save(number: int) -> None:
        if main:
            records.flush()
            save_checkpoint(folder, Checkpoint(dict(trained), optimizer.optimizer.state_dict(), number))
        accelerator.wait_for_everyone()

    try:
        for number, epoch, rows, lr, done in steps[position:]:
            for group in optimizer.param_groups:
                group["lr"] = lr
            rank, size = accelerator.process_index, accelerator.num_processes
            # Dropout is a pure function of the step, so that a resumed run draws what the uninterrupted one would have drawn.
            torch.manual_seed(int(np.random.SeedSequence([seed, number, rank]).generate_state(1)[0]))
            share = rows[: len(rows) // size * size][rank::size]
            with accelerator.autocast():
                loss, values = forward(wrapped, share, epoch, number, done)
            accelerator.backward(loss)
            norm = float(torch.as_tensor(accelerator.clip_grad_norm_(list(trained.values()), clip_grad)))
            if not math.isfinite(norm) and accelerator.mixed_precision != "fp16":
                raise NonFiniteGradient(
                    f"the gradient norm is {norm} in step {number} (epoch {epoch}, pictures {sorted(rows.tolist())[:8]}...); "
                    "the last checkpoint is intact: lower the learning rate or look at these pictures"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.clamp_()
            if records is not None:
                numbers = {k: float(v) for k, v in values.items()}
                records.add(
                    number, stage=label, epoch=epoch, lr=lr, loss=float(loss.detach()), grad_norm=norm, **numbers
                )
            bar.update()
            if stop.exit_status is not None:
                save(number)
                raise Interrupted(stop.exit_status)
            if number % save_every == 0 or number == len(steps):
                save(number)
    finally:
        bar.close()
        if records is not None:
            records.close()
    model.eval()


__all__ = ["blip_accelerator", "blip_schedule", "fit_blip"]
