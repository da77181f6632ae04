"""Turns picture files into square RGB arrays, and holds sets of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from app_data.store.cache import fingerprint
from app_data.store.errors import DataError, Skipped, UnreadablePicture
from hier_losses import Taxonomy

# What is opened, by content; Pillow would hand an EPS file to Ghostscript, whatever its name ends in.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")


class Picture(NamedTuple):
    """One item of a `PictureSet`."""

    pixels: np.ndarray
    target: int
    style: str
    name: str


@dataclass(frozen=True)
class StoredPictures:
    """Rows of an array of decoded pictures, and what is known of each; subclasses say what that is.

    Attributes:
        store: All decoded pictures (m, size, size, 3) uint8, usually a memory map.
        rows: Which rows of `store` belong to this set, int64 (n,).
    """

    store: np.ndarray
    rows: np.ndarray

    # Fields with one entry for each of `rows`, or none at all.
    each: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Pictures as a uint8 tensor (b, 3, size, size)."""
        picked = self.store[self.rows[np.asarray(indices, dtype=np.int64)]]
        return torch.from_numpy(np.ascontiguousarray(picked)).permute(0, 3, 1, 2)

    def select(self, keep: np.ndarray | Sequence[int] | Sequence[bool]) -> Self:
        """The subset at these positions (integers, or one boolean for each); no pixel is copied."""
        chosen = np.asarray(keep)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        taken = {}
        for name in self.each:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                taken[name] = value[chosen]
            elif value:
                taken[name] = tuple(value[i] for i in chosen)
        key = {"of": self.fingerprint, "rows": self._identity(chosen)}
        # The fingerprint is a field of those who inherit.
        return replace(self, fingerprint=fingerprint(key), rows=self.rows[chosen], **taken)  # type: ignore[call-arg]

    def _identity(self, chosen: np.ndarray) -> list[int]:
        """What tells a selection from others, for its fingerprint."""
        return self.rows[chosen].tolist()


@dataclass(frozen=True)
class PictureSet(StoredPictures):
    """Labelled pictures over one taxonomy; indexing gives a `Picture`.

    Attributes:
        targets: Taxonomy node id of each picture's leaf, int64 (n,).
        styles: Artist, or source folder, of each picture.
        names: Readable leaf name of each picture.
        taxonomy: The label tree.
        skipped: Files left out while reading, with reasons.
        fingerprint: Changes whenever the pictures or labels do.
        files: Where each picture came from.
        node_text: Readable text of every taxonomy node, for prompts.
    """

    targets: np.ndarray
    styles: tuple[str, ...]
    names: tuple[str, ...]
    taxonomy: Taxonomy
    fingerprint: str
    files: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    node_text: tuple[str, ...] = field(default=(), repr=False)

    each: ClassVar[tuple[str, ...]] = ("targets", "styles", "names", "files")

    def __getitem__(self, index: int) -> Picture:
        """The picture at `index` with its label, style and name."""
        pixels = np.array(self.store[self.rows[index]])
        return Picture(pixels, int(self.targets[index]), self.styles[index], self.names[index])


def allow_megapixels(limit: float | None) -> None:
    """Let this process read pictures of up to so many million pixels, in place of Pillow's 89; None changes nothing.

    The limit keeps a few bytes from unpacking to gigabytes: raise it for files that you know.

    Raises:
        DataError: the limit is not above 0, or not finite.
    """
    if limit is None:
        return
    if not 0 < limit < float("inf"):
        raise DataError(f"max_megapixels must be above 0 and finite, got {limit}")
    Image.MAX_IMAGE_PIXELS = round(1e6 * limit)


