"""Settings of the recipes of this folder; the module is light, for `--help`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from app_train.core.config import Frozen, RunConfig, StageConfig

LossName = Literal["itc", "itm", "lm"]
RowName = Literal["euclidean", "cosine", "lorentz", "poincare", "mix", "lorentz_max", "lorentz_whole", "lorentz_plain"]
_LORENTZ = {"manifold": "lorentz", "similarity": "distance"}
ROWS: dict[str, dict] = {
    "euclidean": {"similarity": "cosine", "rqs_prob": 0.0, "rtp_prob": 0.0},
    "cosine": {"similarity": "cosine"},
    "lorentz": _LORENTZ,
    "poincare": {"manifold": "poincare", "similarity": "distance"},
    "mix": {"manifold": "lorentz", "similarity": "mix"},
    "lorentz_max": {**_LORENTZ, "rqs_prob": 0.0},
    "lorentz_whole": {**_LORENTZ, "rtp_prob": 0.0},
    "lorentz_plain": {**_LORENTZ, "rqs_prob": 0.0, "rtp_prob": 0.0},
}


class Temperatures(Frozen):
    """The temperature of the contrastive loss: distances and cosines differ in scale, so each may start elsewhere."""

    cosine: float = Field(0.07, gt=0.01, lt=0.5)
    distance: float = Field(0.07, gt=0.01, lt=0.5)
    lr: float | None = Field(None, gt=0)
    """Its own peak rate; that of the stage if not given."""


class SecondStage(StageConfig):
    """The queries as a prefix of the language model."""

    epochs: int = Field(1, ge=0)
    lr: float = Field(2e-4, gt=0)
    batch_size: int = Field(8, ge=1)
    weight_decay: float = Field(0.05, ge=0)
    pictures: int | None = Field(None, ge=1)
    """Pictures of an epoch, by chance; all if not given."""


class BlipMiniConfig(RunConfig):
    """A small hyperbolic BLIP-2 on emoji."""

    out: Path = Path("runs/blip-mini")
    seeds: int = Field(1, ge=1)
    """Seeds 0 .. seeds-1, one after the other."""
    rows: tuple[RowName, ...] = ("lorentz",)
    """Rows to train."""
    artists: tuple[str, ...] = ("openmoji", "noto-300", "noto-700")
    """Artists to train on."""
    test_artist: str = "twemoji"
    """Artist to test on. To choose settings, take an artist out of those to train on and name it here."""
    size: int = Field(128, ge=32)
    """Height and width of the pictures in pixels."""
    limit: int | None = Field(None, ge=2)
    """Use the pictures of this many leaves only, spread over the taxonomy (for trials)."""
    losses: tuple[LossName, ...] = ("itc", "itm", "lm")
    """Losses of stage 1; without "itm" nothing is re-ranked, and the contrastive loss alone is four times cheaper."""
    start: Literal["pairs", "linear", "fresh"] = "pairs"
    """Start of both stages: "pairs" ties queries to captions, then to the language model's words, by least squares; "linear"
    does so with silent feed-forward nets, and damps the captions' components less; "fresh" leaves that to the losses."""
    temperature: Temperatures = Temperatures()
    stage1: StageConfig = StageConfig(epochs=1, lr=1e-4, batch_size=32, weight_decay=0.05)
    """Alignment, matching and description."""
    match: StageConfig = StageConfig(epochs=0, lr=1e-4, batch_size=32, weight_decay=0.05)
    """All losses after the contrastive one; without epochs, stage 1 has all of them from its first step."""
    stage2: SecondStage = SecondStage()
    captioned: tuple[RowName, ...] = tuple(ROWS)
    """Rows that go on to stage 2, if it has epochs; an epoch of it costs more than all of stage 1."""
    num_queries: int = Field(4, ge=1)
    num_layers: int = Field(2, ge=1, le=6)
    """How many of MiniLM's layers the Q-Former takes: the first and the last ones."""
    width: int = Field(256, ge=8)
    """Dimension of the features of pictures and texts."""
    text: Literal["qformer", "minilm"] = "qformer"
    """Who reads captions for the contrastive loss: the Q-Former, or MiniLM as it is, whose mean states are kept."""
    pool: Literal[1, 2] = 1
    """Side of the squares of the picture's feature map whose mean is one token."""
    views: int = Field(1, ge=1, le=3)
    """Views of every training picture, one by chance in each epoch: as it is, mirrored, cropped."""
    max_tokens: int = Field(10, ge=4, le=64)
    """Tokens of a caption."""
    k_test: int = Field(16, ge=1)
    """Candidates that the matching head scores."""
    radius: bool = True
    """Report what the radius follows; it takes the features of cropped and blurred pictures."""
    num_captions: int = Field(100, ge=0)
    """Test pictures that are captioned."""
    coco_mini: Path | None = None
    """A small COCO in one tar archive, for zero-shot scores; not run if not given."""
    save_every: int = Field(40, ge=1)
    """Steps between two checkpoints."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"


class Blip2OptConfig(RunConfig):
    """Hyperbolic BLIP-2 with ViT-g and OPT-2.7B on COCO."""

    out: Path = Path("runs/blip2-opt-2.7b")
    stage: Literal[1, 2] = 1
    """2 goes on from the model that stage 1 left in `out`."""
    source: str = "Salesforce/blip2-opt-2.7b"
    """Name or folder of a BLIP-2 checkpoint: its vision encoder and its language model are used."""
    tokenizer: str = "bert-base-uncased"
    """Name or folder of a BERT: the Q-Former starts from it, and reads with its tokenizer."""
    annotations: Path | None = None
    """`dataset_coco.json` of the Karpathy splits, or --data."""
    pictures: Path | None = None
    """Folder with `train2014/` and `val2014/`, with --annotations."""
    data: tuple[Path, ...] = ()
    """Webdataset shards in place of --annotations: tars, and folders of tars, each a data set; they are streamed."""
    weights: tuple[float, ...] = ()
    """Share of each of --data; their sizes if not given."""
    window: int = Field(10_000, ge=1)
    """Samples of a stream that are shuffled among each other."""
    augment: bool = True
    """Random cuts of at least half of the area, and mirroring, of what is streamed."""
    readers: int = Field(4, ge=1)
    """Threads that read ahead in a stream, in each process."""
    fit: StageConfig = StageConfig(epochs=10, lr=1e-4, batch_size=800, weight_decay=0.05)
    """A batch is that of all cards: 100 pairs a card in stage 1, 64 in stage 2, on eight cards."""
    similarity: Literal["cosine", "distance", "inner", "angle", "mix"] = "cosine"
    """The paper's cosine is the Euclidean cosine; "distance" lets the radius take part."""
    max_tokens: int = Field(32, ge=4)
    checkpointing: bool = True
    """Recompute activations in the backward pass."""
    micro_batches: int = Field(1, ge=1)
    """Pieces of a card's share of a batch, whose gradients add up; in stage 1 each piece has negatives of its own."""
    shard: bool = False
    """Spread the layers of the frozen parts over the cards (FSDP2)."""
    cards: int = Field(8, ge=1)
    """For the memory table."""
    plan_only: bool = False
    """Print the memory table and stop."""
    save_every: int = Field(500, ge=1)
