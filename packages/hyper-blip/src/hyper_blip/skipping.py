"""A training step that changes nothing: for a loss that is not finite (`HyperbolicConfig.on_non_finite="skip"`)."""

import torch
from torch import Tensor, nn

_ENGINE = torch.autograd.Variable._execution_engine


def nothing_to_learn(model: nn.Module) -> Tensor:
    """A loss of 0 whose backward pass leaves the gradients as they are, None where there are none.

    An optimizer passes over parameters without a gradient: neither momentum nor weight decay moves them, which a gradient of 0
    would not prevent. Every trained parameter takes part in the backward pass all the same, so that
    `DistributedDataParallel` does not wait for it.

    Args:
        model: with its trained parameters marked.

    Returns:
        A scalar 0.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # NaN times 0 would be NaN: a sum over an empty slice is 0 and has the gradient 0.
    zero = sum(p.flatten()[:0].sum() for p in trained)
    return _Untouched.apply(zero, [p for p in trained if p.grad is None])


class _Untouched(torch.autograd.Function):
    """The identity; after the backward pass it takes away the gradients that the pass made."""

    @staticmethod
    def forward(ctx, zero: Tensor, without: list[nn.Parameter]) -> Tensor:
        ctx.without = without
        return zero.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        def clear() -> None:
            for parameter in ctx.without:
                parameter.grad = None

        # Twice, because DistributedDataParallel puts its gradients in place in a call of its own at the end of the pass.
        _ENGINE.queue_callback(lambda: _ENGINE.queue_callback(clear))
        return grad, None
