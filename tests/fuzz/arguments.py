"""Values for the parameters of a public function, from its annotations: mostly what fits together, now and then what does not."""

import inspect
import types
import typing
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from hier_losses import Taxonomy

ODD_FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30)
ODD_INTS = (0, -1, 7, 100)
SIZES = (1, 2, 3, 5)


class Unknown(Exception):
    """No values are known for a parameter."""


def random_tree(draw: Random, most: int = 12) -> Taxonomy:
    """A random tree of up to so many nodes, with one or more top nodes and chains."""
    edges: list[tuple[str | None, str]] = [(None, "node 0")]
    for node in range(1, draw.randint(1, most)):
        above = draw.choice([None, *range(node)]) if draw.random() < 0.9 else node - 1
        edges.append((None if above is None else f"node {above}", f"node {node}"))
    return Taxonomy.from_edges(edges)


class Call:
    """One call of a function: sizes and the tree are shared by its arguments, so that most of them fit together.

    Args:
        function: what is called.
        draw: where the choices come from.
    """

    def __init__(self, function: Callable, draw: Random) -> None:
        self.draw, self.sizes = draw, {}
        self.tree = random_tree(draw)
        self.dtype = draw.choice((torch.float32, torch.float32, torch.float64))
        parameters = inspect.signature(function).parameters.values()
        self.given = {}
        for one in parameters:
            if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                continue
            if one.default is not one.empty and draw.random() < 0.5:
                continue
            try:
                self.given[one.name] = self.value(one.annotation, one.name)
            except Unknown:
                if one.default is one.empty:
                    raise
        if self.given and draw.random() < 0.5:
            name = draw.choice(sorted(self.given))
            self.given[name] = self.odd(self.given[name])

    def value(self, kind: object, name: str) -> object:
        """A value that fits an annotation."""
        draw = self.draw
        origin = typing.get_origin(kind)
        if origin in (typing.Union, types.UnionType):
            options = list(typing.get_args(kind))
            literals = [option for option in options if typing.get_origin(option) is typing.Literal]
            known = [one for one in (literals or options) if self._knows(one, name)]
            if not known:
                raise Unknown(kind)
            return self.value(draw.choice(known), name)
        if origin is typing.Literal:
            return draw.choice(typing.get_args(kind))
        if kind is type(None):
            return None
        if hasattr(kind, "dim_str") and hasattr(kind, "dtypes"):
            return self._tensor(kind)
        if kind is bool:
            return draw.random() < 0.5
        if kind is int:
            return draw.choice((1, 1, 2, 3))
        if kind is float:
            return draw.choice((0.1, 0.5, 1.0, 2.0))
        if kind is str:
            return draw.choice(("a", "b c", "node 1"))
        if kind is Tensor:
            return self._plain(name)
        if isinstance(kind, type) and issubclass(Taxonomy, kind) and kind is not object:
            return self.tree
        raise Unknown(kind)

    def _knows(self, kind: object, name: str) -> bool:
        try:
            self.value(kind, name)
        except Unknown:
            return False
        return True

    def _size(self, name: str) -> int:
        own = {"nodes": self.tree.num_nodes, "leaves": self.tree.num_leaves, "levels": self.tree.num_levels}
        return own.get(name) or self.sizes.setdefault(name, self.draw.choice(SIZES))

    def _tensor(self, kind) -> Tensor:
        shape: list[int] = []
        for part in kind.dim_str.split():
            name = part.lstrip("*#?_")
            if part.startswith("*") or part == "...":
                shape += self.sizes.setdefault(f"*{name}", self.draw.choice(((), (2,), (2, 3), (0,))))
            elif name.isdigit():
                shape.append(int(name))
            elif name.isidentifier():
                shape.append(self._size(name))
            else:
                raise Unknown(kind)
        names = {str(dtype) for dtype in kind.dtypes}
        if names & {"float32", "float64"}:
            return self._random(shape)
        if "bool" in names and len(names) == 1:
            return torch.rand(shape, generator=self._generator()) < 0.5
        return torch.randint(0, max(1, self.tree.num_leaves), shape, generator=self._generator())

    def _plain(self, name: str) -> Tensor:
        shape = self.draw.choice(
            ((), (self.tree.num_nodes,), (self._size("batch"),), (self._size("batch"), self._size("dim")))
        )
        if "target" in name or "label" in name or "index" in name:
            return torch.randint(0, self.tree.num_leaves, shape, generator=self._generator())
        return self._random(list(shape)).abs() + 0.1

    def _random(self, shape: list[int]) -> Tensor:
        return torch.randn(shape, generator=self._generator(), dtype=self.dtype)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.draw.randrange(2**31))

    def odd(self, value: object) -> object:
        """Something that does not fit, or hardly."""
        draw = self.draw
        if isinstance(value, Tensor):
            return draw.choice(self._oddities(value))()
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return draw.choice(ODD_INTS)
        if isinstance(value, float):
            return draw.choice(ODD_FLOATS)
        if isinstance(value, str):
            return draw.choice(("", "nonsense", "\u00e9\n$"))
        return value

    def _oddities(self, value: Tensor) -> list[Callable[[], Tensor]]:
        def spoilt(number: float) -> Tensor:
            found = value.clone()
            if found.numel() and found.is_floating_point():
                found.view(-1)[0] = number
            return found

        return [
            lambda: value[..., :0] if value.ndim else value,
            lambda: value[:0] if value.ndim else value,
            lambda: value.unsqueeze(0),
            lambda: value.sum(),
            lambda: torch.cat([value, value], -1) if value.ndim else value,
            lambda: spoilt(float("nan")),
            lambda: spoilt(float("inf")),
            lambda: spoilt(1e30),
            lambda: value * 0,
            lambda: value - 3 if value.dtype != torch.bool else value,
            lambda: value.to(torch.float16) if value.is_floating_point() else value.float(),
            lambda: value.to(torch.bfloat16) if value.is_floating_point() else value + 10**6,
            lambda: value.long() if value.is_floating_point() else value.to(torch.int32),
        ]
