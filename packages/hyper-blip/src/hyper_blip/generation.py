"""Stage 2: the queries become a prefix of a frozen language model; the hyperbolic projector stays for the radius.

References: Li et al., "BLIP-2", ICML 2023, section 3.3; Hu et al., "LoRA", ICLR 2022 (optional, on the language model).
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionModel,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import ModelOutput

from hyper_blip.base import HyperBlip2Model, built, start_queries
from hyper_blip.config import HyperBlip2Config, HyperbolicConfig, check_positive
from hyper_blip.files import finished
from hyper_blip.pretraining import HyperBlip2ForPretraining
from hyper_blip.projection import HyperbolicFeatures
from hyper_blip.start import Affine, check_varied, mean_words, ridge_map, set_linear
from hyper_blip.vision import load_module
from hyper_blip.weights import LoadingInfo, borrowed, load_into


class HyperBlip2ForConditionalGeneration(HyperBlip2Model, GenerationMixin):
    """BLIP-2's stage 2 on `transformers.Blip2ForConditionalGeneration`, with a decoder-only language model or an encoder-decoder (T5).

    The Euclidean query states enter `language_projection`; the loss is that of the language model alone. Vision encoder and
    language model are frozen.

    Args:
        config: the configuration; `blip2.image_token_index` marks the places of the queries in a text.
        blip2: a model to take over; built from the configuration if None.
        language_model: a language model in place of that of `blip2.text_config`.
        vision: a vision module `(B, 3, H, W) -> (B, M, C)` in place of BLIP-2's own.
        vision_model: BLIP-2's own vision encoder, where it is there already.

    Raises:
        ValueError: no image token.
    """

    def __init__(
        self,
        config: HyperBlip2Config,
        *,
        blip2: Blip2ForConditionalGeneration | None = None,
        language_model: PreTrainedModel | None = None,
        vision: nn.Module | None = None,
        vision_model: Blip2VisionModel | None = None,
    ) -> None:
        config = copy.deepcopy(config)
        settings = config.blip2
        if settings.image_token_index is None:
            raise ValueError("config.blip2.image_token_index must be the id of an image token, got None")
        if blip2 is None:
            if language_model is None and config.language_locator:
                language_model = load_module(config.language_locator)
            parts = {} if language_model is None else {"language_model": language_model}
            if parts:
                settings.text_config = copy.deepcopy(language_model.config)
                settings.is_encoder_decoder = language_model.config.is_encoder_decoder
                settings.use_decoder_only_language_model = not settings.is_encoder_decoder
            blip2 = built(Blip2ForConditionalGeneration, settings, vision_model, **parts)
            start_queries(blip2)
        else:
            blip2 = borrowed(blip2)
            settings = blip2.config
            config.blip2 = settings
        super().__init__(config, blip2, vision)
        self.vision_projection = nn.Linear(settings.qformer_config.hidden_size, settings.image_text_hidden_size)
        # The radius needs no gradient from the language loss, which never sees it.
        self.vision_projection.requires_grad_(False)
        for module in (self.image_projector, self.curvature):
            module.requires_grad_(False)
        self.blip2.language_model.requires_grad_(False)
        self.lm_frozen = True
        if config.lora is not None:
            self._attach_lora()
        self.train(self.training)
        self.post_init()
        # What the Hugging Face model generates with: it asks its language model.
        self.generation_config = copy.deepcopy(self.blip2.language_model.generation_config)

    def train(self, mode: bool = True) -> "HyperBlip2ForConditionalGeneration":
        """Set the mode, but leave a frozen vision encoder, and a language model without LoRA, in evaluation mode."""
        super().train(mode)
        if getattr(self, "lm_frozen", False) and self.config.lora is None:
            self.blip2.language_model.eval()
        return self

    def _attach_lora(self) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("LoRA on the language model needs the extra: pip install 'hyper-blip[lora]'") from error
        inject_adapter_in_model(LoraConfig(**self.config.lora), self.blip2.language_model)

    # ------------------------------------------------------------------ loading

    @classmethod
    def from_pretraining(
        cls,
        model: HyperBlip2ForPretraining,
        language_model: PreTrainedModel | None = None,
        *,
        image_token_id: int,
        language_locator: str = "",
        lora: dict[str, Any] | None = None,
        vision: nn.Module | None = None,
    ) -> "HyperBlip2ForConditionalGeneration":
        """Go on from stage 1.

        Args:
            model: the model of stage 1.
            language_model: a causal language model; what the locator names if None.
            image_token_id: a token id that no text holds.
            language_locator: where the language model comes from, so that `save_pretrained` need not write it.
            lora: arguments of `peft.LoraConfig`, for example {"r": 8, "target_modules": ["q_proj", "v_proj"]}.
            vision: the vision module, where stage 1 was given one.

        Returns:
            The model of stage 2; its language projection is new.
        """
        old = model.config
        if language_model is None:
            language_model = load_module(language_locator)
        qformer = old.blip2.qformer_config.to_dict() | {"use_qformer_text_input": False}
        blip2 = Blip2Config(
            vision_config=old.blip2.vision_config.to_dict(),
            qformer_config=qformer,
            text_config=language_model.config.to_dict(),
            num_query_tokens=old.blip2.num_query_tokens,
            image_text_hidden_size=old.blip2.image_text_hidden_size,
            image_token_index=image_token_id,
        )
        kept = ("cls_token_id", "sep_token_id", "dec_token_id", "prompt", "max_tokens")
        config = HyperBlip2Config(
            blip2,
            old.hyperbolic,
            vision_locator=old.vision_locator,
            language_locator=language_locator,
            lora=lora,
            **{name: getattr(old, name) for name in kept},
        )
        if vision is None and model._external_vision:
            vision = model.blip2.vision_model.module
        own = None if model._external_vision else model.blip2.vision_model
        found = cls(config, language_model=language_model, vision=vision, vision_model=own)
        shared = ("blip2.vision_model.",) if own is not None else ()
        state = {
            n.replace("blip2.vision_projection.", "vision_projection."): v
            for n, v in model.state_dict().items()
            if not n.startswith(shared)
        }
        load_into(found, state)
        return found.to(model.device)

    @classmethod
    def from_blip2(
        cls,
        source: str | Blip2ForConditionalGeneration,
        hyperbolic: HyperbolicConfig | None = None,
        *,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Take over a `Blip2ForConditionalGeneration`, or load one by name.

        Such a checkpoint does not hold the projection to the radius: `radius` and `encode_image` refuse to answer.

        Args:
            source: the model, which stays as it is (frozen weights are shared with it), or a name or folder.
            hyperbolic: the settings; the defaults if None.
            output_loading_info: also return a `LoadingInfo`.
            options: for a name or folder, arguments of its `from_pretrained`, such as `dtype`, `device_map` and `revision`.

        Returns:
            The model in evaluation mode, and the `LoadingInfo` if asked.
        """
        if isinstance(source, str):
            source = Blip2ForConditionalGeneration.from_pretrained(source, **options)
        config = HyperBlip2Config(source.config, hyperbolic or HyperbolicConfig(), has_radius=False)
        model = cls(config, blip2=source).to(source.device)
        fresh = tuple(n for n, _ in model.named_parameters() if n.startswith("vision_projection."))
        return finished(model, LoadingInfo(fresh, ()), output_loading_info)

    @torch.no_grad()
    def start_from_captions(
        self,
        pixel_values: Float[Tensor, "pictures channels height width"],
        labels: Int[Tensor, "batch tokens"],
        *,
        ridge: float = 0.1,
        batch_size: int = 128,
    ) -> "HyperBlip2ForConditionalGeneration":
        """Point the language projection at the words of the captions before the first step, so that few pictures suffice.

        A fresh projection gives the language model noise in the place of pictures: it first learns to ignore them, and with few
        pictures it stays there. Set in closed form, in evaluation mode: the ridge regression of the queries on their caption's
        mean word embedding, scaled to the mean norm of the word embeddings. In that mean a word weighs ln(pictures / captions
        that hold it), so what all captions share counts nothing. See `hyper_blip.start`.

        Args:
            pixel_values: training pictures.
            labels: one caption of each as token ids, -100 elsewhere (see `caption_batch`).
            ridge: penalty in units of the mean variance of the queries, > 0.
            batch_size: pictures encoded at once.

        Returns:
            This model, in the mode it was in.

        Raises:
            ValueError: inputs that do not fit, pictures or captions that are all equal, or features that are not finite.
        """
        for name, value in (("ridge", ridge), ("batch_size", batch_size)):
            check_positive(name, value)
        if len(pixel_values) != len(labels):
            raise ValueError(f"pixel_values must hold {len(labels)} pictures, one per caption, got {len(pixel_values)}")
        table = self.blip2.language_model.get_input_embeddings().weight
        check_varied("labels", labels)
        words = mean_words(labels.to(table.device), table)
        mode = self.training
        self.eval()
        try:
            parts = [self._queries(part.to(self.device)) for part in pixel_values.split(batch_size)]
            queries = check_varied("pixel_values", torch.cat(parts)).double()
        finally:
            self.train(mode)
        affine = ridge_map(queries.flatten(0, 1), words.repeat_interleave(queries.shape[1], 0), ridge)
        norm = table.float().norm(dim=1).mean().item() / len(affine.bias) ** 0.5
        set_linear(self.blip2.language_projection, Affine(affine.weight * norm, affine.bias * norm))
        return self

    # ------------------------------------------------------------------ use

    def forward(
        self,
        pixel_values: Float[Tensor, "batch channels height width"],
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"],
        labels: Int[Tensor, "batch words"] | None = None,
    ) -> ModelOutput:
        """Logits of the language model, and its loss.

        Args:
            pixel_values: pictures.
            input_ids: Q image tokens and a text in every row (see `caption_batch`).
            attention_mask: 1 at tokens.
            labels: token ids, -100 at queries, prompt and padding; for an encoder-decoder the captions alone.

        Returns:
            An output with `loss` (None without labels) and `logits` `(batch tokens vocabulary)`.

        Raises:
            ValueError: another number of image tokens, or a loss that is not finite.
        """
        self._check_image_tokens(input_ids)
        out = self.blip2(
            pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask, labels=labels,
            interpolate_pos_encoding=self._resized(pixel_values),
        )  # fmt: skip
        if out.loss is not None and not bool(out.loss.detach().isfinite()):
            raise ValueError(
                f"the loss must be finite, got {out.loss.item()}: look at this batch and at the learning rate"
            )
        return out

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Float[Tensor, "batch channels height width"],
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        **options: Any,
    ) -> Int[Tensor, "rows new"]:
        """Continue a text about each picture.

        Args:
            pixel_values: pictures.
            input_ids: Q image tokens and a prompt in every row; the image tokens and what begins a text if None.
            attention_mask: 1 at tokens; all if None.
            options: of `transformers.GenerationMixin.generate`; prefer `max_new_tokens`, as lengths count the queries.

        Returns:
            Token ids: the input, then what was generated; of an encoder-decoder, what its decoder wrote.

        Raises:
            ValueError: another number of image tokens.
        """
        if input_ids is None:
            begin = self.config.blip2.text_config.bos_token_id
            row = [self.config.blip2.image_token_index] * self.num_queries + ([] if begin is None else [begin])
            input_ids = torch.tensor(row, device=self.device).repeat(len(pixel_values), 1)
        self._check_image_tokens(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        resized = self._resized(pixel_values)
        # One configuration: transformers no longer takes one beside single settings.
        settings = copy.deepcopy(options.pop("generation_config", self.generation_config))
        more = settings.update(**options)
        return self.blip2.generate(
            pixel_values, input_ids=input_ids, attention_mask=mask, interpolate_pos_encoding=resized,
            generation_config=settings, **more,
        )  # fmt: skip

    @torch.no_grad()
    def encode_image(self, pixel_values: Float[Tensor, "batch channels height width"]) -> HyperbolicFeatures:
        """Hyperbolic features of all queries of each picture, parts `(B, Q, ...)`.

        Raises:
            ValueError: features that are not finite, or a model whose projection was never trained.
        """
        if not self.config.has_radius:
            raise ValueError(
                "the projection to the radius must come from stage 1, got a checkpoint without it: take from_pretraining"
            )
        return self._lift(self.image_projector, self.vision_projection, self._queries(pixel_values), "pixel_values")

    def _queries(self, pixel_values: Tensor) -> Tensor:
        """States of the queries `(B, Q, width)`."""
        return self.blip2.qformer(
            query_embeds=self.blip2.query_tokens.expand(len(pixel_values), -1, -1),
            encoder_hidden_states=self.vision_features(pixel_values),
        ).last_hidden_state

    def radius(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
        """Mean distance of a picture's queries to the origin; low for vague pictures, if training made it so."""
        return self.encode_image(pixel_values).radius.mean(1)

    def _check_image_tokens(self, input_ids: Tensor) -> None:
        token = self.config.blip2.image_token_index
        counts = (input_ids == token).sum(1)
        if bool((counts != self.num_queries).any()):
            raise ValueError(
                f"input_ids must hold {self.num_queries} image tokens (id {token}) in every row, got {counts.tolist()}"
            )
