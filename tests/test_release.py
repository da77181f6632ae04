"""What an index shows of a package: links that work outside of the repository, addresses in the metadata."""

import filecmp
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/project"
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").exists())


def prepared(name: str, folder: Path, address: str) -> Path:
    args = [sys.executable, str(ROOT / "release.py"), name, str(folder), "--address", address]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.mark.parametrize("name", PACKAGES)
def test_links_and_metadata_of_an_example(name, tmp_path):
    copy = prepared(name, tmp_path, f"{ADDRESS}/")
    text = re.sub(r"```.*?```", "", (copy / "README.md").read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    before = (ROOT / "packages" / name / "README.md").read_text(encoding="utf-8")
    assert len(links) == len(re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", before, flags=re.S)))
    for picture, link in links:
        assert "://" in link or link.startswith("#"), link
        if link.startswith(ADDRESS):
            kind, _, path = link.removeprefix(f"{ADDRESS}/").partition("/main/")
            file = ROOT / path.split("#")[0]
            assert kind == ("raw" if picture else "tree" if file.is_dir() else "blob")
            assert file.exists()
    urls = tomllib.loads((copy / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert urls["Homepage"] == ADDRESS
    assert urls["Changelog"] == f"{ADDRESS}/blob/main/packages/{name}/CHANGELOG.md"
    assert filecmp.dircmp(ROOT / "packages" / name / "src", copy / "src").left_only in ([], ["__pycache__"])


def test_without_an_address_nothing_changes(tmp_path):
    copy, source = prepared("hier-losses", tmp_path, ""), ROOT / "packages" / "hier-losses"
    for name in ("README.md", "pyproject.toml"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
