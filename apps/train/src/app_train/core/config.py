"""Settings of a run: frozen, checked, and written to `config.resolved.yaml` before the first step."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app_train.core.errors import RunError

RESOLVED = "config.resolved.yaml"
VERSIONS_OF = (
    "torch",
    "peft",
    "timm",
    "transformers",
    "hyper-geom",
    "hier-losses",
    "hier-lora",
    "mat-align",
    "hyper-blip",
    "hyper-icl",
    "app-data",
    "app-eval",
    "app-train",
)


class Frozen(BaseModel):
    """A group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LossConfig(Frozen):
    """Which cross-entropies are added up, and with which weight."""

    leaf: float = Field(0.0, ge=0)
    """Cross-entropy over the leaves alone: the plain baseline."""
    level: float = Field(0.0, ge=0)
    """Cross-entropy on every level, summed over levels."""
    tp_kl: float = Field(0.0, ge=0)
    """Tree-Path KL divergence over all nodes."""
    hisce: float = Field(0.0, ge=0)
    """Hierarchy-Sibling Smoothed Cross-Entropy, summed over levels."""
    consistency: float = Field(0.0, ge=0)
    """Jensen-Shannon divergence between each level and the one below it."""
    eps: float = Field(0.1, ge=0, lt=1)
    """Share of the target that HiSCE gives to the siblings."""


class StageConfig(Frozen):
    """One stage of training: a constant batch size, AdamW, a cosine from `lr` to 0 after a linear warm-up."""

    epochs: int = Field(2, ge=0)
    lr: float = Field(2e-3, gt=0)
    batch_size: int = Field(64, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the stage's steps."""


class HeadStageConfig(StageConfig):
    """The first stage: the head alone is cheap, so it trains long."""

    epochs: int = Field(60, ge=0)
    lr: float = Field(4e-3, gt=0)
    batch_size: int = Field(128, ge=1)


class FitConfig(Frozen):
    """Head first, then LoRA (linear probing, then fine-tuning: Kumar et al., 2022)."""

    head: HeadStageConfig = HeadStageConfig()
    """The projection alone, on frozen picture features that are computed once."""
    lora: StageConfig = StageConfig()
    """The projection and the LoRA layers, on the pictures."""
    rank: int = Field(4, ge=1)
    lora_alpha: int = Field(8, ge=1)
    towers: Literal["vision", "text", "both"] = "vision"
    clip_grad: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    save_every: int = Field(20, ge=1)
    """Steps of the second stage between two checkpoints (the first stage counts fifty of its quick steps as one)."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"


def config_hash(config: Frozen, **more: object) -> str:
    """Twelve hexadecimal digits that change with any setting."""
    text = json.dumps({"config": config.model_dump(mode="json"), **more}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_yaml(path: Path, kind: type[Frozen]) -> Frozen:
    """Read settings from a YAML file.

    Raises:
        RunError: if the file cannot be read, or a key or value is wrong; the message names the key.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise RunError(f"config file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RunError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RunError(f"config file {path}: {explain(error, kind)}") from error


def explain(error: ValidationError, kind: type[Frozen]) -> str:
    """The first fault of a settings error as one clause."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        group = kind
        for part in fault["loc"][:-1]:
            group = group.model_fields[part].annotation
        return f"unknown key '{where}' (allowed here: {', '.join(group.model_fields)})"
    return f"'{where}' {fault['msg'][:1].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def claim_folder(folder: Path, config: Frozen, fingerprint: str, ignored: tuple[str, ...] = ()) -> None:
    """Write the settings, the versions and the data fingerprint into the run folder, or check that they are there already.

    Args:
        folder: the run folder.
        config: the settings.
        fingerprint: identity of the data.
        ignored: settings that may differ between the runs that share the folder, such as the number of seeds.

    Raises:
        RunError: if the folder holds something else; nothing is written then.
    """
    settings = config.model_dump(mode="json")
    path = folder / RESOLVED
    if path.exists():
        known = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        old = {k: v for k, v in known.get("config", {}).items() if k not in ignored}
        new = {k: v for k, v in settings.items() if k not in ignored}
        different = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if known.get("data") != fingerprint:
            different.append("the data")
        if different:
            raise RunError(
                f"{folder} holds a run with other settings ({', '.join(different)} differ); choose another folder with --out, or delete it"
            )
        return
    if folder.exists() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
        raise RunError(f"{folder} is not empty and holds no run; choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"config": settings, "data": fingerprint, "versions": {name: version(name) for name in VERSIONS_OF}}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
