"""geoopt manifolds on our numerics: the conversion table, the laws, and the optimisers."""

import importlib.util
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    # geoopt 0.5.1 compiles with torch.jit.script, which torch deprecates.
    warnings.simplefilter("ignore")
    geoopt = pytest.importorskip("geoopt")
    from geoopt.optim import RiemannianAdam, RiemannianSGD, SparseRiemannianAdam

    from hyper_geom import Curvature, lorentz, poincare, riemannian
    from hyper_geom.riemannian import Lorentz, PoincareBall

CURVATURES = (0.25, 1.0, 4.0)
MANIFOLDS = (Lorentz, PoincareBall)

C_FROM_N = {
    "n": lambda n: n,
    "1/n": lambda n: 1 / n,
    "-n": lambda n: -n,
    "log(1 + exp(n))": lambda n: math.log1p(math.exp(n)),
    "1/n^2": lambda n: 1 / n**2,
}
N_FROM_C = {
    "c": lambda c: c,
    "1/c": lambda c: 1 / c,
    "-c": lambda c: -c,
    "log(exp(c) - 1)": lambda c: math.log(math.expm1(c)),
    "1/sqrt(c)": lambda c: 1 / math.sqrt(c),
}


def wide(value):
    return torch.tensor(value, dtype=torch.float64)


# The space that n describes, built without our formulas for c.
SPACE = {
    "curvature = -n": lambda n: geoopt.PoincareBall(c=wide(n)),
    "curvature = n": lambda n: geoopt.Stereographic(k=wide(n)),
    "<x,x> = -n": lambda n: geoopt.Lorentz(k=wide(n)),
    "<x,x> = -1/n": lambda n: geoopt.Lorentz(k=1 / wide(n)),
    "curvature = -softplus(n)": lambda n: geoopt.Stereographic(k=-torch.nn.functional.softplus(wide(n))),
    "curvature = -1/n^2": lambda n: geoopt.Stereographic(k=-(wide(n) ** -2)),
}
# The rows of docs/hyper-geom/curvature.md.
TABLE = [
    ("hyper-geom", "`c`", "curvature = -n", "n", "c", "Lorentz, space only"),
    ("hyper-geom, ball", "`c`", "curvature = -n", "n", "c", "ball"),
    ("geoopt `Lorentz`", "`k`", "<x,x> = -n", "1/n", "1/c", "Lorentz, time first"),
    ("geoopt `PoincareBall`", "`c`", "curvature = -n", "n", "c", "ball"),
    ("geoopt `Stereographic`", "`k`", "curvature = n", "-n", "-c", "ball"),
    ("HCNN, HyperCore", "`k`", "<x,x> = -n", "1/n", "1/c", "Lorentz, time first"),
    ("holonomy-lib", "`k`", "curvature = n", "-n", "-c", "ball"),
    ("hypll", "`Curvature(value)`", "curvature = -softplus(n)", "log(1 + exp(n))", "log(exp(c) - 1)", "ball"),
    ("Law et al., 2019", "`beta`", "<x,x> = -n", "1/n", "1/c", "Lorentz, time first"),
    ("Ganea et al., 2018", "`c`", "curvature = -n", "n", "c", "ball"),
    ("Desai et al. (MERU), 2023", "`c`", "<x,x> = -1/n", "n", "c", "Lorentz, space only"),
    ("differential geometry", "`K`", "curvature = n", "-n", "-c", "-"),
    ("radius of the ball", "`R`", "curvature = -1/n^2", "1/n^2", "1/sqrt(c)", "ball"),
]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def model_of(manifold):
    return "lorentz" if isinstance(manifold, (Lorentz, geoopt.Lorentz)) else "poincare"


def random_points(model, c, shape=(6, 3), dtype=torch.float64):
    module = {"lorentz": lorentz, "poincare": poincare}[model]
    scale = {"lorentz": 1.0, "poincare": 0.5}[model] / math.sqrt(c)
    return module.exp_map0(0.6 * scale * torch.randn(shape, dtype=dtype), c=c)


