"""The scalar functions behind the maps: values and slopes against mpmath on both sides of every threshold."""

import pytest
import torch

from hyper_geom import _numerics as nm

ARGUMENTS = (1e-30, 1e-12, 1e-4, 3e-3, 0.0099999, 0.0100001, 0.04, 0.3, 0.9999, 1.0001)
FUNCTIONS = {
    "asinh_sq": lambda mp, x: mp.asinh(mp.sqrt(x)) ** 2,
    "asinh_sq_slope": lambda mp, x: mp.asinh(mp.sqrt(x)) / mp.sqrt(x * (1 + x)),
    "asinhc": lambda mp, x: mp.asinh(mp.sqrt(x)) / mp.sqrt(x),
    "sinhc": lambda mp, x: mp.sinh(mp.sqrt(x)) / mp.sqrt(x),
    "tanhc": lambda mp, x: mp.tanh(mp.sqrt(x)) / mp.sqrt(x),
    "atanhc": lambda mp, x: mp.atanh(mp.sqrt(x)) / mp.sqrt(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_slopes(oracle, name):
    function, reference, mp = getattr(nm, name), FUNCTIONS[name], oracle.mp
    # sinh multiplies the rounding of its argument by that argument: it stops at t = 6.
    arguments = [x for x in (*ARGUMENTS, 30.0, 1e4) if x < {"atanhc": 1, "sinhc": 40}.get(name, 1e5)]
    for dtype, bound, slope_bound in ((torch.float64, 1e-15, 1e-12), (torch.float32, 4e-7, 1e-4)):
        x = torch.tensor(arguments, dtype=dtype, requires_grad=True)
        value = function(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        for i, stored in enumerate(x.tolist()):
            assert oracle.relative_error(value[i].item(), reference(mp, mp.mpf(stored))) < bound
            # A central difference with 90 digits: its own error is the square of the step.
            step = mp.mpf(stored) * mp.mpf(10) ** -20
            rise = reference(mp, mp.mpf(stored) + step) - reference(mp, mp.mpf(stored) - step)
            assert oracle.relative_error(slope[i].item(), rise / (2 * step)) < slope_bound


@pytest.mark.parametrize("name", FUNCTIONS)
def test_limit_at_zero(name):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = getattr(nm, name)(x)
    (slope,) = torch.autograd.grad(value, x)
    limits = {
        "asinh_sq": (0, 1),
        "asinh_sq_slope": (1, -2 / 3),
        "asinhc": (1, -1 / 6),
        "sinhc": (1, 1 / 6),
        "tanhc": (1, -1 / 3),
        "atanhc": (1, 1 / 3),
    }
    assert (value.item(), slope.item()) == pytest.approx(limits[name])


def test_sinhc_cap():
    x = torch.tensor([4.0, 9.0, 1e8], dtype=torch.float64, requires_grad=True)
    value = nm.sinhc(x, 2.5)
    t = x.detach().sqrt()
    torch.testing.assert_close(value.detach(), t.clamp(max=2.5).sinh() / t)


def test_safe_functions():
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    root = nm.safe_sqrt(x)
    assert root.tolist() == [0, 2]
    assert torch.autograd.grad(root.sum(), x)[0].tolist() == [0, 0.25]
    y = torch.tensor([0.0, 2.0], requires_grad=True)
    ratio = nm.safe_div(x, y)
    assert ratio.tolist() == [0, 2]
    assert [g.tolist() for g in torch.autograd.grad(ratio.sum(), (x, y))] == [[0, 0.5], [0, -1]]
    assert nm.safe_sqrt(torch.tensor(float("nan"))).isnan()
    assert nm.safe_div(torch.tensor(1.0), torch.tensor(float("nan"))).isnan()
