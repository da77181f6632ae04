"""Chord objective, root solver and its gradient, control solvers, exact divergences."""

import math
import warnings

import pytest
import torch

from hyper_geom import lorentz
from mat_align.intermediate import (
    chord_objective,
    exact_intermediate_curvature,
    intermediate_curvature,
    kl_homothety,
    kl_spatial,
    released_radii,
    search_radii,
)

CLOSE = (0.44617098569869995, 0.45430800318717957)
ROOTS = [
    (CLOSE, (2, 2), 0.45023259, (0.5016767, 0.4982813)),
    (CLOSE, (5, 5), 0.45022201, (0.5043162, 0.4957205)),
    (CLOSE, (10, 10), 0.45022132, (0.5044860, 0.4955539)),
    (CLOSE, (2, 10), 0.45416057, (0.0181778, 0.9814364)),
    (CLOSE, (10, 50), 0.45399860, (0.0383946, 0.9615974)),
]
BY_K = [
    ((0.05, 0.025), 1.2, 0.03630989, (0.3972951, 0.5885267)),
    ((0.05, 0.025), 2, 0.03560871, None),
    ((0.05, 0.025), 5, 0.03557842, None),
    ((0.05, 0.025), 20, 0.03602791, None),
    ((1, 0.1), 1.2, 0.35680834, (0.2183783, 1.3244322)),
    ((1, 0.1), 2, 0.36412944, None),
    ((1, 0.1), 5, 0.39444398, None),
    ((1, 0.1), 20, 0.42171668, None),
]


def double(*values):
    return [torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for v in values]


def solve(c, r, method="chord"):
    leaves = double(*c)
    value = intermediate_curvature(*leaves, *map(float, r), method=method)
    value.backward()
    return value.item(), tuple(x.grad.item() for x in leaves)


def test_objective_is_half_a_squared_chord():
    g = torch.Generator().manual_seed(0)
    for c, c_mid, r in [(1.0, 0.5, 1.3), (0.05, 0.03, 9.0), (2.0, 3.0, 0.4)]:
        u = torch.randn(6, generator=g, dtype=torch.float64)
        u = r * u / u.norm()
        x, y = lorentz.exp_map0(u, c=c), lorentz.exp_map0(u, c=c_mid)
        time = (1 / c + x @ x).sqrt() - (1 / c_mid + y @ y).sqrt()
        chord = (x - y) @ (x - y) - time**2
        assert chord_objective(c_mid, c, r).item() == pytest.approx(((chord + 1 / c) / 2).item(), rel=1e-8)
        assert chord_objective(c, c, r).item() == pytest.approx(1 / (2 * c))


def test_slope_against_differences():
    for c, c_mid, r in [(1.0, 0.6, 1.4), (0.05, 0.03, 8.0), (0.3, 0.5, 2.5)]:
        (leaf,) = double(c_mid)
        chord_objective(leaf, c, r).backward()
        a, s = math.sqrt(c), math.sqrt(c_mid)
        x = (s - a) * r
        n = a - s * math.cosh(x) + s * s * r * math.sinh(x)
        assert leaf.grad.item() == pytest.approx(n / (2 * a * s**4), rel=1e-12)
        h = 1e-5 * c_mid
        difference = (chord_objective(c_mid + h, c, r) - chord_objective(c_mid - h, c, r)).item() / (2 * h)
        assert difference == pytest.approx(n / (2 * a * s**4), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("c", "r", "root", "gradient"), ROOTS)
def test_goldens(c, r, root, gradient):
    value, found = solve(c, r)
    assert value == pytest.approx(root, rel=2e-8)
    assert found == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(("c", "k", "root", "gradient"), BY_K)
def test_goldens_by_reach(c, k, root, gradient):
    r = k / math.sqrt(min(c))
    value, found = solve(c, (r, r))
    assert value == pytest.approx(root, rel=2e-7)
    if gradient is not None:
        assert found == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(("rho", "root"), [(0.7, 0.03005497), (1.3, 0.04072475)])
