"""Small random CLIP models and a small tree."""

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from hier_losses import Taxonomy


def small_clip(layers=4, dim=24, width=32, text_width=16, ls=None, image_size=16, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vision = CLIPVisionCfg(
            layers=layers, width=width, head_width=8, patch_size=8, image_size=image_size, ls_init_value=ls
        )
        text = CLIPTextCfg(width=text_width, heads=2, layers=layers)
        return CLIP(dim, vision, text).eval()


@pytest.fixture(scope="session")
def clip():
    return small_clip()


@pytest.fixture
def make_clip():
    return small_clip


@pytest.fixture
def tax():
    """Nodes: 0 animal, 1 plant; 2 cat, 3 dog, 4 fish_1 (animal), 5 oak (plant); 6 tabby, 7 lion (cat); oak is a lone child."""
    return Taxonomy.from_paths(
        [
            ("animal", "cat", "tabby"),
            ("animal", "cat", "lion"),
            ("animal", "dog"),
            ("animal", "fish_1"),
            ("plant", "oak"),
        ]
    )


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
