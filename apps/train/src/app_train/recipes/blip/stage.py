"""The stage of both trainings of a BLIP-2: whole batches, AdamW with BLIP-2's betas, no decay of norms and biases."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from app_train.core.config import StageConfig
from app_train.core.schedule import Forward, Rows, Stage, shuffled


def blip_stage(
    model: nn.Module,
    name: str,
    settings: StageConfig,
    num_items: int,
    forward: Forward,
    seed: int,
    save_every: int,
    no_decay: frozenset[str] | set[str] | None = None,
    order: Callable[[int], Rows] | None = None,
    micro_batches: int = 1,
    tau_lr: float | None = None,
    pictures: int | None = None,
) -> Stage:
    """The stage.

    Args:
        model: with its trainable parameters marked.
        name: recorded with every step.
        settings: epochs, peak rate, batch size over all processes.
        num_items: pictures.
        forward: the loss of a share of a batch.
        seed: of the order of the pictures.
        save_every: steps between two checkpoints.
        no_decay: parameters without weight decay; what the model names itself if None.
        order: the pictures of an epoch; a permutation that depends on seed and epoch if None.
        micro_batches: see `Stage`.
        tau_lr: peak rate of the temperature; that of the settings if None. Adam moves log tau by about its rate in a step, so that at
            the rate of the weights a short training leaves the temperature where it began.
        pictures: of an epoch; all if None.
    """
    everything = shuffled(num_items, seed)
    num = num_items if pictures is None else min(pictures, num_items)
    plain = set(model.no_decay_names() if no_decay is None else no_decay)

    def optimizer(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        own = set() if tau_lr is None else {n for n in parameters if n.startswith("temperature.")}
        groups: list[dict] = [
            {
                "params": [p for n, p in parameters.items() if n not in plain | own],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for n, p in parameters.items() if n in plain - own], "weight_decay": 0.0},
        ]
        if own:
            groups.append({"params": [parameters[n] for n in sorted(own)], "weight_decay": 0.0, "lr": tau_lr})
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))

    return Stage(
        name, settings, num, forward, optimizer=optimizer, order=order or (lambda epoch: everything(epoch)[:num]), whole_batches=True,
        after_step=getattr(model, "clamp_", None), save_every=save_every, micro_batches=micro_batches,
    )  # fmt: skip


def pretraining_parts(out) -> dict[str, Tensor]:
    """The losses of the first stage, to be recorded."""
    return {f"loss/{n}": getattr(out, f"loss_{n}") for n in ("itc", "itm", "lm")}
