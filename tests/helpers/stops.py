"""A signal at a chosen moment."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import app_train.core.fit as loop


@contextmanager
def terminated_in_step(number: int) -> Iterator[None]:
    """Within it, this process is sent SIGTERM during its `number`-th training step, counted over all stages and models."""
    take, seen = loop._Loop.take, []

    def counted(self, step, stop):
        seen.append(step.number)
        if len(seen) == number:
            signal.raise_signal(signal.SIGTERM)
        return take(self, step, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "take", counted)
        yield
