"""Varied pictures: nothing by default, the same whatever the processes, and each setting does what it says."""

import numpy as np
import torch

from app_train.recipes.lora.augment import augmented
from app_train.recipes.lora.settings import AugmentConfig


def pictures(n=6, size=24):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_nothing_unless_asked():
    assert not AugmentConfig()
    assert AugmentConfig(flip=0.5)
    assert AugmentConfig(crop=0.7)
    assert AugmentConfig(colour=0.2)
    assert torch.equal(augmented(pictures(), range(6), AugmentConfig(), 0, 1), pictures())


def test_a_picture_varies_by_seed_step_and_row_alone():
    config, x = AugmentConfig(flip=0.5, crop=0.5, colour=0.3), pictures()
    whole = augmented(x, range(6), config, 0, 3)
    # Another batch, or another process with a share of it, draws the same.
    assert torch.equal(augmented(x[[4, 1]], [4, 1], config, 0, 3), whole[[4, 1]])
    for seed, step in ((1, 3), (0, 4)):
        assert not torch.equal(augmented(x, range(6), config, seed, step), whole)
    assert whole.shape == x.shape
    assert whole.dtype == torch.uint8


def test_what_each_setting_does():
    x = pictures(200, 8)
    flipped = augmented(x, range(200), AugmentConfig(flip=0.5), 0, 1)
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    same = (flipped == x).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 70 < int(mirrored.sum()) < 130
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)[None].repeat(50, 1, 1, 1)
    cut = augmented(ramp, range(50), AugmentConfig(crop=0.5), 0, 1)
    # Half of the area, at most four thirds as tall as wide: the width seen is at least sqrt(.5 * 3 / 4) of the whole.
    seen = (cut[:, 0, 0].max(1).values - cut[:, 0, 0].min(1).values).float() / 63
    assert seen.min() > np.sqrt(0.375) - 0.05
    assert seen.min() < 0.9
    grey = torch.full((50, 3, 4, 4), 128, dtype=torch.uint8)
    lit = augmented(grey, range(50), AugmentConfig(colour=0.25), 0, 1).float()[:, 0, 0, 0] / 128
    assert 0.74 <= lit.min() < 0.85
    assert 1.15 < lit.max() <= 1.26
