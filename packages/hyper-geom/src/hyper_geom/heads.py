"""Logits for classification in hyperbolic space: signed distances to hyperplanes, and Busemann functions of prototypes.

References: Ganea, Becigneul and Hofmann, "Hyperbolic neural networks", NeurIPS 2018, section 3.1; Shimizu, Mukuta and
Harada, "Hyperbolic neural networks++", ICLR 2021 (one offset for each hyperplane); Ghadimi Atigh, Keller-Ressel and
Mettes, "Hyperbolic Busemann learning with ideal prototypes", NeurIPS 2021, eq. 3. The evaluation is ours.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hyper_geom import _numerics as nm
from hyper_geom.convert import from_ball

__all__ = ["BusemannHead", "HyperplaneHead", "busemann_logits", "hyperplane_logits"]
_MODELS = ("lorentz", "poincare")


def _lorentz(x: Tensor, c: float | Tensor, model: str) -> Tensor:
    return x if nm.check_choice("model", model, _MODELS) == "lorentz" else from_ball(x, c)


def _check_classes(name: str, value: Tensor, x: Tensor) -> Tensor:
    if value.ndim != 2 or value.shape[1] != x.shape[-1]:
        raise ValueError(f"{name} must have shape (classes, {x.shape[-1]}), got {tuple(value.shape)}")
    return value.to(x.dtype)


@nm.geometry(1)
def hyperplane_logits(
    x: Float[Tensor, "*batch dim"],
    weight: Tensor,
    offset: Tensor,
    *,
    c: float | Tensor = 1.0,
    model: str = "lorentz",
) -> Float[Tensor, "*batch classes"]:
    """Signed distances to hyperplanes, times the norm of each weight.

    |w| (1/k) asinh(k (cosh(k b) x.what - sinh(k b) x_t)): the hyperplane meets the ray along w at right angles, at
    signed distance b from the origin.

    Args:
        x: points of the model.
        weight: normals w `(classes dim)`.
        offset: signed distances b `(classes)`; cosh(k b) must not overflow.
        c: curvature parameter.
        model: "lorentz" or "poincare"; the same point has the same logits.

    Returns:
        Logits `(*batch classes)`; 0 for a weight of 0.

    Raises:
        ValueError: shapes that do not fit, unknown model.

    >>> hyperplane_logits(torch.tensor([3.0, 0.0]), torch.eye(2), torch.tensor([1.0, 0.0]))  # asinh(3) - 1
    tensor([0.8184, 0.0000])
    """
    weight = _check_classes("weight", weight, x)
    if offset.shape != weight.shape[:1]:
        raise ValueError(f"offset must have shape ({weight.shape[0]},), got {tuple(offset.shape)}")
    x = _lorentz(x, c, model)
    size = nm.norm(weight)
    k = cast(Tensor, c).sqrt().unsqueeze(-1)
    along = k * (x @ nm.safe_div(weight, size.unsqueeze(-1)).mT)
    time = (1 + c * nm.sq_norm(x)).sqrt().unsqueeze(-1)
    shift = k * offset.to(x.dtype)
    return size * (shift.cosh() * along - shift.sinh() * time).asinh() / k


@nm.geometry(1)
def busemann_logits(
    x: Float[Tensor, "*batch dim"],
    prototypes: Tensor,
    *,
    c: float | Tensor = 1.0,
    model: str = "lorentz",
) -> Float[Tensor, "*batch classes"]:
    """Minus the Busemann function of each prototype, a point at infinity.

    -(1/k) log(k x_t - k x.e), with x0 - n cos = 1/(x0 + n) + n (1 - cos), n = k|x|, which does not cancel; it grows by
    1 for each unit of length towards the prototype.

    Args:
        x: points of the model.
        prototypes: directions `(classes dim)`, made unit vectors e.
        c: curvature parameter.
        model: "lorentz" or "poincare".

    Returns:
        Logits `(*batch classes)`; 0 at the origin, at most dist0(x).

    Raises:
        ValueError: shapes that do not fit, unknown model.

    >>> busemann_logits(torch.tensor([3.0, 0.0]), torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
    tensor([ 1.8184, -1.8184])
    """
    prototypes = _check_classes("prototypes", prototypes, x)
    x = _lorentz(x, c, model)
    e = nm.safe_div(prototypes, nm.norm(prototypes).unsqueeze(-1))
    k, size = cast(Tensor, c).sqrt(), nm.norm(x)
    n = k * size
    versine = (1 - nm.safe_div(x, size.unsqueeze(-1)) @ e.mT).clamp(min=0)
    height = 1 / ((1 + n * n).sqrt() + n).unsqueeze(-1) + n.unsqueeze(-1) * versine
    return -height.log() / k.unsqueeze(-1)


class HyperplaneHead(nn.Module):
    """`hyperplane_logits` with learned hyperplanes.

    Args:
        dim: dimension of the points.
        num_classes: number of hyperplanes.
        model: "lorentz" or "poincare".

    Raises:
        ValueError: dim or num_classes < 1, unknown model.

    >>> HyperplaneHead(8, 3)(torch.zeros(2, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(self, dim: int, num_classes: int, *, model: str = "lorentz") -> None:
        super().__init__()
        if min(dim, num_classes) < 1:
            raise ValueError(f"dim and num_classes must be at least 1, got {dim} and {num_classes}")
        self.model = nm.check_choice("model", model, _MODELS)
        self.weight = nn.Parameter(torch.randn(num_classes, dim) / dim**0.5)
        self.offset = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor, *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch classes"]:
        """Logits of points."""
        return hyperplane_logits(x, self.weight, self.offset, c=c, model=self.model)


class BusemannHead(nn.Module):
    """`busemann_logits` with a scale, for fixed or learned prototypes.

    Args:
        prototypes: directions `(classes dim)`.
        scale: factor on the logits at the start, learned in the logarithm.
        learnable: the prototypes are a parameter; otherwise a buffer.
        model: "lorentz" or "poincare".

    Raises:
        ValueError: prototypes are no matrix, scale is not > 0, unknown model.

    >>> BusemannHead(torch.eye(3))(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, prototypes: Tensor, *, scale: float = 1.0, learnable: bool = False, model: str = "lorentz"
    ) -> None:
        super().__init__()
        if prototypes.ndim != 2:
            raise ValueError(f"prototypes must have shape (classes, dim), got {tuple(prototypes.shape)}")
        self.model = nm.check_choice("model", model, _MODELS)
        self.log_scale = nn.Parameter(torch.tensor([nm.check_positive("scale", scale)]).log())
        if learnable:
            self.prototypes = nn.Parameter(prototypes.clone())
        else:
            self.register_buffer("prototypes", prototypes.clone())

    def forward(self, x: Tensor, *, c: float | Tensor = 1.0) -> Float[Tensor, "*batch classes"]:
        """Logits of points."""
        return self.log_scale.exp() * busemann_logits(x, self.prototypes, c=c, model=self.model)
