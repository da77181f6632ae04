"""Settings of the recipes of this folder; the module is light, for `--help`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from app_data.sets import DATA
from app_train.core.config import Frozen, RunConfig, StageConfig
from app_train.recipes.lora.losses import ROWS, LossConfig, MultiLabelLoss

LITE0 = "pip:lite0-minilm"
CLIP = "hf:openai/clip-vit-base-patch32"
RowName = Literal[tuple(ROWS)]  # type: ignore[valid-type]


class AugmentConfig(Frozen):
    """How the pictures of the LoRA stage are varied; nothing is unless asked for, and never for closed forms and heads."""

    flip: float = Field(0.0, ge=0, le=1)
    """Probability that a picture is mirrored left to right: .5 unless sides mean something."""
    crop: float = Field(1.0, gt=0, le=1)
    """Least share of the area that a random cut keeps, such as .7."""
    colour: float = Field(0.0, ge=0, lt=1)
    """Largest change of brightness, contrast and saturation, as a share."""

    def __bool__(self) -> bool:
        """Whether anything is varied."""
        return bool(self.flip or self.crop < 1 or self.colour)


class FitConfig(Frozen):
    """Head first, then LoRA (linear probing, then fine-tuning: Kumar et al., 2022)."""

    head: StageConfig = StageConfig(epochs=60, lr=4e-3, batch_size=128)
    """The projection alone, on frozen picture features that are computed once: cheap, so it trains long."""
    lora: StageConfig = StageConfig()
    """The projection and the LoRA layers, on the pictures."""
    rank: int = Field(4, ge=1)
    lora_alpha: int = Field(8, ge=1)
    towers: Literal["vision", "text", "both"] = "vision"
    clip_grad: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    augment: AugmentConfig = AugmentConfig()
    """Variation of the pictures in the LoRA stage."""
    accumulate: int = Field(1, ge=1)
    """Pieces in which a batch of the LoRA stage goes through the model, to save memory; the step is that of the whole batch."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"


