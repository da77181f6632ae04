"""The losses of stage 1 as functions of features and logits.

References: Li et al., "BLIP-2", ICML 2023, section 3.2 (ITC, ITM with hard negatives, image-grounded text generation);
Mandica et al., arXiv:2408.05097 (hyperbolic ITC); Desai et al., ICML 2023, eq. 13 (entailment cones).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hyper_blip.config import HyperbolicConfig
from hyper_blip.gather import gather_rows, world
from hyper_blip.negatives import positives
from hyper_blip.projection import DEPTH
from hyper_blip.similarity import aggregate_queries, matched_similarity, pairwise_similarity, tangent_midpoint, unit
from hyper_geom import cones, distance_logits, info_nce, lorentz

IGNORED = -100


def image_text_contrastive_loss(
    image: Float[Tensor, "batch queries dim"] | Float[Tensor, "batch dim"],
    text: Float[Tensor, "texts text_dim"],
    config: HyperbolicConfig,
    tau: Tensor | float,
    image_ids: Int[Tensor, " ids"] | None = None,
    text_ids: Int[Tensor, " keys"] | Int[Tensor, "keys tokens"] | None = None,
    *,
    c: Tensor | float | None = None,
    mix: float | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch all"], Float[Tensor, "batch all"]]:
    """Cross-entropy of each picture over all texts and of each text over all pictures, with soft targets.

    logits = sim / tau; targets (1-s) E / rowsum(E) + s / N with E_ij = 1 for a pair, for equal image ids and for equal
    text ids; the mean of both directions. Over W ranks N = W * batch. The mean over ranks of the loss, and with
    `config.gather_grad` of its gradients, is that of one process with all rows.

    Args:
        image: tangent vectors at the origin: of all queries, or of the one that was selected.
        text: tangent vectors at the origin.
        config: similarity, aggregation of queries, smoothing, gathering.
        tau: temperature.
        image_ids: equal for pictures that show the same thing.
        text_ids: a key for each text, or its token ids (0 is padding).
        c: curvature parameter; `config.c` if None.
        mix: share of the distance in the mode "mix", in [0, 1].

    Returns:
        The loss, logits of pictures to texts and logits of texts to pictures, `(batch all)`.

    Raises:
        ValueError: shapes that do not fit, tau <= 0, or the mode "mix" without `mix`.

    >>> eye = torch.eye(4, dtype=torch.float64)
    >>> image_text_contrastive_loss(eye, eye, HyperbolicConfig.euclidean(), 0.07)[0]
    tensor(1.0714, dtype=torch.float64)
    """
    if image.shape[0] != text.shape[0]:
        raise ValueError(f"image and text must hold as many rows, got {image.shape[0]} and {text.shape[0]}")
    if not isinstance(tau, Tensor) and not tau > 0:  # a tensor is not read back from its device
        raise ValueError(f"tau must be > 0, got {tau}")
    if config.similarity == "mix" and mix is None:
        raise ValueError("similarity 'mix' needs the share `mix` of the distance, in [0, 1], got None")
    c = config.c if c is None else c
    if image.ndim == 3 and config.query_agg == "midpoint":
        image = tangent_midpoint(image, c, config.manifold)
    image_all, text_all = (gather_rows(x, config.gather_grad) for x in (image, text))
    positive = positives(len(text), image_ids, text_ids, text.device)

    def one(mode: str) -> tuple[Tensor, Tensor, Tensor]:
        i2t = _scores(image, text_all, mode, config, c, image_side=True) / tau
        # One process: the same matrix, read the other way.
        t2i = i2t.mT if world()[1] == 1 else _scores(image_all, text, mode, config, c, image_side=False) / tau
        rows, columns = (info_nce(x, positive, label_smoothing=config.label_smoothing) for x in (i2t, t2i))
        return 0.5 * (rows + columns), i2t, t2i

    if config.similarity != "mix":
        return one(config.similarity)
    if mix <= 0:
        return one("cosine")
    if mix >= 1:
        return one("distance")
    return tuple((1 - mix) * a + mix * b for a, b in zip(one("cosine"), one("distance"), strict=True))


def _scores(
    image: Tensor, text: Tensor, mode: str, config: HyperbolicConfig, c: Tensor | float, image_side: bool
) -> Tensor:
    """Similarities (batch, all) of this rank's pictures to all texts, or of its texts to all pictures."""
    if mode == "distance":
        if image.ndim == 3 and config.query_agg == "fixed":
            image = image[:, 0]
        # The entries of true pairs without the noise of the matrix product: these distances are driven to 0.
        labels = torch.full((image.shape[0],), -1, device=image.device)
        num = min(image.shape[0], text.shape[0])
        start = world()[0] * num
        mine = torch.arange(num, device=image.device)
        labels = mine + start if image_side else labels.index_copy(0, mine + start, mine)
        with torch.autocast(image.device.type, enabled=False):
            found = distance_logits(
                image, text, c=c, labels=labels, queries="mean" if config.query_agg == "mean" else "max",
                model=config.manifold, inputs="tangent0",
            )  # fmt: skip
        return found if image_side else found.mT
    found = pairwise_similarity(image, text, mode, c, manifold=config.manifold)
    if mode == "angle":
        found = _exact_pairs(found, image, text, mode, config, c, image_side)
    if found.ndim == 3:
        found = aggregate_queries(found, config.query_agg)
    return found if image_side else found.mT


