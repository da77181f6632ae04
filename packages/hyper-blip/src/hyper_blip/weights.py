"""Reading and writing weights: own folders, LAVIS checkpoints, BERT.

References: Li et al., "BLIP-2", ICML 2023, section 4.1 (a Q-Former starts from BERT-base; cross-attention is new). LAVIS
key names: lavis/models/blip2_models at 506965b.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

_LAVIS = (
    (r"^Qformer\.", ""),
    (r"^bert\.embeddings\.LayerNorm\.", "blip2.qformer.layernorm."),
    (r"^bert\.embeddings\.", "blip2.embeddings."),
    (r"^bert\.", "blip2.qformer."),
    (r"attention\.self\.", "attention.attention."),
    (r"^cls\.predictions\.transform\.dense\.", "lm_head.dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_head.norm."),
    (r"^cls\.predictions\.bias$", "lm_head.bias"),
    (r"^ln_vision\.", "blip2.vision_model.post_layernorm."),
    (r"^(vision|text)_proj\.", r"blip2.\1_projection."),
    (r"^(opt|t5)_proj\.", "blip2.language_projection."),
    (r"^(opt|t5)_model\.", "blip2.language_model."),
    (r"^(query_tokens|itm_head\.)", r"blip2.\1"),
    (r"^temp$", "temperature.log_c"),
    (r"^visual_encoder\.cls_token$", "blip2.vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "blip2.vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "blip2.vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"blip2.vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"blip2.vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"blip2.vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"blip2.vision_model.encoder.layers.\1.mlp."),
)
# CLIP's ViT-L (Radford et al., 2021), as `transformers.CLIPVisionModel` names it behind `VisionAdapter`.
_CLIP = (
    (r"^visual_encoder\.class_embedding$", "embeddings.class_embedding"),
    (r"^visual_encoder\.positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^visual_encoder\.conv1\.", "embeddings.patch_embedding."),
    (r"^visual_encoder\.ln_pre\.", "pre_layrnorm."),
    (r"^visual_encoder\.transformer\.resblocks\.(\d+)\.ln_(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"^visual_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^visual_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
)
# The decoder is the word embeddings again; positions are a range.
_LAVIS_DROPPED = re.compile(r"position_ids$|cls\.predictions\.decoder\.")


Given = TypeVar("Given", bound=nn.Module)


class LoadingInfo(NamedTuple):
    """What a load left open.

    Attributes:
        missing: parameters of the model that the source does not hold; they keep their initial values.
        unexpected: entries of the source that the model does not have.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def lavis_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LAVIS state dict under the names of this package.

    The maps of `visual_encoder`, ViT-g's and ViT-L's, are not verified against a released checkpoint.
    """
    state = dict(state)
    clip = _clip_state(state)
    for name in [n for n in state if n.endswith(".attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        query, value = state.pop(name), state.pop(f"{stem}v_bias")
        state[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    found = {f"blip2.vision_model.module.{name}": value for name, value in clip.items()}
    for name, value in state.items():
        if _LAVIS_DROPPED.search(name):
            continue
        for pattern, new in _LAVIS:
            name = re.sub(pattern, new, name)
        found[name] = value.float().log().reshape(1) if name == "temperature.log_c" else value
    return found


def _clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the ViT-L out of a state dict."""
    found = {}
    for name in [n for n in state if n.startswith("visual_encoder.")]:
        joint = re.match(r"^visual_encoder\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", name)
        if joint:
            parts = zip(("q_proj", "k_proj", "v_proj"), state.pop(name).chunk(3), strict=True)
            found |= {f"encoder.layers.{joint[1]}.self_attn.{part}.{joint[2]}": value for part, value in parts}
            continue
        for pattern, new in _CLIP:
            renamed, hits = re.subn(pattern, new, name)
            if hits:
                found[renamed] = state.pop(name)
                break
    return found


