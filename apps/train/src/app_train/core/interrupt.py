"""Turn SIGTERM and Ctrl-C into a flag that is read after every step and every batch."""

import signal
from types import FrameType

from app_train.core.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """A context in which the first SIGTERM or SIGINT only sets `exit_status`; a second one acts as usual."""

    def __init__(self) -> None:
        self.exit_status: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Leave if a signal has come.

        Raises:
            Interrupted: with the exit status of the signal.
        """
        if self.exit_status is not None:
            raise Interrupted(self.exit_status)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.exit_status = 128 + number
        signal.signal(number, self._previous[number])
