"""What stage 1 is made of, and what it answers once it is trained: features, similarities, matching logits.

Reference: Li et al., "BLIP-2", ICML 2023, sections 3.1 and 3.2.
"""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Blip2ForImageTextRetrieval, Blip2VisionModel

from hyper_blip.base import HyperBlip2Model, built, copy_text_ffn, start_queries
from hyper_blip.config import HyperBlip2Config
from hyper_blip.losses import (
    MixSchedule,
)
from hyper_blip.opaque import compiling
from hyper_blip.projection import HyperbolicFeatures, Temperature
from hyper_blip.qformer import (
    BIDIRECTIONAL,
    JOINT,
    ImageKeys,
    LMHead,
    Segment,
    joint_states,
)
from hyper_blip.sampling import Priority, RandomQuerySelection, RandomTextPruning
from hyper_blip.similarity import aggregate_queries, pairwise_similarity, query_midpoint
from hyper_blip.vision import load_module
from hyper_blip.weights import borrowed


class Stage1Encoders(HyperBlip2Model):
    """The parts of `HyperBlip2ForPretraining` and their use; see there for the arguments."""

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
        self.text_encoder = load_module(config.text_locator).requires_grad_(False) if config.text_locator else None
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

    def train(self, mode: bool = True) -> "Stage1Encoders":
        """Set the mode, but leave frozen encoders in evaluation mode: their statistics and dropout are not ours."""
        super().train(mode)
        if getattr(self, "text_encoder", None) is not None:  # not there yet while the model is built
            self.text_encoder.eval()
        return self

    def encode_image(self, pixel_values: Float[Tensor, "batch channels height width"]) -> HyperbolicFeatures:
        """Features of all queries of each picture, parts `(B, Q, ...)`."""
        return self.project_queries(joint_states(self.blip2, self.vision_features(pixel_values))[0])

    def encode_text(
        self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Int[Tensor, "rows places"]
    ) -> HyperbolicFeatures:
        """Features of each caption, parts `(B, ...)`."""
        input_ids, attention_mask = self._plain_text(input_ids, attention_mask)
        self._check_text(input_ids, attention_mask)
        return self._project_text(self._text_states(input_ids, attention_mask))

    def project_queries(self, states: Float[Tensor, "batch queries width"]) -> HyperbolicFeatures:
        """Query states to hyperbolic space."""
        return self._lift(self.image_projector, self.blip2.vision_projection, states, "pixel_values")

    def _text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the contrastive loss knows of each caption `(n width)`: of the text encoder, or the state of [CLS]."""
        if self.text_encoder is not None:
            found = self.text_encoder(input_ids, attention_mask)
            expected = (len(input_ids), self.blip2.text_projection.in_features)
            if found.shape != expected:
                raise ValueError(f"the text encoder must return states of shape {expected}, got {tuple(found.shape)}")
            return found
        segment = Segment(input_ids, attention_mask, BIDIRECTIONAL)
        return joint_states(self.blip2, None, [segment], queries=False)[0][:, 0]

    def _project_text(self, states: Tensor) -> HyperbolicFeatures:
        return self._lift(self.text_projector, self.blip2.text_projection, states, "input_ids")

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
        input_ids, attention_mask = self._plain_text(input_ids, attention_mask)
        self._check_text(input_ids, attention_mask)
        return self.match(self.vision_features(pixel_values), input_ids, attention_mask)

    def match(self, image: Tensor | ImageKeys, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "batch 2"]:
        """`itm_logits` from vision features, or from the keys and values of pictures (one picture may meet many texts)."""
        queries = joint_states(self.blip2, image, [Segment(input_ids, attention_mask, JOINT)])[0]
        return self.blip2.itm_head(queries).mean(1).float()

    def _class_states(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """`_text_states` of captions, read part by part."""
        return torch.cat([self._text_states(*part) for part in zip(ids, masks, strict=True)])

    def _plain_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The captions without the Q image tokens that a `Blip2Processor` with `num_query_tokens` puts before them."""
        num, begin = self.num_queries, self.config.cls_token_id
        if compiling() or input_ids.shape != attention_mask.shape or input_ids.shape[1] <= num:
            return input_ids, attention_mask
        first = input_ids[:, :1]
        marked = (first != begin).all() & (input_ids[:, :num] == first).all() & (input_ids[:, num] == begin).all()
        return (input_ids[:, num:], attention_mask[:, num:]) if bool(marked) else (input_ids, attention_mask)

    def _check_text(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        if input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids and attention_mask must have one shape, got {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        positions = self.blip2.embeddings.position_embeddings.num_embeddings
        if input_ids.shape[1] > positions:
            raise ValueError(f"input_ids must have at most {positions} tokens, got {input_ids.shape[1]}")
        if compiling():  # what follows looks at values
            return
        config, valid = self.config, attention_mask.bool()
        words = valid & (input_ids != config.cls_token_id) & (input_ids != config.sep_token_id)
        # One transfer from the device for both answers.
        starts, filled = torch.stack([(input_ids[:, 0] == config.cls_token_id).all(), words.any(1).all()]).tolist()
        if not starts:
            raise ValueError(f"input_ids must begin with cls_token_id {config.cls_token_id} in every row")
        if not filled:
            raise ValueError("input_ids must hold a word in every row, got an empty caption")


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