def read_lavis(path: str | Path) -> dict[str, Tensor]:
    """Read a `.pth` of LAVIS with `weights_only`.

    Raises:
        ValueError: the file is missing, damaged, or would need unsafe loading.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, torch.serialization.pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"path must be a checkpoint that loads with weights_only=True, got {path}: {reason}"
        ) from error
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"path must hold a state dict of tensors, or one under 'model', got {path}")
    return lavis_state(content)


def bert_state(state: Mapping[str, Tensor], vocabulary: int, positions: int) -> dict[str, Tensor]:
    """A BERT state dict (`transformers.BertModel` or a model around one) under the names of this package.

    Both feed-forward nets, that of the text and that of the queries, start from BERT's. The Q-Former has no token types:
    BERT's type 0 is added to the positions, so that the text alone comes out as from BERT.
    """
    state = {re.sub(r"^bert\.", "", name): value for name, value in state.items()}
    found = {}
    for name, value in state.items():
        if name.startswith("cls.predictions."):
            found |= lavis_state({name: value})
        elif name == "embeddings.word_embeddings.weight":
            found[f"blip2.{name}"] = value[:vocabulary]
        elif name == "embeddings.position_embeddings.weight":
            types = state.get("embeddings.token_type_embeddings.weight")
            found[f"blip2.{name}"] = (value if types is None else value + types[0])[:positions]
        elif name.startswith(("embeddings.LayerNorm.", "encoder.")):
            found |= lavis_state({f"bert.{name}": value})
            copy = re.sub(r"(layer\.\d+)\.(intermediate|output)\.", r"\1.\2_query.", name)
            if copy != name:
                found |= lavis_state({f"bert.{copy}": value})
    return found


def borrowed(module: Given) -> Given:
    """A module of our own over the same weights: what is frozen, replaced or switched in it stays as it was in the original.

    Its parameters share the memory of the original until `make_own` copies them.
    """
    memo: dict[int, Tensor] = {}
    for parameter in module.parameters():
        if type(parameter) is nn.Parameter:
            mine = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            mine._borrowed = True
            memo[id(parameter)] = mine
        else:  # a quantised or a spread weight
            memo[id(parameter)] = parameter
    return copy.deepcopy(module, memo)


def make_own(parameters: Iterable[Tensor]) -> None:
    """Give borrowed parameters memory of their own, before something is written into them."""
    for parameter in parameters:
        if getattr(parameter, "_borrowed", False):
            parameter.data = parameter.data.clone()
            parameter._borrowed = False


def own_state(model: nn.Module, left_out: tuple[str, ...]) -> dict[str, Tensor]:
    """What a folder must hold: parameters and buffers, each once, without frozen ones below `left_out` prefixes."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    # named_parameters names a shared parameter once, which is what safetensors wants.
    names = [n for n, _ in model.named_parameters()]
    persistent = model.state_dict()
    names += [n for n, _ in model.named_buffers() if n in persistent]
    kept = [n for n in names if not n.startswith(left_out) or n in trained or ".lora_" in n] if left_out else names
    return {n: persistent[n] for n in kept}


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], left_out: tuple[str, ...] = (), *, take_dtype: bool = False
) -> LoadingInfo:
    """Copy what fits; a vocabulary table may be shorter or longer than the model's.

    Args:
        model: receives the values.
        state: values by name.
        left_out: prefixes of what the state need not hold.
        take_dtype: parameters take over the precision of their values in place of keeping their own.

    Raises:
        ValueError: a tensor of another shape.
    """
    own = model.state_dict()
    expected = set(own_state(model, left_out))
    ready = {}
    for name, value in state.items():
        if name not in own:
            continue
        if value.shape != own[name].shape:
            table = name.endswith(("word_embeddings.weight", "lm_head.bias")) and value.shape[1:] == own[name].shape[1:]
            if not table:
                raise ValueError(
                    f"{name} must have shape {tuple(own[name].shape)}, got {tuple(value.shape)}: the configuration does not fit"
                )
            rows = min(len(value), len(own[name]))
            value = torch.cat([value[:rows].to(own[name]), own[name][rows:]])
        ready[name] = value
    for name, parameter in model.named_parameters():
        if name in ready:
            make_own([parameter])
            if take_dtype:
                parameter.data = parameter.data.to(ready[name].dtype)
    model.load_state_dict(ready, strict=False)
    return LoadingInfo(tuple(sorted(expected - set(ready))), tuple(sorted(set(state) - set(own))))


def read_folder(name: str | Path, **hub: Any) -> dict[str, Tensor]:
    """The weights of a folder, or of a repository on the hub, in one file or in several.

    Args:
        name: the folder or the repository.
        hub: `revision`, `subfolder`, `token`, `cache_dir`, `force_download`, `local_files_only`, `proxies`.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        one = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        if one is None:
            index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **hub)
            files, _ = get_checkpoint_shard_files(name, index, **hub)
        else:
            files = [one]
        return {key: value for file in files for key, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise incomplete(name, error) from error


def incomplete(name: str | Path, error: Exception) -> ValueError:
    """The error for a folder that lacks something."""
    return ValueError(f"folder must hold a complete saved model, got {name}: {error}")
