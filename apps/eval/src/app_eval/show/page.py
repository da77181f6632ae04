"""The writer of every results page: a story hands over rows, columns, claims and figures as data; the Markdown is made here.

A page opens with one sentence, one figure and one table of at most six rows that holds the strongest simple control. Long tables
stand in a second file beside it. What a claim is called is decided by `app_eval.measure.interval.verdict` alone.
"""

import html
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app_data.store.atomic import write_text
from app_eval.measure.interval import WORDS, Interval, verdict

FIRST_ROWS = 6
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#4a5568")

Value = Interval | float | int | str | None


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, the digits behind the point, and whether a plus sign is shown."""

    title: str
    digits: int = 3
    signed: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table; without values it was not run, and the command says how to run it."""

    title: str
    values: tuple[Value, ...] = ()
    command: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; `first` is the title of the rows' own column."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    first: str = ""
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A difference between two rows, and its intervals over items and over seeds where they are known."""

    text: str
    items: Interval | None
    seeds: Interval | None
    lower_is_better: bool = False
    digits: int = 3

    def word(self, premise: "Claim | None" = None) -> str:
        """What the one rule says of it, where another claim must hold first."""
        return verdict(self.items, self.seeds, self.lower_is_better, "better" if premise is None else premise.word())


@dataclass(frozen=True)
class Claims:
    """Claims that are judged only where the premise came out better."""

    claims: tuple[Claim, ...]
    title: str = ""
    premise: Claim | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What each claim is called on the page."""
        return tuple(claim.word(self.premise) for claim in self.claims)


@dataclass(frozen=True)
class Figure:
    """Values with their intervals, side by side: (title of the panel, {label: value})."""

    alt: str
    panels: tuple[tuple[str, Mapping[str, Interval]], ...]


@dataclass(frozen=True)
class Section:
    """A heading, the command behind it, and what stands below; a tuple of strings is a list."""

    title: str
    parts: tuple["str | tuple[str, ...] | Table | Claims", ...]
    command: str = ""


@dataclass(frozen=True)
class Page:
    """A results page.

    Attributes:
        title: headline.
        outcome: the sentence that says what came out.
        figure, table: what follows it.
        control: title of the row of that table that is the strongest simple control.
        body: the rest of the page.
        tables: what stands in the second file.
        commands: how everything is made, one a line.
        terms: what each abbreviation means; the writer explains it where it first stands.
        credits: attributions.
    """

    title: str
    outcome: str
    figure: Figure
    table: Table
    control: str
    body: tuple[Section, ...]
    tables: tuple[Section, ...]
    commands: tuple[str, ...]
    terms: Mapping[str, str] = field(default_factory=dict)
    credits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        titles = [row.title for row in self.table.rows]
        if len(titles) > FIRST_ROWS:
            raise ValueError(f"the first table must have at most {FIRST_ROWS} rows, got {len(titles)}")
        if self.control not in titles:
            raise ValueError(f"control must be a row of the first table, one of {titles}, got {self.control!r}")


def tally(claims: Sequence[Claim]) -> str:
    """How often each word was said, such as "better 2, undecided 4"."""
    said = Counter(claim.word() for claim in claims)
    return ", ".join(f"{word} {said[word]}" for word in WORDS if said[word]) or "not run"


def write(page: Page, path: Path, data: Sequence[str]) -> None:
    """Write the page, its figure and, beside it, the file of its tables.

    Args:
        page: what to say.
        path: the Markdown file.
        data: names of the JSON files beside it from which it was made.
    """
    tables = path.with_name(f"{path.stem}-tables.md")
    picture = path.with_suffix(".svg")
    links = ", ".join(f"[{name}]({name})" for name in data)
    more = f"All tables: [{tables.name}]({tables.name})." if page.tables else ""
    head = [f"# {page.title}", page.outcome, f"![{_plain(page.figure.alt)}]({picture.name})", _table(page.table)]
    made = "Both files are written from " + links + "; no number in them is typed by hand." if more else (
        f"The page is written from {links}; no number on it is typed by hand."
    )  # fmt: skip
    foot = ["## How it was made", _code(page.commands), f"{made} {more}".strip(), *page.credits]
    write_text(picture, svg(page.figure))
    write_text(path, _finish([*head, *_sections(page.body), *foot], page.terms))
    if page.tables:
        back = f"What they mean stands on [the page]({path.name}); they are made from {links}."
        write_text(tables, _finish([f"# {page.title}: all tables", back, *_sections(page.tables)], page.terms))


def _finish(blocks: Sequence[str], terms: Mapping[str, str]) -> str:
    """The blocks as one text, each term explained in the first block that is neither heading, picture nor command."""
    blocks, open_terms = [block for block in blocks if block], dict(terms)
    for i, block in enumerate(blocks):
        if not block.startswith(("#", "![", "```")):
            for term, meaning in list(open_terms.items()):
                # Not inside a longer name such as hier-LoRA or LoRA-2.
                found = re.search(rf"(?<![\w-]){re.escape(term)}(?![\w-])", block)
                if found:
                    block = f"{block[: found.end()]} ({meaning}){block[found.end() :]}"
                    del open_terms[term]
            blocks[i] = block
    return "\n\n".join(blocks).encode("ascii", "xmlcharrefreplace").decode() + "\n"


