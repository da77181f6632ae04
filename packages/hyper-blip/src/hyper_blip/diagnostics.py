"""What to watch while training: radii, clipping, which queries win, how alike the queries are.

References: Mandica et al., arXiv:2408.05097 (RQS against one query winning always); the numbers here are ours.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hyper_blip.projection import HyperbolicFeatures
from hyper_blip.similarity import matched_similarity, unit


@torch.no_grad()
def stage1_diagnostics(
    model: torch.nn.Module, image: HyperbolicFeatures, text: HyperbolicFeatures
) -> dict[str, Tensor]:
    """Numbers of one batch, without gradient.

    Args:
        model: a `HyperBlip2ForPretraining`.
        image: features of all queries.
        text: features of the captions.

    Returns:
        `radius_image_mean`, `radius_image_std`, `radius_text_mean`, `radius_text_std`; `clipped_image`, `clipped_text` (share
        of clipped vectors); `c`; `tau`; `query_entropy`, the entropy of which query is nearest to its caption, divided by
        ln Q (1: all win equally often, 0: one always wins); `query_cosine`, the mean cosine between different queries of a
        picture; `non_finite_steps`.
    """
    hyper = model.config.hyperbolic
    c, queries = model.curvature(), image.tangent.shape[1]
    found = {}
    for name, features in (("image", image), ("text", text)):
        found[f"radius_{name}_mean"] = features.radius.mean()
        found[f"radius_{name}_std"] = features.radius.std(correction=0)
        found[f"clipped_{name}"] = features.clipped.float().mean()
    own = text.tangent.unsqueeze(1).expand_as(image.tangent)
    winners = matched_similarity(image.tangent, own, hyper.eval_similarity, c, manifold=hyper.manifold).argmax(1)
    # Not bincount, whose result has a size that torch.compile cannot know.
    share = F.one_hot(winners, queries).sum(0).float() / max(1, len(winners))
    found["query_entropy"] = torch.special.entr(share).sum() / math.log(max(queries, 2))
    directions = unit(image.tangent)
    cosines = directions @ directions.mT
    off = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    found["query_cosine"] = off.mean() / max(1, queries * (queries - 1))
    found["c"], found["tau"] = c, model.temperature()
    found["non_finite_steps"] = torch.tensor(float(model.non_finite_steps), device=c.device)
    return found
