"""Settings of the recipes of this folder; the module is light, for `--help`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field
from tyro.constructors import PrimitiveConstructorSpec

from app_train.core.config import Frozen, RunConfig, StageConfig
from app_train.core.errors import RunError
from app_train.recipes.mat.published import DATA, SHOTS, PublishedConfig

T = TypeVar("T")

VariantName = Literal["VANILLA", "PROTECT", "EUCLIDEAN", "SHARED", "SEPARATE", "HETEROGENEOUS"]
VARIANTS: tuple[VariantName, ...] = ("VANILLA", "PROTECT", "EUCLIDEAN", "SHARED", "SEPARATE", "HETEROGENEOUS")
Study = Literal["main", "radius", "intermediate", "layers", "defects", "flat", "cross", "controls"]
ClipStudy = Literal["main", "radius", "intermediate", "layers", "defects", "cross"]
Intermediate = Literal[
    "chord", "exact-forward", "exact-reverse", "exact-jeffreys", "arithmetic", "harmonic", "geometric"
]
# Prompts of mat-mini go no deeper than the text tower of mini-clip.
MINI_DEPTH = 3


class MATFitConfig(StageConfig):
    """AdamW on cached features, a cosine from `lr` to 0 after a linear warm-up."""

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    curvature_lr: float = Field(1e-2, gt=0)
    """Rate of the curvatures, the radii and the logit scale."""
    clip_grad: float = Field(1.0, gt=0)
    node_weight: float = Field(0.5, ge=0)
    entail_weight: float = Field(0.5, ge=0)
    treecut_dropout: float = Field(0.1, ge=0, lt=1)
    scale: float = Field(1.0, gt=0)
    min_radius: float = Field(0.1, gt=0)
    curv_init: float = Field(0.05, gt=0)
    c_img: float = Field(0.05, gt=0)
    c_txt: float = Field(0.025, gt=0)
    dropout: float = Field(0.5, ge=0, lt=1)
    """Share of the pooled features that a step does not see: without it the maps learn few pictures by heart."""
    ridge: float = Field(0.1, gt=0)
    """Penalty of the closed-form maps of the stages."""

    def head(self) -> dict[str, float]:
        """Settings of the model's head."""
        names = ("scale", "min_radius", "curv_init", "c_img", "c_txt")
        return {name: getattr(self, name) for name in names}


class MATConfig(RunConfig):
    """Train and score variants of Modality Alignment across Trees on cached features."""

    out: Path = Path("runs/mat")
    save_every: int = Field(200, ge=1)
    """Steps between two checkpoints."""
    data: Literal["emoji", "cifar100-fewshot"] = "emoji"
    source: Path | None = None
    """Folder with cifar100_fewshot.tar.gz and trees/cifar100.json."""
    shots: int = Field(16, ge=1, le=16)
    """Training pictures of each class (CIFAR-100)."""
    num_test: int = Field(20, ge=1)
    """Test pictures of each class (CIFAR-100), chosen by a hash of their names."""
    tower: Literal["lite0", "vit"] = "lite0"
    variant: tuple[VariantName, ...] = VARIANTS
    """Variants to train."""
    study: Study = "main"
    """Which rows: the variants, or those of an open question."""
    rows: tuple[str, ...] | None = None
    """Only these rows of the study, by name; the first of them is what the others are compared with."""
    seeds: int = Field(1, ge=1)
    """Seeds 0 .. seeds-1: initialisation, order of the data, tree cuts."""
    fit: MATFitConfig = MATFitConfig()
    size: int = Field(128, ge=32)
    """Height and width of the pictures in pixels."""
    limit: int | None = Field(None, ge=2)
    """Use so many training and test pictures only (for trials)."""
    tune: bool = False
    """Compare learning rates on pictures cut out of the training set instead; never touches the test set."""