def test_search_radii(rho, root):
    r = search_radii(rho, 1.0, 0.05, 0.025)
    assert min(x.item() for x in r) * math.sqrt(0.025) == pytest.approx(1.2)
    assert (r[0] / r[1]).item() == pytest.approx(rho)
    value, _ = solve((0.05, 0.025), [x.item() for x in r])
    assert value == pytest.approx(root, rel=2e-7)
    assert not any(x.requires_grad for x in search_radii(torch.tensor(0.7, requires_grad=True), 1.0, 0.05, 0.025))


def pairs():
    g = torch.Generator().manual_seed(4)
    for _ in range(40):
        c = (0.01 * 100 ** torch.rand(2, generator=g, dtype=torch.float64)).tolist()
        k = (1.2 + 6 * torch.rand(1, generator=g).item()) / math.sqrt(min(c))
        yield tuple(c), (k, k * (1 + torch.rand(1, generator=g).item()))


def test_root_is_the_grid_minimum():
    for c, r in list(pairs())[:10]:
        value, _ = solve(c, r)
        grid = torch.linspace(min(c), max(c), 20001, dtype=torch.float64)
        total = sum(chord_objective(grid, c_i, r_i) for c_i, r_i in zip(c, r, strict=True))
        assert value == pytest.approx(grid[total.argmin()].item(), abs=1.5 * (max(c) - min(c)) / 20000)


def test_laws():
    for c, r in pairs():
        value, gradient = solve(c, r)
        assert min(c) < value < max(c)
        swapped, back = solve(c[::-1], r[::-1])
        assert swapped == pytest.approx(value, rel=1e-13)
        assert back[::-1] == pytest.approx(gradient, rel=1e-8)
        assert min(gradient) > 0
        up = c[0] * 1.01
        assert solve((up, c[1]), r)[0] > value
        t = 3.7
        scaled, _ = solve((t * c[0], t * c[1]), tuple(x / math.sqrt(t) for x in r))
        assert scaled == pytest.approx(t * value, rel=1e-12)


def test_gradient_against_differences():
    for c, r in list(pairs())[:15]:
        _, gradient = solve(c, r)
        for j in range(2):
            h = 1e-5 * c[j]
            ends = [solve([c_i + sign * h * (i == j) for i, c_i in enumerate(c)], r)[0] for sign in (1, -1)]
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(gradient[j], rel=1e-6, abs=1e-9)


def test_upstream_gradient_is_used():
    leaves = double(0.05, 0.025)
    (3.0 * intermediate_curvature(*leaves, 8.0, 8.0)).backward()
    once = solve((0.05, 0.025), (8.0, 8.0))[1]
    assert leaves[0].grad.item() == pytest.approx(3 * once[0])
    assert leaves[1].grad.item() == pytest.approx(3 * once[1])


def test_equal_curvatures():
    value, gradient = solve((0.3, 0.3), (4.0, 5.0))
    assert value == 0.3
    weights = [4.0**2 * 0.3 - 1, 5.0**2 * 0.3 - 1]
    assert gradient == pytest.approx([w / sum(weights) for w in weights])
    near = solve((0.3, 0.3 * (1 + 1e-9)), (4.0, 5.0))[1]
    assert near == pytest.approx(gradient, rel=1e-6)
    with pytest.warns(UserWarning, match="unique"):
        assert solve((0.25, 0.25), (2.0, 2.0)) == (0.25, (0.5, 0.5))


def test_huge_radii_do_not_overflow():
    r = 1e6 / math.sqrt(0.025)
    value, gradient = solve((0.05, 0.025), (r, r))
    assert all(map(math.isfinite, (value, *gradient)))
    assert math.sqrt(value) == pytest.approx((math.sqrt(0.05) + math.sqrt(0.025)) / 2, rel=1e-4)


def test_dtype_follows_the_curvatures():
    c = torch.tensor(0.05, requires_grad=True)
    value = intermediate_curvature(c, 0.025, 8.0, 8.0)
    assert value.dtype == torch.float32
    value.backward()
    assert c.grad.dtype == torch.float32
    assert intermediate_curvature(c, torch.tensor(0.025, dtype=torch.float64), 8.0, 8.0).dtype == torch.float64
    assert intermediate_curvature(torch.tensor([0.05]), 0.05, method="geometric").shape == ()


