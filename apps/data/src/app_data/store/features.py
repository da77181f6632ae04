"""Features that a frozen tower gave before, kept on disk in the user's cache."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from app_data.store.atomic import new_file
from app_data.store.cache import default_cache_dir


def cached_features(
    key: str, compute: Callable[[int, int], Tensor], num: int, cache_dir: str | Path | None = None, piece: int = 512
) -> Tensor:
    """Features from the cache if they are there, else computed now and stored.

    Pieces are stored as they are done, so that a stopped computation goes on where it was. A damaged file is computed anew.

    Args:
        key: What the features depend on: tower, fingerprint of the pictures, size.
        compute: Gives the features of the rows from its first argument up to, not including, its second.
        num: Number of rows.
        cache_dir: Where they are kept; the user's cache folder if None.
        piece: Rows computed between two writes.
    """
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = _file(root, key)
    known = _read(path)
    if known is not None:
        return known
    starts = range(0, num, piece)
    if len(starts) < 2:
        # A copy, outside of inference mode, whatever `compute` runs in.
        features = compute(0, num).clone(memory_format=torch.contiguous_format)
    else:
        parts = [(start, min(start + piece, num)) for start in starts]
        features = torch.cat(
            [
                cached_features(f"{key} {a}-{b}", lambda i, j, a=a: compute(a + i, a + j), b - a, root, piece)
                for a, b in parts
            ]
        )
    with new_file(path) as temporary:
        save_file({"features": features}, temporary, {"sha256": tensor_digest(features)})
    if len(starts) > 1:
        for a, b in parts:
            _file(root, f"{key} {a}-{b}").unlink(missing_ok=True)
    return features


def weights_digest(model: nn.Module) -> str:
    """Sixteen hex digits that change with any weight of a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor_digest(value).encode())
    return digest.hexdigest()[:16]


def tensor_digest(value: Tensor) -> str:
    """The sha256 of a tensor's bytes, in hex."""
    whole = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(whole.numpy()).hexdigest()


def _read(path: Path) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("features")
            return features if (file.metadata() or {}).get("sha256") == tensor_digest(features) else None
    except (OSError, SafetensorError):
        return None


def _file(root: Path, key: str) -> Path:
    return root / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