def assert_equal_to_geoopt(peer, c, model):
    """dist, expmap, logmap, transp of one geoopt manifold equal ours at curvature c, through the conversions."""
    ours = {"lorentz": lorentz, "poincare": poincare}[model]
    x, y = random_points(model, c), random_points(model, c)
    v = 0.3 * torch.randn(6, 3, dtype=torch.float64) / math.sqrt(c)
    peer_x, made = riemannian.to_geoopt(x, c=c, model=model)
    peer_y, _ = riemannian.to_geoopt(y, c=c, model=model)
    peer_v = riemannian.tangent_to_geoopt(x, v, c=c, model=model)
    assert float(made.k) == pytest.approx(float(peer.k), rel=1e-14)
    assert peer.check_point_on_manifold(peer_x)
    close = {"rtol": 1e-10, "atol": 1e-10}
    assert torch.allclose(peer.dist(peer_x, peer_y), ours.dist(x, y, c=c), **close)
    end = riemannian.from_geoopt(peer.expmap(peer_x, peer_v), peer)
    assert end[1:] == (pytest.approx(c, rel=1e-14), model)
    assert torch.allclose(end.points, ours.exp_map(x, v, c=c), **close)
    for got, expected in (
        (peer.logmap(peer_x, peer_y), ours.log_map(x, y, c=c)),
        (peer.transp(peer_x, peer_y, peer_v), ours.parallel_transport(x, y, v, c=c)),
    ):
        assert torch.allclose(riemannian.tangent_from_geoopt(got, peer), expected, **close)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_each_row_of_the_conversion_table(row, c):
    _, _, definition, c_from_n, n_from_c, _ = row
    n = N_FROM_C[n_from_c](c)
    assert C_FROM_N[c_from_n](n) == pytest.approx(c, rel=1e-14)
    peer = SPACE[definition](n)
    assert_equal_to_geoopt(peer, C_FROM_N[c_from_n](n), model_of(peer))


