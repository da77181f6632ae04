"""Exact Kullback-Leibler divergences between wrapped normals on manifolds of two curvatures.

The divergence needs an identification of the two manifolds, and the identification decides the answer (derived here):
through the tangent space it is blind to the curvature; `kl_homothety` scales distances, `kl_spatial` keeps the space
components of the Lorentz model. Quadrature: Golub and Welsch, "Calculation of Gauss quadrature rules", 1969.
"""

import functools
import math

import torch
from torch import Tensor

from mat_align._checks import check_choice, check_joint, check_positive, check_single
from mat_align.intermediate._chord import common_dtype

_DIRECTIONS = ("forward", "reverse", "jeffreys")


def kl_homothety(c: float | Tensor, c_mid: float | Tensor, dim: int) -> Tensor:
    """Divergence between isotropic wrapped normals of equal sigma under the homothety of the manifolds.

    KL(c || c_mid) = (n/2) (c/c_mid - 1 - ln(c/c_mid)). Summed over two c, it is least at their arithmetic mean; with
    the arguments of KL exchanged at the harmonic mean, with both added up at the geometric mean.

    Args:
        c: curvature parameter, > 0.
        c_mid: curvature parameter, > 0.
        dim: dimension n, at least 1.

    Returns:
        The divergence in fp64, >= 0, broadcast.

    Raises:
        ValueError: a curvature not finite and > 0, dim < 1.

    >>> kl_homothety(0.5, 0.5, 512)
    tensor(0., dtype=torch.float64)
    """
    _check_dim(dim)
    check_positive("c", c)
    check_positive("c_mid", c_mid)
    check_joint(c=c, c_mid=c_mid)
    ratio = torch.as_tensor(c, dtype=torch.float64) / torch.as_tensor(c_mid, dtype=torch.float64)
    return dim / 2 * (ratio - 1 - ratio.log())


def kl_spatial(c: float | Tensor, c_mid: float | Tensor, dim: int, sigma: float, num_nodes: int = 64) -> Tensor:
    """Divergence between wrapped normals at the origin when points with equal space components are identified.

    With rho = sigma chi_n, w = sinh(sqrt(c) rho)/sqrt(c) and rho' = asinh(sqrt(c_mid) w)/sqrt(c_mid),

    KL = E[(n-1) ln(rho/rho') - (rho^2 - rho'^2)/(2 sigma^2) + ln((1 + c_mid w^2)/(1 + c w^2))/2]

    The expectation is generalised Gauss-Laguerre quadrature in t = rho^2/(2 sigma^2), alpha = n/2 - 1.

    Args:
        c: curvature parameter of the distribution that is averaged over, one element.
        c_mid: curvature parameter of the other one, one element.
        dim: dimension n, at least 1.
        sigma: standard deviation, > 0.
        num_nodes: nodes of the quadrature.

    Returns:
        A 0-D fp64 tensor, differentiable in both curvatures.

    Raises:
        ValueError: a curvature or sigma not finite and > 0, dim or num_nodes < 1.

    >>> round(kl_spatial(1.0, 0.5, 3, 1.0).item(), 10)
    0.1121338786
    """
    _check_dim(dim)
    for name, value in (("c", c), ("c_mid", c_mid), ("sigma", sigma)):
        check_positive(name, value)
        check_single(name, value)
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    c = torch.as_tensor(c, dtype=torch.float64).reshape(())
    c_mid = torch.as_tensor(c_mid, dtype=torch.float64).reshape(())
    t, weight = (torch.tensor(values, dtype=torch.float64, device=c.device) for values in _rule(dim, num_nodes))
    rho = sigma * (2 * t).sqrt()
    # ln w, because w itself overflows for sqrt(c) rho > 710.
    x = c.sqrt() * rho
    log_w = x + (-torch.expm1(-2 * x)).log() - math.log(2) - c.log() / 2
    other = _asinh_of_exp(log_w + c_mid.log() / 2) / c_mid.sqrt()
    grown = torch.nn.functional.softplus(c_mid.log() + 2 * log_w) - torch.nn.functional.softplus(c.log() + 2 * log_w)
    value = (dim - 1) * (rho / other).log() - (rho - other) * (rho + other) / (2 * sigma**2) + grown / 2
    return (weight * value).sum()


