"""Every Python block of the READMEs and the docs runs, top to bottom in one namespace per page, and every relative link leads somewhere."""

import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("packages/*/README.md"), *ROOT.glob("apps/*/README.md"), *ROOT.glob("docs/**/*.md")]
)


def blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    """In this process, since importing torch takes longer than most pages; the page's own names are all that it sees."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        exec(compile(blocks(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        assert (page.parent / target.split("#")[0]).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_drawn_house_is_that_of_the_imports(monkeypatch):
    pytest.importorskip("grimp")
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_architecture

    drawn = make_architecture.drawing(make_architecture.arrows())
    assert drawn == (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8"), "run docs/make_architecture.py"


def test_links_of_the_site(monkeypatch):
    """Pages link to pages, files lie beside them, and what the site does not hold becomes plain text while there is no address."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import site_pages

    text = "[a](../../packages/hier-losses/README.md#use) [b](../data.md) [c](../../noxfile.py) ![d](disk.svg) [e](../adr)\n"
    found = site_pages.rewritten(text, "docs/tutorials/disk.md", "tutorials/disk.md")
    assert found == "[a](../packages/hier-losses.md#use) [b](../data.md) c ![d](disk.svg) [e](../adr/index.md)\n"
    code = "```\n[a](../../noxfile.py)\n```\n"
    assert site_pages.rewritten(code, "docs/data.md", "data.md") == code
