"""What a run writes while it goes: `metrics.jsonl` always, TensorBoard if asked."""

import hashlib
import json
import os
from pathlib import Path

from app_train.core.errors import RunError


class Records:
    """Lines of numbers, only ever appended; on resume the file is cut after the checkpoint, so that no step counts twice.

    Args:
        folder: the run folder.
        position: steps already taken; later lines are cut off.
        known: `digest` of the lines up to there; "" where nobody knows it.
        tensorboard: also write TensorBoard events.

    Raises:
        RunError: the lines up to `position` are not those that were written.
    """

    def __init__(self, folder: Path, position: int, known: str = "", *, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        before = self.path.read_bytes()[: _end_of(self.path, position)] if self.path.exists() else b""
        self._digest = hashlib.sha256(before)
        if known and self.digest != known:
            raise RunError(
                f"{self.path} is damaged, and the checkpoints beside it go on from what it said; delete {folder} and run the same "
                "command again"
            )
        if self.path.exists():
            os.truncate(self.path, len(before))
        # Line by line: what a step has written is with the operating system before the next step begins.
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=position + 1)

    def add(self, step: int, **values: float | int | str) -> None:
        """Write one line; numbers also go to TensorBoard."""
        line = json.dumps({"step": step, **values}) + "\n"
        self._file.write(line)
        self._digest.update(line.encode())
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)

    @property
    def digest(self) -> str:
        """The sha256 of all lines, in hex."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Force the lines to disk; a checkpoint comes after."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _end_of(path: Path, position: int) -> int:
    """Bytes of the whole lines up to a step."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                whole = line.endswith(b"\n") and json.loads(line)["step"] <= position
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                break
            end += len(line)
    return end


def read_records(path: Path) -> list[dict]:
    """The complete lines of a `metrics.jsonl`; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