def exact_intermediate_curvature(
    c_img: float | Tensor, c_txt: float | Tensor, dim: int, sigma: float, direction: str = "forward"
) -> Tensor:
    """The curvature that minimises the summed `kl_spatial` to both manifolds, differentiable in both curvatures.

    forward: KL(c_i || c_mid); reverse: KL(c_mid || c_i); jeffreys: both.

    Args:
        c_img: curvature parameter of the image manifold, one element.
        c_txt: curvature parameter of the text manifold, one element.
        dim: dimension n.
        sigma: standard deviation, > 0; 1/sqrt(n) puts the samples near radius 1.
        direction: "forward", "reverse" or "jeffreys".

    Returns:
        A 0-D tensor between the curvatures: fp64, or the dtype of a curvature that is a tensor.

    Raises:
        ValueError: unknown direction, or what `kl_spatial` raises.
    """
    check_choice("direction", direction, _DIRECTIONS)
    for name, value in (("c_img", c_img), ("c_txt", c_txt)):
        check_positive(name, value)
        check_single(name, value)
    dtype = common_dtype(c_img, c_txt)
    img = torch.as_tensor(c_img, dtype=torch.float64).reshape(())
    txt = torch.as_tensor(c_txt, dtype=torch.float64).reshape(())
    low, high = sorted((img.item(), txt.item()))
    if low == high:
        return ((img + txt) / 2).to(dtype)

    def slope(c_mid: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=c_mid.device)
        for c_i in c:
            if direction != "reverse":
                total = total + kl_spatial(c_i, c_mid, dim, sigma)
            if direction != "forward":
                total = total + kl_spatial(c_mid, c_i, dim, sigma)
        return torch.autograd.grad(total, c_mid, create_graph=True)[0]

    with torch.enable_grad():
        constant = img.detach(), txt.detach()
        middle, move = (low + high) / 2, math.inf
        # Newton, kept inside the bracket by bisection: about 6 slopes in place of 50.
        while low < middle < high and abs(move) > 1e-12 * high:
            c_mid = img.new_tensor(middle).requires_grad_()
            value = slope(c_mid, constant)
            steepness = torch.autograd.grad(value, c_mid)[0].item()
            low, high = (low, middle) if value.item() > 0 else (middle, high)
            aim = middle - value.item() / steepness if steepness > 0 else math.nan
            aim = aim if low < aim < high else (low + high) / 2
            move, middle = aim - middle, aim
        c_mid = img.new_tensor(middle).requires_grad_()
        steepness = torch.autograd.grad(slope(c_mid, constant), c_mid)[0]
        # One Newton step from the root: its value does not move, its derivative is the implicit one.
        root = c_mid.detach() - slope(c_mid, (img, txt)) / steepness
    return (root if torch.is_grad_enabled() else root.detach()).to(dtype)


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")


def _asinh_of_exp(log_u: Tensor) -> Tensor:
    """asinh(e^L): directly where e^L is small, else L + ln(1 + sqrt(1 + e^(-2L)))."""
    small = log_u < 0
    near = torch.where(small, log_u, 0.0).exp().asinh()
    far = torch.where(small, 0.0, log_u)
    return torch.where(small, near, far + (1 + (1 + (-2 * far).exp()).sqrt()).log())


@functools.lru_cache(maxsize=64)
def _rule(dim: int, num_nodes: int) -> tuple[list[float], list[float]]:
    """Nodes t and weights of E[f(t)], t ~ Gamma(dim/2): eigenvalues and eigenvectors of the Jacobi matrix.

    The closed form of the weights needs Gamma(n/2 + 64)^2, which overflows at n = 512.
    """
    alpha = dim / 2 - 1
    k = torch.arange(num_nodes, dtype=torch.float64)
    off = ((k[1:]) * (k[1:] + alpha)).sqrt()
    jacobi = torch.diag(2 * k + alpha + 1) + torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return nodes.tolist(), vectors[0].square().tolist()
