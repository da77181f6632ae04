"""Files from strangers: each bad one ends in one sentence, in seconds, and nothing outside its folder is touched."""

import io
import json
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from app_data.read.folder import find_pictures
from app_data.read.pictures import load_picture
from app_data.sets.papers import unpack
from app_data.store.errors import DataError, UnreadablePicture
from hier_lora import HierLoraCLIP, ProductOfExperts
from hier_losses import Taxonomy
from hier_losses.treecuts import TreeCuts

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def fails(result, *words):
    """One sentence on standard error that names the thing, no traceback, exit status 2."""
    status, _, err = result
    assert status == 2, err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: "), err
    for word in words:
        assert word in last


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of a saved LoRA model."""
    return shutil.copytree(trained / "seed-0" / "trained" / "adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*vision)*x", r"vision.*.*.*.*.*proj", "v" * 2000, r"(\w{1,9}){2,}z", "a?" * 30 + "a" * 30]
)
def test_a_pattern_that_searches_for_hours(adapter, pattern):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": pattern}))
    start = time.process_time()
    with pytest.raises(ValueError, match="could search for hours"):
        HierLoraCLIP.from_pretrained(adapter)
    assert time.process_time() - start < 10


def test_a_pattern_that_hides_among_ranks(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"(a*)*b": 4}}))
    with pytest.raises(ValueError, match="could search for hours"):
        HierLoraCLIP.from_pretrained(adapter)


@pytest.mark.parametrize("name", ["hier_lora.json", "taxonomy.json", "adapter_config.json"])
def test_json_nested_without_end_in_an_adapter(adapter, colours, command, name):
    (adapter / name).write_text(DEEP)
    with pytest.raises(ValueError, match="folder must hold"):
        HierLoraCLIP.from_pretrained(adapter)
    fails(command("apps/eval", "predict", str(adapter), str(colours)), str(adapter))


def test_json_nested_without_end_elsewhere(trained, colours, command, tmp_path):
    deep = tmp_path / "deep.json"
    deep.write_text(DEEP)
    tax = Taxonomy.from_paths([("a", "b"), ("a", "c")])
    for read in (
        Taxonomy.from_json,
        lambda path: TreeCuts.from_json(path, tax),
        lambda path: TreeCuts.from_text_cuts(path, tax),
    ):
        with pytest.raises(ValueError, match="nested too deep"):
            read(deep)
    model = shutil.copytree(trained / "seed-0" / "product" / "model", tmp_path / "model")
    for path in model.glob("*.json"):
        if path.name != "backbone.json":
            path.write_text(DEEP)
    with pytest.raises(ValueError, match="folder must hold"):
        ProductOfExperts.from_pretrained(model)
    fails(command("apps/eval", "check", str(colours), "--taxonomy", str(deep)), "nested too deep")
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "result.json").write_text(DEEP)
    fails(command("apps/eval", "predict", str(run), str(colours)))
    lines = tmp_path / "pool.jsonl"
    lines.write_text(DEEP + "\n")
    query = str(next(colours.rglob("*.png")))
    fails(command("apps/eval", "select", "--data", str(lines), "--query", query))


def bomb(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"\0" * min(size, 1 << 20)) if size <= 1 << 20 else Zeros(size))
    return path


class Zeros(io.RawIOBase):
    """So many zero bytes that are never in memory."""

    def __init__(self, size):
        self.left = size

    def read(self, size=-1):
        give = min(self.left, size if size > 0 else self.left)
        self.left -= give
        return b"\0" * give


def test_an_archive_with_more_than_the_disk_holds(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    archive = bomb(tmp_path / "bomb.tar.gz", [("train/a/1.png", 1000), ("train/a/2.png", 60_000_000)])
    assert archive.stat().st_size < 100_000
    with pytest.raises(DataError, match="unpacks to more than"):
        unpack(archive, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    many = bomb(tmp_path / "many.tar.gz", [(f"train/{i}", 0) for i in range(20_000)])
    with pytest.raises(DataError, match="unpacks to more than"):
        unpack(many, tmp_path / "cache")


def test_an_archive_that_climbs_out(tmp_path):
    archive = bomb(tmp_path / "up.tar.gz", [("../../outside.txt", 4)])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "cache" / "inner")
    assert not list(tmp_path.rglob("outside.txt"))


def test_lists_that_name_files_elsewhere(colours, command, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    rows = [path.relative_to(colours) for path in sorted(colours.rglob("*.png"))]
    own = "".join(f"{row},{row.parts[-2]}\n" for row in rows)
    for name in (str(secret), f"../{secret.parent.name}/secret.png", "warm/../../secret.png"):
        listing = tmp_path / "list.csv"
        listing.write_text("path,leaf\n" + own + f"{name},red\n")
        with pytest.raises(DataError, match="does not lie in"):
            find_pictures(colours, listing=listing)
        fails(command("apps/eval", "check", str(colours), "--listing", str(listing)), "secret.png", "--outside")
    listing.write_text("path,leaf\n" + own + f"{secret},red\n")
    assert secret in {file.path for file in find_pictures(colours, listing=listing, outside=True).files}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
        (
            "b.bmp",
            b"BM"
            + (54).to_bytes(4, "little") * 3
            + (40).to_bytes(4, "little")
            + b"\xff\xff\xff\x7f" * 2
            + b"\1\0\x18\0",
        ),
        ("c.gif", b"GIF89a" + b"\xff\xff\xff\xff" + b"\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2"),
        ("d.ppm", b"P6 2000000000 2000000000 255\n"),
        ("e.tif", b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 40),
        ("f.webp", b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff"),
        ("g.jpg", b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x22\0\2\x11\1\3\x11\1"),
    ],
)
def test_pictures_with_huge_or_foreign_headers(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    start = time.process_time()
    with pytest.raises(UnreadablePicture):
        load_picture(tmp_path / name, 32)
    assert time.process_time() - start < 2


# If it became an element, it would change the title.
EVIL_PICTURE = "<img src=x onerror=document.title='changed'>"


def test_names_that_are_markup_stay_text(command, quick, tmp_path):
    evil = ["<script>alert(1)</script>", "=cmd|' /C calc'!A0", "$\\frac{a}{b}$", "a'onload='x", EVIL_PICTURE]
    for number, name in enumerate(evil):
        folder = tmp_path / "data" / name.replace("/", "\N{DIVISION SLASH}")
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = torch.randint(50 * number, 50 * number + 40, (16, 16, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
    out, plain = tmp_path / "run", [word for word in quick if word != "--lora"]
    status, _, err = command("apps/train", "folder", "--data", str(tmp_path / "data"), "--out", str(out), *plain)
    assert status == 0, err
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    for table in out.glob("*.csv"):
        assert not any(
            cell.strip('"').startswith("=") for line in table.read_text().splitlines() for cell in line.split(",")
        )
    _nothing_runs_in_a_browser(out / "report.html", tmp_path / "browser")


def _nothing_runs_in_a_browser(page: Path, home: Path) -> None:
    """Open a page in Chromium, where there is one: no name has become an element, and none has run."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        return
    quiet = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
    )
    done = subprocess.run(
        [browser, *quiet, f"--user-data-dir={home}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert len(done.stdout) > 1000
    assert "onerror=document" in done.stdout  # the name is there, as text
    assert "<title>changed" not in done.stdout
    assert '<img src="x"' not in done.stdout
    assert "<script" not in done.stdout
