r"""All distances between two sets of points from one matrix product, with a backward written by hand.

Haversine law on hyperbolic space, in polar coordinates around the origin (Ratcliffe, "Foundations of Hyperbolic
Manifolds", 2006, theorem 3.5.3, with cosh t - 1 = 2 sinh(t/2)^2). With C the cosines between the directions,

    h = sinh((r-s)/2)^2 + sinh(r) sinh(s) (1-C)/2,      D = (2/k) asinh(sqrt h).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyper_geom import _cpu
from hyper_geom._kernel import make_kernel, undisturbed
from hyper_geom._numerics import check_choice, norm
from hyper_geom._polar import Polar, coth, half_exponentials, lorentz_polar, poincare_polar

_PRECISIONS = ("default", "high")
# Largest error of (1-C)/2 by how the matrix product rounds its inputs. float64 and ieee: 2.3 eps is the most seen over
# d = 2..2048 and every radius. tf32 and bf16: both inputs off by half an ulp of 11 or 8 bits in the same direction.
_NOISE = {"float64": 3.0 * 2.0**-52, "ieee": 3.0 * 2.0**-23, "tf32": 2.0**-11, "bf16": 2.0**-8}


def lorentz_pairwise_dist(x: Tensor, y: Tensor, c: Tensor, precision: str = "default") -> Tensor:
    """Distances (*b n m) between Lorentz points (*b n d) and (*b m d) of one compute dtype; c is 0-D or (*b)."""
    return _pairwise_dist(x, y, c, precision, lorentz_polar)


def poincare_pairwise_dist(x: Tensor, y: Tensor, c: Tensor, precision: str = "default") -> Tensor:
    """Distances (*b n m) between ball points (*b n d) and (*b m d) of one compute dtype; c is 0-D or (*b)."""
    return _pairwise_dist(x, y, c, precision, poincare_polar)


def _pairwise_dist(x: Tensor, y: Tensor, c: Tensor, precision: str, polar: Callable[[Tensor, Tensor], Polar]) -> Tensor:
    dtype = x.dtype
    if check_choice("precision", precision, _PRECISIONS) == "high":
        x, y, c = x.double(), y.double(), c.double()
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    # The expansion stays outside the kernel, so autograd sums its gradient.
    x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
    k = c.sqrt().unsqueeze(-1)
    sides = polar(x, k), polar(y, k)
    if k.numel() == 1 and _cpu.serves(*sides[0], *sides[1]) and undisturbed(k):
        return polar_dist(*sides, unit=1 / k.item())  # a pass over the matrix less
    # In place: a second N x M buffer costs more than the division.
    return polar_dist(*sides).div_(k.unsqueeze(-1)).to(dtype)


def polar_dist(x: Polar, y: Polar, unit: float = 1.0) -> Tensor:
    """`unit` times k times the distance matrix (*b n m)."""
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in (*x, *y))
    return _polar_dist(*x, *y, keep, unit)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The matrix, and the product part of h for the backward: the one N x M buffer that is saved."""
    *parts, keep, unit = args
    x, y = Polar(*parts[:4]), Polar(*parts[4:])
    if _cpu.serves(*parts):
        return _cpu.dist(x, y, keep, unit)
    product = haversine_product(x, y)
    h = half_difference(x.radius, y.radius).square_().add_(product)
    if not keep:
        product = product.new_empty((*product.shape[:-2], 0, 0))
    return dist_from_haversine(h).mul_(unit) if unit != 1 else dist_from_haversine(h), product


def _backward(inputs: list, outputs: tuple, grads: tuple) -> tuple[Tensor | None, ...]:
    (*parts, _, unit), (product,), (grad,) = inputs, outputs, grads
    x, y = Polar(*parts[:4]), Polar(*parts[4:])
    if product.shape != grad.shape:
        product = haversine_product(x, y)
    if _cpu.serves(*parts, product, grad):
        grad_x, row_sum, grad_y, column_sum = _cpu.dist_grad(x, y, product, grad, matmul_noise(grad), unit)
        return grad_x, row_sum, None, None, grad_y, column_sum, None, None, None, None
    weight, row_sum, column_sum = haversine_grad(x, y, product, grad if unit == 1 else grad * unit)
    grad_x, grad_y = tangential(x, weight @ y.vector), tangential(y, weight.mT @ x.vector)
    return grad_x, row_sum, None, None, grad_y, column_sum, None, None, None, None


def _plain(*args: Any) -> Tensor:
    """The same matrix, differentiable in `vector` and `radius` any number of times and guarded like the backward.

    2 log(sqrt(h+F) + sqrt(1+h)) has the slope 1/sqrt((h+F)(1+h)) of the guarded gradient; what it is off by is constant.
    """
    x, y = Polar(*args[:4]), Polar(*args[4:8])
    (u, sinh_r), (w, sinh_s) = _scaled(x), _scaled(y)
    product = (sinh_r.unsqueeze(-1) * sinh_s.unsqueeze(-2) - u @ w.mT) / 2
    product = product + (product.clamp(min=0.0) - product).detach()
    half = ((x.radius.unsqueeze(-1) - y.radius.unsqueeze(-2)) / 2).sinh()
    h = half * half + product
    floor = matmul_noise(h) * (sinh_r.unsqueeze(-1) * sinh_s.unsqueeze(-2)).detach()
    guarded = 2 * ((h + floor).clamp(min=torch.finfo(h.dtype).tiny).sqrt() + (1 + h).sqrt()).log()
    exact = 2 * h.detach().sqrt().asinh()
    return args[-1] * (guarded + (exact - guarded).detach())


