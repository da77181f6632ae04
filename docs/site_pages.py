"""What the site has beside `docs/`: the READMEs, an API page for each package, and links that lead where a reader of the site can go."""

import ast
import importlib
import os
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("hier-losses", "hyper-geom", "hier-lora", "mat-align", "hyper-blip", "hyper-icl")
# Pages of the site whose source lies elsewhere or under another name.
PAGES = {
    "README.md": "index.md",
    "docs/index.md": "guides.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    **{f"packages/{name}/README.md": f"packages/{name}.md" for name in PACKAGES},
    **{f"packages/{name}/CHANGELOG.md": f"packages/{name}-changelog.md" for name in PACKAGES},
}
# Folders that readers may be sent to.
FOLDERS = {
    "docs": "guides.md",
    "docs/adr": "adr/index.md",
    "docs/results": "results/first-light.md",
    "docs/benchmarks": "benchmarks/index.md",
    **{f"packages/{name}": f"packages/{name}.md" for name in PACKAGES},
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Add the pages that are not in `docs/`."""
    from mkdocs.structure.files import File

    files.remove(files.get_file_from_path("index.md"))
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    decisions = sorted((ROOT / "docs" / "adr").glob("0*.md"))
    titles = [path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in decisions]
    listed = "\n".join(f"- [{title}]({path.name})" for title, path in zip(titles, decisions, strict=True))
    files.append(
        File.generated(config, "adr/index.md", content=f"# Decisions\n\nWhy things are as they are.\n\n{listed}\n")
    )
    for name in PACKAGES:
        files.append(File.generated(config, f"api/{name}.md", content=reference(name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite relative links: to pages of the site, to files beside them, else to the repository, or to nothing."""
    uri = page.file.src_uri
    source = next((path for path, there in PAGES.items() if there == uri), f"docs/{uri}")
    return rewritten(markdown, source, uri)


def rewritten(text: str, source: str, uri: str) -> str:
    """The text of a page with its links as the site needs them; code stays."""
    address = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["project"]["address"]

    def moved(match: re.Match) -> str:
        picture, label, link = match.groups()
        if "://" in link or link.startswith(("#", "mailto:")):
            return match[0]
        path, mark, anchor = link.partition("#")
        there = os.path.normpath(Path(source).parent / path).replace(os.sep, "/")
        page = PAGES.get(there) or FOLDERS.get(there)
        if page is None and there.startswith("docs/") and (ROOT / there).is_file() and not there.endswith(".py"):
            page = there.removeprefix("docs/")
        if page is not None:
            relative = os.path.relpath(page, Path(uri).parent).replace(os.sep, "/")
            return f"{picture}[{label}]({relative}{mark}{anchor})"
        kind = "tree" if (ROOT / there).is_dir() else "blob"
        return f"[{label}]({address}/{kind}/main/{there})" if address else label

    parts = re.split(r"(^```.*?^```)", text, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def reference(package: str) -> str:
    """The API page of a package: every public name once, where it is to be imported from."""
    root = package.replace("-", "_")
    folder = ROOT / "packages" / package / "src" / root
    files = [path for path in folder.rglob("*.py") if not _private(path.relative_to(folder))]
    # Packages before modules: a name stands where it is imported from, not where it is defined.
    files.sort(key=lambda path: (path.name != "__init__.py", path.relative_to(folder).as_posix()))
    lines, seen = [f"# {package}: reference", ""], set()
    for path in files:
        parts = path.relative_to(folder.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        module = importlib.import_module(name)
        own = []
        for each in getattr(module, "__all__", ()):
            value = getattr(module, each)
            if not (callable(value) and getattr(value, "__doc__", None)) or each.startswith("_") or id(value) in seen:
                continue
            seen.add(id(value))
            own.append(each)
        if not own:
            continue
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines += [f"## `{name}`", "", about.partition("\n\n")[0], ""]
        lines += [line for each in own for line in (f"::: {name}.{each}", "")]
    return "\n".join(lines)


def _private(path: Path) -> bool:
    return any(part.startswith("_") and part != "__init__.py" for part in path.parts)
