"""Argument checks, compute precision, and scalar functions whose values and derivatives hold at zero.

References: Nickel and Kiela, "Learning continuous hierarchies in the Lorentz model", ICML 2018 (the maps these serve);
Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 1 (series instead of cancelling quotients).
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

# Largest k*dist0 an exponential map returns: |x|^2 overflows at 44 (fp32) and 355 (fp64).
MAX_RADIUS = {torch.float32: 40.0, torch.float64: 350.0}
# A vector is shrunk before it is squared once an entry passes this; fp32 squares overflow at 1.8e19, and the ball's
# exponential map multiplies by up to 1/(8 eps) first.
_LARGE = 1e10
# f(A) = asinh(sqrt A)^2 = sum_n (-1)^n 4^n n!^2 / ((2n+1)! (n+1)) A^(n+1); the slope f' lacks the 1/(n+1).
_SLOPE_SERIES = [(-4.0) ** n * math.factorial(n) ** 2 / math.factorial(2 * n + 1) for n in range(9)]
_SQUARE_SERIES = [a / (n + 1) for n, a in enumerate(_SLOPE_SERIES)]
_ASINHC_SERIES = [(-0.25) ** n * math.comb(2 * n, n) / (2 * n + 1) for n in range(10)]
_SINHC_SERIES = [1.0 / math.factorial(2 * n + 1) for n in range(10)]
_TANHC_SERIES = [1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875]
_ATANHC_SERIES = [1.0 / (2 * n + 1) for n in range(9)]


def geometry(num_vectors: int, *, first: int = 0, matrices: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function of `num_vectors` vector arguments and a keyword `c`.

    The function then sees checked tensors of one compute dtype (fp64 if any tensor is fp64, else fp32), `c` as a tensor
    of that dtype, 0-D or `(*b)`, numbers as floats, and no autocast: even after a cast, a matmul under autocast rounds
    to half.

    Args:
        num_vectors: how many arguments are vectors `(*b d)`, broadcast against each other.
        first: position of the first of them.
        matrices: the vectors are rows of matrices `(*b n d)`, of which only `*b` broadcasts.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        vector_names = names[first : first + num_vectors]
        counts = {p.name for p in parameters if p.annotation is int}

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            given = names[: len(args)]
            if len(args) > len(names) or any(n in kwargs for n in given) or not {*given, *kwargs} >= set(vector_names):
                return function(*args, **kwargs)  # the interpreter's own message about the arguments
            kwargs.update(zip(given, args, strict=True))
            c = kwargs.pop("c", 1.0)
            vectors: dict[str, Any] = {name: kwargs[name] for name in vector_names}
            for name, vector in vectors.items():
                if not isinstance(vector, Tensor):
                    raise TypeError(f"{name} must be a torch.Tensor, got {type(vector).__name__}")
            leading = check_vectors(vectors, matrices=matrices)
            tensors = vectors
            if len(kwargs) > num_vectors or isinstance(c, Tensor):
                # A mask stays what it is; weights and fractions take part in the promotion.
                others = {n: v for n, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()}
                tensors = {**vectors, **others}  # torch 2.7 compiles no `|` of dicts
                kwargs.update(
                    {name: float(value) for name, value in kwargs.items() if type(value) is int and name not in counts}
                )
            dtype = compute_dtype({**tensors, "c": c} if isinstance(c, Tensor) else tensors)
            for name, tensor in tensors.items():
                if tensor.dtype != dtype:
                    kwargs[name] = tensor.to(dtype)
            device = vectors[vector_names[0]].device
            kwargs["c"] = curvature_tensor(c, dtype, device, leading=leading)
            if not _autocasts(device):
                return function(**kwargs)  # type: ignore[call-arg]
            with torch.autocast(device.type, enabled=False):
                return function(**kwargs)  # type: ignore[call-arg]

        return wrapper

    return decorate


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast on this device; torch knows none for "meta"."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def check_vectors(vectors: dict[str, Tensor], *, matrices: bool = False) -> torch.Size:
    """The joint leading dimensions; ValueError unless they broadcast and the last dimension is shared."""
    tail = 2 if matrices else 1
    first = next(iter(vectors.values())).shape
    # The text is built on the way out: joining symbolic sizes is what torch.compile cannot trace.
    for vector in vectors.values():
        if vector.ndim < tail:
            raise ValueError(f"expected at least {tail} dimension(s), got {_listing(vectors)}")
        if vector.shape[-1] != first[-1] or vector.shape[-1] == 0:
            raise ValueError(f"the last dimension must be equal and at least 1, got {_listing(vectors)}")
    leading = _broadcast([vector.shape[:-tail] for vector in vectors.values()])
    if leading is None:
        raise ValueError(f"the leading dimensions must broadcast, got {_listing(vectors)}")
    return leading


def _broadcast(shapes: list[torch.Size]) -> torch.Size | None:
    """The joint shape, None where there is none."""
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def check_numbers(name: str, value: Any, *shapes: torch.Size) -> None:
    """ValueError if a tensor of numbers does not broadcast with these leading dimensions."""
    if isinstance(value, Tensor) and _broadcast([value.shape, *shapes]) is None:
        raise ValueError(
            f"{name} must broadcast with {', '.join(str(tuple(shape)) for shape in shapes)}, got shape {tuple(value.shape)}"
        )


def broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of this shape can be expanded to the target's."""
    return _broadcast([shape, target]) == target