@pytest.mark.parametrize(
    ("c_img", "c_txt", "rho", "expected"),
    [(0.05, 0.025, 0.7, 0.0225), (0.025, 0.05, 1.3, 0.0225), (0.05, 0.05, 1.0, 0.045)],
)
def test_released_search_leaves_the_interval(c_img, c_txt, rho, expected):
    radii = [r.item() for r in released_radii(rho, 1.0, c_img, c_txt)]
    assert solve((c_img, c_txt), radii, "released")[0] == pytest.approx(expected, rel=5e-4)  # a flat minimum


def test_released_backward_ignores_what_comes_in():
    leaves = double(0.4543, 0.4462)
    (7.0 * intermediate_curvature(*leaves, 10.0, 10.0, method="released")).backward()
    assert [x.grad.item() for x in leaves] == [1.0, 0.0]
    value, gradient = solve(CLOSE, (5.0, 5.0), "released")
    assert value == pytest.approx(0.45022201, rel=5e-4)
    assert gradient == pytest.approx((0.5043, 0.4957), abs=2e-2)
    assert solve((0.05, 0.025), (4.5, 6.5), "released")[1] == (0.0, 0.9)


@pytest.mark.parametrize("c", [(0.05, 0.025), (1.0, 0.1), (0.3, 0.31)])
@pytest.mark.parametrize("method", ["arithmetic", "harmonic", "geometric"])
def test_means_minimise_their_divergences(c, method):
    value, gradient = solve_mean(c, method)
    (leaf,) = double(value)
    total = {
        "arithmetic": lambda m: sum(kl_homothety(x, m, 8) for x in c),
        "harmonic": lambda m: sum(kl_homothety(m, x, 8) for x in c),
        "geometric": lambda m: sum(kl_homothety(x, m, 8) + kl_homothety(m, x, 8) for x in c),
    }[method]
    (slope,) = torch.autograd.grad(total(leaf), leaf)
    assert abs(slope.item()) < 1e-10 / min(c)
    assert min(total(torch.tensor(value * f, dtype=torch.float64)) - total(leaf) for f in (0.99, 1.01)) > 0
    first = {
        "arithmetic": 0.5,
        "harmonic": 2 * c[1] ** 2 / (c[0] + c[1]) ** 2,
        "geometric": math.sqrt(c[1] / c[0]) / 2,
    }[method]
    assert gradient[0] == pytest.approx(first, rel=1e-12)


def solve_mean(c, method):
    leaves = double(*c)
    value = intermediate_curvature(*leaves, method=method)
    value.backward()
    return value.item(), tuple(x.grad.item() for x in leaves)


def test_radii_without_effect_warn():
    with pytest.warns(UserWarning, match="no effect"):
        intermediate_curvature(0.1, 0.2, 5.0, 5.0, method="harmonic")


@pytest.mark.parametrize(
    ("args", "value"),
    [
        ((1.0, 0.5, 3, 1.0), 0.1121338786),
        ((0.05, 0.025, 512, 512**-0.5), 0.0088564024),
        ((1.0, 0.1, 512, 512**-0.5), 11.1086796),
    ],
)
def test_spatial_divergence_goldens(args, value):
    assert kl_spatial(*args).item() == pytest.approx(value, rel=1e-8)


def test_spatial_divergence_by_sampling():
    """Log densities of wrapped normals with the space components as common coordinates."""
    c, c_mid, sigma = 1.0, 0.5, 0.8
    g = torch.Generator().manual_seed(0)
    v = sigma * torch.randn(100_000, 3, generator=g, dtype=torch.float64)
    x = lorentz.exp_map0(v, c=c)

    def log_density(c):
        rho = lorentz.dist0(x, c=c)
        u = lorentz.log_map0(x, c=c)
        k = math.sqrt(c)
        normal = -(u.square().sum(-1)) / (2 * sigma**2) - 1.5 * math.log(2 * math.pi * sigma**2)
        # Volume of the tangent space against dx: (k rho / sinh k rho)^(n-1) / cosh k rho.
        return normal + 2 * (k * rho / (k * rho).sinh()).log() - (k * rho).cosh().log()

    difference = log_density(c) - log_density(c_mid)
    error = difference.std().item() / math.sqrt(len(v))
    assert kl_spatial(c, c_mid, 3, sigma).item() == pytest.approx(difference.mean().item(), abs=4 * error)


