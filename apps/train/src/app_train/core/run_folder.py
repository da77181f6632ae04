"""The run folder: settings, versions and data in one file, a lock, finished rows, the result, and a manifest of all of it."""

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs

from app_data.store.atomic import remove_folder, remove_leftovers, write_json, write_text
from app_data.store.errors import DamagedFile
from app_data.store.sealed import MANIFEST, SEAL_FILE, file_digest, new_sealed_folder, read_sealed, write_sealed
from app_eval.measure.cells import RESULT
from app_train.core.checkpoint import PREFIX
from app_train.core.config import RESOLVED, RunConfig, config_hash, differences
from app_train.core.errors import RunError
from app_train.core.interrupt import StopFlag

LOCK = ".lock"
VERSIONS_OF = (
    "torch",
    "peft",
    "timm",
    "transformers",
    "hyper-geom",
    "hier-losses",
    "hier-lora",
    "mat-align",
    "hyper-blip",
    "hyper-icl",
    "app-data",
    "app-eval",
    "app-train",
)
# What gloo and NCCL say where a peer is gone.
_LEFT = re.compile(r"(?i)gloo|nccl|connection (closed|reset|refused)|socket")


class Run:
    """One call of a recipe: its folder, its processes, and the signals that stop it.

    Use it as a context, then `claim` the folder once the data is known. Only the first process touches the folder.

    Args:
        recipe: name of the recipe.
        config: its settings.
        grows: settings that may grow from one command to the next; they are not part of the run's identity.
        mixed_precision: "no", "bf16" or "fp16".
        processes: whether several processes can share the work.
        unused_parameters: whether a step may leave parameters out.
    """

    def __init__(
        self,
        recipe: str,
        config: RunConfig,
        grows: tuple[str, ...] = ("seeds", "rows"),
        *,
        mixed_precision: str = "no",
        processes: bool = True,
        unused_parameters: bool = False,
    ) -> None:
        if not processes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RunError(f"the recipe {recipe} runs in one process; start it without torchrun or accelerate launch")
        kwargs = [DistributedDataParallelKwargs(find_unused_parameters=True)] if unused_parameters else []
        # Without a GPU, several processes of torchrun talk through gloo.
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision, kwargs_handlers=kwargs
        )
        self.recipe, self.config, self.out = recipe, config, config.out
        self.identity = config.identity(*grows)
        self.asked = config_hash(config.identity())
        self.stop = StopFlag()
        self.data = ""
        self._lock: Any = None

    def __enter__(self) -> Self:
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.stop.__exit__(kind, error, trace)
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        # Outside of common steps a process that is stopped or fails leaves the others waiting for it.
        if self.accelerator.num_processes > 1 and isinstance(error, RuntimeError) and _LEFT.search(str(error)):
            raise RunError(
                "another process of this run has ended: see what it said; the same command goes on from here"
            ) from error

    @property
    def main(self) -> bool:
        """Whether this is the first process."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def check(self) -> None:
        """Leave if a signal has come: nothing is lost outside training."""
        self.stop.check()

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def claim(self, data: str) -> None:
        """Lock the folder and write the settings into it, or check that they are there already.

        Args:
            data: fingerprint of the data.

        Raises:
            RunError: if another process is at work in the folder, or it holds something else; nothing is written then.
        """
        self.data = data
        if self.main:
            if self.out.exists() and not self.out.is_dir():
                raise RunError(f"--out must name a folder, {self.out} is a file")
            ours = any((self.out / name).exists() for name in (RESOLVED, LOCK))
            if not ours and self.out.exists() and any(p for p in self.out.iterdir() if not p.name.startswith(".")):
                raise RunError(
                    f"{self.out} is not empty and holds no run; choose another folder with --out, or delete {self.out} if nothing in it "
                    "is needed"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.out / LOCK)
            remove_leftovers(self.out)
            self._settle()
        self.wait()

    def _settle(self) -> None:
        path = self.out / RESOLVED
        known = _read_settings(path)
        if known is not None:
            here = self.config.model_dump(mode="json")
            old = {k: v for k, v in known["config"].items() if k in self.identity or k not in here}
            changed = differences(old, self.identity)
            if known["data"] != self.data:
                changed.append(f"the data: {known['data']} -> {self.data}")
            if changed:
                raise RunError(
                    f"{self.out} holds a run with other settings ({'; '.join(changed)}); choose another folder with --out, or delete it"
                )
        content = {
            "config": self.config.model_dump(mode="json"),
            "data": self.data,
            "versions": {name: version(name) for name in VERSIONS_OF},
        }
        if known is None or known["config"] != content["config"]:
            write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def facts(self, row: str, seed: int, **more: object) -> dict:
        """What identifies a row of this run; `more` are the settings that are the row's own."""
        return {
            "recipe": self.recipe,
            "row": row,
            "seed": seed,
            "data": self.data,
            "config": config_hash(self.identity, **more),
        }

    @contextmanager
    def new_folder(self, path: Path, also: Sequence[Path] = ()) -> Iterator[Path | None]:
        """Fill a folder that appears whole and sealed; all processes wait, and only the first is handed the folder to fill."""
        if self.main:
            with new_sealed_folder(path, also) as temporary:
                yield temporary
        else:
            yield None
        self.wait()

    def result(self) -> dict | None:
        """The stored result of the same command; None if there is none yet, or a file of the run is no longer as it was."""
        try:
            sums = read_sealed(self.out / MANIFEST)["sha256"]
            sums.pop(RESOLVED, None)  # another command may write it anew, and `claim` has read it
            if any(file_digest(self.out / name) != known for name, known in sums.items()):
                return None
            result = read_sealed(self.out / RESULT)
        except (FileNotFoundError, DamagedFile, KeyError):
            return None
        return result if result.get("asked") == self.asked else None

    def finish(self, content: Mapping[str, object]) -> dict:
        """Write `result.json`: what a page or a report is made from; call `seal` when all files are there."""
        result = {"format": 1, "recipe": self.recipe, "data": self.data, "asked": self.asked, **content}
        # As a reader will find it: tuples become lists now, not at the next call.
        result = json.loads(json.dumps(result))
        write_json(self.out / RESULT, result)
        return result

    def seal(self) -> None:
        """Write `manifest.json`: the sha256 of every file of the run, which needs no checkpoint any more."""
        for path in list(
            self.out.rglob(f"{PREFIX}*")
        ):  # left by a process that was killed right after it had written a result
            remove_folder(path)
        files = sorted(p for p in self.out.rglob("*") if p.is_file() and not _left_out(p.relative_to(self.out)))
        sums = {p.relative_to(self.out).as_posix(): file_digest(p) for p in files}
        write_sealed(self.out / MANIFEST, {"format": 1, "sha256": sums})


def _left_out(path: Path) -> bool:
    if path.name == SEAL_FILE:
        return False
    return path.name == MANIFEST or any(part.startswith((".", "checkpoint-", "tensorboard")) for part in path.parts)


def _locked(path: Path) -> Any:
    """The lock file, open and locked; the system lets go of it when the process ends, however it ends."""
    handle = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        handle.close()
        raise RunError(
            f"{owner} is at work in {path.parent}; wait for it, or choose another folder with --out"
        ) from error
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle


def _read_settings(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        known = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(known["config"], dict) and isinstance(known["data"], str):
            return known
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        pass
    raise RunError(f"{path} is damaged; delete this file, and the same command writes it anew and goes on")
