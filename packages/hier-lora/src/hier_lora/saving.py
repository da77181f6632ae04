"""A saved model: peft's adapter folder, and beside it what the taxonomy needs, the preprocessing and a model card.

Model cards: Mitchell et al., 2019.
"""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hier_lora.__about__ import __version__
from hier_lora.dual_encoder import load_dual_encoder
from hier_lora.lora import add_lora, plain_model, quiet, target_names
from hier_lora.prompts import PromptSet
from hier_losses import LabelGraph, Taxonomy

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from peft import PeftModel

    from hier_lora.model import HierLoraCLIP

STATE, SETTINGS, TREE, CARD = "hier_lora.safetensors", "hier_lora.json", "taxonomy.json", "README.md"
# Of peft, and the longest pattern in it: ours have under 100 signs.
CONFIG, LONGEST = "adapter_config.json", 1000
# transformers 5 writes the first, older versions wrote the second.
_PREPROCESSING = ("processor_config.json", "preprocessor_config.json")
# Settings that formats 1 and 2 lack, and what they stood for.
_DEFAULTS = {"train_logit_bias": False, "text_chunk": 256, "num_negatives": 256, "kind": "taxonomy", "options": {}}
_KEPT = ("text", "train_logit_scale", "train_logit_bias", "center_text", "picture_size", "text_chunk", "num_negatives")
_TENSORS = ("node_features", "text_center", "temperature", "sigmoid", "logit_bias")


def save(model: "HierLoraCLIP", folder: Path) -> None:
    """Write a model; see `HierLoraCLIP.save_pretrained`."""
    if model.merged:
        raise ValueError(
            "the adapter must not be merged into the base model: save before merge_and_unload, or save_merged"
        )
    base = model.dual_encoder
    locator = getattr(base, "locator", "")
    if not locator:
        raise ValueError("model.locator must name where the base model comes from ('hf:...', 'open_clip:...'), got ''")
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(base, "save_preprocessing"):
        base.save_preprocessing(folder)
    options = getattr(base, "options", {})
    if model.adapter is not None:
        config = model.adapter.peft_config["default"]
        # As peft writes them: a plain name, and the version of the weights.
        config.base_model_name_or_path, config.revision = locator.removeprefix("hf:"), options.get("revision")
        # The text tower's vocabulary never changes; without this peft looks the locator up as a hub name.
        model.adapter.save_pretrained(str(folder), save_embedding_layers=False)
    state = {name: getattr(model, name) for name in _TENSORS if getattr(model, name) is not None}
    state["logit_scale"] = base.logit_scale.detach().reshape(1)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / STATE)
    settings = {"format": 3, "locator": locator, "options": options, "adapter": model.adapter is not None}
    settings |= {"kind": "taxonomy"} | {name: getattr(model, name) for name in _KEPT}
    if isinstance(model.tax, LabelGraph):
        settings["kind"] = "graph"
        edges = torch.stack([model.tax.edge_parent, model.tax.edge_child], 1).tolist()
        tree = {"names": list(model.tax.names), "edges": edges}
    else:
        tree = model.tax.to_json()
    settings["prompts"] = model.prompts.to_words()
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / TREE).write_text(json.dumps(tree) + "\n", encoding="utf-8")
    _card(model, locator).save(folder / CARD)


def push(model: "HierLoraCLIP", repo_id: str, private: bool | None, token: str | None) -> str:
    """Upload a model; see `HierLoraCLIP.push_to_hub`."""
    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        save(model, Path(folder))
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        message = f"hier-lora {__version__}"
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url


def load(cls: type["HierLoraCLIP"], folder: str | Path, model: nn.Module | None, trainable: bool) -> "HierLoraCLIP":
    """Read a model; see `HierLoraCLIP.from_pretrained`."""
    if str(folder).startswith("hf:"):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(str(folder).removeprefix("hf:"))
    folder = Path(folder)
    try:
        settings = _DEFAULTS | json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        state = load_file(folder / STATE)
        tree = json.loads((folder / TREE).read_text(encoding="utf-8"))
        if settings["kind"] == "graph":
            tax: Taxonomy | LabelGraph = LabelGraph(tuple(tree["names"]), [(up, down) for up, down in tree["edges"]])
        else:
            tax = Taxonomy.from_json(tree)
        prompts = PromptSet.from_words(settings["prompts"])
        locator, adapted = settings["locator"], settings["adapter"]
        chosen = {name: settings[name] for name in _KEPT}
        scale = state["logit_scale"].reshape(())
        if len(prompts) != tax.num_nodes:
            raise ValueError(f"{len(prompts)} prompts for {tax.num_nodes} nodes")
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"folder must hold a complete saved model, got {folder}: {error}") from error
    encoder: Any = load_dual_encoder(locator, **settings["options"]) if model is None else model
    if hasattr(encoder, "load_preprocessing") and any((folder / name).exists() for name in _PREPROCESSING):
        encoder.load_preprocessing(folder)
    base_scale = encoder.logit_scale.detach().clone()
    encoder.requires_grad_(False)
    adapter = None
    if adapted:
        try:
            _check_patterns(folder / CONFIG)
            adapter = _adapter(encoder, folder, settings["format"], trainable)
        except (OSError, KeyError, SafetensorError, RuntimeError, ValueError) as error:
            raise ValueError(f"folder must hold a readable adapter of {locator}, got {folder}: {error}") from error
    found = cls.__new__(cls)
    nn.Module.__init__(found)
    found._set_up(encoder, adapter, tax, prompts, base_scale, **chosen)
    with torch.no_grad():
        found.dual_encoder.logit_scale.copy_(scale.reshape(found.dual_encoder.logit_scale.shape))
        if found.logit_bias is not None:
            found.logit_bias.copy_(state["logit_bias"])
    for name in _TENSORS[:-1]:
        setattr(found, name, state.get(name))
    if not trainable:
        found.requires_grad_(False)
    return found.eval()


