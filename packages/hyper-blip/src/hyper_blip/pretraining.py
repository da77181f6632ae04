"""Stage 1: the Q-Former learns to align, to match and to describe, with hyperbolic features.

References: Li et al., "BLIP-2", ICML 2023, section 3.2 (three losses on one Q-Former); Mandica et al., arXiv:2408.05097
(hyperbolic contrastive loss, Random Query Selection, Random Text Pruning). With `HyperbolicConfig.euclidean()` the losses are
those of LAVIS's stage 1.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import ModelOutput

from hyper_blip.beginning import Stage1Start
from hyper_blip.diagnostics import stage1_diagnostics
from hyper_blip.gather import common_tokens, everywhere, fetch_rows, mean_of_all, world
from hyper_blip.losses import (
    IGNORED,
    entailment_loss,
    image_text_contrastive_loss,
    image_text_matching_loss,
    query_diversity_penalty,
    text_generation_loss,
)
from hyper_blip.negatives import matching_positives
from hyper_blip.opaque import compiling, drawn_negatives, drawn_queries, pruned_captions, step_tensor
from hyper_blip.projection import HyperbolicFeatures
from hyper_blip.qformer import (
    BIDIRECTIONAL,
    CAUSAL,
    ImageKeys,
    Segment,
    decoder_ids,
    image_keys,
    joint_states,
)
from hyper_blip.sampling import text_keys
from hyper_blip.skipping import nothing_to_learn

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


class HyperBlip2ForPretraining(Stage1Start):
    """BLIP-2's stage 1 on `transformers.Blip2ForImageTextRetrieval`.

    Args:
        config: the configuration; `blip2.qformer_config.use_qformer_text_input` is switched on.
        blip2: a model to take over; built from the configuration if None.
        vision: a vision module `(B, 3, H, W) -> (B, M, C)` in place of BLIP-2's own.
        vision_model: BLIP-2's own vision encoder, where it is there already.
        priority: ranks words for `rtp_mode="priority"`: takes tuples of token ids, returns a score for each.
    """

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
            index = self._selection(len(input_ids), step)
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
            pruned = self._prunes and "itm" in hyper.rtp_targets
            captions = [texts["full"], texts["itm"]] if pruned else [texts["full"]]
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

    def _selection(self, num: int, step: int | None) -> Tensor | None:
        """The query of each picture that this step scores; None for all."""
        hyper = self.config.hyperbolic
        if compiling() and hyper.rqs_prob in (0, 1):
            if not hyper.rqs_prob:
                return None
            return drawn_queries(step_tensor(step), num, self.num_queries, hyper.rqs_mode, hyper.seed, world()[0])
        return self.query_selection(num, self.num_queries, 0 if step is None else step, world()[0])

    @property
    def _prunes(self) -> bool:
        hyper = self.config.hyperbolic
        return self.training and hyper.rtp_prob > 0 and bool(hyper.rtp_targets)

    def _prune(self, ids: Tensor, mask: Tensor, step: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Captions for each loss, whole or pruned, and the whole ones under "full"."""
        hyper = self.config.hyperbolic
        whole = pruned = (ids, mask)
        if self._prunes:
            special = (self.config.cls_token_id, self.config.sep_token_id)
            pad = self.config.blip2.qformer_config.pad_token_id
            if (
                compiling() and hyper.rtp_mode != "priority"
            ):  # a function of the caller's is not hidden from the compiler
                pruned = pruned_captions(
                    ids, mask, list(special), step_tensor(step), float(hyper.rtp_prob), hyper.rtp_mode, hyper.seed,
                    world()[0], pad, self.starts_word,
                )  # fmt: skip
                return {n: pruned if n in hyper.rtp_targets else whole for n in ("itc", "itm", "lm")} | {"full": whole}
            pruned = self.text_pruning.prune_ids(
                ids, mask, special, step, world()[0], pad_id=pad, starts_word=self.starts_word
            )
        return {n: pruned if n in hyper.rtp_targets else whole for n in ("itc", "itm", "lm")} | {"full": whole}

    def _states(
        self, image: Tensor | ImageKeys, texts: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor | None, ...]:
        """States of the queries, of the language text, of the contrastive text and of the whole captions."""
        hyper = self.config.hyperbolic
        own = self.text_encoder is None
        segments = {"itc": Segment(*texts["itc"], BIDIRECTIONAL)} if own else {}
        if hyper.loss_weights["lm"]:
            ids, mask = texts["lm"]
            segments["lm"] = Segment(decoder_ids(ids, self.config.dec_token_id), mask, CAUSAL)
        pruned = bool(hyper.loss_weights["entail"]) and self._prunes and "itc" in hyper.rtp_targets
        if pruned and own:
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
        if own:
            full = found["full"][:, 0] if pruned else None
            return queries, found.get("lm"), found["itc"][:, 0], full
        full = self._text_states(*texts["full"]) if pruned else None
        return queries, found.get("lm"), self._text_states(*texts["itc"]), full

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
        seed, weights = self.config.hyperbolic.seed, None
        wrong_image, wrong_text, valid = drawn_negatives(
            i2t.detach(), t2i.detach(), same, step_tensor(step), seed, rank
        )
        if compiling():  # rows without a negative stay, and count for nothing: the number of the others is not known
            kept = torch.arange(num, device=valid.device)
            weights = torch.cat([torch.ones_like(valid), valid, valid]).float()
        else:
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
        count = len(labels) if weights is None else weights.sum()
        return mean_of_all(image_text_matching_loss(self.match(pictures, ids, mask), labels, weights), count)

    def _lm_loss(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        labels = decoder_ids(ids, self.config.dec_token_id).masked_fill(mask == 0, IGNORED)
        logits = self.lm_head(states, self.blip2.embeddings.word_embeddings.weight)
        loss = text_generation_loss(logits, labels, self.config.hyperbolic.label_smoothing)
        return mean_of_all(loss, (labels[:, 1:] != IGNORED).sum())

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
        if compiling():
            if self.config.hyperbolic.on_non_finite == "skip":
                raise ValueError("on_non_finite='skip' looks at the loss, which a compiled step cannot: take 'raise'")
            return loss
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
        ids, mask = self._plain_text(ids, mask)
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
