"""What a run writes while it goes: `metrics.jsonl` always, TensorBoard if asked."""

import json
from pathlib import Path


class Records:
    """Append-only lines of numbers; on resume the lines after the checkpoint are dropped, so that no step counts twice.

    Args:
        folder: the run folder.
        position: steps already taken; later lines are removed.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, folder: Path, position: int, *, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_records(self.path) if line["step"] <= position]
        self._file = self.path.open("w", encoding="utf-8")
        for line in kept:
            self._write(line)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=position + 1)

    def add(self, step: int, **values: float | int | str) -> None:
        """Write one line; numbers also go to TensorBoard."""
        self._write({"step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Hand the lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_records(path: Path) -> list[dict]:
    """The complete lines of a `metrics.jsonl`; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
