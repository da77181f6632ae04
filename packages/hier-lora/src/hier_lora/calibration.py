"""Temperatures that turn scores into probabilities which hold on data that training did not see.

Temperature scaling: Guo et al., 2017, "On Calibration of Modern Neural Networks". Two parameters for a sigmoid: Platt, 1999.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hier_losses import Taxonomy
from hier_losses.path_ops import extend_paths
from hier_losses.probabilities import extended_level

LOWEST, HIGHEST = 1e-2, 1e2
_HALVINGS = 60


def fit_temperatures(logits: Float[Tensor, "batch nodes"], target: Tensor, tax: Taxonomy) -> Float[Tensor, " levels"]:
    """The temperature of each level that minimises the cross-entropy of the level's softmax on held-out pictures.

    The cross-entropy is convex in beta = 1/T with the slope mean(E_p[z] - z_y); its zero is found by bisection.

    Args:
        logits: scores of all nodes on pictures that were not trained on.
        target: (batch,) node ids; a partial label counts on the levels down to its own.
        tax: the taxonomy.

    Returns:
        One temperature a level, top first, in [0.01, 100]; 1 where no picture has a label.

    Raises:
        ValueError: if there is no picture, logits and target differ in number, or target holds no node ids.
    """
    if logits.ndim != 2 or logits.shape[1] != tax.num_nodes:
        raise ValueError(f"logits must have a shape (batch, {tax.num_nodes}), got {tuple(logits.shape)}")
    _check_ids("target", target, tax.num_nodes)
    if len(logits) == 0 or len(logits) != len(target):
        raise ValueError(
            f"logits and target must hold the same number of pictures, at least 1, got {len(logits)} and {len(target)}"
        )
    logits, tax, target = logits.detach().double(), tax.to(logits.device), target.to(logits.device)
    paths = tax.paths[target]
    paths = torch.where((tax.leaf_index[target] >= 0)[:, None], extend_paths(paths, tax), paths)
    found = []
    for level in range(tax.num_levels):
        known = paths[:, level] >= 0
        classes = extended_level(tax, level + 1)
        scores = logits[known].index_select(1, classes)
        column = torch.searchsorted(classes, paths[known, level])
        found.append(fit_temperature(scores, column))
    return torch.tensor(found)


def _check_ids(name: str, ids: Tensor, num: int) -> None:
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must hold one integer for each picture, got {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num):
        raise ValueError(f"{name} must lie in [0, {num}), got {int(ids.min())}..{int(ids.max())}")


def guarded(temperatures: Float[Tensor, " levels"]) -> Float[Tensor, " levels"] | None:
    """The temperatures, with 1 for a level whose search hit its bound; None if all did, which is not calibrated.

    Pictures that are all right, or scores that say nothing, have no best temperature.

    >>> guarded(torch.tensor([0.01, 2.0])), guarded(torch.tensor([100.0]))
    (tensor([1., 2.]), None)
    """
    inside = (temperatures > LOWEST * 1.01) & (temperatures < HIGHEST * 0.99)
    return torch.where(inside, temperatures, 1.0) if inside.any() else None


def fit_temperature(scores: Float[Tensor, "batch classes"], column: Tensor) -> float:
    """The temperature that minimises the cross-entropy of one softmax on held-out pictures.

    Args:
        scores: logits or log-probabilities; -inf rules a class out.
        column: (batch,) the true classes; a picture whose class is ruled out does not count.

    Returns:
        A number in [0.01, 100]; 1 where no picture counts.

    Raises:
        ValueError: if scores are no matrix, or column does not hold one class for each row.
    """
    if scores.ndim != 2 or column.shape != scores.shape[:1]:
        raise ValueError(
            f"scores (batch, classes) and column (batch,) must agree, got {tuple(scores.shape)} and {tuple(column.shape)}"
        )
    _check_ids("column", column, scores.shape[1])
    scores = scores.detach().double()
    possible = scores.gather(1, column[:, None]).squeeze(1) > -torch.inf
    # The lowest number has no mass either, and times 0 it is 0.
    scores, column = scores[possible].clamp(min=-1e300), column[possible]
    if not len(column):
        return 1.0
    own = scores.gather(1, column[:, None]).squeeze(1)

    def slope(beta: float) -> float:
        return float(((scores * (beta * scores).softmax(1)).sum(1) - own).mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    if slope(low) >= 0:
        return HIGHEST
    if slope(high) <= 0:
        return LOWEST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low * high) ** -0.5


def fit_sigmoid(scores: Float[Tensor, "batch nodes"], multi_hot: Tensor) -> tuple[float, float]:
    """Slope a > 0 and offset b that minimise the binary cross-entropy of sigmoid(a x + b) on held-out pictures.

    Args:
        scores: one score per label, after the max constraint if there is one.
        multi_hot: zeros and ones of the same shape.

    Returns:
        (a, b), the same for all labels, so that a parent's probability stays at or above its child's.

    Raises:
        ValueError: if the shapes differ or nothing is given.
    """
    if scores.shape != multi_hot.shape or scores.numel() == 0:
        raise ValueError(
            f"scores and multi_hot must have one shape and not be empty, "
            f"got {tuple(scores.shape)} and {tuple(multi_hot.shape)}"
        )
    x, y = scores.detach().double().flatten(), multi_hot.detach().double().flatten()
    center, width = x.mean(), x.std().clamp(min=1e-12)
    x = (x - center) / width
    log_a, b = torch.zeros((), dtype=torch.double), torch.zeros((), dtype=torch.double)
    log_a, b = log_a.requires_grad_(), b.requires_grad_()
    optimizer = torch.optim.LBFGS([log_a, b], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A weak pull to slope 1 keeps separable labels from driving it to infinity.
        loss = F.binary_cross_entropy_with_logits(log_a.exp() * x + b, y) + 1e-6 * (log_a**2 + b**2)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    a = float(log_a.detach().exp() / width)
    return a, float(b.detach() - a * center)


__all__ = ["fit_sigmoid", "fit_temperature", "fit_temperatures"]
