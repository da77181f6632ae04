"""What an index shows of a package: links that work outside of the repository, addresses in the metadata."""

import filecmp
import json
import re
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/project"
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").exists())


def prepared(name: str, folder: Path, address: str) -> Path:
    args = [sys.executable, str(ROOT / "release.py"), "copy", name, str(folder), "--address", address]
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


@pytest.mark.parametrize("name", PACKAGES)
def test_the_bill_holds_everything_a_wheel_needs(name, tmp_path):
    args = [sys.executable, str(ROOT / "release.py"), "bill", name, str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text(encoding="utf-8"))
    main = content["metadata"]["component"]
    assert (main["name"], path.name) == (name, f"{name.replace('-', '_')}-{main['version']}.cdx.json")
    parts = {one["name"]: one for one in content["components"]}
    declared = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=\[; ]", text)[0].lower().replace("_", "-") for text in declared}
    assert names <= parts.keys()
    assert "torch" in parts
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), flags=re.M))
    for other, version in pinned.items():
        if other.lower() in parts:
            assert parts[other.lower()]["version"].split("+")[0] == version.split("+")[0], other
    references = {one["bom-ref"] for one in [*content["components"], main]}
    assert {edge["ref"] for edge in content["dependencies"]} == references
    assert all(set(edge["dependsOn"]) <= references for edge in content["dependencies"])


def test_a_bill_of_no_package_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "release.py"), "bill", "losses", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (2, "error: name must be a package of this repository, got 'losses'\n")


def test_the_next_version(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import release

    for name in ("src/hier_losses/__about__.py", "CHANGELOG.md", "pyproject.toml"):
        there = tmp_path / "packages/hier-losses" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes((ROOT / "packages/hier-losses" / name).read_bytes())
    log = tmp_path / "packages/hier-losses/CHANGELOG.md"
    log.write_text("# Changelog\n\n## [Unreleased]\n\n- A loss.\n\n## [0.1.0] - 2026-01-01\n\n- All.\n")
    release.bump("hier-losses", "9.0.0", date(2027, 1, 2), tmp_path)
    assert "## [Unreleased]\n\n## [9.0.0] - 2027-01-02\n\n- A loss.\n\n## [0.1.0]" in log.read_text()
    about = tmp_path / "packages/hier-losses/src/hier_losses/__about__.py"
    assert '__version__ = "9.0.0"' in about.read_text()
    before = log.read_text(), about.read_text()
    for name, version, words in (
        ("hier-losses", "9.1.0", "must have entries"),
        ("hier-losses", "8.0.0", "come after 9.0.0, got 8.0.0"),
        ("hier-losses", "9.1", "three numbers such as 0.2.0, got '9.1'"),
        ("losses", "9.1.0", "one of hier-losses, got 'losses'"),
    ):
        with pytest.raises(ValueError, match=words):
            release.bump(name, version, date(2027, 1, 2), tmp_path)
    assert (log.read_text(), about.read_text()) == before
