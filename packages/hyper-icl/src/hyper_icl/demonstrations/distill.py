"""Distillation of calibrated attention into LoRA weights by the KL divergence of attention masses by segment.

P(s) is the attention that one row pays to all tokens of segment s. KL(P || Q) over segments is at most the KL of the full
attention maps (data processing inequality; Cover and Thomas, 2006, section 2.8), and equal to it in a layer where teacher
and student share q and k, because calibration is constant within a segment. Hinton et al., "Distilling the knowledge in
a neural network", 2015, for the loss; the rest is ours.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from hyper_icl._attention import causal_rows
from hyper_icl._checks import check_count
from hyper_icl._hooks import set_hook
from hyper_icl._routing import text_attention_modules
from hyper_icl.demonstrations._segment_bias import PlacedBias
from hyper_icl.demonstrations.segments import SegmentMap


def segment_log_mass(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    segments: SegmentMap,
    rows: Int64[Tensor, "b r"],
    scaling: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Float32[Tensor, "b h r z"]:
    """Log of the attention that each row pays to each segment: -1 (prefix), 0..K-1, K (query), in this order.

    Only the rows' scores are formed, (b, h, r, s), never a full map.

    Args:
        q: queries, the last t of the s positions.
        k: keys, with as many or fewer heads (GQA).
        segments: segments of the s keys.
        rows: positions of the rows, 0..s-1.
        scaling: factor on the scores.
        mask: as attention gets it: bool or to be added, (b, 1 or h, t, s); causal if None.
        bias: to be added to the rows' scores, (b, 1 or h, r, s).

    Returns:
        Log-masses; a row's exponentials sum to 1; -inf for a segment the row does not see.

    Raises:
        ValueError: the segments' length is not that of the keys.
    """
    if segments.length != k.shape[2]:
        raise ValueError(f"segments must have the keys' length {k.shape[2]}, got {segments.length}")
    first = k.shape[2] - q.shape[2]
    at = (rows - first)[:, None, :, None]
    picked = q.gather(2, at.expand(-1, q.shape[1], -1, q.shape[3])).float()
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    scores = scaling * picked @ keys.mT
    if mask is None:
        allowed = causal_rows(q, k, 0).expand(len(q), 1, -1, -1)
    else:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        allowed = allowed[..., : k.shape[2]].expand(len(q), -1, -1, -1)
        if mask.dtype != torch.bool:
            added = mask[..., : k.shape[2]].expand(len(q), -1, -1, -1)
            scores = scores + added.gather(2, at.expand(-1, added.shape[1], -1, added.shape[3])).float()
    allowed = allowed.gather(2, at.expand(-1, allowed.shape[1], -1, allowed.shape[3]))
    if bias is not None:
        scores = scores + bias.float()
    scores = scores.masked_fill(~allowed, -torch.inf)
    num = segments.num_demos + 2
    index = (segments.ids.to(q.device) + 1)[:, None, None, :].expand_as(scores)
    with torch.no_grad():
        highest = scores.new_full((*scores.shape[:3], num), -torch.inf).scatter_reduce(-1, index, scores, "amax")
        highest = highest.masked_fill(highest == -torch.inf, 0.0)
    total = scores.new_zeros((*scores.shape[:3], num)).scatter_add(
        -1, index, (scores - highest.gather(-1, index)).exp()
    )
    seen = total > 0
    by_segment = torch.where(seen, torch.where(seen, total, 1.0).log() + highest, -torch.inf)
    return by_segment - scores.logsumexp(-1, keepdim=True)


def tilt(log_mass: Float[Tensor, "b h r z"], bias: Float[Tensor, " b *hk"]) -> Float[Tensor, "b h r z"]:
    """The masses after calibration, from those before, without a second forward pass: softmax_s(log P_s + bias_s).

    Exact for a layer whose q and k the calibration has not changed yet, i.e. for the first calibrated layer.

    Args:
        log_mass: log-masses of rows that carry the bias.
        bias: the plan's bias, (b, k) or (b, h, k).

    Returns:
        Log-masses.

    Raises:
        ValueError: a bias that is not (b, z - 2) or (b, h, z - 2).
    """
    batch, heads, _, num = log_mass.shape
    if bias.shape not in ((batch, num - 2), (batch, heads, num - 2), (batch, 1, num - 2)):
        raise ValueError(
            f"bias must have shape ({batch}, {num - 2}) or ({batch}, {heads}, {num - 2}), got {tuple(bias.shape)}"
        )
    bias = bias.unsqueeze(1) if bias.ndim == 2 else bias
    return (log_mass + F.pad(bias, (1, 1)).unsqueeze(2)).log_softmax(-1)


def segment_kl(
    teacher: Mapping[int, Float[Tensor, "b h r z"]],
    student: Mapping[int, Float[Tensor, "b h r z"]],
    weights: Mapping[int, float] | None = None,
) -> Float[Tensor, ""]:
    """Sum over layers of w_l times the mean over rows of sum_s P (log P - log Q).

    Args:
        teacher: log-masses P by layer; no gradient flows into them.
        student: log-masses Q by layer.
        weights: w_l; 1 over the number of layers by default.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: the layers differ, or there is none.
    """
    if not teacher or set(teacher) != set(student):
        raise ValueError(f"teacher and student must hold the same layers, got {sorted(teacher)} and {sorted(student)}")
    terms = []
    for layer, log_p in teacher.items():
        log_p = log_p.detach()
        seen = log_p > -torch.inf
        difference = torch.where(seen, log_p, 0.0) - student[layer].masked_fill(~seen, 0.0)
        weight = 1 / len(teacher) if weights is None else weights[layer]
        terms.append(weight * (log_p.exp() * difference).sum(-1).mean())
    return torch.stack(terms).sum()


class SegmentMassCollector(contextlib.AbstractContextManager):
    """Records the segment masses of the chosen layers during forward passes, while attention itself runs as usual.

    The model must use the attention of `use_calibrated_attention`, and no cache: teacher and student read the same ids.
    Under gradient checkpointing a layer runs twice, in forward and in backward; the record then holds the last run, so
    take the masses before `backward`.

    Args:
        model: a model after `use_calibrated_attention`.
        segments: the prompt's segments, as long as the ids.
        rows: positions whose attention is recorded.
        layers: text layers to record.

    Attributes:
        masses: log-masses by layer.

    Raises:
        ValueError: a layer does not exist.
    """

    def __init__(
        self, model: nn.Module, segments: SegmentMap, rows: Int64[Tensor, "b r"], layers: Sequence[int]
    ) -> None:
        """Keep the settings; recording starts with the block."""
        modules = text_attention_modules(model)
        unknown = sorted(set(layers) - set(modules))
        if unknown or not layers:
            raise ValueError(f"layers must be some of 0..{max(modules)}, got {list(layers)}")
        self._modules = {layer: modules[layer] for layer in layers}
        self.segments, self.rows = segments, rows
        self.masses: dict[int, Tensor] = {}
        self._undo: list = []

    def __enter__(self) -> "SegmentMassCollector":
        """Start recording, with an empty record."""
        self.reset()
        self._undo = [(module, set_hook(module, "collector", self)) for module in self._modules.values()]
        return self

    def __exit__(self, *error: object) -> None:
        """Stop recording; the record stays."""
        for module, before in self._undo:
            set_hook(module, "collector", before)

    def reset(self) -> None:
        """Empty the record: once for every training step."""
        self.masses = {}

    def record(
        self, layer: int, q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, bias: PlacedBias | None
    ) -> None:
        """Called by the attention functions."""
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError("backend must be 'sdpa', 'eager' or 'augmented' while masses are collected, got 'flex'")
        rows = self.rows.to(q.device)
        added = None
        if bias is not None:
            added = bias.rows(torch.float32, 0)
            added = added.gather(2, rows[:, None, :, None].expand(-1, added.shape[1], -1, added.shape[3]))
        self.masses[layer] = segment_log_mass(q, k, self.segments, rows, scaling, mask, added)


class DistillTerms(NamedTuple):
    """The parts of the distillation loss; `total` is their weighted sum."""

    total: Tensor
    kl: Tensor
    ce: Tensor
    base_kl: Tensor


class SegmentDistillLoss(nn.Module):
    """kl KL(teacher || student) of segment masses + ce cross-entropy + base_kl KL(base || student) of next tokens.

    The last term keeps the student's language close to the model it started from.

    Args:
        kl: weight of the attention term.
        ce: weight of the cross-entropy.
        base_kl: weight of the term towards the base model.
    """

    def __init__(self, kl: float = 1.0, ce: float = 1.0, base_kl: float = 0.1) -> None:
        """Keep the weights."""
        super().__init__()
        for name, value in (("kl", kl), ("ce", ce), ("base_kl", base_kl)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        self.kl, self.ce, self.base_kl = kl, ce, base_kl

    def forward(
        self,
        teacher: Mapping[int, Tensor],
        student: Mapping[int, Tensor],
        logits: Float[Tensor, "b t v"] | None = None,
        labels: Int64[Tensor, "b t"] | None = None,
        base_logits: Float[Tensor, "b t v"] | None = None,
        weights: Mapping[int, float] | None = None,
    ) -> DistillTerms:
        """All terms; those without inputs are 0.

        Args:
            teacher: log-masses of the calibrated base model, by layer.
            student: log-masses of the student, by layer.
            logits: the student's logits.
            labels: token ids, -100 where no loss is taken; position i is predicted from i - 1.
            base_logits: the base model's logits for the same ids.
            weights: see `segment_kl`.

        Raises:
            ValueError: a term has a weight and labels but no logits.
        """
        kl = segment_kl(teacher, student, weights)
        zero = kl.new_zeros(())
        if logits is None:
            if labels is not None or base_logits is not None:
                raise ValueError("logits must be given beside labels or base_logits, got None")
            return DistillTerms(self.kl * kl, kl, zero, zero)
        ce = base = zero
        shifted = logits[:, :-1].float()
        counted = torch.ones_like(shifted[..., 0], dtype=torch.bool) if labels is None else labels[:, 1:] != -100
        if labels is not None:
            ce = F.cross_entropy(shifted.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        if base_logits is not None:
            log_p, log_q = base_logits[:, :-1].float().detach().log_softmax(-1), shifted.log_softmax(-1)
            base = (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean()
        return DistillTerms(self.kl * kl + self.ce * ce + self.base_kl * base, kl, ce, base)


def middle_layers(num_layers: int, at_most: int = 8) -> list[int]:
    """The layers that are distilled by default: the middle third, at most eight of them.

    >>> middle_layers(32)
    [12, 13, 14, 15, 16, 17, 18, 19]
    >>> middle_layers(2)
    [0]
    """
    check_count("num_layers", num_layers)
    num = min(max(num_layers // 3, 1), check_count("at_most", at_most))
    first = (num_layers - num) // 2
    return list(range(first, first + num))


def lora_config(model: nn.Module, r: int = 4, **settings: object) -> LoraConfig:
    """LoRA on the attention's projections in the text layers alone; bare suffixes would reach the vision tower too.

    These are q, k, v and o in most models, and whatever linear maps the attention has in those that fuse or factor them.

    Args:
        model: a transformers model.
        r: rank, >= 1.
        settings: passed to `peft.LoraConfig`.

    Raises:
        ValueError: r < 1, or the model has no text layers.
    """
    modules = text_attention_modules(model)
    names = {id(module): name for name, module in model.named_modules()}
    inside = {
        name for module in modules.values() for name, part in module.named_modules() if isinstance(part, nn.Linear)
    }
    found = "|".join(re.escape(names[id(module)]) for module in modules.values())
    parts = "|".join(re.escape(name) for name in sorted(inside))
    return LoraConfig(r=check_count("r", r), target_modules=rf"({found})\.({parts})", **settings)


@contextlib.contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """A peft model without its adapter and without dropout, in the block; the mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(was_training)
