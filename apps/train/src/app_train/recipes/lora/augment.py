"""Varied pictures: a function of seed, step and picture, so that a run that goes on, and any number of processes, draws the same."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from app_data.read.pictures import random_box
from app_train.recipes.lora.settings import AugmentConfig


def augmented(batch: Tensor, rows: Sequence[int], config: AugmentConfig, seed: int, step: int) -> Tensor:
    """Mirror, cut and colour uint8 pictures (b, 3, H, W); the size stays.

    Args:
        batch: the pictures.
        rows: which picture of the data each is.
        config: how much.
        seed, step: of the run; with the row they decide what happens to a picture.
    """
    return torch.stack(
        [_vary(x, config, np.random.default_rng([seed, step, int(row)])) for x, row in zip(batch, rows, strict=True)]
    )


def _vary(picture: Tensor, config: AugmentConfig, draw: np.random.Generator) -> Tensor:
    height, width = picture.shape[1:]
    # All numbers are drawn whatever is used: one setting does not change what another one does.
    mirrored, box = draw.random() < config.flip, random_box(height, width, config.crop, draw)
    factors = 1 + config.colour * draw.uniform(-1, 1, 3)
    if mirrored:
        picture = tv.horizontal_flip(picture)
    if config.crop < 1:
        picture = tv.resized_crop(picture, *box, [height, width], antialias=True)
    if config.colour:
        for change, factor in zip(
            (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation), factors, strict=True
        ):
            picture = change(picture, float(factor))
    return picture
