"""Attention calibration: a bias on the attention from the query to each demonstration, from hyperbolic hierarchy.

alpha = softmax(scaling q k^T + lam H(seg_i, seg_j)). References: the formula is the unpublished seed note's (whose kernel
1/(1 + Delta) is "inverse" here); centring by the log of the mean exponential, which keeps the attention to demonstrations
as a whole, and all of the mechanics are ours. The published Hyper-ICL (Alipour Talemi et al., ICML 2026) has no such term:
its method is in `adapter` and `lorentz_anchor_loss`.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from hyper_geom import lorentz
from hyper_icl._attention import augment_qk, register_attention
from hyper_icl._checks import check_choice, check_positive
from hyper_icl._hooks import Call, prepare, set_hook
from hyper_icl._routing import check_routed, decoder_of, text_attention_modules, use_calibrated_attention
from hyper_icl.demonstrations._segment_bias import Admission, PlacedBias, SegmentBias
from hyper_icl.demonstrations.segments import SegmentMap

__all__ = [
    "CalibrationPlan",
    "additive_mask",
    "augment_qk",
    "calibrate",
    "hierarchy_bias",
    "register_attention",
    "text_attention_modules",
    "use_calibrated_attention",
]

KERNELS = ("neg", "inverse", "exp")


def hierarchy_bias(
    query: Float[Tensor, "b d"],
    demos: Float[Tensor, "b k d"],
    c: float = 1.0,
    kernel: str = "neg",
    tau: float = 1.0,
    beta: float = 0.0,
    lam: float = 1.0,
    center: bool = True,
    clip: float = 5.0,
    present: Bool[Tensor, "b k"] | None = None,
) -> Float32[Tensor, "b k"]:
    """What to add to the attention scores from the query to each demonstration.

    Delta = d(q, x_j) + beta ||q| - |x_j||;  H = -Delta/tau, 1/(1 + Delta) or exp(-Delta/tau);
    H -= log mean_j exp H if centred;  result = lam H, clipped to [-clip, clip].

    Args:
        query: Lorentz tangent vectors at the origin.
        demos: the same of each query's demonstrations, in prompt order.
        c: curvature parameter.
        kernel: "neg", "inverse" or "exp".
        tau: temperature of "neg" and "exp".
        beta: weight of the difference in depth, >= 0.
        lam: strength; 0 is no calibration.
        center: subtract the log of the mean exponential over the demonstrations.
        clip: bound on the result, > 0.
        present: False where a query has fewer than k demonstrations; they take no part in the mean and get 0.

    Returns:
        Biases in [-clip, clip].

    Raises:
        ValueError: a setting is out of range, or shapes do not fit.

    >>> demos = torch.tensor([[[0.5, 0.0], [2.0, 0.2], [1.0, 1.0]]])
    >>> hierarchy_bias(torch.tensor([[1.0, 0.0]]), demos, beta=0.5)
    tensor([[ 0.4074, -0.3753, -0.2107]])
    """
    check_choice("kernel", kernel, KERNELS)
    tau, clip = check_positive("tau", tau), check_positive("clip", clip)
    if not 0 <= beta < math.inf or not math.isfinite(lam):
        raise ValueError(f"beta must be finite and >= 0 and lam finite, got beta = {beta}, lam = {lam}")
    if demos.ndim != 3 or query.shape != (demos.shape[0], demos.shape[2]) or demos.shape[1] == 0:
        raise ValueError(f"demos must be (b, k, d) with k >= 1 beside query (b, d), got {demos.shape}, {query.shape}")
    delta = lorentz.tangent0_dist(query.unsqueeze(1), demos, c=c)
    if beta:
        delta = delta + beta * (query.norm(dim=-1, keepdim=True) - demos.norm(dim=-1)).abs()
    if kernel == "inverse":
        h = 1 / (1 + delta)
    else:
        h = -delta / tau if kernel == "neg" else (-delta / tau).exp()
    present = torch.ones_like(h, dtype=torch.bool) if present is None else present
    if present.dtype != torch.bool or present.shape != h.shape or not present.any(-1).all():
        raise ValueError(
            f"present must be bool {tuple(h.shape)} with at least one True a query, got {present.dtype} {tuple(present.shape)}"
        )
    if center:
        count = present.sum(-1, keepdim=True)
        h = h - (h.masked_fill(~present, -torch.inf).logsumexp(-1, keepdim=True) - count.log())
    return (lam * h).clamp(-clip, clip).masked_fill(~present, 0.0).float()


@dataclass(frozen=True)
class CalibrationPlan:
    """Which bias goes where.

    Attributes:
        bias: what is added to the scores of each demonstration, for all heads (b, k) or for each (b, h, k).
        segments: the prompt's tokens.
        layers: text layers that are calibrated, with a factor on the bias; None for all, with factor 1.
        rows: "query" biases the query's and the generated tokens; "all" those of the demonstrations too.

    Raises:
        ValueError: shapes do not fit, or the bias is not finite.
    """

    bias: Float[Tensor, " b *hk"]
    segments: SegmentMap
    layers: dict[int, float] | None = None
    rows: str = "query"

    def __post_init__(self) -> None:
        """Check that bias and segments speak of the same prompts."""
        check_choice("rows", self.rows, ("query", "all"))
        batch, num = len(self.segments.ids), self.segments.num_demos
        if self.bias.ndim not in (2, 3) or self.bias.shape[0] != batch or self.bias.shape[-1] != num:
            raise ValueError(
                f"bias must be (b, k) or (b, h, k) with b = {batch} prompts and k = {num} demonstrations, got "
                f"{tuple(self.bias.shape)}"
            )
        if not torch.isfinite(self.bias).all():
            raise ValueError("bias must be finite: mask tokens with attention_mask, not with the bias")

    def is_zero(self) -> bool:
        """Whether the plan changes nothing."""
        return not self.bias.any() or (self.layers is not None and not any(self.layers.values()))

    def table(self) -> Float32[Tensor, "b h z z"]:
        """Bias of a row's segment (second to last axis) on a column's, segment s at index s + 1."""
        bias = self.bias.float()
        bias = bias.unsqueeze(1) if bias.ndim == 2 else bias
        num = self.segments.num_demos
        table = bias.new_zeros(*bias.shape[:2], num + 2, num + 2)
        first = num + 1 if self.rows == "query" else 1
        table[:, :, first:, 1 : num + 1] = bias.unsqueeze(2)
        return table


@contextmanager
def calibrate(model: nn.Module, plan: CalibrationPlan, chunked: bool = False) -> Iterator[None]:
    """Apply a plan to every forward pass and every `generate` inside the block, in this thread or task alone.

    Positions are absolute, padding counted: caches that grow, are static or slide, a cache that already holds the
    demonstrations, and prompts in pieces all get the bias where the prompt's tokens stand. Beams and several sequences a
    prompt repeat the plan's rows; generated tokens count as query. Plans nest: the inner one holds. A plan whose bias is 0
    everywhere is left out altogether, so that such a run keeps its bits. A compiled model leaves its graph at each
    attention; `fullgraph=True` then fails. With gradient checkpointing call `backward` inside the block.

    A thread that is started inside the block does not see the plan: start it with `contextvars.copy_context().run`.

    Args:
        model: a model after `use_calibrated_attention`.
        plan: the plan.
        chunked: the prompt may come in several calls (`prefill_chunk_size`); otherwise one call must end where it ends.

    Raises:
        ValueError: the attention is not routed here; the plan's batch does not divide the model's, or its length is not
            the prompt's; a cache holds query tokens from outside the block; or the block ends without any use of the plan.
    """
    modules = text_attention_modules(model)
    check_routed(modules)
    factors = dict.fromkeys(modules, 1.0) if plan.layers is None else plan.layers
    unknown = sorted(set(factors) - set(modules))
    if unknown:
        raise ValueError(f"layers must be text layers 0..{max(modules)}, got {unknown}")
    decoder = decoder_of(model)
    prepare(decoder, list(modules.values()))
    every_row = plan.rows == "all"
    admission = None if plan.is_zero() else Admission(plan.segments, every_row, chunked)
    with ExitStack() as undo:

        def hook(module: nn.Module, name: str, value: object) -> None:
            undo.callback(set_hook, module, name, set_hook(module, name, value))

        hook(decoder, "admission", admission)
        table = plan.table()
        for layer, module in modules.items():
            factor = factors.get(layer, 0.0)
            bound = (plan.segments, every_row, layer, id(decoder), admission)
            hook(module, "bias", SegmentBias(factor * table, *bound) if factor and admission else None)
        yield
        if admission is not None and not admission.used:
            raise ValueError(
                "plan must be used by a forward pass of this model in this thread before the block ends, got none: start "
                "threads with contextvars.copy_context().run"
            )


def additive_mask(
    plan: CalibrationPlan, attention_mask: Bool[Tensor, "b t"] | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b h t t"]:
    """The plan as a 4-D mask for one forward pass of a model without registered attention: causal, padding and bias.

    `generate` refuses such masks; and with one, models no longer count positions from the padding: pass position_ids.

    Args:
        plan: the plan; it must speak of all layers alike.
        attention_mask: False for padding.
        dtype: the queries' dtype.

    Returns:
        Numbers to add to the scores, with one head if the bias is for all heads.

    Raises:
        ValueError: the plan names layers, or the mask's shape does not fit.
    """
    if plan.layers is not None:
        raise ValueError("plan must have layers=None: one mask serves all layers")
    length, batch = plan.segments.length, len(plan.segments.ids)
    shape = (batch, 1, length, 1)
    empty = torch.empty(shape, dtype=dtype, device=plan.segments.ids.device)
    allowed = torch.ones(length, length, dtype=torch.bool, device=empty.device).tril()[None, None]
    if attention_mask is not None:
        if attention_mask.shape != (batch, length):
            raise ValueError(f"attention_mask must be ({batch}, {length}), got {tuple(attention_mask.shape)}")
        allowed = allowed & attention_mask.bool()[:, None, None, :]
    bias = PlacedBias(SegmentBias(plan.table(), plan.segments, True), Call(0, 0, length), empty, empty).rows(dtype, 0)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)
