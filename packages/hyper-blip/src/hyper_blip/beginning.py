"""Where stage 1 begins: a Euclidean BLIP-2, a vision encoder and BERT, or a least-squares tie of queries and captions.

References: Li et al., "BLIP-2", ICML 2023, section 4.1 (a Q-Former starts from BERT-base; cross-attention is new); the tie is ours,
see `hyper_blip.start`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForMaskedLM, Blip2Config, Blip2ForImageTextRetrieval, Blip2VisionModel

from hyper_blip.config import HyperBlip2Config, HyperbolicConfig, check_positive
from hyper_blip.encoders import Stage1Encoders
from hyper_blip.files import HUB, finished
from hyper_blip.qformer import (
    joint_states,
)
from hyper_blip.start import FLOOR, Affine, apply_map, check_varied, ridge_map, set_linear, whitened_components
from hyper_blip.weights import LoadingInfo, bert_state, load_into


class Stage1Start(Stage1Encoders):
    """The ways to begin of `HyperBlip2ForPretraining`."""

    @classmethod
    def from_blip2(
        cls,
        source: str | Blip2ForImageTextRetrieval,
        hyperbolic: HyperbolicConfig | None = None,
        *,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Start from a Euclidean BLIP-2.

        Args:
            source: a `Blip2ForImageTextRetrieval`, which stays as it is (frozen weights are shared with it), or a name or folder
                for its `from_pretrained`. Captioning checkpoints lack the text side of the Q-Former, which is then initialised
                afresh: see `load_bert`.
            hyperbolic: the settings; the defaults if None.
            output_loading_info: also return a `LoadingInfo`.
            options: `cls_token_id`, `sep_token_id`, `dec_token_id` where they are not BERT's; for a name or folder also arguments
                of its `from_pretrained`, such as `dtype`, `device_map` and `revision`.

        Returns:
            The model in evaluation mode, and the `LoadingInfo` if asked.
        """
        ids = {name: options.pop(name) for name in ("cls_token_id", "sep_token_id", "dec_token_id") if name in options}
        missing: tuple[str, ...] = ()
        unexpected: tuple[str, ...] = ()
        if isinstance(source, str):
            settings = Blip2Config.from_pretrained(source, **{k: v for k, v in options.items() if k in HUB})
            settings.qformer_config.use_qformer_text_input = True
            settings.image_token_index = None
            source, info = Blip2ForImageTextRetrieval.from_pretrained(
                source, config=settings, output_loading_info=True, **options
            )
            missing = tuple(f"blip2.{n}" for n in sorted(info["missing_keys"]))
            unexpected = tuple(sorted(info["unexpected_keys"]))
        config = HyperBlip2Config(source.config, hyperbolic or HyperbolicConfig(), **ids)
        model = cls(config, blip2=source).to(source.device)
        fresh = tuple(n for n, _ in model.named_parameters() if not n.startswith("blip2."))
        return finished(model, LoadingInfo(tuple(sorted((*missing, *fresh))), unexpected), output_loading_info)

    @classmethod
    def from_bert(
        cls,
        source: str | Path,
        bert: str | Path,
        hyperbolic: HyperbolicConfig | None = None,
        *,
        dtype: torch.dtype | str = torch.bfloat16,
        ids: Mapping[str, int] | None = None,
        **hub: Any,
    ) -> Any:
        """Stage 1 as BLIP-2 begins it: the vision encoder of a checkpoint, a Q-Former from BERT, new cross-attention.

        Of the checkpoint only the vision encoder is read, in the precision that it is held in.

        Args:
            source: name or folder of a BLIP-2 checkpoint with or without a language model.
            bert: name or folder of a BERT as wide as the Q-Former.
            hyperbolic: the settings; the defaults if None.
            dtype: of the vision encoder; what trains is in single precision.
            ids: `cls_token_id`, `sep_token_id`, `dec_token_id` where they are not BERT's.
            hub: arguments of `from_pretrained` for the encoder, such as `device_map` and `revision`.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: BERT and Q-Former do not fit.
        """
        settings = Blip2Config.from_pretrained(source, **{k: v for k, v in hub.items() if k in HUB})
        vision = Blip2VisionModel.from_pretrained(
            source, config=settings.vision_config, key_mapping={r"^vision_model\.": ""}, dtype=dtype, **hub
        )
        vision.post_layernorm.float()
        config = HyperBlip2Config(settings, hyperbolic, **(ids or {}))
        model = cls(config, vision_model=vision).to(vision.device).eval()
        model.load_bert(AutoModelForMaskedLM.from_pretrained(bert).state_dict())
        return model

    def load_bert(self, state: Mapping[str, Tensor]) -> LoadingInfo:
        """Start the Q-Former from a BERT state dict of the same width; cross-attention and the heads that it lacks stay.

        Args:
            state: of `transformers.BertModel` or a model around one.

        Returns:
            What the state left open.
        """
        embeddings = self.blip2.embeddings
        rows = (embeddings.word_embeddings.num_embeddings, embeddings.position_embeddings.num_embeddings)
        return load_into(self, bert_state(state, *rows))

    def use_tokenizer(self, tokenizer: Any) -> "Stage1Start":
        """Let pruning keep or remove whole words: ids whose token begins with "##" continue a word."""
        size = self.config.blip2.qformer_config.vocab_size
        starts = torch.ones(size, dtype=torch.bool)
        for token, number in tokenizer.get_vocab().items():
            if token.startswith("##") and number < size:
                starts[number] = False
        self.starts_word = starts
        return self

    @torch.no_grad()
    def start_from_pairs(
        self,
        pixel_values: Float[Tensor, "pictures channels height width"],
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "rows places"],
        *,
        value_ridge: float = 1.0,
        ridge: float = 0.1,
        floor: float = FLOOR,
        linear: bool = False,
        dropout_passes: int = 4,
        batch_size: int = 128,
    ) -> "Stage1Start":
        """Tie queries and captions by least squares before the first step, so that few pictures suffice.

        Set in closed form: the values of all cross-attentions (ridge regression of the mean patch on the whitened principal
        components of the caption states, passed on unchanged), the text projection (such components, of the states as training
        sees them, with dropout), and the vision projection (ridge regression of the queries on the projected captions). Features
        of both sides then have mean norm sqrt(d), texts in training and pictures in evaluation; the default `init_scale` turns
        it into 1. Call it after `load_bert`, once. See `hyper_blip.start`.

        Args:
            pixel_values: training pictures.
            input_ids: one caption of each, [CLS] ... [SEP], padded.
            attention_mask: 1 at tokens.
            value_ridge: penalty of the first regression in units of the mean variance of its inputs, > 0.
            ridge: penalty of the second, > 0.
            floor: share of the largest deviation below which a component of the captions is damped, > 0.
            linear: start the queries' feed-forward nets at 0. They pass on what attention found, where those of the text would mix it.
            dropout_passes: how often each caption is read with dropout (seed torch for the same start twice).
            batch_size: pictures encoded at once.

        Returns:
            This model, in the mode it was in.

        Raises:
            ValueError: inputs that do not fit, pictures or captions that are all equal, or features that are not finite.
        """
        self._check_text(input_ids, attention_mask)
        counts = {"dropout_passes": dropout_passes, "batch_size": batch_size}
        for name, value in {"value_ridge": value_ridge, "ridge": ridge, "floor": floor, **counts}.items():
            check_positive(name, value)
        if len(pixel_values) != len(input_ids):
            raise ValueError(
                f"pixel_values must hold {len(input_ids)} pictures, one per caption, got {len(pixel_values)}"
            )
        check_varied("input_ids", input_ids)
        mode = self.training
        self.eval()
        try:
            if linear:
                for layer in self.blip2.qformer.encoder.layer:
                    for parameter in layer.output_query.dense.parameters():
                        parameter.zero_()
            pictures = pixel_values.split(batch_size)
            self._tie(pictures, input_ids, attention_mask, value_ridge, ridge, floor, dropout_passes)
        finally:
            self.train(mode)
        return self

    def _tie(
        self,
        pictures: Sequence[Tensor],
        input_ids: Tensor,
        attention_mask: Tensor,
        value_ridge: float,
        ridge: float,
        floor: float,
        dropout_passes: int,
    ) -> None:
        """`start_from_pairs` in evaluation mode; the vision encoder runs twice, so that its features need not be kept."""
        qformer, device = self.blip2.qformer, self.device
        texts = [x.to(device).split(len(pictures[0])) for x in (input_ids, attention_mask)]
        words = self._class_states(*texts)
        patches = torch.cat([self.vision_features(part.to(device)).mean(1) for part in pictures])
        words = check_varied("input_ids", words).double()
        patches = check_varied("pixel_values", patches).double()

        width = qformer.config.hidden_size
        value = ridge_map(patches, apply_map(whitened_components(words, width, floor), words), value_ridge)
        for layer in qformer.encoder.layer:
            if layer.has_cross_attention:
                set_linear(layer.crossattention.attention.value, value)
                set_linear(layer.crossattention.output.dense, Affine(torch.eye(width), torch.zeros(width)))
        qformer.train()
        read = torch.cat([self._class_states(*texts) for _ in range(dropout_passes)]).double()
        qformer.eval()
        text = whitened_components(read, self.blip2.text_projection.out_features, floor)
        set_linear(self.blip2.text_projection, text)
        features = (self.vision_features(part.to(device)) for part in pictures)
        queries = torch.cat([joint_states(self.blip2, image)[0] for image in features]).double()
        targets = apply_map(text, words).repeat_interleave(queries.shape[1], 0)
        set_linear(self.blip2.vision_projection, ridge_map(queries.flatten(0, 1), targets, ridge))
