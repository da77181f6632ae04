"""Wrapped normal distribution on hyperbolic space: a Gaussian at the origin, carried to its location by an isometry.

References: Nagano et al., "A wrapped normal distribution on hyperbolic space for gradient-based learning", ICML 2019
(Algorithms 1 and 2). The scale is in geodesic units in both models, so one law has one set of parameters.
"""

import functools
import math
import operator
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl
from torch.distributions.utils import lazy_property

from hyper_geom import _numerics as nm
from hyper_geom import convert, lorentz, poincare
from hyper_geom._numerics import check_choice, check_positive, compute_dtype, curvature_tensor, full_precision, sq_norm


class _OpenBall(constraints.Constraint):
    """Points with |p| < 1/sqrt(c)."""

    event_dim = 1

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def check(self, value: Tensor) -> Tensor:
        # In the precision of c: a sum of squares in half precision rounds to 1 inside the ball.
        return self.c * sq_norm(value.to(self.c.dtype)) < 1


def _log_sinhc_of_square(squared: Tensor) -> Tensor:
    """L(t) = log(sinh(t)/t) as a function of t^2, so that its gradient exists at 0."""
    near = squared < 1e-2
    t = torch.where(near, torch.ones_like(squared), squared).sqrt()
    # log(sinh t / t) = t + log((1 - exp(-2t)) / 2t) has absolute error eps at every t and never overflows.
    far = t + torch.log(-torch.expm1(-2 * t) / (2 * t))
    # The next term is t^10/467775: 2e-16 at the switch.
    series = squared * (1 / 6 - squared * (1 / 180 - squared * (1 / 2835 - squared / 37800)))
    return torch.where(near, series, far)


