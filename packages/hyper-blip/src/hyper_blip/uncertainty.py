"""Is the radius an uncertainty? Rank correlations, calibration, risk-coverage, always beside controls.

References: Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers", ICLR 2019 (AURC);
Upadhyay et al., "ProbVLM", ICCV 2023 (bins of uncertainty against recall, -S R^2); Mandica et al., arXiv:2408.05097 (a small
radius as a sign of uncertainty). Kendall's tau-b: Kendall, 1945.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyper_blip.projection import ball_radius

Numbers = Tensor | Sequence[float]


def _vector(name: str, values: Numbers, like: Tensor | None = None) -> Tensor:
    found = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().flatten()
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if like is not None and len(found) != len(like):
        raise ValueError(f"{name} must have {len(like)} values, got {len(found)}")
    return found


def average_ranks(values: Numbers) -> Tensor:
    """Ranks from 1, equal values sharing their mean rank.

    >>> average_ranks([3.0, 1.0, 3.0]).tolist()
    [2.5, 1.0, 2.5]
    """
    x = _vector("values", values)
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1).double() / 2)[inverse]


def spearman(x: Numbers, y: Numbers) -> float:
    """Spearman's rank correlation with average ranks for ties.

    Args:
        x: n numbers.
        y: n numbers.

    Returns:
        In [-1, 1]; NaN, with a warning, if an input is constant.

    Raises:
        ValueError: lengths differ, or a value is not finite.

    >>> spearman([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])
    1.0
    """
    a = _vector("x", x)
    b = _vector("y", y, a)
    a, b = average_ranks(a), average_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    if scale == 0:
        warnings.warn("a constant input has no rank correlation", stacklevel=2)
        return math.nan
    return float((a * b).sum()) / scale


def kendall(x: Numbers, y: Numbers) -> float:
    """Kendall's tau-b.

    (concordant - discordant) / sqrt((n0 - n1) (n0 - n2)), n0 all pairs, n1 and n2 those tied in x and y.

    Args:
        x: n numbers.
        y: n numbers.

    Returns:
        In [-1, 1]; NaN, with a warning, if an input is constant. Takes O(n^2) time and O(n) memory.

    Raises:
        ValueError: lengths differ, or a value is not finite.

    >>> kendall([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    0.3333333333333333
    """
    a = _vector("x", x)
    b = _vector("y", y, a)
    signed = untied_a = untied_b = 0
    for i in range(len(a) - 1):
        da, db = (a[i + 1 :] - a[i]).sign(), (b[i + 1 :] - b[i]).sign()
        signed += int((da * db).sum())
        untied_a += int(da.count_nonzero())
        untied_b += int(db.count_nonzero())
    if untied_a == 0 or untied_b == 0:
        warnings.warn("a constant input has no rank correlation", stacklevel=2)
        return math.nan
    return signed / math.sqrt(untied_a * untied_b)


def aurc(confidence: Numbers, error: Numbers) -> float:
    """Area under the risk-coverage curve: the mean over k of the error rate of the k most confident items.

    Args:
        confidence: higher is surer; equal values keep their order.
        error: 1 where the item is wrong, 0 where it is right.

    Returns:
        In [0, 1]; lower is better.

    Raises:
        ValueError: no item, lengths that differ, or a value that is not finite.

    >>> round(aurc([4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 1.0, 0.0]), 7)
    0.1458333
    """
    c = _vector("confidence", confidence)
    e = _vector("error", error, c)
    if not len(c):
        raise ValueError("confidence must not be empty")
    order = torch.argsort(c, descending=True, stable=True)
    return float((e[order].cumsum(0) / torch.arange(1, len(e) + 1)).mean())


def error_auroc(uncertainty: Numbers, error: Numbers) -> float:
    """Probability that a wrong item is more uncertain than a right one; ties count one half.

    Args:
        uncertainty: higher is less sure.
        error: 1 where the item is wrong, 0 where it is right.

    Returns:
        In [0, 1], 0.5 for noise; NaN if no item or every item is wrong.

    Raises:
        ValueError: lengths that differ, or a value that is not finite.
    """
    u = _vector("uncertainty", uncertainty)
    wrong = _vector("error", error, u) > 0.5
    bad, good = int(wrong.sum()), int((~wrong).sum())
    if not bad or not good:
        return math.nan
    return (float(average_ranks(u)[wrong].sum()) - bad * (bad + 1) / 2) / (bad * good)


def calibration_bins(uncertainty: Numbers, correct: Numbers, num_bins: int = 10) -> dict[str, Any]:
    """Recall in bins of rising uncertainty, equally filled.

    Args:
        uncertainty: higher is less sure.
        correct: 1 where the item is right, 0 where it is wrong.
        num_bins: at most this many bins, at least 1.

    Returns:
        `bins` (count, mean uncertainty, recall of each), `spearman` S of the bins' uncertainty with their recall, `r2` of a
        straight line through them, and `minus_s_r2` = -S R^2: 1 if recall falls in a straight line.

    Raises:
        ValueError: num_bins below 1, lengths that differ, or a value that is not finite.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
    u = _vector("uncertainty", uncertainty)
    right = _vector("correct", correct, u)
    order = torch.argsort(u, stable=True)
    parts = [part for part in order.tensor_split(min(num_bins, max(1, len(u)))) if len(part)]
    bins = [{"n": len(p), "uncertainty": float(u[p].mean()), "recall": float(right[p].mean())} for p in parts]
    x = torch.tensor([b["uncertainty"] for b in bins], dtype=torch.float64)
    y = torch.tensor([b["recall"] for b in bins], dtype=torch.float64)
    with warnings.catch_warnings():
        # Bins of equal recall are a result, not a mistake of the caller.
        warnings.simplefilter("ignore")
        s = spearman(x, y) if len(bins) > 1 else math.nan
    dx, dy = x - x.mean(), y - y.mean()
    spread = float(dx.square().sum() * dy.square().sum())
    r2 = float((dx * dy).sum()) ** 2 / spread if spread > 0 else math.nan
    return {"bins": bins, "spearman": s, "r2": r2, "minus_s_r2": -s * r2}


def radius_report(
    radius: Numbers,
    correct: Numbers,
    covariates: Mapping[str, Numbers] | None = None,
    controls: Mapping[str, Numbers] | None = None,
    *,
    text_radius: Numbers | None = None,
    paired_image_radius: Numbers | None = None,
    c: float = 1.0,
    num_bins: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is asked of a radius, for the radius and for its controls, ready for JSON.

    The uncertainty of the radius is -rho. A random control is always added.

    Args:
        radius: distance to the origin of each item.
        correct: 1 where the item's first answer is right (R@1), 0 where it is wrong.
        covariates: what the radius may follow, for each item: caption length, number of objects, crop fraction, blur.
        controls: other confidences for each item, higher is surer: the Euclidean norm, the largest softmax probability.
        text_radius: radius of the text of each pair.
        paired_image_radius: radius of the picture of each pair; `radius` if None.
        c: curvature parameter, for the radius on the ball.
        num_bins: of the calibration.
        seed: of the random control.

    Returns:
        `n`; `radius` (mean, std, and mean on the ball); `scores`: for "radius" and each control the calibration bins, `aurc` and
        `error_auroc`; `correlations`: Spearman and Kendall with every covariate; `text_below_image`, the share of pairs whose
        text lies nearer to the origin.

    Raises:
        ValueError: lengths that differ, or values that are not finite.
    """
    rho = _vector("radius", radius)
    right = _vector("correct", correct, rho)
    confidences = {"radius": rho}
    for name, values in (controls or {}).items():
        confidences[name] = _vector(f"controls[{name!r}]", values, rho)
    generator = torch.Generator().manual_seed(seed)
    confidences["random"] = torch.rand(len(rho), generator=generator, dtype=torch.float64)
    scores, correlations = {}, {}
    for name, confidence in confidences.items():
        scores[name] = {
            **calibration_bins(-confidence, right, num_bins),
            "aurc": aurc(confidence, 1 - right),
            "error_auroc": error_auroc(-confidence, 1 - right),
        }
        correlations[name] = {
            covariate: {"spearman": spearman(confidence, values), "kendall": kendall(confidence, values)}
            for covariate, values in ((k, _vector(f"covariates[{k!r}]", v, rho)) for k, v in (covariates or {}).items())
        }
    found = {
        "format": 1,
        "n": len(rho),
        "radius": {
            "mean": float(rho.mean()), "std": float(rho.std(correction=0)), "ball_mean": float(ball_radius(rho, c).mean()),
        },
        "scores": scores,
        "correlations": correlations,
    }  # fmt: skip
    if text_radius is not None:
        text = _vector("text_radius", text_radius)
        image = rho if paired_image_radius is None else _vector("paired_image_radius", paired_image_radius)
        found["text_below_image"] = float((text < _vector("paired_image_radius", image, text)).double().mean())
    return found
