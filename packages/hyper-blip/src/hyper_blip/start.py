"""The closed forms with which both stages start where pictures are few.

A Q-Former that starts from BERT knows words but no pictures: its contrastive loss stays at ln B until a tie has formed, which
takes more steps than small data allow. Principal components of the caption states and ridge regressions onto them give one at
once (`HyperBlip2ForPretraining.start_from_pairs`). In the same way the projection of stage 2 starts from a ridge regression on
word embeddings (`HyperBlip2ForConditionalGeneration.start_from_captions`). No paper has this; with millions of pictures it is
not needed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hyper_blip.losses import IGNORED

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


def whitened_components(x: Float[Tensor, "rows width"], dim: int, floor: float = FLOOR) -> Affine:
    """The map onto the leading principal components, each divided by its deviation plus a floor; mean norm sqrt(dim).

    Args:
        x: in double precision, not all rows equal.
        dim: number of components; those beyond the width are 0.
        floor: in units of the largest deviation.

    Raises:
        ValueError: x is no matrix with different rows, or dim < 1.
    """
    if x.ndim != 2 or dim < 1:
        raise ValueError(f"x must be a matrix and dim at least 1, got shape {tuple(x.shape)} and {dim}")
    check_varied("x", x)
    mean = x.mean(0)
    centred = x - mean
    variance, axes = torch.linalg.eigh(centred.mT @ centred / len(x))
    deviation = variance.clamp_min(0).sqrt().flip(0)[:dim]
    weight = x.new_zeros(dim, x.shape[1])
    weight[: len(deviation)] = axes.flip(1)[:, :dim].mT / (deviation + floor * deviation[0])[:, None]
    return _of_norm(Affine(weight, -weight @ mean), x)


def ridge_map(x: Float[Tensor, "rows width"], targets: Float[Tensor, "rows dim"], ridge: float) -> Affine:
    """The ridge regression of targets on x, then scaled to mean norm sqrt(dim): a penalty shrinks what it maps.

    Args:
        x: in double precision, not all rows equal.
        targets: what x should be mapped to.
        ridge: penalty in units of the mean variance of x.

    Raises:
        ValueError: no two matrices of so many rows and one dtype, or rows of x that are all equal.
    """
    if x.ndim != 2 or targets.ndim != 2 or len(x) != len(targets) or x.dtype != targets.dtype:
        raise ValueError(
            f"x and targets must be matrices of as many rows and one dtype, got {x.dtype} {tuple(x.shape)} and {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    check_varied("x", x)
    mean, aim = x.mean(0), targets.mean(0)
    centred = x - mean
    gram = centred.mT @ centred
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + penalty, centred.mT @ (targets - aim)).mT
    return _of_norm(Affine(weight, aim - weight @ mean), x)


def mean_words(
    labels: Int[Tensor, "rows tokens"], table: Float[Tensor, "vocabulary width"]
) -> Float[Tensor, "rows width"]:
    """Mean word embedding of each row, a word weighing ln(rows / rows that hold it).

    Args:
        labels: token ids, -100 where there is none.
        table: word embeddings.

    Returns:
        Means in double precision; the plain mean of a row whose words are all in every row.

    Raises:
        ValueError: a row without a token, or a token that table does not hold.
    """
    if labels.ndim != 2 or labels.dtype != torch.int64 or table.ndim != 2:
        raise ValueError(
            f"labels must be int64 (rows, tokens) and table (vocabulary, width), got {labels.dtype} {tuple(labels.shape)} and "
            f"{tuple(table.shape)}"
        )
    kept = labels != IGNORED
    empty = (~kept.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"labels must hold a token in every row, got none in {empty[:6]}")
    if len(labels) and (int(labels[kept].min()) < 0 or int(labels[kept].max()) >= len(table)):
        raise ValueError(
            f"labels must lie in [0, {len(table)}), got {int(labels[kept].min())}..{int(labels[kept].max())}"
        )
    row = kept.nonzero()[:, 0]
    used, word = torch.unique(labels[kept], return_inverse=True)
    # A word counts once in a row, however often it stands there.
    rows_with = (torch.unique(row * len(used) + word) % len(used)).bincount(minlength=len(used))
    weights = (len(labels) / rows_with.double()).log()[word]
    totals = weights.new_zeros(len(labels)).index_add_(0, row, weights)
    weights = torch.where(totals[row] > 0, weights, 1.0)
    totals = torch.zeros_like(totals).index_add_(0, row, weights)
    matrix = torch.sparse_coo_tensor(
        torch.stack([row, word]), weights / totals[row], (len(labels), len(used)), check_invariants=True
    )
    return torch.sparse.mm(matrix, table[used].double())


def check_varied(name: str, states: Tensor) -> Tensor:
    """The states, if a regression can use them: finite, not all rows equal."""
    if not bool(states.isfinite().all()):
        raise ValueError(f"{name} must give finite features, got NaN or infinity")
    if len(states) < 2 or bool((states == states[0]).all()):
        raise ValueError(f"{name} must hold at least two different rows, got {_equal(len(states))}")
    return states


def _equal(num: int) -> str:
    return f"{num} equal ones" if num > 1 else str(num)


@torch.no_grad()
def set_linear(linear: nn.Linear, affine: Affine) -> None:
    """Copy the map into a layer."""
    linear.weight.copy_(affine.weight)
    linear.bias.copy_(affine.bias)


def _of_norm(affine: Affine, x: Tensor) -> Affine:
    scale = len(affine.weight) ** 0.5 / apply_map(affine, x).norm(dim=1).mean()
    return Affine(affine.weight * scale, affine.bias * scale)


__all__ = [
    "FLOOR",
    "Affine",
    "apply_map",
    "check_varied",
    "mean_words",
    "ridge_map",
    "set_linear",
    "whitened_components",
]
