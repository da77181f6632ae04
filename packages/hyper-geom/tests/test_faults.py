"""Faults that were found in use, each with the input that showed it."""

import copy

import numpy as np
import pytest
import torch

from hyper_geom import Curvature, WrappedNormal, convert, entailment_loss, lorentz, poincare

MODELS = {"lorentz": lorentz, "poincare": poincare}


def _at_radius(radius, num=200, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, num, dim, generator=generator, dtype=dtype)
    return lorentz.exp_map0(radius * v / v.norm(dim=-1, keepdim=True))


def test_a_curvature_keeps_its_bounds():
    big, small = Curvature(100.0), Curvature(1.0)
    small.load_state_dict(big.state_dict())
    assert small().item() == pytest.approx(100.0, rel=1e-6)
    assert (small.min, small.max) == (10.0, 1000.0)
    assert copy.deepcopy(small).max == 1000.0
    # In half precision the bounds stay what they are, and states without them still load strictly.
    assert Curvature(0.7).bfloat16().state_dict()["_extra_state"].tolist() == [0.7 / 10, 0.7 * 10]
    old = {"log_c": torch.tensor([0.5])}
    assert small.load_state_dict(old).missing_keys == []
    with pytest.raises(RuntimeError, match="log_c"):
        small.load_state_dict({})


@pytest.mark.parametrize("radius", [30.0, 34.0, 39.0])
def test_log_map_is_finite_far_out(radius):
    x, y = _at_radius(radius)
    v = lorentz.log_map(x, y)
    assert v.isfinite().all()
    exact = lorentz.log_map(x.double(), y.double())
    assert ((v - exact).norm(dim=-1) <= 1e-4 * exact.norm(dim=-1)).all()


def test_round_trips_in_the_frame():
    """exp_map(x, log_map(x, y)) is off by .17 at radius 5 in fp32; in the frame carried from the origin by .001."""
    x, y = _at_radius(5.0)
    u = lorentz.log_map_frame(x, y)
    torch.testing.assert_close(u.norm(dim=-1), lorentz.dist(x, y), rtol=2e-6, atol=0)
    assert lorentz.dist(lorentz.exp_map_frame(x, u), y).max() <= 2e-3
    assert lorentz.dist(lorentz.exp_map(x, lorentz.log_map(x, y)), y).max() >= 2e-2


@pytest.mark.parametrize("c", [0.3, 2.0])
def test_the_frame_is_the_parallel_transport_from_the_origin(c):
    x, y = _at_radius(2.0, dtype=torch.float64)
    u = lorentz.log_map_frame(x, y, c=c)
    expected = lorentz.parallel_transport0_back(x, lorentz.log_map(x, y, c=c), c=c)
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lorentz.exp_map_frame(x, u, c=c), y, rtol=1e-9, atol=1e-11)
    p, q = (convert.lorentz_to_poincare(v, c=c) for v in (x, y))
    torch.testing.assert_close(poincare.log_map_frame(p, q, c=c), u, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(poincare.exp_map_frame(p, u, c=c), q, rtol=1e-9, atol=1e-11)


def test_kinds_of_curvature():
    x = torch.rand(4, 3)
    with pytest.raises(TypeError, match="call it"):
        lorentz.dist0(x, c=Curvature(1.0))
    with pytest.raises(ValueError, match="> 0"):
        lorentz.dist0(x, c=torch.tensor(-1.0))
    with pytest.raises(ValueError, match="> 0"):
        lorentz.dist0(x, c=torch.tensor([1.0, 1.0, -1.0, 1.0]))
    with pytest.raises(TypeError, match=r"c.float\(\)"):
        lorentz.dist0(x, c=torch.tensor(1))
    with pytest.raises(TypeError, match=r"x.float\(\)"):
        lorentz.dist0(torch.ones(3, dtype=torch.long))
    assert torch.equal(lorentz.dist0(x, c=np.float32(0.5)), lorentz.dist0(x, c=0.5))
    assert lorentz.dist0(x, c=torch.tensor(float("nan"))).isnan().all()


def test_half_precision_on_the_rim():
    p = poincare.exp_map0(torch.tensor([[3.0, 0.5], [0.2, 4.0]])).bfloat16()
    law = WrappedNormal(p, 0.5, c=1.0, model="poincare", validate_args=True)
    assert law.loc.isfinite().all()
    assert law.log_prob(p).isfinite().all()
    inside = torch.full((64,), 0.1245).bfloat16()  # |p| = .996: in bf16 its square sums to 1
    assert WrappedNormal(inside, 0.5, c=1.0, model="poincare", validate_args=True).loc.shape == (64,)
    with pytest.raises(ValueError, match="loc"):
        WrappedNormal(torch.tensor([1.0, 0.2]), 0.5, c=1.0, model="poincare", validate_args=True)


@pytest.mark.parametrize("model", MODELS)
def test_weights_and_masks_broadcast(model):
    x = 0.3 * torch.rand(5, 4, 3, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    expected = MODELS[model].midpoint(x, weights.expand(5, 4))
    assert torch.equal(MODELS[model].midpoint(x, weights), expected)
    with pytest.raises(ValueError, match="weights"):
        MODELS[model].midpoint(x[0], torch.ones(2, 4, dtype=torch.float64))
    parent, child = x, x.flip(0)
    keep = torch.tensor([True, False, True, True])
    for reduction in ("mean", "sum", "none"):
        got = entailment_loss(parent, child, mask=keep, reduction=reduction, model=model)
        assert torch.equal(
            got, entailment_loss(parent, child, mask=keep.expand(5, 4), reduction=reduction, model=model)
        )


def test_one_curvature_for_each_row(geometry_call):
    """Rows of several curvatures at once equal one call for each, gradients of c included."""
    tensors = geometry_call.tensors(batch=(3,), scale=0.3)
    if not geometry_call.has_c:
        assert geometry_call.function(tensors[0], torch.tensor([0.5, 1.0, 2.0]), 1.0).shape == tensors[0].shape
        return
    options = {"reduction": "none"} if geometry_call.name == "cones.entailment_loss" else {}
    c = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
    got = geometry_call(*tensors, c=c, **options)
    rows = [geometry_call(*(x[i] for x in tensors), c=c[i], **options) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(rows), rtol=1e-11, atol=1e-13)
    if geometry_call.name != "convert.from_ambient":
        weight = torch.randn(got.shape, dtype=torch.float64)
        (a,) = torch.autograd.grad((weight * got).sum(), c)
        (b,) = torch.autograd.grad((weight * torch.stack(rows)).sum(), c)
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="c must"):
        geometry_call(*tensors, c=torch.ones(2, 3))


@pytest.mark.parametrize("model", MODELS)
def test_wrapped_normals_of_several_curvatures(model):
    loc, value = 0.2 * torch.rand(2, 3, 4, dtype=torch.float64)
    c = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
    law = WrappedNormal(loc, 0.7, c=c, model=model)
    one = [WrappedNormal(loc[i], 0.7, c=c[i], model=model).log_prob(value[i]) for i in range(3)]
    torch.testing.assert_close(law.log_prob(value), torch.stack(one), rtol=1e-12, atol=0)
    assert law.expand((2, 3)).rsample((5,)).shape == (5, 2, 3, 4)
    assert WrappedNormal(loc[0], 0.7, c=c, model=model).batch_shape == (3,)
    with pytest.raises(ValueError, match="c must"):
        WrappedNormal(loc, 0.7, c=torch.ones(2), model=model)
