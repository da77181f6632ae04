"""What `blip2-opt-2.7b` trains on: COCO, decoded once, or any number of pairs streamed from webdataset's shards."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app_data.read.pictures import random_square, square
from app_data.sets.captions import CaptionSet
from app_data.sets.stream import Order, Stream
from app_train.core.schedule import Step

LEAST_AREA = 0.5  # of a random cut, as LAVIS trains BLIP-2


class Batch(NamedTuple):
    """Pairs.

    Attributes:
        pixels: uint8 (b, 3, size, size).
        captions: one of each picture's, by chance.
        same: equal numbers for equal pictures, (b).
    """

    pixels: Tensor
    captions: list[str]
    same: Tensor


class Pairs:
    """Pictures with captions, of which a process reads its share of each step once.

    Args:
        rank, world: of this process, and the number of processes.
    """

    fingerprint: str

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self._rank, self._world = rank, world
        self._step = -1
        self._rows: dict[int, int] = {}
        self._share: Batch | None = None

    def mine(self, rows: np.ndarray) -> np.ndarray:
        """The share of the rows of a step that is this process's, as `core.fit` divides whole batches."""
        return rows[: len(rows) // self._world * self._world][self._rank :: self._world]

    def share(self, step: Step) -> Batch:
        """The pairs of this process in a step."""
        if self._share is None or self._step != step.number:
            rows = self.mine(step.rows)
            self._step, self._share = step.number, self.read(step, rows)
            self._rows = {int(row): place for place, row in enumerate(rows)}
        return self._share

    def piece(self, step: Step, rows: np.ndarray) -> Batch:
        """Some of them."""
        share = self.share(step)
        places = [self._rows[int(row)] for row in rows]
        return Batch(share.pixels[places], [share.captions[place] for place in places], share.same[places])

    def read(self, step: Step, rows: np.ndarray) -> Batch:
        """The pairs of these rows."""
        raise NotImplementedError


class Decoded(Pairs):
    """Pictures that were decoded once, at one size."""

    def __init__(self, data: CaptionSet, rank: int = 0, world: int = 1) -> None:
        super().__init__(rank, world)
        self.data, self.fingerprint = data, data.fingerprint
        self._numbers = {name: number for number, name in enumerate(dict.fromkeys(data.ids))}

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.data)

    def read(self, step: Step, rows: np.ndarray) -> Batch:
        """The pairs of these rows."""
        captions = [chosen(self.data.captions[int(i)], step.epoch, int(i)) for i in rows]
        return Batch(
            self.data.batch(rows), captions, torch.tensor([self._numbers[self.data.ids[int(i)]] for i in rows])
        )


class Streamed(Pairs):
    """Pictures that are read when they are needed, by threads that are one step ahead.

    What is cut from a picture, and which of its captions is taken, are functions of seed, epoch and row: a run that goes on draws the
    same, however many processes and threads there are.

    Args:
        stream: where they come from.
        size: height and width of a picture.
        augment: cut and mirror at random; the centre square otherwise.
        readers: threads.
        rank, world: see `Pairs`.
        seed: of the cuts.
    """

    def __init__(
        self, stream: Stream, size: int, *, augment: bool, readers: int, rank: int = 0, world: int = 1, seed: int = 0
    ) -> None:
        super().__init__(rank, world)
        self.stream, self.size, self.augment, self.seed = stream, size, augment, seed
        self.fingerprint = stream.fingerprint
        self._pool = ThreadPoolExecutor(readers)
        self._ahead: dict[tuple[int, int], Future] = {}

    def __len__(self) -> int:
        """Pictures of an epoch."""
        return len(self.stream)

    def order(self, epoch: int) -> Order:
        """The rows of an epoch."""
        return self.stream.order(epoch)

    def _one(self, epoch: int, row: int) -> tuple[np.ndarray, str]:
        sample = self.stream.read(row)
        if self.augment:
            draw = np.random.default_rng([self.seed, epoch, row])
            picture = random_square(sample.picture, self.size, LEAST_AREA, draw)
        else:
            picture = square(sample.picture, self.size)
        return np.asarray(picture), chosen(sample.captions, epoch, row)

    def read(self, step: Step, rows: np.ndarray) -> Batch:
        """The pairs of these rows; those of the next step are begun."""
        size = len(step.rows)
        following = self.mine(self.order(step.epoch)[(step.batch + 1) * size : (step.batch + 2) * size])
        known, self._ahead = self._ahead, {}
        wanted = [(step.epoch, int(row)) for row in rows]
        futures = {key: known.get(key) or self._pool.submit(self._one, *key) for key in dict.fromkeys(wanted)}
        for row in dict.fromkeys(following.tolist()):
            self._ahead[step.epoch, row] = self._pool.submit(self._one, step.epoch, row)
        found = [futures[key].result() for key in wanted]
        pixels = torch.from_numpy(np.stack([picture for picture, _ in found])).permute(0, 3, 1, 2)
        return Batch(pixels, [caption for _, caption in found], torch.from_numpy(rows))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def chosen(captions: Sequence[str], epoch: int, row: int) -> str:
    """One of a picture's captions, by chance: a pure function of the arguments."""
    return captions[int(np.random.default_rng([epoch, row]).integers(len(captions)))]
