"""Score a row of an experiment picture by picture, so that means, intervals and paired differences come from one table.

Every score is a ratio of two sums over pictures (for a mean the denominators are 1), which a bootstrap over pictures
(Efron, 1979) resamples as pairs. The definitions are those of `hier_losses.metrics`; a test holds the two together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app_eval.measure.interval import Pair
from hier_losses import Taxonomy, decoding
from hier_losses.functional import lca_height
from hier_losses.path_ops import extend_paths
from hier_losses.treecuts import TreeCuts

DECODERS: dict[str, Callable[[Tensor, Taxonomy], Tensor]] = {
    "level_argmax": decoding.level_argmax,
    "bottom_up": decoding.bottom_up,
    "joint_path": decoding.joint_path,
}
# Scores of the decoded path, then scores of the logits, which do not depend on a decoder.
PATH_SCORES = ("leaf", "fpa", "tice", "severity", "ahd")
LOGIT_SCORES = ("hca", "mta")
LOWER_IS_BETTER = ("tice", "severity", "ahd")
TITLES = {
    "leaf": "leaf acc.", "fpa": "FPA", "tice": "TICE", "hca": "HCA", "mta": "MTA", "severity": "severity", "ahd": "AHD@1",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one model did on n pictures.

    Attributes:
        target: true leaf (node id) of each picture, int64 (n,).
        paths: decoded extended paths by decoder, int64 (n, D).
        hca, mta: 1 or 0, and share of cuts, for each picture, float64 (n,).
        confidence: probability of the leaf decoded bottom-up, float64 (n,).
    """

    target: np.ndarray
    paths: dict[str, np.ndarray]
    hca: np.ndarray
    mta: np.ndarray
    confidence: np.ndarray


def outcome(logits: Tensor, target: np.ndarray, tax: Taxonomy, cuts: TreeCuts) -> Outcome:
    """Decode logits (n, N) in every way and score them against the targets."""
    truth = torch.from_numpy(np.asarray(target))
    paths = {name: extend_paths(decode(logits, tax), tax).numpy() for name, decode in DECODERS.items()}
    return Outcome(
        target=np.asarray(target),
        paths=paths,
        hca=_consistent(logits, truth, tax),
        mta=_over_cuts(logits, truth, cuts),
        confidence=logits[:, tax.leaf].softmax(-1).amax(-1).double().numpy(),
    )


def _consistent(logits: Tensor, target: Tensor, tax: Taxonomy) -> np.ndarray:
    """HCA of each picture: every choice among siblings on the way is right where the greedy descent is the true path."""
    best_leaf = tax.leaf[logits[:, tax.leaf].argmax(1)] == target
    return (best_leaf & (decoding.top_down(logits, tax) == tax.paths[target]).all(1)).double().numpy()


def _over_cuts(logits: Tensor, target: Tensor, cuts: TreeCuts) -> np.ndarray:
    """Share of the cuts whose best member lies at or above the true leaf, for each picture."""
    right = [logits[:, cut.nodes].argmax(1) == cut.member[target] for cut in cuts]
    return torch.stack(right).double().mean(0).numpy()


def per_picture(result: Outcome, tax: Taxonomy, decoder: str) -> dict[str, Pair]:
    """Numerator and denominator of every score for each picture, float64 (n,) each."""
    predicted = torch.from_numpy(result.paths[decoder])
    truth = extend_paths(tax.paths[torch.from_numpy(result.target)], tax)
    leaf = predicted[:, -1] == truth[:, -1]
    distance = torch.where(leaf, 0, lca_height(predicted[:, -1], truth[:, -1], tax)).double().numpy()
    above, below = predicted[:, :-1], predicted[:, 1:]
    broken = (above != tax.parent[below]) & (above != below)
    inconsistent = broken.any(1).double().numpy()
    one = np.ones(len(predicted))
    scores = {
        "leaf": (leaf.double().numpy(), one),
        "fpa": ((predicted == truth).all(-1).double().numpy(), one),
        "tice": (inconsistent, one),
        "severity": (distance, (~leaf).double().numpy()),
        "ahd": (distance, one),
        "hca": (result.hca, one),
        "mta": (result.mta, one),
    }
    for level in range(tax.num_levels):
        scores[f"level_{level + 1}"] = ((predicted[:, level] == truth[:, level]).double().numpy(), one)
    return scores
