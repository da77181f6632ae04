"""Functions with a forward and a backward written by hand that every transform of PyTorch can still take apart.

A kernel brings three things: the fast forward, the fast backward, and `plain`, the same function as a composition of
differentiable operations. The fast pair runs wherever first derivatives are asked for in reverse; forward mode and the
derivatives of a gradient go through `plain`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hyper_geom._numerics import full_precision


def make_kernel(
    plain: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., tuple],
    *,
    num_kept: int = 0,
    saved: tuple[int, ...] = (),
    batched: bool = True,
    smooth: bool = False,
) -> Callable[..., Any]:
    """The function `forward`, differentiated by `backward`, and by `plain` where that has no answer.

    Args:
        plain: the function as differentiable operations; takes what `forward` takes.
        forward: tensors and options to a tensor or a tuple; the last `num_kept` outputs are for the backward alone.
        backward: `(inputs, outputs, gradients)` to one gradient, or None, for each input: the outputs it asks for by
            `saved`, and gradients without those of the kept outputs.
        num_kept: how many outputs are not handed to the caller.
        saved: places of the outputs that the backward needs.
        smooth: `backward` is differentiable itself, so that `plain` is not asked for derivatives of a gradient.
        batched: tensors may have leading dimensions, so that vmap adds one; else vmap runs a loop.
    """

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if num_kept:
                ctx.mark_non_differentiable(*outputs[-num_kept:])
            tensors = tuple(x for x in inputs if isinstance(x, Tensor))
            ctx.num_inputs = len(tensors)
            ctx.options = tuple(None if isinstance(x, Tensor) else (x,) for x in inputs)
            ctx.num_given = len(outputs) - num_kept
            ctx.save_for_backward(*tensors, *(outputs[i] for i in saved))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple:
            held = ctx.saved_tensors
            tensors, outputs = held[: ctx.num_inputs], held[ctx.num_inputs :]
            grads = grads[: ctx.num_given]
            if smooth:
                return backward(_merged(tensors, ctx.options), outputs, grads)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _plain_gradients(plain, tensors, ctx.options, grads)
            with torch.no_grad(), full_precision(grads[0].device):
                return backward(_merged(tensors, ctx.options), outputs, grads)

    class Transformed(Kernel):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            Kernel.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*(x for x in inputs if isinstance(x, Tensor)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            tensors = ctx.saved_tensors[: ctx.num_inputs]
            given = iter(t for t, option in zip(tangents, ctx.options, strict=True) if option is None)
            moving = [(x, t) for x, t in zip(tensors, given, strict=True)]
            live = [i for i, (_, t) in enumerate(moving) if t is not None]

            def function(*values: Tensor) -> Any:
                full = list(tensors)
                for i, value in zip(live, values, strict=True):
                    full[i] = value
                return plain(*_merged(tuple(full), ctx.options))

            out = torch.func.jvp(function, tuple(moving[i][0] for i in live), tuple(moving[i][1] for i in live))[1]
            if num_kept or isinstance(out, tuple):
                return (*(out if isinstance(out, tuple) else (out,)), *((None,) * num_kept))
            return out

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
            size = info.batch_size
            moved = [
                x if not isinstance(x, Tensor) else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
                for x, dim in zip(args, in_dims, strict=True)
            ]
            if batched:
                out = Transformed.apply(*moved)
            else:
                rows = [Transformed.apply(*(x[i] if isinstance(x, Tensor) else x for x in moved)) for i in range(size)]
                out = (
                    tuple(map(torch.stack, zip(*rows, strict=True)))
                    if isinstance(rows[0], tuple)
                    else torch.stack(rows)
                )
            return out, (0,) * len(out) if isinstance(out, tuple) else 0

    def apply(*args: Any) -> Any:
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return plain(*args)  # a graph that outlives this process holds operations, not Python functions
        if not torch.compiler.is_compiling() and undisturbed(*args):
            out = forward(*args)
            return out if not num_kept else out[0] if len(out) == num_kept + 1 else out[:-num_kept]
        # torch.compile takes no Function that defines jvp.
        out = (Kernel if torch.compiler.is_compiling() else Transformed).apply(*args)
        return out if not num_kept else out[0] if len(out) == num_kept + 1 else out[:-num_kept]

    return apply


def undisturbed(*args: Any) -> bool:
    """Whether nothing differentiates these or transforms: autograd's bookkeeping, 27 us a call, is then spared."""
    return (
        not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args))
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _merged(tensors: tuple[Tensor, ...], options: tuple) -> list:
    """The arguments as they were given: tensors and options in their places."""
    rest = iter(tensors)
    return [next(rest) if option is None else option[0] for option in options]


def _plain_gradients(
    plain: Callable[..., Any], tensors: tuple[Tensor, ...], options: tuple, grads: tuple[Tensor, ...]
) -> tuple:
    floating = [i for i, x in enumerate(tensors) if x.is_floating_point()]

    def weighted(*values: Tensor) -> Tensor:
        full = list(tensors)
        for i, value in zip(floating, values, strict=True):
            full[i] = value
        out = plain(*_merged(tuple(full), options))
        return sum((x * grad).sum() for x, grad in zip(out if isinstance(out, tuple) else (out,), grads, strict=True))

    # grad, not vjp: a kernel inside `plain` finds the level it was recorded at closed when vjp's second half runs.
    found = torch.func.grad(weighted, argnums=tuple(range(len(floating))))(*(tensors[i] for i in floating))
    given = dict(zip(floating, found, strict=True))
    gradients = iter([given.get(i) for i in range(len(tensors))])
    return tuple(next(gradients) if option is None else None for option in options)
