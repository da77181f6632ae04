"""The closed forms with which `HyperBlip2ForPretraining.start_from_pairs` ties the two sides of a fresh Q-Former.

A Q-Former that starts from BERT knows words but no pictures: its contrastive loss stays at ln B until a tie has formed, which
takes more steps than small data allow. Principal components of the caption states and ridge regressions onto them give one at
once. Neither paper has this; with millions of pictures it is not needed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Principal components are damped below this share of the largest deviation: there they are noise.
FLOOR = 0.1


class Affine(NamedTuple):
    """x -> weight x + bias.

    Attributes:
        weight: `(out in)`.
        bias: `(out)`.
    """

    weight: Tensor
    bias: Tensor


def apply_map(affine: Affine, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows out"]:
    """Weight x + bias for each row."""
    return x @ affine.weight.mT + affine.bias


def whitened_components(x: Float[Tensor, "rows width"], dim: int) -> Affine:
    """The map onto the leading principal components, each divided by its deviation plus a floor; mean norm sqrt(dim).

    Args:
        x: in double precision, not all rows equal.
        dim: number of components; those beyond the width are 0.
    """
    mean = x.mean(0)
    centred = x - mean
    variance, axes = torch.linalg.eigh(centred.mT @ centred / len(x))
    deviation = variance.clamp_min(0).sqrt().flip(0)[:dim]
    weight = x.new_zeros(dim, x.shape[1])
    weight[: len(deviation)] = axes.flip(1)[:, :dim].mT / (deviation + FLOOR * deviation[0])[:, None]
    return _of_norm(Affine(weight, -weight @ mean), x)


def ridge_map(x: Float[Tensor, "rows width"], targets: Float[Tensor, "rows dim"], ridge: float) -> Affine:
    """The ridge regression of targets on x, then scaled to mean norm sqrt(dim): a penalty shrinks what it maps.

    Args:
        x: in double precision, not all rows equal.
        targets: what x should be mapped to.
        ridge: penalty in units of the mean variance of x.
    """
    mean, aim = x.mean(0), targets.mean(0)
    centred = x - mean
    gram = centred.mT @ centred
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + penalty, centred.mT @ (targets - aim)).mT
    return _of_norm(Affine(weight, aim - weight @ mean), x)


def _of_norm(affine: Affine, x: Tensor) -> Affine:
    scale = len(affine.weight) ** 0.5 / apply_map(affine, x).norm(dim=1).mean()
    return Affine(affine.weight * scale, affine.bias * scale)


__all__ = ["FLOOR", "Affine", "apply_map", "ridge_map", "whitened_components"]
