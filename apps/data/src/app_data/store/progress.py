"""Progress on standard error: a bar at a terminal, one line every 30 seconds where there is none."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Self, TypeVar

T = TypeVar("T")

_SECONDS = 30.0


class Progress:
    """Counts what is done.

    Args:
        total: How much there is to do.
        label: What is done; nothing is shown if it is empty.
        done: How much is done already.
    """

    def __init__(self, total: int, label: str, done: int = 0) -> None:
        self.total, self.label, self.done = total, label, done
        self._bar, self._said = None, time.monotonic()
        # Not tqdm(disable=...): even then it takes a lock that a killed child of this process may never give back.
        if label and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, leave=False)

    def step(self) -> None:
        """Count one more."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()
        elif self.label and time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            print(f"{self.label}: {self.done} of {self.total}", file=sys.stderr, flush=True)  # noqa: T201

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        self.close()


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Hand out the items and show how many are done; `total` is needed if they have no length."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with Progress(total, label) as shown:
        for item in items:
            yield item
            shown.step()