def test_the_table_in_the_docs_is_the_table_that_is_tested():
    page = Path(__file__).resolve().parents[3] / "docs" / "hyper-geom" / "curvature.md"
    if not page.exists():
        pytest.skip("the documentation is not beside the package")
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| library or paper"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, number, definition, to_c, from_c, layout = (cell.strip() for cell in line.strip("|").split("|"))
        rows.append((name, number, definition, to_c.strip("`"), from_c.strip("`"), layout))
    assert rows == TABLE


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("model", ["lorentz", "poincare"])
def test_round_trip_to_geoopt(model, c):
    x = random_points(model, c).requires_grad_()
    v = torch.randn(6, 3, dtype=torch.float64)
    points, manifold = riemannian.to_geoopt(x, c=torch.tensor([c], dtype=torch.float64), model=model)
    assert points.shape[-1] == (4 if model == "lorentz" else 3)
    assert manifold.k.dtype == torch.float64
    back = riemannian.from_geoopt(points, manifold)
    assert torch.equal(back.points, x)
    assert back[1:] == (pytest.approx(c, rel=1e-15), model)
    (gradient,) = torch.autograd.grad(back.points.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    tangent = riemannian.tangent_to_geoopt(x, v, c=c, model=model)
    if model == "lorentz":
        # <x, v> = 0 (geoopt's own check_vector_on_tangent fails on fp64).
        product = (points * tangent)[:, 1:].sum(-1) - (points * tangent)[:, 0]
        assert torch.allclose(product, torch.zeros_like(product), atol=1e-12)
    assert torch.equal(riemannian.tangent_from_geoopt(tangent, manifold), v)
    attached = geoopt.ManifoldTensor(points.detach(), manifold=manifold)
    assert torch.equal(riemannian.from_geoopt(attached).points, x)


@pytest.mark.parametrize("manifold", [Lorentz(2.0), PoincareBall(2.0)], ids=lambda m: m.name)
def test_from_geoopt_takes_our_manifolds_too(manifold):
    x = torch.full((2, 3), 0.1)
    points, c, model = riemannian.from_geoopt(geoopt.ManifoldTensor(x, manifold=manifold))
    assert (c, model) == (2.0, model_of(manifold))
    assert torch.equal(points, x)
    assert torch.equal(riemannian.tangent_from_geoopt(x, manifold), x)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("manifold_class", MANIFOLDS)
def test_methods_equal_the_functions_of_the_model(manifold_class, c):
    manifold = manifold_class(c)
    model = model_of(manifold)
    ours = {"lorentz": lorentz, "poincare": poincare}[model]
    x, y = random_points(model, c), random_points(model, c)
    u, v = torch.randn(2, 6, 3, dtype=torch.float64)
    for got, expected in (
        (manifold.dist(x, y), ours.dist(x, y, c=c)),
        (manifold.dist2(x, y), ours.sq_dist(x, y, c=c)),
        (manifold.dist0(x), ours.dist0(x, c=c)),
        (manifold.expmap(x, 0.1 * u), ours.exp_map(x, 0.1 * u, c=c)),
        (manifold.expmap0(0.1 * u), ours.exp_map0(0.1 * u, c=c)),
        (manifold.logmap(x, y), ours.log_map(x, y, c=c)),
        (manifold.logmap0(x), ours.log_map0(x, c=c)),
        (manifold.transp(x, y, v), ours.parallel_transport(x, y, v, c=c)),
        (manifold.inner(x, u, v), ours.inner(x, u, v, c=c)),
        (manifold.inner(x, u), ours.inner(x, u, u, c=c)),
        (manifold.norm(x, u), ours.norm(x, u, c=c)),
        (manifold.egrad2rgrad(x, u), ours.egrad2rgrad(x, u, c=c)),
        (manifold.proju(x, u), u),
        (manifold.component_inner(x, u, v), ours.inner(x, u, v, c=c)[:, None]),
        (manifold.dist(x, y, keepdim=True), ours.dist(x, y, c=c)[:, None]),
        (manifold.dist0(x, keepdim=True), ours.dist0(x, c=c)[:, None]),
    ):
        assert torch.equal(got, expected)
    # Within range, a retraction is the exponential map and its transport is the isometry.
    step = 0.1 * u
    end, moved = manifold.retr_transp(x, step, v)
    assert torch.allclose(end, ours.exp_map(x, step, c=c), rtol=1e-13)
    assert torch.allclose(manifold.retr(x, step), end, rtol=1e-13)
    assert torch.allclose(moved, ours.parallel_transport(x, end, v, c=c), rtol=1e-12)
    assert torch.allclose(manifold.transp_follow_retr(x, step, v), moved)
    assert torch.allclose(manifold.transp_follow_expmap(x, step, v), moved, rtol=1e-12)
    assert manifold.proju(x[0], u).shape == u.shape


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("manifold_class", MANIFOLDS)
def test_the_gradient_is_the_steepest_ascent(manifold_class, c):
    """<egrad2rgrad(x, g), v>_x = g . v for every v, the definition of the Riemannian gradient."""
    manifold = manifold_class(c)
    x = random_points(model_of(manifold), c)
    g, v = torch.randn(2, 6, 3, dtype=torch.float64)
    kept = g.clone()
    assert torch.allclose(manifold.inner(x, manifold.egrad2rgrad(x, g), v), (g * v).sum(-1), rtol=1e-12)
    assert torch.equal(g, kept)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("manifold_class", MANIFOLDS)
def test_random_and_origin(manifold_class, c):
    manifold = manifold_class(c)
    drawn = manifold.random_normal(4000, 3, std=0.7, dtype=torch.float64)
    assert drawn.manifold is manifold
    assert manifold.dist0(drawn).square().mean().item() == pytest.approx(3 * 0.7**2, rel=0.1)
    assert manifold.random((2, 3)).shape == (2, 3)
    generator = torch.Generator().manual_seed(1)
    again = manifold.random_normal(2, 3, generator=generator.manual_seed(1))
    assert torch.equal(again, manifold.random_normal(2, 3, generator=generator.manual_seed(1)))
    origin = manifold.origin(2, 3, dtype=torch.float64)
    assert origin.dtype == torch.float64
    assert not origin.any()
    assert manifold.origin((2, 3)).shape == (2, 3)


def test_point_and_vector_checks():
    inside, outside = torch.full((2, 3), 0.2), torch.full((2, 3), 0.9)
    ball, flat = PoincareBall(4.0), Lorentz(4.0)
    assert ball.check_point_on_manifold(inside)
    ok, reason = ball.check_point_on_manifold(outside, explain=True)
    assert not ok
    assert reason
    assert flat.check_point_on_manifold(outside)
    assert not flat.check_point_on_manifold(outside * math.inf)
    for manifold in (ball, flat):
        assert manifold.check_vector_on_tangent(inside, outside)
        assert not manifold.check_vector_on_tangent(inside, outside * math.nan)
        assert not manifold.check_point(torch.zeros(()))


@pytest.mark.parametrize("manifold_class", MANIFOLDS)
def test_repr_device_and_curvature_module(manifold_class):
    manifold = manifold_class(2.0)
    assert repr(manifold) == f"{manifold.name}(c=2) manifold"
    assert manifold.c == 2.0
    assert manifold_class().c == 1.0
    assert manifold_class(torch.tensor([3.0])).c == 3.0
    curvature = Curvature(2.0)
    learned = manifold_class(curvature)
    x = torch.full((1, 3), 0.3)
    (gradient,) = torch.autograd.grad(learned.dist0(x).sum(), curvature.log_c)
    assert gradient.item() != 0
    assert learned.dist0(x).item() == pytest.approx(manifold.dist0(x).item())
    assert repr(learned) == repr(manifold)
    assert riemannian.from_geoopt(x, learned).c == pytest.approx(2.0)
    with torch.no_grad():
        curvature.log_c += 1.0
    assert float(learned.c.detach()) == pytest.approx(2 * math.e, rel=1e-6)


def train(manifold, start, target, optimizer_class, num_steps=100, **options):
    x = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    optimizer = optimizer_class([x], **options)
    for _ in range(num_steps):
        optimizer.zero_grad()
        manifold.dist2(x, target).sum().backward()
        optimizer.step()
        assert x.isfinite().all()
    return x


OPTIMIZERS = [
    (RiemannianAdam, 0.25, {"lr": 0.2}),
    (RiemannianAdam, 4.0, {"lr": 0.1, "amsgrad": True, "stabilize": 10}),
    (RiemannianSGD, 0.25, {"lr": 0.1}),
    (RiemannianSGD, 1.0, {"lr": 0.04, "momentum": 0.6, "stabilize": 10}),
    (RiemannianSGD, 4.0, {"lr": 0.04, "momentum": 0.6, "nesterov": True}),
]


@pytest.mark.parametrize("manifold_class", MANIFOLDS)
@pytest.mark.parametrize(("optimizer_class", "c", "options"), OPTIMIZERS)
def test_optimisers_reach_a_target(manifold_class, c, optimizer_class, options):
    manifold = manifold_class(c)
    start, target = random_points(model_of(manifold), c), random_points(model_of(manifold), c)
    x = train(manifold, start, target, optimizer_class, **options)
    assert manifold.dist(x, target).max().item() < 0.05


def test_one_sgd_step_moves_along_the_geodesic_by_the_learning_rate():
    for manifold in (Lorentz(0.7), PoincareBall(0.7)):
        start, target = random_points(model_of(manifold), 0.7), random_points(model_of(manifold), 0.7)
        # The gradient of d^2/2 at x is -log_x(target): a step of lr 0.25 covers a quarter of the way.
        x = train(manifold, start, target, RiemannianSGD, num_steps=1, lr=0.125)
        ours = {"lorentz": lorentz, "poincare": poincare}[model_of(manifold)]
        quarter = ours.exp_map(start, 0.25 * ours.log_map(start, target, c=0.7), c=0.7)
        assert torch.allclose(x, quarter, rtol=1e-10)


@pytest.mark.parametrize(("c", "dtype"), [(0.25, torch.float32), (4.0, torch.float64)])
def test_starts_off_the_ball_return(c, dtype):
    manifold = PoincareBall(c)
    start = torch.tensor([[2.0, 0.0], [0.0, -1.0], [30.0, 40.0], [1e30, 0.0]], dtype=dtype) / math.sqrt(c)
    target = torch.tensor([0.3, 0.2], dtype=dtype) / math.sqrt(c)
    x = train(manifold, start, target, RiemannianAdam, num_steps=1, lr=0.1)
    assert manifold.check_point_on_manifold(x)
    far = manifold.dist(x, target)
    x = train(manifold, start, target, RiemannianAdam, num_steps=60, lr=0.3 / math.sqrt(c))
    assert (manifold.dist(x, target) < 0.8 * far).all()


@pytest.mark.parametrize("manifold_class", MANIFOLDS)
def test_a_step_from_too_far_out_starts_at_the_edge(manifold_class):
    manifold = manifold_class(1.0)
    far = manifold.projx(torch.tensor([[3e9, 4e9]]))
    reach = -math.log(torch.finfo(torch.float32).eps) - 4
    assert manifold.dist0(far).item() == pytest.approx(reach, rel=0.01)
    inward = -3 * far / manifold.norm(far, far, keepdim=True)
    end = manifold.retr(torch.tensor([[3e9, 4e9]]), inward)
    assert manifold.dist0(end).item() == pytest.approx(reach - 3, rel=0.02)


@pytest.mark.parametrize(("c", "lr"), [(0.25, 1e30), (4.0, 1e3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("manifold_class", MANIFOLDS)
@pytest.mark.parametrize(("optimizer_class", "options"), [(RiemannianAdam, {}), (RiemannianSGD, {"momentum": 0.9})])
def test_a_hundred_huge_steps_stay_finite(manifold_class, dtype, c, lr, optimizer_class, options):
    manifold = manifold_class(c)
    model = model_of(manifold)
    start, target = random_points(model, c, dtype=dtype), random_points(model, c, dtype=dtype)
    start[0] = 0
    x = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    optimizer = optimizer_class([x], lr=lr, **options)
    for _ in range(100):
        optimizer.zero_grad()
        manifold.dist(x, target).sum().backward()
        assert x.grad.isfinite().all()
        optimizer.step()
        assert x.isfinite().all()
    radius = math.sqrt(c) * manifold.dist0(x).max().item()
    assert radius <= 1.001 * (-math.log(torch.finfo(dtype).eps) - 4)
    for state in optimizer.state.values():
        for value in state.values():
            assert torch.as_tensor(value).isfinite().all()


@pytest.mark.parametrize("manifold_class", MANIFOLDS)
def test_retraction_bounds_the_step_and_keeps_its_direction(manifold_class):
    manifold = manifold_class(2.0)
    reach = (-math.log(torch.finfo(torch.float64).eps) - 4) / math.sqrt(2.0)
    origin, u = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[3.0, 0.0, -4.0]], dtype=torch.float64)
    for size in (1e2, 1e200, 1e307):
        end = manifold.retr(origin, size * u)
        assert torch.allclose(end / end.norm(), u / 5)
        assert manifold.dist0(end).item() == pytest.approx(reach, rel=0.05)
    # From half way out, straight through the origin: the step itself is what is bounded, not only its end.
    start = manifold.retr(origin, 0.5 * reach * u / manifold.norm(origin, u, keepdim=True))
    end = manifold.retr(start, -1e200 * u)
    assert manifold.dist(start, end).item() == pytest.approx(reach, rel=0.01)
    assert manifold.dist0(end).item() == pytest.approx(0.5 * reach, rel=0.01)
    assert torch.equal(manifold.retr(origin, 0 * u), origin)
    assert manifold.retr(origin, math.nan * u).isnan().any()
    end, moved = manifold.retr_transp(0.1 * u, 1e5 * u, u)
    assert manifold.norm(end, moved).item() <= manifold.norm(0.1 * u.clamp(-0.5, 0.5), u).item() * 20
    assert manifold.retr_transp(origin, u, 0 * u)[1].abs().max() == 0


@pytest.mark.parametrize("manifold_class", MANIFOLDS)
def test_transported_moments_never_grow(manifold_class):
    manifold = manifold_class(1.0)
    x = random_points(model_of(manifold), 1.0, (200, 3), torch.float32)
    v = torch.randn(200, 3)
    start = manifold.norm(x, v)
    for _ in range(20):
        x, v = manifold.retr_transp(x, 10 * torch.randn(200, 3), v)
    # Rounding far out moves a norm by a percent either way.
    assert (manifold.norm(x, v) <= 1.1 * start).all()


@pytest.mark.parametrize("manifold_class", MANIFOLDS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (2, 4, 3)])
def test_cardinality(manifold_class, shape):
    manifold = manifold_class(1.0)
    start = torch.zeros(shape)
    target = torch.full((3,), 0.2)
    x = train(manifold, start, target, RiemannianAdam, num_steps=60, lr=0.05)
    assert x.shape == shape
    assert (manifold.dist(x, target) < 0.05).all()


@pytest.mark.parametrize("manifold_class", MANIFOLDS)
def test_sparse_gradients(manifold_class):
    manifold = manifold_class(1.0)
    table = torch.nn.Embedding(5, 2, sparse=True)
    table.weight = geoopt.ManifoldParameter(0.1 * torch.randn(5, 2), manifold=manifold)
    kept = table.weight.detach().clone()
    optimizer = SparseRiemannianAdam([table.weight], lr=0.05)
    target = torch.full((2, 2), 0.3)
    for _ in range(100):
        optimizer.zero_grad()
        manifold.dist2(table(torch.tensor([1, 3])), target).sum().backward()
        optimizer.step()
    assert manifold.dist(table.weight[[1, 3]], target).max().item() < 5e-2
    assert torch.equal(table.weight[[0, 2, 4]], kept[[0, 2, 4]])


def test_product_and_scaled_wrappers():
    product = geoopt.ProductManifold((Lorentz(1.0), 3), (geoopt.Euclidean(), 2))
    x, y = torch.zeros(4, 5), torch.full((4, 5), 0.3)
    expected = lorentz.sq_dist(x[:, :3], y[:, :3]) + (y[:, 3:] - x[:, 3:]).square().sum(-1)
    assert torch.allclose(product.dist2(x, y), expected)
    scaled = geoopt.Scaled(PoincareBall(1.0), 2.0)
    p, q = torch.zeros(4, 3), torch.full((4, 3), 0.3)
    assert torch.allclose(scaled.dist(p, q), 2 * poincare.dist(p, q))
    assert torch.allclose(scaled.dist0(q), 2 * poincare.dist0(q))


def test_bad_input():
    for manifold_class in MANIFOLDS:
        for c in (0.0, -1.0, math.inf, math.nan, torch.tensor(-1.0)):
            with pytest.raises(ValueError, match="c must"):
                manifold_class(c)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="model"):
        riemannian.to_geoopt(x, model="klein")
    with pytest.raises(ValueError, match="model"):
        riemannian.tangent_to_geoopt(x, x, model="klein")
    with pytest.raises(ValueError, match="c must"):
        riemannian.to_geoopt(x, c=-1.0)
    with pytest.raises(ValueError, match="negative"):
        riemannian.from_geoopt(x, geoopt.Stereographic(k=1.0))
    for wrong in (geoopt.Euclidean(), None):
        with pytest.raises(TypeError, match="manifold"):
            riemannian.from_geoopt(x, wrong)


def test_a_missing_geoopt_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "geoopt", None)
    spec = importlib.util.spec_from_file_location("riemannian_without_geoopt", riemannian.__file__)
    with pytest.raises(ImportError, match=r"hyper-geom\[geoopt\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