def _sections(sections: Sequence[Section]) -> list[str]:
    blocks = []
    for section in sections:
        blocks += [f"## {section.title}", _code([section.command]) if section.command else ""]
        for part in section.parts:
            if isinstance(part, Table):
                blocks.append(_table(part))
            elif isinstance(part, Claims):
                blocks += _claims(part)
            else:
                blocks.append(part if isinstance(part, str) else "\n".join(f"- {line}" for line in part))
    return blocks


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(map(_plain, line)) for line in (heads, *rows)]
    return "\n".join(["| " + lines[0] + " |", "|---" * len(heads) + "|", *(f"| {line} |" for line in lines[1:])])


def _plain(text: str) -> str:
    """Text as a cell: one line, no bars, no mark-up (a caption may hold anything)."""
    return re.sub(r"([*`<]|\](?=\()|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()).replace("|", "/"))


def _table(table: Table) -> str:
    heads = [table.first, *(column.title for column in table.columns)]
    rows, commands = [], []
    for row in table.rows:
        if not row.values:
            rows.append([row.title, "not run", *[""] * (len(table.columns) - 1)])
            commands += [row.command] if row.command and row.command not in commands else []
            continue
        rows.append([row.title, *(_value(v, c) for v, c in zip(row.values, table.columns, strict=True))])
    parts = [f"**{table.title}**" if table.title else "", _grid(heads, rows), table.note]
    if commands:
        parts += ["What was not run:", _code(commands)]
    return "\n\n".join(part for part in parts if part)


def _value(value: Value, column: Column) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return f"{value:,}"
    spec = f"{'+' if column.signed else ''}.{column.digits}f"
    if not isinstance(value, Interval):
        return "n/a" if math.isnan(value) else format(value, spec)
    if math.isnan(value.value):
        return "n/a"
    known = math.isfinite(value.low) and math.isfinite(value.high)
    bounds = f" [{format(value.low, spec)}, {format(value.high, spec)}]" if known else ""
    return format(value.value, spec) + bounds


def _claims(block: Claims) -> list[str]:
    rows, premise = [], block.premise
    for claim, word in zip(block.claims, block.words, strict=True):
        column = Column("", claim.digits, signed=True)
        rows.append([claim.text, _value(claim.items, column), _value(claim.seeds, column), word])
    parts = [f"**{block.title}**" if block.title else ""]
    if premise is not None and premise.word() != "better":
        parts.append(f"Nothing is ranked here, because this is not shown: {premise.text} is {premise.word()}.")
    return [*parts, _grid(("compared", "over items", "over seeds", "verdict"), rows)] if rows else []


def svg(figure: Figure) -> str:
    """Dots with their intervals, one panel beside the other, as SVG: any script in a name is shown by the reader's own fonts."""
    names = list(dict.fromkeys(name for _, values in figure.panels for name in values))
    # 12-pixel letters are about 7 pixels wide, those of other scripts twice that.
    wide = [
        max((sum(7 if c.isascii() else 14 for c in t) for t in texts), default=0)
        for texts in (names, [t for t, _ in figure.panels])
    ]
    label, width, line, top = wide[0] + 24, max(210, wide[1]), 22, 34
    total = (label + (width + 20) * len(figure.panels) + 20, top + line * len(names) + 30)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" font-family="sans-serif" font-size="12">',
        f'<title>{html.escape(figure.alt)}</title><rect width="100%" height="100%" fill="white"/>',
    ]
    for row, name in enumerate(names):
        parts.append(_text(label - 8, top + line * row + 16, name, "end", COLOURS[row % len(COLOURS)]))
    for number, (title, values) in enumerate(figure.panels):
        left = label + (width + 20) * number
        shown = {name: v for name, v in values.items() if math.isfinite(v.value)}
        ends = [x for v in shown.values() for x in (v.value, v.low, v.high) if math.isfinite(x)] or [0.0]
        low, high = min(0.0, *ends), max(0.0, *ends) or 1.0

        def at(x: float, left=left, low=low, high=high) -> float:
            return round(left + width * (min(max(x, low), high) - low) / (high - low), 1)

        bottom = top + line * len(names)
        parts.append(_text(left, 18, title, "start", "#1a202c"))
        parts.append(f'<path d="M{left} {bottom}H{left + width}M{at(0)} {top}V{bottom}" stroke="#a0aec0"/>')
        for x in (low, high):
            parts.append(_text(at(x), bottom + 18, f"{x:.3g}", "middle", "#4a5568"))
        for row, name in enumerate(names):
            if name in shown:
                v, y, colour = shown[name], top + line * row + 12, COLOURS[row % len(COLOURS)]
                parts.append(f'<path d="M{at(v.low)} {y}H{at(v.high)}" stroke="{colour}" stroke-width="2"/>')
                parts.append(f'<circle cx="{at(v.value)}" cy="{y}" r="4" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]).encode("ascii", "xmlcharrefreplace").decode() + "\n"


def _text(x: float, y: float, text: str, anchor: str, colour: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'
