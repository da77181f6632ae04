"""The Frechet mean, which the closed-form midpoint is not.

References: Karcher, "Riemannian center of mass and mollifier smoothing", 1977; Lou et al., "Differentiating through the
Frechet mean", ICML 2020 (implicit gradient). Newton's method in the frame carried from the origin is ours.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from hyper_geom import _numerics as nm
from hyper_geom import lorentz
from hyper_geom._centroid import check_weights
from hyper_geom.convert import from_ball, to_ball


@nm.geometry(1, matrices=True)
def frechet_mean(
    x: Float[Tensor, "*batch n dim"],
    weights: Tensor | None = None,
    *,
    c: float | Tensor = 1.0,
    model: str = "lorentz",
    num_steps: int = 12,
) -> Float[Tensor, "*batch dim"]:
    """Weighted Frechet mean: the point with the least weighted sum of squared distances.

    argmin_m sum_i w_i d(m, x_i)^2, by Newton steps from the midpoint; the last two carry the gradient, which is then the
    implicit one, and so are second derivatives: to the points, the weights and c.

    Args:
        x: points `(*batch n dim)`.
        weights: non-negative weights that expand to `(*batch n)`, equal by default.
        c: curvature parameter.
        model: "lorentz" or "poincare".
        num_steps: Newton steps; 6 reach fp64 at radius 5. A step solves a system of size dim.

    Returns:
        Points `(*batch dim)`.

    Raises:
        ValueError: unknown model, num_steps < 1, or what `midpoint` raises.

    >>> frechet_mean(torch.tensor([[0.0], [1.0], [-1.0]]))
    tensor([0.])
    """
    nm.check_choice("model", model, ("lorentz", "poincare"))
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    weights = check_weights(x, weights)
    c, share = cast(Tensor, c), nm.safe_div(weights, weights.sum(-1, keepdim=True))
    if model == "poincare":
        x = from_ball(x, c.unsqueeze(-1))
    with torch.no_grad():
        mean = lorentz.midpoint(x, weights, c=c)
        for _ in range(num_steps - 2):
            mean = _step(mean, x, share, c)
    # The last step alone has the implicit first derivative; a second step makes the second derivatives right.
    for _ in range(min(2, num_steps)):
        mean = _step(mean, x, share, c)
    return mean if model == "lorentz" else to_ball(mean, c)


def _step(mean: Tensor, x: Tensor, share: Tensor, c: Tensor) -> Tensor:
    """One Newton step, in the frame at `mean`.

    The Hessian of d^2/2 is 1 along the log and k d coth(k d) across it.
    """
    logs = lorentz.log_map_frame(mean.unsqueeze(-2), x, c=c.unsqueeze(-1))
    gradient = (share.unsqueeze(-1) * logs).sum(-2)
    length_sq = nm.sq_norm(logs)
    root = nm.safe_sqrt(c.unsqueeze(-1) * length_sq)
    across = torch.where(root > 0, root / torch.where(root > 0, root, 1.0).tanh(), 1.0)
    along = nm.safe_div(share * (1 - across), length_sq)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    # A row of zero weights has no Hessian; its gradient is 0 too.
    total = (share * across).sum(-1)
    hessian = torch.where(total > 0, total, 1.0)[..., None, None] * eye
    hessian = hessian + (along.unsqueeze(-1) * logs).mT @ logs
    return lorentz.exp_map_frame(mean, torch.linalg.solve(hessian, gradient), c=c)
