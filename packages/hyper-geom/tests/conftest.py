"""Shared references, random points and the table of public functions."""

import importlib.util
import inspect
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import hyper_geom
from hyper_geom import convert, lorentz, poincare


class Call(NamedTuple):
    """One public function with the shapes of its tensor arguments ("v" for (*b d), "m" for (*b n d), "s" for (*b))."""

    name: str
    function: object
    kinds: str
    numbers: tuple
    has_c: bool = True

    def tensors(self, batch=(2,), dim=3, dtype=torch.float64, seed=0, scale=0.5):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"v": (*batch, dim), "m": (*batch, 4, dim), "s": batch, "w": (*batch, 4)}
        made = []
        for kind in self.kinds:
            if kind in "sw":
                made.append((0.2 + torch.rand(shapes[kind], generator=generator, dtype=torch.float64)).to(dtype))
            else:
                direction = torch.randn(shapes[kind], generator=generator, dtype=torch.float64)
                norm = direction.norm(dim=-1, keepdim=True).clamp(min=1e-9)
                size = scale * (0.7 + 0.6 * torch.rand((*shapes[kind][:-1], 1), generator=generator))
                made.append((direction / norm * size).to(dtype))
        return made

    def __call__(self, *tensors, c=1.0, **kwargs):
        return self.function(*tensors, *self.numbers, **({"c": c} if self.has_c else {}), **kwargs)


def _calls():
    calls = []
    special = {
        "geodesic": ("vvs", ()),
        "midpoint": ("mw", ()),
        "clip_tangent0": ("v", (0.3,)),
        "soft_clip_tangent0": ("v", (0.3,)),
        "pairwise_dist": ("mm", ()),
        "pairwise_inner": ("mm", ()),
        "pairwise_exterior_angle": ("mm", ()),
        "mobius_scalar_mul": ("sv", ()),
    }
    for model in (lorentz, poincare):
        for name in model.__all__:
            if name == "check_point":
                continue
            function = getattr(model, name)
            required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
            kinds, numbers = special.get(name, ("v" * len(required), ()))
            calls.append(Call(f"{model.__name__.split('.')[-1]}.{name}", function, kinds, numbers))
    for name in convert.__all__:
        kinds, numbers = ("v", (0.7, 2.5)) if name == "rescale_curvature" else ("v", ())
        calls.append(Call(f"convert.{name}", getattr(convert, name), kinds, numbers, name != "rescale_curvature"))
    for name in ("entailment_loss", "entailment_violation"):
        calls.append(Call(f"cones.{name}", getattr(hyper_geom, name), "vv", ()))
    return calls


def pytest_generate_tests(metafunc):
    if "geometry_call" in metafunc.fixturenames:
        calls = _calls()
        metafunc.parametrize("geometry_call", calls, ids=[call.name for call in calls])


@pytest.fixture(scope="session")
def oracle():
    """The mpmath reference in _mp.py."""
    spec = importlib.util.spec_from_file_location("hyper_geom_mp", Path(__file__).with_name("_mp.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Points:
    """Seeded directions and Lorentz points in fp64."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def unit(self, *shape):
        x = torch.randn(*shape, dtype=torch.float64, generator=self.generator)
        return x / x.norm(dim=-1, keepdim=True)

    def orthogonal(self, u):
        """A random unit vector orthogonal to each row of u."""
        w = self.unit(*u.shape)
        w = w - (w * u).sum(-1, keepdim=True) * u
        return w / w.norm(dim=-1, keepdim=True)

    def at(self, radius, u, c):
        """The point at k*dist0 = radius in direction u."""
        return math.sinh(radius) / math.sqrt(c) * u


@pytest.fixture
def points():
    return Points()
