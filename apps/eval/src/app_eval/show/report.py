"""One self-contained HTML page for a run: table, training curves, where mistakes fall in the tree, sample predictions."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app_data.read.pictures import PictureSet
from app_eval.measure.paths import DECODERS, SCORES, Outcome
from app_eval.measure.results import columns_of
from app_eval.show.figures import mistake_bars, png_uri, top_confusion, training_curves

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#1a202c}
h1{margin-bottom:.2rem}h2{margin-top:2.2rem;border-bottom:1px solid #e2e8f0}
table{border-collapse:collapse;font-size:13px;margin:.6rem 0}
th,td{padding:.28rem .6rem;text-align:right;border-bottom:1px solid #edf2f7}th:first-child,td:first-child{text-align:left}
td small{color:#718096;display:block;font-size:10.5px}td.best{font-weight:700}
img{max-width:100%}.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:.8rem}
.card{border:1px solid #e2e8f0;border-radius:8px;padding:.6rem;font-size:12px}
.card img{width:84px;height:84px;float:left;margin-right:.6rem}
.card b{display:block}.right{color:#276749}.wrong{color:#9b2c2c}footer{margin-top:3rem;color:#718096;font-size:12px}
"""


@dataclass(frozen=True)
class ReportContent:
    """What a report shows.

    Attributes:
        title: headline.
        lead: one paragraph on what was trained and tested.
        rows: the results (as in `result.json`) by row name.
        outcomes: the outcomes by row name.
        records: the lines of `metrics.jsonl` of the trained rows.
        test: the test pictures, in the order of the outcomes.
        compared: the rows shown beside each sample picture.
        facts: settings and identities, shown as a list.
        credits: attributions for the pictures.
    """

    title: str
    lead: str
    rows: Mapping[str, dict]
    outcomes: Mapping[str, Outcome]
    records: Mapping[str, Sequence[dict]]
    test: PictureSet
    compared: tuple[str, ...]
    facts: Mapping[str, str]
    credits: tuple[str, ...] = ()


def _confusion(content: ReportContent) -> str:
    compared = {name: content.outcomes[name] for name in content.compared}
    return top_confusion(compared, content.test.taxonomy)


# Heading and picture; one that gives "" is left out.
FIGURES: dict[str, Callable[[ReportContent], str]] = {
    "Training": lambda content: training_curves(content.records) if content.records else "",
    "Where the mistakes fall in the tree": lambda content: mistake_bars(content.outcomes, content.test.taxonomy),
    "Confusion of the top level": _confusion,
}


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page."""
    majority = next(iter(content.rows.values()))["mta_majority"]
    parts = [
        f"<h1>{html.escape(content.title)}</h1><p>{html.escape(content.lead)}</p>",
        "<h2>Scores</h2><p>Value and 95&nbsp;% bootstrap interval over the test pictures. Lower is better for "
        f"{', '.join(score.title for score in SCORES.values() if score.lower)}. HCA and MTA do not depend on the decoder; always "
        f"naming the majority member of each cut gives an MTA of {majority:.3f}.</p>",
        *[f"<h3>decoded by <code>{name}</code></h3>{_table(content.rows, name)}" for name in DECODERS],
        *[f"<h2>{name}</h2><img alt='{name}' src='{uri}'>" for name, draw in FIGURES.items() if (uri := draw(content))],
        f"<h2>Sample predictions</h2><div class=cards>{_cards(content)}</div>",
        f"<h2>Run</h2><table>{''.join(_fact(k, v) for k, v in content.facts.items())}</table>",
        f"<footer>{'<br>'.join(html.escape(line) for line in content.credits)}</footer>",
    ]
    title = html.escape(content.title)
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    path.write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")


def _fact(name: str, value: str) -> str:
    return (
        f"<tr><td>{html.escape(name)}</td><td style='text-align:left'><code>{html.escape(str(value))}</code></td></tr>"
    )


def _table(rows: Mapping[str, dict], decoder: str) -> str:
    columns = columns_of(rows)
    values = {c: [result["scores"][decoder][c][0] for result in rows.values()] for c in columns}
    best = {c: (np.nanmin if SCORES[c].lower else np.nanmax)(v) for c, v in values.items() if not np.isnan(v).all()}
    head = "<tr><th></th>" + "".join(f"<th>{SCORES[c].title}</th>" for c in columns) + "</tr>"
    body = ""
    for name, result in rows.items():
        cells = ""
        for c in columns:
            value, low, high = result["scores"][decoder][c]
            mark = " class=best" if value == best.get(c) else ""
            cells += f"<td{mark}>{value:.3f}<small>{low:.3f} to {high:.3f}</small></td>"
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table>{head}{body}</table>"


def _cards(content: ReportContent, num: int = 24) -> str:
    tax, test = content.test.taxonomy, content.test
    # Evenly spread over the test set, which is in the order of the taxonomy: no picture is chosen by its score.
    chosen = np.linspace(0, len(test) - 1, min(num, len(test))).round().astype(int)
    cards = []
    for index in chosen:
        item = test[int(index)]
        truth = tax.path_of(item.target)
        lines = [f"<b>{html.escape(' > '.join(truth))}</b>"]
        for name in content.compared:
            path = content.outcomes[name].paths["joint_path"][index]
            names = [tax.names[v] for v in dict.fromkeys(path.tolist()) if v >= 0]
            marks = [
                f"<span class={'right' if level < len(truth) and word == truth[level] else 'wrong'}>{html.escape(word)}</span>"
                for level, word in enumerate(names)
            ]
            lines.append(f"<i>{html.escape(name)}</i>: {' &gt; '.join(marks)}<br>")
        cards.append(f"<div class=card><img alt='' src='{png_uri(item.pixels)}'>{''.join(lines)}</div>")
    return "".join(cards)
