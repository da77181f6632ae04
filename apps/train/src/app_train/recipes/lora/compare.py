"""Train and score several rows on one split, over seeds, and write the run's result, table and report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app_eval.measure.results import load_outcome, text_table, write_json
from app_eval.show.report import ReportContent, write_report
from app_train.core.config import FitConfig, LossConfig, config_hash
from app_train.core.records import read_records
from app_train.recipes.lora.rows import Bench, build_model, finished, score_row, train_row

ROWS: dict[str, LossConfig] = {
    "leaf_ce": LossConfig(leaf=1),
    "level_ce": LossConfig(level=1),
    "tp_kl": LossConfig(tp_kl=1),
    "hisce": LossConfig(hisce=1),
    "both": LossConfig(tp_kl=1, hisce=1),
    "both_consistency": LossConfig(tp_kl=1, hisce=1, consistency=1),
}
TITLES = {
    "zero_shot": "zero-shot",
    "leaf_ce": "leaf CE",
    "level_ce": "level CE",
    "tp_kl": "TP-KL",
    "hisce": "HiSCE",
    "both": "TP-KL + HiSCE",
    "both_consistency": "TP-KL + HiSCE + consistency",
}


@dataclass(frozen=True)
class Comparison:
    """What a comparison is called and where it goes.

    Attributes:
        recipe: name of the recipe.
        out: run folder.
        rows: keys of `ROWS`.
        seeds: seeds 0 .. seeds-1.
        title, lead: of the report.
        facts: shown in the report.
    """

    recipe: str
    out: Path
    rows: Sequence[str]
    seeds: int
    title: str
    lead: str
    facts: Mapping[str, str]


def compare(bench: Bench, plan: Comparison, fit_of: Callable[[str], FitConfig], model: str) -> dict:
    """Run what is missing.

    Args:
        bench: data, base model and tree cuts.
        plan: rows, seeds and names.
        fit_of: the settings of each row.
        model: locator of the base model.

    Returns:
        The content of `result.json`; empty on all processes but the first.
    """
    data = f"{bench.train.fingerprint}-{bench.test.fingerprint}"
    main = bench.accelerator.is_main_process
    by_seed: list[dict] = []
    for seed in range(plan.seeds):
        found = {}
        folder = plan.out / f"seed-{seed}"
        if main:
            facts = {
                "recipe": plan.recipe,
                "row": "zero_shot",
                "data": data,
                "config": config_hash(LossConfig(), model=model),
            }
            (folder / "zero_shot").mkdir(parents=True, exist_ok=True)
            found["zero_shot"] = finished(folder / "zero_shot", facts) or score_row(
                bench, build_model(bench, None, seed), folder / "zero_shot", seed=seed, facts=facts
            )
        for row in plan.rows:
            fit, loss = fit_of(row), ROWS[row]
            hashed = config_hash(fit, loss=loss.model_dump(), model=model, template=bench.template, text=bench.text)
            facts = {"recipe": plan.recipe, "row": row, "data": data, "config": hashed}
            found[row] = train_row(bench, TITLES[row], loss, fit, folder / row, seed, facts)
        by_seed.append(found)
    return _conclude(bench, plan, data, by_seed) if main else {}


def _conclude(bench: Bench, plan: Comparison, data: str, by_seed: list[dict]) -> dict:
    first = plan.out / "seed-0"
    names = ["zero_shot", *plan.rows]
    rows = {TITLES[row]: by_seed[0][row] for row in names}
    compared = [TITLES[row] for row in names if row in ("leaf_ce", plan.rows[-1])] or [TITLES["zero_shot"]]
    write_report(
        plan.out / "report.html",
        ReportContent(
            title=plan.title,
            lead=plan.lead,
            rows=rows,
            outcomes={TITLES[row]: load_outcome(first / row) for row in names},
            records={TITLES[row]: read_records(first / row / "metrics.jsonl") for row in plan.rows},
            test=bench.test,
            compared=tuple(compared),
            facts={"data": data, "seeds": str(plan.seeds), "settings": "config.resolved.yaml", **plan.facts},
        ),
    )
    result = {
        "format": 1,
        "recipe": plan.recipe,
        "data": data,
        "n": len(bench.test),
        "seeds": plan.seeds,
        "runs": by_seed,
    }
    write_json(plan.out / "result.json", json.loads(json.dumps(result)))
    print(text_table(rows))  # noqa: T201
    print(f"\nreport: {plan.out / 'report.html'}\nadapters: {plan.out}/seed-*/<row>/adapter")  # noqa: T201
    return result