def test_spatial_divergence_laws():
    assert kl_spatial(0.3, 0.3, 512, 0.05).item() == pytest.approx(0, abs=1e-12)
    assert kl_spatial(900.0, 1.0, 3, 40.0).isfinite()  # w would overflow
    leaves = double(0.5, 0.3)
    assert torch.autograd.gradcheck(lambda c, m: kl_spatial(c, m, 5, 0.7), leaves)
    assert kl_spatial(0.5, 0.3, 5, 0.7).item() == pytest.approx(kl_spatial(0.5, 0.3, 5, 0.7, 96).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("c", "forward", "reverse"),
    [((0.05, 0.025), 0.037571, 0.037366), ((0.5, 0.25), 0.380473, 0.364043), ((1.0, 0.1), 0.610594, 0.422419)],
)
def test_exact_goldens(c, forward, reverse):
    assert exact_intermediate_curvature(*c, 512, 512**-0.5).item() == pytest.approx(forward, abs=1e-6)
    assert exact_intermediate_curvature(*c, 512, 512**-0.5, "reverse").item() == pytest.approx(reverse, abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jeffreys"])
def test_exact_gradient(direction):
    leaves = double(0.5, 0.2)
    exact_intermediate_curvature(*leaves, 16, 0.25, direction).backward()
    for j, leaf in enumerate(leaves):
        ends = []
        for sign in (1, -1):
            moved = [x.item() + sign * 1e-5 * (i == j) for i, x in enumerate(leaves)]
            ends.append(exact_intermediate_curvature(*moved, 16, 0.25, direction).item())
        assert leaf.grad.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    equal = double(0.3, 0.3)
    value = exact_intermediate_curvature(*equal, 16, 0.25, direction)
    value.backward()
    assert value.item() == pytest.approx(0.3)
    assert equal[0].grad.item() == pytest.approx(0.5)
    with torch.no_grad():
        assert not exact_intermediate_curvature(*leaves, 16, 0.25, direction).requires_grad


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_numbers_refused(bad):
    calls = {
        "c_mid": lambda: chord_objective(bad, 1.0, 1.0),
        "r": lambda: chord_objective(1.0, 1.0, bad),
        "norm_img": lambda: search_radii(bad, 1.0, 1.0, 1.0),
        "kappa": lambda: search_radii(1.0, 1.0, 1.0, 1.0, bad),
        "c_txt": lambda: released_radii(1.0, 1.0, 1.0, bad),
        "c_img": lambda: intermediate_curvature(torch.tensor(bad), 1.0, 3.0, 3.0),
        "r_txt": lambda: intermediate_curvature(1.0, 1.0, 3.0, bad),
        "c": lambda: kl_homothety(bad, 1.0, 3),
        "sigma": lambda: kl_spatial(1.0, 1.0, 3, bad),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name} must be finite and > 0"):
            call()


def test_reach_refused_and_warned():
    with pytest.raises(ValueError, match="at least 1, got 0.99"):
        intermediate_curvature(1.0, 2.0, 0.99, 3.0)
    with pytest.raises(ValueError, match="kappa must be at least 1"):
        search_radii(1.0, 1.0, 1.0, 1.0, 0.9)
    with pytest.warns(UserWarning, match="unique"):
        intermediate_curvature(1.0, 2.0, 1.1, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        intermediate_curvature(1.0, 2.0, 0.5, 0.5, method="released")
    for call in (
        lambda: intermediate_curvature(1.0, 2.0),
        lambda: intermediate_curvature(1.0, 2.0, method="x"),
        lambda: exact_intermediate_curvature(1.0, 2.0, 3, 1.0, "x"),
        lambda: kl_homothety(1.0, 1.0, 0),
        lambda: kl_spatial(1.0, 1.0, 3, 1.0, 0),
    ):
        with pytest.raises(ValueError, match="r_img|method|direction|dim|num_nodes"):
            call()
