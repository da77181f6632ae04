"""Train and score the lines of a table on one split, over seeds, and write the run's result, table and report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from app_eval.measure.class_tables import write_class_tables
from app_eval.measure.results import load_outcome, short_table, text_table
from app_eval.show.report import ReportContent, write_report
from app_train.core.records import read_records
from app_train.core.run_folder import Run
from app_train.recipes.lora.losses import ROWS
from app_train.recipes.lora.settings import FitConfig
from app_train.recipes.lora.task import Task, train_row, zero_shot_row


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        name: of its folder.
        title: in the table.
        make: from its folder and a seed to the content of its `result.json`; reads a finished one back.
        everywhere: whether all processes take part; else the first one does it alone.
    """

    name: str
    title: str
    make: Callable[[Path, int], dict]
    everywhere: bool = True


@dataclass(frozen=True)
class Story:
    """What the report says beside the numbers.

    Attributes:
        title, lead: headline and first paragraph.
        hint: what to do next, printed last, where `{run}` stands for the folder of the run.
        facts: shown as a list.
        compared: names of the lines shown beside each sample picture.
        tables: the line whose classes.csv and confusion.csv are written; "" for none.
        credits: attributions for the pictures.
    """

    title: str
    lead: str
    hint: str
    facts: Mapping[str, str] = field(default_factory=dict)
    compared: Sequence[str] = ()
    tables: str = ""
    credits: tuple[str, ...] = ()


def zero_shot_line(task: Task) -> Line:
    """The model as it is."""

    def make(folder: Path, seed: int) -> dict:
        return zero_shot_row(task, folder, seed, task.run.facts("zero_shot", seed))

    return Line("zero_shot", "zero-shot", make, everywhere=False)


def trained_lines(task: Task, rows: Sequence[str], fit_of: Callable[[str], FitConfig], prefix: str = "") -> list[Line]:
    """One line for each loss of `ROWS`."""

    def make(row: str, folder: Path, seed: int) -> dict:
        facts = task.run.facts(row, seed, fit=fit_of(row).model_dump(mode="json"))
        return train_row(task, ROWS[row].title, ROWS[row].loss, fit_of(row), folder, seed, facts)

    return [Line(row, prefix + ROWS[row].title, partial(make, row)) for row in rows]


def compare(
    task: Task,
    lines: Sequence[Line],
    seeds: int,
    story: Story,
    more: Callable[[], Mapping[str, object]] = dict,
) -> dict:
    """Run what is missing; then table, result and report.

    Args:
        task: what all lines share.
        lines: of the table.
        seeds: seeds 0 .. seeds-1.
        story: what the report says beside the numbers.
        more: further content of the result, asked for when all lines are finished.

    Returns:
        The content of `result.json`; empty on all processes but the first.
    """
    run = task.run
    by_seed: list[dict] = []
    for seed in range(seeds):
        results = {}
        for line in lines:
            run.check()
            if line.everywhere or run.main:
                results[line.name] = line.make(run.out / f"seed-{seed}" / line.name, seed)
        by_seed.append(results)
    if not run.main:
        return {}
    titles = {line.name: line.title for line in lines}
    result = run.finish(
        {"n": len(task.test), "seeds": seeds, "titles": titles, "hint": story.hint, "runs": by_seed, **more()}
    )
    _report(task, result, story)
    if story.tables:
        found = load_outcome(run.out / "seed-0" / story.tables)
        answers = found.paths.get("chosen", found.paths["bottom_up"])[:, -1]
        write_class_tables(run.out, answers.tolist(), found.target.tolist(), task.test.taxonomy)
    run.seal()
    return show(result, run)


def read_back(run: Run) -> dict | None:
    """The result of a finished run of the same command, after printing its table; None if something is missing."""
    known = run.result()
    return None if known is None else show(known, run) if run.main else {}


def show(result: dict, run: Run) -> dict:
    """Print the table of a finished run, and return the result."""
    rows = {result["titles"][name]: row for name, row in result["runs"][0].items()}
    print(short_table(rows) if "headline" in result else text_table(rows))  # noqa: T201
    print(f"\nreport: {run.out / 'report.html'}\n{result['hint'].replace('{run}', str(run.out))}")  # noqa: T201
    return result


def _report(task: Task, result: Mapping, story: Story) -> None:
    first, titles = task.run.out / "seed-0", result["titles"]
    records = {titles[name]: read_records(first / name / "metrics.jsonl") for name in titles}
    write_report(
        task.run.out / "report.html",
        ReportContent(
            title=story.title,
            lead=story.lead,
            rows={titles[name]: row for name, row in result["runs"][0].items()},
            outcomes={titles[name]: load_outcome(first / name) for name in titles},
            records={title: lines for title, lines in records.items() if lines},
            test=task.test,
            compared=tuple(titles[name] for name in story.compared if name in titles),
            facts={
                "data": result["data"],
                "seeds": str(result["seeds"]),
                "settings": "config.resolved.yaml",
                **story.facts,
            },
            credits=story.credits,
        ),
    )
