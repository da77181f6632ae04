"""Turn SIGTERM and Ctrl-C into a flag that the loop reads after every step."""

import signal
from types import FrameType

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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.exit_status = 128 + number
        signal.signal(number, self._previous[number])
