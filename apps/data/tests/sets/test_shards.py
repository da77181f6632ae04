"""Shards against webdataset's own reader, orders against their definition, and shards that somebody made to do harm."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from app_data.sets import shards
from app_data.sets.shards import Shards
from app_data.sets.stream import Stream
from app_data.store.errors import DataError, TooManyBadFiles


def jpeg(value, size=(12, 9), kind="PNG"):
    content = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(content, kind)
    return content.getvalue()


def add(tar, name, content, **changes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def shard(path, values, more=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for value in values:
            add(tar, f"{value:06d}.png", jpeg(value))
            add(tar, f"{value:06d}.txt", f"picture {value}".encode())
        for name, content in more:
            add(tar, name, content)
    return path


def value_of(sample):
    red, green, _ = sample.picture.getpixel((0, 0))
    assert sample.captions == (f"picture {red + 256 * green}",)
    return red + 256 * green


@pytest.fixture
def two(tmp_path):
    """Two sets: 30 samples in three shards, and 8 in one."""
    for number in range(3):
        shard(tmp_path / "a" / f"{number:03d}.tar", range(10 * number, 10 * number + 10))
    shard(tmp_path / "b" / "0.tar", range(300, 308))
    return [Shards(tmp_path / name, tmp_path / "cache") for name in "ab"]


def test_samples_are_read_by_position(two, tmp_path):
    a, b = two
    assert (len(a), len(b)) == (30, 8)
    assert [value_of(a.read(row)) for row in range(30)] == list(range(30))
    assert a.read(3).picture.size == (12, 9)
    assert a.name(13) == f"sample 3 of {tmp_path / 'a' / '001.tar'}"
    again = Shards(tmp_path / "a", tmp_path / "cache")
    assert again.fingerprint == a.fingerprint != b.fingerprint
    shard(tmp_path / "a" / "001.tar", range(10, 19))
    changed = Shards(tmp_path / "a", tmp_path / "cache")
    assert len(changed) == 29
    assert changed.fingerprint != a.fingerprint
    # A file of one shard is a set too.
    assert len(Shards(tmp_path / "b" / "0.tar", tmp_path / "cache")) == 8


def test_layout_is_webdatasets(tmp_path):
    """Its writer's shards, and every sample that its reader finds."""
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(5):
            sample = {
                "__key__": f"folder.x/{i:03d}",
                "png": jpeg(i),
                "json": json.dumps({"caption": f"picture {i}"}).encode(),
            }
            writer.write(sample if i % 2 else sample | {"txt": f"picture {i}", "cls": b"7"})
    with path.open("rb") as file:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        theirs = list(webdataset.tariterators.group_by_keys(files))
    ours = Shards(path, tmp_path / "cache")
    assert len(ours) == len(theirs) == 5
    for row, sample in enumerate(theirs):
        picture_at, size, *_ = shards.scan(path)[row]
        assert path.read_bytes()[picture_at : picture_at + size] == sample["png"]
        assert value_of(ours.read(row)) == row


def test_members_that_are_no_samples_are_left_out(tmp_path):
    more = [
        ("alone.png", jpeg(1)),
        ("said.txt", b"no picture"),
        ("__key__", b"x"),
        (".hidden.png", jpeg(2)),
        ("x.cls", b"1"),
    ]
    found = Shards(shard(tmp_path / "s.tar", [5], more), tmp_path / "cache")
    assert len(found) == 1
    assert value_of(found.read(0)) == 5
    several = [("k.json", json.dumps({"captions": ["one", " two "]}).encode()), ("k.jpeg", jpeg(9, kind="JPEG"))]
    found = Shards(shard(tmp_path / "t.tar", [], several), tmp_path / "cache")
    assert found.read(0).captions == ("one", "two")


def test_an_epoch_visits_every_picture_once_and_is_a_function_of_the_seed(two):
    stream = Stream(two[:1], window=7, seed=3)
    epochs = [stream.order(epoch)[:].tolist() for epoch in range(3)]
    assert len(stream.order(0)) == 30
    for rows in epochs:
        assert sorted(rows) == list(range(30))
    assert epochs[0] != epochs[1] != epochs[2]
    # Anywhere, in any pieces, by anybody: the same rows.
    fresh = Stream(two[:1], window=7, seed=3)
    assert fresh.order(1)[11:19].tolist() == epochs[1][11:19]
    assert fresh.order(1)[28:40].tolist() == epochs[1][28:]
    assert Stream(two[:1], window=7, seed=4).order(0)[:].tolist() != epochs[0]
    # A window of one leaves the samples of a shard in order; shards are shuffled all the same.
    plain = Stream(two[:1], window=1).order(0)[:].reshape(3, 10)
    assert (np.diff(plain, axis=1) == 1).all()
    assert sorted(plain[:, 0].tolist()) == [0, 10, 20]
    # Windows stay within what a buffer of that size could hold.
    positions = {row: place for place, row in enumerate(Stream(two[:1], window=1, seed=3).order(0)[:].tolist())}
    assert max(abs(positions[row] - place) for place, row in enumerate(epochs[0])) < 7


def test_ranks_share_an_epoch(two):
    rows = Stream(two[:1]).order(0)[:]
    shares = [rows[rank::3].tolist() for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(30))


