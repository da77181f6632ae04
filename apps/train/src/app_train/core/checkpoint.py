"""Checkpoints that are either complete or absent: a folder that is flushed to disk before it gets its name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app_data.store.atomic import new_folder, remove_folder
from app_data.store.errors import DataError
from app_data.store.sealed import read_sealed, seal_broken, write_sealed
from app_train.core.errors import RunError

PREFIX, MARKER, KEEP = "checkpoint-", "COMPLETE", 2


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on: trained weights, optimizer state, steps taken, and the digest of the records so far."""

    weights: dict[str, Tensor]
    optimizer: dict
    position: int
    records: str = ""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `folder` and delete all but the newest two."""
    final = folder / f"{PREFIX}{checkpoint.position:08d}"
    if (final / MARKER).exists():
        return final
    with new_folder(final) as temporary:
        weights = {k: v.detach().cpu().contiguous() for k, v in checkpoint.weights.items()}
        save_file(weights, temporary / "weights.safetensors")
        torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
        position = {"position": checkpoint.position, "records": checkpoint.records}
        write_sealed(temporary / "position.json", position, beside=True)
        (temporary / MARKER).touch()
    for old in _complete(folder)[:-KEEP]:
        remove_folder(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest complete checkpoint below `folder`; None if there is none.

    Raises:
        RunError: if that checkpoint is damaged.
    """
    known = _complete(folder)
    if not known:
        return None
    newest = known[-1]
    try:
        if broken := seal_broken(newest / "position.json"):
            raise DataError(f"{broken} is not as it was written")
        known = read_sealed(newest / "position.json")
        weights = load_file(newest / "weights.safetensors")
        optimizer = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,
        SafetensorError,
        torch.serialization.pickle.UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise RunError(
            f"checkpoint {newest} is damaged ({reason}); delete that folder and run the same command again to go on from the one before"
        ) from error
    return Checkpoint(weights, optimizer, int(known["position"]), known.get("records", ""))


def remove_checkpoints(folder: Path) -> None:
    """Delete all checkpoints below `folder`; the run they belong to is finished."""
    for path in [*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*")]:
        remove_folder(path)


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / MARKER).exists())