def _exact_pairs(
    found: Tensor, image: Tensor, text: Tensor, mode: str, config: HyperbolicConfig, c: Tensor | float, image_side: bool
) -> Tensor:
    """The entries of true pairs once more, without the noise of the matrix product: these distances are driven to 0."""
    num = min(image.shape[0], text.shape[0])
    start = world()[0] * num
    mine = slice(start, start + num)
    a, b = (image, text[mine]) if image_side else (image[mine], text)
    if a.ndim == 3:
        b = b.unsqueeze(1).expand_as(a)
    exact = matched_similarity(a, b, mode, c, manifold=config.manifold)
    return torch.diagonal_scatter(
        found, exact.mT if exact.ndim == 2 else exact, start if image_side else -start, 0, found.ndim - 1
    )


def _check_labels(labels: Tensor, num: int) -> None:
    """ValueError unless the labels are integers that name classes, or `IGNORED`; on a GPU the values are the kernel's to check."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num))]
    if wrong.numel():
        raise ValueError(f"labels must lie in [0, {num}) or be {IGNORED}, got {int(wrong[0])}")


def image_text_matching_loss(
    logits: Float[Tensor, "rows 2"], labels: Int[Tensor, " rows"], weights: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, ""]:
    """Cross-entropy of "these belong together" (1) against "they do not" (0).

    Predicting the prior of one in three costs H(1/3) = 0.6365.

    Args:
        logits: two for each pair.
        labels: 0 or 1.
        weights: of the pairs; all alike if None.

    Returns:
        The weighted mean, at least 0.

    Raises:
        ValueError: shapes that do not agree, or labels that are not 0 or 1.
    """
    if logits.ndim != 2 or logits.shape[1] != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits (rows, 2) and labels (rows,) must agree, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights must have shape {tuple(labels.shape)}, got {tuple(weights.shape)}")
    _check_labels(labels, 2)
    if weights is None:
        return F.cross_entropy(logits.float(), labels)
    return (weights * F.cross_entropy(logits.float(), labels, reduction="none")).sum() / weights.sum()


def text_generation_loss(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int[Tensor, "batch tokens"], label_smoothing: float = 0.1
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token, smoothed.

    The logits of position t are compared with the label of position t+1; labels of -100 do not count.

    Args:
        logits: at every position.
        labels: the token at every position, -100 at padding.
        label_smoothing: share of the target spread over the vocabulary.

    Returns:
        The mean over counted tokens.

    Raises:
        ValueError: shapes that do not agree, or labels outside the vocabulary, or a smoothing outside [0, 1].
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits (batch, tokens, vocabulary) and labels (batch, tokens) must agree, got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    _check_labels(labels, logits.shape[2])
    flat = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing)


def entailment_loss(
    apex: Float[Tensor, "*#batch dim"],
    point: Float[Tensor, "*#batch dim"],
    c: Tensor | float = 1.0,
    *,
    manifold: str = "poincare",
    min_radius: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean angle by which points lie outside the cones of their apexes.

    Args:
        apex: tangent vectors at the origin of the more general things (a text, a pruned caption).
        point: tangent vectors of the more specific ones (its picture, the whole caption).
        c: curvature parameter.
        manifold: the model whose tangent vectors these are.
        min_radius: K of the half aperture.

    Returns:
        In [0, pi]; 0 if every point lies in its cone.

    Raises:
        ValueError: an unknown manifold, or shapes that do not broadcast.
    """
    if manifold not in DEPTH:
        raise ValueError(f"manifold must be one of {tuple(DEPTH)}, got {manifold!r}")
    with torch.autocast(apex.device.type, enabled=False):
        a, b = (lorentz.exp_map0(DEPTH[manifold] * v, c=c) for v in (apex, point))
        return cones.entailment_loss(a, b, c=c, min_radius=min_radius)


def query_diversity_penalty(v: Float[Tensor, "batch queries dim"]) -> Float[Tensor, ""]:
    """Mean squared cosine between different queries of one picture.

    Args:
        v: tangent vectors (or features) of the queries.

    Returns:
        In [0, 1]; 0 for a single query.

    Raises:
        ValueError: v that is not (batch, queries, dim).
    """
    if v.ndim != 3:
        raise ValueError(f"v must have shape (batch, queries, dim), got {tuple(v.shape)}")
    queries = v.shape[1]
    if queries < 2:
        return v.sum() * 0.0
    with torch.autocast(v.device.type, enabled=False):
        directions = unit(v)
        square = (directions @ directions.mT).square()
        off = square.sum((1, 2)) - square.diagonal(dim1=1, dim2=2).sum(1)
        return off.mean() / (queries * (queries - 1))


class MixSchedule:
    """Share of the distance in the mixed loss over training.

    lambda = clamp((f - f0) / (f1 - f0), 0, 1), f the fraction of training that is done.

    Args:
        f0: where the distance sets in.
        f1: where it is alone.

    Raises:
        ValueError: not 0 <= f0 < f1 <= 1.

    >>> MixSchedule(0.25, 0.75)(0.5)
    0.5
    """

    def __init__(self, f0: float = 50 / 600, f1: float = 100 / 600) -> None:
        if not 0 <= f0 < f1 <= 1:
            raise ValueError(f"f0 and f1 must satisfy 0 <= f0 < f1 <= 1, got {f0} and {f1}")
        self.f0, self.f1 = f0, f1

    def __call__(self, fraction: float | int) -> float:
        """The share at a fraction of training."""
        return min(1.0, max(0.0, (fraction - self.f0) / (self.f1 - self.f0)))
