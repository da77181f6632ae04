"""The rows of `hier eval icl`, and what a preset stands for; the module is light."""

from dataclasses import dataclass, replace
from typing import get_args

from app_data.store.errors import DataError
from app_eval.ask.settings import EvalIcl, TaskName

ZERO, ADAPTER = "no pictures shown", "adapter, no demonstrations"
# The distance of tangents at curvature c tends to the Euclidean one as c -> 0: one code for both.
_FLAT = 1e-6
_MU = 0.3

PRESETS: dict[str, dict] = {
    "note": {"selectors": ("random", "topk", "rices"), "methods": ("both",), "curvature": (1.0,)},
    "published": {
        "tasks": ("vqav2", "okvqa", "coco-caption"), "selectors": ("random", "rices"), "methods": (), "k": (32,),
        "queries": 10_000, "pool": 0,
    },
    "mini": {"queries": 30, "pool": 400, "batch": 8},
}  # fmt: skip
DEFAULTS = {
    "tasks": get_args(TaskName),
    "selectors": ("random", "topk", "rices", "cosine"),
    "methods": ("anchors", "calibration", "both"),
    "curvature": (1.0, 0.0),
    "k": (4,),
    "against": "rices",
    "seeds": 3,
    "queries": 200,
    "pool": 2048,
}
NOT_HERE = {
    "note": (
        "The note ran image-text matching and visual reasoning on Otter-9B, which is not in transformers and cannot be run here; the two "
        "tasks run on the model that is given. Its other four tasks are IDEFICS-9B's (HuggingFaceM4/idefics-9b)."
    ),
    "published": (
        "The paper shows 32 demonstrations to Idefics-9b and 8 to Idefics2-8B-base (-k 8); its own row needs --adapter, from hier train "
        "icl-adapter."
    ),
}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: Its title, and the name of its folder.
        select: A selector, "cosine", or "" where no demonstrations are chosen.
        c: Curvature of anchors and calibration; None where there is neither.
        calibrated: Whether demonstrations are weighed.
        adapted: Whether the adapter is at work.
        twin: Name of the same row at curvature 0; "" if there is none.
    """

    name: str
    select: str = ""
    c: float | None = None
    calibrated: bool = False
    adapted: bool = False
    twin: str = ""

    @property
    def seeded(self) -> bool:
        """Whether a seed changes it: by chance, or by the training of the anchors."""
        return self.select in ("random", "hyperbolic") or self.calibrated

    @property
    def curvature(self) -> float:
        """What the geometry is computed with."""
        return self.c or _FLAT

    @property
    def mu(self) -> float:
        """Weight of the depth; the Euclidean twin knows none."""
        return _MU if self.c else 0.0


def resolved(config: EvalIcl) -> EvalIcl:
    """The settings with the preset's and the defaults in the places that were left open.

    Raises:
        DataError: A number is out of range, or two settings contradict each other.
    """
    preset = PRESETS.get(config.preset or "", {})
    found = {name: preset.get(name, value) for name, value in DEFAULTS.items()}
    given = {name: value for name in found if (value := getattr(config, name)) is not None}
    config = replace(config, **{**found, **given})
    if config.batch == 1 and "batch" in preset:
        config = replace(config, batch=preset["batch"])
    for name, least in (("seeds", 1), ("batch", 1), ("queries", 0), ("pool", 0)):
        if getattr(config, name) < least:
            raise DataError(f"{name} must be at least {least}, got {getattr(config, name)}")
    if config.queries == 1:
        raise DataError("queries must be at least 2, or 0 for all, got 1")
    for name in ("tasks", "k", "curvature"):
        values = getattr(config, name)
        if len(set(values)) < len(values) or not values:
            raise DataError(f"{name} must name at least one and none twice, got {' '.join(map(str, values)) or 'none'}")
    if min(config.k) < 1 or min(config.curvature) < 0:
        raise DataError(
            f"k must be at least 1 and curvature at least 0, got {min(config.k)} and {min(config.curvature):g}"
        )
    if min(config.k) < 2 and {"calibration", "both"} & set(config.methods):
        raise DataError(
            "calibration weighs demonstrations against each other: k must be at least 2, or --methods anchors"
        )
    if config.against not in config.selectors:
        raise DataError(f"--against must be one of --selectors, {' '.join(config.selectors)}, got {config.against}")
    return config


def rows(config: EvalIcl) -> list[Row]:
    """The rows of resolved settings."""
    found = [Row(ZERO)]
    if config.adapter is not None:
        found.append(Row(ADAPTER, adapted=True))
    found += [Row(name, name) for name in config.selectors]
    select = {"anchors": "hyperbolic", "calibration": config.against, "both": "hyperbolic"}
    titles = {"anchors": "anchors", "calibration": f"{config.against} calibrated", "both": "anchors calibrated"}
    for method in config.methods:
        for c in config.curvature:
            where = f"curvature {c:g}" if c else "Euclidean"
            twin = f"{titles[method]}, Euclidean" if c and 0.0 in config.curvature else ""
            found.append(Row(f"{titles[method]}, {where}", select[method], c, method != "anchors", twin=twin))
    return found
