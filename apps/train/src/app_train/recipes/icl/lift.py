"""Train the lift of a pool of demonstrations into hyperbolic space: seconds, for `hier select` and the studies."""

import numpy as np
import torch
from torch import Tensor

from app_data.store.errors import DataError
from app_train.core.config import StageConfig
from app_train.core.fit import fit
from app_train.core.schedule import Stage, Step
from hyper_icl import HyperbolicLift, anchor_loss


def train_lift(
    features: Tensor,
    codes: Tensor,
    *,
    out_dim: int = 64,
    c: float = 1.0,
    tau: float = 0.1,
    steps: int = 150,
    batch: int = 384,
    seed: int = 0,
) -> HyperbolicLift:
    """Train a lift by the anchor loss, items of equal code being positives of one another.

    Args:
        features: Rows of features.
        codes: Their classes (n,); classes of one item only take part as negatives. Of several columns (n, levels), such as the
            levels of a taxonomy, each gives a loss, and the mean is trained.
        out_dim: Width of the tangent vectors.
        c: Curvature.
        tau: Temperature of the loss.
        steps: Optimizer steps.
        batch: Items a step.
        seed: Seed of weights and batches.

    Raises:
        DataError: No two items share a class.
    """
    codes = codes.reshape(len(codes), -1)
    if all(len(column.unique()) == len(column) for column in codes.mT):
        raise DataError("no two items share an answer: a lift cannot be trained on them")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lift = HyperbolicLift(features.shape[1], out_dim, c)

    def forward(wrapped: HyperbolicLift, step: Step, _: np.ndarray):
        rows = torch.randperm(len(features), generator=generator)[:batch]
        same = codes[rows, None] == codes[rows]
        if int(same.sum()) == codes.shape[1] * len(rows):
            # A random batch of many small classes may hold no pair; add the partners of its first half.
            partner = (codes[rows[: len(rows) // 2], None] == codes).any(-1).float()
            partner[torch.arange(len(partner)), rows[: len(rows) // 2]] = 0
            has = partner.sum(-1) > 0
            if not has.any():
                return sum(p.sum() for p in wrapped.parameters()) * 0, {}
            drawn = torch.multinomial(partner[has], 1, generator=generator).squeeze(-1)
            rows = torch.cat((rows[: len(rows) // 2], drawn)).unique()
            same = codes[rows, None] == codes[rows]
        tangent, paired = wrapped(features[rows]), [one for one in same.unbind(-1) if int(one.sum()) > len(rows)]
        return torch.stack([anchor_loss(tangent, one, c, tau) for one in paired]).mean(), {}

    stage = Stage(
        "lift", StageConfig(epochs=1, lr=5e-3, batch_size=1), steps, forward, clip_grad=None, rate=lambda step: 1.0,
        optimizer=lambda parameters: torch.optim.Adam(parameters.values(), 5e-3),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        fit(lift, [stage], seed=seed)
    return lift
