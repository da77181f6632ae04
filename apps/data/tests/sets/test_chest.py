"""ChestX-ray14 on a tiny folder in the released format."""

import numpy as np
import pytest

from app_data.read.labelled import Decoding
from app_data.sets.chest import load_chest_xray14
from app_data.store.errors import DataError
from hier_losses.builders import chest_xray14

ROWS = {f"{i:08d}_000.png": ("Edema|Hernia", "No Finding", "Nodule")[i % 3] for i in range(30)}


@pytest.fixture
def release(tmp_path, make_picture):
    root = tmp_path / "cxr"
    root.mkdir()
    text = "Image Index,Finding Labels,Patient ID\n" + "".join(f"{n},{f},{n[:8]}\n" for n, f in ROWS.items())
    (root / "Data_Entry_2017.csv").write_text(text)
    names = list(ROWS)
    (root / "train_val_list.txt").write_text("\n".join(names[:24]) + "\n")
    (root / "test_list.txt").write_text("\n".join(names[24:]) + "\n")
    for i, name in enumerate(names):
        make_picture(root / ("images_001" if i % 2 else "images_002") / "images" / name, i)
    return root


@pytest.fixture
def decoding(tmp_path):
    return Decoding(size=16, cache_dir=tmp_path / "cache", workers=1)


def test_labels_are_closed_upwards(release, decoding):
    parts = load_chest_xray14(release, decoding)
    assert {part: len(data) for part, data in parts.items()}["test"] == 6
    assert len(parts["train"]) + len(parts["val"]) == 24
    tax = chest_xray14().taxonomy
    for data in parts.values():
        assert data.targets.shape == (len(data), tax.num_nodes)
        for file, hot, name in zip(data.files, data.targets, data.names, strict=True):
            findings = [] if ROWS[file] == "No Finding" else ROWS[file].split("|")
            expected = {v for f in findings for v in tax.paths[tax.index(f)].tolist() if v >= 0}
            assert set(np.flatnonzero(hot)) == expected
            assert sorted(name.split("|")) == sorted(findings or [""])
    assert parts["train"].select([0]).targets.shape == (1, tax.num_nodes)


def test_no_patient_stands_in_two_parts(release, decoding):
    text = (release / "Data_Entry_2017.csv").read_text()
    again = [name.replace("_000", "_001") for name in list(ROWS)[:24]]
    (release / "Data_Entry_2017.csv").write_text(text + "".join(f"{name},No Finding,1\n" for name in again))
    (release / "train_val_list.txt").write_text("\n".join([*list(ROWS)[:24], *again]))
    for name in again:
        folder = next(p.parent for p in release.rglob(name.replace("_001", "_000")))
        (folder / name).write_bytes((folder / name.replace("_001", "_000")).read_bytes())
    parts = load_chest_xray14(release, decoding)
    patients = [{file[:8] for file in parts[part].files} for part in ("train", "val")]
    assert not patients[0] & patients[1]
    assert len(parts["train"]) + len(parts["val"]) == 48


def test_what_does_not_fit_is_named(release, decoding):
    (release / "test_list.txt").write_text("99999999_000.png\n")
    with pytest.raises(DataError, match="99999999_000.png.*has no row"):
        load_chest_xray14(release, decoding)
    (release / "test_list.txt").write_text("00000000_000.png\n")
    next(release.rglob("00000000_000.png")).unlink()
    with pytest.raises(DataError, match="is in none of the folders"):
        load_chest_xray14(release, decoding)
    text = (release / "Data_Entry_2017.csv").read_text()
    (release / "Data_Entry_2017.csv").write_text(text.replace("Nodule", "Cold"))
    with pytest.raises(DataError, match="unknown finding 'Cold'"):
        load_chest_xray14(release, decoding)
    (release / "test_list.txt").unlink()
    (release / "Data_Entry_2017.csv").write_text(text)
    with pytest.raises(DataError, match="the file .*test_list.txt does not exist"):
        load_chest_xray14(release, decoding)
