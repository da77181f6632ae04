"""The Poincare ball: agreement with the Lorentz model through `convert`, Moebius laws, the boundary."""

import math

import pytest
import torch

from hyper_geom import convert as conv
from hyper_geom import lorentz, poincare

C_VALUES = (0.1, 0.7, 1.0, 4.0)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def push(x, v, c):
    """Ball tangent vector of the Lorentz tangent vector v at x: the differential of p = x/(1 + sqrt(1 + c|x|^2))."""
    x0 = (1 + c * (x * x).sum(-1, keepdim=True)).sqrt()
    return v / (1 + x0) - x * (c * (x * v).sum(-1, keepdim=True) / x0) / (1 + x0) ** 2


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radius", [0.1, 1.0, 3.0])
def test_equals_lorentz(points, c, radius):
    x, y = points.at(radius, points.unit(4, 5), c), points.at(radius / 2, points.unit(4, 5), c)
    v, w = points.unit(4, 5), points.unit(4, 5)
    p, q = conv.lorentz_to_poincare(x, c=c), conv.lorentz_to_poincare(y, c=c)
    pv, pw = push(x, v, c), push(x, w, c)
    origin = torch.zeros_like(x)
    same = [
        (poincare.dist(p, q, c=c), lorentz.dist(x, y, c=c)),
        (poincare.sq_dist(p, q, c=c), lorentz.sq_dist(x, y, c=c)),
        (poincare.dist0(p, c=c), lorentz.dist0(x, c=c)),
        (poincare.pairwise_dist(p, q, c=c), lorentz.pairwise_dist(x, y, c=c)),
        (poincare.inner(p, pv, pw, c=c), lorentz.inner(x, v, w, c=c)),
        (poincare.norm(p, pv, c=c), lorentz.norm(x, v, c=c)),
        (poincare.half_aperture(p, c=c), lorentz.half_aperture(x, c=c)),
        (poincare.exterior_angle(p, q, c=c), lorentz.exterior_angle(x, y, c=c)),
        (poincare.pairwise_exterior_angle(p, q, c=c), lorentz.pairwise_exterior_angle(x, y, c=c)),
        (poincare.exp_map(p, pv, c=c), conv.lorentz_to_poincare(lorentz.exp_map(x, v, c=c), c=c)),
        (poincare.exp_map0(v / 2, c=c), conv.lorentz_to_poincare(lorentz.exp_map0(v, c=c), c=c)),
        (poincare.log_map(p, q, c=c), push(x, lorentz.log_map(x, y, c=c), c)),
        (poincare.log_map0(p, c=c), lorentz.log_map0(x, c=c) / 2),
        (poincare.parallel_transport(p, q, pv, c=c), push(y, lorentz.parallel_transport(x, y, v, c=c), c)),
        (poincare.parallel_transport0(p, v / 2, c=c), push(x, lorentz.parallel_transport0(x, v, c=c), c)),
        (poincare.parallel_transport0_back(p, pv, c=c), push(origin, lorentz.parallel_transport0_back(x, v, c=c), c)),
        (poincare.geodesic(p, q, 0.3, c=c), conv.lorentz_to_poincare(lorentz.geodesic(x, y, 0.3, c=c), c=c)),
        (poincare.midpoint(p, c=c), conv.lorentz_to_poincare(lorentz.midpoint(x, c=c), c=c)),
        (poincare.tangent0_dist(v / 2, w / 2, c=c), lorentz.tangent0_dist(v, w, c=c)),
        (poincare.tangent0_sq_dist(v / 2, w / 2, c=c), lorentz.tangent0_sq_dist(v, w, c=c)),
        (poincare.clip_tangent0(v / 2, 0.3, c=c), lorentz.clip_tangent0(v, 0.3, c=c) / 2),
        (conv.poincare_to_lorentz(p, c=c), x),
        (conv.klein_to_lorentz(conv.lorentz_to_klein(x, c=c), c=c), x),
        (conv.from_ambient(conv.to_ambient(x, c=c), c=c), x),
        (poincare.dist0(conv.rescale_curvature(p, c, 2.0), c=2.0) * math.sqrt(2 / c), poincare.dist0(p, c=c)),
        (conv.rescale_curvature(x, c_from=c, c_to=3.0), x * math.sqrt(c / 3)),
    ]
    for number, (got, expected) in enumerate(same):
        torch.testing.assert_close(got, expected, **TOLERANCE, msg=lambda m, number=number: f"row {number}: {m}")
    # The gradient of one function on both models.
    xg, pg = x.clone().requires_grad_(), p.clone().requires_grad_()
    (gx,) = torch.autograd.grad(lorentz.dist(xg, y, c=c).sum(), xg)
    (gp,) = torch.autograd.grad(poincare.dist(pg, q, c=c).sum(), pg)
    torch.testing.assert_close(
        push(x, lorentz.egrad2rgrad(x, gx, c=c), c), poincare.egrad2rgrad(p, gp, c=c), rtol=1e-11, atol=1e-12
    )


def test_conversion_goldens():
    ambient = torch.tensor([2.0, 1.0, math.sqrt(2)], dtype=torch.float64)
    p = conv.lorentz_to_poincare(conv.from_ambient(ambient))
    assert p.tolist() == pytest.approx([1 / 3, math.sqrt(2) / 3], abs=1e-15)
    torch.testing.assert_close(conv.to_ambient(conv.from_ambient(ambient)), ambient)
    assert conv.lorentz_to_klein(ambient[1:]).tolist() == pytest.approx([1 / 2, math.sqrt(2) / 2])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is not supported:DeprecationWarning")
def test_jvp_of_the_conversion_at_the_origin():
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda x: conv.lorentz_to_poincare(x), (zero,), (one,))
    assert tangent.tolist() == [0.5, 0.5]


