"""Backward functions that are not differentiable themselves, and say so."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("this hyper_geom function has no second derivative; the elementwise `dist` has one")


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Run `backward` without a graph, and let a derivative of its result raise RuntimeError.

    `torch.autograd.function.once_differentiable` looks at the incoming gradients alone: where those are constants, as
    for the gradient of a sum, it returns second derivatives that are silently incomplete.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> tuple:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return outputs
        inputs = (*ctx.saved_tensors, *grads)
        return tuple(_Refuse.apply(out, *inputs) if isinstance(out, Tensor) else out for out in outputs)

    return wrapper
