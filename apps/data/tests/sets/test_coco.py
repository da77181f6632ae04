import json
import os
from collections import Counter
from pathlib import Path

import pytest

from app_data.sets.captions import caption_sets
from app_data.sets.coco import find_captions, load_coco_mini
from app_data.store.errors import DataError, TooManyBadFiles


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def load(data, pictures, decoding):
    return caption_sets(find_captions(data, pictures, split=None), decoding)


def karpathy_image(number, split, name, folder=None, cocoid=None):
    sentences = [{"raw": f"caption {j} of {name}.\n", "imgid": number, "sentid": 2 * number + j} for j in range(2)]
    image = {"imgid": number, "split": split, "filename": name, "sentids": [0, 1], "sentences": sentences}
    if folder:
        image |= {"filepath": folder, "cocoid": cocoid}
    return image


def test_karpathy_coco(tmp_path, make_picture, decoding):
    images = []
    for number, split in enumerate(["train", "restval", "val", "test", "test"]):
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{number:012d}.jpg"
        make_picture(tmp_path / folder / name, value=40 * number)
        images.append(karpathy_image(number, split, name, folder, 100 + number))
    parts = load(write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"}), tmp_path, decoding)
    assert {part: data.ids for part, data in parts.items()} == {"train": (100, 101), "val": (102,), "test": (103, 104)}
    assert parts["train"].files[1] == "val2014/COCO_val2014_000000000001.jpg"
    assert parts["val"].captions[0][1] == "caption 1 of COCO_val2014_000000000002.jpg."
    assert 80 <= parts["val"][0].pixels.mean() <= 110


def test_karpathy_of_lavis(tmp_path, make_picture, decoding):
    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (7, 9, 11)]
    for name in names:
        make_picture(tmp_path / name)
    rows = [{"caption": f"caption {j}\n of 7.", "image": names[0], "image_id": "coco_7"} for j in range(2)]
    train = write(tmp_path / "coco_karpathy_train.json", rows)
    alone = load(train, tmp_path, decoding)
    assert set(alone) == {"train"}
    write(tmp_path / "coco_karpathy_val.json", [{"image": names[1], "caption": ["a", "b"]}])
    test = write(tmp_path / "coco_karpathy_test.json", [{"image": names[2], "caption": ["c", "d"]}])
    for file in (train, test):
        parts = load(file, tmp_path, decoding)
        assert {part: (data.ids, data.captions) for part, data in parts.items()} == {
            "train": ((7,), (("caption 0 of 7.", "caption 1 of 7."),)), "val": ((9,), (("a", "b"),)), "test": ((11,), (("c", "d"),)),
        }  # fmt: skip
    with pytest.raises(DataError, match="row 1 of .* is not in LAVIS's form"):
        load(write(tmp_path / "x_train.json", [rows[0], {"image": names[0]}]), tmp_path, decoding)
    own = load(write(tmp_path / "own_train.json", [{"path": names[0], "caption": "a"}]), tmp_path, decoding)
    assert own["test"].captions == (("a",),), "a table of another form may have such a name"


def test_karpathy_flickr(tmp_path, make_picture, decoding):
    images = [karpathy_image(i, split, f"{i}.jpg") for i, split in enumerate(["train", "val", "test"])]
    for i in range(3):
        make_picture(tmp_path / f"{i}.jpg")
    parts = load(write(tmp_path / "dataset_flickr30k.json", {"images": images}), tmp_path, decoding)
    assert {part: (data.ids, data.files) for part, data in parts.items()} == {
        "train": ((0,), ("0.jpg",)), "val": ((1,), ("1.jpg",)), "test": ((2,), ("2.jpg",)),
    }  # fmt: skip


def test_karpathy_counts_missing_pictures(tmp_path, make_picture, decoding):
    images = [karpathy_image(i, "test", f"{i}.jpg") for i in range(3)]
    make_picture(tmp_path / "1.jpg")
    path = write(tmp_path / "d.json", {"images": images})
    data = load(path, tmp_path, decoding)["test"]
    assert data.ids == (1,)
    assert [bad.path for bad in data.skipped] == ["0.jpg", "2.jpg"]
    with pytest.raises(TooManyBadFiles):
        load(path, tmp_path, type(decoding)(size=8, cache_dir=tmp_path / "c", max_bad_files=1))


@pytest.fixture
def coco(tmp_path, make_picture):
    """A folder in COCO's form with two parts of two pictures each."""
    for part, start in (("train2017", 0), ("val2017", 10)):
        images = [{"id": start + i, "file_name": f"{start + i:012d}.jpg", "height": 24, "width": 20} for i in range(2)]
        for image in images:
            make_picture(tmp_path / "coco" / part / image["file_name"], value=4 * image["id"])
        notes = [{"image_id": start + i % 2, "id": i, "caption": f"caption {i} "} for i in range(5)]
        write(tmp_path / "coco" / "annotations" / f"captions_{part}.json", {"images": images, "annotations": notes})
        boxes = [
            {"image_id": start, "category_id": 44, "iscrowd": 0, "bbox": [0, 0, 2, 2]},
            {"image_id": start, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 2, 2]},
            {"image_id": start, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 2, 2]},
        ]
        kinds = [{"id": 1, "name": "person"}, {"id": 44, "name": "bottle"}]
        content = {"images": images, "annotations": boxes, "categories": kinds}
        write(tmp_path / "coco" / "annotations" / f"instances_{part}.json", content)
    return tmp_path / "coco"