def _listed(kind: Callable[[str], T], metavar: str) -> PrimitiveConstructorSpec[tuple[T, ...]]:
    """How values with commas or blanks between them are read from the command line."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(kind(part) for word in words for part in word.split(",") if part),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


class MATClipFit(Frozen):
    """In place of the published settings, which stand where nothing is given."""

    epochs: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0)
    warmup_epochs: int | None = Field(None, ge=0)
    treecut_weight: float | None = Field(None, ge=0)
    node_weight: float | None = Field(None, ge=0)
    entail_weight: float | None = Field(None, ge=0)
    treecut_dropout: float | None = Field(None, ge=0, lt=1)
    min_radius: float | None = Field(None, gt=0)
    """K of the half aperture."""
    scale: float | None = Field(None, gt=0)
    """Radius of the lifted unit features."""
    curv_init: float | None = Field(None, gt=0)
    """Centre of the bounds of the curvatures."""
    c_img: float | None = Field(None, gt=0)
    c_txt: float | None = Field(None, gt=0)


class MATClipConfig(RunConfig):
    """The paper's table on CLIP weights: a cell for each data set, number of shots, base, row and seed."""

    out: Path = Path("runs/mat-clip")
    save_every: int = Field(200, ge=1)
    """Steps between two checkpoints."""
    data: Annotated[tuple[str, ...], _listed(str, "{" + ",".join(DATA) + "}")] = ("cifar100",)
    """Data sets, with commas between them."""
    source: Path = Path("data")
    """Folder of the data set, or one that holds each under its name."""
    tree: Path | None = None
    """The tree with its cuts in ProTeCt's form, or the folder of the trees; found in or beside the data if not given."""
    shots: Annotated[tuple[int, ...], _listed(int, "{1,2,4,8,16}")] = (16,)
    """Training pictures of each class. 2 take the published settings of 1, 4 and 8 those of 16."""
    base: Annotated[tuple[str, ...], _listed(str, "{maple,promptsrc}")] = ("maple",)
    """Prompts of the two towers."""
    study: ClipStudy = "main"
    """Which rows: the variants, or those of an open question (cross: a second tree, CIFAR-100 only)."""
    rows: tuple[str, ...] | None = None
    """Only these rows of the study, by name; PROTECT, or the first of them, is what the others are compared with."""
    seeds: int = Field(1, ge=1)
    """Seeds 1 .. seeds: choice of the shots, initialisation, order of the data, tree cuts."""
    novel: bool = False
    """Train on the first half of the classes by name, and score both halves, each among its own classes."""
    model: str | None = None
    """Another open_clip model than the published one; `local-dir:FOLDER` is one that `mini-clip` wrote, with its weights."""
    weights: Path | None = None
    """Weights file for the model; open_clip's own download if not given."""
    layers: tuple[int, ...] | None = None
    """Blocks that give tokens, from 0, in place of the published 4, 7 and 11."""
    radius: Literal["unit", "feature"] | None = None
    """Lift unit features, as published, or the features with a radius of their own."""
    intermediate: Intermediate | None = None
    """How c_mid is found: the published chord objective, a mean, or the minimiser of an exact divergence."""
    released: bool = False
    """Repeat the defects of the released code."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the towers; cosines, curvatures and what trains stay in fp32."""
    chunk_size: int | None = Field(None, ge=1)
    """Labels and pictures encoded at a time, and again in the backward: memory for one more forward pass."""
    accumulate: int = Field(1, ge=1)
    """Pieces in which a batch is taken, to save memory."""
    fit: MATClipFit = MATClipFit()

    def check(self) -> None:
        """Refuse names and numbers that there are no published settings for, and options that the study itself varies.

        Raises:
            RunError: it names the option and what is allowed.
        """
        for name, allowed in (("data", DATA), ("shots", SHOTS), ("base", ("maple", "promptsrc"))):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or not set(values) <= set(allowed):
                raise RunError(
                    f"--{name} must name some of {', '.join(map(str, allowed))}, each once, got {','.join(map(str, values))!r}"
                )
        own = {"layers": "layers", "radius": "radius", "intermediate": "intermediate", "defects": "intermediate"}.get(
            self.study
        )
        if own is not None and getattr(self, own) is not None:
            raise RunError(f"--{own} goes without --study {self.study}, whose rows differ in it")
        if self.released and self.intermediate is not None:
            raise RunError("--intermediate goes without --released, which finds c_mid as the released code does")
        if self.study == "cross" and (self.novel or self.data != ("cifar100",)):
            raise RunError(
                "--study cross goes with --data cifar100 and without --novel: its second tree is over all of these classes"
            )


class MATMiniConfig(RunConfig):
    """Tune prompts of a small CLIP under the variants."""

    clip: Path = Path("runs/mini-clip/model")
    """Folder that the recipe `mini-clip` wrote."""
    out: Path = Path("runs/mat/emoji-mini")
    save_every: int = Field(200, ge=1)
    """Steps between two checkpoints."""
    method: Literal["maple", "promptsrc"] = "maple"
    variant: tuple[VariantName, ...] = VARIANTS
    """Variants to train."""
    seeds: int = Field(1, ge=1)
    """Seeds 0 .. seeds-1: initialisation, order of the data, tree cuts."""
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(4e-3, gt=0)
    limit: int | None = Field(None, ge=2)
    """Use so many training and test pictures only (for trials)."""

    def settings(self, seed: int) -> PublishedConfig:
        """What the recipe `mat-clip` needs to know."""
        return PublishedConfig(
            data="emoji", shots=3, method=self.method, epochs=self.epochs, batch_size=self.batch_size,
            lr=self.lr, optimizer="adamw", warmup_epochs=0, curv_init=0.05, c_img=0.05, c_txt=0.025, scale=1.0, seed=seed,
            model=f"local-dir:{self.clip}", pretrained=None, depth=MINI_DEPTH, depth_text=MINI_DEPTH, depth_vision=MINI_DEPTH,
            average_mean=self.epochs / 2, average_std=self.epochs / 2,
        )  # fmt: skip


class MiniClipConfig(StageConfig, RunConfig):
    """Train a small CLIP on emoji of the training artists."""

    out: Path = Path("runs/mini-clip")
    save_every: int = Field(200, ge=1)
    """Steps between two checkpoints."""
    epochs: int = Field(30, ge=1)
    """Passes over the leaves; each shows one artist's picture of every leaf."""
    batch_size: int = Field(128, ge=2)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    image_weight: float = Field(1.0, ge=0)
    """Weight of following EfficientNet-Lite0."""
    text_weight: float = Field(1.0, ge=0)
    """Weight of following MiniLM."""
    seed: int = Field(0, ge=0)
    limit: int | None = Field(None, ge=2)
    """Use so many leaves only (for trials)."""
