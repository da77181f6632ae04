"""What is written through a temporary name, where the disk is full."""

import errno
import shutil
from collections import namedtuple

import pytest
from safetensors import SafetensorError

from app_data.store.atomic import new_file, new_folder

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("write", [new_file, new_folder])
@pytest.mark.parametrize("error", [SafetensorError("I/O error"), RuntimeError("unexpected pos 576 vs 534")])
def test_a_full_disk_is_said_as_such(write, error, tmp_path, monkeypatch):
    place = tmp_path / "there" / "x"
    for free, expected in ((0, OSError), (1 << 20, type(error))):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(1 << 30, 1 << 30, free))
        with pytest.raises(expected) as found, write(place):
            raise error
        if not free:
            assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(tmp_path / "there"))
            assert found.value.__cause__ is error
    assert list((tmp_path / "there").iterdir()) == []


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), new_file(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere")
