"""Entailment cones: apertures, angles, losses, masks."""

import math
import statistics

import pytest
import torch

import hyper_geom
from hyper_geom import convert as conv
from hyper_geom import entailment_loss, entailment_violation, is_entailed, lorentz, poincare

C_VALUES = (0.1, 0.7, 1.0, 4.0)
X = torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64)
Y = torch.tensor([-0.2, 0.9, 1.1], dtype=torch.float64)


def test_goldens():
    assert lorentz.half_aperture(X, c=0.7).item() == pytest.approx(0.3448565770, abs=1e-9)
    assert lorentz.exterior_angle(X, Y, c=0.7).item() == pytest.approx(2.1302655054, abs=1e-9)
    assert lorentz.pairwise_exterior_angle(X[None], Y[None], c=0.7).item() == pytest.approx(2.1302655054, abs=1e-9)
    for c in C_VALUES:
        x = torch.tensor([math.sinh(1.5) / math.sqrt(c), 0.0], dtype=torch.float64)
        assert lorentz.half_aperture(x, c=c).item() == pytest.approx(0.09407, abs=5e-6)
        inside = torch.tensor([0.2 / math.sqrt(c), 0.0], dtype=torch.float64) * (1 - 1e-12)
        assert lorentz.half_aperture(inside, c=c).item() == math.pi / 2


@pytest.mark.parametrize("c", C_VALUES)
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.0, 3.0])
def test_match_the_oracle(oracle, points, c, radius):
    x, y = points.at(radius, points.unit(4), c), points.at(1.0, points.unit(4), c)
    mx, my, mc = oracle.vec(x), oracle.vec(y), oracle.number(c)
    angle, aperture = oracle.exterior_angle(mx, my, mc), oracle.half_aperture(mx, mc, 0.1)
    assert oracle.relative_error(lorentz.exterior_angle(x, y, c=c).item(), angle) < 1e-13
    assert oracle.relative_error(lorentz.half_aperture(x, c=c).item(), aperture) < 1e-13
    p, q = conv.lorentz_to_poincare(x, c=c), conv.lorentz_to_poincare(y, c=c)
    assert oracle.relative_error(poincare.exterior_angle(p, q, c=c).item(), angle) < 1e-12
    assert oracle.relative_error(poincare.half_aperture(p, c=c).item(), aperture) < 1e-12
    wide = oracle.half_aperture(mx, mc, 0.4)
    assert oracle.relative_error(lorentz.half_aperture(x, c=c, min_radius=0.4).item(), wide) < 1e-13
    for scale in (0.7, 1.2):
        expected = max(0.0, float(angle - scale * wide))
        got = entailment_violation(x, y, c=c, min_radius=0.4, aperture_scale=scale)
        assert got.item() == pytest.approx(expected, abs=1e-12)
        assert is_entailed(x, y, c=c, min_radius=0.4, aperture_scale=scale).item() is (expected == 0)


@pytest.mark.parametrize(
    ("radius", "bounds"), [(0.3, (5e-7, 5e-7, 2e-7)), (3.0, (5e-6, 1e-6, 3e-7))], ids=["near", "far"]
)
def test_exterior_angle_fp32(oracle, points, radius, bounds):
    for theta, bound in zip((0.01, 0.1, 1.0), bounds, strict=True):
        u = points.unit(16, 256)
        x = points.at(radius, u, 1.0)
        v = math.cos(theta) * math.cosh(radius) * u + math.sin(theta) * points.orthogonal(u)
        y = lorentz.exp_map(x, v).float()
        x = x.float()
        got = lorentz.exterior_angle(x, y)
        errors = [
            oracle.relative_error(got[i].item(), oracle.exterior_angle(oracle.vec(x[i]), oracle.vec(y[i]), 1))
            for i in range(16)
        ]
        assert statistics.median(errors) < bound


@pytest.mark.parametrize("gap", [1e-4, 1e-2])
def test_exterior_angle_of_close_points_fp32(oracle, points, gap):
    """The difference of two asinh would leave an error of eps/gap, 6e-4 here."""
    x = points.at(3.0, points.unit(8, 32), 1.0).float()
    v = points.unit(8, 32)
    y = lorentz.exp_map(x.double(), v * gap / lorentz.norm(x, v)[:, None]).float()
    got = lorentz.exterior_angle(x, y)
    for i in range(8):
        assert oracle.relative_error(got[i].item(), oracle.exterior_angle(oracle.vec(x[i]), oracle.vec(y[i]), 1)) < 2e-6


@pytest.mark.parametrize("model", [lorentz, poincare])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_on_the_ray(model, dtype):
    x = torch.tensor([0.4, 0.0, 0.0], dtype=dtype)
    assert model.exterior_angle(x, 2 * x).item() == 0
    for y in (0.5 * x, torch.zeros_like(x), -x):
        assert model.exterior_angle(x, y).item() == pytest.approx(math.pi, rel=1e-6)


