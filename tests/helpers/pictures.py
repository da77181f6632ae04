"""Small noisy pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "warm/red": (220, 30, 30),
    "warm/orange": (240, 140, 20),
    "cold/blue": (30, 60, 220),
    "cold/green": (30, 180, 60),
}


def noisy(path: Path, colour: tuple[int, ...], draw: np.random.Generator, size: int = 40, spread: float = 25) -> None:
    """Write a square picture of one colour with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(colour) + draw.normal(0, spread, (size, size, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def grey(path: Path, value: int) -> None:
    """Write a noisy grey picture; `value` sets its mean and its noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 30, (40, 36, 3))
    Image.fromarray((noise + value % 220).astype(np.uint8)).save(path)


def colour_folders(root: Path) -> Path:
    """Nested folders of 4 classes with 10 noisy pictures each."""
    draw = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for index in range(10):
            noisy(root / name / f"{index}.png", colour, draw)
    return root
