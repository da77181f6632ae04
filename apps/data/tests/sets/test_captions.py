import io
import json
import tarfile

import numpy as np
import pytest

from app_data.sets.captions import CaptionedFile, caption_sets, captioned_files
from app_data.sets.emoji import emoji_leaves, load_emoji, load_emoji_captions
from app_data.store.errors import DataError, TooManyBadFiles


@pytest.fixture
def photos(tmp_path, make_picture):
    """a.png to d.png, of mean grey 10, 50, 90, 130 or so."""
    for i, name in enumerate("abcd"):
        make_picture(tmp_path / "photos" / f"{name}.png", value=40 * i)
    return tmp_path / "photos"


def table(photos, name, text):
    (photos / name).write_text(text)
    return photos / name


def load_captions(source, root=None, decoding=None, **options):
    return caption_sets(captioned_files(source, root, decoding.cache_dir), decoding, **options)


def by_file(data):
    return dict(zip(data.files, data.captions, strict=True))


def test_csv_with_several_captions_of_a_picture(photos, decoding):
    path = table(photos, "c.csv", 'path,caption\na.png,a cat\nb.png,"a dog, running"\na.png, a black cat \n')
    data = load_captions(path, decoding=decoding)["test"]
    assert by_file(data) == {"a.png": ("a cat", "a black cat"), "b.png": ("a dog, running",)}
    assert data.ids == ("a.png", "b.png")
    assert data[1].captions == ("a dog, running",)
    assert 40 <= data[1].pixels.mean() <= 70, "the second picture's own pixels"
    texts, owner = data.flat()
    assert texts == ["a cat", "a black cat", "a dog, running"]
    assert owner.tolist() == [0, 0, 1]
    assert data.batch([1, 0]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.tsv", "filepath\ttitle\na.png\tone\nb.png\ttwo\n"),
        ("c.jsonl", '{"image": "a.png", "caption": ["one"]}\n\n{"image": "b.png", "text": "two"}\n'),
        ("c.json", '[{"file_name": "a.png", "captions": ["one"]}, {"path": "b.png", "caption": "two"}]'),
        ("c.csv", "\ufeffPath,Caption\na.png,one\nb.png,two\n"),
    ],
)
def test_forms_of_tables(photos, decoding, name, text):
    path = photos / name
    path.write_text(text, encoding="utf-8")
    assert by_file(load_captions(path, decoding=decoding)["test"]) == {"a.png": ("one",), "b.png": ("two",)}


def test_pictures_elsewhere(photos, decoding, tmp_path):
    path = table(tmp_path, "c.csv", "path,caption\na.png,one\n")
    assert len(load_captions(path, photos, decoding)["test"]) == 1


def test_split_column_and_ids(photos, decoding):
    splits = {"a": "test", "b": "train", "c": "train", "d": "extra"}
    rows = [{"path": f"{n}.png", "caption": n, "id": i, "split": splits[n]} for i, n in enumerate(splits)]
    path = table(photos, "c.jsonl", "\n".join(json.dumps(row) for row in rows))
    parts = load_captions(path, decoding=decoding)
    assert {part: data.ids for part, data in parts.items()} == {"train": (1, 2), "test": (0,), "extra": (3,)}
    rows[1]["split"] = ""
    with pytest.raises(DataError, match=r"b\.png belongs to no part"):
        load_captions(table(photos, "c.jsonl", "\n".join(json.dumps(row) for row in rows)), decoding=decoding)


def test_each_part_names_its_own_bad_files(photos, decoding):
    path = table(photos, "c.csv", "path,caption,split\na.png,x,train\nno.png,x,train\nb.png,x,test\ngone.png,x,test\n")
    parts = load_captions(path, decoding=decoding)
    assert {part: [bad.path for bad in data.skipped] for part, data in parts.items()} == {
        "train": ["no.png"], "test": ["gone.png"],
    }  # fmt: skip


def test_random_split_depends_on_names_only(photos, decoding):
    path = table(photos, "c.csv", "path,caption\n" + "".join(f"{n}.png,{n}\n" for n in "abcd"))
    back = table(photos, "d.csv", "path,caption\n" + "".join(f"{n}.png,{n}\n" for n in "dcba"))
    shares = {"train": 0.75, "test": 0.25}
    parts = load_captions(path, decoding=decoding, fractions=shares, seed=1)
    again = load_captions(back, decoding=decoding, fractions=shares, seed=1)
    assert {part: len(data) for part, data in parts.items()} == {"train": 3, "test": 1}
    assert {p: set(d.files) for p, d in parts.items()} == {p: set(d.files) for p, d in again.items()}


def test_fingerprint_follows_pictures_and_words(photos, decoding):
    one = load_captions(table(photos, "c.csv", "path,caption\na.png,x\nb.png,y\n"), decoding=decoding)["test"]
    same = load_captions(table(photos, "d.csv", "path,caption\na.png,x\nb.png,y\n"), decoding=decoding)["test"]
    other = load_captions(table(photos, "c.csv", "path,caption\na.png,x\nb.png,z\n"), decoding=decoding)["test"]
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.select([0]).fingerprint != one.select([1]).fingerprint
    part = one.select([False, True])
    assert (part.captions, part.ids, part.files) == ((("y",),), ("b.png",), ("b.png",))
    assert part.broader == part.objects == ()
    assert np.array_equal(part[0].pixels, one[1].pixels)