def _listing(vectors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(vector.shape)}" for name, vector in vectors.items())


def compute_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32; TypeError for a dtype that is not floating, ValueError for two devices."""
    device, wide = next(iter(tensors.values())).device, False
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}: take {name}.float()")
        if tensor.device != device:
            places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise ValueError(f"all tensors must be on one device, got {places}")
        wide = wide or tensor.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def curvature_tensor(
    c: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    name: str = "c",
    leading: torch.Size | tuple[int, ...] = (),
) -> Tensor:
    """The curvature parameter as a tensor that keeps its graph: 0-D, or of a shape that expands to `leading`."""
    if not isinstance(c, Tensor):
        if isinstance(c, nn.Module):
            raise TypeError(f"{name} must be a number or a tensor, got the module {type(c).__name__}: call it")
        # full, not tensor: a fill needs no copy from the host.
        return torch.full((), check_positive(name, c), dtype=dtype, device=device)
    if not c.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {c.dtype}: take {name}.float()")
    if c.numel() == 1:
        c = c.reshape(())
    elif not leading:
        raise ValueError(f"{name} must have one element, got shape {tuple(c.shape)}")
    elif not broadcasts_to(c.shape, torch.Size(leading)):
        raise ValueError(f"{name} must have one element or expand to {tuple(leading)}, got shape {tuple(c.shape)}")
    if _known_negative(c):
        raise ValueError(f"{name} must be > 0, got {c.detach().min().item()}")
    return c if c.dtype == dtype else c.to(dtype)


def _known_negative(value: Tensor) -> bool:
    """Whether an entry is <= 0, as far as that can be read without waiting for a device."""
    return value.device.type == "cpu" and not known(~(value.detach() <= 0), unread=True)


def known(condition: Tensor, *, unread: bool) -> bool:
    """Whether all entries hold; `unread` where a graph, vmap, a fake or a meta tensor has no value to read."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return unread
    try:
        return bool(condition.all())
    except RuntimeError:
        return unread


def check_positive(name: str, value: Any) -> float:
    """Return a Python or NumPy number that is finite and > 0; else ValueError (TypeError when it is no number)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (0 < value < math.inf):  # type: ignore[operator]
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return float(value)


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return a value that is one of the choices; else ValueError."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of products over the last dimension; not a matmul, which TF32 and autocast would round."""
    return (x * y).sum(dim=-1)


