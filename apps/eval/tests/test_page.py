"""The writer makes the whole page from data: a small page word for word, what was not run, terms, names in any script."""

import xml.etree.ElementTree as ET

import pytest

from app_eval.measure.interval import Interval, over_seeds
from app_eval.show.page import Claim, Claims, Column, Figure, Page, Row, Section, Table, svg, tally, write

UP, DOWN = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1)
TABLE = Table(
    (Column("right", 1), Column("seeds")),
    (Row("nearest", (Interval(24.24, 21.6, 27.0), 3)), Row("LoRA", command="train lora"), Row("LoRA again", command="train lora")),
    note="Brackets are intervals.",
)  # fmt: skip


def page(**changes):
    parts = {
        "title": "A page",
        "outcome": "LoRA classifies 24.2 % correctly.",
        "figure": Figure("dots", (("right", {"nearest": Interval(24.2, 21.6, 27.0)}),)),
        "table": TABLE,
        "control": "nearest",
        "body": (
            Section(
                "Claims",
                ("Text.", ("one", "two"), Claims((Claim("LoRA against CE", UP, None), Claim("CE", None, None)))),
            ),
        ),
        "tables": (Section("All", (TABLE,), "train all"),),
        "commands": ("page it",),
        "terms": {"LoRA": "low-rank adaptation", "CE": "cross-entropy"},
        "credits": ("Drawn by hand.",),
    }
    return Page(**(parts | changes))


GOLDEN = """# A page

LoRA (low-rank adaptation) classifies 24.2 % correctly.

![dots](page.svg)

|  | right | seeds |
|---|---|---|
| nearest | 24.2 [21.6, 27.0] | 3 |
| LoRA | not run |  |
| LoRA again | not run |  |

Brackets are intervals.

What was not run:

```
train lora
```

## Claims

Text.

- one
- two

| compared | over items | over seeds | verdict |
|---|---|---|---|
| LoRA against CE (cross-entropy) | +0.200 [+0.100, +0.300] |  | better |
| CE |  |  | not run |

## How it was made

```
page it
```

Both files are written from [page.json](page.json); no number in them is typed by hand. All tables: [page-tables.md](page-tables.md).

Drawn by hand.
"""


def test_a_small_page_word_for_word(tmp_path):
    write(page(), tmp_path / "page.md", ["page.json"])
    assert (tmp_path / "page.md").read_text() == GOLDEN
    tables = (tmp_path / "page-tables.md").read_text()
    assert tables.startswith("# A page: all tables\n\nWhat they mean stands on [the page](page.md)")
    assert "## All\n\n```\ntrain all\n```\n\n|  | right | seeds |" in tables
    assert "| LoRA (low-rank adaptation) | not run |" in tables
    ET.fromstring((tmp_path / "page.svg").read_text())
    write(page(tables=()), tmp_path / "alone.md", ["page.json"])
    assert not (tmp_path / "alone-tables.md").exists()


def test_the_first_table_is_short_and_holds_the_control():
    rows = tuple(Row(f"row {i}", (1.0, i)) for i in range(7))
    with pytest.raises(ValueError, match="at most 6 rows, got 7"):
        page(table=Table(TABLE.columns, rows), control="row 0")
    with pytest.raises(ValueError, match="control must be a row of the first table"):
        page(control="linear probe")


def test_nothing_is_ranked_where_the_premise_fails(tmp_path):
    for premise, words in ((UP, ("better", "worse", "not run")), (DOWN, ("undecided", "undecided", "not run"))):
        block = Claims(
            (Claim("a", UP, UP), Claim("b", DOWN, None), Claim("c", None, None)),
            premise=Claim("plain against none", premise, None),
        )
        assert block.words == words
        write(page(body=(Section("Claims", (block,)),)), tmp_path / "page.md", [])
        said = "Nothing is ranked here, because this is not shown: plain against none is worse."
        assert (said in (tmp_path / "page.md").read_text()) == (premise is DOWN)


def test_words_are_counted():
    claims = [Claim("", UP, None), Claim("", UP, over_seeds([1.0])), Claim("", DOWN, None), Claim("", UP, UP)]
    assert tally(claims) == "better 2, worse 1, undecided 1"
    assert tally([]) == "not run"


def test_cells_hold_anything(tmp_path):
    nan, half = float("nan"), Interval(1.0, float("-inf"), float("inf"))
    columns = (Column("a|b", 2, signed=True), Column("n"), Column("s"), Column("x"), Column("y"))
    rows = (Row("$5 *bold* \u732b", (half, 1234567, "a | caf\u00e9\n [x](y) <b>", nan, Interval(nan, nan, nan))),)
    write(page(table=Table(columns, rows), control=rows[0].title), tmp_path / "page.md", [])
    text = (tmp_path / "page.md").read_text()
    assert "|  | a/b | n | s | x | y |" in text
    assert "| $5 \\*bold\\* &#29483; | +1.00 | 1,234,567 | a / caf&#233; [x\\](y) \\<b> | n/a | n/a |" in text
    assert text.isascii()


def test_figures_show_any_name():
    values = {
        "$x$ <a> & \u732b": Interval(1.0, 0.5, 2.0),
        "b": Interval(-1.0, float("-inf"), float("inf")),
        "c": Interval(*[float("nan")] * 3),
    }
    text = svg(Figure("dots", (("one", values), ("two", {"b": Interval(0.0, 0.0, 0.0)}), ("none", {}))))
    assert text.isascii()
    root = ET.fromstring(text)
    assert "$x$ <a> & \u732b" in [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3
    assert "nan" not in text
    assert "inf" not in text