def naive_add(p, q, c):
    """Moebius addition as printed."""
    product, p_sq, q_sq = (p * q).sum(-1, keepdim=True), (p * p).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)
    top = (1 + 2 * c * product + c * q_sq) * p + (1 - c * p_sq) * q
    return top / (1 + 2 * c * product + c * c * p_sq * q_sq)


@pytest.mark.parametrize("c", C_VALUES)
def test_moebius_laws(points, c):
    p, q, r = (0.6 / math.sqrt(c) * points.unit(6, 4) for _ in range(3))
    add = lambda a, b: poincare.mobius_add(a, b, c=c)  # noqa: E731
    torch.testing.assert_close(add(p, q), naive_add(p, q, c), **TOLERANCE)
    torch.testing.assert_close(add(-p, add(p, q)), q, **TOLERANCE)
    assert (add(p, -p) == 0).all()
    assert (add(torch.zeros_like(p), q) == q).all()
    torch.testing.assert_close(
        poincare.gyration(p, q, r, c=c),
        naive_add(-naive_add(p, q, c), naive_add(p, naive_add(q, r, c), c), c),
        **TOLERANCE,
    )
    torch.testing.assert_close(add(p, q), poincare.gyration(p, q, add(q, p), c=c), **TOLERANCE)
    torch.testing.assert_close(add(p, add(q, r)), add(add(p, q), poincare.gyration(p, q, r, c=c)), **TOLERANCE)
    torch.testing.assert_close(poincare.gyration(p, q, r, c=c).norm(dim=-1), r.norm(dim=-1), **TOLERANCE)
    torch.testing.assert_close(poincare.mobius_scalar_mul(2.0, p, c=c), add(p, p), **TOLERANCE)
    torch.testing.assert_close(poincare.mobius_scalar_mul(-1.0, p, c=c), -p, **TOLERANCE)
    s = torch.full((6,), 1.7, dtype=torch.float64)
    halves = poincare.mobius_scalar_mul(s, poincare.mobius_scalar_mul(1 / s, p, c=c), c=c)
    torch.testing.assert_close(halves, p, **TOLERANCE)
    torch.testing.assert_close(
        poincare.dist(p, q, c=c), 2 / math.sqrt(c) * (math.sqrt(c) * add(-p, q).norm(dim=-1)).atanh(), **TOLERANCE
    )
    torch.testing.assert_close(poincare.conformal_factor(p, c=c), 2 / (1 - c * (p * p).sum(-1)), **TOLERANCE)


def test_moebius_add_of_near_opposites_does_not_cancel(oracle):
    p = torch.tensor([0.99, 0.0, 0.0])
    q = torch.tensor([-0.9899, 1e-5, 0.0])
    got = poincare.mobius_add(p, q)
    expected = naive_add(p.double(), q.double(), 1.0)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", C_VALUES)
def test_points_outside_are_reported_and_projected(points, c, dtype):
    u = points.unit(4, 3).to(dtype)
    edge = (1 - 4 * torch.finfo(dtype).eps) / math.sqrt(c)
    for size in (1.0, 1.5, 1e10, 1e30):
        p = u * size / math.sqrt(c)
        ok, reason = poincare.check_point(p * 1.000001, c=c)
        assert not ok
        assert "of 4 points" in reason
        inside = poincare.project(p, c=c)
        assert inside.norm(dim=-1).tolist() == pytest.approx([edge] * 4, rel=1e-6)
        assert poincare.check_point(inside, c=c) == (True, None)
        torch.testing.assert_close(inside, u * edge)
        if size <= 1e10:
            for value in (
                poincare.dist(p, -p, c=c),
                poincare.dist0(p, c=c),
                poincare.exp_map(p, p, c=c),
                poincare.log_map(p, -p, c=c),
                poincare.mobius_add(p, p, c=c),
                conv.poincare_to_lorentz(p, c=c),
                poincare.pairwise_dist(p, p, c=c),
                poincare.half_aperture(p, c=c),
            ):
                assert value.isfinite().all()
    kept = 0.5 * u / math.sqrt(c)
    assert (poincare.project(kept, c=c) == kept).all()
    assert poincare.check_point(kept, c=c) == (True, None)
    assert poincare.check_point(torch.full((3,), math.nan))[0] is False


def test_project_to_a_radius(points):
    p = points.unit(3, 4) * 0.99
    for c in C_VALUES:
        inside = poincare.project(p / math.sqrt(c), 2.0, c=c)
        torch.testing.assert_close(math.sqrt(c) * poincare.dist0(inside, c=c), torch.full((3,), 2.0).double())


def test_gradient_of_a_projected_point_is_tangential(points):
    p = (2 * points.unit(4)).requires_grad_()
    (g,) = torch.autograd.grad(poincare.dist(p, torch.zeros(4, dtype=torch.float64)), p)
    edge = (p.detach() / 2 * (1 - 1e-15)).requires_grad_()
    (inside,) = torch.autograd.grad(poincare.dist(edge, torch.zeros(4, dtype=torch.float64)), edge)
    assert inside.norm() > 1e14
    assert abs((g * p).sum().item()) < 1e-12 * inside.norm()


def test_large_radius_conversion_stays_inside(points):
    for dtype in (torch.float32, torch.float64):
        x = points.at(40, points.unit(5, 6), 0.7).to(dtype)
        p = conv.lorentz_to_poincare(x, c=0.7)
        assert poincare.check_point(p, c=0.7) == (True, None)
        assert conv.poincare_to_lorentz(p, c=0.7).isfinite().all()
        assert conv.klein_to_lorentz(conv.lorentz_to_klein(x, c=0.7), c=0.7).isfinite().all()
