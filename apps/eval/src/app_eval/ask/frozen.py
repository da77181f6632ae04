"""A classifier on the frozen features of a pretrained tower: what the recipe `folder` saves and `hier predict` uses."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app_data.read.pictures import square, upright
from app_data.store.errors import DataError
from app_eval.measure.embed import BATCH, embedding, frozen_tower, prepare
from hier_lora import Prediction, ProductOfExperts, load_dual_encoder, predict_paths

BACKBONE, MEAN = "backbone.json", "mean.safetensors"


class FrozenClassifier:
    """Pictures to paths.

    Args:
        base: the pretrained dual encoder.
        locator: where it comes from.
        size: height and width of the pictures it was fitted on.
        mean: of the training features, (d,).
        product: of experts on centred features.
    """

    def __init__(self, base: nn.Module, locator: str, size: int, mean: Tensor, product: ProductOfExperts) -> None:
        self.base, self.locator, self.size, self.mean, self.product = base.eval(), locator, size, mean, product

    def save(self, folder: Path) -> None:
        """Write everything but the pretrained weights."""
        self.product.save_pretrained(folder)
        save_file({"mean": self.mean.contiguous()}, folder / MEAN)
        (folder / BACKBONE).write_text(json.dumps({"format": 1, "model": self.locator, "size": self.size}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "FrozenClassifier":
        """Read it back.

        Raises:
            DataError: a file is missing or damaged.
        """
        try:
            backbone = json.loads((folder / BACKBONE).read_text(encoding="utf-8"))
            mean, product = load_file(folder / MEAN)["mean"], ProductOfExperts.from_pretrained(folder)
            locator, size = str(backbone["model"]), int(backbone["size"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise DataError(f"{folder} holds no whole classifier ({error}): train again") from error
        return cls(load_dual_encoder(locator), locator, size, mean, product)

    @cached_property
    def _tower(self) -> Callable[[Tensor], Tensor]:
        """Made once: pictures may come one by one."""
        return frozen_tower(self.base)

    @torch.inference_mode()
    def logits(self, pictures: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Scores of all nodes, (n, N), for PIL pictures or uint8 arrays (H, W, 3) of any size.

        Pictures are turned upright, and cut to the centre square at the size of training.
        """
        rows = [torch.zeros(0, self.product.tax.num_nodes)]
        for start in range(0, len(pictures), BATCH):
            arrays = [self._square(picture) for picture in pictures[start : start + BATCH]]
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
            x = self._tower(prepare(self.base, pixels)).float() - self.mean
            features: dict[str, Tensor] = dict.fromkeys(self.product.experts, x)
            if "prompts" in features:
                features["prompts"] = embedding(self.base)(x)
            rows.append(self.product.logits(features))
        return torch.cat(rows)

    def predict(
        self, pictures: Sequence[np.ndarray | Image.Image], decoder: str | None = None, **options: object
    ) -> list[Prediction]:
        """Paths of pictures, see `logits`, by the chosen decoder if None is named."""
        decoder = self.product.settings.decoder if decoder is None else decoder
        return predict_paths(self.logits(pictures), self.product.tax, decoder, self.product.shown(decoder), **options)

    def _square(self, picture: np.ndarray | Image.Image) -> np.ndarray:
        if isinstance(picture, np.ndarray) and picture.shape == (self.size, self.size, 3):
            return picture
        opened = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        return np.asarray(square(upright(opened), self.size))
