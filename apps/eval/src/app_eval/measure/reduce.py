"""Reduce the runs of a study to one small JSON file, which is all that its results page needs.

A row is a mean over seeds with a 95 % bootstrap interval over the test pictures; its difference to leaf cross-entropy,
decoded bottom-up, is paired by picture and seed. Nothing is called better or worse here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from app_data.store.errors import DataError
from app_eval.measure.interval import Interval, Pair, mean_over_seeds, paired_difference, resamples
from app_eval.measure.paths import Outcome, per_picture
from app_eval.measure.results import load_outcome
from hier_losses import Taxonomy

FORMAT = 1
# (score, decoder) shown for every row; a score of the logits stands under one decoder.
SHOWN = (
    ("leaf", "bottom_up"),
    ("fpa", "level_argmax"),
    ("fpa", "bottom_up"),
    ("fpa", "joint_path"),
    ("tice", "level_argmax"),
    ("level_1", "level_argmax"),
    ("level_1", "bottom_up"),
    ("severity", "bottom_up"),
    ("ahd", "bottom_up"),
    ("ahd", "joint_path"),
    ("hca", "bottom_up"),
    ("mta", "bottom_up"),
)
BASELINE = "leaf_ce"

Scores = dict[tuple[str, str], Pair]


def reduce_study(study: Path) -> dict:
    """Read every finished run of a study folder.

    Raises:
        DataError: if there is none.
    """
    runs = sorted(study.glob("*/*/*/seed-*/run.json"))
    if not runs:
        raise DataError(f"{study} holds no finished run: run `hier train lora-study` first")
    found = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in runs]
    data = {}
    for path in sorted(study.glob("*/data.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        data[one["name"]] = one
    missing = {run["data"] for _, run in found} - data.keys()
    if missing:
        raise DataError(f"{study / missing.pop() / 'data.json'} is missing: run the study again")
    reducer = _Reducer({name: Taxonomy.from_json(one.pop("tree")) for name, one in data.items()})
    return {
        "format": FORMAT,
        "data": data,
        "seconds": sum(run["seconds"]["cpu"] for _, run in found),
        "rates": _rates(found),
        "rows": reducer.rows([(folder, run) for folder, run in found if run["experiment"] != "tuning"]),
    }


def _rates(found: Sequence[tuple[Path, dict]]) -> dict:
    """Validation AHD@1 of every learning rate tried, by data set and row."""
    table: dict = {}
    for _, run in found:
        if run["experiment"] == "tuning":
            row = run["row"].rsplit("-", 1)[0]
            table.setdefault(run["data"], {}).setdefault(row, {})[f"{run['rate']:g}"] = run["ahd"]
    return table


class _Reducer:
    def __init__(self, trees: Mapping[str, Taxonomy]) -> None:
        self.trees = trees
        self._counts: dict[int, np.ndarray] = {}
        self._scores: dict[Path, Scores] = {}

    def rows(self, runs: Sequence[tuple[Path, dict]]) -> list[dict]:
        """One entry for each row, part and group of pictures, over the seeds at hand."""
        groups: dict[tuple, list[tuple[Path, dict]]] = {}
        for folder, run in runs:
            for part in run["parts"]:
                groups.setdefault((run["experiment"], run["data"], run["row"], part), []).append((folder, run))
        return [entry for key, members in groups.items() for entry in self._entries(key, members, groups)]

    def _entries(self, key: tuple, members: list[tuple[Path, dict]], groups: dict) -> list[dict]:
        experiment, data, row, part = key
        # Every seed hides other leaves, so after an update there are no pictures to pair across seeds: they are joined.
        pool, entries = experiment == "update", []
        facts = [json.loads((folder / part / "facts.json").read_text(encoding="utf-8")) for folder, _ in members]
        for label, pick in self._pictures(experiment, facts):
            scores = [self._of(folder / part, data, pick(i)) for i, (folder, _) in enumerate(members)]
            entry = {
                "experiment": experiment, "data": data, "row": row, "part": part, "pictures": label,
                "seeds": [run["seed"] for _, run in members], "kind": members[0][1]["kind"], "n": len(scores[0]["leaf", "bottom_up"][0]),
                "rates": sorted({run["rate"] for _, run in members}), "facts": self._small(facts),
                **self._means(scores, pool),
            }  # fmt: skip
            other = self._baseline(key, members, groups, pick)
            if other is not None:
                seeds, theirs = other
                name = "against" if experiment == "tree" else "against leaf CE"
                entry[name] = self._differences([scores[i] for i in seeds], theirs, pool)
                entry["paired seeds"] = len(seeds)
            entries.append(entry)
        return entries

    def _pictures(self, experiment: str, facts: list[dict]) -> list[tuple[str, Callable[[int], list[int] | None]]]:
        """The groups of pictures to score: all, and after an update those of old and of new leaves."""
        if experiment != "update":
            return [("all", lambda i: None)]
        return [
            ("old", lambda i: [-1 - leaf for leaf in facts[i]["new leaves"]]),
            ("new", lambda i: facts[i]["new leaves"]),
        ]

    def _of(self, folder: Path, data: str, leaves: list[int] | None) -> Scores:
        """Scores of one outcome; leaves below 0 (as -1 - leaf) are those to leave out."""
        if folder not in self._scores:
            outcome = load_outcome(folder)
            facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
            tax = Taxonomy.from_json(facts["tree"]) if "tree" in facts else self.trees[data]
            self._scores[folder] = _shown(outcome, tax) | {("target", ""): (outcome.target, outcome.target)}
        scores = self._scores[folder]
        target = scores["target", ""][0]
        mask = np.ones(len(target), bool)
        if leaves:
            out = leaves[0] < 0
            mask = np.isin(target, [-1 - v if v < 0 else v for v in leaves]) ^ out
        return {key: (a[mask], b[mask]) for key, (a, b) in scores.items() if key[0] != "target"}

    def _baseline(self, key: tuple, members: list, groups: dict, pick) -> tuple[list[int], list[Scores]] | None:
        """The row that the run names, else leaf cross-entropy: on the same pictures and seeds, of the same experiment or the main one."""
        experiment, data, row, part = key
        prefix = row[: -len(row.split("-")[-1])] if "-" in row else ""
        candidates = [(experiment, data, f"{prefix}{BASELINE}", part), (experiment, data, BASELINE, part)]
        if experiment not in ("update", "towers", "sizes", "tail", "tree"):
            candidates.append(("main", data, BASELINE, ""))
        if "against" in (options := members[0][1].get("options", {})):
            candidates = [(experiment, data, options["against"], part)]
        chosen = next((c for c in candidates if c in groups), None)
        if chosen is None or chosen == key:
            return None
        theirs = {run["seed"]: folder / chosen[3] for folder, run in groups[chosen]}
        shared = [i for i, (_, run) in enumerate(members) if run["seed"] in theirs]
        untrained = members[0][1]["kind"] == "fixed"
        if untrained:  # one outcome stands against every seed of the baseline
            shared, folders = [0] * len(theirs), list(theirs.values())
        else:
            folders = [theirs[members[i][1]["seed"]] for i in shared]
        if not shared:
            return None
        return shared, [self._of(folder, data, pick(i)) for i, folder in zip(shared, folders, strict=True)]

    def _means(self, scores: list[Scores], pool: bool) -> dict:
        return {
            "scores": {f"{s}@{d}": self._mean([x[s, d] for x in scores], pool) for s, d in SHOWN},
            "by_seed": {f"{s}@{d}": [_ratio(x[s, d]) for x in scores] for s, d in SHOWN},
        }

    def _mean(self, pairs: list[Pair], pool: bool) -> list[float | None]:
        pairs = [_joined(pairs)] if pool else pairs
        return _json(mean_over_seeds(pairs, self._resampled(len(pairs[0][0]))))

    def _differences(self, ours: list[Scores], theirs: list[Scores], pool: bool) -> dict:
        found = {}
        for s, d in SHOWN:
            if s != "tice":  # leaf cross-entropy read bottom-up has none by construction
                a, b = [x[s, d] for x in ours], [x[_bottom_up(s)] for x in theirs]
                a, b = ([_joined(a)], [_joined(b)]) if pool else (a, b)
                found[f"{s}@{d}"] = _json(paired_difference(a, b, self._resampled(len(a[0][0]))))
        return found

    def _resampled(self, num: int) -> np.ndarray:
        if num not in self._counts:
            self._counts = {num: resamples(num, 1000)}
        return self._counts[num]

    @staticmethod
    def _small(facts: list[dict]) -> dict:
        """Facts that a page shows: the first seed's, without long lists and trees."""
        return {k: (len(v) if isinstance(v, list) else v) for k, v in facts[0].items() if k != "tree"}


