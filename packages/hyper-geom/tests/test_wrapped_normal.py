"""WrappedNormal against an mpmath oracle, against quadrature of its own density, and as a torch distribution."""

import copy
import math
import pickle

import mpmath
import pytest
import torch
from torch.distributions import Distribution, Independent, constraints

from hyper_geom import convert, lorentz
from hyper_geom.wrapped_normal import WrappedNormal, _log_sinhc_of_square


@pytest.fixture(autouse=True)
def checked_by_default():
    """torch.compile turns the default off for the whole process, and other tests may have compiled before."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


CURVATURES = (0.1, 0.7, 1.0, 4.0)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def random_points(shape, c, radius=1.5, dtype=torch.float64):
    v = torch.randn(shape, dtype=torch.float64)
    return lorentz.exp_map0(v * (radius / math.sqrt(c * shape[-1])), c=c).to(dtype)


def random_tril(dim, dtype=torch.float64):
    return (torch.tril(torch.randn(dim, dim), -1) * 0.3 + torch.diag(0.4 + torch.rand(dim))).to(dtype)


def oracle_log_prob(loc, value, covariance, c):
    """60-digit log density: ambient logarithm, ambient transport, Gaussian and change of volume, by definition."""
    with mpmath.workdps(60):
        c = mpmath.mpf(c)
        k, dim = mpmath.sqrt(c), len(loc)

        def ambient(x):
            x = [mpmath.mpf(float(value)) for value in x]
            return [mpmath.sqrt(1 / c + sum(value**2 for value in x)), *x]

        def inner(a, b):
            return -a[0] * b[0] + sum(p * q for p, q in zip(a[1:], b[1:], strict=True))

        x, y, origin = ambient(loc), ambient(value), ambient([0.0] * dim)
        cosh = -c * inner(x, y)
        distance = mpmath.acosh(max(cosh, 1)) / k
        if distance == 0:
            w = [mpmath.mpf(0)] * (dim + 1)
        else:
            factor = k * distance / mpmath.sinh(k * distance)
            v = [factor * (b - cosh * a) for a, b in zip(x, y, strict=True)]
            # PT_{x -> o} v = v + c <o, v> / (1 - c <x, o>) (x + o)
            shift = c * inner(origin, v) / (1 - c * inner(x, origin))
            w = [value + shift * (a + o) for value, a, o in zip(v, x, origin, strict=True)]
        sigma = mpmath.matrix(covariance.double().tolist())
        u = mpmath.matrix(w[1:])
        quadratic = (u.T * mpmath.lu_solve(sigma, u))[0]
        log_normal = -(quadratic + mpmath.log(mpmath.det(sigma)) + dim * mpmath.log(2 * mpmath.pi)) / 2
        t = k * distance
        return float(log_normal - (dim - 1) * (mpmath.log(mpmath.sinh(t) / t) if t else 0))


def test_golden():
    x = torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64)
    y = torch.tensor([-0.2, 0.9, 1.1], dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for law in (
        WrappedNormal(x, scale, c=0.7),
        WrappedNormal(x, scale_tril=torch.diag(scale), c=torch.tensor([0.7], dtype=torch.float64)),
    ):
        assert law.log_prob(y).item() == pytest.approx(-4.5005484836, abs=1e-9)


def test_golden_volume_term():
    # Ten dimensions, one unit from the centre: the density is the Gaussian's times exp(-9 L(1)), 9 L(1) = 1.45.
    at = lorentz.exp_map0(torch.tensor([1.0] + 9 * [0.0], dtype=torch.float64))
    gaussian = -0.5 - 5 * math.log(2 * math.pi)
    got = gaussian - WrappedNormal(torch.zeros(10, dtype=torch.float64), 1.0).log_prob(at).item()
    assert got == pytest.approx(9 * math.log(math.sinh(1.0)), abs=1e-12)
    assert got == pytest.approx(1.45, abs=5e-3)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_log_prob_equals_the_oracle(c, dim):
    loc, value = random_points((3, dim), c), random_points((3, dim), c)
    value[0] = loc[0]
    scale, tril = 0.3 + torch.rand(dim, dtype=torch.float64), random_tril(dim)
    for law, covariance in (
        (WrappedNormal(loc, scale, c=c), torch.diag(scale**2)),
        (WrappedNormal(loc, scale_tril=tril, c=c), tril @ tril.T),
    ):
        for got, mean, at in zip(law.log_prob(value), loc, value, strict=True):
            assert got.item() == pytest.approx(oracle_log_prob(mean, at, covariance, c), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_inputs_are_computed_in_fp32(dtype, autocast):
    c, dim = 0.7, 8
    loc, value = random_points((4, dim), c, dtype=dtype), random_points((4, dim), c, dtype=dtype)
    tril = random_tril(dim, dtype)
    wide = WrappedNormal(loc.double(), scale_tril=tril.double(), c=c).log_prob(value.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        law = WrappedNormal(loc, scale_tril=tril, c=c)
        got, drawn = law.log_prob(value), law.rsample((2,))
    assert got.dtype == drawn.dtype == torch.float32
    assert torch.allclose(got.double(), wide, rtol=2e-5)
    assert torch.equal(loc, loc.clone())


def test_samples_do_not_lose_precision_under_autocast():
    law = WrappedNormal(torch.zeros(3), scale_tril=random_tril(3, torch.float32))
    torch.manual_seed(1)
    plain = law.sample((50,))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(law.sample((50,)), plain)


def quadrature(c, num_radii=400, num_angles=256, reach=9.0):
    """Nodes (m 2) of H^2 in Lorentz coordinates and their weights in Riemannian volume, polar about the origin."""
    k = math.sqrt(c)
    edges = torch.linspace(0, reach, num_radii + 1, dtype=torch.float64)
    radius = (edges[1:] + edges[:-1]) / 2  # midpoint rule
    angle = torch.arange(num_angles, dtype=torch.float64) * (2 * math.pi / num_angles)
    direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
    nodes = (torch.sinh(k * radius) / k)[:, None, None] * direction
    weights = (torch.sinh(k * radius) / k * (reach / num_radii))[:, None] * (2 * math.pi / num_angles)
    return nodes, weights.expand(num_radii, num_angles)


@pytest.mark.parametrize("model", ["lorentz", "poincare"])
@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
def test_integrates_to_one(c, model):
    tril = torch.tensor([[0.6, 0.0], [0.3, 0.4]], dtype=torch.float64)
    loc = torch.tensor([0.5, -0.3], dtype=torch.float64) / math.sqrt(c)
    nodes, weights = quadrature(c, reach=5.0)
    if model == "poincare":
        loc, nodes = convert.lorentz_to_poincare(loc, c=c), convert.lorentz_to_poincare(nodes, c=c)
    law = WrappedNormal(loc, scale_tril=tril, c=c, model=model)
    assert (law.log_prob(nodes).exp() * weights).sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("model", ["lorentz", "poincare"])
@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
def test_histogram_of_samples_matches_the_density(c, model):
    num_samples, rings, sectors, reach = 100_000, 6, 8, 3.0
    tril = torch.tensor([[0.6, 0.0], [0.3, 0.4]], dtype=torch.float64)
    loc = torch.tensor([0.5, -0.3], dtype=torch.float64) / math.sqrt(c)
    law = WrappedNormal(loc, scale_tril=tril, c=c)
    nodes, weights = quadrature(c, 240, 256, reach)
    mass = (law.log_prob(nodes).exp() * weights).reshape(rings, 40, sectors, 32).sum(dim=(1, 3))
    if model == "poincare":
        law = WrappedNormal(convert.lorentz_to_poincare(loc, c=c), scale_tril=tril, c=c, model=model)
    drawn = law.sample((num_samples,))
    if model == "poincare":
        drawn = convert.poincare_to_lorentz(drawn, c=c)
    radius = lorentz.dist0(drawn, c=c)
    # Nodes sit at multiples of the angle step: a sector begins half a step before its first node.
    angle = (torch.atan2(drawn[:, 1], drawn[:, 0]) + math.pi / 256) % (2 * math.pi)
    ring, sector = (radius / (reach / rings)).long(), (angle / (2 * math.pi / sectors)).long()
    inside = ring < rings
    counts = torch.bincount((ring * sectors + sector.clamp(max=sectors - 1))[inside], minlength=rings * sectors)
    expected = mass.flatten() * num_samples
    kept = expected > 5
    chi_square = ((counts - expected).square() / expected)[kept].sum().item()
    degrees = int(kept.sum())
    # Five standard deviations of a chi-square variable.
    assert degrees > 20
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("model", ["lorentz", "poincare"])
def test_scale_is_the_standard_deviation_in_geodesic_units(c, model):
    scale = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    loc = random_points((3,), c)
    start = loc if model == "lorentz" else convert.lorentz_to_poincare(loc, c=c)
    drawn = WrappedNormal(start, scale, c=c, model=model).sample((20_000,))
    if model == "poincare":
        drawn = convert.poincare_to_lorentz(drawn, c=c)
    w = lorentz.parallel_transport0_back(loc, lorentz.log_map(loc, drawn, c=c), c=c)
    assert torch.allclose(w.std(dim=0), scale, rtol=0.03)
    assert torch.allclose(w.mean(dim=0), torch.zeros(3, dtype=torch.float64), atol=0.03)
    squared = lorentz.sq_dist(loc, drawn, c=c).mean()
    assert squared.item() == pytest.approx(scale.square().sum().item(), rel=0.05)


@pytest.mark.parametrize("c", CURVATURES)
def test_both_models_share_one_law(c):
    loc, value = random_points((4, 3), c), random_points((4, 3), c)
    to_ball = convert.lorentz_to_poincare
    for spread in ({"scale": torch.tensor([0.2, 0.5, 1.0])}, {"scale_tril": random_tril(3)}):
        flat = WrappedNormal(loc, c=c, **spread)
        ball = WrappedNormal(to_ball(loc, c=c), c=c, model="poincare", **spread)
        assert torch.allclose(flat.log_prob(value), ball.log_prob(to_ball(value, c=c)), rtol=1e-11)
        torch.manual_seed(3)
        ours = flat.rsample((5,))
        torch.manual_seed(3)
        assert torch.allclose(to_ball(ours, c=c), ball.rsample((5,)), rtol=1e-9)


@pytest.mark.parametrize("t", [0.5, 3.0])
def test_scaling_shifts_the_log_density_by_its_dimension(t):
    loc, value, scale = random_points((3, 4), 0.7), random_points((3, 4), 0.7), torch.rand(4).double() + 0.2
    base = WrappedNormal(loc, scale, c=0.7).log_prob(value)
    scaled = WrappedNormal(t * loc, t * scale, c=0.7 / t**2).log_prob(t * value)
    assert torch.allclose(scaled, base - 4 * math.log(t), rtol=1e-12)


@pytest.mark.parametrize("model", ["lorentz", "poincare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_location(model, dtype):
    loc = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.3, -0.2]], dtype=dtype, requires_grad=True)
    scale = torch.ones(3, dtype=dtype, requires_grad=True)
    c = torch.tensor(1.3, dtype=dtype, requires_grad=True)
    law = WrappedNormal(loc, scale, c=c, model=model)
    value = law.log_prob(loc.detach().clone().requires_grad_())
    assert torch.allclose(value, torch.full((2,), -1.5 * math.log(2 * math.pi), dtype=dtype))
    for gradient in torch.autograd.grad(value.sum(), (loc, scale, c)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("from_origin", [False, True])
def test_finite_far_out(from_origin):
    far = lorentz.exp_map0(torch.tensor([[60.0, 0.0, 80.0]], dtype=torch.float64))
    assert lorentz.dist0(far).item() == pytest.approx(100)
    near = torch.zeros_like(far) if from_origin else torch.tensor([[0.3, 0.2, -0.1]], dtype=torch.float64)
    for loc, value in ((near, far), (far, near), (far, far)):
        loc, value = loc.clone().requires_grad_(), value.clone().requires_grad_()
        got = WrappedNormal(loc, 10.0).log_prob(value)
        assert got.isfinite().all()
        for gradient in torch.autograd.grad(got.sum(), (loc, value)):
            assert gradient.isfinite().all()
    origin = torch.zeros_like(far)
    expected = -50.0 - 3 * math.log(10) - 1.5 * math.log(2 * math.pi) - 2 * (100 - math.log(200))
    assert WrappedNormal(origin, 10.0).log_prob(far).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 2e-15)])
def test_log_sinhc(dtype, bound):
    t = torch.cat((torch.zeros(1), torch.logspace(-6, 3, 400), torch.linspace(0.09, 0.11, 50))).to(dtype)
    got = _log_sinhc_of_square(t.square())
    for value, root in zip(got.tolist(), t.square().tolist(), strict=True):
        exact = mpmath.sqrt(root)
        exact = mpmath.log(mpmath.sinh(exact) / exact) if root else 0
        assert abs(value - exact) <= bound * max(1, abs(exact))


def test_gradcheck_log_prob():
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loc, value = random_points((2, 3), 0.7).requires_grad_(), random_points((2, 3), 0.7).requires_grad_()
    scale, tril = (torch.rand(3).double() + 0.3).requires_grad_(), random_tril(3).requires_grad_()

    def diagonal(loc, value, scale, c):
        return WrappedNormal(loc, scale, c=c, validate_args=False).log_prob(value)

    def full(loc, value, tril, c):
        return WrappedNormal(loc, scale_tril=torch.tril(tril), c=c, validate_args=False).log_prob(value)

    def ball(loc, value, scale, c):
        return WrappedNormal(loc, scale, c=c, model="poincare", validate_args=False).log_prob(value)

    assert torch.autograd.gradcheck(diagonal, (loc, value, scale, c))
    assert torch.autograd.gradcheck(full, (loc, value, tril, c))
    to_ball = convert.lorentz_to_poincare
    inside = [to_ball(x.detach(), c=0.7).requires_grad_() for x in (loc, value)]
    assert torch.autograd.gradcheck(ball, (*inside, scale, c))


@pytest.mark.parametrize("model", ["lorentz", "poincare"])
def test_gradcheck_rsample(model):
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loc = (0.3 * torch.randn(2, 3).double()).requires_grad_()
    tril = random_tril(3).requires_grad_()

    def draw(loc, tril, c):
        torch.manual_seed(5)
        return WrappedNormal(loc, scale_tril=torch.tril(tril), c=c, model=model, validate_args=False).rsample((2,))

    assert torch.autograd.gradcheck(draw, (loc, tril, c))
    assert not WrappedNormal(loc, scale_tril=tril, c=c, validate_args=False).sample().requires_grad


@pytest.mark.parametrize(
    ("loc_shape", "spread", "batch"),
    [
        ((3,), 0.5, ()),
        ((3,), torch.tensor(0.5), ()),
        ((3,), torch.ones(3), ()),
        ((1, 3), torch.ones(3), (1,)),
        ((0, 3), torch.ones(3), (0,)),
        ((2, 3), torch.ones(2, 1), (2,)),
        ((2, 1, 3), torch.ones(4, 3), (2, 4)),
        ((3,), torch.ones(5, 3), (5,)),
        ((3,), torch.eye(3), ()),
        ((2, 3), torch.eye(3).expand(4, 1, 3, 3), (4, 2)),
    ],
)
def test_cardinality(loc_shape, spread, batch):
    is_factor = isinstance(spread, torch.Tensor) and spread.shape[-2:] == (3, 3)
    loc = torch.zeros(loc_shape)
    law = WrappedNormal(loc, scale_tril=spread) if is_factor else WrappedNormal(loc, spread)
    assert (law.batch_shape, law.event_shape) == (batch, (3,))
    assert law.loc.shape == law.scale.shape == law.mode.shape == (*batch, 3)
    assert law.scale_tril.shape == (*batch, 3, 3)
    for sample_shape in ((), (4,), (0,), (2, 3)):
        drawn = law.rsample(torch.Size(sample_shape))
        assert drawn.shape == (*sample_shape, *batch, 3)
        assert law.log_prob(drawn).shape == (*sample_shape, *batch)


def test_scale_and_scale_tril_describe_the_same_law():
    scale, tril = torch.rand(4, 3) + 0.1, random_tril(3)
    assert torch.equal(WrappedNormal(torch.zeros(3), scale).scale_tril, torch.diag_embed(scale))
    marginal = WrappedNormal(torch.zeros(3), scale_tril=tril).scale
    assert torch.allclose(marginal, torch.diagonal(tril @ tril.T).sqrt())


@pytest.mark.parametrize("given", ["scale", "scale_tril"])
@pytest.mark.parametrize("model", ["lorentz", "poincare"])
def test_expand(given, model):
    spread = torch.rand(3) + 0.1 if given == "scale" else random_tril(3, torch.float32)
    law = WrappedNormal(0.1 * torch.ones(2, 3), **{given: spread}, c=0.5, model=model)
    wide = law.expand((4, 2))
    assert isinstance(wide, WrappedNormal)
    assert (wide.batch_shape, wide.event_shape, wide.model, wide.c) == ((4, 2), (3,), model, law.c)
    assert wide.loc.data_ptr() == law.loc.data_ptr()
    assert wide.arg_constraints == law.arg_constraints
    value = wide.sample((5,))
    assert torch.equal(wide.log_prob(value), law.log_prob(value))
    assert wide.expand((6, 4, 2)).sample().shape == (6, 4, 2, 3)
    assert Independent(wide, 1).log_prob(value).shape == (5, 4)
    _ = law.scale, law.scale_tril  # the derived one is cached now and must be expanded too
    assert law.expand((4, 2)).scale_tril.shape == (4, 2, 3, 3)
    with pytest.raises(ValueError, match="support"):
        wide.log_prob(torch.full((3,), math.nan))


def test_constraints():
    law = WrappedNormal(torch.zeros(2, 3), 1.0, c=4.0, model="poincare")
    assert law.has_rsample
    assert law.support.event_dim == 1
    assert not law.support.is_discrete
    assert law.support.check(torch.tensor([[0.49, 0.0, 0.0], [0.51, 0.0, 0.0]])).tolist() == [True, False]
    assert law.arg_constraints["loc"].check(torch.tensor([0.51, 0.0, 0.0])).item() is False
    flat = WrappedNormal(torch.zeros(3), 1.0, c=4.0)
    assert flat.support is constraints.real_vector
    assert set(flat.arg_constraints) == {"loc", "scale", "scale_tril"}
    assert flat.arg_constraints["loc"] is constraints.real_vector
    assert law.support.check(law.sample((1000,))).all()


def test_samples_at_the_edge_of_the_ball_stay_in_the_support():
    law = WrappedNormal(torch.zeros(1000, 2), 12.0, model="poincare")
    assert law.log_prob(law.sample()).isfinite().all()


@pytest.mark.parametrize("model", ["lorentz", "poincare"])
def test_validation(model):
    zero, outside = torch.zeros(3), torch.tensor([0.0, 2.0, 0.0])
    for wrong in ({"scale": -torch.ones(3)}, {"scale": torch.zeros(3)}, {"scale_tril": torch.ones(3, 3)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WrappedNormal(zero, **wrong, model=model)
        WrappedNormal(zero, **wrong, model=model, validate_args=False)
    with pytest.raises(ValueError, match="loc"):
        WrappedNormal(zero * math.nan, 1.0, model=model)
    law = WrappedNormal(zero, 1.0, model=model)
    with pytest.raises(ValueError, match="support"):
        law.log_prob(zero * math.nan)
    with pytest.raises(ValueError, match="event_shape"):
        law.log_prob(torch.zeros(2))
    if model == "poincare":
        with pytest.raises(ValueError, match="support"):
            law.log_prob(outside)
        with pytest.raises(ValueError, match="loc"):
            WrappedNormal(outside, 1.0, model=model)
    unchecked = WrappedNormal(zero, 1.0, model=model, validate_args=False)
    assert unchecked.log_prob(zero * math.nan).isnan()
    assert unchecked.log_prob(outside).isfinite()


def test_bad_input():
    loc = torch.zeros(2, 3)
    for wrong in ({}, {"scale": 1.0, "scale_tril": torch.eye(3)}):
        with pytest.raises(ValueError, match="exactly one"):
            WrappedNormal(loc, **wrong)
    with pytest.raises(ValueError, match="model"):
        WrappedNormal(loc, 1.0, model="klein")
    for c in (0.0, -1.0, math.inf, math.nan, torch.ones(5)):
        with pytest.raises(ValueError, match="c must"):
            WrappedNormal(loc, 1.0, c=c)
    for scale in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="scale"):
            WrappedNormal(loc, scale)
    for scale in (torch.ones(4), torch.ones(5, 3), torch.ones(2)):
        with pytest.raises(ValueError, match="scale"):
            WrappedNormal(loc, scale)
    with pytest.raises(ValueError, match="scale"):
        WrappedNormal(torch.zeros(1), torch.ones(3))
    for tril in (torch.eye(4), torch.eye(3).expand(5, 3, 3), torch.ones(3), torch.ones(1, 3)):
        with pytest.raises(ValueError, match="scale_tril"):
            WrappedNormal(loc, scale_tril=tril)
    for empty in (torch.zeros(()), torch.zeros(4, 0)):
        with pytest.raises(ValueError, match="loc"):
            WrappedNormal(empty, 1.0)
    with pytest.raises(TypeError, match="loc"):
        WrappedNormal(loc.long(), 1.0)
    with pytest.raises(TypeError, match="scale"):
        WrappedNormal(loc, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="device"):
        WrappedNormal(loc, torch.ones(3, device="meta"))


def test_copies():
    law = WrappedNormal(torch.zeros(3), torch.ones(3), c=2.0, model="poincare")
    value = law.sample()
    for other in (copy.deepcopy(law), pickle.loads(pickle.dumps(law))):
        assert torch.equal(other.log_prob(value), law.log_prob(value))


@pytest.mark.compile
@pytest.mark.parametrize("model", ["lorentz", "poincare"])
@pytest.mark.parametrize("given", ["scale", "scale_tril"])
def test_compile(model, given):
    loc = 0.2 * torch.randn(4, 3)
    value = 0.2 * torch.randn(4, 3)
    spread = torch.rand(3) + 0.3 if given == "scale" else random_tril(3, torch.float32)
    c = torch.tensor(0.7)
    inputs = [x.requires_grad_() for x in (loc, value, spread, c)]

    def objective(loc, value, spread, c):
        law = WrappedNormal(loc, **{given: spread}, c=c, model=model, validate_args=False)
        return law.log_prob(value).sum(), law.rsample((2,)).square().sum()

    results = []
    for run in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(7)
        outputs = run(*inputs)
        results.append((*outputs, *torch.autograd.grad(sum(outputs), inputs)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-5)
