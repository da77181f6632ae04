"""Exponential and logarithmic maps, transport, geodesics and midpoints of both models against mpmath and each other."""

import math

import pytest
import torch

from hyper_geom import convert as conv
from hyper_geom import lorentz, poincare

C_VALUES = (0.1, 0.7, 1.0, 4.0)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


X, Y, V = t(0.3, -0.4, 0.5), t(-0.2, 0.9, 1.1), t(0.2, 0.1, -0.3)


def test_golden_maps():
    def check(got, *expected):
        assert got.tolist() == pytest.approx(expected, abs=1e-9)

    check(lorentz.exp_map0(X, c=0.7)[:1], 0.3178088145)
    check(lorentz.log_map0(X, c=0.7)[:1], 0.2847910332)
    check(lorentz.exp_map(X, V, c=0.7), 0.5169619982, -0.3169761255, 0.2185283996)
    check(lorentz.log_map(X, Y, c=0.7), -0.5825239533, 1.2909577616, 0.1929764158)
    check(lorentz.parallel_transport(X, Y, V, c=0.7), 0.1972984145, 0.0864920727, -0.3432253674)
    both = torch.stack((X, Y))
    check(lorentz.midpoint(both, c=0.7), 0.0428377957, 0.2141889786, 0.6854047316)
    check(lorentz.midpoint(both, t(1, 3), c=0.7), -0.0665057857, 0.5098776900, 0.8424066183)
    check(conv.lorentz_to_poincare(X, c=0.7)[:1], 0.1387671462)


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radius", [1e-3, 0.5, 3.0])
def test_lorentz_maps_match_the_oracle(oracle, points, c, radius):
    x, y = points.at(radius, points.unit(4), c), points.at(0.7, points.unit(4), c)
    v = points.unit(4)
    mx, my, mv, mc = (*map(oracle.vec, (x, y, v)), oracle.number(c))
    origin = [oracle.mp.mpf(0)] * 4
    zero = torch.zeros(4, dtype=torch.float64)
    pairs = [
        (lorentz.exp_map(x, v, c=c), oracle.exp_map(mx, mv, mc)),
        (lorentz.exp_map0(v, c=c), oracle.exp_map(origin, mv, mc)),
        (lorentz.exp_map(zero, v, c=c), oracle.exp_map(origin, mv, mc)),
        (lorentz.log_map(x, y, c=c), oracle.log_map(mx, my, mc)),
        (lorentz.log_map0(y, c=c), oracle.log_map(origin, my, mc)),
        (lorentz.parallel_transport(x, y, v, c=c), oracle.parallel_transport(mx, my, mv, mc)),
        (lorentz.parallel_transport0(y, v, c=c), oracle.parallel_transport(origin, my, mv, mc)),
        (lorentz.parallel_transport0_back(x, v, c=c), oracle.parallel_transport(mx, origin, mv, mc)),
        (lorentz.geodesic(x, y, 0.3, c=c), oracle.geodesic(mx, my, oracle.mp.mpf(0.3), mc)),
        (lorentz.geodesic(x, y, -0.5, c=c), oracle.geodesic(mx, my, oracle.mp.mpf(-0.5), mc)),
    ]
    for got, expected in pairs:
        assert oracle.relative_error(got.tolist(), expected) < 1e-13


