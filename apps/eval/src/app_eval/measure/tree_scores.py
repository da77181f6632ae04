"""The three scores of taxonomic open-set classification, picture by picture.

Reference: Wu, Ho, Vasconcelos, 2024, "ProTeCt" (arXiv 2306.02240).
"""

import numpy as np
import torch
from torch import Tensor

from hier_losses import Taxonomy
from hier_losses.metrics import logit_scores
from hier_losses.treecuts import TreeCuts

SCORES = ("la", "hca", "mta")
TITLES = {"la": "LA", "hca": "HCA", "mta": "MTA"}


def tree_scores(logits: Tensor, target: np.ndarray, tax: Taxonomy, cuts: TreeCuts) -> dict[str, np.ndarray]:
    """Leaf accuracy, hierarchical consistent accuracy (1 or 0) and share of right cuts of each picture.

    Args:
        logits: scores of all nodes (n, N).
        target: true leaf of each picture, a node id (n,).
        tax: the taxonomy.
        cuts: the cuts of mean tree-cut accuracy.

    Returns:
        float64 (n,) for each of `SCORES`.
    """
    truth = torch.from_numpy(np.asarray(target))
    leaf = tax.leaf[logits[:, tax.leaf].argmax(1)] == truth
    scores = logit_scores(logits, truth, tax, cuts)
    found = {"la": leaf.double(), **{name: score.numerator / score.denominator for name, score in scores.items()}}
    return {name: found[name].numpy() for name in SCORES}
