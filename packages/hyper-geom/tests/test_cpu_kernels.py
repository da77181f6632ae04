"""The compiled CPU kernels against the eager form and against float64, and their absence."""

import shutil
import warnings

import pytest
import torch

from hyper_geom import _cpu, _pairwise, build_cpu_kernels, distance_info_nce, lorentz, poincare

# torch's own: the first forward-mode derivative of a process scripts its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("ninja") and (shutil.which("c++") or shutil.which("g++"))),
    reason="needs a C++ compiler and ninja",
)


@pytest.fixture
def kernels(monkeypatch):
    """The compiled library in use for one test, and a switch for the eager form."""
    monkeypatch.setattr(_cpu, "_library", None)
    assert build_cpu_kernels()
    library = _cpu._library

    def switch(on):
        _cpu._library = library if on else None

    return switch


def gradients(function, *tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def worst(a, b):
    return ((a.double() - b.double()).abs() / b.double().abs()).max().item()


@needs_compiler
@pytest.mark.parametrize("radius", [1e-2, 0.3, 1, 3, 8, 15])
def test_values_of_random_pairs(kernels, points, radius):
    x, y = (points.at(radius, points.unit(40, 96), 0.7).float() for _ in range(2))
    exact = lorentz.dist(x.double().unsqueeze(1), y.double(), c=0.7)
    served = lorentz.pairwise_dist(x, y, c=0.7)
    kernels(False)
    assert worst(served, exact) < 5e-7
    assert worst(served, lorentz.pairwise_dist(x, y, c=0.7)) < 4e-7  # two forms, each off by up to 2.4e-7
    assert not torch.equal(served, lorentz.pairwise_dist(x, y, c=0.7))  # the kernel did run


@needs_compiler
@pytest.mark.parametrize("model", [lorentz, poincare])
@pytest.mark.parametrize(
    "shapes", [((5, 4), (7, 4)), ((2, 1, 3, 4), (3, 1030, 4)), ((1, 4), (1, 4)), ((1100, 4), (2, 4))]
)
def test_gradients(kernels, points, model, shapes):
    x, y = (0.4 * points.unit(*shape) for shape in shapes)
    c = torch.tensor(0.7, dtype=torch.float64)

    def function(x, y, c):
        return model.pairwise_dist(x, y, c=c)

    served = gradients(function, x.float(), y.float(), c.float())
    kernels(False)
    eager = gradients(function, x.float(), y.float(), c.float())
    exact = gradients(function, x.float().double(), y.float().double(), c.float().double())
    for got, other, want in zip(served, eager, exact, strict=True):
        assert got.shape == want.shape
        # Close pairs are noise in either form, so the eager form's error is the yardstick.
        assert (got - want).norm() <= 3 * (other - want).norm() + 2e-6 * want.norm()


def riemannian_norm(x, g):
    return ((g * g).sum(-1) + (x * g).sum(-1) ** 2).sqrt()


@needs_compiler
@pytest.mark.parametrize("gap", [1e-5, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("radius", [0.01, 1, 5, 10])
def test_pairs_against_float64(kernels, points, gap, radius):
    x = points.at(radius, points.unit(50, 96), 1.0).float().double()
    tangent = points.unit(50, 96)
    tangent = tangent * gap / lorentz.norm(x, tangent).unsqueeze(-1)
    y = lorentz.exp_map(x, tangent).float().double()
    if gap < 1e-4 < 1 < radius:  # storage alone merges them
        y = torch.where((x == y).all(-1, keepdim=True), 2 * x, y).float().double()
    c = torch.tensor(1.0, dtype=torch.float64)
    exact = gradients(lambda x, y, c: lorentz.dist(x, y, c=c), x, y, c)
    served = gradients(lambda x, y, c: lorentz.dist(x, y, c=c), x.float(), y.float(), c.float())
    assert worst(served[0], exact[0]) < 1e-7
    for got, want in zip(served[1:3], exact[1:3], strict=True):
        assert (got - want).norm(dim=-1).div(want.norm(dim=-1)).max() < 2e-6
    torch.testing.assert_close(served[3].double(), exact[3], rtol=1e-5, atol=1e-5)
    kernels(False)
    assert not torch.equal(served[0], lorentz.dist(x.float(), y.float()))  # the kernel did run


@needs_compiler
def test_pairs_of_every_shape(kernels, points):
    x, y = (0.4 * points.unit(2, 3, 4).float() for _ in range(2))
    c = torch.tensor([0.5, 2.0]).unsqueeze(1)
    exact = lorentz.dist(x.double(), y.double(), c=c.double())
    torch.testing.assert_close(lorentz.dist(x, y, c=c), exact.float())
    torch.testing.assert_close(lorentz.dist(x.mT.contiguous().mT, y, c=c), exact.float())
    torch.testing.assert_close(lorentz.dist(x, y[:1, :1], c=0.5)[0, 0], exact.float()[0, 0])
    per_row = gradients(lambda c: lorentz.dist(x, y, c=c), c)[1]
    torch.testing.assert_close(
        per_row, gradients(lambda c: lorentz.dist(x.double(), y.double(), c=c), c.double())[1].float()
    )
    assert lorentz.dist(x[:, :0], y[:, :0]).shape == (2, 0)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(lorentz.dist(leaf, x).sum(), leaf)
    assert g.abs().max() == 0
    double = torch.func.hessian(lambda v: lorentz.dist(v, y[0, 0]).square())(x[0, 0])
    kernels(False)
    torch.testing.assert_close(double, torch.func.hessian(lambda v: lorentz.dist(v, y[0, 0]).square())(x[0, 0]))


@needs_compiler
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
def test_pairs_under_transforms(kernels, points, transform):
    x, y = (0.4 * points.unit(3, 4).float() for _ in range(2))
    c = torch.full((3,), 0.7)
    calls = {
        "grad": lambda f: torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2))(x, y, c),
        "vmap": lambda f: torch.func.vmap(f)(x, y, c),
        "jvp": lambda f: torch.func.jvp(f, (x, y, c), (y, x, c)),
        "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2))(x, y, c),
    }

    def functions():
        one, every = (
            (lambda x, y, c: lorentz.dist(x, y, c=c)),
            (lambda x, y, c: lorentz.pairwise_dist(x[None], y[None], c=c[0])),
        )
        return calls[transform](one), *(() if transform == "vmap" else (calls[transform](every),))

    served = functions()
    kernels(False)
    torch.testing.assert_close(served, functions(), rtol=2e-5, atol=2e-6)


@needs_compiler
def test_near_pairs_keep_the_guard(kernels, points):
    for radius in (0.1, 1, 5):
        x = points.at(radius, points.unit(100, 64), 1.0)
        y = (x + 1e-4 * points.unit(100, 64)).float()
        leaf = x.float().requires_grad_()
        weight = torch.eye(100)
        (g,) = torch.autograd.grad((lorentz.pairwise_dist(leaf, y) * weight).sum(), leaf)
        assert riemannian_norm(x, g.double()).max() <= 1.01


@needs_compiler
def test_edges(kernels):
    zero, y = torch.zeros(2, 3), torch.ones(0, 3)
    assert lorentz.pairwise_dist(zero, y).shape == (2, 0)
    value, *rest = gradients(lambda x: lorentz.pairwise_dist(x, torch.zeros(2, 3)), zero)
    assert value.abs().max() == 0
    assert rest[0].isfinite().all()
    bad = torch.tensor([[float("nan"), 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert lorentz.pairwise_dist(bad, bad).isnan().tolist() == [[True, True], [True, False]]
    # What the kernel does not serve stays what it was.
    assert lorentz.pairwise_dist(zero.double(), zero.double()).dtype == torch.float64
    torch.func.vmap(lorentz.pairwise_dist)(torch.ones(2, 3, 4), torch.ones(2, 3, 4))


@needs_compiler
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("num", "chunk"), [(1, None), (7, 3), (1100, 600)])
def test_contrastive_loss(kernels, points, symmetric, num, chunk):
    x, y = (0.8 * points.unit(num, 5) for _ in range(2))
    rest = [torch.tensor(v, dtype=torch.float64) for v in (0.7, 6.0)]
    labels = torch.randperm(num, generator=points.generator)

    def loss(x, y, c, scale):
        return distance_info_nce(
            x, y, c=c, logit_scale=scale, labels=labels, symmetric=symmetric, backend="chunked", chunk_size=chunk
        )

    served = gradients(loss, *(v.float() for v in (x, y, *rest)))
    for got, exact in zip(served, gradients(loss, x, y, *rest), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=3e-6 * max(1.0, exact.abs().max().item()))


@needs_compiler
def test_logarithm_and_exponential(kernels):
    """On every scale: the distance of two points on one ray is the difference of their radii."""
    radius = torch.logspace(-4, 1.5, 4000, dtype=torch.float64)
    x = radius.sinh().unsqueeze(1).float()
    exact = x.double().asinh().squeeze(1)
    assert worst(lorentz.pairwise_dist(x, torch.zeros(1, 1)).squeeze(1), exact) < 3e-7


def test_without_a_compiler(monkeypatch):
    import torch.utils.cpp_extension as extension

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(_cpu, "_library", None)
    monkeypatch.setattr(extension, "load", fails)
    _cpu._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="keeps its eager CPU form: RuntimeError: no compiler$"):
            assert not build_cpu_kernels()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not build_cpu_kernels()  # one warning
        assert not _cpu.serves(torch.ones(2))
        assert _pairwise.lorentz_pairwise_dist(torch.ones(2, 3), torch.ones(2, 3), torch.tensor(1.0)).shape == (2, 2)
    finally:
        _cpu._load.cache_clear()
