import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from app_data.store import cache
from app_data.store.cache import cached_pictures, fingerprint
from app_data.store.errors import DataError, TooManyBadFiles, UnreadablePicture


def draw(number):
    if number < 0:
        raise UnreadablePicture(f"number {number} is negative")
    return np.full((4, 4, 3), number, dtype=np.uint8)


def refuse(number):
    raise AssertionError("decoded although the cache holds the picture")


def entries(folder):
    return sorted(p.name for p in folder.iterdir() if ".tmp-" not in p.name)


def test_decodes_once(tmp_path):
    pixels, kept, skipped = cached_pictures({"a": 1}, range(5), draw, size=4, cache_dir=tmp_path)
    assert pixels.shape == (5, 4, 4, 3)
    assert pixels.dtype == np.uint8
    assert isinstance(pixels, np.memmap)
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert kept.tolist() == [0, 1, 2, 3, 4]
    assert skipped == ()
    again, _, _ = cached_pictures({"a": 1}, range(5), refuse, size=4, cache_dir=tmp_path)
    np.testing.assert_array_equal(again, pixels)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 1


def test_any_change_of_the_key_decodes_again(tmp_path):
    cached_pictures({"a": 1}, range(5), draw, size=4, cache_dir=tmp_path)
    cached_pictures({"a": 2}, range(5), draw, size=4, cache_dir=tmp_path)
    cached_pictures({"a": 1}, range(4), draw, size=4, cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 3
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


def test_a_new_cache_format_ignores_old_entries(tmp_path, monkeypatch):
    cached_pictures({}, range(3), draw, size=4, cache_dir=tmp_path)
    monkeypatch.setattr(cache, "_FORMAT", cache._FORMAT + 1)
    with pytest.raises(AssertionError):
        cached_pictures({}, range(3), refuse, size=4, cache_dir=tmp_path)


def test_bad_sources_are_listed_and_leave_no_hole(tmp_path):
    for _ in range(2):  # decoded, then from the cache
        pixels, kept, skipped = cached_pictures({}, [3, -1, 5, -2], draw, size=4, cache_dir=tmp_path)
        assert pixels[:, 0, 0, 0].tolist() == [3, 5]
        assert kept.tolist() == [0, 2]
        assert [(bad.path, bad.reason) for bad in skipped] == [
            ("-1", "number -1 is negative"),
            ("-2", "number -2 is negative"),
        ]


@pytest.mark.parametrize(("bad", "count", "fits"), [(3, 50, True), (4, 50, False), (5, 500, True), (6, 500, False)])
def test_budget_is_the_larger_of_share_and_count(tmp_path, bad, count, fits):
    sources = [-1] * bad + [1] * (count - bad)
    kwargs = {"size": 4, "cache_dir": tmp_path, "max_bad_fraction": 0.01, "max_bad_files": 3}
    if fits:
        assert len(cached_pictures({}, sources, draw, **kwargs)[2]) == bad
    else:
        with pytest.raises(TooManyBadFiles, match=f"of {count} files cannot be read.*negative.*max_bad_files"):
            cached_pictures({}, sources, draw, **kwargs)
        assert list(tmp_path.iterdir()) == []


def test_nothing_readable_or_nothing_given(tmp_path):
    with pytest.raises(DataError, match="none of the 2 files can be read.*negative"):
        cached_pictures({}, [-1, -2], draw, size=4, cache_dir=tmp_path)
    with pytest.raises(DataError, match="no picture to decode"):
        cached_pictures({}, [], draw, size=4, cache_dir=tmp_path)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written.*cache_dir"):
        cached_pictures({}, [1], draw, size=4, cache_dir=tmp_path / "file" / "inner")


def truncate(entry):
    file = entry / "pixels.npy"
    file.write_bytes(file.read_bytes()[:-7])


def flip_byte(entry):
    file = entry / "pixels.npy"
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(bytes(content))


def cut_index(entry):
    file = entry / "index.json"
    file.write_text(file.read_text()[:-9])


def wrong_index(entry):
    file = entry / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "kept": "all"}))