def test_weights_hold_in_every_block(two):
    stream = Stream(two, (3, 1), seed=1)
    assert len(stream) == 38
    rows = stream.rows(np.arange(4000))
    for block in rows.reshape(4, 1000):
        assert (block >= 30).sum() == 250
    # Each set goes through epochs of its own.
    small = [row for row in rows.tolist() if row >= 30]
    for start in range(0, 992, 8):
        assert sorted(small[start : start + 8]) == list(range(30, 38))
    assert stream.order(2)[5:9].tolist() == rows[2 * 38 + 5 : 2 * 38 + 9].tolist()
    assert [value_of(stream.read(row)) for row in (0, 29, 30, 37)] == [0, 29, 300, 307]
    # Without weights, sizes.
    assert Stream(two).quota.tolist() == [789, 211]
    assert Stream(two, (1e6, 1)).quota.tolist() == [999, 1]
    for wrong in ((1,), (1, 0), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(DataError, match="weights must be 2 numbers above 0"):
            Stream(two, wrong)
    with pytest.raises(DataError, match="at least 1 sample, got 0"):
        Stream(two, window=0)
    with pytest.raises(DataError, match="at least one set"):
        Stream([])


def test_a_damaged_picture_is_replaced_and_counted(tmp_path):
    more = [
        ("0a.png", b"no picture"),
        ("0a.txt", b"x"),
        ("0b.png", jpeg(3)),
        ("0b.txt", b"\xff\xfe"),
        ("0c.png", jpeg(3)),
    ]
    more += [("0c.txt", b"  ")]
    stream = Stream([Shards(shard(tmp_path / "s.tar", [4, 5], more), tmp_path / "cache")])
    assert len(stream) == 5
    assert [value_of(stream.read(row)) for row in range(5)] == [4, 5, 4, 4, 4]
    assert set(stream.skipped) == {f"sample {i} of {tmp_path / 's.tar'}" for i in (2, 3, 4)}
    assert "not a picture of a known format" in stream.skipped[f"sample 2 of {tmp_path / 's.tar'}"]
    bad = [(f"{i:02d}.{e}", b"x") for i in range(12) for e in ("png", "txt")]
    stream = Stream([Shards(shard(tmp_path / "t.tar", [1], bad), tmp_path / "cache")])
    with pytest.raises(TooManyBadFiles, match="11 of 11 samples cannot be read, more than 1%"):
        stream.read(1)
    stream = Stream([Shards(shard(tmp_path / "u.tar", [], bad[:6]), tmp_path / "cache")])
    with pytest.raises(TooManyBadFiles, match="and the 3 after it cannot be read"):
        stream.read(0)


def test_hostile_shards_are_refused(tmp_path):
    """Nothing is unpacked, so no name leads anywhere; sizes are held to limits and to the file."""
    outside = [("../../outside.png", jpeg(8)), ("../../outside.txt", b"picture 8")]
    found = Shards(shard(tmp_path / "deep" / "er" / "s.tar", [], outside), tmp_path / "cache")
    assert value_of(found.read(0)) == 8
    assert not (tmp_path / "outside.png").exists()

    def refused(words, name="bad.tar"):
        with pytest.raises(DataError, match=words):
            Shards(tmp_path / name, tmp_path / "cache")

    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "bad.tar", "w") as tar:
            add(tar, "a.png", b"", type=kind, linkname="/etc/passwd")
        refused("which is no plain file")
    # A sparse member of a terabyte takes a few bytes.
    pax = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "a.png",
        "GNU.sparse.realsize": str(1 << 40),
    }
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.pax_headers, block = pax, b"1\n0\n1\n".ljust(512, b"\0")
        info.size = len(block)
        tar.addfile(info, io.BytesIO(block))
    refused("which is no plain file")
    # A header may claim any size.
    for name, claimed, words in (
        ("a.png", shards.MOST_PICTURE + 1, "more than"), ("a.txt", shards.MOST_TEXT + 1, "more than"), ("a.png", 4000, "truncated"),
    ):  # fmt: skip
        info = tarfile.TarInfo(name)
        info.size = claimed
        (tmp_path / "bad.tar").write_bytes(info.tobuf() + b"x" * 512)
        refused(words)
    whole = shard(tmp_path / "whole.tar", range(3)).read_bytes()
    (tmp_path / "bad.tar").write_bytes(whole[:4000])
    refused("damaged|truncated|no picture")
    (tmp_path / "bad.tar").write_bytes(b"no tar at all")
    refused("no uncompressed tar archive")
    with tarfile.open(tmp_path / "bad.tar", "w:gz") as tar:
        add(tar, "a.png", jpeg(1))
    refused("no uncompressed tar archive")
    (tmp_path / "empty").mkdir()
    refused("holds no tar archives", "empty")
    refused("does not exist", "none.tar")
    refused("holds no picture with a caption", shard(tmp_path / "bare.tar", []).name)


def test_a_shard_that_changes_under_a_run_is_noticed(tmp_path):
    path = shard(tmp_path / "s.tar", range(3))
    found = Shards(path, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="has changed since the run began"):
        found.read(2)
