"""The published method's loss: hidden states of a query-only student against those of a teacher with demonstrations.

Reference: Alipour Talemi et al., "Hyper-ICL", ICML 2026, arXiv 2606.04434, eq. 12-17. The distance is evaluated in log
space: the norm of every normalised state is sqrt(d_model), where the usual form overflows fp32.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from hyper_geom import lorentz
from hyper_icl._checks import check_choice, check_positive


def lorentz_anchor_loss(
    student: Sequence[Float[Tensor, "b t d"]],
    teacher: Sequence[Float[Tensor, "b t d"]],
    c: float = 0.1,
    mask: Bool[Tensor, "b t"] | None = None,
    tangent_scale: str = "none",
    normalize: str = "none",
) -> Float[Tensor, ""]:
    """Mean over layers and tokens of d^2(exp_o u', exp_o u), u = LN(h) without affine.

    As published, |u| = sqrt(d) is constant, so d = (2/k) asinh(sinh(k sqrt(d)) sin(theta/2)): at d = 4096 and c = 0.1 an
    angle of 17 degrees alone gives d^2 = 1.3e4, far above a cross-entropy. Log both; `normalize="d"` divides by the width,
    `tangent_scale="rsqrt_d"` shortens u to norm 1. Both are ours.

    Args:
        student: hidden states of some layers; transformers gives L + 1 of them, the last after the final norm.
        teacher: the same of the teacher, at the same tokens (see `align_suffix`); no gradient flows into them.
        c: curvature parameter.
        mask: tokens that count; all by default.
        tangent_scale: "none" or "rsqrt_d".
        normalize: "none" or "d".

    Returns:
        A scalar >= 0 in fp32 (fp64 for fp64 states).

    Raises:
        ValueError: the sequences differ in length or shape, or no token counts.

    >>> h = [torch.randn(2, 3, 8)]
    >>> lorentz_anchor_loss(h, h).item()
    0.0
    """
    check_positive("c", c)
    check_choice("tangent_scale", tangent_scale, ("none", "rsqrt_d"))
    check_choice("normalize", normalize, ("none", "d"))
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            f"student and teacher must have the same layers, at least one, got {len(student)}, {len(teacher)}"
        )
    terms = []
    for own, given in zip(student, teacher, strict=True):
        if own.shape != given.shape:
            raise ValueError(
                f"student and teacher must have equal shapes, got {tuple(own.shape)}, {tuple(given.shape)}"
            )
        u, v = (_normed(h, tangent_scale) for h in (own, given.detach()))
        distance = lorentz.tangent0_sq_dist(u, v, c=c)
        if mask is not None:
            if mask.shape != distance.shape or not mask.any():
                raise ValueError(
                    f"mask must select tokens of shape {tuple(distance.shape)}, got {tuple(mask.shape)}, {int(mask.sum())}"
                )
            distance = distance[mask]
        if distance.numel() == 0:
            raise ValueError(f"student must hold at least one token, got shape {tuple(own.shape)}")
        terms.append(distance.mean())
    loss = torch.stack(terms).mean()
    return loss / student[0].shape[-1] if normalize == "d" else loss


def _normed(h: Tensor, tangent_scale: str) -> Tensor:
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    u = F.layer_norm(h, (h.shape[-1],))
    return u / h.shape[-1] ** 0.5 if tangent_scale == "rsqrt_d" else u


class LorentzAnchorLoss(nn.Module):
    """Module form of `lorentz_anchor_loss`.

    Args:
        c: curvature parameter.
        tangent_scale: "none" or "rsqrt_d".
        normalize: "none" or "d".
    """

    def __init__(self, c: float = 0.1, tangent_scale: str = "none", normalize: str = "none") -> None:
        """Keep the settings."""
        super().__init__()
        self.c = check_positive("c", c)
        self.tangent_scale = check_choice("tangent_scale", tangent_scale, ("none", "rsqrt_d"))
        self.normalize = check_choice("normalize", normalize, ("none", "d"))

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, ""]:
        """See `lorentz_anchor_loss`."""
        return lorentz_anchor_loss(student, teacher, self.c, mask, self.tangent_scale, self.normalize)


def align_suffix(student_ids: Int64[Tensor, "b t"], teacher_ids: Int64[Tensor, "b s"]) -> Int64[Tensor, " b"]:
    """How many last tokens a query-only prompt shares with the prompt that holds demonstrations too, for every row.

    A tokenizer may merge characters where the demonstrations end, so the shared part can be shorter than the query.
    Compare states at positions -n.. of both. Rows are padded on the left.

    Args:
        student_ids: ids of the query-only prompts.
        teacher_ids: ids of the prompts with demonstrations.

    Raises:
        ValueError: a row shares nothing.

    >>> align_suffix(torch.tensor([[0, 1, 7, 8]]), torch.tensor([[1, 5, 5, 6, 7, 8]]))
    tensor([2])
    """
    if len(student_ids) != len(teacher_ids):
        raise ValueError(
            f"student_ids and teacher_ids must have equal batch, got {len(student_ids)}, {len(teacher_ids)}"
        )
    length = min(student_ids.shape[1], teacher_ids.shape[1])
    same = student_ids.flip(-1)[:, :length] == teacher_ids.flip(-1)[:, :length]
    shared = same.long().cumprod(-1).sum(-1)
    if length == 0 or (shared == 0).any():
        raise ValueError(
            "student_ids must end like teacher_ids, got rows without a common suffix: tokenize the same query text, and pad "
            "both on the left"
        )
    return shared
