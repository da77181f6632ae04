"""What `examine` says of folders with known defects."""

import json
import shutil

import numpy as np
from PIL import Image

from app_data.read.check import check_taxonomy, examine
from app_data.read.folder import find_pictures
from hier_losses import Taxonomy


def split(zoo, make_picture):
    root = zoo.with_name("split")
    shutil.copytree(zoo, root / "train")
    for i, name in enumerate(("animal/cat", "animal/dog", "plant/oak")):
        make_picture(root / "test" / name / "a.png", value=150 + i)
    return root


def test_a_sound_folder(zoo, make_picture, tmp_path):
    report = examine(find_pictures(split(zoo, make_picture)), cache_dir=tmp_path / "cache", whole=True)
    assert report.stops == []
    assert report.parts == {"train": 30, "test": 3}
    assert report.classes["animal/cat"] == {"train": 10, "test": 1}
    assert report.modes == {"RGB": 33}
    assert report.sizes == [(20, 24)] * 3
    assert report.lone_children == ["plant/oak"]
    assert "nothing would spoil a result" in str(report)
    assert json.loads(json.dumps(report.as_json()))["split"] == "folders"


def test_every_defect_is_named(zoo, make_picture, tmp_path):
    root = split(zoo, make_picture)
    shutil.copy(root / "train/animal/cat/0.png", root / "test/animal/cat/again.png")
    shutil.copy(root / "train/animal/cat/1.png", root / "train/animal/dog/other.png")
    shutil.copy(root / "train/animal/cat/2.png", root / "train/animal/cat/twin.png")
    make_picture(root / "test/plant/fern/a.png", value=99)
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(root / "train/plant/oak/deep.png")
    whole = (root / "train/plant/oak/1.png").read_bytes()
    for i in range(3):
        (root / f"train/plant/oak/cut{i}.png").write_bytes(whole[: len(whole) // 2])
    (root / "train/plant/oak/gone.png").symlink_to(root / "nowhere")
    report = examine(find_pictures(root), cache_dir=tmp_path / "cache", whole=True, max_bad_files=2)
    across, budget = sorted(report.stops)[::-1]
    assert "train/animal/cat/0.png" in across
    assert "test/animal/cat/again.png" in across
    assert "4 of 42 files cannot be read, more than 2" in budget
    assert report.lacking == {"train": ["plant/fern"]}
    assert report.depths == {"I;16": 1}
    assert report.dead_links == ["train/plant/oak/gone.png"]
    assert len(report.copies) == 4  # the three cut files are one
    page = str(report)
    for words in ("several classes", "own class and part", "training lacks", "dead links", "more than 8 bits"):
        assert words in page, words


def test_a_taxonomy_alone():
    report = check_taxonomy(Taxonomy.from_paths([("a", "x y"), ("a", "X_y"), ("b", "z")]))
    assert report.lone_children == ["b/z"]
    assert report.look_alikes == [("x y", "X_y")]
