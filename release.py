"""Copy a package with the project's address in its README and metadata, for building: `python release.py NAME FOLDER`.

The address is one setting, `address` under `[tool.project]` in the root pyproject.toml; while it is empty the copy is the
package as it is. On an index a README stands alone, so relative links become links to the main branch at the address.
"""

import argparse
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

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


def main() -> None:
    """Read the command line and name the copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a package of this repository")
    parser.add_argument("folder", type=Path, help="where the copy goes")
    setting = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["project"]["address"]
    parser.add_argument("--address", default=setting, help="in place of the setting")
    args = parser.parse_args()
    sys.stdout.write(f"{prepare(args.name, args.folder, args.address)}\n")


if __name__ == "__main__":
    main()
