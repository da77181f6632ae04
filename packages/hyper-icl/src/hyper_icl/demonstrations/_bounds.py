"""Upper bounds of the selection score from one inner product, with the rounding error of that product accounted for.

References: Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1 (gamma_n, the error of an inner
product in any order of summation); the two bounds and their certificates are derived in the docstrings below.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hyper_geom import lorentz

_CHUNK_BYTES = 1 << 20


def gamma(dim: int) -> float:
    """Relative error bound of an fp32 inner product of `dim` terms whose inputs were rounded to fp32 too."""
    n, u = dim + 3, 2.0**-24
    return n * u / (1 - n * u)


def exact_scores(
    query: Float64[Tensor, "b d"], items: Float[Tensor, "b m d"], c: float, mu: float
) -> Float64[Tensor, "b m"]:
    """Scores -d(x, q) + mu |x| in fp64."""
    items = items.double()
    return -lorentz.tangent0_dist(items, query.unsqueeze(1), c=c) + mu * items.norm(dim=-1)


def products_are_rounded(device: torch.device) -> bool:
    """Whether torch may round the factors of an fp32 matmul (TF32, bf16), which voids the bound of `gamma`."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The old and the new way of setting it were mixed; assume the worst.
        return True
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    setting = getattr(
        getattr(backend, "matmul", None), "fp32_precision", "none"
    )  # older versions of torch have no such flag
    return legacy != "highest" or setting not in ("none", "ieee")


def upper_keys(
    tangent: Float[Tensor, "n d"],
    depth: Float64[Tensor, " n"],
    query: Float64[Tensor, "b d"],
    c: float,
    mu: float,
) -> Float64[Tensor, "b n"]:
    """Keys y = exp(-k s+) with s+ >= s for every item, from one fp32 matmul; small keys are good.

    The computed p = -<x,q>_L = x_t q_t - (sinh(k h)/(k h)) w.q_s is off by at most eps = gamma |x| |q|, |x| the
    Euclidean norm of (x_s, x_t). arcosh increases, so with z = max(1, c (p - eps)), s+ = -arcosh(z)/k + mu h >= s, and
    y = (z + sqrt(z^2 - 1)) exp(-k mu h): no logarithm of every pair.

    The product uses the direction of q, so that nothing overflows in fp32.
    """
    k = math.sqrt(c)
    q_depth = query.norm(dim=-1)
    direction = query / torch.where(q_depth == 0, 1.0, q_depth).unsqueeze(-1)
    wide = tangent.dtype == torch.float64 or products_are_rounded(tangent.device)
    direction = direction.double() if wide else direction.float()
    q_s, q_t = (k * q_depth).sinh() / k, (k * q_depth).cosh() / k
    of_query = c * torch.stack((q_t, -torch.hypot(q_s, q_t)), dim=-1)
    num, batch = tangent.shape[0], query.shape[0]
    keys = torch.empty(batch, num, dtype=torch.float64, device=tangent.device)
    step = max(256, _CHUNK_BYTES // (8 * max(batch, 1)))
    for start in range(0, num, step):
        rows = slice(start, start + step)
        h = depth[rows]
        sinh, x_t = (k * h).sinh() / k, (k * h).cosh() / k
        per_length = torch.where(h == 0, 1.0, sinh / torch.where(h == 0, 1.0, h))
        slack = gamma(tangent.shape[1]) * torch.hypot(sinh, x_t)
        with torch.autocast(tangent.device.type, enabled=False):
            product = (direction @ tangent[rows].to(direction.dtype).mT).double()
            z = of_query @ torch.stack((x_t, slack))
        # In place: at full size each pass over this block is as dear as the matmul.
        z.addcmul_(product.mul_(per_length), q_s.unsqueeze(-1), value=-c).clamp_(min=1.0)
        # z (1 + sqrt(1 - 1/z^2)) does not overflow where z^2 would.
        root = torch.reciprocal(z, out=product).square_().neg_().add_(1.0).sqrt_().add_(1.0)
        torch.mul(root, z, out=keys[:, rows]).mul_((-k * mu * h).exp())
    return keys


def upper_scores(keys: Float64[Tensor, "*b"], c: float) -> Float64[Tensor, "*b"]:
    """Upper scores s+ of keys."""
    return -keys.log() / math.sqrt(c)


def tilted_rows(tangent: Float[Tensor, "n d"], c: float, mu: float) -> Float64[Tensor, "n d1"]:
    """Rows exp(-k mu h) (x_s, x_t), whose inner product with (q_s, -q_t) grows with s' (see `lower_score`)."""
    tangent = tangent.double()
    h = tangent.norm(dim=-1, keepdim=True)
    k = math.sqrt(c)
    return (-k * mu * h).exp() * torch.cat((lorentz.exp_map0(tangent, c=c), (k * h).cosh() / k), dim=-1)


def tilted_query(query: Float64[Tensor, "b d"], c: float) -> Float64[Tensor, "b d1"]:
    """(q_s, -q_t)."""
    k = math.sqrt(c)
    q_t = (k * query.norm(dim=-1, keepdim=True)).cosh() / k
    return torch.cat((lorentz.exp_map0(query, c=c), -q_t), dim=-1)


def lower_score(product: Float64[Tensor, "*b"], c: float) -> Float64[Tensor, "*b"]:
    """Lower score s' = -log(-2 c <x^,q>_L)/k, which is s - e(d) with e(d) = log(1 + exp(-2 k d))/k <= log(2)/k.

    Proof: 2 c p = 2 cosh(k d) = exp(k d) (1 + exp(-2 k d)), so log(2 c p)/k = d + e(d); the factor exp(-k mu h) adds mu h.
    An upper bound of the score of an item is s' of its product plus e of any lower bound of its distance.

    Args:
        product: minus the inner products, > 0; smaller ones give infinity.
    """
    k = math.sqrt(c)
    positive = product > 0
    return torch.where(positive, -(2 * c * torch.where(positive, product, 1.0)).log() / k, torch.inf)


def gap(distance: Float64[Tensor, "*b"], c: float) -> Float64[Tensor, "*b"]:
    """e(d) = log(1 + exp(-2 k d))/k, decreasing in d."""
    k = math.sqrt(c)
    return (-2 * k * distance).exp().log1p() / k


def least_distance(bound: Float64[Tensor, "*b"], least_tilt: float, c: float) -> Float64[Tensor, "*b"]:
    """A lower bound of the distance of every item whose s' is at most `bound`.

    s' <= bound means c p >= exp(k (mu h - bound))/2, and mu h is at least `least_tilt`; d = arcosh(c p)/k.
    """
    k = math.sqrt(c)
    # Beyond exp(700) the distance is certainly so large that e vanishes.
    cosh = 0.5 * (k * (least_tilt - bound)).clamp(max=700.0).exp()
    return cosh.clamp(min=1.0).acosh() / k
