"""The chord objective between manifolds of two curvatures, its minimiser, and the closed-form implicit gradient.

Reference: Modality Alignment across Trees (arXiv 2510.27391), the intermediate manifold; that D is half a squared chord,
when its minimiser exists, the bracketed search and the gradient are derived here and checked against differences.
"""

import functools
import math
import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mat_align._checks import check_choice, check_joint, check_positive, check_single

METHODS = ("chord", "arithmetic", "harmonic", "geometric", "released")
# k^2 cosh y = 1 + y/k with sinh y = k^-3: from here on the stationary point between the curvatures is unique.
_UNIQUE = 1.1358301


def chord_objective(c_mid: float | Tensor, c: float | Tensor, r: float | Tensor) -> Tensor:
    """How far a manifold of curvature -c moves a point at distance r from the origin when it becomes -c_mid.

    D = (-a + 2 s cosh((s - a) r)) / (2 a s^2), a = sqrt(c), s = sqrt(c_mid)

    It equals (<x-y, x-y>_L + 1/c)/2 for the images x, y of one tangent vector of norm r under both exponential maps at
    the origin. D(c) = 1/(2c); D tends to -infinity as c_mid tends to 0, so its minimum over all c_mid does not exist.

    Args:
        c_mid: curvature parameter of the intermediate manifold, > 0.
        c: curvature parameter of the other one, > 0.
        r: norm of the tangent vector, > 0.

    Returns:
        The objective in fp64, broadcast.

    Raises:
        ValueError: an argument is not finite and > 0.

    >>> chord_objective(0.25, 0.25, 2.0)
    tensor(2., dtype=torch.float64)
    """
    for name, value in (("c_mid", c_mid), ("c", c), ("r", r)):
        check_positive(name, value)
    check_joint(c_mid=c_mid, c=c, r=r)
    a, s = _double(c).sqrt(), _double(c_mid).sqrt()
    return (-a + 2 * s * ((s - a) * _double(r)).cosh()) / (2 * a * s * s)


def search_radii(
    norm_img: float | Tensor,
    norm_txt: float | Tensor,
    c_img: float | Tensor,
    c_txt: float | Tensor,
    kappa: float = 1.2,
) -> tuple[Tensor, Tensor]:
    """Radii in the given proportion, large enough that the objective has its minimum between the curvatures.

    rho = norm_img/norm_txt, r_txt = kappa max(1, 1/rho)/sqrt(min c), r_img = rho r_txt, so that
    min(r) sqrt(min c) = kappa.

    Args:
        norm_img: norm of the mean visual feature, > 0.
        norm_txt: norm of the mean text feature, > 0.
        c_img: curvature parameter of the image manifold.
        c_txt: curvature parameter of the text manifold.
        kappa: at least 1; below 1.1358301 uniqueness of the minimum is not proved.

    Returns:
        r_img and r_txt, fp64 without gradient.

    Raises:
        ValueError: kappa < 1, or another argument that is not finite and > 0.

    >>> [round(r.item(), 4) for r in search_radii(0.7, 1.0, 0.05, 0.025)]
    [7.5895, 10.8421]
    """
    for name, value in (("norm_img", norm_img), ("norm_txt", norm_txt), ("c_img", c_img), ("c_txt", c_txt)):
        check_positive(name, value)
    check_joint(norm_img=norm_img, norm_txt=norm_txt, c_img=c_img, c_txt=c_txt)
    check_positive("kappa", kappa)
    if kappa < 1:
        raise ValueError(f"kappa must be at least 1, got {kappa}")
    with torch.no_grad():
        rho = _double(norm_img) / _double(norm_txt)
        r_txt = kappa * (1 / rho).clamp(min=1) / torch.minimum(_double(c_img), _double(c_txt)).sqrt()
        return rho * r_txt, r_txt


