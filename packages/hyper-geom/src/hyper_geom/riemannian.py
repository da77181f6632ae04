"""Hyperbolic manifolds for geoopt's Riemannian optimisers, on the numerics of this package.

References: Becigneul and Ganea, "Riemannian adaptive optimization methods", ICLR 2019; Kochurov, Karimov and Kozlukov,
"Geoopt: Riemannian optimization in PyTorch", 2020. Points and tangent vectors are space components (*b d), as
everywhere in this package; geoopt's own `Lorentz` stores time first and calls 1/c its k.

Curvature and Riemannian optimisers do not mix well: a parameter keeps its coordinates when c moves, so all distances
change at once, and the optimiser's moments were transported in the metric of the old c. Keep c fixed here; where c
must be learned, hold tangent vectors at the origin as ordinary parameters, map them with `exp_map0(v, c=curvature())`
and use an ordinary optimiser.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyper_geom import convert, lorentz, poincare
from hyper_geom.curvature import Curvature

try:
    import geoopt
    from geoopt.manifolds.base import Manifold, ScalingInfo
except ImportError as error:
    raise ImportError("hyper_geom.riemannian needs geoopt: pip install 'hyper-geom[geoopt]'") from error


def _max_radius(dtype: torch.dtype) -> float:
    """Largest k * dist0 that a step may end at: 11.9 in fp32 and 32.0 in fp64; half inputs are computed in fp32.

    There, neighbouring floats are about exp(-4) = 0.02 units of length apart in both models. At the edge of what the
    ball can store (15.2 in fp32) they are a quarter apart, and a point put there ignores all smaller steps.
    """
    return -math.log(torch.finfo(torch.promote_types(dtype, torch.float32)).eps) - 4


def _number(c: float | Tensor) -> float:
    return float(c.detach()) if isinstance(c, Tensor) else float(c)


def _unit_scaled(u: Tensor) -> tuple[Tensor, Tensor]:
    """Divide u by its largest component and return both: the square of the quotient cannot overflow."""
    largest = u.abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    return u / largest, largest


class _Hyperbolic(Manifold):
    """What both models share: geoopt's method names over one of our model modules."""

    ndim = 1
    reversible = False
    __scaling__ = Manifold.__scaling__.copy()

    _model: ModuleType

    def __init__(self, c: float | Tensor | Curvature = 1.0) -> None:
        super().__init__()
        self.curvature = c if isinstance(c, Curvature) else None
        # A float, not a buffer: an fp64 buffer would widen every fp32 parameter's step.
        self._c = math.nan if isinstance(c, Curvature) else _number(c)
        if self.curvature is None and not 0 < self._c < math.inf:
            raise ValueError(f"c must be positive and finite, got {self._c}")

    @property
    def c(self) -> float | Tensor:
        """Curvature magnitude: a number, or the current 0-D value of the `Curvature` module given."""
        return self._c if self.curvature is None else self.curvature()

    def extra_repr(self) -> str:
        """The curvature magnitude, for repr."""
        return f"c={_number(self.c):.6g}"

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance (*b), or (*b 1) with keepdim."""
        return _kept(self._model.dist(x, y, c=self.c), keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared distance, smooth at x = y."""
        return _kept(self._model.sq_dist(x, y, c=self.c), keepdim)

    @__scaling__(ScalingInfo(1))
    def dist0(self, x: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance to the origin."""
        return _kept(self._model.dist0(x, c=self.c), keepdim)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map, not shortened: for optimiser steps see `retr`."""
        return self._model.exp_map(x, u, c=self.c)

    @__scaling__(ScalingInfo(u=-1))
    def expmap0(self, u: Tensor) -> Tensor:
        """Exponential map at the origin."""
        return self._model.exp_map0(u, c=self.c)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithmic map."""
        return self._model.log_map(x, y, c=self.c)

    @__scaling__(ScalingInfo(1))
    def logmap0(self, x: Tensor) -> Tensor:
        """Logarithmic map at the origin."""
        return self._model.log_map0(x, c=self.c)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of v from x to y along the geodesic."""
        return self._model.parallel_transport(x, y, v, c=self.c)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Riemannian inner product at x, of u with itself when v is left out."""
        return _kept(self._model.inner(x, u, u if v is None else v, c=self.c), keepdim)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Riemannian norm at x."""
        return _kept(self._model.norm(x, u, c=self.c), keepdim)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient of a Euclidean one; neither input is changed (geoopt's own Lorentz overwrites u)."""
        return self._model.egrad2rgrad(x, u, c=self.c)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return u: in these coordinates every vector (*b d) is tangent."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map of a step that is cut where floats stop telling points apart.

        The step is shortened to k|u|_x <= R and its end pulled back to k dist0 <= R with R = -log(eps) - 4: 11.9 in
        fp32, 32.0 in fp64. A start outside the ball is projected first. However large the step, the end is finite.
        """
        x = self.projx(x)
        limit = _max_radius(torch.promote_types(x.dtype, u.dtype)) / self.c**0.5
        direction, largest = _unit_scaled(u)
        length = self.norm(x, direction, keepdim=True)
        length = torch.where(length > 0, length, torch.ones_like(length))
        # min before the product: largest * length may overflow where the shortened step does not.
        return self.projx(self.expmap(x, direction * torch.minimum(largest, limit / length)))

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retraction of u together with v transported to its end, never longer than it was.

        Transport is an isometry; far out, rounding is not, and an optimiser's momentum would grow step by step.
        """
        x = self.projx(x)
        y = self.retr(x, u)
        direction, largest = _unit_scaled(v)
        moved = self.transp(x, y, direction)
        before, after = self.norm(x, direction, keepdim=True), self.norm(y, moved, keepdim=True)
        grown = after > before
        return y, moved * largest * torch.where(grown, before / torch.where(grown, after, 1), 1)

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The transported vector of `retr_transp`."""
        return self.retr_transp(x, u, v)[1]

    def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5):
        ok = bool(u.isfinite().all())
        return ok, None if ok else "'u' has components that are not finite"

    def origin(
        self, *size: int | tuple[int, ...], dtype: torch.dtype | None = None, device=None, seed: int | None = 42
    ) -> "geoopt.ManifoldTensor":
        """Zeros of the given size (seed is ignored: geoopt's signature)."""
        shape: Any = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return geoopt.ManifoldTensor(torch.zeros(shape, dtype=dtype, device=device), manifold=self)

    @__scaling__(ScalingInfo(std=-1), "random")
    def random_normal(
        self,
        *size: int | tuple[int, ...],
        std: float = 1.0,
        dtype: torch.dtype | None = None,
        device=None,
        generator: torch.Generator | None = None,
    ) -> "geoopt.ManifoldTensor":
        """Wrapped normal samples around the origin; std is in units of length in both models."""
        shape: Any = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        tangent = std * torch.randn(shape, dtype=dtype, device=device, generator=generator)
        points = lorentz.exp_map0(tangent, c=self.c)
        if self._model is poincare:
            points = convert.lorentz_to_poincare(points, c=self.c)
        return geoopt.ManifoldTensor(points, manifold=self)

    random = random_normal


def _kept(value: Tensor, keepdim: bool) -> Tensor:
    return value.unsqueeze(-1) if keepdim else value


class Lorentz(_Hyperbolic):
    """The Lorentz model as a geoopt manifold of space components (*b d): every finite vector is a point.

    Args:
        c: positive curvature magnitude, or a `Curvature` module (read at every call; see the module's warning).

    Raises:
        ValueError: c is not positive and finite.

    >>> Lorentz(c=2.0)
    Lorentz(c=2) manifold
    """

    name = "Lorentz"
    _model = lorentz

    def projx(self, x: Tensor) -> Tensor:
        """Pull points that lie farther out than k dist0 = -log(eps) - 4 back along their rays."""
        direction, largest = _unit_scaled(x)
        limit = math.sinh(_max_radius(x.dtype)) / self.c**0.5
        norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        inside = largest <= limit / torch.where(norm > 0, norm, torch.ones_like(norm))
        # NaN compares false: it must reach the result through the product.
        return torch.where(inside, x, direction * (limit / torch.where(inside, torch.ones_like(norm), norm)))

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5):
        ok = bool(x.isfinite().all())
        return ok, None if ok else "'x' has components that are not finite"


class PoincareBall(_Hyperbolic):
    """The Poincare ball of radius 1/sqrt(c) as a geoopt manifold.

    Args:
        c: positive curvature magnitude, or a `Curvature` module (read at every call; see the module's warning).

    Raises:
        ValueError: c is not positive and finite.

    >>> PoincareBall(c=2.0)
    PoincareBall(c=2) manifold
    """

    name = "PoincareBall"
    _model = poincare

    def projx(self, x: Tensor) -> Tensor:
        """Pull points off the ball, or farther out than k dist0 = -log(eps) - 4, back along their rays."""
        return poincare.project(x, _max_radius(x.dtype), c=self.c)

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5):
        return poincare.check_point(x, c=self.c)


class FromGeoopt(NamedTuple):
    """Points in this package's coordinates, their curvature magnitude and their model's name."""

    points: Tensor
    c: float
    model: str


def _checked_model(model: str) -> str:
    if model not in ("lorentz", "poincare"):
        raise ValueError(f"model must be 'lorentz' or 'poincare', got {model!r}")
    return model


def _described(manifold: Manifold) -> tuple[float, str, bool]:
    """Curvature magnitude, model name, and whether tensors carry a time component."""
    if isinstance(manifold, _Hyperbolic):
        return _number(manifold.c), "lorentz" if isinstance(manifold, Lorentz) else "poincare", False
    if isinstance(manifold, geoopt.Lorentz):
        return 1 / _number(manifold.k), "lorentz", True
    if isinstance(manifold, geoopt.Stereographic):
        curvature = _number(manifold.k)
        if not curvature < 0:
            raise ValueError(f"manifold must have negative curvature, got k = {curvature}")
        return -curvature, "poincare", False
    raise TypeError(f"manifold must be a Lorentz model or a Poincare ball, got {manifold!r}")


def to_geoopt(x: Tensor, *, c: float | Tensor = 1.0, model: str = "lorentz") -> tuple[Tensor, Manifold]:
    """Points in geoopt's coordinates, with geoopt's manifold of the same curvature.

    Lorentz: (x_t, x) on `geoopt.Lorentz(k=1/c)`; ball: the same point on `geoopt.PoincareBall(c)`.

    Args:
        x: points (*b d) of the model.
        c: positive curvature magnitude.
        model: "lorentz" (space components) or "poincare".

    Returns:
        Points (*b d+1) or (*b d), differentiable in x, and the manifold in their dtype and on their device.

    Raises:
        ValueError: model is unknown or c is not positive.

    >>> points, manifold = to_geoopt(torch.zeros(2), c=4.0)
    >>> points, manifold.k.item()
    (tensor([0.5000, 0.0000, 0.0000]), 0.25)
    """
    if _checked_model(model) == "lorentz":
        points = convert.to_ambient(x, c=c)
        return points, geoopt.Lorentz(k=torch.tensor(1 / _number(c), dtype=points.dtype, device=points.device))
    points = poincare.project(x, c=c)
    return points, geoopt.PoincareBall(c=torch.tensor(_number(c), dtype=points.dtype, device=points.device))


def tangent_to_geoopt(x: Tensor, v: Tensor, *, c: float | Tensor = 1.0, model: str = "lorentz") -> Tensor:
    """Tangent vectors in geoopt's coordinates: (x.v / x_t, v) in the Lorentz model, v in the ball.

    Args:
        x: points (*b d) of the model.
        v: tangent vectors (*b d) at x.
        c: positive curvature magnitude.
        model: "lorentz" (space components) or "poincare".

    Returns:
        Vectors (*b d+1) or (*b d).

    Raises:
        ValueError: model is unknown or c is not positive.
    """
    if _checked_model(model) == "poincare":
        return v
    x, v = torch.broadcast_tensors(x, v)
    time = (x * v).sum(dim=-1) / lorentz.time(x, c=c)
    return torch.cat((time.unsqueeze(-1), v), dim=-1)


def from_geoopt(x: Tensor, manifold: Manifold | None = None) -> FromGeoopt:
    """Points of a geoopt manifold in this package's coordinates, with their curvature: c = 1/k, c, or -k.

    Args:
        x: points on `geoopt.Lorentz`, `geoopt.PoincareBall`, `geoopt.Stereographic` with negative k, or one of ours.
        manifold: their manifold; `x.manifold` when left out.

    Returns:
        `(points, c, model)`: points (*b d) of the model "lorentz" (space components) or "poincare".

    Raises:
        TypeError: the manifold is none of these.
        ValueError: it is not negatively curved.
    """
    manifold = getattr(x, "manifold", None) if manifold is None else manifold
    c, model, has_time = _described(manifold)
    return FromGeoopt(convert.from_ambient(x) if has_time else x, c, model)


def tangent_from_geoopt(v: Tensor, manifold: Manifold) -> Tensor:
    """Tangent vectors of a geoopt manifold in this package's coordinates (*b d).

    Args:
        v: tangent vectors at a point of the manifold.
        manifold: as for `from_geoopt`.

    Returns:
        Vectors (*b d): without the time component in the Lorentz model.

    Raises:
        TypeError: the manifold is not a Lorentz model or a Poincare ball.
        ValueError: it is not negatively curved.
    """
    return v[..., 1:] if _described(manifold)[2] else v
