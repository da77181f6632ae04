"""Tokens of staged towers: pooled outputs of several stages, each mapped into the joint space.

The counterpart of `LayerTokens` for networks without class tokens (ours). The maps start at the least-squares solution
onto the final embedding, so that every stage speaks the same language before training.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class StageTokens(nn.Module):
    """One linear map per stage, from pooled features to a token of the joint space.

    Pooled features of all stages may be computed once and kept: they go in side by side, `(B, sum of widths)`.

    Args:
        widths: number of pooled features of each stage, first stage first.
        dim: width d of the joint space.

    Raises:
        ValueError: no stage, or a width or dim below 1.

    >>> StageTokens((8, 16), 4)(torch.zeros(2, 24)).shape
    torch.Size([2, 2, 4])
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        """Make the maps."""
        super().__init__()
        self.widths = tuple(widths)
        if not self.widths or min(*self.widths, dim) < 1:
            raise ValueError(f"widths and dim must be at least 1, got {self.widths} and {dim}")
        self.dim = dim
        self.maps = nn.ModuleList(nn.Linear(width, dim) for width in self.widths)

    @property
    def num_tokens(self) -> int:
        """The number M of tokens of a picture."""
        return len(self.widths)

    @staticmethod
    def pool(stages: Sequence[Tensor]) -> Float[Tensor, "B features"]:
        """Average feature maps `(B c h w)` over space, leave `(B c)` as they are, and put the stages side by side."""
        return torch.cat([s.flatten(2).mean(dim=2) if s.ndim > 2 else s for s in stages], dim=1)

    def forward(self, features: Float[Tensor, "B features"]) -> Float[Tensor, "B M d"]:
        """Map pooled features to tokens.

        Args:
            features: what `pool` returns.

        Returns:
            Tokens `(B M d)`, not normalised.

        Raises:
            ValueError: another width than that of all stages together.
        """
        return torch.stack([m(x) for m, x in zip(self.maps, self._split(features), strict=True)], dim=1)

    @torch.no_grad()
    def fit_(
        self, features: Float[Tensor, "n features"], target: Float[Tensor, "n d"], ridge: float = 0.1
    ) -> "StageTokens":
        """Set every map to the ridge solution onto a target, in place and in closed form.

        W = (X^T X + ridge tr(X^T X)/c I)^-1 X^T Y with X and Y centred, b = mean(Y) - W mean(X).

        Args:
            features: pooled features of the training pictures.
            target: their final embeddings; no label is needed.
            ridge: weight of the penalty against the mean eigenvalue of X^T X, > 0.

        Returns:
            Itself.

        Raises:
            ValueError: ridge not > 0, no picture, or widths that differ.
        """
        if not ridge > 0:
            raise ValueError(f"ridge must be > 0, got {ridge}")
        if len(features) == 0 or target.shape != (len(features), self.dim):
            raise ValueError(f"target must have shape ({len(features)}, {self.dim}), n >= 1, got {tuple(target.shape)}")
        y = target.double()
        for linear, part in zip(self.maps, self._split(features), strict=True):
            x = part.double()
            centred = x - x.mean(0)
            gram = centred.mT @ centred
            # The trace may be 0 (one picture): then the map is 0 and the bias the mean.
            penalty = ridge * gram.trace().clamp(min=1e-12) / len(gram)
            gram.diagonal().add_(penalty)
            weight = torch.linalg.solve(gram, centred.mT @ (y - y.mean(0))).mT
            linear.weight.copy_(weight)
            linear.bias.copy_(y.mean(0) - weight @ x.mean(0))
        return self

    def _split(self, features: Tensor) -> tuple[Tensor, ...]:
        if features.ndim != 2 or features.shape[1] != sum(self.widths):
            raise ValueError(f"features must have shape (B, {sum(self.widths)}), got {tuple(features.shape)}")
        return features.split(self.widths, dim=1)
