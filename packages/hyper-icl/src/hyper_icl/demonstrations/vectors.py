"""A pool of points as vectors for stores that search by inner product: FAISS, Qdrant and others.

The derivation stands in `_bounds.lower_score`. Ask the store for more than k items, and let
`HyperbolicDemoIndex.rescore` choose among them by the exact score.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from hyper_icl._checks import check_positive, check_rows
from hyper_icl.demonstrations import _bounds


def inner_product_vectors(tangent: Float[Tensor, "n d"], c: float = 1.0, mu: float = 0.0) -> Float32[Tensor, "n d1"]:
    """Rows exp(-k mu |w|) (x_s, x_t), k = sqrt(c), whose product with `inner_product_query` grows with the score.

    -log(-2 c product)/k is the score less log(1 + exp(-2 k d))/k, which is at most log(2)/k and falls with the distance d.

    Args:
        tangent: the pool, Lorentz tangent vectors at the origin.
        c: curvature parameter.
        mu: weight of the depth, built into the rows.

    Returns:
        Rows one wider than the pool's.

    Raises:
        ValueError: values are not finite, or too deep for fp32.

    >>> pool = torch.tensor([[0.5, 0.0], [2.0, 0.2], [1.0, 1.0]])
    >>> products = inner_product_query(torch.tensor([[1.0, 0.0]])) @ inner_product_vectors(pool).mT
    >>> products.argmax().item()
    0
    """
    return _single("tangent", _bounds.tilted_rows(check_rows("tangent", tangent), check_positive("c", c), mu))


def inner_product_query(query: Float[Tensor, "b d"], c: float = 1.0) -> Float32[Tensor, "b d1"]:
    """Queries (q_s, -q_t) for `inner_product_vectors`; the largest product is the best.

    Args:
        query: Lorentz tangent vectors at the origin.
        c: curvature parameter.

    Returns:
        Rows one wider than the queries.

    Raises:
        ValueError: values are not finite, or too deep for fp32.

    >>> inner_product_query(torch.zeros(1, 2))
    tensor([[ 0.,  0., -1.]])
    """
    return _single("query", _bounds.tilted_query(check_rows("query", query).double(), check_positive("c", c)))


def _single(name: str, rows: Tensor) -> Float32[Tensor, "n d"]:
    low = rows.float()
    if not torch.isfinite(low).all():
        raise ValueError(
            f"{name} must be shallow enough for fp32 products, got points of norm {float(rows.norm(dim=-1).max()):g}"
        )
    return low
