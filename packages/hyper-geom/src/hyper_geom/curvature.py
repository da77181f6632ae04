"""A learnable curvature kept within bounds.

References: Desai et al., "Hyperbolic image-text representations", ICML 2023, section 4 (log parameter, bounds
at a tenth and ten times the initial value); the gradient rule outside the bounds is ours.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hyper_geom import _numerics as nm
from hyper_geom._kernel import make_kernel


def _clamp(value: Tensor, low: float, high: float) -> Tensor:
    return value.clamp(low, high)


def _clamp_backward(inputs: list, outputs: tuple, grads: tuple) -> tuple[Tensor, None, None]:
    (value, low, high), (grad,) = inputs, grads
    away = ((value > high) & (grad < 0)) | ((value < low) & (grad > 0))
    return torch.where(away, 0.0, grad), None, None


# Clamp whose gradient, outside the bounds, passes only if a descent step moves back inside; torch.clamp has gradient 0
# there, which would leave a parameter that overshot outside for good.
_clamp_for_descent = make_kernel(_clamp, _clamp, _clamp_backward, smooth=True)


class Curvature(nn.Module):
    """The curvature parameter c > 0 (sectional curvature -c) as the exponential of a bounded parameter.

    c = exp(clamp(log_c, log(min), log(max))). Outside the bounds the gradient passes only if a descent step moves
    back inside, else it is 0. Exclude `log_c` from weight decay, which would pull c towards 1.

    Args:
        value: initial c, strictly between min and max.
        learnable: `log_c` is a parameter; otherwise a buffer.
        min: lower bound, value/10 by default.
        max: upper bound, 10*value by default.

    Attributes:
        log_c: shape (1,), because `fully_shard` rejects 0-D parameters.

    Raises:
        ValueError: not 0 < min < value < max < inf.

    >>> Curvature(1.0)()
    tensor(1., grad_fn=<SumBackward0>)
    """

    def __init__(
        self,
        value: float = 1.0,
        *,
        learnable: bool = True,
        min: float | None = None,
        max: float | None = None,
    ) -> None:
        """Set log_c to log(value)."""
        super().__init__()
        value = nm.check_positive("value", value)
        self.min = nm.check_positive("min", value / 10 if min is None else min)
        self.max = nm.check_positive("max", 10 * value if max is None else max)
        if not self.min < value < self.max:
            raise ValueError(f"value must lie in (min, max) = ({self.min}, {self.max}), got {value}")
        log_c = torch.tensor([math.log(value)], dtype=torch.get_default_dtype())
        if learnable:
            self.log_c = nn.Parameter(log_c)
        else:
            self.register_buffer("log_c", log_c)

    def forward(self) -> Float[Tensor, ""]:
        """The current c as a 0-D tensor in [min, max], in fp32 or wider."""
        log_c = self.log_c.to(torch.promote_types(self.log_c.dtype, torch.float32))
        # sum, not reshape: FSDP2 warns about a module that returns a view.
        return _clamp_for_descent(log_c, math.log(self.min), math.log(self.max)).exp().sum()

    def get_extra_state(self) -> Tensor:
        """The bounds, saved beside `log_c`: without them a saved c outside another instance's bounds loads as a bound."""
        return torch.tensor([self.min, self.max], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over saved bounds."""
        self.min, self.max = state.tolist()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list, *rest: Any
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)
        # States saved before the bounds were part of them load as they did.
        missing_keys += [name for name in missing if name != f"{prefix}_extra_state"]

    @torch.no_grad()
    def clamp_(self) -> "Curvature":
        """Move `log_c` itself back to the nearest bound, in place."""
        self.log_c.clamp_(math.log(self.min), math.log(self.max))
        return self

    def extra_repr(self) -> str:
        """The bounds and whether c is learned."""
        return f"min={self.min}, max={self.max}, learnable={isinstance(self.log_c, nn.Parameter)}"
