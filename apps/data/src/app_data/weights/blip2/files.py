"""Any BLIP-2 on disk: a run or a model of ours, a folder of Hugging Face's classes, a checkpoint file of LAVIS.

Reference: Li et al., "BLIP-2", ICML 2023; what is kept where is said in `hyper_blip.files` and `hyper_blip.weights`.
"""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import Blip2Processor

from app_data.store.errors import DataError, MissingAssetError
from app_data.store.sealed import check_sealed
from hyper_blip import HyperBlip2ForConditionalGeneration, HyperBlip2ForPretraining, HyperbolicConfig
from hyper_blip.weights import load_into, read_lavis

STAGES: dict[str, type] = {"stage1": HyperBlip2ForPretraining, "stage2": HyperBlip2ForConditionalGeneration}
_KINDS = {
    "HyperBlip2ForPretraining": "stage1",
    "Blip2ForImageTextRetrieval": "stage1",
    "HyperBlip2ForConditionalGeneration": "stage2",
    "Blip2ForConditionalGeneration": "stage2",
}
_DOES = {"stage1": "compares pictures with texts", "stage2": "writes captions"}
# LAVIS evaluates retrieval on captions of so many tokens; what trains elsewhere says nothing of its own.
_TOKENS = 35


class Loaded(NamedTuple):
    """A model in evaluation mode.

    Attributes:
        model: a `HyperBlip2ForPretraining` or a `HyperBlip2ForConditionalGeneration`.
        processor: what prepares its pictures and texts.
        ours: whether it was trained by this project, on captions as they stand.
    """

    model: Any
    processor: Blip2Processor
    ours: bool


def stages(model: Path, base: Path | None = None) -> dict[str, Path]:
    """The stages that are there, "stage1" (retrieval) and "stage2" (captions), each with its folder or file.

    Args:
        model: a folder of a run or of a model, or a `.pth` of LAVIS.
        base: for a `.pth`, the folder of Hugging Face's classes whose parts and configuration it needs.

    Raises:
        DataError: there is none, or a stage is there several times.
    """
    if model.is_file():
        if base is None:
            raise DataError(
                f"{model} is one file, and LAVIS's files lack the frozen parts, the configuration and the tokenizer: name a folder "
                "of Hugging Face's classes that has them with --base"
            )
        return {_kind(base): model}
    if base is not None:
        raise DataError(f"--base goes with a checkpoint file of LAVIS, {model} is none")
    if not model.is_dir():
        raise DataError(f"the model {model} does not exist: give a folder, or a checkpoint file of LAVIS")
    if (model / "config.json").exists():
        return {_kind(model): model}
    found = {}
    for stage in STAGES:
        folders = sorted(p.parent for p in model.glob(f"**/{stage}/config.json"))
        if len(folders) > 1:
            listed = ", ".join(str(p.parent) for p in folders[:6])
            raise DataError(f"{model} holds {len(folders)} trained models: name one of {listed}")
        if folders:
            found[stage] = folders[0]
    if not found:
        raise DataError(f"{model} holds no trained model: give the folder of a model or of a finished run of blip-mini")
    return found


def find_stage(model: Path, stage: str, base: Path | None = None) -> Path:
    """Where one stage lies; see `stages`.

    Raises:
        DataError: it is not there.
    """
    found = stages(model, base)
    if stage not in found:
        raise DataError(f"{model} holds no trained {stage}, the model that {_DOES[stage]}, but {', '.join(found)}")
    return found[stage]


def _kind(folder: Path) -> str:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kinds = content["architectures"] or []
        return next(_KINDS[name] for name in kinds if name in _KINDS)
    except OSError as error:
        raise DataError(f"{folder} holds no config.json: give the folder of a model") from error
    except StopIteration as error:
        raise DataError(
            f"{folder} holds a {', '.join(kinds) or 'model without a class'}, not one of {', '.join(_KINDS)}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'config.json'} is no configuration of a model ({error})") from error


def load_stage(
    path: Path, stage: str, *, base: Path | None = None, dtype: str | None = None, device: str = "cpu"
) -> Loaded:
    """A model and the processor beside it.

    A model of Hugging Face's classes or of LAVIS keeps its Euclidean features: what is called its radius is their norm.

    Args:
        path: see `find_stage`.
        stage: "stage1" or "stage2".
        base: see `stages`.
        dtype: precision, such as "float16"; that of the files if None.
        device: where to put it.

    Raises:
        DataError: files are missing, damaged, or do not fit.
    """
    folder = base if base is not None else path
    check_sealed(path)
    try:
        where = torch.empty(0, device=device).device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="initialised afresh")
            ours = base is None and STAGES[stage].__name__ in _classes(path)
            if ours:
                model = STAGES[stage].from_pretrained(path, dtype=dtype).to(where)
            else:
                model = _foreign(stage, folder, dtype, where)
        if base is not None:
            _fill(model, path)
        return Loaded(model.eval(), Blip2Processor.from_pretrained(folder), ours)
    except (DataError, MissingAssetError):
        raise
    except (ValueError, OSError, RuntimeError, AssertionError, ImportError, KeyError, SafetensorError) as error:
        raise DataError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _classes(folder: Path) -> list[str]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []


def _foreign(stage: str, folder: Path, dtype: str | None, device: torch.device) -> Any:
    """A model from Hugging Face's classes, without any geometry."""
    ids = {}
    if stage == "stage1":
        tokenizer = Blip2Processor.from_pretrained(folder).tokenizer
        size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["qformer_config"]["vocab_size"]
        # [DEC] serves training alone: no row is added for it.
        ids = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id, "dec_token_id": size - 1}
    model, info = STAGES[stage].from_blip2(
        str(folder), HyperbolicConfig.euclidean(max_radius=None), output_loading_info=True, dtype=dtype or "auto", **ids
    )
    lacking = [name for name in info.missing if name.startswith("blip2.")]
    if lacking:
        raise DataError(f"{folder} lacks the weights {', '.join(lacking[:4])}: it is no whole model")
    model.config.max_tokens = _TOKENS
    return model.to(device)


def _fill(model: Any, path: Path) -> None:
    """Put a checkpoint of LAVIS over the parts that it has; it may lack what is frozen, and nothing else."""
    info = load_into(model, read_lavis(path))
    frozen = ("blip2.vision_model.", "blip2.language_model.")
    lacking = [n for n in info.missing if n.startswith("blip2.") and not n.startswith(frozen)]
    if lacking:
        raise DataError(f"{path} lacks {', '.join(lacking[:4])}: it does not fit the folder named with --base")


def weight_files(path: Path) -> list[Path]:
    """The files that decide what a model answers, for fingerprints."""
    if path.is_file():
        return [path]
    endings = (".safetensors", ".bin", ".json", ".txt")
    return sorted(p for p in path.iterdir() if p.is_file() and p.suffix in endings)
