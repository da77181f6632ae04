"""The rows that the recipe `mat` can train, and the studies they belong to."""

import math
from dataclasses import dataclass, replace
from typing import TypeVar

from app_train.core.errors import RunError
from app_train.recipes.mat.settings import Study
from mat_align import EUCLIDEAN, HETEROGENEOUS, PROTECT, SEPARATE, SHARED, VANILLA, Variant, released

T = TypeVar("T")
VARIANTS: dict[str, Variant] = {v.name: v for v in (VANILLA, PROTECT, EUCLIDEAN, SHARED, SEPARATE, HETEROGENEOUS)}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        variant: what is computed and trained.
        radius: "unit" or "feature".
        layers: which depths give tokens: "rule", "last two", "every", "first three" (two and the last), or
            "shallower tower" (the rule in the first two thirds of the tower, without the rest).
        trees: which trees are trained on: "first", "second" or "both"; all but "first" need the study "cross".
    """

    variant: Variant
    radius: str = "unit"
    layers: str = "rule"
    trees: str = "first"

    def facts(self) -> dict:
        """The row as JSON can hold it."""
        return {"variant": vars(self.variant), "radius": self.radius, "layers": self.layers, "trees": self.trees}


def main_rows(names: tuple[str, ...]) -> dict[str, Row]:
    """The chosen variants under their own names."""
    return {name: Row(VARIANTS[name]) for name in names}


def study_rows(study: Study, names: tuple[str, ...]) -> dict[str, Row]:
    """The rows of a study.

    main: the chosen variants. radius: the published unit features against the features themselves, under the three
    variants with curvatures. intermediate: how c_mid is found, with the controls. layers: which depths give tokens, a learned
    mix, and their plain mean in place of the text-queried attention. defects: the released computation, and each of its defects
    alone. flat: no tree. cross: one tree, the other, or both.
    """
    if study == "main":
        return main_rows(names)
    if study == "radius":
        rows = {}
        for variant in (SHARED, SEPARATE, HETEROGENEOUS):
            rows |= {f"{variant.name}, {radius} radius": Row(variant, radius) for radius in ("unit", "feature")}
        return rows
    if study == "intermediate":
        solvers = ("chord", "exact-forward", "exact-reverse", "exact-jeffreys", "arithmetic", "harmonic", "geometric")
        return {f"c_mid: {name}": Row(replace(HETEROGENEOUS, intermediate=name)) for name in solvers}
    if study == "layers":
        rows = {
            f"tokens: {layers}": Row(EUCLIDEAN, layers=layers)
            for layers in ("rule", "last two", "every", "first three", "shallower tower")
        }
        rows["tokens: learned mix of every"] = Row(replace(EUCLIDEAN, mix="learned"), layers="every")
        rows["tokens: mean, no text query"] = Row(replace(EUCLIDEAN, feature="mean"))
        rows["tokens: last only"] = Row(PROTECT)
        return rows
    if study == "flat":
        return main_rows(("VANILLA", "EUCLIDEAN", "HETEROGENEOUS"))
    if study == "cross":
        rows = {f"HETEROGENEOUS, {trees} tree": Row(HETEROGENEOUS, trees=trees) for trees in ("first", "second")}
        for variant in (PROTECT, EUCLIDEAN, HETEROGENEOUS):
            rows[f"{variant.name}, both trees"] = Row(variant, trees="both")
        return rows
    whole = released(HETEROGENEOUS)
    rows = {"all fixed": Row(HETEROGENEOUS), "all released": Row(whole)}
    for name in ("intermediate", "padding", "skip_single_child"):
        rows[f"released: {name}"] = Row(replace(HETEROGENEOUS, **{name: getattr(whole, name)}))
    return rows


def chosen_rows(rows: dict[str, T], names: tuple[str, ...] | None) -> dict[str, T]:
    """The named rows of a study, in that order; all if None.

    Raises:
        RunError: the study has no such row.
    """
    if names is None:
        return rows
    unknown = [name for name in names if name not in rows]
    if unknown or not names:
        named = f"no row {unknown[0]!r} in this study" if unknown else "no row is named"
        raise RunError(f"--rows: {named}; it has {', '.join(map(repr, rows))}")
    return {name: rows[name] for name in names}


def trained_as(row: Row) -> str:
    """The first name under which a row stands in any study: what several studies share is trained once."""
    studies = ("main", "radius", "intermediate", "layers", "defects", "cross")
    names = (name for study in studies for name, other in study_rows(study, tuple(VARIANTS)).items() if other == row)
    return next(names)


def depths(layers: str, num: int) -> tuple[int, ...]:
    """Numbers of the depths, out of `num`, that give tokens."""
    from mat_align import relative_layers

    return {
        "rule": lambda: relative_layers(num),
        "last two": lambda: (num - 2, num - 1),
        "every": lambda: tuple(range(num)),
        "first three": lambda: (0, 1, num - 1),
        "shallower tower": lambda: relative_layers(math.ceil(2 * num / 3)),
    }[layers]()
