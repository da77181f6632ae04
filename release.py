"""Releases: copy a package for building, and give it its next version.

    python release.py copy NAME FOLDER      with the project's address in README and metadata; `nox -s build` calls it
    python release.py bill NAME FOLDER      what its wheel stands on, in CycloneDX's JSON; `nox -s build` writes it beside the wheel
    python release.py bump NAME 0.2.0       version, and the changelog's "Unreleased" under that version and today's date

The address is one setting, `address` under `[tool.project]` in the root pyproject.toml; while it is empty the copy is the
package as it is. On an index a README stands alone, so relative links become links to the main branch at the address.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tomllib
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def absolute_links(text: str, folder: Path, address: str) -> str:
    """Turn the relative links of a page in `folder` into links to the address; code blocks stay.

    Raises:
        ValueError: a link that leads nowhere in the repository.
    """

    def moved(match: re.Match) -> str:
        picture, label, link = match.groups()
        if "://" in link or link.startswith(("#", "mailto:")):
            return match[0]
        path, mark, anchor = link.partition("#")
        file = Path(os.path.normpath(folder / path))
        if not file.exists():
            raise ValueError(f"{folder.name} links to {link!r}, which the repository does not hold")
        kind = "raw" if picture else "tree" if file.is_dir() else "blob"
        return f"{picture}[{label}]({address}/{kind}/main/{file.relative_to(ROOT).as_posix()}{mark}{anchor})"

    parts = re.split(r"(```.*?```)", text, flags=re.S)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def prepare(name: str, out: Path, address: str) -> Path:
    """Copy `packages/name` into `out`, README and metadata filled in; returns the copy."""
    source, copy = ROOT / "packages" / name, out / name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "dist"))
    address = address.rstrip("/")
    if not address:
        return copy
    readme, project = copy / "README.md", copy / "pyproject.toml"
    readme.write_text(absolute_links(readme.read_text(encoding="utf-8"), source, address), encoding="utf-8")
    urls = {"Homepage": address, "Documentation": f"{address}/blob/main/docs/index.md"}
    urls["Changelog"] = f"{address}/blob/main/packages/{name}/CHANGELOG.md"
    lines = "".join(f'{key} = "{value}"\n' for key, value in urls.items())
    text = project.read_text(encoding="utf-8")
    project.write_text(f"{text}\n[project.urls]\n{lines}", encoding="utf-8")
    return copy


def bill(name: str) -> dict:
    """A software bill of materials: the package and everything it needs, as installed here (the versions of `constraints.txt`).

    Raises:
        ValueError: no such package, or something that it needs is not installed.
    """
    project = ROOT / "packages" / name / "pyproject.toml"
    if not project.exists():
        raise ValueError(f"name must be a package of this repository, got {name!r}")
    found: dict[str, dict] = {}
    edges: dict[str, list[str]] = {}

    def add(requirement: Requirement) -> str | None:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            return None
        key = canonicalize_name(requirement.name)
        if key not in found:
            try:
                one = distribution(key)
            except PackageNotFoundError as error:
                raise ValueError(f"{key}, which {name} needs, is not installed here") from error
            said = one.metadata.get("License-Expression") or one.metadata.get("License") or ""
            licence = said.strip().splitlines()[0][:60] if said.strip() else ""
            reference = f"pkg:pypi/{key}@{one.version}"
            found[key] = {
                "type": "library",
                "name": key,
                "version": one.version,
                "purl": reference,
                "bom-ref": reference,
            }
            if licence and licence.upper() != "UNKNOWN":
                found[key]["licenses"] = [{"license": {"name": licence}}]
            edges[key] = []
            edges[key] = [kept for text in one.requires or () if (kept := add(Requirement(text))) is not None]
        return key

    own = canonicalize_name(name)
    add(Requirement(own))
    main = found.pop(own)
    parts = {**found, own: main}
    graph = [
        {"ref": parts[key]["bom-ref"], "dependsOn": sorted(parts[kept]["bom-ref"] for kept in kept_all)}
        for key, kept_all in sorted(edges.items())
    ]
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": {"component": main},
        "components": [found[key] for key in sorted(found)], "dependencies": graph,
    }  # fmt: skip


def bump(name: str, version: str, day: date, root: Path = ROOT) -> None:
    """Give `packages/name` a version, in its module and its changelog.

    Raises:
        ValueError: no such package, a version that does not follow the present one, or an empty changelog.
    """
    package = root / "packages" / name
    about, log = package / "src" / name.replace("-", "_") / "__about__.py", package / "CHANGELOG.md"
    if not about.exists():
        known = ", ".join(
            sorted(path.name for path in (root / "packages").iterdir() if (path / "pyproject.toml").exists())
        )
        raise ValueError(f"name must be one of {known}, got {name!r}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"version must be three numbers such as 0.2.0, got {version!r}")
    text = about.read_text(encoding="utf-8")
    old = re.search(r'__version__ = "([^"]+)"', text)[1]
    if tuple(map(int, version.split("."))) <= tuple(map(int, old.split("."))):
        raise ValueError(f"version must come after {old}, got {version}")
    changes = log.read_text(encoding="utf-8")
    head, mark, rest = changes.partition("## [Unreleased]\n")
    if not mark or not rest.partition("\n## [")[0].strip():
        raise ValueError(f"{log} must have entries under '## [Unreleased]'")
    log.write_text(f"{head}{mark}\n## [{version}] - {day.isoformat()}\n{rest}", encoding="utf-8")
    about.write_text(text.replace(f'"{old}"', f'"{version}"'), encoding="utf-8")


def main() -> int:
    """Read the command line; bad input ends in one sentence and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    copy = commands.add_parser("copy", help="copy a package for building")
    copy.add_argument("name", help="a package of this repository")
    copy.add_argument("folder", type=Path, help="where the copy goes")
    setting = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["project"]["address"]
    copy.add_argument("--address", default=setting, help="in place of the setting")
    parts = commands.add_parser("bill", help="what its wheel stands on")
    parts.add_argument("name", help="a package of this repository")
    parts.add_argument("folder", type=Path, help="where NAME-VERSION.cdx.json goes")
    new = commands.add_parser("bump", help="give a package its next version")
    new.add_argument("name", help="a package of this repository")
    new.add_argument("version", help="three numbers, such as 0.2.0")
    args = parser.parse_args()
    try:
        if args.command == "copy":
            sys.stdout.write(f"{prepare(args.name, args.folder, args.address)}\n")
        elif args.command == "bill":
            content = bill(args.name)
            version = content["metadata"]["component"]["version"]
            args.folder.mkdir(parents=True, exist_ok=True)
            path = args.folder / f"{args.name.replace('-', '_')}-{version}.cdx.json"
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            sys.stdout.write(f"{path}\n")
        else:
            bump(args.name, args.version, date.today())
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
