"""Score a row of an experiment picture by picture, so that means, intervals and paired differences come from one table.

Every score is a ratio of two sums over pictures (for a mean the denominators are 1), which a bootstrap over pictures
(Efron, 1979) resamples as pairs. The definitions are those of `hier_losses.metrics`; a test holds the two together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app_data.store.errors import DataError
from app_eval.measure.interval import Pair
from hier_losses import Taxonomy, decoding
from hier_losses.metrics import logit_scores, path_scores
from hier_losses.path_ops import extend_paths
from hier_losses.treecuts import TreeCuts

DECODERS: dict[str, Callable[[Tensor, Taxonomy], Tensor]] = {
    "level_argmax": decoding.level_argmax,
    "bottom_up": decoding.bottom_up,
    "joint_path": decoding.joint_path,
}


@dataclass(frozen=True)
class Score:
    """One column of every results table.

    Attributes:
        title: over the column.
        of: its name in `hier_losses.metrics.path_scores`; "" for one of the logits, which no decoder changes.
        lower: whether lower is better.
    """

    title: str
    of: str = ""
    lower: bool = False


SCORES: dict[str, Score] = {
    "leaf": Score("leaf acc.", "leaf_accuracy"),
    "fpa": Score("FPA", "full_path_accuracy"),
    "tice": Score("TICE", "tice", lower=True),
    "severity": Score("severity", "mistake_severity", lower=True),
    "ahd": Score("AHD@1", "average_hierarchical_distance", lower=True),
    "hca": Score("HCA"),
    "mta": Score("MTA"),
}


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


def outcome(logits: Tensor, target: np.ndarray, tax: Taxonomy, cuts: TreeCuts, chosen: str | None = None) -> Outcome:
    """Decode logits (n, N) in every way and score them against the targets.

    Args:
        logits: scores of all nodes.
        target: true leaves, node ids (n,).
        tax: the taxonomy.
        cuts: the cuts of MTA.
        chosen: a further decoder, kept under the name "chosen".

    Raises:
        DataError: if a score is not finite.
    """
    bad = int((~torch.isfinite(logits)).any(1).sum())
    if bad:
        raise DataError(
            f"the scores of {bad} of {len(logits)} pictures are not finite: the model's weights are damaged"
        )
    truth = torch.from_numpy(np.asarray(target))
    decoders = DECODERS if chosen is None else {**DECODERS, "chosen": getattr(decoding, chosen)}
    paths = {name: extend_paths(decode(logits, tax), tax).numpy() for name, decode in decoders.items()}
    scores = {
        name: score.numerator / score.denominator for name, score in logit_scores(logits, truth, tax, cuts).items()
    }
    return Outcome(
        target=np.asarray(target),
        paths=paths,
        hca=scores["hca"].numpy(),
        mta=scores["mta"].numpy(),
        confidence=logits[:, tax.leaf].softmax(-1).amax(-1).double().numpy(),
    )


def per_picture(result: Outcome, tax: Taxonomy, decoder: str) -> dict[str, Pair]:
    """Numerator and denominator of every score for each picture, float64 (n,) each."""
    found = path_scores(torch.from_numpy(result.paths[decoder]), torch.from_numpy(result.target), tax)
    scores = {name: tuple(part.numpy() for part in found[score.of]) for name, score in SCORES.items() if score.of}
    one = np.ones(len(result.target))
    scores |= {"hca": (result.hca, one), "mta": (result.mta, one)}
    top, bottom = (part.numpy() for part in found["level_accuracy"])
    return scores | {f"level_{level + 1}": (top[:, level], bottom[:, level]) for level in range(tax.num_levels)}
