"""A small LLaVA (Liu et al., "Visual instruction tuning", 2023) of parts that are on the Python package index.

Eye: pooled stages of EfficientNet-Lite0 (Tan and Le, 2019), one token a picture. Connector: LLaVA's two-layer MLP. Language
model: SmolLM2-135M-Instruct (Ben Allal et al., 2025). It is transformers' own LlavaForConditionalGeneration, so whatever works
on LLaVA works on it. Prompts are as short as they can be: picture, question, answer, line break, and so on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from app_data.store.errors import DataError
from app_data.store.sealed import check_sealed
from app_data.store.text import read_json
from app_data.weights.lite0_minilm import lite0
from app_data.weights.smollm2 import load_smollm2
from app_data.weights.towers import LITE0_WIDTHS, lite0_stages

FORMAT = 1
EYE_WIDTH = sum(LITE0_WIDTHS)
# A control token of SmolLM2 that no text holds marks the place of a picture.
IMAGE_TOKEN = "<file_sep>"
CARD, WEIGHTS = "card.json", "icl_mini.safetensors"
IGNORED = -100


class EyeConfig(PreTrainedConfig):
    """Settings of `Eye`: the number of its features."""

    model_type = "lite0_stages"

    def __init__(self, hidden_size: int = EYE_WIDTH, **kwargs: Any) -> None:
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class Eye(PreTrainedModel):
    """EfficientNet-Lite0's pooled stages as the one token of a picture, standardised; frozen.

    Features that were computed before pass through, so that a frozen network runs once for each picture. The network itself is
    read from its package when the first picture comes, and is not among the weights.
    """

    config_class = EyeConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EyeConfig) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.hidden_size))
        self.register_buffer("std", torch.ones(config.hidden_size))
        self._trunk: list[nn.Module] = []
        self.post_init()

    def fit_statistics(self, features: Float[Tensor, "pictures width"]) -> None:
        """Take mean and standard deviation of the training pictures; dead features keep the scale 1."""
        std = features.std(0)
        self.mean.copy_(features.mean(0))
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Tokens (batch, 1, width) of preprocessed pictures (batch, 3, height, width), or of their features (batch, width)."""
        if pixel_values.ndim == 4:
            if not self._trunk:
                self._trunk.append(lite0(0).requires_grad_(False))
            with torch.no_grad():
                pixel_values = lite0_stages(self._trunk[0], pixel_values)
        tokens = ((pixel_values - self.mean) / self.std).unsqueeze(1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(EyeConfig.model_type, EyeConfig, exist_ok=True)
AutoModel.register(EyeConfig, Eye, exist_ok=True)


def build_llava(
    language: nn.Module, image_token: int, width: int = EYE_WIDTH, seed: int = 0
) -> LlavaForConditionalGeneration:
    """A LLaVA around a causal language model, whose weights it shares; the connector is drawn from `seed`.

    Args:
        language: A causal model of transformers, such as LlamaForCausalLM.
        image_token: Id of the token that marks a picture.
        width: Features of the eye.
        seed: Of the connector.
    """
    config = LlavaConfig(
        vision_config=EyeConfig(hidden_size=width),
        text_config=language.config,
        image_token_index=image_token,
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = Eye(config.vision_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.model.language_model, model.lm_head = language.model, language.lm_head
    return model.eval()


@dataclass(frozen=True)
class Shown:
    """One picture with a question and, for demonstrations and training, its answer; `asked` says whether training asks for it."""

    features: Float[Tensor, " width"]
    question: str
    answer: str = ""
    asked: bool = True


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it stands, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class IclMini(nn.Module):
    """The model, its tokenizer and its prompts.

    Args:
        llava: See `build_llava`.
        tokenizer: Of the language model.
        card: Facts about the training, kept beside the weights.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, tokenizer: Any, card: Mapping[str, Any] | None = None):
        super().__init__()
        self.llava, self.tokenizer, self.card = llava, tokenizer, dict(card or {})
        self._known: dict[str, list[int]] = {}

    def train(self, mode: bool = True) -> "IclMini":
        """Set the mode; the eye stays as it is."""
        super().train(mode)
        self.llava.model.vision_tower.eval()
        return self

    @property
    def start(self) -> list[int]:
        """The one token before the first picture."""
        return [self.tokenizer.bos_token_id]

    def ids(self, text: str) -> list[int]:
        """Ids of a piece of text; pieces are joined after tokenizing, so none merges with its neighbour."""
        if text not in self._known:
            self._known[text] = text_ids(self.tokenizer, text)
        return self._known[text]

    def question_ids(self, shown: Shown) -> list[int]:
        """A picture and what is asked."""
        return [self.llava.config.image_token_id, *self.ids(shown.question)]

    def answer_ids(self, answer: str) -> list[int]:
        """An answer."""
        return self.ids(f" {answer}")

    def demo_ids(self, shown: Shown) -> list[int]:
        """A demonstration: picture, question, answer, line break."""
        return [*self.question_ids(shown), *self.answer_ids(shown.answer), *self.ids("\n")]

    def episode_batch(self, episodes: Sequence[Sequence[Shown]]) -> dict[str, Tensor]:
        """Episodes as one batch, padded on the right; every answer asked for is a target, with the ones before as context."""
        rows, targets = [], []
        for episode in episodes:
            row, wanted = list(self.start), [IGNORED]
            for shown in episode:
                asked, answer, end = self.question_ids(shown), self.answer_ids(shown.answer), self.ids("\n")
                row += [*asked, *answer, *end]
                wanted += [IGNORED] * len(asked) + (answer if shown.asked else [IGNORED] * len(answer))
                wanted += [IGNORED] * len(end)
            rows.append(row)
            targets.append(wanted)
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id

        def padded(lists: Sequence[list[int]], value: int) -> Tensor:
            return torch.tensor([one + [value] * (length - len(one)) for one in lists])

        return {
            "input_ids": padded(rows, pad),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
            "targets": padded(targets, IGNORED),
            "features": torch.stack([shown.features for episode in episodes for shown in episode]),
        }

    def forward(
        self,
        features: Float[Tensor, "pictures width"],
        input_ids: Int64[Tensor, "batch tokens"] | None = None,
        attention_mask: Int64[Tensor, "batch tokens"] | None = None,
        targets: Int64[Tensor, "batch tokens"] | None = None,
        words: Float[Tensor, "pictures words"] | None = None,
        word_ids: Int64[Tensor, " words"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of episodes (`episode_batch`), or with `words` that of the connector alone (`align_loss`)."""
        if words is not None:
            return self.align_loss(features, words, word_ids)
        states = self.llava.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=features, use_cache=False
        ).last_hidden_state
        known = targets[:, 1:] != IGNORED
        return F.cross_entropy(self.llava.lm_head(states[:, :-1][known]).float(), targets[:, 1:][known])

    def align_loss(
        self,
        features: Float[Tensor, "pictures width"],
        words: Float[Tensor, "pictures words"],
        word_ids: Int64[Tensor, " words"],
        scale: float = 20.0,
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the pictures' words by cosine with the language model's embeddings; no language model runs.

        A second term keeps the tokens as long as the embeddings are.

        Args:
            features: Of pictures.
            words: True words of every picture, as shares that sum to 1.
            word_ids: Their token ids.
            scale: Factor on the cosines.
        """
        tokens = torch.cat(list(self.llava.model.get_image_features(features).pooler_output))
        table = self.llava.get_input_embeddings().weight[word_ids].detach()
        length = table.norm(dim=-1).mean()
        centre = table.mean(0)
        logits = scale * F.normalize(tokens - centre, dim=-1) @ F.normalize(table - centre, dim=-1).mT
        return F.cross_entropy(logits, words) + (tokens.norm(dim=-1) / length - 1).square().mean()

    def no_decay_names(self) -> set[str]:
        """Names of trained parameters that weight decay leaves alone."""
        return {name for name, value in self.named_parameters() if value.requires_grad and value.ndim < 2}

    def clamp_(self) -> None:
        """Nothing here has a range to be kept in."""

    def saved_state(self) -> Iterator[tuple[str, Tensor]]:
        """What training made: connector, LoRA, and the eye's statistics."""
        for name, value in self.llava.named_parameters():
            if "multi_modal_projector" in name or ".lora_" in name:
                yield name, value
        yield from self.llava.model.vision_tower.named_buffers(prefix="model.vision_tower")

    def save(self, folder: Path) -> None:
        """Write weights and card into a folder; the language model stays in its package."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: v.detach().cpu().contiguous().clone() for n, v in self.saved_state()}, folder / WEIGHTS)
        (folder / CARD).write_text(json.dumps({"format": FORMAT, **self.card}, indent=1) + "\n", encoding="utf-8")

    def load_weights(self, folder: Path) -> "IclMini":
        """Read what `save` wrote; LoRA is added to the weights it belongs to.

        Raises:
            DataError: The folder holds no finished model, or one of another form.
        """
        card = _card(folder)
        try:
            saved = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{folder} holds no trained icl-mini ({error}): give the folder of a finished run"
            ) from error
        self.card = card
        plain = {name: value for name, value in saved.items() if ".lora_" not in name}
        unknown = set(plain) - set(self.llava.state_dict())
        if unknown:
            raise DataError(f"{folder / WEIGHTS} does not fit the model: it holds {sorted(unknown)[:3]}")
        self.llava.load_state_dict(plain, strict=False)
        with torch.no_grad():
            for name, down in saved.items():
                if ".lora_A." in name:
                    up, at = saved[name.replace(".lora_A.", ".lora_B.")], name.split(".lora_A.")[0]
                    self.llava.get_submodule(at).weight.add_(up @ down, alpha=card["lora_scale"])
        return self.eval().requires_grad_(False)


def _card(folder: Path) -> dict[str, Any]:
    """What a saved model says of itself; its files are as its run left them."""
    check_sealed(folder)
    card = read_json(folder / CARD, "give the folder of a finished run", "give the folder of a finished run")
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise DataError(f"{folder / CARD} must be an object of format {FORMAT}, got {card!r:.80}")
    return card


def load_icl_mini(folder: Path, language: tuple[nn.Module, Any] | None = None) -> IclMini:
    """A trained model.

    Args:
        folder: Of a finished run, or the model's own.
        language: Language model and tokenizer; SmolLM2-135M if None.

    Raises:
        DataError: Nothing trained lies there.
        MissingAssetError: The language model's package is not installed.
    """
    at = folder if (folder / CARD).is_file() else folder / "model"
    if not (at / CARD).is_file():
        raise DataError(f"{folder} holds no trained icl-mini: give the folder of a finished run")
    decoder, tokenizer = load_smollm2() if language is None else language
    width = _card(at).get("eye_width", EYE_WIDTH)
    return IclMini(build_llava(decoder, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), width), tokenizer).load_weights(
        at
    )
