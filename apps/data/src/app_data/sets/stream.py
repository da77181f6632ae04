"""Several sets of shards as one endless stream, in an order that is a function of seed and epoch."""

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from app_data.sets.shards import Sample, Shards
from app_data.store.cache import fingerprint
from app_data.store.errors import DataError, TooManyBadFiles, UnreadablePicture

_BLOCK = 1000  # positions over which the weights of several sets hold exactly
_BAD_SHARE, _BAD_FILES, _TRIES = 0.01, 10, 20


class Order:
    """The rows of one epoch, computed where they are asked for: 129 million of them would take a gigabyte."""

    def __init__(self, stream: "Stream", epoch: int) -> None:
        self._stream, self._epoch = stream, epoch

    def __len__(self) -> int:
        """Number of pictures of an epoch."""
        return len(self._stream)

    def __getitem__(self, where: slice) -> np.ndarray:
        """Rows of these positions, int64."""
        start, stop, stride = where.indices(len(self))
        return self._stream.rows(self._epoch * len(self) + np.arange(start, stop, stride))


class Stream:
    """Several sets of shards as one endless stream; `order` is what a training stage reads from it.

    Of one set every epoch visits all pictures once. Shards are shuffled, then samples within a window, as a shuffle buffer of that
    size does; both are functions of seed and epoch. Of several sets, each block of 1,000 positions holds the shares that the
    weights say, and each set goes on through epochs of its own.

    Args:
        sets: The data sets.
        weights: Share of each, up to a common factor; their sizes if empty.
        window: Samples that are shuffled among each other.
        seed: Of the order.

    Raises:
        DataError: No set, as many weights as there are sets are not given, or a weight is not above 0.
    """

    def __init__(
        self, sets: Sequence[Shards], weights: Sequence[float] = (), *, window: int = 10_000, seed: int = 0
    ) -> None:
        if not sets:
            raise DataError("a stream needs at least one set of shards")
        weights = tuple(weights) or tuple(float(len(one)) for one in sets)
        if len(weights) != len(sets) or not all(0 < weight < float("inf") for weight in weights):
            raise DataError(f"weights must be {len(sets)} numbers above 0, one for each set, got {list(weights)}")
        if window < 1:
            raise DataError(f"the window must hold at least 1 sample, got {window}")
        self.sets, self.window, self.seed = tuple(sets), window, seed
        self.first = np.concatenate([[0], np.cumsum([len(one) for one in sets])])
        share = np.array(weights) / sum(weights) * _BLOCK
        self.quota = np.maximum(1, share.astype(np.int64))
        self.quota[np.argsort(self.quota - share)[: max(0, _BLOCK - self.quota.sum())]] += 1
        self.fingerprint = fingerprint({"stream": [one.fingerprint for one in sets]})
        self.skipped: dict[str, str] = {}
        self._taken, self._lock = 0, threading.Lock()
        self._shards = lru_cache(maxsize=16)(self._shard_order)
        self._within = lru_cache(maxsize=16)(self._window_order)
        self._pattern = lru_cache(maxsize=16)(self._block_pattern)

    def __len__(self) -> int:
        """Pictures of all sets."""
        return int(self.first[-1])

    def order(self, epoch: int) -> Order:
        """The rows of an epoch."""
        return Order(self, epoch)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows at positions of the endless stream, counted over all epochs."""
        if len(self.sets) == 1:
            return np.array([self._row(0, int(p)) for p in positions], dtype=np.int64)
        size = int(self.quota.sum())
        found = []
        for block, place in zip((positions // size).tolist(), (positions % size).tolist(), strict=True):
            chosen, before = self._pattern(block)
            one = int(chosen[place])
            found.append(self._row(one, block * int(self.quota[one]) + int(before[place])))
        return np.array(found, dtype=np.int64)

    def _row(self, one: int, position: int) -> int:
        """The row at a position of one set's own stream."""
        data = self.sets[one]
        epoch, place = divmod(position, len(data))
        window = place // self.window
        place = window * self.window + int(self._within(one, epoch, window)[place % self.window])
        order, ends = self._shards(one, epoch)
        turn = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[turn])
        within = place - (int(ends[turn - 1]) if turn else 0)
        return int(self.first[one] + data.first[shard]) + within

    def _shard_order(self, one: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        data = self.sets[one]
        order = np.random.default_rng([self.seed, 1, one, epoch]).permutation(len(data.paths))
        return order, data.counts[order].cumsum()

    def _window_order(self, one: int, epoch: int, window: int) -> np.ndarray:
        size = min(self.window, len(self.sets[one]) - window * self.window)
        return np.random.default_rng([self.seed, 2, one, epoch, window]).permutation(size)

    def _block_pattern(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Which set each position of a block reads, and how many before it read the same."""
        chosen = np.repeat(np.arange(len(self.sets)), self.quota)
        chosen = np.random.default_rng([self.seed, 3, block]).permutation(chosen)
        before = np.zeros_like(chosen)
        for one in range(len(self.sets)):
            mine = chosen == one
            before[mine] = np.arange(mine.sum())
        return chosen, before

    def read(self, row: int) -> Sample:
        """The picture at a row; in place of one that cannot be read, the next of its shard.

        Raises:
            TooManyBadFiles: More than ten and more than 1 % of what was read cannot be.
        """
        one = int(np.searchsorted(self.first, row, side="right")) - 1
        data, row = self.sets[one], row - int(self.first[one])
        shard = int(np.searchsorted(data.first, row, side="right")) - 1
        start, count = int(data.first[shard]), int(data.counts[shard])
        for more in range(min(_TRIES, count)):
            candidate = start + (row - start + more) % count
            with self._lock:
                self._taken += 1
            try:
                return data.read(candidate)
            except UnreadablePicture as error:
                self._skip(data.name(candidate), str(error))
        raise TooManyBadFiles(
            f"{data.name(row)} and the {min(_TRIES, count)} after it cannot be read: look at this shard"
        )

    def _skip(self, name: str, reason: str) -> None:
        with self._lock:
            self.skipped[name] = reason
            bad, taken = len(self.skipped), self._taken
        if bad > max(_BAD_FILES, _BAD_SHARE * taken):
            raise TooManyBadFiles(
                f"{bad} of {taken} samples cannot be read, more than {_BAD_SHARE:.0%}; the last is {name}: {reason}"
            )
