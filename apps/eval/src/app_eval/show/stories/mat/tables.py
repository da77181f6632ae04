"""The long tables of the page `mat`, run by run."""

from collections.abc import Mapping

from app_eval.measure.solvers import solvers_at_the_end
from app_eval.measure.tree_scores import SCORES
from app_eval.show.page import Column, Row, Section, Table
from app_eval.show.stories.mat import plan


def run_section(found: Mapping, key: plan.Key) -> Section:
    """All rows of a run."""
    entry = found.get(key)
    heads = (
        *(Column(f"{plan.TITLES[s]}, %", 1) for s in SCORES),
        Column("deviation over seeds, %"),
        Column("trained numbers"),
    )
    if entry is None:
        return Section(plan.name_of(key), (Table(heads, (Row("all rows", command=plan.command_of(key)),)),))
    rows = []
    for name, row in entry["rows"].items():
        spread = ", ".join("-" if row["deviation"][s] is None else f"{100 * row['deviation'][s]:.1f}" for s in SCORES)
        trained = row["num_trained"][0] if "num_trained" in row else ""
        rows.append(Row(name, (*(plan.percent(row, s) for s in SCORES), spread, trained)))
    fit = entry["settings"]
    note = (
        f"{entry['num_train']} training and {entry['num_test']} test pictures, {entry['num_nodes']} nodes, {entry['seeds']} seeds; AdamW, "
        f"{fit['epochs']} epochs of batches of {fit['batch_size']}, rate {fit['lr']:g}; curvatures start at {fit['c_img']:g} and "
        f"{fit['c_txt']:g}. The majority member of each cut is right over {100 * entry['mta_majority']:.1f} %."
    )
    claims = [
        plan.claim_of(entry, a, b, s, f"{what}, {plan.TITLES[s]}")
        for what, a, b in plan.compared(entry)
        for s in SCORES
    ]
    absent = [name for name in plan.VARIANTS if key[3] == "main" and name not in entry["rows"]]
    rows += [Row(name, command=plan.absent(key, entry, absent)) for name in absent]
    if key[3] == "main" and not key[2].startswith("mini-"):
        # One picture a class has no spread within its class, which TreeLDA measures.
        absent = [n for n in plan.FITTED if n not in entry["rows"] and (n != "TreeLDA" or key[1] > 1)]
        beside = plan.command_of((*key[:3], "controls"), {**entry, "rows": dict.fromkeys(absent)})
        rows += [Row(name, command=beside) for name in absent]
    tables = (Table(heads, tuple(rows)), plan.block_of(found, key, claims), *_geometry(entry), *_second(entry))
    return Section(plan.name_of(key), (note, *tables), plan.command_of(key, entry))


def _geometry(entry: Mapping) -> list[Table | str]:
    rows = []
    for name, row in entry["rows"].items():
        curves, met = row.get("curvatures"), row.get("met", [])
        ends = ["", ""]
        if curves is not None:
            first, *last = (", ".join(f"{c:.4f}" for c in at[1:]) for at in (curves[0][0], *(x[-1] for x in curves)))
            ends = [first, "; ".join(last)]
        between = "; ".join(f"{100 * x:.0f}" for x in row.get("c_mid_between", []))
        cones = "; ".join("/".join("-" if x != x else f"{100 * x:.1f}" for x in m.values()) for m in met)
        looked = row.get("attention", [])
        shares = " / ".join(f"{sum(x) / len(looked):.2f}" for x in zip(*looked, strict=True))
        if curves is not None or looked:
            rows.append(Row(name, (*ends, between, cones, shares)))
    heads = ("c_img, c_txt, c_mid at the first step", "at the last step, by seed", "steps with c_mid between, %",
             "cones met, %: pictures/texts/across", "attention on tokens, shallow to deep")  # fmt: skip
    note = "Cones are counted in fp64. With unit features of one scale, only the features' own radius can meet a cone."
    return [Table(tuple(Column(h) for h in heads), tuple(rows), note=note)] if rows else []


def _second(entry: Mapping) -> list[Table]:
    rows = {name: row["second"] for name, row in entry["rows"].items() if "second" in row}
    if not rows:
        return []
    scores = tuple(next(iter(rows.values()))[0])
    means = tuple(Row(n, tuple(sum(x[s] for x in by) / len(by) for s in scores)) for n, by in rows.items())
    return [Table(tuple(Column(s) for s in scores), means, title="The second tree, mean over seeds")]


def solvers(main: Mapping) -> Section:
    """Where each way to find c_mid ends."""
    ends = {
        plan.name_of(key): solvers_at_the_end(entry["rows"]["HETEROGENEOUS"]["curvatures"])
        for key, entry in main.items()
        if "curvatures" in entry["rows"].get("HETEROGENEOUS", {})
    }
    heads = tuple(Column(name, 4) for name in next(iter(ends.values()), {}))
    note = (
        "At the curvatures of the last step, mean over seeds. Exact: the minimiser of the summed Kullback-Leibler divergences of wrapped "
        "normals in 384 dimensions, deviation 384^-1/2, space components identified. This says how much the answer moves, not whether a "
        "model gets better by it."
    )
    rows = tuple(Row(name, tuple(found.values())) for name, found in ends.items())
    return Section(
        "Where the other ways to find c_mid would put it", (Table(heads, rows, note=note) if rows else "Not run.",)
    )


def published(stored: Mapping | None) -> list[Section]:
    """The paper's table."""
    if stored is None:
        return []
    rows = [
        Row(f"{r['shots']} shot, {r['method']}", tuple("/".join(f"{x:.2f}" for x in v) for v in r["values"]))
        for r in stored["rows"]
    ]
    rows.append(Row("MTA of the majority", tuple(f"{x:.1f}" for x in stored["majority MTA"])))
    title = next(name for name in stored if name.startswith("HCA"))
    ablation = tuple(Row(name, tuple(values)) for name, values in stored[title].items())
    note = f"LA/HCA/MTA in percent, from {stored['published']}; {stored['models']}. Other models and test sets: compare nothing across."
    places = title.rpartition(" on ")[2].split(", ")
    first, second = (tuple(Column(name, 2) for name in names) for names in (stored["data"], places))
    return [
        Section(
            "Published numbers (the paper's, not ours)",
            (note, Table(first, tuple(rows)), Table(second, ablation, title=title)),
        )
    ]