def sq_norm(x: Tensor) -> Tensor:
    """Squared Euclidean norm over the last dimension."""
    return (x * x).sum(dim=-1)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0; NaN passes through."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def safe_div(x: Tensor, y: Tensor) -> Tensor:
    """Quotient x / y, and 0 with derivative 0 where y is 0."""
    zero = y == 0
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, y))


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension with derivative 0 at 0."""
    return safe_sqrt(sq_norm(x))


def _horner(x: Tensor, coefficients: list[float]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for a in reversed(coefficients[:-1]):
        value = value * x + a
    return value


def asinh_sq(x: Tensor) -> Tensor:
    """asinh(sqrt x)^2 for x >= 0, smooth at 0 with slope 1."""
    small = x < 1e-2
    far = torch.where(small, 1.0, x).sqrt().asinh().square()
    return torch.where(small, x * _horner(torch.where(small, x, 0.0), _SQUARE_SERIES), far)


def asinh_sq_slope(x: Tensor) -> Tensor:
    """Derivative of `asinh_sq`: asinh(sqrt x) / sqrt(x (1 + x)), 1 at 0."""
    small = x < 1e-2
    safe = torch.where(small, 1.0, x)
    # sqrt(x) sqrt(1+x), not sqrt(x(1+x)): the product overflows first.
    far = safe.sqrt().asinh() / (safe.sqrt() * (1 + safe).sqrt())
    return torch.where(small, _horner(torch.where(small, x, 0.0), _SLOPE_SERIES), far)


def sinhc(x_sq: Tensor, cap: float = math.inf) -> Tensor:
    """sinh(min(t, cap)) / t as a function of t^2, smooth at 0.

    The series reaches t = 1: beyond it the derivative cosh(t)/t - sinh(t)/t^2 no longer cancels.
    """
    small = x_sq < 1
    t = torch.where(small, 1.0, x_sq).sqrt()
    far = t.clamp(max=cap).sinh() / t
    return torch.where(small, _horner(torch.where(small, x_sq, 0.0), _SINHC_SERIES), far)


def asinhc(x_sq: Tensor) -> Tensor:
    """asinh(t) / t as a function of t^2, smooth at 0."""
    small = x_sq < 1e-2
    t = torch.where(small, 1.0, x_sq).sqrt()
    return torch.where(small, _horner(torch.where(small, x_sq, 0.0), _ASINHC_SERIES), t.asinh() / t)


def tanhc(x_sq: Tensor) -> Tensor:
    """tanh(t) / t as a function of t^2, smooth at 0."""
    small = x_sq < 1e-2
    t = torch.where(small, 1.0, x_sq).sqrt()
    return torch.where(small, _horner(torch.where(small, x_sq, 0.0), _TANHC_SERIES), t.tanh() / t)


def atanhc(x_sq: Tensor) -> Tensor:
    """artanh(t) / t as a function of t^2 < 1, smooth at 0."""
    small = x_sq < 1e-2
    safe = torch.where(small, 0.5, x_sq)
    t = safe.sqrt()
    # log((1+t)/sqrt(1-t^2)), not atanh(t): the rounding of the root would be magnified by 1/(1-t^2).
    far = (t.log1p() - (-safe).log1p() / 2) / t
    return torch.where(small, _horner(torch.where(small, x_sq, 0.0), _ATANHC_SERIES), far)


def tame(v: Tensor) -> Tensor:
    """v, shrunk along its own direction where an entry is so large that its square could overflow."""
    largest = torch.linalg.vector_norm(v.detach(), ord=math.inf, dim=-1, keepdim=True)
    return v * torch.where(largest > _LARGE, _LARGE / largest, 1.0)


def max_ball_norm(dtype: torch.dtype) -> float:
    """Largest k|p| a ball point keeps: 1 - 4 eps, k*dist0 15.2 in fp32."""
    return 1 - 4 * torch.finfo(dtype).eps


def into_ball(p: Tensor, c: float | Tensor, limit: float | None = None) -> Tensor:
    """p, pulled in to k|p| = `limit` (`max_ball_norm` by default) where it lies further out, else exact."""
    limit = max_ball_norm(p.dtype) if limit is None else limit
    size = c * sq_norm(p)
    outside = size > limit * limit
    shrink = torch.where(outside, limit / torch.where(outside, size, 1.0).sqrt(), 1.0)
    return p * shrink.unsqueeze(-1)
