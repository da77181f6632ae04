"""Settings of the recipes of this folder; the module is light, for `--help`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from app_eval.ask.settings import TaskName
from app_train.core.config import RunConfig, StageConfig


class AlignStage(StageConfig):
    """The connector alone, against the embeddings of words: seconds."""

    epochs: int = Field(12, ge=0)
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(64, ge=1)
    weight_decay: float = Field(0.01, ge=0)


class EpisodeStage(StageConfig):
    """Connector and LoRA on episodes."""

    epochs: int = Field(1, ge=0)
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(8, ge=1)


class IclMiniConfig(RunConfig):
    """A small LLaVA that reads demonstrations."""

    out: Path = Path("runs/icl-mini")
    seed: int = Field(0, ge=0)
    data: Literal["easy-vqa", "taxonomy"] = "easy-vqa"
    """easy-vqa: its questions, and names of emoji. taxonomy: what an emoji is, of what kind and of what sort; half of the kinds never
    train, and in half of the episodes names trade places, so that only the demonstrations tell them."""
    size: int = Field(96, ge=32)
    """Height and width to which pictures are enlarged for the eye."""
    align: AlignStage = AlignStage()
    episodes: EpisodeStage = EpisodeStage()
    num_episodes: int = Field(3200, ge=1)
    """Episodes an epoch."""
    shots: tuple[int, ...] = (0, 2, 4)
    """Numbers of demonstrations; each batch draws one."""
    emoji_share: float = Field(0.25, ge=0, le=1)
    """Share of episodes that name emoji; the others are easy-VQA."""
    related: float = Field(0.5, ge=0, le=1)
    """Share of demonstrations with the query's question, and of emoji episodes that show the query's emoji."""
    rank: int = Field(8, ge=0)
    """Rank of LoRA; 0 trains the connector alone."""
    lora_alpha: int = Field(16, ge=1)


class DistillStage(StageConfig):
    """LoRA on the attention masses of the teacher."""

    epochs: int = Field(1, ge=0)
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(4, ge=1)
    weight_decay: float = Field(0.0, ge=0)


class IclDistillConfig(RunConfig):
    """Calibrated attention distilled into LoRA weights."""

    model: Path = Path("runs/icl-mini")
    """A finished run of icl-mini."""
    out: Path = Path("runs/icl-distill")
    seed: int = Field(0, ge=0)
    strength: float = Field(1.0, gt=0)
    """lambda of the calibration; 1 in `hier eval icl` too."""
    shots: int = Field(4, ge=1)
    """Demonstrations."""
    num_questions: int = Field(160, ge=1)
    """Training questions an epoch."""
    fit: DistillStage = DistillStage()
    rank: int = Field(4, ge=1)
    """Rank of LoRA."""
    kl: float = Field(1.0, ge=0)
    """Weight of the divergence of attention masses."""
    ce: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the answer: 0, so that what the student gains or loses comes from the teacher's attention."""
    base_kl: float = Field(0.1, ge=0)
    """Weight of the divergence from the answers of the model as it was."""
    num_pool: int = Field(4000, ge=1)
    """Questions to take demonstrations from."""
    num_queries: int = Field(200, ge=2)
    """Test questions."""
    eval_seeds: int = Field(3, ge=1)
    """Seeds of random demonstrations and of the anchors, in the test."""
    num_masses: int = Field(48, ge=1)
    """Test questions on which attention itself is compared."""


class IclAdapterConfig(RunConfig):
    """The published method: a model that sees the question alone learns from itself with demonstrations. Defaults are the paper's where
    it gives them.
    """

    model: str = "HuggingFaceM4/idefics2-8b-base"
    """An image-text model: a folder, a name on the hub, or a finished run of icl-mini."""
    data: Path | None = None
    """Folder of the task, in the layout of its release; its training part is used."""
    task: TaskName = "vqav2"
    out: Path = Path("runs/icl-adapter")
    seed: int = Field(0, ge=0)
    rank: int = Field(4, ge=1)
    c: float = Field(0.1, gt=0)
    """Curvature of the anchor loss; the paper tried .01, .1 and 1."""
    ce: float = Field(0.5, ge=0)
    """Weight of the cross-entropy (the paper's lambda)."""
    tangent_scale: Literal["none", "rsqrt_d"] = "none"
    normalize: Literal["none", "d"] = "none"
    """"d" divides the anchor loss by the width; unscaled it dwarfs the cross-entropy, as in the paper."""
    shots: int = Field(8, ge=1)
    """Demonstrations that the teacher sees: 8 for Idefics2-8B-base, 32 for Idefics-9b."""
    num_instances: int = Field(1000, ge=2)
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the instances that chooses the best epoch."""
    lr: float = Field(5e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(8, ge=1)
    warmup: float = Field(0.1, ge=0, lt=1)