def _scaled(x: Polar) -> tuple[Tensor, Tensor]:
    """(sinh(r) e, sinh(r)) as functions of `vector` and `radius`; at the origin the first is stretch times vector."""
    sinh = x.radius.sinh()
    sinh = sinh + (x.sinh - sinh).detach()
    size = norm(x.vector)
    away = size > 0
    factor = torch.where(away, sinh / torch.where(away, size, 1.0), x.stretch)
    return factor.unsqueeze(-1) * x.vector, sinh


_polar_dist = make_kernel(_plain, _forward, _backward, num_kept=1, saved=(1,))


def matmul_noise(like: Tensor) -> float:
    """Error of (1-C)/2 on this tensor's device under the current precision settings."""
    return _NOISE["float64" if like.dtype == torch.float64 else fp32_precision(like.device.type)]


@torch.compiler.assume_constant_result
def fp32_precision(device_type: str) -> str:
    """How a float32 matrix product rounds its inputs: "ieee", "tf32" or "bf16".

    A compiled graph keeps the answer it was traced with, as its compiled matrix products do.
    """
    # Reading the older flag raises once a program has set the newer one, so the newer one is asked first.
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is None:
        coarse = {"highest": "ieee", "high": "tf32", "medium": "bf16" if device_type == "cpu" else "tf32"}
        return coarse[torch.get_float32_matmul_precision()]
    return setting if setting in _NOISE else "ieee"


def haversine_product(x: Polar, y: Polar) -> Tensor:
    """sinh(r) sinh(s) max(0, 1-C)/2 in one new N x M buffer.

    The vectors are multiplied as they are and the product is scaled, so no normalised copy of either side exists.
    """
    product = x.vector @ y.vector.mT
    product.mul_(-0.5 * x.stretch.unsqueeze(-1)).mul_(y.stretch.unsqueeze(-2))
    return product.addcmul_(x.sinh.unsqueeze(-1), y.sinh.unsqueeze(-2), value=0.5).clamp_(min=0.0)


def half_difference(r: Tensor, s: Tensor) -> Tensor:
    """sinh((r-s)/2) for all pairs, without an N x M transcendental.

    With a = exp(r/2) and b = exp(s/2) it is (a-b)(1/a+1/b)/2; a-1 and b-1 come from expm1, so nothing is lost at small
    radii, where a-b would cancel.
    """
    (gap_r, decay_r), (gap_s, decay_s) = half_exponentials(r), half_exponentials(s)
    difference = gap_r.unsqueeze(-1) - gap_s.unsqueeze(-2)
    return difference.mul_(decay_r.unsqueeze(-1) + decay_s.unsqueeze(-2))


def dist_from_haversine(h: Tensor) -> Tensor:
    """2 asinh(sqrt h), destroying h.

    It is log1p(t) with t = 2(h + sqrt(h) sqrt(1+h)); log(v) + (t-(v-1))/v, v = fl(1+t), equals log1p(t) to an ulp, and
    log is vectorised on CPU where asinh and log1p are not (1 ns against 12 to 19 ns an element).
    """
    root = h.sqrt()
    t = h.add_(1.0).sqrt_().add_(root).mul_(root).mul_(2.0)
    v = torch.add(t, 1.0, out=root)
    t.sub_(v - 1.0).div_(v)
    return v.log_().add_(t)


def haversine_grad(x: Polar, y: Polar, product: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix that multiplies the other side's vectors, and the gradients of the two radii.

    dL/dh = W = grad / sqrt((h+F) (1+h)); the matrix is -W/2 with both sides' stretch.

    F = noise sinh(r) sinh(s) is how far h can be off. Without it 1/sqrt(h) turns rounding into gradients of norm 1000
    where the true norm is 1. Added, it keeps the norm at most 1 for every pair; as max(h, 8 eps sinh sinh) pairs just
    above the threshold reach 1.08.
    """
    half = half_difference(x.radius, y.radius)
    h = half.square().add_(product)
    guarded = (matmul_noise(h) * x.sinh).unsqueeze(-1) * y.sinh.unsqueeze(-2)
    # Two points at the origin have h = F = 0.
    weight = guarded.add_(h).clamp_(min=torch.finfo(h.dtype).tiny).rsqrt_()
    # Two rsqrt, not one of h (1+h): that product overflows from r = 22 on in float32.
    weight.mul_(h.add_(1.0).rsqrt_()).mul_(grad)
    angular = torch.mul(weight, product, out=h)
    row_sum, column_sum = angular.sum(-1) * coth(x.sinh), angular.sum(-2) * coth(y.sinh)
    # sinh(r-s)/2 = u sqrt(1+u^2) with u = sinh((r-s)/2).
    radial = torch.mul(half, half, out=h).add_(1.0).sqrt_().mul_(half).mul_(weight)
    row_sum, column_sum = row_sum + radial.sum(-1), column_sum - radial.sum(-2)
    weight.mul_(-0.5 * x.stretch.unsqueeze(-1)).mul_(y.stretch.unsqueeze(-2))
    return weight, row_sum, column_sum


def tangential(x: Polar, grad: Tensor) -> Tensor:
    """The part of `grad` orthogonal to each vector; all of it at the origin."""
    inverse = x.inverse_norm()
    along = (x.vector * grad).sum(-1) * inverse * inverse
    return grad - x.vector * along.unsqueeze(-1)
