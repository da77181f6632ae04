"""Distances: golden numbers, accuracy against mpmath, unit gradients, edges."""

import math

import pytest
import torch

from hyper_geom import Curvature, lorentz, poincare
from hyper_geom import convert as conv

C_VALUES = (0.1, 0.7, 1.0, 4.0)
# A fp32 point at k*dist0 = 12 stores its radius to 1e-7 of sinh(12): the bounds grow with the radius for that reason.
RANDOM_RADII = (1e-4, 1e-2, 0.3, 1, 3, 5, 8, 12, 15, 25)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


X, Y, V = t(0.3, -0.4, 0.5), t(-0.2, 0.9, 1.1), t(0.2, 0.1, -0.3)


def test_golden_distances():
    assert lorentz.dist(X, Y, c=0.7).item() == pytest.approx(1.3637419448, abs=1e-9)
    assert lorentz.dist0(X, c=0.7).item() == pytest.approx(0.6712589026, abs=1e-9)
    assert lorentz.time(X, c=0.7).item() == pytest.approx(1.3887301497, abs=1e-9)
    assert lorentz.norm(X, V, c=0.7).item() == pytest.approx(0.3622665276, abs=1e-9)
    assert lorentz.sq_dist(X, Y, c=0.7).item() == pytest.approx(1.3637419448**2, abs=1e-9)
    assert lorentz.pairwise_dist(X[None], Y[None], c=0.7).item() == pytest.approx(1.3637419448, abs=1e-9)


def worst_error(oracle, x, y, c, distance=lorentz.dist, reference=None):
    """Largest relative error of the fp32 distance, and of the Riemannian gradient norm, over the rows."""
    reference = reference or oracle.dist
    x, y = x.float().requires_grad_(), y.float().requires_grad_()
    d = distance(x, y, c=c)
    assert d.dtype == torch.float32
    gradients = torch.autograd.grad(d.sum(), (x, y))
    value = max(
        oracle.relative_error(d[i].item(), reference(oracle.vec(x[i]), oracle.vec(y[i]), oracle.number(c)))
        for i in range(len(d))
    )
    unit = 0.0
    for point, g in zip((x.detach().double(), y.detach().double()), gradients, strict=True):
        g = g.double()
        norm_sq = (g * g).sum(-1) + c * (point * g).sum(-1) ** 2
        unit = max(unit, (norm_sq - 1).abs().max().item())
    return value, unit


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radius", RANDOM_RADII)
def test_fp32_error_random_pairs(oracle, points, c, radius):
    x, y = points.at(radius, points.unit(3, 512), c), points.at(radius, points.unit(3, 512), c)
    value, gradient = worst_error(oracle, x, y, c)
    assert value < 5e-7
    assert gradient < 1e-5


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radius", [0.01, 1, 3, 5, 8])
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 1e-1])
def test_fp32_error_near_pairs(oracle, points, c, radius, gap):
    x = points.at(radius, points.unit(3, 512), c)
    v = points.unit(3, 512)
    y = lorentz.exp_map(x, v * gap / math.sqrt(c) / lorentz.norm(x, v, c=c)[:, None], c=c)
    value, gradient = worst_error(oracle, x, y, c)
    assert value < (5e-7 if radius <= 5 else 1.5e-5)
    assert gradient < (1e-5 if radius <= 5 else 1e-3)


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radius", [0.1, 1, 3, 5, 8, 10, 12])
def test_fp32_error_radial_pairs(oracle, points, c, radius):
    u = points.unit(3, 512)
    value, gradient = worst_error(oracle, points.at(radius, u, c), points.at(radius + 0.5, u, c), c)
    assert value < (5e-7 if radius <= 8 else 1.5e-5 if radius <= 10 else 5e-4)
    assert gradient < (1e-5 if radius <= 8 else 1e-3)


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radii", [(10, 1), (12, 0.1), (12, 6)])
@pytest.mark.parametrize("theta", [0.0, 0.7, 2.2, math.pi])
def test_fp32_error_unequal_radii(oracle, points, c, radii, theta):
    u = points.unit(3, 512)
    x = points.at(radii[0], u, c)
    y = points.at(radii[1], math.cos(theta) * u + math.sin(theta) * points.orthogonal(u), c)
    value, gradient = worst_error(oracle, x, y, c)
    assert value < 2e-5
    assert gradient < 1e-3


@pytest.mark.parametrize("radius", [0.01, 1, 3])
def test_poincare_fp32_error(oracle, points, radius):
    c = 0.7
    near = points.at(radius, points.unit(3, 64), c)
    far = points.at(radius, points.unit(3, 64), c)
    p, q = conv.lorentz_to_poincare(near, c=c).float(), conv.lorentz_to_poincare(far, c=c).float()
    for other in (q, p * (1 - 1e-5)):
        d = poincare.dist(p, other, c=c)
        for i in range(3):
            expected = oracle.ball_dist(oracle.vec(p[i]), oracle.vec(other[i]), oracle.number(c))
            # 1 - c|p|^2 of a stored point carries eps cosh^2(r/2).
            assert oracle.relative_error(d[i].item(), expected) < 3e-7 * math.cosh(radius)