class HeadsConfig(Frozen):
    """Classifiers on frozen features: free heads and closed forms."""

    epochs: int = Field(15, ge=1)
    lr: float = Field(2e-3, gt=0)
    batch_size: int = Field(128, ge=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    """Share of the features that the head does not see in training."""
    heads: int = Field(1, ge=1)
    """Heads of different draws whose mean is used."""
    discount: float = Field(1.0, ge=0)
    """How fast HXE's weights fall from the leaves to the root."""
    shrinkage: float = Field(0.4, ge=0, le=1)
    """Of the covariance within classes, for TreeLDA and LDA, where no held-out picture chooses it."""
    c: float = Field(1.0, gt=0)
    """Inverse strength of the penalty of logistic regression."""

    def stage(self) -> StageConfig:
        """How a head is trained."""
        return StageConfig(epochs=self.epochs, lr=self.lr, batch_size=self.batch_size)

    def loss(self) -> LossConfig:
        """The loss of the head that uses the tree."""
        return LossConfig(hxe=1, discount=self.discount)


class BaseConfig(RunConfig):
    """Settings of a recipe that starts at a base model and names pictures in words."""

    model: str = LITE0
    """Locator of the base model."""
    template: str = "a picture of {}."
    """Prompt for each node."""
    size: int = Field(224, ge=32)
    """Height and width of the pictures in pixels."""


class RowsConfig(RunConfig):
    """Settings of a recipe that compares rows over seeds."""

    rows: tuple[RowName, ...] = ("leaf_ce", "both")
    """Losses to train with."""
    seeds: int = Field(1, ge=1)
    """Seeds 0 .. seeds-1, one after the other."""


# Chosen by `nox -s train -- --tune`: the lower AHD@1 on withheld leaves, which no row has seen; see
# docs/results/first-light-tuning.json.
CHOSEN_LR: dict[str, tuple[float, float]] = {
    "leaf_ce": (4e-3, 5e-4),
    "level_ce": (2e-3, 5e-4),
    "both": (2e-3, 5e-4),
    "both_consistency": (2e-3, 5e-4),
}
# (head, LoRA) learning rates tried for every row on the withheld leaves.
TRIALS = ((4e-3, 5e-4), (2e-3, 5e-4), (1e-3, 5e-4))
# Sizes of the frozen features, and (epochs, dropout) of heads on them, tried on the artist left out; the least AHD is chosen.
FEATURE_SIZES = (160, 192, 224)
HEAD_TRIALS = ((15, 0.5), (30, 0.5), (30, 0.7), (60, 0.7))


class EmojiConfig(RowsConfig):
    """Fine-tune on emoji by two artists, test on an artist never seen."""

    out: Path = Path("runs/emoji")
    tune: bool = False
    """Run the validation trials instead (never touches the test artist)."""
    rows: tuple[RowName, ...] = tuple(CHOSEN_LR)
    """Losses to train with."""
    artists: tuple[str, ...] = ("openmoji", "noto-300", "noto-700")
    """Artists to train on; the first one is left out where the product is chosen."""
    size: int = Field(96, ge=32)
    """Height and width of the pictures that LoRA is trained on, in pixels."""
    feature_size: int = Field(192, ge=32)
    """Height and width of the pictures whose frozen features heads and closed forms use."""
    heads: HeadsConfig = HeadsConfig()
    """Heads and closed forms on frozen features."""
    limit: int | None = Field(None, ge=2)
    """Use the pictures of this many leaves only, spread over the taxonomy (for trials)."""
    dropout: float = Field(0.7, ge=0, lt=1)
    """Share of the pooled features that the head does not see in training."""
    fit: FitConfig = FitConfig(head=StageConfig(epochs=20, lr=4e-3, batch_size=128), lora=StageConfig(epochs=1))
    """Stages of training; `rows` share all of it but the learning rates chosen on validation."""
    lr: dict[str, tuple[float, float]] = Field(default_factory=lambda: dict(CHOSEN_LR))
    """(head, LoRA) learning rates of each row; a row that is not named trains at the rates of `fit`."""


class FolderConfig(BaseConfig):
    """The best classifier that can be had from your own folder of pictures and your own taxonomy."""

    out: Path = Path("runs/folder")
    data: Path | None = Field(
        None, description=f"Folder of pictures, or NAME:PATH for a release of {', '.join(DATA)} (required)."
    )
    taxonomy: Path | None = None
    """Table or JSON tree; the nested folders themselves if not given."""
    listing: tuple[Path, ...] = ()
    """Lists of pictures in place of class folders; of several each is the part of its name."""
    listing_columns: str = ""
    """Names of the columns of the lists, such as path=image_id,label=order+family+species,split=fold."""
    outside: bool = False
    """Let the lists name files that do not lie in the folder."""
    size: int = Field(128, ge=32)
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Budget of unreadable files, as a share; ten are always allowed."""
    max_megapixels: float | None = Field(None, gt=0)
    """Millions of pixels; larger pictures are left out, those of over 89 if not given."""
    heads: HeadsConfig = HeadsConfig()
    """Heads and closed forms on frozen features."""
    lora: bool = False
    """Fine-tune with LoRA as well: minutes to hours, where the rest takes less than a minute after the features."""
    from_run: Path | None = None
    """Start LoRA from the adapter of this finished run, whose classes may be fewer or others (with --lora)."""
    loss: LossConfig = LossConfig(level=1, levels="extended")
    """Of the LoRA row."""
    fit: FitConfig = FitConfig()
    """Stages of the LoRA row."""
    seed: int = Field(0, ge=0)
    """Seed of the split, the order of the data and the LoRA layers."""


class CifarConfig(BaseConfig, RowsConfig):
    """Few-shot CIFAR-100 under the WordNet tree of ProTeCt."""

    out: Path = Path("runs/cifar100-fewshot")
    data: Path | None = None
    """Folder with cifar100_fewshot.tar.gz and trees/cifar100.json (required)."""
    tree: Path | None = None
    """The tree, if it stands elsewhere."""
    rows: tuple[RowName, ...] = ("leaf_ce", "level_ce", "tp_kl", "hisce", "both")
    """Losses to train with."""
    shots: int = Field(18, ge=1)
    """Training pictures per class."""
    calibration_shots: int = Field(2, ge=1)
    """Pictures per class that calibrate the probabilities."""
    test_shots: int = Field(50, ge=1)
    """Test pictures per class."""
    size: int = Field(64, ge=32)
    """Height and width of the pictures in pixels (the originals have 32)."""
    fit: FitConfig = FitConfig(head=StageConfig(epochs=20, lr=1e-2, batch_size=256), lora=StageConfig(epochs=1))
    """The head alone, then one epoch with LoRA."""


# LoRA of rank 16 on queries and values of both towers.
CLIP_FIT = FitConfig(lora=StageConfig(epochs=5, lr=2e-4, weight_decay=0.01), rank=16, lora_alpha=32, towers="both")


class PaperConfig(BaseConfig, RowsConfig):
    """Settings that all data sets of the papers share."""

    data: Path | None = None
    """Folder of the unpacked release (required)."""
    model: str = CLIP
    template: str = "a photo of a {}."
    text: Literal["live", "chunked", "sampled"] = "chunked"
    """How prompts become features while the text tower trains; ignored with --fit.towers vision, whose text is cached."""
    fit: FitConfig = CLIP_FIT
    save_every: int = Field(200, ge=1)
    """Steps between two checkpoints."""


class CubConfig(PaperConfig):
    """CUB-200-2011 (Wah et al., 2011): order > family > species."""

    out: Path = Path("runs/cub")
    template: str = "a photo of a {}, a bird."
    hierarchy: Path | None = None
    """CSV with the columns order, family, species (required: the data set has no taxonomy of its own)."""


class AircraftConfig(PaperConfig):
    """FGVC-Aircraft (Maji et al., 2013): manufacturer > family > variant."""

    out: Path = Path("runs/aircraft")
    template: str = "a photo of a {}, an aircraft."


class ButterflyConfig(PaperConfig):
    """Butterfly-200 (Chen et al., 2018): family > subfamily > genus > species."""

    out: Path = Path("runs/butterfly")
    template: str = "a photo of a {}, a butterfly."


class InaturalistConfig(PaperConfig):
    """iNaturalist 2021 (Van Horn et al., 2021): seven levels, 10,000 species, 16,343 nodes."""

    out: Path = Path("runs/inaturalist")
    text: Literal["live", "chunked", "sampled"] = "sampled"
    """How prompts become features while the text tower trains."""


class ChestConfig(BaseConfig):
    """ChestX-ray14 (Wang et al., 2017): 14 findings under a tree of our own, several to a picture."""

    out: Path = Path("runs/chest")
    data: Path | None = None
    """Folder of the release (required)."""
    model: str = CLIP
    template: str = "a chest x-ray showing {}."
    fit: FitConfig = CLIP_FIT.model_copy(update={"lora": CLIP_FIT.lora.model_copy(update={"epochs": 3})})
    loss: MultiLabelLoss = MultiLabelLoss()
    seed: int = Field(0, ge=0)
    """Seed of the order of the data and of the LoRA layers."""
    save_every: int = Field(200, ge=1)
    """Steps between two checkpoints."""


class StudyConfig(RunConfig):
    """The experiments of the hier-lora results page."""

    out: Path = Path("runs/lora-study")
    save_every: int = Field(10, ge=1)
    """Steps between two checkpoints."""
    data: Path | None = None
    """Folder of the few-shot CIFAR-100 set (cifar100_fewshot.tar.gz and trees/cifar100.json); without it emoji alone."""
    only: tuple[Literal["emoji", "cifar100"], ...] = ("emoji", "cifar100")
    """Data sets to use."""
    experiments: tuple[str, ...] = ()
    """Experiments to run, such as main or update; all if not given."""
    seeds: int = Field(5, ge=1)
    """Seeds of the main table."""
    few: int = Field(2, ge=1)
    """Seeds of all other experiments."""
    epochs: int = Field(20, ge=1)
    """Epochs of the head."""
    batch_size: int = Field(256, ge=1)
    """Pictures per step of the head."""
    minutes: float | None = Field(None, gt=0)
    """Start no run after so many minutes."""
    estimate: bool = False
    """Print the plan and its cost, and run nothing."""