def _shown(outcome: Outcome, tax: Taxonomy) -> Scores:
    tables = {d: per_picture(outcome, tax, d) for d in dict.fromkeys(d for _, d in SHOWN)}
    return {(s, d): tables[d][s] for s, d in SHOWN}


def _json(found: Interval) -> list[float | None]:
    """[value, low, high]; null where there is nothing to divide by, such as the severity of no mistake."""
    return [None if np.isnan(x) else x for x in found.as_json()]


def _ratio(pair: Pair) -> float | None:
    total = pair[1].sum()
    return round(float(pair[0].sum() / total), 6) if total else None


def _joined(pairs: list[Pair]) -> Pair:
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


def _bottom_up(score: str) -> tuple[str, str]:
    """Leaf cross-entropy trains nothing above the leaves, so it is read bottom-up whatever decodes the other row."""
    return (score, "bottom_up") if (score, "bottom_up") in SHOWN else next(pair for pair in SHOWN if pair[0] == score)


def find(study: Mapping, experiment: str, data: str, row: str, part: str = "", pictures: str = "all") -> dict | None:
    """The entry of a reduced study, or None if it was not run."""
    wanted = (experiment, data, row, part, pictures)
    for entry in study["rows"]:
        if (entry["experiment"], entry["data"], entry["row"], entry["part"], entry["pictures"]) == wanted:
            return entry
    return None
