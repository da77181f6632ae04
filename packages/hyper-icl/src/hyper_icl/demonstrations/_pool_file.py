"""The file of a pool of points: written part by part, read through the memory map, so that a pool may exceed the memory.

No reference. The format is that of safetensors (a length, a JSON header, the tensors' bytes), whose own writer wants whole
tensors. The depths stand beside the points, so that opening a pool reads none of them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyper_icl._checks import check_groups, check_rows

FILE = "bank.safetensors"
# Room for the header, which is known last and stands first; safetensors allows blanks at its end.
_HEADER = 4096 - 8
_ROWS = 1 << 15


def fp64_norm(tangent: Tensor) -> Tensor:
    """Row norms in fp64 without a copy of the whole pool in fp64."""
    return torch.cat([part.double().norm(dim=-1) for part in tangent.split(_ROWS)])


def write_pool(
    folder: str | Path,
    parts: Iterable[Tensor],
    groups: Tensor | None,
    ids: tuple[str, ...] | None,
    facts: Mapping[str, str],
) -> None:
    """Write the parts' rows one after the other; an old file is replaced only when the new one is complete.

    Raises:
        ValueError: there is no row, or rows are not finite or differ in width, or groups or ids do not fit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{FILE}.part"
    depths, width, kind = [], None, torch.float32
    try:
        with unfinished.open("wb") as file:
            file.seek(8 + _HEADER)
            for part in parts:
                rows = check_rows("parts", part.detach(), dim=width)
                kind = rows.dtype if width is None and rows.dtype == torch.float64 else kind
                width = rows.shape[1]
                for some in rows.split(_ROWS) if len(rows) else ():
                    written = some.to("cpu", kind).contiguous()
                    depths.append(fp64_norm(written))
                    file.write(memoryview(written.numpy()).cast("B"))
            depth = torch.cat(depths) if depths else torch.empty(0)
            if len(depth) == 0:
                raise ValueError("parts must hold at least one row, got an empty pool")
            if ids is not None and len(ids) != len(depth):
                raise ValueError(f"ids must name all {len(depth)} items, got {len(ids)}")
            groups = check_groups("groups", groups, len(depth))
            shapes = {"tangent": ("F64" if kind == torch.float64 else "F32", [len(depth), width])}
            for name, tensor, code in (("depth", depth, "F64"), ("groups", groups, "I64")):
                if tensor is not None:
                    file.write(memoryview(tensor.cpu().contiguous().numpy()).cast("B"))
                    shapes[name] = (code, [len(depth)])
            _write_header(file, shapes, {"format": "2", **facts})
        (folder / "ids.json").unlink(missing_ok=True)
        if ids is not None:
            (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        os.replace(unfinished, folder / FILE)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_header(file, shapes: dict, facts: Mapping[str, str]) -> None:
    header: dict = {"__metadata__": dict(facts)}
    start = 0
    for name, (code, shape) in shapes.items():
        size = torch.Size(shape).numel() * (4 if code == "F32" else 8)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    if len(text) > _HEADER:
        raise ValueError(f"facts must fit in {_HEADER} bytes, got {len(text)}")
    file.seek(0)
    file.write(_HEADER.to_bytes(8, "little") + text.ljust(_HEADER))
    file.flush()
    os.fsync(file.fileno())


def read_pool(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str], list[str] | None]:
    """The tensors, still in the file, the facts, and the ids if there are any.

    Raises:
        ValueError: the file is missing or damaged.
    """
    folder = Path(folder)
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = folder / "ids.json"
        # Format 1 kept the ids in the header.
        ids = json.loads(facts["ids"]) if facts["format"] == "1" else None
        if names.exists():
            ids = json.loads(names.read_text(encoding="utf-8"))
        if ids is not None and len(ids) != len(tensors["tangent"]):
            raise KeyError(f"ids for {len(tensors['tangent'])} items")
        float(facts["c"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"folder must hold a complete {FILE}, got {folder}: {error}") from error
    return tensors, facts, ids
