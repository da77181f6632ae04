import io
import tarfile

import pytest
from PIL import Image

from app_data.read.labelled import Decoding
from app_data.sets.papers import (
    load_aircraft,
    load_butterfly200,
    load_cifar100_folders,
    load_cub200,
    load_inaturalist,
    unpack,
)
from app_data.store.errors import DataError


def labels(parts):
    return {
        part: {file: data.taxonomy.path_of(node) for file, node in zip(data.files, data.targets, strict=True)}
        for part, data in parts.items()
    }


@pytest.fixture
def cub(tmp_path, make_picture):
    root = tmp_path / "cub"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Crow"]
    root.mkdir()
    (root / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    images = [f"{name}/{j}.jpg" for name in names for j in range(2)]
    for image in images:
        make_picture(root / "images" / image)
    (root / "images.txt").write_text("".join(f"{i} {image}\n" for i, image in enumerate(images, 1)))
    (root / "image_class_labels.txt").write_text("".join(f"{i} {(i + 1) // 2}\n" for i in range(1, 7)))
    (root / "train_test_split.txt").write_text("".join(f"{i} {i % 2}\n" for i in range(1, 7)))
    table = "order,family,species\nseabirds,albatrosses,Black footed Albatross\n"
    table += "seabirds,albatrosses,Laysan Albatross\nsongbirds,crows,Crow\n"
    (root / "tree.csv").write_text(table)
    return root


def test_cub(cub, decoding):
    found = labels(load_cub200(cub, cub / "tree.csv", decoding=decoding))
    assert list(found) == ["train", "test"]
    assert found["train"]["images/003.Crow/0.jpg"] == ("songbirds", "crows", "Crow")
    assert found["test"]["images/002.Laysan_Albatross/1.jpg"] == ("seabirds", "albatrosses", "Laysan Albatross")
    assert len(found["train"]) == len(found["test"]) == 3


def test_cub_that_does_not_fit(cub, decoding):
    (cub / "train_test_split.txt").write_text("1 1\n")
    with pytest.raises(DataError, match="list different images"):
        load_cub200(cub, cub / "tree.csv", decoding=decoding)
    (cub / "image_class_labels.txt").unlink()
    with pytest.raises(DataError, match="image_class_labels.txt does not exist"):
        load_cub200(cub, cub / "tree.csv", decoding=decoding)
    (cub / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"CUB-200-2011 needs the file .*classes.txt"):
        load_cub200(cub, cub / "tree.csv", decoding=decoding)


def test_cub_class_number_outside(cub, decoding):
    (cub / "image_class_labels.txt").write_text("".join(f"{i} {i}\n" for i in range(1, 7)))
    with pytest.raises(DataError, match="has class number 3, there are 3 classes"):
        load_cub200(cub, cub / "tree.csv", decoding=decoding)
    (cub / "images.txt").write_text("1\n")
    with pytest.raises(DataError, match=r"line 1 of .*images.txt must hold"):
        load_cub200(cub, cub / "tree.csv", decoding=decoding)


@pytest.fixture
def planes(tmp_path, make_picture):
    root = tmp_path / "planes"
    root.mkdir()
    rows = {
        "01": ("Boeing", "Boeing 737", "737-200"),
        "02": ("Boeing", "Boeing 737", "737-300"),
        "03": ("Fokker", "F", "F 70"),
    }
    for part, images in (("train", ("01", "02", "03")), ("val", ("01",)), ("test", ("03",))):
        for column, level in enumerate(("manufacturer", "family", "variant")):
            text = "".join(f"{part[0]}{image} {rows[image][column]}\n" for image in images)
            (root / f"images_{level}_{part}.txt").write_text(text)
        for image in images:
            make_picture(root / "images" / f"{part[0]}{image}.jpg")
    return root


def test_aircraft(planes, decoding):
    found = labels(load_aircraft(planes, decoding))
    assert {part: len(rows) for part, rows in found.items()} == {"train": 3, "val": 1, "test": 1}
    assert found["train"]["images/t02.jpg"] == ("Boeing", "Boeing 737", "737-300")


def test_aircraft_missing_list(planes, decoding):
    for path in planes.glob("images_family_*"):
        path.unlink()
    with pytest.raises(DataError, match="FGVC-Aircraft"):
        load_aircraft(planes, decoding)


def test_butterfly(tmp_path, make_picture, decoding):
    # family subfamily genus species, reversed as in the release: species first; labels count from 1.
    rows = [("a/1.jpg", 1, 1, 1, 1), ("b/1.jpg", 2, 1, 1, 1), ("c/1.jpg", 3, 2, 1, 1)]
    rows += [("d/1.jpg", 4, 3, 2, 1), ("e/1.jpg", 5, 4, 3, 2)]
    for part in ("train", "val", "test"):
        text = "".join(f"{r[0].replace('1.jpg', part + '.jpg')} {r[1]} {r[2]} {r[3]} {r[4]}\n" for r in rows)
        (tmp_path / f"Butterfly200_{part}_release.txt").write_text(text)
        for row in rows:
            make_picture(tmp_path / "images_small" / row[0].replace("1.jpg", f"{part}.jpg"))
    parts = load_butterfly200(tmp_path, decoding=decoding)
    assert {part: len(data) for part, data in parts.items()} == {"train": 5, "val": 5, "test": 5}
    found = labels(parts)["val"]
    assert found["images_small/e/val.jpg"] == ("family 2", "subfamily 3", "genus 4", "e")
    assert found["images_small/b/val.jpg"] == ("family 1", "subfamily 1", "genus 1", "b")
    with pytest.raises(DataError, match="Butterfly-200 needs the file"):
        load_butterfly200(tmp_path / "images_small", decoding=decoding)


@pytest.mark.parametrize("train", ["train", "train_mini"])
def test_inaturalist(tmp_path, make_picture, decoding, train):
    names = [
        "00000_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax",
        "00001_Animalia_Chordata_Aves_Passeriformes_Corvidae_Pica_pica",
    ]
    for name in names:
        make_picture(tmp_path / train / name / "x.jpg")
    make_picture(tmp_path / "val" / names[1] / "y.jpg")
    parts = load_inaturalist(tmp_path, decoding)
    assert {part: len(data) for part, data in parts.items()} == {"train": 2, "val": 1}
    assert parts["val"].names == ("Pica pica",)
    assert parts["train"].taxonomy.num_levels == 7


def test_inaturalist_bad_names(tmp_path, make_picture, decoding):
    make_picture(tmp_path / "train" / "cats" / "x.jpg")
    with pytest.raises(DataError, match="iNaturalist do not fit together: .*eight pieces"):
        load_inaturalist(tmp_path, decoding)


@pytest.fixture
def cifar(tmp_path, make_picture):
    from hier_losses import builders

    root = tmp_path / "cifar"
    for name in builders.cifar100().class_names:
        for part in ("train", "test"):
            make_picture(root / part / name / "0.png")
    return root


def test_cifar_folders(cifar, decoding):
    parts = load_cifar100_folders(cifar, decoding)
    assert {part: len(data) for part, data in parts.items()} == {"train": 100, "test": 100}
    assert labels(parts)["test"]["test/maple_tree/0.png"] == ("trees", "maple_tree")
    assert "maple tree" in parts["test"].node_text


def test_cifar_archive(cifar, decoding, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
        tar.add(cifar / "train", "train")
        tar.add(cifar / "test", "test")
    parts = load_cifar100_folders(tmp_path / "cifar.tar.gz", decoding)
    assert len(parts["train"]) == 100
    monkeypatch.setattr(tarfile, "open", lambda *args: pytest.fail("unpacked twice"))
    load_cifar100_folders(tmp_path / "cifar.tar.gz", decoding)


def test_unsafe_or_damaged_archives(tmp_path, make_picture):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"hi"))
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "bad.tar", tmp_path / "cache")
    assert not (tmp_path / "outside.txt").exists()
    assert list((tmp_path / "cache").iterdir()) == []
    picture = make_picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(picture, tmp_path / "cache")
    with tarfile.open(tmp_path / "cut.tar.gz", "w:gz") as tar:
        tar.add(picture, "a.png")
    whole = (tmp_path / "cut.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "cut.tar.gz", tmp_path / "cache")


def test_decoding_checks():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Decoding(size=0)
    with pytest.raises(ValueError, match="fit must be"):
        Decoding(fit="stretch")
    assert Image.MAX_IMAGE_PIXELS is not None