def _check_patterns(path: Path) -> None:
    """Refuse regular expressions that could search for hours: those of adapters have one or two repetitions, of one sign each.

    Raises:
        ValueError: such a pattern, or a file that is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        named = [config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
        named += [key for name in ("rank_pattern", "alpha_pattern") for key in config.get(name) or ()]
    except (AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path.name} is no JSON object of an adapter: {error}") from error
    for pattern in named:
        if isinstance(pattern, str):
            plain = re.sub(r"\\.|\(\?", "", pattern)
            repeats, choices = len(re.findall(r"[*+{]", plain)), plain.count("?")
            if len(pattern) > LONGEST or repeats > 3 or choices > 6 or re.search(r"[)][*+{]", plain):
                raise ValueError(
                    f"{path.name} holds a pattern with many or nested repetitions, which could search for hours: {pattern[:80]!r}"
                )


def _adapter(encoder: nn.Module, folder: Path, number: int, trainable: bool) -> "PeftModel":
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    plain = plain_model(encoder)
    if number > 2 or plain is encoder:
        with quiet():
            return PeftModel.from_pretrained(plain, str(folder), is_trainable=trainable)
    # Until format 2 the names began at the wrapper, where the plain model is called `model`.
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = not trainable, None
    config.target_modules = [name.removeprefix("model.") for name in target_names(encoder, config.target_modules)]
    adapter = add_lora(encoder, config)
    weights = load_file(folder / "adapter_model.safetensors")
    old, new = "base_model.model.model.", "base_model.model."
    set_peft_model_state_dict(adapter, {name.replace(old, new, 1): value for name, value in weights.items()})
    return adapter


def _card(model: "HierLoraCLIP", locator: str) -> "ModelCard":
    from huggingface_hub import ModelCard, ModelCardData

    prefix, _, name = locator.partition(":")
    data = ModelCardData(
        library_name="hier-lora",
        pipeline_tag="zero-shot-image-classification",
        tags=["hier-lora", "peft", "lora", "hierarchical-classification"],
        base_model=name if prefix == "hf" and not Path(name).exists() else None,
    )
    tax = model.tax
    if isinstance(tax, LabelGraph):
        classes = f"{tax.num_nodes} labels in a graph of {len(tax.edge_child)} edges (several may hold for one picture)"
        call = "predict_labels(pictures)"
    else:
        sizes = " / ".join(map(str, tax.level_sizes))
        classes = f"{tax.num_leaves} leaves, {tax.num_nodes} nodes on {tax.num_levels} levels ({sizes})"
        call = "predict(pictures)"
    calibrated = model.temperature is not None or model.sigmoid is not None
    trained = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    has_plain = plain_model(model.dual_encoder) is not model.dual_encoder
    plain = " and with the names of the plain model, for `PeftModel.from_pretrained`" if has_plain else ""
    text = f"""---
{data.to_yaml()}
---

# {tax.names[0]} and {tax.num_nodes - 1} more classes, on {locator}

A LoRA adapter for `{locator}`, made with hier-lora {__version__}. It names {classes}.

```text
from hier_lora import HierLoraCLIP

model = HierLoraCLIP.from_pretrained("<this folder>")
found = model.{call}
```

| | |
|---|---|
| LoRA weights | {trained:,} |
| text features | {model.text} |
| prompts | {"; ".join(model.prompts.templates)} |
| probabilities | {"calibrated on held-out pictures" if calibrated else "not calibrated"} |
| training data, intended use, limits | not stated: fill in before sharing |

The taxonomy is in `{TREE}`, prompts and settings in `{SETTINGS}`, the adapter in peft's own format{plain}. The weights of the base
model are not part of this folder; its licence applies to them.
"""
    return ModelCard(text)


__all__ = ["load", "save"]