def riemannian_error(model, x, got, expected, c):
    """Largest |got - expected|_x / |expected|_x in fp64."""
    x, got, expected = x.double(), got.double(), expected.double()
    return (model.norm(x, got - expected, c=c) / model.norm(x, expected, c=c)).max().item()


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("model", [lorentz, poincare])
@pytest.mark.parametrize(
    ("dtype", "radius"), [(torch.float32, 1), (torch.float32, 3), (torch.float32, 6), (torch.float64, 6)]
)
def test_inverse_maps_and_isometry(points, c, model, dtype, radius):
    bound = 1e-11 if dtype == torch.float64 else 1e-5 if radius <= 3 else 5e-5
    transport_bound = 2e-3 if (dtype, radius) == (torch.float32, 6) else bound
    x, y = points.at(radius, points.unit(32, 64), c), points.at(radius, points.unit(32, 64), c)
    if model is poincare:
        x, y = conv.lorentz_to_poincare(x, c=c), conv.lorentz_to_poincare(y, c=c)
        # The ball stores 1 - c|p|^2 to eps, so its fp32 points carry a relative eps cosh^2(r/2).
        bound = max(bound, 3e-7 * math.cosh(radius) * (dtype == torch.float32))
    # Unit tangent vectors (k|v|_x = 1), uniform in the tangent space at x.
    v = model.parallel_transport0(x, points.unit(32, 64) / math.sqrt(c) / (2 if model is poincare else 1), c=c)
    x, y, v = x.to(dtype), y.to(dtype), v.to(dtype)
    assert riemannian_error(model, x, model.log_map(x, model.exp_map(x, v, c=c), c=c), v, c) < bound
    target = model.exp_map(x.double(), v.double(), c=c).to(dtype)
    back = model.exp_map(x, model.log_map(x, target, c=c), c=c)
    assert (math.sqrt(c) * model.dist(back.double(), target.double(), c=c)).max() < 10 * bound
    moved = model.parallel_transport(x, y, v, c=c)
    assert riemannian_error(model, x, model.parallel_transport(y, x, moved, c=c), v, c) < transport_bound
    isometry = model.norm(y.double(), moved.double(), c=c) / model.norm(x.double(), v.double(), c=c)
    assert (isometry - 1).abs().max() < transport_bound
    from_origin = model.parallel_transport0_back(x, v, c=c)
    assert riemannian_error(model, x, model.parallel_transport0(x, from_origin, c=c), v, c) < transport_bound


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("norm", [1e-6, 1e-3, 0.3, 1, 5, 20])
def test_log0_inverts_exp0_in_fp32(points, c, norm):
    v = (norm / math.sqrt(c) * points.unit(64, 32)).float()
    error = (lorentz.log_map0(lorentz.exp_map0(v, c=c), c=c) - v).norm(dim=-1) / v.norm(dim=-1)
    assert error.max() < 2e-7
    if norm <= 1:
        error = (poincare.log_map0(poincare.exp_map0(v, c=c), c=c) - v).norm(dim=-1) / v.norm(dim=-1)
        assert error.max() < 1e-6


