"""Settings of a run: frozen, checked, merged from defaults, file and command line; the module is light, for `--help`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app_train.core.errors import RunError

RESOLVED = "config.resolved.yaml"


class Frozen(BaseModel):
    """A group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunConfig(Frozen):
    """What says where and how a run is written, not what it computes: these may differ when it goes on."""

    out: Path = Path("runs/run")
    """Run folder; the same command goes on from what it holds."""
    cache_dir: Path | None = None
    """Where pictures and features are kept; the user's cache folder if not given."""
    save_every: int = Field(20, ge=1)
    """Steps between two checkpoints."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""

    def identity(self, *grows: str) -> dict[str, Any]:
        """The settings that decide the numbers.

        Args:
            grows: further settings that may grow from one command to the next, such as the number of seeds.
        """
        return self.model_dump(mode="json", exclude={*RunConfig.model_fields, *grows})


class StageConfig(Frozen):
    """One stage of training: a constant batch size, AdamW, a cosine from `lr` to 0 after a linear warm-up."""

    epochs: int = Field(2, ge=0)
    lr: float = Field(2e-3, gt=0)
    batch_size: int = Field(64, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the stage's steps."""


def config_hash(config: Frozen | Mapping[str, Any], **more: object) -> str:
    """Twelve hexadecimal digits that change with any setting."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    text = json.dumps({"config": values, **more}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Plain(yaml.SafeLoader):
    """YAML without aliases: nine lines of them can stand for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed (line {self.peek_event().start_mark.line + 1})")
        return super().compose_node(parent, index)


def read_yaml(path: Path, kind: type[Frozen]) -> Frozen:
    """Settings of a recipe with those of a YAML file put over its own defaults, group by group.

    A `config.resolved.yaml` of an earlier run can be given as it is.

    Raises:
        RunError: if the file cannot be read, or a key or value is wrong; the message names the key.
    """
    try:
        values = _Plain(path.read_text(encoding="utf-8")).get_single_data() or {}
    except OSError as error:
        raise RunError(f"config file {path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise RunError(f"config file {path} is nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RunError(f"config file {path} must hold keys and values, got {type(values).__name__}")
    if values.keys() >= {"config", "versions"}:
        values = values["config"]
    try:
        return kind.model_validate(merged(kind().model_dump(), values))
    except ValidationError as error:
        raise RunError(f"config file {path}: {explain(error, kind)}") from error


def merged(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`; a group keeps what it is not told."""
    result = dict(defaults)
    for key, value in values.items():
        old = result.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        result[key] = merged(old, value) if both else value
    return result


def explain(error: ValidationError, kind: type[Frozen]) -> str:
    """The first fault of a settings error as one clause."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        group = kind
        for part in fault["loc"][:-1]:
            group = group.model_fields[part].annotation
        return f"unknown key '{where}' (allowed here: {', '.join(group.model_fields)})"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return f"'{where}' {fault['msg'][:1].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two trees of settings differ, as `dotted.key: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            found += differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return found
    return [] if old == new else [f"{where}: {old} -> {new}"]
