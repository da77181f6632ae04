"""Gromov hyperbolicity of a finite metric space, given as its matrix of distances.

References: Gromov, "Hyperbolic groups", 1987 (product and four-point condition); Fournier, Ismail and Vigneron,
"Computing the Gromov hyperbolicity of a discrete metric space", IPL 2015 (max-min product);
Khrulkov et al., "Hyperbolic image embeddings", CVPR 2020 (the relative value 2 delta / diameter).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# One temporary of the max-min product or of a batch of sampled quadruples stays below this many bytes.
_CHUNK_BYTES = 64 * 2**20

_METHODS = ("exact", "fixed_base", "sampled")


class GromovDelta(NamedTuple):
    """The hyperbolicity `delta`, the `diameter` and `relative` = 2 delta / diameter, each a 0-D tensor."""

    delta: Float[Tensor, ""]
    diameter: Float[Tensor, ""]
    relative: Float[Tensor, ""]


def _checked(D: Tensor) -> Tensor:
    """D in fp32 or fp64, symmetric within rounding, its diagonal set to zero."""
    if not D.is_floating_point():
        raise TypeError(f"D must have a floating dtype, got {D.dtype}")
    if D.ndim != 2 or D.shape[0] != D.shape[1]:
        raise ValueError(f"D must be a square matrix (n n), got shape {tuple(D.shape)}")
    eps = torch.finfo(D.dtype).eps
    D = D.detach().to(torch.promote_types(D.dtype, torch.float32), copy=True)
    if D.numel():
        # sqrt(eps) is what a distance kernel leaves between two nearly equal points; NaN and inf pass on to the result.
        gap = (D - D.T).abs().amax()
        if gap > eps**0.5 * D.abs().amax():
            raise ValueError(f"D must be symmetric, got max|D - D^T| = {gap.item():.3g}")
        D.fill_diagonal_(0)
    return D


def _checked_base(base: int, num_points: int) -> int:
    if isinstance(base, bool) or not isinstance(base, int):
        raise TypeError(f"base must be an int, got {base!r}")
    if not 0 <= base < num_points:
        raise ValueError(f"base must lie in [0, {num_points}), got {base}")
    return base


def _product(D: Tensor, base: int) -> Tensor:
    to_base = D[base]
    return (to_base[:, None] + to_base[None, :] - D) / 2


def _max_min_gap(A: Tensor) -> Tensor:
    """max_{x,y} [max_z min(A_xz, A_zy) - A_xy] for a symmetric A, in O(n^3) time and blocks of bounded memory."""
    num_points = A.shape[0]
    rows = max(1, _CHUNK_BYTES // (A.element_size() * num_points * num_points))
    # Rows too long for one block are cut along y as well, so that 10^4 points need no n^2 temporary per row.
    columns = max(1, _CHUNK_BYTES // (A.element_size() * num_points * rows))
    best = A.new_zeros(())
    for x in range(0, num_points, rows):
        # The gap is symmetric in (x, y): the block starts at the diagonal.
        for y in range(x, num_points, columns):
            left, right = A[x : x + rows], A[y : y + columns]
            through = torch.minimum(left[:, None, :], right[None, :, :]).amax(dim=-1)
            best = torch.maximum(best, (through - A[x : x + rows, y : y + columns]).amax())
    return best


def _sampled_gap(D: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Half the gap between the two largest pair sums, largest over random quadruples."""
    chunk = max(1, _CHUNK_BYTES // (16 * D.element_size()))
    device = D.device if generator is None else generator.device
    best = D.new_zeros(())
    for start in range(0, num_samples, chunk):
        count = min(chunk, num_samples - start)
        quadruples = torch.randint(D.shape[0], (4, count), generator=generator, device=device)
        x, y, z, w = quadruples.to(D.device)
        sums = torch.stack((D[x, y] + D[z, w], D[x, z] + D[y, w], D[x, w] + D[y, z]))
        # sort, not topk: topk ranks NaN first and would drop it from the difference of the two largest.
        sums = sums.sort(dim=0).values
        best = torch.maximum(best, ((sums[2] - sums[1]) / 2).amax())
    return best


def gromov_product(D: Tensor, base: int = 0) -> Float[Tensor, "n n"]:
    """Gromov product of every pair of points, seen from one of them.

    (x|y)_w = (d(x,w) + d(y,w) - d(x,y)) / 2. In a tree it is the distance from w to the path between x and y.

    Args:
        D: symmetric distances (n n); a diagonal that rounding left above zero counts as zero.
        base: index of w.

    Returns:
        Products (n n), non-negative for a metric; no gradient.

    Raises:
        TypeError: D is not a floating tensor, or base is not an int.
        ValueError: D is not square or not symmetric, or base is out of range.

    >>> gromov_product(torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]]))[1, 2]
    tensor(1.)
    """
    D = _checked(D)
    return _product(D, _checked_base(base, D.shape[0]))


def gromov_delta(
    D: Tensor,
    method: str = "exact",
    num_samples: int = 100_000,
    generator: torch.Generator | None = None,
    *,
    base: int = 0,
) -> GromovDelta:
    """How far a finite metric space is from a tree: 0 for a tree, (ln 2)/sqrt(c) at most in hyperbolic space.

    For each quadruple take half the gap between the two largest of the three pair sums
    d(x,y)+d(z,w), d(x,z)+d(y,w), d(x,w)+d(y,z); delta is the largest. Equally,
    delta = max_w delta_w with delta_w = max_{x,y} [max_z min((x|z)_w, (z|y)_w) - (x|y)_w].

    Args:
        D: symmetric distances (n n) that satisfy the triangle inequality (not checked).
        method: "exact" takes all quadruples, O(n^4) time: up to a few hundred points. "fixed_base" gives delta_w in
            O(n^3), seconds for a thousand points; delta_w <= delta <= 2 delta_w. "sampled" takes
            `num_samples` random quadruples and bounds delta from below. None of them needs O(n^3) memory.
        num_samples: number of quadruples for "sampled".
        generator: random source for "sampled".
        base: index of w for "fixed_base".

    Returns:
        `(delta, diameter, relative)`, 0-D tensors: delta in [0, diameter/2], relative = 2 delta / diameter in [0, 1];
        all are 0 when the diameter is. No gradient.

    Raises:
        TypeError: D is not a floating tensor, or base or num_samples is not an int.
        ValueError: D is not square or not symmetric, method is unknown, base or num_samples is out of range.

    >>> cycle = torch.tensor([[0.0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]])
    >>> [float(value) for value in gromov_delta(cycle, "exact")]
    [1.0, 2.0, 1.0]
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"num_samples must be an int, got {num_samples!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    D = _checked(D)
    num_points = D.shape[0]
    if num_points == 0:
        return GromovDelta(D.new_zeros(()), D.new_zeros(()), D.new_zeros(()))
    _checked_base(base, num_points)
    if method == "fixed_base":
        delta = _max_min_gap(_product(D, base))
    elif method == "sampled":
        delta = _sampled_gap(D, num_samples, generator)
    else:
        delta = D.new_zeros(())
        # A quadruple needs its smallest index as base only: the other three points come after it.
        for smallest in range(num_points):
            delta = torch.maximum(delta, _max_min_gap(_product(D[smallest:, smallest:], 0)))
    diameter = D.amax()
    positive = diameter > 0
    relative = torch.where(positive, 2 * delta / torch.where(positive, diameter, 1), torch.zeros_like(delta))
    # `positive` is False for NaN: let it through instead of reporting a perfect tree.
    return GromovDelta(delta, diameter, torch.where(diameter.isnan(), diameter, relative))
