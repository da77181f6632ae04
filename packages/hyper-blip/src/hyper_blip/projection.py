"""From projected Q-Former outputs to points of hyperbolic space.

References: Mandica et al., arXiv:2408.05097 (exponential map at the origin); Desai et al., "Hyperbolic image-text
representations", ICML 2023, section 4 (a learned scale per modality, at most 1, before the map).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hyper_blip.config import MANIFOLDS, TAU_RANGE, check_choice, check_positive
from hyper_geom import Curvature, lorentz, poincare

# Radius of the tangent vector v in units of |v|: the ball's metric at the origin is four times the Euclidean one.
DEPTH = {"poincare": 2.0, "lorentz": 1.0}


class HyperbolicFeatures(NamedTuple):
    """Features in hyperbolic space.

    Attributes:
        tangent: tangent vectors at the origin, clipped, `(*batch dim)`.
        point: exp_0(tangent): ball points, or space components of Lorentz points, `(*batch dim)`.
        radius: distance to the origin, `(*batch)`.
        clipped: whether the vector was shortened, `(*batch)`.
    """

    tangent: Tensor
    point: Tensor
    radius: Tensor
    clipped: Tensor


class Temperature(Curvature):
    """tau of the contrastive loss: learned, positive and bounded by the same rule as a curvature; `log_c` is log tau.

    >>> round(Temperature(0.07)().item(), 4)
    0.07
    """

    def __init__(self, value: float = 0.07) -> None:
        """Set log tau."""
        super().__init__(value, min=TAU_RANGE[0], max=TAU_RANGE[1])


class HyperbolicProjector(nn.Module):
    """Scale, clip and map features to hyperbolic space, in single precision or wider.

    u = exp(alpha) z, v = u min(1, R / (sqrt(c) k |u|)), point = exp_0(v), radius = k |v| with k = 2 in the ball, 1 in the
    Lorentz model. The clip bounds sqrt(c) times the radius. Beyond it the length has no gradient, the direction has.

    Args:
        dim: dimension of the features.
        curvature: the curvature module, held but not registered: whoever shares it among projectors registers it once.
        manifold: "poincare" or "lorentz".
        init_scale: exp(alpha) at the start, in (0, 1]; 1/sqrt(dim) if None. Features of a fresh Q-Former have norm about 9,
            where tanh is 1 in every half precision and all ball points would sit on the rim.
        learn_scale: alpha is a parameter; call `clamp_` after each optimizer step to hold it at 0 or below.
        max_radius: R; None does not clip.
        compute_dtype: "float32" or "float64".

    Raises:
        ValueError: a value outside its range.

    >>> projector = HyperbolicProjector(2, Curvature(1.0), manifold="poincare", init_scale=1.0, max_radius=None)
    >>> round(projector(torch.tensor([0.3, 0.4])).radius.item(), 4)
    1.0
    """

    def __init__(
        self,
        dim: int,
        curvature: Curvature,
        *,
        manifold: str = "poincare",
        init_scale: float | None = None,
        learn_scale: bool = True,
        max_radius: float | None = 4.6,
        compute_dtype: str = "float32",
    ) -> None:
        super().__init__()
        check_choice("manifold", manifold, MANIFOLDS)
        check_choice("compute_dtype", compute_dtype, ("float32", "float64"))
        check_positive("dim", dim)
        if max_radius is not None:
            check_positive("max_radius", max_radius)
        scale = dim**-0.5 if init_scale is None else init_scale
        if not 0 < scale <= 1:
            raise ValueError(f"init_scale must lie in (0, 1], got {init_scale!r}")
        self.dim, self.manifold, self.max_radius = dim, manifold, max_radius
        self.dtype = getattr(torch, compute_dtype)
        # Not a submodule: two projectors would save one curvature under two names.
        self.__dict__["curvature"] = curvature
        # Shape (1,), because fully_shard rejects 0-D parameters.
        alpha = torch.tensor([math.log(scale)])
        if learn_scale:
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)

    def forward(self, z: Float[Tensor, "*batch dim"]) -> HyperbolicFeatures:
        """Map features.

        Args:
            z: features before any L2 normalisation, of any floating dtype.

        Returns:
            Tangent vectors, points and radii in `compute_dtype`; sqrt(c) times a radius is at most `max_radius`.

        Raises:
            ValueError: the last dimension is not `dim`.
        """
        if z.shape[-1] != self.dim:
            raise ValueError(f"z must have {self.dim} features, got shape {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            c = self.curvature().to(self.dtype)
            u = z.to(self.dtype) * self.alpha.to(self.dtype).exp()
            return lift(u, c, self.manifold, self.max_radius)

    @torch.no_grad()
    def clamp_(self) -> "HyperbolicProjector":
        """Hold the scale at 1 or below, in place."""
        self.alpha.clamp_(max=0.0)
        return self

    def extra_repr(self) -> str:
        """The settings."""
        return f"dim={self.dim}, manifold={self.manifold!r}, max_radius={self.max_radius}"


def lift(u: Tensor, c: Tensor | float, manifold: str, max_radius: float | None) -> HyperbolicFeatures:
    """Clip tangent vectors `(*batch dim)` and map them to the manifold; see `HyperbolicProjector`."""
    if manifold not in DEPTH:
        raise ValueError(f"manifold must be one of {tuple(DEPTH)}, got {manifold!r}")
    depth = DEPTH[manifold]
    if max_radius is None:
        v, clipped = u, torch.zeros(u.shape[:-1], dtype=torch.bool, device=u.device)
    else:
        k = c.sqrt() if isinstance(c, Tensor) else c**0.5
        clipped = depth * k * u.detach().norm(dim=-1) > max_radius
        v = lorentz.clip_tangent0(u, max_radius / depth, c=c)
    geometry = {"poincare": poincare, "lorentz": lorentz}[manifold]
    return HyperbolicFeatures(v, geometry.exp_map0(v, c=c), depth * safe_norm(v), clipped)


def safe_norm(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """|x| with gradient 0 at 0."""
    square = (x * x).sum(-1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def ball_radius(radius: Float[Tensor, "*batch"], c: Tensor | float = 1.0) -> Float[Tensor, "*batch"]:
    """Euclidean norm of a ball point from its distance to the origin.

    tanh(sqrt(c) rho / 2) / sqrt(c)

    Args:
        radius: distances to the origin.
        c: curvature parameter.

    Returns:
        Norms `(*batch)` in [0, 1/sqrt(c)].

    Raises:
        ValueError: c does not broadcast with radius, or is a number that is not positive.

    >>> ball_radius(torch.tensor(1.0, dtype=torch.float64))
    tensor(0.4621, dtype=torch.float64)
    """
    if isinstance(c, Tensor):
        try:
            torch.broadcast_shapes(c.shape, radius.shape)
        except RuntimeError:
            raise ValueError(
                f"c must broadcast with radius, got shapes {tuple(c.shape)} and {tuple(radius.shape)}"
            ) from None
    elif not 0 < c < math.inf:
        raise ValueError(f"c must be positive and finite, got {c}")
    k = c**0.5
    return (0.5 * k * radius).tanh() / k


__all__ = ["DEPTH", "HyperbolicFeatures", "HyperbolicProjector", "Temperature", "ball_radius", "lift", "safe_norm"]