def swapped_index(entry):
    """Two pictures change their labels: the pixels are as they were."""
    file = entry / "index.json"
    index = json.loads(file.read_text())
    index["kept"][:2] = [1, 0]
    file.write_text(json.dumps(index))


def list_index(entry):
    (entry / "index.json").write_text("[]")


def empty_pixels(entry):
    (entry / "pixels.npy").write_bytes(b"")


def no_index(entry):
    (entry / "index.json").unlink()


DAMAGES = [truncate, flip_byte, cut_index, wrong_index, swapped_index, list_index, empty_pixels, no_index]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_entry_is_rebuilt(tmp_path, damage):
    cached_pictures({}, range(5), draw, size=4, cache_dir=tmp_path)
    (name,) = entries(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(AssertionError):
        cached_pictures({}, range(5), refuse, size=4, cache_dir=tmp_path)
    pixels, _, _ = cached_pictures({}, range(5), draw, size=4, cache_dir=tmp_path)
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_failure_while_decoding_leaves_nothing(tmp_path):
    def fail(number):
        if number == 3:
            raise RuntimeError("disk on fire")
        return draw(number)

    with pytest.raises(RuntimeError, match="on fire"):
        cached_pictures({}, range(5), fail, size=4, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# A real second process; it decodes slowly so that the test can act in the middle.
BUILD = """
import sys, time
import numpy as np
from app_data.store.cache import cached_pictures

def slow(number):
    time.sleep(0.05)
    return np.full((4, 4, 3), number, dtype=np.uint8)

pixels, _, _ = cached_pictures({}, range(20), slow, size=4, cache_dir=sys.argv[1])
print(int(pixels.sum()))
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder)], stdout=subprocess.PIPE, text=True)


def test_killed_writer_leaves_no_entry(tmp_path):
    with start(tmp_path) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.tmp-*/pixels.npy")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert entries(tmp_path) == []
    (left,) = tmp_path.iterdir()
    pixels, _, _ = cached_pictures({}, range(20), draw, size=4, cache_dir=tmp_path)
    assert pixels[:, 0, 0, 0].tolist() == list(range(20))
    assert left.exists(), "a writer that may still live is left alone"
    os.utime(left, (0, 0))
    cached_pictures({"other": 1}, range(20), draw, size=4, cache_dir=tmp_path)
    assert not left.exists(), "an old one is removed"


def test_two_writers_at_once(tmp_path):
    with start(tmp_path) as one, start(tmp_path) as other:
        sums = [int(process.communicate(timeout=120)[0]) for process in (one, other)]
    assert sums == [sum(range(20)) * 48] * 2
    assert len(list(tmp_path.iterdir())) == 1


def test_the_second_of_two_writers_uses_the_first_entry(tmp_path):
    """The first finishes while the second decodes."""

    def interrupted(number):
        if number == 3:
            cached_pictures({}, range(5), draw, size=4, cache_dir=tmp_path)
        return draw(number + 100)

    pixels, _, _ = cached_pictures({}, range(5), interrupted, size=4, cache_dir=tmp_path)
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert len(list(tmp_path.iterdir())) == 1


def test_progress_shows_at_a_terminal_only(tmp_path, monkeypatch, capsys):
    cached_pictures({}, range(5), draw, size=4, cache_dir=tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cached_pictures({}, range(6), draw, size=4, cache_dir=tmp_path, label="drawing")
    assert "drawing" in capsys.readouterr().err


def test_threads_keep_the_order(tmp_path):
    def jumbled(number):
        time.sleep(0.002 * (number % 3))
        return draw(number)

    pixels, _, _ = cached_pictures({}, range(200), jumbled, size=4, cache_dir=tmp_path, workers=3)
    assert pixels[:, 0, 0, 0].tolist() == list(range(200))


def test_default_folder_lies_in_the_home_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cached_pictures({}, [1], draw, size=4)
    assert len(list((tmp_path / ".cache").glob("*/*/pixels.npy"))) == 1
