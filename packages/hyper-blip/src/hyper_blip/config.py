"""The settings of the hyperbolic part of BLIP-2, and of a whole model.

References: Li et al., "BLIP-2", ICML 2023 (losses, temperature, label smoothing); Mandica et al., "Hyperbolic learning
with multimodal large language models", 2024, arXiv:2408.05097 (hyperbolic BLIP-2, RQS, RTP). The paper gives neither
curvature, clip, temperature nor sampling laws: the defaults here are a reconstruction.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import Blip2Config, OPTConfig, PreTrainedConfig

MANIFOLDS = ("poincare", "lorentz")
SIMILARITIES = ("cosine", "distance", "inner", "angle", "mix")
QUERY_AGGREGATIONS = ("max", "mean", "fixed", "midpoint")
RQS_MODES = ("per_sample", "per_batch")
RTP_MODES = ("prefix", "drop", "span", "priority")
RTP_TARGETS = ("itc", "itm", "lm")
ITM_NEGATIVES = ("global", "local")
NON_FINITE = ("raise", "skip")
LOSSES = ("itc", "itm", "lm", "entail", "diversity")
TAU_RANGE = (0.01, 0.5)
# Epochs 50 to 100 of 600: Franco et al., "Hyperbolic self-paced learning", ICLR 2023 (HYSP).
MIX = (50 / 600, 100 / 600)


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_positive(name: str, value: float | int) -> None:
    """Raise ValueError unless `value` is finite and > 0."""
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")


def check_fraction(name: str, value: float | int) -> None:
    """Raise ValueError unless `value` lies in [0, 1]."""
    if not (isinstance(value, int | float) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def _default_weights() -> dict[str, float]:
    return {"itc": 1.0, "itm": 1.0, "lm": 1.0, "entail": 0.0, "diversity": 0.0}


@dataclass(frozen=True)
class HyperbolicConfig:
    """How features become hyperbolic and how stage 1 is trained.

    Args:
        manifold: "poincare" or "lorentz"; the two differ by the factor 2 between tangent norm and radius.
        c: curvature parameter, the sectional curvature is -c.
        learn_c: learn c within [c/10, 10c].
        init_scale: factor on the features before the exponential map, in (0, 1]; 1/sqrt(d) if None.
        learn_scale: learn the logarithm of that factor, for each modality.
        max_radius: bound on sqrt(c) times the distance to the origin; None does not clip.
        compute_dtype: "float32" or "float64", of everything after the projections.
        similarity: "cosine" (equal to the Euclidean cosine), "distance", "inner", "angle", or "mix" of the first two.
        query_agg: how the queries of a picture become one score: "max", "mean", "fixed" (query 0) or "midpoint".
        temperature: initial tau, learned, in (0.01, 0.5).
        rqs_prob: probability that a step scores one random query of each picture in place of `query_agg`.
        rqs_mode: one query "per_sample" or "per_batch".
        rtp_prob: probability that a caption is pruned.
        rtp_mode: "prefix", "drop", "span" or "priority".
        rtp_targets: which losses see the pruned captions, among "itc", "itm" and "lm".
        loss_weights: weights of "itc", "itm", "lm", "entail" and "diversity"; those left out keep their default.
        label_smoothing: of the contrastive and the language loss.
        gather_grad: several processes give the gradient of one; False passes the gradient of a rank's own operand only.
        itm_negatives: hard negatives among the pictures of all ranks ("global") or of this rank ("local").
        fused: queries, language-model text and contrastive text in one Q-Former call.
        share_image_kv: compute the image keys and values once for all calls; needs `itm_negatives="local"`.
        on_non_finite: "raise" before the step, or "skip" it, count it and log it; every rank does the same. A skipped step has
            no gradients, so the optimizer moves nothing (with fp16 it is the `GradScaler` that skips it).
        mix: training fractions at which "mix" starts to leave the cosine and has left it.
        entail_min_radius: K of the entailment cones.
        seed: of random query selection, random text pruning and hard negatives.

    Raises:
        ValueError: a value outside its range; the message names it.

    >>> HyperbolicConfig.distance().similarity
    'distance'
    """

    manifold: str = "poincare"
    c: float = 1.0
    learn_c: bool = False
    init_scale: float | None = None
    learn_scale: bool = True
    max_radius: float | None = 4.6
    compute_dtype: str = "float32"
    similarity: str = "cosine"
    query_agg: str = "max"
    temperature: float = 0.07
    rqs_prob: float = 1.0
    rqs_mode: str = "per_sample"
    rtp_prob: float = 0.5
    rtp_mode: str = "prefix"
    rtp_targets: tuple[str, ...] = ("itc",)
    loss_weights: Mapping[str, float] = field(default_factory=_default_weights)
    label_smoothing: float = 0.1
    gather_grad: bool = True
    itm_negatives: str = "global"
    fused: bool = True
    share_image_kv: bool = False
    on_non_finite: str = "raise"
    mix: tuple[float, float] = MIX
    entail_min_radius: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value and complete the loss weights."""
        check_choice("manifold", self.manifold, MANIFOLDS)
        check_choice("compute_dtype", self.compute_dtype, ("float32", "float64"))
        check_choice("similarity", self.similarity, SIMILARITIES)
        check_choice("query_agg", self.query_agg, QUERY_AGGREGATIONS)
        check_choice("rqs_mode", self.rqs_mode, RQS_MODES)
        check_choice("rtp_mode", self.rtp_mode, RTP_MODES)
        check_choice("itm_negatives", self.itm_negatives, ITM_NEGATIVES)
        check_choice("on_non_finite", self.on_non_finite, NON_FINITE)
        check_positive("c", self.c)
        check_positive("entail_min_radius", self.entail_min_radius)
        if self.max_radius is not None:
            check_positive("max_radius", self.max_radius)
        if self.init_scale is not None and not 0 < self.init_scale <= 1:
            raise ValueError(f"init_scale must lie in (0, 1], got {self.init_scale!r}")
        if not TAU_RANGE[0] < self.temperature < TAU_RANGE[1]:
            raise ValueError(f"temperature must lie in {TAU_RANGE}, got {self.temperature!r}")
        for name in ("rqs_prob", "rtp_prob"):
            check_fraction(name, getattr(self, name))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing!r}")
        object.__setattr__(self, "rtp_targets", tuple(self.rtp_targets))
        for target in self.rtp_targets:
            check_choice("rtp_targets", target, RTP_TARGETS)
        object.__setattr__(self, "mix", tuple(self.mix))
        if not 0 <= self.mix[0] < self.mix[1] <= 1:
            raise ValueError(f"mix must be two fractions 0 <= f0 < f1 <= 1, got {self.mix!r}")
        weights = {**_default_weights(), **self.loss_weights}
        for name, weight in weights.items():
            check_choice("loss_weights", name, LOSSES)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"loss_weights[{name!r}] must be finite and >= 0, got {weight!r}")
        object.__setattr__(self, "loss_weights", weights)
        if self.share_image_kv and self.itm_negatives != "local":
            raise ValueError("share_image_kv needs itm_negatives='local', got 'global'")

    @classmethod
    def paper(cls, **changes: Any) -> "HyperbolicConfig":
        """The reconstruction of the paper: the defaults."""
        return cls(**changes)

    @classmethod
    def euclidean(cls, **changes: Any) -> "HyperbolicConfig":
        """Plain BLIP-2: cosine, the best query, whole captions."""
        return cls(**{"similarity": "cosine", "query_agg": "max", "rqs_prob": 0.0, "rtp_prob": 0.0, **changes})

    @classmethod
    def distance(cls, **changes: Any) -> "HyperbolicConfig":
        """Geodesic distance as the similarity, so that the radius takes part in the contrastive loss."""
        return cls(**{"similarity": "distance", **changes})

    @property
    def eval_similarity(self) -> str:
        """The similarity after training: "mix" ends as "distance"."""
        return "distance" if self.similarity == "mix" else self.similarity

    @property
    def needs_step(self) -> bool:
        """Whether training draws random queries or prunes captions."""
        return self.rqs_prob > 0 or self.rtp_prob > 0