def test_coco_files(coco, decoding):
    notes = coco / "annotations"
    data = load(notes / "captions_val2017.json", coco / "val2017", decoding)["test"]
    assert data.ids == (10, 11)
    assert data.captions == (("caption 0", "caption 2", "caption 4"), ("caption 1", "caption 3"))
    assert data.objects == ()


def test_coco_in_one_archive_or_folder(coco, decoding, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "mini.tar", "w") as tar:
        for child in coco.iterdir():
            tar.add(child, child.name)
    packed = load_coco_mini(tmp_path / "mini.tar", decoding)
    assert packed.styles == ("train2017", "train2017", "val2017", "val2017")
    assert packed.ids == (0, 1, 10, 11)
    assert packed.objects == (("bottle", "person"), (), ("bottle", "person"), ())
    assert packed.captions == load_coco_mini(coco, decoding).captions
    with pytest.raises(DataError, match="does not exist: give a tar file of COCO"):
        load_coco_mini(tmp_path / "none.tar", decoding)


def test_nocaps(tmp_path, make_picture, decoding):
    domains = ["in-domain", "near-domain", "out-domain"]
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": d, "open_images_id": f"{i}"} for i, d in enumerate(domains)]
    for image in images:
        make_picture(tmp_path / image["file_name"])
    notes = [{"image_id": i, "id": j, "caption": f"c{j}"} for j, i in enumerate([0, 1, 2, 0])]
    path = write(tmp_path / "nocaps_val_4500_captions.json", {"images": images, "annotations": notes})
    data = load(path, tmp_path, decoding)["test"]
    assert data.styles == tuple(domains)
    assert data.captions[0] == ("c0", "c3")
    test = write(tmp_path / "test.json", {"images": [{k: i[k] for k in ("id", "file_name")} for i in images]})
    assert load(test, tmp_path, decoding)["test"].captions == ((), (), ())


def test_bad_files(tmp_path, decoding):
    with pytest.raises(DataError, match="does not exist: give a file of the release"):
        load(tmp_path / "none.json", tmp_path, decoding)
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(DataError, match="is not valid JSON"):
        load(tmp_path / "cut.json", tmp_path, decoding)
    with pytest.raises(DataError, match="list 'images' that is not empty"):
        load(write(tmp_path / "a.json", {"images": []}), tmp_path, decoding)
    with pytest.raises(DataError, match="row 1 of .* must be an object"):
        load(write(tmp_path / "b.json", [1]), tmp_path, decoding)
    with pytest.raises(DataError, match="image 0 of .* is not in Karpathy's form"):
        load(write(tmp_path / "c.json", {"images": [{"id": 1, "sentences": []}]}), tmp_path, decoding)
    with pytest.raises(DataError, match="is not in COCO's form"):
        load(write(tmp_path / "d.json", {"images": [{"id": 1}]}), tmp_path, decoding)


def test_the_real_sample_when_it_is_at_hand(tmp_path):
    archive = Path(os.environ.get("HIER_TEST_DATA", ".")) / "coco_mini_224.tar"
    if not archive.is_file():
        pytest.skip("HIER_TEST_DATA names no folder with a sample of COCO")
    from app_data.read.labelled import Decoding

    data = load_coco_mini(archive, Decoding(size=32, cache_dir=tmp_path))
    assert len(data) == 159
    assert data.skipped == ()
    assert Counter(data.styles) == {"train2017": 80, "val2017": 79}
    assert all(len(captions) >= 5 for captions in data.captions)
    assert sum(len(objects) for objects in data.objects) > 1000


def test_any_form_is_found_without_opening_a_picture(tmp_path):
    """Karpathy's, LAVIS's and COCO's files, a table, and a folder of one of them; no picture is there."""
    images = [karpathy_image(i, split, f"{i}.jpg") for i, split in enumerate(["train", "restval", "test", "test"])]
    karpathy = write(tmp_path / "k" / "dataset_flickr8k.json", {"images": images})
    assert [f.id for f in find_captions(karpathy)] == [2, 3]
    assert [f.id for f in find_captions(tmp_path / "k", split="train")] == [0, 1]
    assert find_captions(karpathy, "elsewhere")[0].path == Path("elsewhere/2.jpg")
    lavis = tmp_path / "l"
    write(lavis / "coco_karpathy_train.json", [{"image": "COCO_000005.jpg", "caption": "a"}])
    write(lavis / "coco_karpathy_test.json", [{"image": "COCO_000007.jpg", "caption": ["b", "c"]}])
    assert [(f.id, f.captions) for f in find_captions(lavis)] == [(7, ("b", "c"))]
    assert [f.path for f in find_captions(lavis, split="train")] == [lavis / "COCO_000005.jpg"]
    rows = {"images": [{"id": 4, "file_name": "x.jpg", "domain": "in-domain"}], "annotations": []}
    assert find_captions(write(tmp_path / "nocaps.json", rows))[0].style == "in-domain"
    table = tmp_path / "t" / "own.csv"
    table.parent.mkdir()
    table.write_text("path,caption,split\na.png,one,val\n")
    assert [f.captions for f in find_captions(table.parent, split="val")] == [("one",)]
    with pytest.raises(DataError, match="has no part 'test', it has val"):
        find_captions(table)
    (table.parent / "more.csv").write_text("path,caption\na.png,one\n")
    with pytest.raises(DataError, match=r"holds more.csv, own.csv: name one of them"):
        find_captions(table.parent)
    with pytest.raises(DataError, match="must hold an object with a list 'images'"):
        find_captions(write(tmp_path / "bad.json", {"pictures": []}))
