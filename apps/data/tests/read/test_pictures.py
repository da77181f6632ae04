import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from app_data.read.labelled import Decoding, PictureFile, decode_files
from app_data.read.pictures import PictureSet, allow_megapixels, load_picture, on_white, square
from app_data.store.errors import DataError, UnreadablePicture
from hier_losses import Taxonomy


def small_set():
    return PictureSet(
        store=np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3),
        rows=np.array([3, 1, 0]),
        targets=np.array([1, 2, 1]),
        styles=("x", "y", "x"),
        names=("cat", "dog", "cat"),
        taxonomy=Taxonomy.from_paths([("animal", "cat"), ("animal", "dog")]),
        fingerprint="f",
        files=("3", "1", "0"),
    )


def test_items_and_batches():
    data = small_set()
    assert len(data) == 3
    item = data[0]
    assert (item.target, item.style, item.name) == (1, "x", "cat")
    np.testing.assert_array_equal(item.pixels, data.store[3])
    batch = data.batch([2, 0])
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(batch[1].permute(1, 2, 0).numpy(), data.store[3])
    assert data.batch(range(0)).shape == (0, 3, 2, 2)
    assert data.batch(torch.tensor([1])).shape == (1, 3, 2, 2)


def test_select_keeps_everything_aligned():
    data = small_set()
    part = data.select([2, 1])
    assert part.names == ("cat", "dog")
    assert part.files == ("0", "1")
    assert part.targets.tolist() == [1, 2]
    np.testing.assert_array_equal(part[0].pixels, data.store[0])
    assert part.store is data.store
    masked = data.select(np.array([False, True, True]))
    assert masked.files == ("1", "0")
    assert masked.select([1]).files == ("0",)
    assert data.select([1]).targets.tolist() == [2]
    assert data.select([1]).styles == ("y",)
    assert len(data.select([])) == 0


def test_select_changes_the_fingerprint():
    data = small_set()
    marks = {data.fingerprint, data.select([0]).fingerprint, data.select([1]).fingerprint}
    assert len(marks) == 3
    assert data.select([0]).fingerprint == data.select([0]).fingerprint


def test_transparent_parts_become_white():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 0))
    assert np.asarray(on_white(rgba)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert np.asarray(on_white(palette)).tolist() == [[[255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (0, 128))
    assert abs(int(np.asarray(on_white(grey))[0, 0, 0]) - 127) <= 1


def test_sixteen_bit_grey_keeps_its_range():
    deep = Image.fromarray(np.array([[0, 256 * 77, 65535]], dtype=np.uint16))
    assert np.asarray(on_white(deep))[0, :, 0].tolist() == [0, 77, 255]


@pytest.mark.parametrize(
    ("values", "kind", "seen"),
    [
        ([0, 2048, 4095], np.uint16, [0, 128, 255]),
        ([0, 128, 255], np.uint16, [0, 128, 255]),
        ([0, 256 * 77, 65535], np.int32, [0, 77, 255]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([0, 100, 255], np.float32, [0, 100, 255]),
    ],
)
def test_deep_grey_is_scaled_by_what_holds_it(tmp_path, values, kind, seen):
    Image.fromarray(np.array([values], dtype=kind)).save(tmp_path / "a.tif")
    assert load_picture(tmp_path / "a.tif", 3, "squash")[1, :, 0].tolist() == pytest.approx(seen, abs=1)


@pytest.mark.parametrize("values", [[-5, 7], [0, 1 << 20], [0.0, float("nan")]])
def test_grey_of_unknown_range_is_refused(tmp_path, values):
    kind = np.float32 if isinstance(values[0], float) else np.int32
    Image.fromarray(np.array([values], dtype=kind)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadablePicture, match="grey values of 32 bits lie in"):
        load_picture(tmp_path / "a.tif", 3)


def test_only_meant_formats_are_opened(tmp_path):
    """Pillow would start Ghostscript on the first and read the second."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "eps.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "tga.tga")
    for name in ("eps.jpg", "tga.tga"):
        with pytest.raises(UnreadablePicture, match="not a picture of a known format"):
            load_picture(tmp_path / name, 8)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"])
def test_other_modes_become_rgb(mode):
    assert on_white(Image.new(mode, (3, 2))).mode == "RGB"


def test_fit():
    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    wide.paste((255, 0, 0), (0, 0, 10, 20))
    crop, pad, squash = (np.asarray(square(wide, 20, fit)) for fit in ("crop", "pad", "squash"))
    assert crop.max() == 0, "the red quarter at the left edge is cut off"
    assert pad[0].min() == 255, "white above"
    assert squash[10, 2].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match="fit must be 'crop', 'pad' or 'squash', got 'stretch'"):
        square(wide, 20, "stretch")


def test_pictures_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (30, 10), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 15, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned by 90 degrees
    picture.save(tmp_path / "a.jpg", exif=exif)
    upright = load_picture(tmp_path / "a.jpg", 10, "squash")
    assert upright[1].mean() > 200
    assert upright[8].mean() < 50


def test_not_a_picture(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UnreadablePicture, match="not a picture"):
        load_picture(tmp_path / "a.png", 8)
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(UnreadablePicture, match="not a picture"):
        load_picture(tmp_path / "empty.jpg", 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff", "ppm"])
def test_truncated(tmp_path, make_picture, suffix):
    whole = make_picture(tmp_path / f"whole.{suffix}", shape=(64, 64))
    load_picture(whole, 8)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UnreadablePicture):
        load_picture(cut, 8)


@pytest.mark.parametrize("limit", [50, 99])
def test_decompression_bomb(tmp_path, monkeypatch, make_picture, limit):
    """Pillow itself only warns between one and two times its limit."""
    path = make_picture(tmp_path / "a.png", shape=(10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            with pytest.raises(UnreadablePicture, match="pixels"):
                load_picture(path, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    load_picture(path, 8)


def test_a_person_may_raise_the_limit(tmp_path, monkeypatch, make_picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = make_picture(tmp_path / "a.png", shape=(10, 10))
    decoding = Decoding(size=8, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="see max_megapixels"):
        decode_files([PictureFile(path, "a.png")], decoding)
    allow_megapixels(None)
    assert Image.MAX_IMAGE_PIXELS == 50
    allow_megapixels(1e-4)
    assert decode_files([PictureFile(path, "a.png")], decoding).pixels.shape == (1, 8, 8, 3)
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DataError, match="max_megapixels must be above 0"):
            allow_megapixels(bad)


def test_limit_of_pillow_stays_on():
    assert Image.MAX_IMAGE_PIXELS is not None
