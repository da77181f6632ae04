"""Stage 1: the Q-Former learns to align, to match and to describe, with hyperbolic features.

References: Li et al., "BLIP-2", ICML 2023, section 3.2 (three losses on one Q-Former); Mandica et al., arXiv:2408.05097
(hyperbolic contrastive loss, Random Query Selection, Random Text Pruning). With `HyperbolicConfig.euclidean()` the losses are
those of LAVIS's stage 1.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, Blip2Config, Blip2ForImageTextRetrieval, Blip2VisionModel
from transformers.modeling_outputs import ModelOutput

from hyper_blip.base import HUB, HyperBlip2Model, _finished, built, copy_text_ffn, start_queries
from hyper_blip.config import HyperBlip2Config, HyperbolicConfig, check_positive
from hyper_blip.diagnostics import stage1_diagnostics
from hyper_blip.gather import common_tokens, everywhere, fetch_rows, world
from hyper_blip.losses import (
    IGNORED,
    MixSchedule,
    entailment_loss,
    hard_negatives,
    image_text_contrastive_loss,
    image_text_matching_loss,
    matching_positives,
    query_diversity_penalty,
    text_generation_loss,
)
from hyper_blip.projection import HyperbolicFeatures, Temperature
from hyper_blip.qformer import (
    BIDIRECTIONAL,
    CAUSAL,
    JOINT,
    ImageKeys,
    LMHead,
    Segment,
    decoder_ids,
    image_keys,
    joint_states,
)
from hyper_blip.sampling import Priority, RandomQuerySelection, RandomTextPruning, stateless_seed, text_keys
from hyper_blip.similarity import aggregate_queries, pairwise_similarity, query_midpoint
from hyper_blip.skipping import nothing_to_learn
from hyper_blip.start import Affine, apply_map, check_varied, ridge_map, set_linear, whitened_components
from hyper_blip.weights import LoadingInfo, bert_state, borrowed, load_into

_LOG = logging.getLogger(__name__)


@dataclass
class PretrainingOutput(ModelOutput):
    """Losses and features of one batch.

    Attributes:
        loss: the weighted sum.
        loss_itc, loss_itm, loss_lm, loss_entail, loss_diversity: its parts, unweighted; 0 where the weight is 0.
        image_features: tangent vectors at the origin of all queries, `(B, Q, d)`.
        text_features: tangent vectors of the captions as the contrastive loss saw them, `(B, d)`.
        diagnostics: numbers to log, without gradient (see `hyper_blip.diagnostics`).
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_lm: Tensor | None = None
    loss_entail: Tensor | None = None
    loss_diversity: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    diagnostics: dict[str, Tensor] | None = None


