"""How alike a picture and a text are, from their tangent vectors at the origin.

The polar form of the distance (Ratcliffe, "Foundations of Hyperbolic Manifolds", 2006, theorem 3.5.3) serves both models:
exp_0 of the ball at v and exp_0 of the Lorentz model at 2v are the same point. A cosine of points after exp_0 equals the
cosine before it, because exp_0 keeps directions: the mode "cosine" is the Euclidean cosine, and is blind to the radius.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_blip.config import MANIFOLDS, check_choice
from hyper_blip.projection import DEPTH, HyperbolicFeatures, safe_norm
from hyper_geom import lorentz, poincare

MODES = ("cosine", "distance", "inner", "angle")
AGGREGATIONS = ("max", "mean", "fixed", "random")


def pairwise_similarity(
    image: Float[Tensor, "images queries dim"] | Float[Tensor, "images dim"],
    text: Float[Tensor, "texts text_dim"],
    mode: str,
    c: Tensor | float = 1.0,
    *,
    manifold: str = "poincare",
) -> Float[Tensor, "images queries texts"] | Float[Tensor, "images texts"]:
    """Similarity of every picture (or every query of every picture) to every text.

    cosine: <v_i, v_t> / (|v_i| |v_t|). distance: -d. inner: <p_i, p_t> of ball points. angle: minus the exterior angle
    between the text as apex and the picture.

    Args:
        image: tangent vectors at the origin.
        text: tangent vectors at the origin.
        mode: "cosine", "distance", "inner" or "angle".
        c: curvature parameter; has no effect on the cosine.
        manifold: the model whose tangent vectors these are.

    Returns:
        Similarities in [-1, 1], (-inf, 0], [-1/c, 1/c] and [-pi, 0] respectively. Distances below about
        3e-4 sinh(radius) are rounding noise in fp32 (see `hyper_geom.lorentz.pairwise_dist`).

    Raises:
        ValueError: unknown mode or manifold, or dimensions that differ.

    >>> a, b = torch.tensor([[0.3, 0.4]], dtype=torch.float64), torch.tensor([[0.6, -0.2]], dtype=torch.float64)
    >>> pairwise_similarity(a, b, "distance")
    tensor([[-1.4967]], dtype=torch.float64)
    """
    check_choice("mode", mode, MODES)
    check_choice("manifold", manifold, MANIFOLDS)
    if image.shape[-1] != text.shape[-1]:
        raise ValueError(f"image and text must have one dimension, got {image.shape[-1]} and {text.shape[-1]}")
    flat = image.reshape(-1, image.shape[-1])
    with torch.autocast(image.device.type, enabled=False):
        if mode == "cosine":
            found = unit(flat) @ unit(text).mT
        elif mode == "inner":
            found = _ball(flat, c, manifold) @ _ball(text, c, manifold).mT
        else:
            a, b = (lorentz.exp_map0(DEPTH[manifold] * v, c=c) for v in (flat, text))
            if mode == "distance":
                found = -lorentz.pairwise_dist(a, b, c=c)
            else:
                found = -lorentz.pairwise_exterior_angle(b, a, c=c).mT
    return found.reshape(*image.shape[:-1], text.shape[0])


def matched_similarity(
    image: Float[Tensor, "batch *queries dim"],
    text: Float[Tensor, "batch *queries dim"],
    mode: str,
    c: Tensor | float = 1.0,
    *,
    manifold: str = "poincare",
) -> Float[Tensor, " batch *queries"]:
    """Similarity of each vector to its partner, to full precision however close the two are; see `pairwise_similarity`."""
    with torch.autocast(image.device.type, enabled=False):
        if mode == "cosine":
            return (unit(image) * unit(text)).sum(-1)
        if mode == "inner":
            return (_ball(image, c, manifold) * _ball(text, c, manifold)).sum(-1)
        if mode == "distance":
            return -(poincare if manifold == "poincare" else lorentz).tangent0_dist(image, text, c=c)
        a, b = (lorentz.exp_map0(DEPTH[manifold] * v, c=c) for v in (image, text))
        return -lorentz.exterior_angle(b, a, c=c)


def unit(v: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Unit vectors v / |v|; 0 with gradient 0 at v = 0."""
    size = safe_norm(v).unsqueeze(-1)
    return v / torch.where(size > 0, size, 1.0)


def _ball(v: Tensor, c: Tensor | float, manifold: str) -> Tensor:
    """exp_0(v) as a ball point, whichever model v belongs to."""
    return poincare.exp_map0(0.5 * DEPTH[manifold] * v, c=c)


def aggregate_queries(
    similarity: Float[Tensor, "images queries texts"],
    how: str,
    *,
    index: int = 0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "images texts"]:
    """One similarity for each picture and text from those of the picture's queries.

    Args:
        similarity: of every query.
        how: "max", "mean", "fixed" (query `index`) or "random" (one query of each picture).
        index: the query of "fixed", in [0, queries).
        generator: source of "random"; the global generator if None.

    Returns:
        Similarities `(images texts)`.

    Raises:
        ValueError: unknown `how`, or an index outside its range.

    >>> aggregate_queries(torch.tensor([[[1.0], [3.0]]]), "mean")
    tensor([[2.]])
    """
    check_choice("how", how, AGGREGATIONS)
    if how == "max":
        return similarity.amax(1)
    if how == "mean":
        return similarity.mean(1)
    images, queries, _ = similarity.shape
    if how == "fixed":
        if not 0 <= index < queries:
            raise ValueError(f"index must lie in [0, {queries}), got {index}")
        return similarity[:, index]
    chosen = torch.randint(queries, (images,), generator=generator).to(similarity.device)
    return similarity[torch.arange(images, device=similarity.device), chosen]


def query_midpoint(
    features: HyperbolicFeatures, c: Tensor | float = 1.0, *, manifold: str = "poincare"
) -> Float[Tensor, "images dim"]:
    """Tangent vector of the hyperbolic centroid of a picture's queries, to be compared with texts.

    The Lorentz centroid (Law et al., ICML 2019, eq. 13) of the points, equally weighted.

    Args:
        features: of all queries, parts `(images queries ...)`.
        c: curvature parameter.
        manifold: the model of the features.

    Returns:
        Tangent vectors at the origin `(images dim)`, of the same model.
    """
    return tangent_midpoint(features.tangent, c, manifold)


def tangent_midpoint(v: Float[Tensor, "images queries dim"], c: Tensor | float, manifold: str) -> Tensor:
    """`query_midpoint` from tangent vectors alone."""
    points = lorentz.exp_map0(DEPTH[manifold] * v, c=c)
    return lorentz.log_map0(lorentz.midpoint(points, c=c), c=c) / DEPTH[manifold]
