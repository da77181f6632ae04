"""The pairwise kernel: values and gradients against mpmath and against its definition, precision settings, transforms."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from hyper_geom import _pairwise, convert, lorentz, poincare
from hyper_geom._polar import lorentz_polar

C_VALUES = (0.1, 0.7, 1.0, 4.0)
MODELS = {"lorentz": lorentz, "poincare": poincare}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def in_model(model, x, c):
    return x if model == "lorentz" else convert.lorentz_to_poincare(x, c=c)


def riemannian_norm(x, g, c):
    """Norm of the Riemannian gradient for a Euclidean gradient g in space components."""
    x, g = x.double(), g.double()
    return ((g * g).sum(-1) + c * (x * g).sum(-1) ** 2).sqrt()


def autograd_reference(x, y, c):
    """The distance from its definition in ambient coordinates, by autograd, in float64."""
    k = c.sqrt()
    x, y = k * x.double(), k * y.double()
    x0, y0 = (1 + (x * x).sum(-1, keepdim=True)).sqrt(), (1 + (y * y).sum(-1, keepdim=True)).sqrt()
    inner = x0 * y0.mT - x @ y.mT
    return torch.acosh(inner) / k


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radius", [1e-4, 1e-2, 0.3, 1, 3, 8, 15])
def test_random_pairs_against_mpmath(oracle, points, c, radius):
    x, y = (points.at(radius, points.unit(3, 512), c).float() for _ in range(2))
    assert _worst(oracle, x, y, lorentz.pairwise_dist(x, y, c=c), c) < 5e-7


@pytest.mark.parametrize("radii", [(10, 1), (8, 0.1), (0.01, 3), (1e-4, 1e-3)])
def test_unequal_radii_against_mpmath(oracle, points, radii):
    x, y = (points.at(radius, points.unit(3, 512), 0.7).float() for radius in radii)
    assert _worst(oracle, x, y, lorentz.pairwise_dist(x, y, c=0.7), 0.7) < 5e-7


def _worst(oracle, x, y, dist, c):
    assert dist.dtype == torch.float32
    c = oracle.number(c)
    return max(
        oracle.relative_error(dist[i, j].item(), oracle.dist(oracle.vec(x[i]), oracle.vec(y[j]), c))
        for i in range(len(x))
        for j in range(len(y))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_exact_inputs(points, dtype):
    x, y = (points.unit(6, 64).to(dtype) for _ in range(2))
    for model in MODELS.values():
        half = model.pairwise_dist(0.5 * x, 0.5 * y)
        assert half.dtype == torch.float32
        assert torch.equal(half, model.pairwise_dist((0.5 * x).float(), (0.5 * y).float()))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["default", "high"])
def test_gradcheck(points, model, precision):
    x = in_model(model, points.at(1.5, points.unit(2, 1, 5, 3), 1.0), 1.0).requires_grad_()
    y = in_model(model, points.at(0.8, points.unit(3, 4, 3), 1.0), 1.0).requires_grad_()
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    pairwise = MODELS[model].pairwise_dist
    assert gradcheck(lambda x, y, c: pairwise(x, y, c=c, precision=precision), (x, y, c))


@pytest.mark.parametrize("c", [0.1, 4.0])
def test_gradients_equal_autograd_of_the_definition(points, c):
    x = points.at(2.0, points.unit(5, 4), c).requires_grad_()
    y = points.at(3.0, points.unit(6, 4), c).requires_grad_()
    c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)
    ours = torch.autograd.grad((weight * lorentz.pairwise_dist(x, y, c=c)).sum(), (x, y, c))
    theirs = torch.autograd.grad((weight * autograd_reference(x, y, c)).sum(), (x, y, c))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("radius", [1e-3, 0.3, 1, 3, 8])
def test_fp32_gradients_of_random_pairs(points, radius):
    x, y = (points.at(radius, points.unit(4, 512), 1.0).float() for _ in range(2))
    weight = torch.randn(4, 4, generator=points.generator)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        dist = lorentz.pairwise_dist(leaf, y.to(dtype))
        gradients += torch.autograd.grad((weight.to(dtype) * dist).sum(), leaf)
    error = riemannian_norm(x, gradients[0].double() - gradients[1], 1.0)
    # A Euclidean fp32 gradient holds its radial part, 1/cosh r of the rest, to eps cosh r.
    assert (error / riemannian_norm(x, gradients[1], 1.0)).max() < 6e-7 + 2e-7 * math.cosh(radius)


@pytest.mark.parametrize("dim", [2, 64, 512])
@pytest.mark.parametrize("radius", [0.1, 1, 3, 5, 8])
def test_gradient_norm_of_near_pairs_is_bounded(points, radius, dim):
    """Every gap from far below to far above the noise of h: unguarded, the norm reaches 1400."""
    x = points.at(radius, points.unit(200, 1, dim), 1.0)
    for gap in torch.logspace(-6, -1, 26).tolist():
        y = (x + gap * points.unit(200, 1, dim)).float()
        leaf = x.float().requires_grad_()
        (g,) = torch.autograd.grad(lorentz.pairwise_dist(leaf, y).sum(), leaf)
        assert riemannian_norm(x, g, 1.0).max() <= 1.01


def test_guard_stays_above_the_noise(points):
    """The error of h on close pairs, in units of eps sinh(r) sinh(s), against the constant that guards it."""
    k, worst = torch.tensor(1.0), 0.0
    for dim in (2, 64, 512):
        for radius in (0.05, 0.5, 2, 8):
            x = points.at(radius, points.unit(200, 1, dim), 1.0)
            y = (
                x * (1 + 1e-2 * points.unit(200, 1, 1)) + x.norm(dim=-1, keepdim=True) * 1e-3 * points.unit(200, 1, dim)
            ).float()
            x = x.float()
            px, py = lorentz_polar(x, k), lorentz_polar(y, k)
            h = _pairwise.half_difference(px.radius, py.radius).square() + _pairwise.haversine_product(px, py)
            exact = torch.sinh(lorentz.dist(x.double(), y.double()) / 2).square().squeeze(-1)
            scale = (px.sinh * py.sinh).double().squeeze(-1)
            worst = max(worst, ((h.double().flatten() - exact.flatten()) / scale.flatten()).abs().max().item())
    assert 0.5 * 2**-23 < worst < _pairwise.matmul_noise(x)


@pytest.mark.parametrize("model", MODELS)
def test_origin_gets_the_gradient_of_a_point_near_it(points, model):
    y = in_model(model, points.at(1.0, points.unit(3, 4), 1.0), 1.0)
    pairwise = MODELS[model].pairwise_dist
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    near = torch.full((1, 4), 1e-9, dtype=torch.float64, requires_grad=True)
    at_zero, at_near = (torch.autograd.grad(pairwise(x, y).sum(), x)[0] for x in (zero, near))
    torch.testing.assert_close(at_zero, at_near, rtol=1e-7, atol=1e-7)


def test_coincident_points_at_the_origin_are_finite():
    x = torch.zeros(2, 3, requires_grad=True)
    dist = lorentz.pairwise_dist(x, torch.zeros(2, 3))
    (g,) = torch.autograd.grad(dist.sum(), x)
    assert torch.equal(dist, torch.zeros(2, 2))
    assert torch.equal(g, torch.zeros(2, 3))


@pytest.mark.parametrize("radius", [20, 25])
def test_far_points_have_finite_gradients(points, radius):
    x = points.at(radius, points.unit(3, 8), 1.0).float().requires_grad_()
    y = points.at(radius, points.unit(3, 8), 1.0).float()
    dist = lorentz.pairwise_dist(x, y)
    (g,) = torch.autograd.grad(dist.diagonal().sum(), x)
    assert dist.isfinite().all()
    assert lorentz.pairwise_dist(x * math.exp(15), y * math.exp(15)).isfinite().all()
    # The tangential part carries the Riemannian norm; 1/sqrt(h (1+h)) in one product would make it 0 from r = 22 on.
    assert (g.norm(dim=-1) > 0).all()


def test_nan_propagates(points):
    x = points.unit(3, 4)
    x[1] = math.nan
    dist = lorentz.pairwise_dist(x, points.unit(2, 4))
    assert dist.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_radii_scale_with_curvature(points):
    x, y = points.at(1.0, points.unit(4, 3), 1.0), points.at(2.0, points.unit(5, 3), 1.0)
    for t in (0.5, 3.0):
        scaled = lorentz.pairwise_dist(t * x, t * y, c=1 / t**2)
        torch.testing.assert_close(scaled, t * lorentz.pairwise_dist(x, y), rtol=1e-12, atol=0)


def test_high_precision_sees_what_fp32_products_cannot(points):
    """Closeness 1e-5 at r = 3: the fp32 distance is noise, the fp64 Gram resolves it to 2%."""
    x = points.at(3.0, points.unit(50, 64), 1.0)
    y = (x + 1e-5 * points.unit(50, 64)).float()
    x = x.float()
    exact = lorentz.dist(x.double(), y.double())
    error = {
        p: (lorentz.pairwise_dist(x, y, precision=p).diagonal() / exact - 1).abs().max() for p in ("default", "high")
    }
    assert error["high"] < 0.02
    assert error["default"] > 0.5
    assert lorentz.pairwise_dist(x, y, precision="high").dtype == torch.float32


@pytest.mark.parametrize("shape", [((0, 3), (4, 3)), ((4, 3), (0, 3)), ((1, 3), (1, 3)), ((0, 2, 3), (0, 5, 3))])
def test_empty_and_single(shape):
    x, y = (torch.ones(s, requires_grad=True) for s in shape)
    dist = lorentz.pairwise_dist(x, y)
    assert dist.shape == (*shape[0][:-2], shape[0][-2], shape[1][-2])
    gradients = torch.autograd.grad(dist.sum(), (x, y))
    assert [g.shape for g in gradients] == [x.shape, y.shape]
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("batches", [((), (2,)), ((2, 1), (3,)), ((4, 2), (4, 2))])
def test_batches_broadcast(points, batches):
    x, y = points.unit(*batches[0], 5, 3), points.unit(*batches[1], 4, 3)
    dist = lorentz.pairwise_dist(x, y)
    expected = lorentz.dist(x.unsqueeze(-2), y.unsqueeze(-3))
    torch.testing.assert_close(dist, expected, rtol=1e-12, atol=1e-12)


def test_inputs_and_saved_tensors_are_unmutated(points):
    x, y = points.unit(4, 3).requires_grad_(), points.unit(5, 3).requires_grad_()
    before = x.detach().clone(), y.detach().clone()
    dist = lorentz.pairwise_dist(x, y)
    first = torch.autograd.grad(dist.sum(), (x, y), retain_graph=True)
    second = torch.autograd.grad(dist.sum(), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_one_saved_matrix(points):
    """Of all tensors kept for backward one alone has N x M entries."""
    sizes = []
    x, y = points.unit(40, 3).requires_grad_(), points.unit(50, 3).requires_grad_()
    c = torch.tensor(0.7, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        _pairwise.lorentz_pairwise_dist(x, y, c)
    assert sum(size >= 40 * 50 for size in sizes) == 1


def test_second_derivative(points):
    x, y = points.unit(3, 2).requires_grad_(), points.unit(4, 2)
    (g,) = torch.autograd.grad(lorentz.pairwise_dist(x, y).sum(), x, create_graph=True)
    torch.testing.assert_close(g, torch.autograd.grad(lorentz.pairwise_dist(x, y).sum(), x)[0], rtol=1e-12, atol=0)
    assert torch.autograd.gradgradcheck(lambda x: lorentz.pairwise_dist(x, y), (x,))


def test_gradient_of_a_gradient_is_guarded(points):
    """Near pairs in fp32: the gradient that a second derivative starts from has norm at most 1 too."""
    x = points.at(3.0, points.unit(64, 128), 1.0).float()
    near = (x + 1e-4 * points.unit(64, 128)).float()
    grad = torch.func.grad(lambda x: lorentz.pairwise_dist(x.unsqueeze(1), near.unsqueeze(1)).sum())(x)
    assert riemannian_norm(x, grad, 1.0).max() <= 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(points, dtype):
    x, y = (points.unit(8, 16).float() for _ in range(2))
    for model in MODELS.values():
        expected = _value_and_gradient(model, x, y)
        with torch.autocast("cpu", dtype=dtype):
            inside = _value_and_gradient(model, x, y)
        assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def _value_and_gradient(model, x, y):
    leaf = (0.5 * x).requires_grad_()
    dist = model.pairwise_dist(leaf, 0.5 * y)
    return dist.detach(), torch.autograd.grad(dist.sum(), leaf)[0]


def test_guard_follows_the_matmul_precision():
    like = torch.zeros(1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert _pairwise.matmul_noise(like) == 3 * 2**-23
        for setting, noise in (("high", 2**-11), ("medium", 2**-8)):
            torch.set_float32_matmul_precision(setting)
            assert _pairwise.matmul_noise(like) == noise
            assert _pairwise.matmul_noise(like.double()) == 3 * 2**-52
        assert _pairwise.fp32_precision("cuda") == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("model", MODELS)
def test_bad_inputs(model):
    pairwise = MODELS[model].pairwise_dist
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="precision"):
        pairwise(x, x, precision="fp64")
    for c in (0.0, -1.0, math.inf, math.nan, torch.ones(2)):
        with pytest.raises(ValueError, match="c must"):
            pairwise(x, x, c=c)


@pytest.mark.compile
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["default", "high"])
def test_fullgraph(points, model, precision):
    x, y = (0.5 * points.unit(5, 3).float() for _ in range(2))

    def run(x, y, c):
        return MODELS[model].pairwise_dist(x, y, c=c, precision=precision)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
        dist = function(*leaves)
        results.append((dist, *torch.autograd.grad(dist.square().sum(), leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_cuda_equals_cpu_and_is_guarded(points, setting):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        x, y = (points.at(1.0, points.unit(64, 128), 1.0).float() for _ in range(2))
        leaf = x.cuda().requires_grad_()
        dist = lorentz.pairwise_dist(leaf, y.cuda())
        tolerance = 2e-6 if setting == "highest" else 5e-3
        torch.testing.assert_close(
            dist.cpu(), lorentz.pairwise_dist(x.double(), y.double()).float(), rtol=tolerance, atol=0
        )
        near = (x + 1e-4 * points.unit(64, 128)).float().cuda()
        (g,) = torch.autograd.grad(lorentz.pairwise_dist(leaf.unsqueeze(1), near.unsqueeze(1)).sum(), leaf)
        assert riemannian_norm(x, g.cpu(), 1.0).max() <= 1.01
    finally:
        torch.set_float32_matmul_precision(before)
