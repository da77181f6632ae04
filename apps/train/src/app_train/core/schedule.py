"""The steps of a run: a pure function of the settings and a seed, so that a run that goes on takes the same ones."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from app_train.core.config import StageConfig


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: over all stages, from 1.
        stage: name of the stage.
        epoch, batch: within the stage, from 0.
        rows: positions in the data, for all processes together.
        index: within the stage, from 0.
        total: steps of the stage.
        last_of_epoch: whether the epoch ends with it.
    """

    number: int
    stage: str
    epoch: int
    batch: int
    rows: np.ndarray
    index: int
    total: int
    last_of_epoch: bool

    @property
    def share(self) -> float:
        """Share of the stage that is done before this step."""
        return self.index / self.total


class Rows(Protocol):
    """The rows of an epoch, or what computes them where they are asked for."""

    def __getitem__(self, where: slice, /) -> np.ndarray:
        """The rows at these positions."""


class Keeper(Protocol):
    """Tensors beside the weights that a checkpoint must hold, such as a running average."""

    def tensors(self) -> dict[str, Tensor]:
        """What to keep."""

    def restore(self, tensors: Mapping[str, Tensor], index: int) -> None:
        """Take it back, `index` steps into the stage."""


# (wrapped model, step, this process's rows) -> loss, numbers to record
Forward = Callable[[nn.Module, Step, np.ndarray], tuple[Tensor, Mapping[str, Tensor | float]]]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: recorded with every step.
        settings: epochs, batch size over all processes, peak learning rate, weight decay, warm-up.
        num_items: what an epoch goes over.
        forward: the loss of this process's share of a batch, a mean over its items.
        trains: which parameters train, by name; all that require gradients if None.
        optimizer: made for the parameters by name; AdamW if None. Its groups' rates are the peaks.
        order: the items of an epoch; a permutation that depends on seed, stage and epoch if None.
        whole_batches: leave the rest of an epoch out, so that all processes see equal shares.
        rate: share of the peak rate at a step; a linear warm-up and a cosine to 0 if None.
        draw: the seed of a step's dropout; depends on seed, step and process if None.
        after_step, after_epoch: called after the optimizer's step.
        keeper: see `Keeper`.
        save_every: steps between two checkpoints.
        micro_batches: pieces in which a process takes its share, to save memory.
        clip_grad: largest gradient norm; None measures it only.
    """

    name: str
    settings: StageConfig
    num_items: int
    forward: Forward
    trains: Callable[[str], bool] | None = None
    optimizer: Callable[[dict[str, nn.Parameter]], Optimizer] | None = None
    order: Callable[[int], Rows] | None = None
    whole_batches: bool = False
    rate: Callable[[Step], float] | None = None
    draw: Callable[[Step], int] | None = None
    after_step: Callable[[], object] | None = None
    after_epoch: Callable[[Step], object] | None = None
    keeper: Keeper | None = None
    save_every: int = 20
    micro_batches: int = 1
    clip_grad: float | None = 1.0

    @property
    def batch_size(self) -> int:
        """Items of a whole batch."""
        return min(self.settings.batch_size, self.num_items) if self.whole_batches else self.settings.batch_size

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        if self.whole_batches:
            return max(1, self.num_items // self.batch_size)
        return math.ceil(self.num_items / self.batch_size)

    @property
    def num_steps(self) -> int:
        """Steps of the stage."""
        return self.settings.epochs * self.per_epoch


def steps(stages: Sequence[Stage], seed: int, done: int = 0) -> Iterator[tuple[Stage, Step]]:
    """The steps of a run in order, without the first `done`: their rows are not computed again."""
    number = 0
    for position, stage in enumerate(stages):
        order = stage.order or shuffled(stage.num_items, seed, position)
        size, per_epoch = stage.batch_size, stage.per_epoch
        for epoch in range(stage.settings.epochs):
            items = order(epoch)
            for batch in range(per_epoch):
                number += 1
                if number <= done:
                    continue
                rows = items[batch * size : (batch + 1) * size]
                index, last = epoch * per_epoch + batch, batch == per_epoch - 1
                yield stage, Step(number, stage.name, epoch, batch, rows, index, stage.num_steps, last)


def shuffled(num_items: int, *key: int) -> Callable[[int], np.ndarray]:
    """The order of each epoch: all items, as the key and the epoch say."""
    return lambda epoch: np.random.default_rng([*key, epoch]).permutation(num_items)


def warm_cosine(settings: StageConfig, index: int, total: int) -> float:
    """Share of the peak rate: a linear warm-up, then a cosine to 0."""
    warm = max(1, round(settings.warmup * total))
    if index < warm:
        return (index + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (index - warm) / max(1, total - warm)))


def draw_of(seed: int, number: int, process: int = 0) -> int:
    """The seed of a step's dropout, which a run that goes on draws again."""
    return int(np.random.SeedSequence([seed, number, process]).generate_state(1)[0])