class HyperBlip2Config(PreTrainedConfig):
    """A BLIP-2 configuration, the hyperbolic settings, and where the frozen parts come from: the `config.json` of a model.

    Args:
        blip2: the `transformers.Blip2Config`, or its content; the default one if None.
        hyperbolic: the hyperbolic settings, or their content; the defaults if None.
        vision_locator: source of the vision encoder, "<prefix>:<name>"; "" builds the encoder of `blip2.vision_config`.
        text_locator: source of a frozen text encoder `(input_ids, attention_mask) -> (B, width)` that reads the captions of the contrastive
            loss; "" takes the state of [CLS] in the Q-Former.
        language_locator: source of the language model of stage 2; "" builds that of `blip2.text_config`.
        cls_token_id: first token of every caption.
        sep_token_id: last token of every caption.
        dec_token_id: token that replaces [CLS] for the language loss; the embedding table grows to hold it.
        lora: arguments of `peft.LoraConfig` for the language model, or None.
        prompt: what every caption of stage 2 begins with; the language model is given it and trained on what follows.
        max_tokens: of a caption.
        has_radius: False where the projection to the radius was never trained, as in a Euclidean BLIP-2 of stage 2.
        more: further fields of `transformers.PreTrainedConfig`.

    Raises:
        ValueError: a token id below 0, or an unknown hyperbolic setting.
    """

    model_type = "hyper-blip2"
    sub_configs_defaults: ClassVar[dict] = {"blip2": Blip2Config}

    def __init__(
        self,
        blip2: Blip2Config | Mapping[str, Any] | None = None,
        hyperbolic: HyperbolicConfig | Mapping[str, Any] | None = None,
        *,
        vision_locator: str = "",
        text_locator: str = "",
        language_locator: str = "",
        cls_token_id: int = 101,
        sep_token_id: int = 102,
        dec_token_id: int = 30522,
        lora: Mapping[str, Any] | None = None,
        prompt: str = "a photo of ",
        max_tokens: int = 32,
        has_radius: bool = True,
        **more: Any,
    ) -> None:
        self.blip2 = blip2 if isinstance(blip2, Blip2Config) else Blip2Config(**(blip2 or {}))
        self.hyperbolic = hyperbolic if isinstance(hyperbolic, HyperbolicConfig) else _hyperbolic(hyperbolic or {})
        self.vision_locator, self.text_locator, self.language_locator = vision_locator, text_locator, language_locator
        for name, value in (("cls", cls_token_id), ("sep", sep_token_id), ("dec", dec_token_id)):
            if value < 0:
                raise ValueError(f"{name}_token_id must be >= 0, got {value}")
        self.cls_token_id, self.sep_token_id, self.dec_token_id = cls_token_id, sep_token_id, dec_token_id
        self.lora = None if lora is None else dict(lora)
        self.prompt, self.max_tokens, self.has_radius = prompt, max_tokens, has_radius
        attention = self.blip2._attn_implementation
        super().__init__(**more)
        if "attn_implementation" not in more:  # the base class hands its None down
            self.blip2._attn_implementation = attention

    @classmethod
    def vit_g_opt(cls, hyperbolic: HyperbolicConfig | None = None) -> "HyperBlip2Config":
        """BLIP-2 with ViT-g and OPT-2.7B: 224 px, 32 queries, BERT-base with [DEC]."""
        opt = OPTConfig(
            vocab_size=50304,
            hidden_size=2560,
            ffn_dim=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            word_embed_proj_dim=2560,
        )
        qformer = {"use_qformer_text_input": True, "vocab_size": 30523}
        blip2 = Blip2Config(qformer_config=qformer, text_config=opt.to_dict(), image_token_index=50265)
        return cls(blip2, hyperbolic or HyperbolicConfig())

    def to_dict(self) -> dict[str, Any]:
        """Content for a JSON file."""
        content = super().to_dict()
        content["hyperbolic"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self.hyperbolic).items()
        }
        return content


def _hyperbolic(content: Mapping[str, Any]) -> HyperbolicConfig:
    known = {f.name for f in dataclasses.fields(HyperbolicConfig)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in the configuration of HyperbolicConfig")
    lists = {k: tuple(content[k]) for k in ("rtp_targets", "mix") if k in content}  # JSON has no tuples
    return HyperbolicConfig(**{**content, **lists})