def released_radii(
    norm_img: float | Tensor, norm_txt: float | Tensor, c_img: float | Tensor, c_txt: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The radii of the released code: r_img = max(1/a_img, rho/a_txt), r_txt = r_img/rho.

    They give r_i a_i >= 1 for each modality by its own curvature, which does not keep the minimum inside.

    Args:
        norm_img: as in `search_radii`.
        norm_txt: as in `search_radii`.
        c_img: as in `search_radii`.
        c_txt: as in `search_radii`.

    Returns:
        r_img and r_txt, fp64 without gradient.
    """
    for name, value in (("norm_img", norm_img), ("norm_txt", norm_txt), ("c_img", c_img), ("c_txt", c_txt)):
        check_positive(name, value)
    check_joint(norm_img=norm_img, norm_txt=norm_txt, c_img=c_img, c_txt=c_txt)
    with torch.no_grad():
        rho = _double(norm_img) / _double(norm_txt)
        r_img = torch.maximum(1 / _double(c_img).sqrt(), rho / _double(c_txt).sqrt())
        return r_img, r_img / rho


def intermediate_curvature(
    c_img: float | Tensor,
    c_txt: float | Tensor,
    r_img: float | Tensor | None = None,
    r_txt: float | Tensor | None = None,
    method: str = "chord",
) -> Tensor:
    """The curvature of the intermediate manifold, differentiable in both curvatures.

    chord: argmin over c_mid in [min c, max c] of D(c_img -> c_mid; r_img) + D(c_txt -> c_mid; r_txt), found by
    bisection of its derivative in fp64, with the implicit gradient in closed form; the radii are constants.
    arithmetic, harmonic, geometric: the means; see `kl_homothety` for what they minimise.
    released: golden section in fp32 on [0.9 min c, 1.1 max c]. Where c_img >= c_txt and the result lies inside, its
    backward sends the constant 1 to c_img whatever comes in, and nothing to c_txt, as the released code does; elsewhere
    it is the implicit gradient, and at an end of the interval that of the end.

    Args:
        c_img: curvature parameter of the image manifold, one element.
        c_txt: curvature parameter of the text manifold, one element.
        r_img: radius of the image modality; for "chord" and "released" only.
        r_txt: radius of the text modality; for "chord" and "released" only.
        method: one of `METHODS`.

    Returns:
        A 0-D tensor: fp64, or the dtype of a curvature that is a tensor.

    Raises:
        ValueError: unknown method, an argument not finite and > 0, a radius missing, or for "chord"
            min(r) sqrt(min c) < 1: then nothing keeps the minimum between the curvatures.

    >>> round(intermediate_curvature(0.05, 0.025, 7.5894663, 7.5894663).item(), 6)
    0.03631
    """
    check_choice("method", method, METHODS)
    for name, value in (("c_img", c_img), ("c_txt", c_txt)):
        check_positive(name, value)
        check_single(name, value)
    dtype = common_dtype(c_img, c_txt)
    img, txt = _double(c_img).reshape(()), _double(c_txt).reshape(())
    if method in ("chord", "released"):
        if r_img is None or r_txt is None:
            raise ValueError(f"r_img and r_txt must be given for method={method!r}, got {r_img} and {r_txt}")
        for name, value in (("r_img", r_img), ("r_txt", r_txt)):
            check_positive(name, value)
            check_single(name, value)
        radii = float(r_img), float(r_txt)
        if method == "chord":
            _check_radii(radii, min(img.item(), txt.item()))
            return _Chord.apply(img, txt, *radii).to(dtype)
        return _Released.apply(img, txt, *radii).to(dtype)
    if r_img is not None or r_txt is not None:
        warnings.warn(f"r_img and r_txt have no effect for method={method!r}", stacklevel=2)
    mean = {
        "arithmetic": lambda: (img + txt) / 2,
        "harmonic": lambda: 2 * img * txt / (img + txt),
        "geometric": lambda: (img * txt).sqrt(),
    }[method]
    return mean().to(dtype)


def _check_radii(radii: tuple[float, float], smallest: float) -> None:
    k = min(radii) * math.sqrt(smallest)
    if k < 1 - 1e-12:
        raise ValueError(f"min(r_img, r_txt) sqrt(min(c_img, c_txt)) must be at least 1, got {k}")
    if k < _UNIQUE - 1e-7:
        warnings.warn(
            f"min(r_img, r_txt) sqrt(min(c_img, c_txt)) = {k} is below {_UNIQUE}: the minimum may not be unique",
            stacklevel=3,
        )


def common_dtype(*values: float | Tensor) -> torch.dtype:
    """The widest dtype of the tensors among the values; fp64 if there is none."""
    given = [value.dtype for value in values if isinstance(value, Tensor)]
    return functools.reduce(torch.promote_types, given) if given else torch.float64


def _double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _scaled(s: float, a: tuple[float, float], r: tuple[float, float]) -> list[tuple[float, float]]:
    """Return cosh and sinh of x_i = (s - a_i) r_i, all times exp(-max |x|), which changes no sign and no ratio."""
    x = [(s - a_i) * r_i for a_i, r_i in zip(a, r, strict=True)]
    largest = max(map(abs, x))
    up, down = [math.exp(x_i - largest) for x_i in x], [math.exp(-x_i - largest) for x_i in x]
    return [((u + d) / 2, (u - d) / 2) for u, d in zip(up, down, strict=True)]


def _slope(s: float, a: tuple[float, float], r: tuple[float, float]) -> float:
    """A positive multiple of the derivative in s of the sum of both objectives: sum_i N_i/(a_i s)."""
    x = [(s - a_i) * r_i for a_i, r_i in zip(a, r, strict=True)]
    one = math.exp(-max(map(abs, x)))
    terms = zip(a, r, _scaled(s, a, r), strict=True)
    return sum((a_i * one - s * cosh + s * s * r_i * sinh) / (a_i * s) for a_i, r_i, (cosh, sinh) in terms)


def _solve(c: tuple[float, float], r: tuple[float, float]) -> float:
    """The minimiser between two curvatures, to the last bits of fp64."""
    a = (math.sqrt(c[0]), math.sqrt(c[1]))
    low, high = min(a), max(a)
    if low == high:
        return c[0]
    while low < (middle := (low + high) / 2) < high and high - low > 1e-16 * high:
        if _slope(middle, a, r) > 0:
            high = middle
        else:
            low = middle
    return low * high


def _gradient(c_mid: float, c: tuple[float, float], r: tuple[float, float]) -> tuple[float, float]:
    """Derivatives of the stationary point c_mid in c_1 and c_2."""
    if c[0] == c[1] == c_mid:
        parts = [r_j * r_j * c[0] - 1 for r_j in r]
        total = sum(parts)
        return (parts[0] / total, parts[1] / total) if total > 0 else (0.5, 0.5)
    a, s = (math.sqrt(c[0]), math.sqrt(c[1])), math.sqrt(c_mid)
    scaled = _scaled(s, a, r)
    terms = list(zip(a, r, scaled, strict=True))
    total = sum(((s * s * r_i * r_i - 1) * ch + s * r_i * sh) / a_i for a_i, r_i, (ch, sh) in terms)
    return tuple(
        s * s / a_j**3 * ((a_j * s * r_j * r_j - 1) * ch + r_j * (s - a_j) * sh) / total for a_j, r_j, (ch, sh) in terms
    )


class _Chord(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c_img: Tensor, c_txt: Tensor, r_img: float, r_txt: float) -> Tensor:
        c, r = (c_img.item(), c_txt.item()), (r_img, r_txt)
        c_mid = _solve(c, r)
        ctx.gradient = _gradient(c_mid, c, r)
        return c_img.new_tensor(c_mid)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grad * ctx.gradient[0], grad * ctx.gradient[1], None, None


class _Released(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c_img: Tensor, c_txt: Tensor, r_img: float, r_txt: float) -> Tensor:
        c, r = (c_img.item(), c_txt.item()), (r_img, r_txt)
        low, high = 0.9 * min(c), 1.1 * max(c)
        c_mid = _golden_section(c, r, low, high)
        inside = low + 1e-5 * high < c_mid < high * (1 - 1e-5)
        ctx.constant = inside and c[0] >= c[1]
        if inside:
            ctx.gradient = _gradient(c_mid, c, r)
        else:
            factor, end = (0.9, min(c)) if c_mid < (low + high) / 2 else (1.1, max(c))
            ctx.gradient = (factor, 0.0) if c[0] == end else (0.0, factor)
        return c_img.new_tensor(c_mid)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if ctx.constant:
            return torch.ones_like(grad), torch.zeros_like(grad), None, None
        return grad * ctx.gradient[0], grad * ctx.gradient[1], None, None


def _golden_section(c: tuple[float, float], r: tuple[float, float], low: float, high: float) -> float:
    """Golden-section search of the summed objective in fp32 down to a bracket of 1e-6."""
    sides = [(torch.tensor(c_i).sqrt(), torch.tensor(r_i)) for c_i, r_i in zip(c, r, strict=True)]

    def value(c_mid: float) -> float:
        s = torch.tensor(c_mid).sqrt()
        return sum(((-a + 2 * s * ((s - a) * r_i).cosh()) / (2 * a * s * s)).item() for a, r_i in sides)

    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if value(left) < value(right):
            high = right
        else:
            low = left
    return (low + high) / 2
