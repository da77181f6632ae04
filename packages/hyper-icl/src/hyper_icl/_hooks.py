"""What rides along with an attention call: set for one model, seen by one thread or task, gone when its block ends.

No reference; the bookkeeping of `calibrate`, `attach` and `SegmentMassCollector`. Hooks live in a context variable, so that
threads, tasks and nested blocks never share them, and are no keyword arguments, which leak into vision towers and which
`generate` refuses. Modules carry one flag, which torch.compile guards: a compiled model leaves its graph while hooks live.
"""

import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

_ATTRIBUTE = "_hyper_icl"
_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class Hooks:
    """A bias by segment, a rewrite of the queries, a record of the masses; on a decoder, what admits its calls."""

    bias: Any = None
    adapter: Any = None
    collector: Any = None
    admission: Any = None

    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.bias is self.adapter is self.collector is self.admission is None


@dataclass(eq=False)
class Route:
    """A module's flag: whether any thread has hooks on it, and which."""

    active: bool = False
    live: list[Hooks] = field(default_factory=list)

    def __deepcopy__(self, memo: dict) -> "Route":
        """A copy of a model starts without hooks."""
        return Route()

    def __reduce__(self) -> tuple:
        """A saved model carries none either."""
        return (Route, ())


@dataclass(frozen=True, eq=False)
class Call:
    """Where one forward pass of a decoder stands.

    Attributes:
        decoder: whose pass it is, by id.
        first: position of its first token, padding counted.
        num: number of its tokens.
        offsets: position of the first key by layer, for caches of fixed size; otherwise keys end with the queries.
    """

    decoder: int
    first: int
    num: int
    offsets: dict[int, int] | None = None

    def first_key(self, layer: int, num_keys: int) -> int:
        """Position of the first of the keys that a layer sees."""
        if self.offsets is not None and layer in self.offsets:
            return self.offsets[layer]
        return self.first + self.num - num_keys


_REASON = {
    "reason": "hyper_icl: a plan belongs to a thread and a block, which a graph cannot hold; compile with fullgraph=False"
}


def outside_graphs(function: Callable) -> Callable:
    """Let torch.compile leave its graph for a function; under fullgraph=True it fails with the reason."""
    # torch 2.6 takes no reason.
    known = "reason" in inspect.signature(torch.compiler.disable).parameters
    return torch.compiler.disable(function, **_REASON if known else {})


_HOOKS: ContextVar[dict[int, Hooks]] = ContextVar("hyper_icl_hooks")
_CALL: ContextVar[Call | None] = ContextVar("hyper_icl_call", default=None)


def _route(module: nn.Module) -> Route:
    found = module.__dict__.get(_ATTRIBUTE)
    if found is None:
        # No parameter, no buffer and no submodule: no state dict ever holds it.
        object.__setattr__(module, _ATTRIBUTE, found := Route())
    return found


def prepare(decoder: nn.Module, modules: list[nn.Module]) -> None:
    """Give a decoder and its attention modules their flags, and let the decoder note where its calls stand; idempotent."""
    for module in modules:
        _route(module)
    if decoder.__dict__.get(_ATTRIBUTE) is None:
        _route(decoder)
        # Before any compilation: torch.compile does not look for hooks that are added later.
        decoder.register_forward_pre_hook(_before, with_kwargs=True)
        decoder.register_forward_hook(_after, with_kwargs=True)


def is_active(module: nn.Module) -> bool:
    """Whether any thread has hooks on the module; the only question that a compiled graph asks."""
    route = getattr(module, _ATTRIBUTE, None)
    return route is not None and route.active


def hooks_of(module: nn.Module) -> Hooks | None:
    """The module's hooks in this thread or task, if any.

    Raises:
        ValueError: a backward pass that reruns the layer cannot tell whose hooks it needs.
    """
    found = _HOOKS.get({}).get(id(module))
    if found is None and in_backward() and isinstance(threading.current_thread(), threading._DummyThread):
        # Gradient checkpointing on a GPU reruns layers in autograd's own thread, which has none of our context.
        live = _route(module).live
        if len(live) > 1:
            raise ValueError(
                f"backward must run in one block at a time under gradient checkpointing, got {len(live)} blocks on one model"
            )
        found = live[0] if live else None
    return found


def in_backward() -> bool:
    """Whether this is a layer that checkpointing runs again during backward."""
    return torch._C._current_graph_task_id() != -1


def set_hook(module: nn.Module, name: str, value: Any) -> Any:
    """Set one hook in this thread or task and return what it replaces."""
    current = _HOOKS.get({})
    before = current.get(id(module), Hooks())
    after = replace(before, **{name: value})
    others = {key: hooks for key, hooks in current.items() if key != id(module)}
    _HOOKS.set(others if after.is_empty() else {**others, id(module): after})
    with _LOCK:
        route = _route(module)
        route.live = [hooks for hooks in route.live if hooks is not before] + ([] if after.is_empty() else [after])
        route.active = bool(route.live)
    return getattr(before, name)


def call_of(decoder: int, num: int) -> Call:
    """Where the current forward pass stands.

    Raises:
        ValueError: the decoder has not said it.
    """
    if in_backward():
        return Call(decoder, 0, num)
    found = _CALL.get()
    if found is None or found.decoder != decoder or found.num != num:
        raise ValueError(
            "model must call its decoder as a module under calibrate, or positions are unknown: use the model's own forward or "
            "generate"
        )
    return found


def _before(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
    if is_active(decoder):
        _note(decoder, args, kwargs)


def _after(decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    if is_active(decoder):
        _note_cache(decoder, output)


@outside_graphs
def _note(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
    """Say where this forward pass stands, and let the plan of this thread admit it."""
    hooks = hooks_of(decoder)
    if hooks is None or hooks.admission is None:
        return
    values = (*args, *kwargs.values())
    cache = next((value for value in values if isinstance(value, Cache)), None)
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = next(x for x in (kwargs.get("input_ids"), *args) if isinstance(x, Tensor))
    first, offsets = 0, None
    if cache is not None:
        first = int(cache.get_seq_length())
        layers = enumerate(cache.layers)
        fixed = {i: layer for i, layer in layers if getattr(layer, "max_cache_len", None) is not None}
        offsets = {i: layer.get_mask_sizes(tokens.shape[1])[1] for i, layer in fixed.items()} or None
    hooks.admission.admit(first, tokens.shape[1], cache)
    _CALL.set(Call(id(decoder), first, tokens.shape[1], offsets))


@outside_graphs
def _note_cache(decoder: nn.Module, output: Any) -> None:
    """A cache that the decoder made itself was filled inside the block."""
    hooks = hooks_of(decoder)
    cache = getattr(output, "past_key_values", None)
    if hooks is not None and hooks.admission is not None and isinstance(cache, Cache):
        hooks.admission.own(cache, int(cache.get_seq_length()))