@pytest.mark.parametrize("model", [lorentz, poincare])
def test_gradients_are_finite_at_the_edges(model):
    x = torch.tensor([[0.4, 0.0], [0.0, 0.0], [0.4, 0.0], [0.1, 0.0], [0.0, 0.0], [0.2, 0.0]])
    y = torch.tensor([[0.8, 0.0], [0.3, 0.0], [0.4, 0.0], [0.0, 0.0], [0.0, 0.0], [0.1, 0.0]])
    x.requires_grad_()
    y.requires_grad_()
    c = torch.tensor(1.0, requires_grad=True)
    total = model.exterior_angle(x, y, c=c).sum() + model.half_aperture(x, c=c).sum()
    total = total + model.pairwise_exterior_angle(x, y, c=c).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, (x, y, c)))


@pytest.mark.parametrize("model", [lorentz, poincare])
def test_aperture_gradient_is_bounded_and_zero_inside(model):
    c = 0.7
    radii = torch.tensor([0.0, 0.05, 0.199, 0.2 * (1 + 1e-7), 0.2001, 0.25, 1.0], dtype=torch.float64)
    x = torch.zeros(7, 2, dtype=torch.float64)
    x[:, 0] = radii / math.sqrt(c)
    if model is poincare:
        x = conv.lorentz_to_poincare(x, c=c)
    x.requires_grad_()
    (g,) = torch.autograd.grad(model.half_aperture(x, c=c).sum(), x)
    assert (g[:3] == 0).all()
    # d omega = 1/sqrt(max(1-u^2, 1e-4)) du, u = 0.2/(k|x|)
    u = 0.2 / radii
    expected = -((1 - u**2).clamp(min=1e-4) ** -0.5) * 0.2 / radii**2 * math.sqrt(c)
    if model is poincare:
        size = x[:, 0].detach()
        expected = expected * 2 * (1 + c * size**2) / (1 - c * size**2) ** 2
    torch.testing.assert_close(g[3:, 0], expected[3:], rtol=1e-9, atol=0)


@pytest.mark.parametrize("model", ["lorentz", "poincare"])
def test_loss_reductions_and_masks(points, model):
    parent, child = 0.5 * points.unit(6, 3), 0.8 * points.unit(6, 3)
    violation = entailment_violation(parent, child, model=model, c=0.7)
    assert (violation > 0).sum() >= 3
    loop = []
    geometry = getattr(hyper_geom, model)
    for i in range(6):
        phi = geometry.exterior_angle(parent[i], child[i], c=0.7).item()
        loop.append(max(0.0, phi - geometry.half_aperture(parent[i], c=0.7).item()))
    assert violation.tolist() == pytest.approx(loop, abs=1e-15)
    mask = torch.tensor([True, False, True, True, False, False])
    kept = [value for value, keep in zip(loop, mask.tolist(), strict=True) if keep]
    make = lambda **kw: entailment_loss(parent, child, c=0.7, model=model, **kw)  # noqa: E731
    assert make().item() == pytest.approx(sum(loop) / 6)
    assert make(reduction="sum").item() == pytest.approx(sum(loop))
    assert make(mask=mask).item() == pytest.approx(sum(kept) / 3)
    assert make(mask=mask, reduction="sum").item() == pytest.approx(sum(kept))
    assert make(mask=mask, reduction="none").tolist() == pytest.approx(
        [value if keep else 0.0 for value, keep in zip(loop, mask.tolist(), strict=True)]
    )


def test_empty_mask_and_empty_batch():
    x = torch.rand(3, 2, requires_grad=True)
    y = torch.rand(3, 2, requires_grad=True)
    for parent, child, mask in ((x, y, torch.zeros(3, dtype=torch.bool)), (x[:0], y[:0], None)):
        loss = entailment_loss(parent, child, mask=mask)
        assert loss.item() == 0
        for g in torch.autograd.grad(loss, (x, y)):
            assert (g == 0).all()
    assert entailment_violation(x[:0], y[:0]).shape == (0,)


def test_bad_input():
    x = torch.rand(3, 2)
    for bad in (
        {"model": "klein"},
        {"min_radius": 0.0},
        {"min_radius": math.inf},
        {"aperture_scale": -1.0},
        {"c": 0.0},
    ):
        for function in (entailment_loss, entailment_violation, is_entailed):
            with pytest.raises(ValueError, match=next(iter(bad))):
                function(x, x, **bad)
    for model in (lorentz, poincare):
        with pytest.raises(ValueError, match="min_radius"):
            model.half_aperture(x, min_radius=-0.1)
    with pytest.raises(ValueError, match="reduction"):
        entailment_loss(x, x, reduction="max")
    with pytest.raises(TypeError, match="mask"):
        entailment_loss(x, x, mask=torch.ones(3))
    with pytest.raises(ValueError, match="mask"):
        entailment_loss(x, x, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="parent"):
        entailment_loss(x, torch.rand(3, 3))
    with pytest.raises(TypeError, match="child"):
        entailment_loss(x, torch.ones(3, 2, dtype=torch.long))


def test_broadcast(points):
    parent, child = points.unit(4, 1, 3), points.unit(5, 3)
    got = entailment_violation(parent, child)
    assert got.shape == (4, 5)
    assert got[2, 3].item() == pytest.approx(entailment_violation(parent[2, 0], child[3]).item())
    assert is_entailed(parent, child).dtype == torch.bool