@pytest.mark.parametrize("model", [lorentz, poincare])
@pytest.mark.parametrize("name", ["dist", "sq_dist", "tangent0_dist", "tangent0_sq_dist"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_points_are_exactly_zero(model, name, dtype):
    for x in (torch.zeros(3), torch.full((3,), 1e-20), torch.tensor([0.2, -0.1, 0.3]), torch.tensor([0.5, 0.0, 0.0])):
        x = x.to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        c = torch.tensor(0.7, dtype=dtype, requires_grad=True)
        d = getattr(model, name)(x, y, c=c)
        assert d.item() == 0
        for gradient in torch.autograd.grad(d, (x, y, c)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("radius", [1e-6, 1, 20, 25, 40])
def test_finite_to_radius_40(points, radius):
    u = points.unit(8, 16)
    x = points.at(radius, u, 1.0).float().requires_grad_()
    partners = (
        points.at(radius, points.unit(8, 16), 1.0),
        points.at(radius, -u, 1.0),
        points.at(radius, u, 1.0) * 1.001,
    )
    for y in (*partners, points.at(0.1, u, 1.0), torch.zeros(8, 16)):
        y = y.float().requires_grad_()
        c = torch.tensor(1.0, requires_grad=True)
        d = lorentz.dist(x, y, c=c)
        assert d.isfinite().all()
        assert lorentz.dist0(x).isfinite().all()
        if radius <= 25:
            assert all(g.isfinite().all() for g in torch.autograd.grad(d.sum(), (x, y, c)))


@pytest.mark.parametrize("c", C_VALUES)
def test_gradient_is_minus_the_logarithm(oracle, points, c):
    """The Riemannian gradient of d(x, y) in x is -log_x(y)/d, of d^2 it is -2 log_x(y)."""
    x, y = points.at(1.5, points.unit(4), c).requires_grad_(), points.at(0.8, points.unit(4), c)
    mx, my, mc = oracle.vec(x), oracle.vec(y), oracle.number(c)
    log, d = oracle.log_map(mx, my, mc), oracle.dist(mx, my, mc)
    (g,) = torch.autograd.grad(lorentz.dist(x, y, c=c), x)
    got = lorentz.egrad2rgrad(x.detach(), g, c=c)
    assert oracle.relative_error(got.tolist(), [-a / d for a in log]) < 1e-13
    (g,) = torch.autograd.grad(lorentz.sq_dist(x, y, c=c), x)
    got = lorentz.egrad2rgrad(x.detach(), g, c=c)
    assert oracle.relative_error(got.tolist(), [-2 * a for a in log]) < 1e-13


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("near", [False, True])
def test_gradient_in_c(oracle, points, c, near):
    x = points.at(1.2, points.unit(4), 1.0)
    y = x + 1e-4 * points.unit(4) if near else points.at(2.0, points.unit(4), 1.0)
    tensor_c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(lorentz.dist(x, y, c=tensor_c), tensor_c)
    expected = oracle.mp.diff(lambda z: oracle.dist(oracle.vec(x), oracle.vec(y), z), oracle.number(c))
    assert oracle.relative_error(got.item(), expected) < (1e-10 if near else 1e-12)


@pytest.mark.parametrize("c", C_VALUES)
def test_inner_products(oracle, points, c):
    x, y = points.at(2.0, points.unit(5), c), points.at(1.0, points.unit(5), c)
    u, v = points.unit(5), points.unit(5)
    mx, my, mu, mv, mc = (*map(oracle.vec, (x, y, u, v)), oracle.number(c))
    X = oracle.ambient(mx, mc)
    inner = oracle.ldot(oracle.tangent(X, mu, mc), oracle.tangent(X, mv, mc))
    assert oracle.relative_error(lorentz.inner(x, u, v, c=c).item(), inner) < 1e-13
    assert oracle.relative_error(lorentz.norm(x, v, c=c).item(), oracle.norm(mx, mv, mc)) < 1e-14
    product = oracle.ldot(X, oracle.ambient(my, mc))
    assert oracle.relative_error(lorentz.inner_ambient(x, y, c=c).item(), product) < 1e-14
    assert oracle.relative_error(lorentz.pairwise_inner(x[None], y[None], c=c).item(), product) < 1e-13
    assert oracle.relative_error(lorentz.time(x, c=c).item(), X[0]) < 1e-15


def test_inner_ambient_of_close_points_does_not_cancel(oracle):
    x = torch.tensor([50.0, 0.0])
    y = torch.tensor([50.001, 0.0])
    excess = -lorentz.inner_ambient(x.double(), y.double()) - 1
    expected = -oracle.ldot(oracle.ambient(oracle.vec(x), 1), oracle.ambient(oracle.vec(y), 1)) - 1
    assert excess.item() == pytest.approx(float(expected), abs=1e-15)
    assert lorentz.inner_ambient(x, y).item() == -1.0


@pytest.mark.parametrize("c", C_VALUES)
def test_pairwise_equals_elementwise(points, c):
    for model in (lorentz, poincare):
        x = points.at(1.5, points.unit(2, 4, 6), c)
        y = points.at(2.5, points.unit(2, 5, 6), c)
        if model is poincare:
            x, y = conv.lorentz_to_poincare(x, c=c), conv.lorentz_to_poincare(y, c=c)
        expected = model.dist(x[:, :, None], y[:, None], c=c)
        for precision in ("default", "high"):
            torch.testing.assert_close(
                model.pairwise_dist(x, y, c=c, precision=precision), expected, rtol=1e-12, atol=0
            )


# |u| = |v| = 64 at an angle theta, by c.
TANGENT_GOLDEN = {
    0.01: (0.00300921687, 2.997976881, 68.09903345),
    0.1: (36.2392582, 79.92767165, 109.0506901),
    1.0: (98.98268452, 112.798195, 122.0077021),
}


@pytest.mark.parametrize("c", TANGENT_GOLDEN)
def test_tangent0_golden(oracle, c):
    for theta, expected in zip((1e-6, 1e-3, 0.1), TANGENT_GOLDEN[c], strict=True):
        u, v = t(64.0, 0.0), 64 * t(math.cos(theta), math.sin(theta))
        assert lorentz.tangent0_dist(u, v, c=c).item() == pytest.approx(expected, rel=2e-9)
        assert poincare.tangent0_dist(u / 2, v / 2, c=c).item() == pytest.approx(expected, rel=2e-9)
        u, v = u.float(), v.float()
        reference = oracle.tangent0_dist(oracle.vec(u), oracle.vec(v), oracle.number(c))
        assert oracle.relative_error(lorentz.tangent0_dist(u, v, c=c).item(), reference) < 1e-6
        assert oracle.relative_error(lorentz.tangent0_sq_dist(u, v, c=c).item(), reference**2) < 1e-6


@pytest.mark.parametrize("norm", [1e-3, 0.1, 1.0, 8.0, 31.0, 64.0, 300.0])
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.1, 1.0])
def test_tangent0_fp32(oracle, points, norm, gap):
    u = (norm * points.unit(2, 64)).float().requires_grad_()
    v = (u.detach() + gap * norm * points.unit(2, 64)).float().requires_grad_()
    d = lorentz.tangent0_dist(u, v)
    for i in range(2):
        expected = oracle.tangent0_dist(oracle.vec(u[i]), oracle.vec(v[i]), oracle.number(1))
        assert oracle.relative_error(d[i].item(), expected) < 1e-6
    assert all(g.isfinite().all() for g in torch.autograd.grad(d.sum(), (u, v)))


@pytest.mark.parametrize("c", [0.01, 0.1, 0.7, 1.0, 4.0])
def test_tangent0_is_the_distance_of_the_points(points, c):
    u, v = points.unit(5, 4) * 1.5, points.unit(5, 4) * 0.7
    for model in (lorentz, poincare):
        expected = model.dist(model.exp_map0(u, c=c), model.exp_map0(v, c=c), c=c)
        torch.testing.assert_close(model.tangent0_dist(u, v, c=c), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(model.tangent0_sq_dist(u, v, c=c), expected**2, rtol=1e-12, atol=0)
        zero = torch.zeros_like(u)
        torch.testing.assert_close(
            model.tangent0_dist(u, zero, c=c), model.dist0(model.exp_map0(u, c=c), c=c), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(model.tangent0_dist(zero, u, c=c), model.tangent0_dist(u, zero, c=c))


@pytest.mark.parametrize("c", [0.01, 0.1, 0.7, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.3, 40.0])
def test_tangent0_gradcheck(points, c, scale):
    u = (scale * points.unit(2, 3)).requires_grad_()
    v = (0.8 * scale * points.unit(2, 3)).requires_grad_()
    tensor_c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
    # At radius 80 the gradient spans many orders: compare relative to its size.
    for name in ("tangent0_sq_dist", "tangent0_dist"):
        function = getattr(lorentz, name)
        assert torch.autograd.gradcheck(
            lambda u, v, c, f=function: f(u, v, c=c), (u, v, tensor_c), rtol=1e-4, atol=1e-6
        )


def test_learned_curvature_gets_the_gradient():
    curvature = Curvature(0.7).double()
    lorentz.dist(X, Y, c=curvature()).backward()
    tensor_c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(lorentz.dist(X, Y, c=tensor_c), tensor_c)
    assert curvature.log_c.grad.item() == pytest.approx(0.7 * expected.item(), rel=1e-6)


def test_nan_and_inf_propagate():
    for value in (math.nan, math.inf):
        x = torch.tensor([value, 0.0])
        assert not lorentz.dist(x, torch.ones(2)).isfinite()
        assert not lorentz.dist0(x).isfinite()
        assert lorentz.exp_map(torch.ones(2), torch.tensor([math.nan, 0.0])).isnan().any()
        assert lorentz.log_map0(torch.tensor([math.nan, 0.0])).isnan().any()
    assert poincare.dist(torch.tensor([math.nan, 0.0]), torch.zeros(2)).isnan()
    assert lorentz.exp_map0(torch.tensor([math.nan, 0.0])).isnan().any()
