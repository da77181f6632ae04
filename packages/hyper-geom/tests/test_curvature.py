"""The learnable curvature: value, bounds, gradient rule, module behaviour."""

import copy
import io
import math
import pickle

import pytest
import torch

from hyper_geom import Curvature, lorentz


@pytest.mark.parametrize("value", [0.01, 0.1, 0.7, 1.0, 2.0, 4.0, 30.0])
def test_value(value):
    c = Curvature(value)
    assert c().shape == ()
    assert c().item() == pytest.approx(value, rel=3e-7)
    assert c.double()().dtype == torch.float64
    assert Curvature(1.0)().item() == 1.0
    assert c.log_c.shape == (1,)


def test_fixed_curvature_is_a_buffer():
    c = Curvature(0.7, learnable=False)
    assert list(c.parameters()) == []
    assert "log_c" in c.state_dict()
    assert not c().requires_grad


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("value", [0.7, 1.0])
def test_huge_steps_stay_in_range_and_come_back(direction, value):
    c = Curvature(value)
    optimizer = torch.optim.SGD(c.parameters(), lr=10)
    low, high = value / 10 * (1 - 1e-6), value * 10 * (1 + 1e-6)
    for _ in range(50):
        optimizer.zero_grad()
        (direction * c()).backward()
        optimizer.step()
        assert low <= c().item() <= high
    bound = low if direction > 0 else high
    assert c().item() == pytest.approx(bound, rel=1e-5)
    # Pushing further out: no gradient. Pulling back in: the full gradient, and within a few steps c is inside again.
    optimizer.zero_grad()
    (direction * c()).backward()
    assert c.log_c.grad.item() == 0
    optimizer.zero_grad()
    (-direction * c()).backward()
    assert c.log_c.grad.item() == pytest.approx(-direction * c().item())
    optimizer = torch.optim.SGD(c.parameters(), lr=0.1)
    for _ in range(5000):
        optimizer.zero_grad()
        (-direction * c()).backward()
        optimizer.step()
        if low * 1.01 < c().item() < high * 0.99:
            break
    else:
        pytest.fail("c stayed at the bound")


def test_gradient_at_the_bound_after_clamp():
    c = Curvature(1.0)
    with torch.no_grad():
        c.log_c.fill_(7.0)
    assert c.clamp_() is c
    assert c.log_c.item() == pytest.approx(math.log(10))
    c().backward()
    assert c.log_c.grad.item() == pytest.approx(10)


def test_inside_the_gradient_is_c():
    c = Curvature(0.7).double()
    assert torch.autograd.gradcheck(lambda p: torch.func.functional_call(c, {"log_c": p}, ()), (c.log_c,))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"value": 0.0},
        {"value": -1.0},
        {"value": math.nan},
        {"value": math.inf},
        {"value": 1.0, "min": 1.0},
        {"value": 1.0, "max": 1.0},
        {"value": 1.0, "min": 2.0},
        {"value": 1.0, "max": 0.5},
        {"value": 1.0, "min": 0.0},
        {"value": 1.0, "max": math.inf},
    ],
)
def test_bad_values(kwargs):
    with pytest.raises(ValueError, match="min|value|max"):
        Curvature(**kwargs)


def test_custom_bounds():
    c = Curvature(1.0, min=0.5, max=1.5)
    with torch.no_grad():
        c.log_c.fill_(5.0)
    assert c().item() == pytest.approx(1.5)
    assert "min=0.5" in repr(c)


def test_copies():
    c = Curvature(0.7, min=0.3)
    for other in (copy.deepcopy(c), pickle.loads(pickle.dumps(c))):
        assert other().item() == c().item()
        assert (other.min, other.max) == (c.min, c.max)
    buffer = io.BytesIO()
    torch.save(c.state_dict(), buffer)
    buffer.seek(0)
    fresh = Curvature(1.0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert fresh().item() == pytest.approx(0.7)


def test_half_module_computes_in_fp32():
    c = Curvature(0.7).bfloat16()
    assert c().dtype == torch.float32
    assert c().item() == pytest.approx(0.7, rel=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Curvature(0.7)().item() == pytest.approx(0.7, rel=1e-6)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_fully_shard_accepts_it(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = Curvature(0.7)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        x, y = torch.rand(4, 3), torch.rand(4, 3)
        value = module()
        assert value.item() == pytest.approx(0.7)
        lorentz.dist(x, y, c=value).sum().backward()
        before = value.item()
        optimizer.step()
        assert module().item() != before
    finally:
        torch.distributed.destroy_process_group()