def test_bad_and_missing_pictures_are_counted_and_named(photos, decoding):
    (photos / "b.png").write_bytes(b"not a picture")
    path = table(photos, "c.csv", "path,caption\na.png,x\nb.png,y\ngone.png,z\nd.png,w\n")
    data = load_captions(path, decoding=decoding)["test"]
    assert data.files == ("a.png", "d.png")
    assert data.captions == (("x",), ("w",))
    assert [(bad.path, bad.reason) for bad in data.skipped] == [
        ("b.png", "it is not a picture of a known format (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM)"),
        ("gone.png", "it does not exist"),
    ]
    strict = type(decoding)(size=8, cache_dir=decoding.cache_dir, workers=1, max_bad_files=1)
    (photos / "c.png").write_bytes(b"")
    path = table(photos, "c.csv", "path,caption\na.png,x\nb.png,y\nc.png,y\n")
    with pytest.raises(TooManyBadFiles, match=r"more than 1 of 3 files.*b\.png"):
        load_captions(path, decoding=strict)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "path,caption\na.png,\n", "row 2 of .* needs a path and a caption"),
        ("c.csv", "picture,words\na.png,x\n", "row 2 of .* needs a path and a caption"),
        ("c.csv", "path,caption\n", "holds no picture with a caption"),
        ("c.jsonl", '{"path": "a.png"}', "row 1 of .* needs a path and a caption"),
        ("c.jsonl", '["a.png", "x"]', "row 1 of .* must be an object"),
        ("c.jsonl", "{", "line 1 of .*c.jsonl is not valid JSON"),
        ("c.txt", "a.png x", "must end in"),
        ("c.jsonl", '{"path": "a.png", "caption": "x", "split": "train"}\n{"path": "a.png", "caption": "y"}', "into the split ''"),
        ("c.jsonl", '{"path": "a.png", "caption": "x", "id": 1}\n{"path": "b.png", "caption": "y", "id": 1}', "same id"),
    ],
)  # fmt: skip
def test_bad_tables(photos, decoding, name, text, message):
    with pytest.raises(DataError, match=message):
        load_captions(table(photos, name, text), decoding=decoding)


def test_missing_sources(tmp_path, decoding):
    with pytest.raises(DataError, match="do not exist"):
        load_captions(tmp_path / "c.csv", decoding=decoding)
    with pytest.raises(DataError, match="holds no tar archives"):
        load_captions(tmp_path, decoding=decoding)


def archive(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_webdataset_archive(photos, decoding, tmp_path):
    members = {
        "0001.png": (photos / "a.png").read_bytes(),
        "0001.txt": "a cat\n",
        "0002.json": '{"caption": "a dog", "width": 20, "path": "elsewhere.png"}',
        "0002.png": (photos / "b.png").read_bytes(),
        "sub/0001.PNG": (photos / "c.png").read_bytes(),
        "sub/0001.txt": "a cow",
        ".hidden": "x",
    }
    data = load_captions(archive(tmp_path / "x.tar", members), decoding=decoding)["test"]
    assert dict(zip(data.ids, data.captions, strict=True)) == {
        "0001": ("a cat",), "0002": ("a dog",), "sub/0001": ("a cow",),
    }  # fmt: skip


def test_folder_of_shards(photos, decoding, tmp_path):
    (tmp_path / "shards").mkdir()
    for shard, name in (("00", "a"), ("01", "b")):
        members = {"1.png": (photos / f"{name}.png").read_bytes(), "1.txt": f"caption {name}"}
        archive(tmp_path / "shards" / f"{shard}.tar", members)
    data = load_captions(tmp_path / "shards", decoding=decoding)["test"]
    assert data.ids == ("00/1", "01/1")
    assert data.captions == (("caption a",), ("caption b",))


def test_bad_archives(photos, decoding, tmp_path):
    with pytest.raises(DataError, match="the sample 1 of .* has no picture, only .txt"):
        load_captions(archive(tmp_path / "x.tar", {"1.txt": "a cat"}), decoding=decoding)
    picture = (photos / "a.png").read_bytes()
    with pytest.raises(DataError, match="the sample 1 of .* has no readable text"):
        load_captions(archive(tmp_path / "y.tar", {"1.json": "{", "1.png": picture}), decoding=decoding)
    with pytest.raises(DataError, match="needs a path and a caption"):
        load_captions(archive(tmp_path / "z.tar", {"1.png": picture}), decoding=decoding)
    (tmp_path / "w.tar").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_captions(tmp_path / "w.tar", decoding=decoding)


def test_sets_without_captions(photos, decoding):
    data = caption_sets([CaptionedFile(photos / "a.png", "a.png", (), 1)], decoding)["test"]
    assert data.captions == ((),)
    assert data.flat()[0] == []


def test_emoji_captions(emoji_assets, tmp_path):
    artists = ("openmoji", "twemoji")
    data = load_emoji_captions(artists, size=16, cache_dir=tmp_path)
    pictures = load_emoji(artists, size=16, cache_dir=tmp_path)
    leaves = emoji_leaves()
    assert len(data) == len(pictures) == 2 * len(leaves)
    assert (data.styles, data.ids, data.taxonomy) == (pictures.styles, pictures.files, pictures.taxonomy)
    for i, leaf in enumerate(leaves + leaves):
        assert data.captions[i][0].endswith(f" {leaf.name}")
        assert data.broader[i] == (leaf.subgroup, leaf.group)
        assert data.taxonomy.path_of(int(data.targets[i])) == leaf.path
        assert data.chain(i) == tuple(leaf.captions())
    cow = next(i for i, leaf in enumerate(leaves) if leaf.name == "water buffalo")
    assert data.chain(cow) == ("a picture of a water buffalo", "mammal", "animals and nature")
    test = data.select([style == "twemoji" for style in data.styles])
    assert len(test) == len(leaves)
    assert test.ids[cow] == "twemoji/1f403"
    assert np.array_equal(test.targets, data.targets[len(leaves) :])
