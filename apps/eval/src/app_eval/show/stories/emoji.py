"""What the recipe `emoji` tells (first light): classifiers on frozen features, LoRA, and what the tree adds, on an artist never seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from app_data.store.errors import DataError
from app_eval.measure.interval import Interval, mean_over_seeds, over_seeds, paired_difference, resamples
from app_eval.show.commands import read_json
from app_eval.show.page import Claim, Claims, Column, Figure, Page, Row, Section, Table
from app_eval.show.stories import EMOJI_CREDIT

PRODUCT, STRONGEST = "product", "logistic"
FIRST = ("neighbour", "lda", STRONGEST, "head", "tree_lda", PRODUCT)
CONTROLS = ("neighbour", "lda", STRONGEST)
TWINS = {"shuffled": "the same on a shuffled tree", "star": "the same without a tree"}
SCORES = {"leaf": "right leaf, %", "ahd": "distance to the truth"}
TERMS = {
    "HXE": "hierarchical cross-entropy: the cross-entropy of every step down the tree, weighed by depth",
    "TreeLDA": "linear discriminant analysis whose class means are shrunk along the tree",
    "LoRA": "low-rank adaptation of the weights",
    "CE": "cross-entropy",
    "TP-KL": "Kullback-Leibler divergence to the path in the tree",
    "HiSCE": "cross-entropy smoothed over siblings",
}
EXPERTS = {
    "head": "head with HXE", "head_star": "head with leaf cross-entropy", "tree_lda": "TreeLDA",
    "tree_lda_star": "TreeLDA without a tree", "prompts": "words",
}  # fmt: skip


def collect(sources: Sequence[Path]) -> dict[str, dict]:
    """Every row of a finished run folder with its intervals and differences; or the JSON of an earlier page."""
    if len(sources) != 1:
        raise DataError(f"the page emoji takes one source, got {len(sources)}")
    run = sources[0]
    stored = read_json(run / "result.json" if run.is_dir() else run)
    if stored.get("recipe") != "emoji" or not {*FIRST} <= stored["titles"].keys():
        raise DataError(
            f"{run} is no run of the recipe emoji: give the folder of a finished one, or the JSON beside its page"
        )
    return {"": _reduced(run, stored) if run.is_dir() else stored}


def _reduced(run: Path, stored: Mapping) -> dict:
    from app_data.sets.emoji import emoji_taxonomy
    from app_eval.measure.paths import per_picture
    from app_eval.measure.results import load_outcome

    tax, counts = emoji_taxonomy(), resamples(stored["n"])

    def pairs(row: str, part: str) -> dict[str, list]:
        found = [load_outcome(run / f"seed-{seed}" / row / part) for seed in range(stored["seeds"])]
        each = [per_picture(one, tax, "chosen" if "chosen" in one.paths else "bottom_up") for one in found]
        return {score: [one[score] for one in each] for score in SCORES}

    every = {row: pairs(row, "") for row in stored["titles"]}
    rows = {}
    for row in stored["titles"]:
        rows[row] = {"together": {s: mean_over_seeds(every[row][s], counts).as_json() for s in SCORES}}
        if (run / "seed-0" / row / "single").is_dir():
            alone = pairs(row, "single")
            rows[row]["alone"] = {s: mean_over_seeds(alone[s], counts).as_json() for s in SCORES}
    against = {}
    for row, others in _compared(stored["titles"]).items():
        for other in others:
            for score in SCORES:
                ours, theirs = every[row][score], every[other][score]
                by_seed = [float(a[0].mean() - b[0].mean()) for a, b in zip(ours, theirs, strict=True)]
                seeds = over_seeds(by_seed) if len(by_seed) > 1 and len(set(by_seed)) > 1 else None
                against[f"{row}/{other}/{score}"] = {
                    "items": paired_difference(ours, theirs, counts).as_json(),
                    "seeds": None if seeds is None else seeds.as_json(),
                }
    kept = {"format": 1, "recipe": "emoji", **{key: stored[key] for key in ("n", "seeds", "titles")}}
    product = stored["runs"][0][PRODUCT]["product"]
    return {**kept, "rows": rows, "against": against, "product": {k: product[k] for k in ("weights", "decoder")}}


def _compared(titles: Mapping[str, str]) -> dict[str, list[str]]:
    """Whom each row stands against: the product every control, what uses the tree its twins."""
    found: dict[str, list[str]] = {PRODUCT: list(CONTROLS)}
    for row in titles:
        twins = [f"{row}_{twin}" for twin in TWINS if f"{row}_{twin}" in titles]
        if twins:
            found[row] = found.get(row, []) + twins
    return found


def _cell(run: Mapping, row: str, part: str, score: str) -> Interval | None:
    found = Interval.read(run["rows"][row].get(part, {}).get(score))
    return found if found is None or score != "leaf" else found.times(100)


def _claims(run: Mapping, pairs: Sequence[tuple[str, str]], title: str) -> Claims:
    claims = []
    for row, other in pairs:
        for score, name in SCORES.items():
            one = run["against"][f"{row}/{other}/{score}"]
            items, seeds = Interval.read(one["items"]), Interval.read(one["seeds"])
            factor = 100 if score == "leaf" else 1
            claims.append(
                Claim(
                    f"{run['titles'][row]} against {run['titles'][other]}, {name}",
                    items.times(factor), None if seeds is None else seeds.times(factor), score == "ahd",
                    1 if score == "leaf" else 3,
                )
            )  # fmt: skip
    return Claims(tuple(claims), title)


def _alone(run: Mapping) -> str:
    """What changes where pictures come one at a time."""
    found = {row: (_cell(run, row, "alone", "leaf"), _cell(run, row, "alone", "ahd")) for row in run["titles"]}
    known = {row: (leaf, ahd) for row, (leaf, ahd) in found.items() if leaf is not None and ahd is not None}
    best = min(known, key=lambda row: known[row][1].value)
    ours, theirs = known[PRODUCT], known[best]
    return (
        f"One picture at a time, centred on the mean of the training pictures, the product falls to {ours[0].value:.1f} % and "
        f"{ours[1].value:.3f}; the row with the least distance is then {run['titles'][best]}, with {theirs[0].value:.1f} % and "
        f"{theirs[1].value:.3f}. A few unlabelled pictures of the new artist, to centre on, are worth more than any choice among the rows."
    )


def tell(content: Mapping[str, dict]) -> Page:
    """The page."""
    run = content[""]
    titles = run["titles"]
    cells = {row: {s: _cell(run, row, "together", s) for s in SCORES} for row in titles}
    columns = (Column(SCORES["leaf"], 1), Column(SCORES["ahd"]))
    lora = [row for row in titles if titles[row].startswith("LoRA")]
    alone = (Column(f"{SCORES['leaf']}, one picture at a time", 1), Column(f"{SCORES['ahd']}, one picture at a time"))
    everything = Table(
        (*columns, *alone),
        tuple(
            Row(titles[row], tuple(_cell(run, row, part, s) for part in ("together", "alone") for s in SCORES))
            for row in titles
        ),
        note="One picture at a time: centred on the mean of the training pictures, as hier predict does it.",
    )
    words = [f"{EXPERTS.get(name, name)} {weight:g}" for name, weight in run["product"]["weights"].items()]
    twins = [(row, f"{row}_{twin}") for row in _compared(titles) for twin in TWINS if f"{row}_{twin}" in titles]
    best, strongest = cells[PRODUCT], cells[STRONGEST]
    return Page(
        title="First light: emoji by an artist never seen",
        outcome=(
            f"The product of experts classifies {best['leaf'].value:.1f} % of the unseen artist's emoji correctly, at a mean "
            f"distance of {best['ahd'].value:.3f} to the truth; logistic regression on the same features reaches "
            f"{strongest['leaf'].value:.1f} % and {strongest['ahd'].value:.3f}."
        ),
        figure=Figure(
            "right leaves and distance to the truth of the rows of the first table",
            tuple((SCORES[s], {titles[r]: cells[r][s] for r in FIRST}) for s in SCORES),
        ),
        table=Table(
            columns,
            tuple(Row(titles[r], tuple(cells[r].values())) for r in FIRST),
            note=(
                f"Means over {run['seeds']} seed(s); brackets are 95 % bootstrap intervals over {run['n']} test pictures. "
                "The distance is the mean height of the lowest common ancestor of answer and truth: 0 is right, 1 the subgroup, "
                "2 the group, 3 the root."
            ),
        ),
        control=titles[STRONGEST],
        body=(
            Section("What to take", (_claims(run, [(PRODUCT, other) for other in CONTROLS], ""), _alone(run))),
            Section(
                "Does the tree help here?",
                (
                    "Unicode's groups are not visual. So every row that uses the tree stands beside the same row on a tree whose "
                    "parents are shuffled level by level, and without a tree.",
                    _claims(run, twins, ""),
                ),
            ),
            Section(
                "How it was done",
                (
                    "Features come from EfficientNet-Lite0 at 192 pixels and are never trained. Each training style is centred on its own "
                    "mean, the test pictures on theirs: this uses the whole test set, and no label. The size and the head's epochs and "
                    "dropout are the best of twelve settings on the artist left out, with three seeds each (first-light-tuning.json); the "
                    "head's rate comes from a prototype. Features of EfficientNet-Lite2 beside these, and the mean of four "
                    "heads, tried once on the same artist, did not help: the lead over logistic regression in right leaves stays "
                    "too small to be shown.",
                    "The product was chosen on the first training artist, with everything fitted to the others: weights, "
                    f"temperatures and decoder with the least distance. It holds heads and TreeLDA over its tree and without a tree: "
                    f"the pictures left out decide how far it follows the tree. Weights of seed 0: {', '.join(words)}; decoder: "
                    f"{run['product']['decoder']}. The shrinkage of "
                    "TreeLDA and of LDA was chosen on the same pictures; logistic regression has scikit-learn's penalty of 1.",
                    f"The {len(lora)} LoRA rows tune the tower for one epoch at 96 pixels and compare with text prompts. They see smaller "
                    "pictures, because an epoch at 192 pixels takes four times as long: they are no fair rival of the other rows.",
                    "The head of the LoRA rows trains twenty epochs, at rates chosen on withheld leaves.",
                ),
            ),
        ),
        tables=(Section("All rows", (everything,)),),
        commands=(
            "nox -s train" + (f" -- --seeds {run['seeds']}" if run["seeds"] > 1 else ""),
            "nox -s hier -- page emoji runs/emoji docs/results/first-light.md",
        ),
        terms=TERMS,
        credits=(EMOJI_CREDIT,),
    )
