"""Every results page, from the stored JSON: short, with its control, judged by the one rule; and what is no source ends in one sentence."""

import ast
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest

import app_eval.show.stories as stories
from app_eval.measure.interval import WORDS, verdict
from app_eval.show.commands import STORIES
from app_eval.show.page import Claims
from app_train.cli import hier as main

RESULTS = Path(__file__).parents[3] / "docs" / "results"
SOURCES = {
    "emoji": ("first-light.json",),
    "tree": ("tree.json",),
    "lora": ("hier-lora.json",),
    "mat": ("mat-align.json", "mat-align-published.json"),
    "blip": ("hyper-blip.json",),
    "icl": (
        "hyper-icl.json",
        "hyper-icl-six.json",
        "hyper-icl-taxonomy.json",
        "--model",
        "hyper-icl-model.json",
        "--distilled",
        "hyper-icl-distilled.json",
    ),
}
CONTROLS = {
    "emoji": "logistic regression",
    "tree": "logistic regression",
    "lora": "nearest training picture",
    "mat": "TreeLDA",
    "blip": "ridge regression on the captions",
    "icl": "vote of the best selector",
}
NAMES = {story: sources[0].removesuffix(".json") for story, sources in SOURCES.items()}


@cache
def told(story):
    module = __import__(f"app_eval.show.stories.{story}", fromlist=["tell"])
    return module.tell(module.collect([RESULTS / name for name in SOURCES[story] if name.endswith(".json")]))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder with all pages written anew, and the pages as data."""
    folder = tmp_path_factory.mktemp("results")
    for story, sources in SOURCES.items():
        arguments = [str(RESULTS / name) if name.endswith(".json") else name for name in sources]
        flags = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
        page = str(folder / f"{NAMES[story]}.md")
        assert main(["page", story, *arguments[:flags], page, *arguments[flags:]]) == 0
    return folder


@pytest.mark.parametrize("story", SOURCES)
def test_the_page_is_short_and_opens_with_a_sentence_a_figure_and_a_table(story, written):
    text = (written / f"{NAMES[story]}.md").read_text()
    assert len(text.split()) <= 1500
    title, sentence, figure, table, *_ = text.split("\n\n")
    assert title.startswith("# ")
    assert re.search(r"\d", sentence)
    assert sentence.endswith(".")
    assert len(re.findall(r"\.(?:\s|$)", sentence)) == 1
    assert figure == f"![{figure[2:].partition(']')[0]}]({NAMES[story]}.svg)"
    rows = table.splitlines()[2:]
    assert 1 < len(rows) <= 6
    assert any(row.startswith(f"| {CONTROLS[story]}") for row in rows)
    assert (written / f"{NAMES[story]}-tables.md").stat().st_size > 2000


@pytest.mark.parametrize("story", SOURCES)
def test_the_pages_in_the_repository_are_the_written_ones(story, written):
    for suffix in (
        ".md",
        "-tables.md",
        ".svg",
        *(
            ".json" if n == NAMES[story] + ".json" else n.removeprefix(NAMES[story])
            for n in SOURCES[story]
            if n.endswith("json")
        ),
    ):
        assert (written / (NAMES[story] + suffix)).read_text() == (RESULTS / (NAMES[story] + suffix)).read_text(), suffix  # fmt: skip


@pytest.mark.parametrize("story", SOURCES)
def test_every_claim_is_called_what_the_rule_says(story, written):
    page = told(story)
    blocks = [part for section in (*page.body, *page.tables) for part in section.parts if isinstance(part, Claims)]
    assert sum(len(block.claims) for block in blocks) > 10
    lines = (written / f"{NAMES[story]}.md").read_text() + (written / f"{NAMES[story]}-tables.md").read_text()
    for block in blocks:
        premise = "better" if block.premise is None else verdict(block.premise.items, block.premise.seeds)
        for claim, word in zip(block.claims, block.words, strict=True):
            assert word == verdict(claim.items, claim.seeds, claim.lower_is_better, premise)
    cell = r"(?:(?:[-+]|n/a)[^|\n]*)?"
    in_text = re.findall(rf"^\| [^|\n]* \| {cell} \| {cell} \| ({'|'.join(WORDS)}) \|$", lines, re.M)
    assert sorted(in_text) == sorted(word for block in blocks for word in block.words)


@pytest.mark.parametrize("path", sorted(Path(stories.__file__).parent.glob("*.py")), ids=lambda p: p.stem)
def test_a_story_holds_no_markdown(path):
    texts = [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    texts = [text for text in texts if not text.startswith(("What ", "All ", "The ", "A ", "1 "))]
    assert not [text for text in texts if re.search(r"\*\*|```|\]\(|\| |^#", text)]


DAMAGED = (
    "{", "[1]", "{}", "null", '"text"', '[{"data": "emoji"}]', '{"format": 1, "rows": [{}], "recipe": "lora-study"}',
    '{"recipe": "icl-distill", "format": 1, "result": 3, "studies": [3]}',
)  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("content", DAMAGED)
def test_what_is_no_source_ends_in_one_sentence(story, content, tmp_path, capsys):
    (tmp_path / "source.json").write_text(content)
    assert main(["page", story, str(tmp_path / "source.json"), str(tmp_path / "page.md")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source.json"]


@pytest.mark.parametrize("story", SOURCES)
def test_a_truncated_or_thinned_json_ends_in_one_sentence(story, tmp_path, capsys):
    sources = [name for name in SOURCES[story] if name.endswith(".json")]
    for name in sources:
        shutil.copy(RESULTS / name, tmp_path)
    text = (RESULTS / sources[0]).read_text()
    for damaged in (
        text[: len(text) // 2],
        text.replace('"scores"', '"points"').replace('"retrieval"', '"found"').replace('"together"', '"apart"'),
    ):
        (tmp_path / sources[0]).write_text(damaged)
        assert main(["page", story, *(str(tmp_path / name) for name in sources), str(tmp_path / "page.md")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize("story", STORIES)
def test_another_recipes_run_is_named(story, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    assert main(["page", story, str(run), str(tmp_path / "page.md")]) == 2
    assert str(run) in capsys.readouterr().err
    (run / "result.json").write_text(
        json.dumps({"format": 1, "recipe": "cub", "n": 3, "seeds": 1, "titles": {"a": "b"}, "runs": [{"a": {}}]})
    )
    assert main(["page", story, str(run), str(tmp_path / "page.md")]) == 2
    error = capsys.readouterr().err
    assert str(run) in error
    assert error.count("\n") == 1
    assert main(["page", story, str(tmp_path / "none"), str(tmp_path / "page.md")]) == 2
    assert "does not exist" in capsys.readouterr().err