def _joint_shape(loc: torch.Size, c: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(loc, c)
    except RuntimeError:
        raise ValueError(f"c must broadcast with the batch {tuple(loc)} of loc, got shape {tuple(c)}") from None


def _batch_shape(loc: torch.Size, spread: torch.Size, name: str) -> torch.Size:
    """Joint batch shape of a location (*b d) and its `scale` (any that broadcasts) or `scale_tril` (*b d d)."""
    dim = loc[-1]
    try:
        if name == "scale":
            shape = torch.broadcast_shapes(loc, spread)
            if shape[-1] == dim:
                return shape[:-1]
        elif spread[-2:] == (dim, dim):
            return torch.broadcast_shapes(loc[:-1], spread[:-2])
    except RuntimeError:
        pass
    wanted = f"(*b {dim})" if name == "scale" else f"(*b {dim} {dim})"
    raise ValueError(f"{name} must broadcast to {wanted} beside loc {tuple(loc)}, got shape {tuple(spread)}")


class WrappedNormal(Distribution):
    r"""The law of exp_loc(PT_{0 -> loc}(w)) with w ~ N(0, Sigma) in the tangent space of the origin.

    log p(z) = log N(w; 0, Sigma) - (d-1) log(sinh(k|w|) / (k|w|)) with w = PT_{loc -> 0}(log_loc(z)), k = sqrt(c):
    a density with respect to the Riemannian volume. w is measured in lengths along the geodesic from `loc` in both
    models, so samples of the two models with converted `loc` and the same scale have one law.

    Args:
        loc: location (*b d), a point of the model; also the mode and a Frechet mean.
        scale: standard deviations, a positive number or a tensor that broadcasts with `loc`.
        scale_tril: lower Cholesky factor (*b d d) of Sigma, instead of `scale`.
        c: positive curvature magnitude (the space has curvature -c), one for all or one for each location (*b).
        model: "lorentz" (space components) or "poincare"; half-precision ball points on the rim are pulled in.
        validate_args: as in `torch.distributions.Distribution`.

    Raises:
        TypeError: a parameter has an integer dtype.
        ValueError: none or both of scale and scale_tril are given; shapes do not broadcast; model is unknown; c is
            not positive; with validation on, a parameter lies outside its constraint.

    >>> law = WrappedNormal(torch.zeros(3), 1.0, c=1.0)
    >>> law.event_shape, law.rsample((5,)).shape
    (torch.Size([3]), torch.Size([5, 3]))
    >>> round(law.log_prob(torch.zeros(3)).item(), 4)  # (2 pi)^(-3/2)
    -2.7568
    """

    arg_constraints = {  # noqa: RUF012 (torch reads this dict; the ball's own constraint on loc is set per instance)
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "scale_tril": constraints.lower_cholesky,
    }
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: float | Tensor | None = None,
        *,
        scale_tril: Tensor | None = None,
        c: float | Tensor = 1.0,
        model: str = "lorentz",
        validate_args: bool | None = None,
    ) -> None:
        """Broadcast the parameters and check them; see the class."""
        self.model = check_choice("model", model, ("lorentz", "poincare"))
        if (scale is None) == (scale_tril is None):
            raise ValueError("exactly one of scale and scale_tril must be given")
        if loc.ndim < 1 or loc.shape[-1] == 0:
            raise ValueError(f"loc must have shape (*b d) with d >= 1, got shape {tuple(loc.shape)}")
        named = {"loc": loc, "scale": scale, "scale_tril": scale_tril, "c": c}
        dtype = compute_dtype({name: value for name, value in named.items() if isinstance(value, Tensor)})
        if isinstance(c, Tensor) and c.numel() > 1:
            # One c for each location; a location without batch dimensions is then drawn from every one of them.
            loc = loc.expand(*_joint_shape(loc.shape[:-1], c.shape), loc.shape[-1])
        self.c = curvature_tensor(c, dtype, loc.device, leading=loc.shape[:-1])
        if model == "poincare" and loc.dtype not in (torch.float32, torch.float64):
            loc = poincare.project(loc, c=self.c)  # rounding to half precision carries a point onto the rim
        self._given, self._diagonal = loc, scale_tril is None
        if self._diagonal and not isinstance(scale, Tensor):
            scale = torch.full((), check_positive("scale", scale), dtype=dtype, device=loc.device)
        self._equal = isinstance(scale, Tensor) and (scale.ndim == 0 or scale.shape[-1] == 1)
        name = "scale" if self._diagonal else "scale_tril"
        spread = cast(Tensor, scale if self._diagonal else scale_tril)
        batch_shape = _batch_shape(loc.shape, spread.shape, name)
        self.loc = loc.to(dtype).expand(batch_shape + loc.shape[-1:])
        if self.c.ndim:
            self.c = self.c.expand(batch_shape)
        self.__dict__[name] = spread.to(dtype).expand(batch_shape + loc.shape[-1:] * (1 if self._diagonal else 2))
        if model == "poincare":
            self.arg_constraints = {**type(self).arg_constraints, "loc": _OpenBall(self.c)}
        if self.loc.numel() == 0:
            # Nothing to check, and torch's constraints cannot reshape a tensor of no elements.
            validate_args = False
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    @lazy_property
    def scale(self) -> Tensor:
        """Standard deviation of each coordinate of w (*b d)."""
        return self.scale_tril.square().sum(dim=-1).sqrt()

    @lazy_property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor of the covariance of w (*b d d)."""
        return torch.diag_embed(self.scale)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors (Lorentz) or the open ball of radius 1/sqrt(c)."""
        return constraints.real_vector if self.model == "lorentz" else _OpenBall(self.c)

    @property
    def mode(self) -> Tensor:
        """The location: both factors of the density are largest there."""
        return self.loc

    def expand(
        self, batch_shape: list[int] | tuple[int, ...], _instance: "WrappedNormal | None" = None
    ) -> "WrappedNormal":
        """The same law with its parameters expanded to a larger batch shape (no copies)."""
        new = self._get_checked_instance(WrappedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.model, new._diagonal, new._equal, new._given = self.model, self._diagonal, self._equal, self._given
        new.c = self.c.expand(batch_shape) if self.c.ndim else self.c
        for name in ("loc", "scale", "scale_tril"):
            if name in self.__dict__:
                value = self.__dict__[name]
                event_shape = value.shape[len(self.batch_shape) :]
                new.__dict__[name] = value.expand(batch_shape + event_shape)
        if "arg_constraints" in self.__dict__:
            new.arg_constraints = self.arg_constraints
        # The parameters were checked when this instance was made.
        super(WrappedNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: list[int] | tuple[int, ...] = ()) -> Tensor:
        """Reparameterised samples.

        Args:
            sample_shape: leading shape of the result.

        Returns:
            Points (*sample_shape *b d) of the model, with gradients to loc, the scale and c.
        """
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device
        )
        if self._diagonal:
            tangent = self.scale * noise
        else:
            # Autocast would round this product to half precision.
            with full_precision(noise.device):
                tangent = (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        loc = self._to_lorentz(self.loc)
        points = lorentz.exp_map(loc, lorentz.parallel_transport0(loc, tangent, c=self.c), c=self.c)
        if self.model == "lorentz":
            return points
        return convert.lorentz_to_poincare(points, c=self.c)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the Riemannian volume.

        Args:
            value: points (*sample *b d) of the model.

        Returns:
            Log densities (*sample *b), fp32 or wider.

        Raises:
            ValueError: with validation on, the shape does not broadcast or a point lies outside the support.
        """
        if self.model == "poincare" and value.dtype not in (torch.float32, torch.float64):
            value = poincare.project(value, c=self.c)
        if self._validate_args and value.numel():
            self._validate_sample(value)
        loc, value = self._to_lorentz(self.loc), self._to_lorentz(value)
        w = lorentz.parallel_transport0_back(loc, lorentz.log_map(loc, value, c=self.c), c=self.c)
        if self._diagonal:
            whitened, half_log_det = w / self.scale, self.scale.log().sum(dim=-1)
        else:
            factor = self.scale_tril.to(w.dtype).expand(*w.shape, w.shape[-1])
            whitened = torch.linalg.solve_triangular(factor, w.unsqueeze(-1), upper=False).squeeze(-1)
            half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        dim = w.shape[-1]
        normal = -0.5 * sq_norm(whitened) - half_log_det - 0.5 * dim * math.log(2 * math.pi)
        return normal - (dim - 1) * _log_sinhc_of_square(self.c * sq_norm(w))

    def entropy(self, num_samples: int = 4096) -> Tensor:
        """Differential entropy with respect to the Riemannian volume.

        H = H[N(0, Sigma)] + (d-1) E[log(sinh(k|w|)/(k|w|))]. For equal scales the expectation is generalised
        Gauss-Laguerre quadrature over |w|, else a mean over normal samples. In a graph, whose values cannot be read, scales
        are equal where `scale` was a number or ended in a dimension of 1.

        Args:
            num_samples: samples where the scales differ.

        Returns:
            Entropies (*b), with gradients to the scale and c.
        """
        dim = self.event_shape[0]
        scale = self.scale
        if self._diagonal and (self._equal or nm.known(scale == scale[..., :1], unread=False)):
            t, weight = (v.to(scale) for v in _laguerre(operator.index(dim), 48))
            squared = 2 * t * scale[..., :1].square()
            extra = (weight * _log_sinhc_of_square(self.c.unsqueeze(-1) * squared)).sum(-1)
        else:
            noise = torch.randn(num_samples, *self.batch_shape, dim, dtype=scale.dtype, device=scale.device)
            w = self.scale * noise if self._diagonal else (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
            extra = _log_sinhc_of_square(self.c * sq_norm(w)).mean(0)
        return self._half_log_det() + dim / 2 * math.log(2 * math.pi * math.e) + (dim - 1) * extra

    def kl(self, other: "WrappedNormal", num_samples: int = 4096) -> Tensor:
        """Kullback-Leibler divergence KL(self || other) on one space.

        Where both laws have one location it is the divergence of the normals in the tangent space, in closed form: the
        volume terms are equal. Else a mean over reparameterised samples. In a graph, whose values cannot be read, both laws
        must have been given the same tensor for the closed form.

        Args:
            other: a law of the same model, dimension and c.
            num_samples: samples where the locations differ.

        Returns:
            Divergences (*b).

        Raises:
            ValueError: another model, dimension or c.
        """
        same = self.model == other.model and self.event_shape == other.event_shape
        if not same or not nm.known(self.c.double() == other.c.double(), unread=True):
            raise ValueError("other must be of the same model, dimension and c")
        together = self._given is other._given or nm.known(self.loc == other.loc, unread=False)
        if self.loc.shape != other.loc.shape or not together:
            samples = self.rsample((num_samples,))
            return (self.log_prob(samples) - other.log_prob(samples)).mean(0)
        if self._diagonal and other._diagonal:
            trace = (self.scale / other.scale).square().sum(-1)
        else:
            trace = torch.linalg.solve_triangular(other.scale_tril, self.scale_tril, upper=False).square().sum((-2, -1))
        return other._half_log_det() - self._half_log_det() + (trace - self.event_shape[0]) / 2

    def _half_log_det(self) -> Tensor:
        spread = self.scale if self._diagonal else self.scale_tril.diagonal(dim1=-2, dim2=-1)
        return spread.log().sum(-1)

    def _to_lorentz(self, points: Tensor) -> Tensor:
        return points if self.model == "lorentz" else convert.poincare_to_lorentz(points, c=self.c)


@torch.compiler.assume_constant_result
def _laguerre(dim: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes t and weights of E[f(t)] for |w|^2 = 2 t sigma^2, t ~ Gamma(dim/2), in fp64."""
    nodes, weights = _gauss(dim / 2 - 1, num_nodes)
    return torch.tensor(nodes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


@functools.lru_cache(maxsize=16)
def _gauss(alpha: float, num: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of sum 1 for t^alpha exp(-t): QL steps on the Jacobi matrix (Golub and Welsch, 1969).

    In plain Python, because tensors have no values while a graph is exported.
    """
    diagonal = [2 * k + alpha + 1 for k in range(num)]
    off = [math.sqrt(k * (k + alpha)) for k in range(1, num)] + [0.0]
    first = [1.0] + [0.0] * (num - 1)  # first components of the eigenvectors
    for low in range(num):
        while True:
            high = low
            while high < num - 1 and abs(off[high]) > 1e-17 * (abs(diagonal[high]) + abs(diagonal[high + 1])):
                high += 1
            if high == low:
                break
            g = (diagonal[low + 1] - diagonal[low]) / (2 * off[low])
            shift = diagonal[low] - off[low] / (g + math.copysign(math.hypot(g, 1.0), g))
            g, sine, cosine, moved = diagonal[high] - shift, 1.0, 1.0, 0.0
            for i in range(high - 1, low - 1, -1):
                f, b = sine * off[i], cosine * off[i]
                size = math.hypot(f, g)
                off[i + 1], sine, cosine = size, f / size, g / size
                g = diagonal[i + 1] - moved
                rest = (diagonal[i] - g) * sine + 2 * cosine * b
                moved = sine * rest
                diagonal[i + 1] = g + moved
                g = cosine * rest - b
                a, b = first[i], first[i + 1]
                first[i], first[i + 1] = cosine * a - sine * b, sine * a + cosine * b
            diagonal[low] -= moved
            off[low], off[high] = g, 0.0
    return diagonal, [value * value for value in first]


@register_kl(WrappedNormal, WrappedNormal)
def _kl(p: WrappedNormal, q: WrappedNormal) -> Tensor:
    return p.kl(q)