@pytest.mark.parametrize("model", [lorentz, poincare])
@pytest.mark.parametrize("c", C_VALUES)
def test_depth_of_exp0(points, model, c):
    v = points.unit(5, 3) * 0.8
    depth = model.dist0(model.exp_map0(v, c=c), c=c)
    torch.testing.assert_close(depth, (1 if model is lorentz else 2) * v.norm(dim=-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("model", [lorentz, poincare])
@pytest.mark.parametrize("c", C_VALUES)
def test_geodesic_has_unit_speed_and_meets_its_ends(points, model, c):
    x, y = points.at(2.0, points.unit(6, 5), c), points.at(3.0, points.unit(6, 5), c)
    if model is poincare:
        x, y = conv.lorentz_to_poincare(x, c=c), conv.lorentz_to_poincare(y, c=c)
    d = model.dist(x, y, c=c)
    torch.testing.assert_close(model.geodesic(x, y, 0.0, c=c), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.geodesic(x, y, 1.0, c=c), y, rtol=1e-12, atol=1e-12)
    for s, e in ((0.0, 0.4), (0.4, 1.0), (-0.3, 1.2)):
        torch.testing.assert_close(
            model.dist(model.geodesic(x, y, s, c=c), model.geodesic(x, y, e, c=c), c=c), (e - s) * d, rtol=1e-11, atol=0
        )
    fraction = torch.rand(6, dtype=torch.float64)
    along = model.geodesic(x, y, fraction, c=c)
    torch.testing.assert_close(
        along, model.exp_map(x, fraction[:, None] * model.log_map(x, y, c=c), c=c), rtol=1e-10, atol=1e-10
    )


def test_geodesic_between_far_and_between_equal_points(points):
    u = points.unit(4)
    far = points.at(40, u, 1.0).float()
    middle = lorentz.geodesic(far, -far, 0.5)
    # 1e17 - 1e17: what remains of the far ends is below their rounding.
    assert (lorentz.dist0(middle) < 25).all()
    assert lorentz.geodesic(far, far * 0.5, 0.3).isfinite().all()
    torch.testing.assert_close(lorentz.geodesic(u, u, 0.3), u)


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radius", [0.01, 1, 3, 8])
def test_midpoint_fp32(oracle, points, c, radius):
    spread = points.at(radius, points.unit(4, 32), c).float()
    near = (points.at(radius, points.unit(1, 32), c) * (1 + 0.01 * torch.rand(4, 1).double())).float()
    weights = torch.tensor([0.3, 1.0, 0.0, 2.0])
    for x in (spread, near):
        expected = oracle.midpoint([oracle.vec(a) for a in x], oracle.vec(weights), oracle.number(c))
        assert oracle.relative_error(lorentz.midpoint(x, weights, c=c).tolist(), expected) < 5e-7


@pytest.mark.parametrize("c", C_VALUES)
def test_midpoint_of_the_ball_is_the_gyromidpoint(points, c):
    x = points.at(1.5, points.unit(2, 5, 3), c)
    weights = torch.rand(2, 5, dtype=torch.float64)
    p = conv.lorentz_to_poincare(x, c=c)
    factor = poincare.conformal_factor(p, c=c)
    weighted = ((weights * factor)[..., None] * p).sum(-2) / (weights * (factor - 1)).sum(-1, keepdim=True)
    expected = poincare.mobius_scalar_mul(0.5, weighted, c=c)
    torch.testing.assert_close(poincare.midpoint(p, weights, c=c), expected, rtol=1e-13, atol=0)
    einstein = conv.lorentz_to_klein(x, c=c)
    gamma = weights / (1 - c * (einstein**2).sum(-1)).sqrt()
    average = (gamma[..., None] * einstein).sum(-2) / gamma.sum(-1, keepdim=True)
    torch.testing.assert_close(
        conv.lorentz_to_klein(lorentz.midpoint(x, weights, c=c), c=c), average, rtol=1e-13, atol=1e-14
    )


def test_midpoint_edges(points):
    x = points.unit(3, 4).requires_grad_()
    for model in (lorentz, poincare):
        zero = model.midpoint(x / 2, torch.zeros(3))
        assert (zero == 0).all()
        assert torch.autograd.grad(zero.sum(), x)[0].isfinite().all()
        assert (model.midpoint(x[:0] / 2) == 0).all()
        torch.testing.assert_close(model.midpoint(x[:1] / 2), x[0] / 2)
        # Opposite points: the sum is 0 and the result must move with it.
        pair = torch.stack((x.detach()[0] / 2, -x.detach()[0] / 2)).requires_grad_()
        middle = model.midpoint(pair)
        assert (middle == 0).all()
        (gradient,) = torch.autograd.grad(middle[0], pair)
        step = torch.zeros_like(pair)
        step[0, 0] = 1e-6
        slope = (model.midpoint(pair + step)[0] - model.midpoint(pair - step)[0]).item() / 2e-6
        assert gradient[0, 0].item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("model", [lorentz, poincare])
@pytest.mark.parametrize("c", C_VALUES)
def test_clip_tangent0(points, model, c):
    v = points.unit(6, 3) * torch.tensor([1e-3, 0.5, 1, 5, 50, 1e30], dtype=torch.float64)[:, None]
    clipped = model.clip_tangent0(v, 1.25, c=c)
    reached = math.sqrt(c) * model.dist0(model.exp_map0(clipped, c=c), c=c)
    depth = math.sqrt(c) * v.norm(dim=-1) * (1 if model is lorentz else 2)
    torch.testing.assert_close(reached, depth.clamp(max=1.25), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.cosine_similarity(clipped, v / v.norm(dim=-1, keepdim=True)), torch.ones(6).double()
    )
    assert (clipped[depth < 1.25] == v[depth < 1.25]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_maps_are_capped(points, dtype):
    cap = {torch.float32: 40, torch.float64: 350}[dtype]
    u = points.unit(4, 8).to(dtype)
    for size in (cap + 1.0, 1e4, 1e18, 1e30):
        v = (u * size).requires_grad_()
        x = lorentz.exp_map0(v)
        assert lorentz.dist0(x).tolist() == pytest.approx([cap] * 4, rel=1e-6)
        (g,) = torch.autograd.grad((x * u).sum(), v)
        assert ((g * u).sum(-1).abs() <= 1e-6 * x.norm(dim=-1) / size).all()
        start = points.at(30, u.double(), 1.0).to(dtype)
        for direction in (v, -v, start * min(size, 1e20)):
            assert (lorentz.dist0(lorentz.exp_map(start, direction)) <= cap * (1 + 1e-6)).all()
        p = poincare.exp_map0(v)
        assert (p.norm(dim=-1) < 1).all()
        assert poincare.check_point(poincare.exp_map(p, -v)) == (True, None)
        assert poincare.dist0(p).isfinite().all()


@pytest.mark.parametrize("model", [lorentz, poincare])
def test_log_map_of_coincident_points(points, model):
    x = (points.unit(3, 4) / 2).requires_grad_()
    y = x.detach().clone().requires_grad_()
    v = model.log_map(x, y, c=0.7)
    assert (v == 0).all()
    jacobian = torch.autograd.functional.jacobian(lambda y: model.log_map(x[0], y, c=0.7), y[0])
    torch.testing.assert_close(jacobian, torch.eye(4, dtype=torch.float64), rtol=1e-12, atol=1e-12)