class HyperBlip2ForPretraining(HyperBlip2Model):
    """BLIP-2's stage 1 on `transformers.Blip2ForImageTextRetrieval`.

    Args:
        config: the configuration; `blip2.qformer_config.use_qformer_text_input` is switched on.
        blip2: a model to take over; built from the configuration if None.
        vision: a vision module `(B, 3, H, W) -> (B, M, C)` in place of BLIP-2's own.
        vision_model: BLIP-2's own vision encoder, where it is there already.
        priority: ranks words for `rtp_mode="priority"`: takes tuples of token ids, returns a score for each.
    """

    def __init__(
        self,
        config: HyperBlip2Config,
        *,
        blip2: Blip2ForImageTextRetrieval | None = None,
        vision: nn.Module | None = None,
        vision_model: Blip2VisionModel | None = None,
        priority: Priority | None = None,
    ) -> None:
        config = copy.deepcopy(config)
        qformer = config.blip2.qformer_config
        if blip2 is None:
            qformer.use_qformer_text_input = True
            qformer.vocab_size = max(qformer.vocab_size, config.dec_token_id + 1)
            # With an image token the Hugging Face model would take the first Q ids of a plain caption for image tokens.
            config.blip2.image_token_index = None
            blip2 = built(Blip2ForImageTextRetrieval, config.blip2, vision_model)
            start_queries(blip2)
            copy_text_ffn(blip2.qformer)
        else:
            if not qformer.use_qformer_text_input:
                raise ValueError("blip2 must have a Q-Former with use_qformer_text_input=True, got False")
            blip2 = borrowed(blip2)
            _grow_vocabulary(blip2, config.dec_token_id + 1)
            blip2.config.image_token_index = None
            config.blip2 = blip2.config
            qformer = config.blip2.qformer_config
        super().__init__(config, blip2, vision)
        hyper = config.hyperbolic
        self.text_projector = self._projector()
        self.temperature = Temperature(hyper.temperature)
        self.lm_head = LMHead(qformer.hidden_size, qformer.vocab_size, qformer.hidden_act, qformer.layer_norm_eps)
        self.query_selection = RandomQuerySelection(hyper.rqs_prob, hyper.rqs_mode, hyper.seed)
        self.text_pruning = RandomTextPruning(hyper.rtp_prob, hyper.rtp_mode, hyper.seed, priority)
        self.mix_schedule = MixSchedule(*hyper.mix)
        self.starts_word: Tensor | None = None
        self.non_finite_steps = 0
        # (step, progress) of a trainer that cannot pass them: see `hyper_blip.trainer`.
        self.at_step: tuple[int | None, float | None] = (None, None)
        self.post_init()

    # ------------------------------------------------------------------ loading

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
        return _finished(model, LoadingInfo(tuple(sorted((*missing, *fresh))), unexpected), output_loading_info)

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
    ) -> "HyperBlip2ForPretraining":
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

    def use_tokenizer(self, tokenizer: Any) -> "HyperBlip2ForPretraining":
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
        dropout_passes: int = 4,
        batch_size: int = 128,
    ) -> "HyperBlip2ForPretraining":
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
            dropout_passes: how often each caption is read with dropout (seed torch for the same start twice).
            batch_size: pictures encoded at once.

        Returns:
            This model, in the mode it was in.

        Raises:
            ValueError: inputs that do not fit, pictures or captions that are all equal, or features that are not finite.
        """
        self._check_text(input_ids, attention_mask)
        counts = {"dropout_passes": dropout_passes, "batch_size": batch_size}
        for name, value in {"value_ridge": value_ridge, "ridge": ridge, **counts}.items():
            check_positive(name, value)
        if len(pixel_values) != len(input_ids):
            raise ValueError(
                f"pixel_values must hold {len(input_ids)} pictures, one per caption, got {len(pixel_values)}"
            )
        check_varied("input_ids", input_ids)
        mode = self.training
        self.eval()
        try:
            self._tie(pixel_values.split(batch_size), input_ids, attention_mask, value_ridge, ridge, dropout_passes)
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
        value = ridge_map(patches, apply_map(whitened_components(words, width), words), value_ridge)
        for layer in qformer.encoder.layer:
            if layer.has_cross_attention:
                set_linear(layer.crossattention.attention.value, value)
                set_linear(layer.crossattention.output.dense, Affine(torch.eye(width), torch.zeros(width)))
        qformer.train()
        read = torch.cat([self._class_states(*texts) for _ in range(dropout_passes)]).double()
        qformer.eval()
        text = whitened_components(read, self.blip2.text_projection.out_features)
        set_linear(self.blip2.text_projection, text)
        features = (self.vision_features(part.to(device)) for part in pictures)
        queries = torch.cat([joint_states(self.blip2, image)[0] for image in features]).double()
        targets = apply_map(text, words).repeat_interleave(queries.shape[1], 0)
        set_linear(self.blip2.vision_projection, ridge_map(queries.flatten(0, 1), targets, ridge))

    def _class_states(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """States of [CLS] of captions `(n width)`, read part by part."""
        segments = (Segment(*part, BIDIRECTIONAL) for part in zip(ids, masks, strict=True))
        return torch.cat([joint_states(self.blip2, None, [s], queries=False)[0][:, 0] for s in segments])

    # ------------------------------------------------------------------ encoding

    def encode_image(self, pixel_values: Float[Tensor, "batch channels height width"]) -> HyperbolicFeatures:
        """Features of all queries of each picture, parts `(B, Q, ...)`."""
        return self.project_queries(joint_states(self.blip2, self.vision_features(pixel_values))[0])

    def encode_text(
        self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Int[Tensor, "rows places"]
    ) -> HyperbolicFeatures:
        """Features of each caption, parts `(B, ...)`."""
        self._check_text(input_ids, attention_mask)
        return self._project_text(
            joint_states(self.blip2, None, [Segment(input_ids, attention_mask, BIDIRECTIONAL)], queries=False)[0]
        )

    def project_queries(self, states: Float[Tensor, "batch queries width"]) -> HyperbolicFeatures:
        """Query states to hyperbolic space."""
        return self._lift(self.image_projector, self.blip2.vision_projection, states, "pixel_values")

    def _project_text(self, states: Tensor) -> HyperbolicFeatures:
        return self._lift(self.text_projector, self.blip2.text_projection, states[:, 0], "input_ids")

    def similarity(
        self,
        image: HyperbolicFeatures,
        text: HyperbolicFeatures,
        query_agg: str | None = None,
        mode: str | None = None,
    ) -> Float[Tensor, "images texts"]:
        """Similarity of pictures (features of all queries) to texts, as after training.

        Args:
            image: from `encode_image`.
            text: from `encode_text`.
            query_agg: "max", "mean", "fixed", "random" or "midpoint"; that of the configuration if None.
            mode: "cosine", "distance", "inner" or "angle"; that of the configuration if None.
        """
        hyper = self.config.hyperbolic
        how, mode, c = query_agg or hyper.query_agg, mode or hyper.eval_similarity, self.curvature()
        if how == "midpoint":
            one = query_midpoint(image, c, manifold=hyper.manifold)
            return pairwise_similarity(one, text.tangent, mode, c, manifold=hyper.manifold)
        each = pairwise_similarity(image.tangent, text.tangent, mode, c, manifold=hyper.manifold)
        return aggregate_queries(each, how)

    def itm_logits(
        self,
        pixel_values: Float[Tensor, "images channels height width"],
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "rows places"],
    ) -> Float[Tensor, "batch 2"]:
        """Logits of "does not belong" and "belongs" for each pair of a picture and a caption."""
        self._check_text(input_ids, attention_mask)
        return self.match(self.vision_features(pixel_values), input_ids, attention_mask)

    def match(self, image: Tensor | ImageKeys, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "batch 2"]:
        """`itm_logits` from vision features, or from the keys and values of pictures (one picture may meet many texts)."""
        queries = joint_states(self.blip2, image, [Segment(input_ids, attention_mask, JOINT)])[0]
        return self.blip2.itm_head(queries).mean(1).float()

    # ------------------------------------------------------------------ training

    def forward(
        self,
        pixel_values: Float[Tensor, "pictures channels height width"],
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "rows places"],
        image_ids: Int[Tensor, " ids"] | None = None,
        step: int | None = None,
        progress: float | None = None,
    ) -> PretrainingOutput:
        """All losses of stage 1 on a batch of pairs.

        With several processes every rank must hold as many pairs; shorter captions are padded to those of other ranks.

        Args:
            pixel_values: pictures.
            input_ids: captions [CLS] ... [SEP], padded.
            attention_mask: 1 at tokens.
            image_ids: equal for pictures that show the same thing; their pairs count as positive.
            step: number of the optimizer step; needed in training with random queries or pruning (`StepCallback` sets it).
            progress: fraction of training that is done; needed in training with the similarity "mix".

        Returns:
            Losses, features, diagnostics.

        Raises:
            ValueError: inputs that do not fit, a missing step or progress, or features or losses that are not finite; on
                every rank, whichever has them.
        """
        hyper = self.config.hyperbolic
        step = self.at_step[0] if step is None else step
        progress = self.at_step[1] if progress is None else progress
        input_ids, attention_mask = self._checked(pixel_values, input_ids, attention_mask, image_ids, step, progress)
        weights = hyper.loss_weights
        texts = self._prune(input_ids, attention_mask, step)
        image = self.vision_features(pixel_values)
        keys = image_keys(self.blip2.qformer, image) if hyper.share_image_kv else image
        queries, lm_states, itc_states, full_states = self._states(keys, texts)
        image_features, text_features = self.project_queries(queries), self._project_text(itc_states)

        selected = image_features.tangent
        if self.training:
            index = self.query_selection(len(input_ids), self.num_queries, 0 if step is None else step, world()[0])
            if index is not None:
                selected = selected[torch.arange(len(index)), index.to(selected.device)]
        mix = None
        if hyper.similarity == "mix":
            mix = self.mix_schedule(progress) if self.training else 1.0
        pair_keys = text_keys(*texts["itc"])
        loss_itc, i2t, t2i = image_text_contrastive_loss(
            selected,
            text_features.tangent,
            hyper,
            self.temperature(),
            image_ids,
            pair_keys,
            c=self.curvature(),
            mix=mix,
        )
        zero = loss_itc.new_zeros(())
        losses = {"itc": loss_itc, "itm": zero, "lm": zero, "entail": zero, "diversity": zero}
        if weights["itm"]:
            captions = [texts["full"]] if texts["itm"] is texts["full"] else [texts["full"], texts["itm"]]
            same = matching_positives(image_ids, [text_keys(*caption) for caption in captions])
            losses["itm"] = self._itm_loss(keys, texts["itm"], i2t, t2i, same, step)
        if weights["lm"]:
            losses["lm"] = self._lm_loss(lm_states, *texts["lm"])
        if weights["entail"]:
            losses["entail"] = self._entailment(selected, text_features, full_states)
        if weights["diversity"]:
            losses["diversity"] = query_diversity_penalty(image_features.tangent)
        total = sum(weights[name] * loss for name, loss in losses.items())
        total = self._finite(total)
        return PretrainingOutput(
            loss=total,
            image_features=image_features.tangent,
            text_features=text_features.tangent,
            diagnostics=stage1_diagnostics(self, image_features, text_features),
            **{f"loss_{name}": loss for name, loss in losses.items()},
        )

    def _prune(self, ids: Tensor, mask: Tensor, step: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Captions for each loss, whole or pruned, and the whole ones under "full"."""
        hyper = self.config.hyperbolic
        whole = pruned = (ids, mask)
        if self.training and hyper.rtp_prob > 0 and hyper.rtp_targets:
            special = (self.config.cls_token_id, self.config.sep_token_id)
            pad = self.config.blip2.qformer_config.pad_token_id
            pruned = self.text_pruning.prune_ids(
                ids, mask, special, step, world()[0], pad_id=pad, starts_word=self.starts_word
            )
        return {n: pruned if n in hyper.rtp_targets else whole for n in ("itc", "itm", "lm")} | {"full": whole}

    def _states(
        self, image: Tensor | ImageKeys, texts: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor | None, ...]:
        """States of the queries, of the language text, of the contrastive text and of the whole captions."""
        hyper = self.config.hyperbolic
        segments = {"itc": Segment(*texts["itc"], BIDIRECTIONAL)}
        if hyper.loss_weights["lm"]:
            ids, mask = texts["lm"]
            segments["lm"] = Segment(decoder_ids(ids, self.config.dec_token_id), mask, CAUSAL)
        if hyper.loss_weights["entail"] and texts["itc"][0] is not texts["full"][0]:
            segments["full"] = Segment(*texts["full"], BIDIRECTIONAL)
        if hyper.fused:
            queries, *rest = joint_states(self.blip2, image, list(segments.values()))
        else:
            queries = joint_states(self.blip2, image)[0]
            rest = [
                joint_states(self.blip2, image, [s])[1]
                if s.kind == CAUSAL
                else joint_states(self.blip2, None, [s], queries=False)[0]
                for s in segments.values()
            ]
        found = dict(zip(segments, rest, strict=True))
        return queries, found.get("lm"), found["itc"], found.get("full")

    def _itm_loss(
        self,
        image: Tensor | ImageKeys,
        text: tuple[Tensor, Tensor],
        i2t: Tensor,
        t2i: Tensor,
        same: Tensor,
        step: int | None,
    ) -> Tensor:
        """Pairs, then every caption with a wrong picture, then every picture with a wrong caption."""
        num, rank = len(i2t), world()[0]
        local = self.config.hyperbolic.itm_negatives == "local"
        if local:
            own = slice(rank * num, (rank + 1) * num)
            i2t, t2i, same = i2t[:, own], t2i[:, own], same[:, own]
        generator = None
        if step is not None:
            seed = stateless_seed("itm", self.config.hyperbolic.seed, step, rank)
            generator = torch.Generator(i2t.device).manual_seed(seed)
        wrong_image, wrong_text, valid = hard_negatives(i2t, t2i, same, generator)
        kept = valid.nonzero()[:, 0]
        wrong_image, wrong_text = wrong_image[kept], wrong_text[kept]
        take = (lambda x, index: x[index]) if local else fetch_rows
        ids, mask = (torch.cat([x, x[kept], take(x, wrong_text)]) for x in text)
        if isinstance(image, ImageKeys):
            everyone = torch.arange(num, device=kept.device)
            pictures = image.select(torch.cat([everyone, wrong_image, kept]))
        else:
            pictures = torch.cat([image, take(image, wrong_image), image[kept]])
        labels = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        labels[:num] = 1
        return image_text_matching_loss(self.match(pictures, ids, mask), labels)

    def _lm_loss(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        labels = decoder_ids(ids, self.config.dec_token_id).masked_fill(mask == 0, IGNORED)
        logits = self.lm_head(states, self.blip2.embeddings.word_embeddings.weight)
        return text_generation_loss(logits, labels, self.config.hyperbolic.label_smoothing)

    def _entailment(self, image: Tensor, text: HyperbolicFeatures, full_states: Tensor | None) -> Tensor:
        """A text entails its picture; a pruned caption entails the whole one."""
        hyper = self.config.hyperbolic
        more = {"c": self.curvature(), "manifold": hyper.manifold, "min_radius": hyper.entail_min_radius}
        apex = text.tangent if image.ndim == 2 else text.tangent.unsqueeze(1)
        loss = entailment_loss(apex, image, **more)
        if full_states is None:
            return loss
        return loss + entailment_loss(text.tangent, self._project_text(full_states).tangent, **more)

    def _finite(self, loss: Tensor) -> Tensor:
        """The loss if it is finite on every rank; else an error on every rank, or a loss that moves no weight."""
        if everywhere(loss.detach().isfinite()):
            return loss
        if not self.training or self.config.hyperbolic.on_non_finite == "raise":
            raise ValueError(f"the loss must be finite, got {loss.item()}: look at this batch and at the learning rate")
        self.non_finite_steps += 1
        _LOG.warning("step skipped: the loss is %s (%d so far)", loss.item(), self.non_finite_steps)
        kind = loss.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            return loss  # a GradScaler skips the step on every rank, lowers its scale, and needs the gradients for that
        return nothing_to_learn(self)

    # ------------------------------------------------------------------ checks

    def _checked(
        self,
        pixels: Tensor,
        ids: Tensor,
        mask: Tensor,
        image_ids: Tensor | None,
        step: int | None,
        progress: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Captions and mask, padded to the longest of any rank; all ranks refuse what one refuses."""
        problem = None
        try:
            self._check_text(ids, mask)
            self._check_batch(pixels, ids, image_ids, step, progress)
        except ValueError as error:
            problem = error
        more = common_tokens(len(ids), ids.shape[1], problem, self.device) - ids.shape[1]
        if not more:
            return ids, mask
        return F.pad(ids, (0, more), value=self.config.blip2.qformer_config.pad_token_id), F.pad(mask, (0, more))

    def _check_text(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        if input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids and attention_mask must have one shape, got {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        positions = self.blip2.embeddings.position_embeddings.num_embeddings
        if input_ids.shape[1] > positions:
            raise ValueError(f"input_ids must have at most {positions} tokens, got {input_ids.shape[1]}")
        config, valid = self.config, attention_mask.bool()
        words = valid & (input_ids != config.cls_token_id) & (input_ids != config.sep_token_id)
        # One transfer from the device for both answers.
        starts, filled = torch.stack([(input_ids[:, 0] == config.cls_token_id).all(), words.any(1).all()]).tolist()
        if not starts:
            raise ValueError(f"input_ids must begin with cls_token_id {config.cls_token_id} in every row")
        if not filled:
            raise ValueError("input_ids must hold a word in every row, got an empty caption")

    def _check_batch(
        self, pixels: Tensor, ids: Tensor, image_ids: Tensor | None, step: int | None, progress: float | None
    ) -> None:
        if len(pixels) != len(ids):
            raise ValueError(f"pixel_values and input_ids must hold as many rows, got {len(pixels)} and {len(ids)}")
        if image_ids is not None and len(image_ids) != len(ids):
            raise ValueError(f"image_ids must have {len(ids)} rows, got {len(image_ids)}")
        hyper = self.config.hyperbolic
        if self.training and hyper.needs_step and step is None:
            raise ValueError("step must be given in training with rqs_prob or rtp_prob > 0, got None")
        if self.training and hyper.similarity == "mix" and (progress is None or not 0 <= progress <= 1):
            raise ValueError(f"progress must be the fraction of training that is done, in [0, 1], got {progress}")


@torch.no_grad()
def _grow_vocabulary(blip2: nn.Module, size: int) -> None:
    """Add rows to the word embeddings, for [DEC]."""
    old = blip2.embeddings.word_embeddings
    if old.num_embeddings >= size:
        return
    new = nn.Embedding(size, old.embedding_dim, padding_idx=old.padding_idx).to(old.weight)
    new.weight.normal_(std=0.02)
    new.weight[: old.num_embeddings] = old.weight
    blip2.embeddings.word_embeddings = new
    blip2.config.qformer_config.vocab_size = size
