"""Dual encoders (one image tower, one text tower, one scale) and the locators that name where one comes from.

CLIP: Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from inspect import signature
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

ENTRY_POINTS = "hier_lora.locators"


@runtime_checkable
class DualEncoder(Protocol):
    """What hier-lora asks of a vision-language model: any `torch.nn.Module` with these members.

    `lora_targets` maps "vision" and "text" to the regular expression of the module names that LoRA adapts in that tower;
    `tower_modules` maps them to the prefixes of the tower's parameter names; `modules_to_save` names small heads that train
    in full beside the adapter; `locator` names the source of the weights. Optional members: `save_preprocessing(folder)` and
    `load_preprocessing(folder)` keep the tokenizer and the picture settings beside an adapter; `plain_model` is the model
    inside a wrapper, whose module names the first three then use; `options` are arguments of the loader that a saved
    adapter remembers; `save_merged(folder)` writes the weights.
    """

    locator: str
    logit_scale: nn.Parameter
    lora_targets: dict[str, str]
    tower_modules: dict[str, list[str]]
    modules_to_save: list[str]

    def encode_image(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Embed preprocessed pictures; not normalised."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "num_texts dim"]:
        """Embed sentences; not normalised."""
        ...

    def preprocess(self, picture: Image.Image | np.ndarray) -> Float[Tensor, "channels height width"]:
        """Turn one RGB picture (PIL, or uint8 of shape (H, W, 3)) into the input of `encode_image`."""
        ...


Loader = Callable[..., nn.Module]
_LOADERS: dict[str, Loader] = {}


def register_locator(prefix: str, loader: Loader) -> None:
    """Make `load_dual_encoder("<prefix>:<name>", **options)` call `loader(name, **options)`.

    Distributions can do the same without being imported, through the entry point group `hier_lora.locators`.

    Args:
        prefix: the part before the colon, such as "hf".
        loader: takes the part after the colon and returns a module with the members of `DualEncoder`.

    Raises:
        ValueError: if the prefix is empty or holds a colon.
    """
    if not prefix or ":" in prefix:
        raise ValueError(f"prefix must be a non-empty word without ':', got {prefix!r}")
    _LOADERS[prefix] = loader


def load_dual_encoder(locator: str, **options: object) -> nn.Module:
    """Load the dual encoder that a locator names.

    Args:
        locator: `hf:<name or folder>` (CLIP-like families of transformers), `open_clip:<architecture>[@<pretrained tag
            or file>]`, or any prefix registered by another package, such as `pip:lite0-minilm`.
        options: for the loader. `hf:` takes `revision`, `dtype`, `device_map` and `quantization_config`, as
            `from_pretrained` does; an adapter remembers the first two.

    Returns:
        A module with the members of `DualEncoder`; its `locator` is the argument.

    Raises:
        ValueError: if the prefix is unknown, the message lists the known ones; or if its loader takes no such option.
    """
    prefix, colon, name = locator.partition(":")
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if not colon or not name or (prefix not in _LOADERS and prefix not in found):
        known = sorted(set(_LOADERS) | set(found))
        raise ValueError(f"locator must be '<prefix>:<name>' with a prefix of {known}, got {locator!r}")
    loader = _LOADERS[prefix] if prefix in _LOADERS else found[prefix].load()
    try:
        signature(loader).bind(name, **options)
    except TypeError as error:
        raise ValueError(f"options must be what {prefix!r} takes, got {sorted(options)}: {error}") from error
    with one_sentence(locator):
        model = loader(name, **options)
    model.locator = locator
    return model


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn what other libraries raise where a file is damaged (`AttributeError`, `KeyError`, ...) into a `ValueError` that says where."""
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError:
            raise
        said = " ".join(str(error).split())
        raise ValueError(
            f"{what} cannot be read, a file of it seems damaged: {type(error).__name__}: {said}"
        ) from error