def lies_in(root: str | Path, path: str | Path) -> bool:
    """Whether a path stays below a folder, by its spelling: a link inside the folder was put there by whoever owns it."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def open_picture(path: str | Path | BinaryIO) -> Image.Image:
    """A picture file as RGB, upright, on white, at its own size.

    Args:
        path: A file of one of `FORMATS`, or its content.

    Raises:
        UnreadablePicture: The file is no picture, is truncated, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            # Pillow only warns up to twice its limit; a warning would be lost among 10,000 files.
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and opened.width * opened.height > limit:
                raise UnreadablePicture(
                    f"it has {opened.width} x {opened.height} pixels, more than {limit}: see max_megapixels"
                )
            return upright(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadablePicture(f"it has too many pixels, see max_megapixels ({error})") from error
    except UnidentifiedImageError as error:
        raise UnreadablePicture(f"it is not a picture of a known format ({', '.join(FORMATS)})") from error
    except FileNotFoundError as error:
        dead = isinstance(path, str | Path) and Path(path).is_symlink()
        raise UnreadablePicture("it is a dead link" if dead else "it does not exist") from error
    except UnreadablePicture:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        # Pillow's decoders raise all of these on truncated or damaged files.
        raise UnreadablePicture(f"it is damaged or truncated ({error})") from error


def load_picture(path: str | Path, size: int, fit: str = "crop") -> np.ndarray:
    """A picture file as RGB, upright, on white, square.

    Args:
        path: A file of one of `FORMATS`.
        size: Height and width of the result.
        fit: "crop" cuts the centre square, "pad" adds white, "squash" changes the aspect ratio.

    Returns:
        uint8 array (size, size, 3).

    Raises:
        UnreadablePicture: See `open_picture`.
    """
    return np.asarray(square(open_picture(path), size, fit))


def upright(picture: Image.Image) -> Image.Image:
    """RGB copy of a picture, turned as its EXIF data says, on white."""
    picture.load()
    return on_white(ImageOps.exif_transpose(picture))


def on_white(picture: Image.Image) -> Image.Image:
    """RGB copy of a picture: transparent parts over white, deep grey scaled to 8 bits.

    Raises:
        UnreadablePicture: Grey values whose range says no number of bits.
    """
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(picture))).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Scale grey values by the range that holds them: [0, 1] for floats, else 8, 12 or 16 bits."""
    low, high = float(grey.min()), float(grey.max())
    tops = ([1.0] if grey.dtype.kind == "f" else []) + [255, 4095, 65535]
    top = next((top for top in tops if high <= top), None)
    if top is None or not low >= 0:
        raise UnreadablePicture(
            f"its grey values of {8 * grey.dtype.itemsize} bits lie in [{low:g}, {high:g}]: scale them to 0 to 65535"
        )
    return np.round(grey * (255.0 / top)).astype(np.uint8)


def square(picture: Image.Image, size: int, fit: str = "crop") -> Image.Image:
    """Resize an RGB picture to `size` x `size` the way `fit` says."""
    if fit == "crop":
        return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    if fit == "pad":
        return ImageOps.pad(picture, (size, size), Image.Resampling.BICUBIC, color=(255, 255, 255))
    if fit == "squash":
        return picture.resize((size, size), Image.Resampling.BICUBIC)
    raise ValueError(f"fit must be 'crop', 'pad' or 'squash', got {fit!r}")


def random_square(picture: Image.Image, size: int, least: float, draw: np.random.Generator) -> Image.Image:
    """A random cut of an RGB picture, scaled to `size` x `size` and mirrored half of the time: a function of `draw`.

    Args:
        picture: The picture.
        size: Height and width of the result.
        least: Smallest share of the area that a cut takes, in (0, 1].
        draw: Source of randomness.
    """
    mirrored = draw.random() < 0.5
    top, left, height, width = random_box(picture.height, picture.width, least, draw)
    cut = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return ImageOps.mirror(cut) if mirrored else cut


_TRIES = 10
_ASPECT = 4 / 3  # widest and tallest cut


def random_box(height: int, width: int, least: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a cut of random area and aspect (Szegedy et al., 2015)."""
    areas = draw.uniform(least, 1, _TRIES)
    aspects = np.exp(draw.uniform(-np.log(_ASPECT), np.log(_ASPECT), _TRIES))
    corner = draw.random(2)
    for area, aspect in zip(areas, aspects, strict=True):
        h, w = round(np.sqrt(area * height * width / aspect)), round(np.sqrt(area * height * width * aspect))
        if 0 < h <= height and 0 < w <= width:
            return round(corner[0] * (height - h)), round(corner[1] * (width - w)), h, w
    return 0, 0, height, width
