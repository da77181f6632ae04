"""Projection and similarities: golden values, isometry, invariance of the cosine, precision of the matrix form."""

import math

import mpmath
import pytest
import torch

from hyper_blip import (
    HyperbolicConfig,
    HyperbolicProjector,
    Temperature,
    aggregate_queries,
    ball_radius,
    pairwise_similarity,
    query_midpoint,
)
from hyper_blip.projection import lift
from hyper_blip.similarity import matched_similarity
from hyper_geom import Curvature, lorentz, poincare

U, W = torch.tensor([[0.3, 0.4]], dtype=torch.float64), torch.tensor([[0.6, -0.2]], dtype=torch.float64)
GOLDEN = [
    ("distance", "poincare", 1.0, -1.4966642032565234),
    ("distance", "lorentz", 1.0, -0.6924298574236207),
    ("cosine", "poincare", 1.0, 0.31622776601683783),
    ("inner", "poincare", 1.0, 0.0817973054648946),
    ("distance", "poincare", 0.5, -1.4250608735184587),
    ("distance", "lorentz", 0.5, -0.6818135203394134),
    ("inner", "poincare", 0.5, 0.09010334097877175),
]


def random_tangents(*shape, largest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(*shape, dtype=torch.float64, generator=generator)
    size = largest * torch.rand(*shape[:-1], 1, dtype=torch.float64, generator=generator)
    return v / v.norm(dim=-1, keepdim=True) * size


@pytest.mark.parametrize(("mode", "manifold", "c", "value"), GOLDEN)
def test_golden_similarities(mode, manifold, c, value):
    for function in (pairwise_similarity, matched_similarity):
        found = function(U, W, mode, c, manifold=manifold)
        assert found.flatten().item() == pytest.approx(value, abs=1e-12)


def test_golden_radii():
    features = lift(U, 1.0, "poincare", None)
    assert features.radius.item() == pytest.approx(1.0, abs=1e-12)
    assert ball_radius(features.radius).item() == pytest.approx(0.46211715726000974, abs=1e-12)
    assert features.point.norm().item() == pytest.approx(0.46211715726000974, abs=1e-12)
    assert lift(U, 1.0, "lorentz", None).radius.item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("c", [0.1, 1.0, 4.0])
def test_all_forms_of_the_distance_agree(c):
    k = c**0.5
    a, b = (random_tangents(6, 5, largest=2.3 / k, seed=seed) for seed in (0, 1))
    polar = -pairwise_similarity(a, b, "distance", c)
    p, q = (poincare.exp_map0(v, c=c) for v in (a, b))
    # Ungar's form: (2/k) artanh(k |-p + q|) with Moebius addition.
    moebius = 2 / k * torch.atanh(k * poincare.mobius_add(-p[:, None], q[None], c=c).norm(dim=-1))
    asinh = poincare.dist(p[:, None], q[None], c=c)
    other = lorentz.dist(lorentz.exp_map0(2 * a, c=c)[:, None], lorentz.exp_map0(2 * b, c=c)[None], c=c)
    for form in (moebius, asinh, other):
        assert (form - polar).abs().max() < 1e-11
    assert (-pairwise_similarity(2 * a, 2 * b, "distance", c, manifold="lorentz") - polar).abs().max() < 1e-11


def test_radius_is_the_distance_to_the_origin():
    for manifold, geometry in (("poincare", poincare), ("lorentz", lorentz)):
        for c in (0.3, 1.0, 2.0):
            features = lift(random_tangents(7, 4, largest=3.0), c, manifold, 1.2)
            torch.testing.assert_close(features.radius, geometry.dist0(features.point, c=c), rtol=1e-12, atol=1e-12)
            assert (features.radius * c**0.5).max() <= 1.2 + 1e-12
            whole = lift(random_tangents(7, 4, largest=3.0), c, manifold, None).radius * c**0.5
            assert torch.equal(features.clipped, whole > 1.2)
            torch.testing.assert_close(features.radius * c**0.5, whole.clamp(max=1.2), rtol=1e-12, atol=1e-12)
            assert features.clipped.any()
            assert not features.clipped.all()


@pytest.mark.parametrize("max_radius", [None, 2.0, 4.6])
def test_the_cosine_does_not_see_the_map(max_radius):
    x = random_tangents(5, 8, largest=2.0).requires_grad_()
    y = random_tangents(5, 8, largest=2.0, seed=1)
    a, b = (lift(v, 1.0, "poincare", max_radius) for v in (x, y))
    cosine = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    points = torch.nn.functional.cosine_similarity(a.point[:, None], b.point[None], dim=-1)
    assert (points - cosine).abs().max() <= 5e-16
    found = pairwise_similarity(a.tangent, b.tangent, "cosine")
    assert (found - cosine).abs().max() <= 5e-16
    (gradient,) = torch.autograd.grad(found.sum(), x)
    radial = (gradient * x.detach()).sum(-1)
    assert radial.abs().max() <= 1e-15


def test_fp32_matrix_distance():
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(64, 256, dtype=torch.float64, generator=generator)
    a = e / e.norm(dim=-1, keepdim=True) * 2.3
    far = torch.randn(64, 256, dtype=torch.float64, generator=generator)
    far = far / far.norm(dim=-1, keepdim=True) * 2.3
    exact = pairwise_similarity(a.float().double(), far.float().double(), "distance")
    assert (pairwise_similarity(a.float(), far.float(), "distance") - exact).abs().max() <= 3e-6
    # Neighbours at distance 0.05: turn each direction a little.
    turn = far - (far * a).sum(-1, keepdim=True) / (a * a).sum(-1, keepdim=True) * a
    turn = turn / turn.norm(dim=-1, keepdim=True)
    angle = 0.05 / math.sinh(4.6)
    near = (math.cos(angle) * a + math.sin(angle) * 2.3 * turn).float()
    exact = matched_similarity(a.float().double(), near.double(), "distance")
    assert exact.mean().item() == pytest.approx(-0.05, rel=0.02)
    matrix = pairwise_similarity(a.float(), near, "distance").diagonal()
    # The product's terms reach cosh(4.6)^2 and cancel: some roundings of that size stay, how many depends on the CPU.
    assert (matrix.double().cosh() - exact.cosh()).abs().max() <= 16 * 2**-24 * math.cosh(4.6) ** 2
    assert (matched_similarity(a.float(), near, "distance") - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("mode", ["cosine", "distance", "inner", "angle"])
def test_gradients_are_finite_where_vectors_coincide(mode):
    for function in (pairwise_similarity, matched_similarity):
        v = torch.cat([random_tangents(3, 8, largest=2.0).float(), torch.zeros(1, 8)]).requires_grad_()
        w = v.detach().clone().requires_grad_()
        function(v, w, mode).sum().backward()
        assert v.grad.isfinite().all()
        assert w.grad.isfinite().all()


@pytest.mark.parametrize("manifold", ["poincare", "lorentz"])
@pytest.mark.parametrize("mode", ["cosine", "distance", "inner", "angle"])
def test_similarity_against_mpmath_and_gradcheck(mode, manifold):
    c = 0.7
    a, b = random_tangents(2, 3, 4, largest=1.2), random_tangents(3, 4, largest=1.2, seed=1)
    found = pairwise_similarity(a, b, mode, c, manifold=manifold)
    assert found.shape == (2, 3, 3)
    depth = 2 if manifold == "poincare" else 1
    with mpmath.workdps(40):
        k = mpmath.sqrt(c)
        for i, q, j in ((0, 0, 0), (1, 2, 1), (0, 1, 2)):
            x = [mpmath.mpf(t) * depth for t in a[i, q].tolist()]
            y = [mpmath.mpf(t) * depth for t in b[j].tolist()]
            nx, ny, xy = mpmath.norm(x), mpmath.norm(y), mpmath.fdot(x, y)
            A, B, cos = k * nx, k * ny, xy / (nx * ny)
            D = mpmath.acosh(mpmath.cosh(A) * mpmath.cosh(B) - mpmath.sinh(A) * mpmath.sinh(B) * cos)
            expected = {
                "cosine": cos,
                "distance": -D / k,
                "inner": mpmath.tanh(A / 2) * mpmath.tanh(B / 2) * cos / c,
                # Angle at the apex y between the ray from the origin and x: hyperbolic law of cosines.
                "angle": -(
                    mpmath.pi
                    - mpmath.acos(
                        (mpmath.cosh(D) * mpmath.cosh(B) - mpmath.cosh(A)) / (mpmath.sinh(D) * mpmath.sinh(B))
                    )
                ),
            }[mode]
            assert abs(found[i, q, j].item() - float(expected)) < 1e-12
    torch.autograd.gradcheck(
        lambda u, v, c: pairwise_similarity(u, v, mode, c, manifold=manifold),
        (a.requires_grad_(), b.requires_grad_(), torch.tensor(c, dtype=torch.float64, requires_grad=True)),
    )


def test_projector_scales_clips_and_learns():
    torch.manual_seed(0)
    curvature = Curvature(1.0)
    projector = HyperbolicProjector(256, curvature)
    z = torch.randn(4, 3, 256)
    z = 9 * z / z.norm(dim=-1, keepdim=True)
    features = projector(z.bfloat16())
    assert features.point.dtype == torch.float32
    # |u| = 9/16, so the radius is 9/8, far from the rim.
    torch.testing.assert_close(features.radius, torch.full((4, 3), 1.125), rtol=5e-3, atol=0)
    assert not features.clipped.any()
    features.radius.sum().backward()
    assert projector.alpha.grad.item() > 0
    with torch.no_grad():
        projector.alpha.fill_(0.5)
    assert projector.clamp_().alpha.item() == 0.0
    features = projector(z)
    assert features.clipped.all()
    torch.testing.assert_close(features.radius, torch.full((4, 3), 4.6))
    assert projector(torch.zeros(0, 256)).radius.shape == (0,)
    zero = torch.zeros(1, 256, requires_grad=True)
    projector(zero).radius.sum().backward()
    assert zero.grad.isfinite().all()


def test_projector_gradcheck():
    projector = HyperbolicProjector(4, Curvature(0.8), init_scale=0.9, max_radius=1.5, compute_dtype="float64").double()
    z = random_tangents(3, 4, largest=2.0).requires_grad_()
    torch.autograd.gradcheck(lambda z: tuple(projector(z)[:3]), (z,))


def test_autocast_leaves_geometry_in_single_precision():
    a, b = random_tangents(4, 16, largest=2.0).float(), random_tangents(5, 16, largest=2.0, seed=1).float()
    for mode in ("cosine", "distance", "inner", "angle"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = pairwise_similarity(a, b, mode)
        assert torch.equal(found, pairwise_similarity(a, b, mode))


def test_aggregation_and_midpoint():
    similarity = torch.arange(12.0).reshape(2, 3, 2)
    assert aggregate_queries(similarity, "max").tolist() == [[4.0, 5.0], [10.0, 11.0]]
    assert aggregate_queries(similarity, "mean").tolist() == [[2.0, 3.0], [8.0, 9.0]]
    assert aggregate_queries(similarity, "fixed", index=1).tolist() == [[2.0, 3.0], [8.0, 9.0]]
    generator = torch.Generator().manual_seed(0)
    found = aggregate_queries(similarity, "random", generator=generator)
    assert all(row in similarity[i].tolist() for i, row in enumerate(found.tolist()))
    # Two points: the centroid is the middle of the geodesic.
    v = random_tangents(1, 2, 3, largest=1.0)
    for manifold, geometry in (("poincare", poincare), ("lorentz", lorentz)):
        middle = query_midpoint(lift(v, 0.6, manifold, None), 0.6, manifold=manifold)
        point = geometry.exp_map0(middle, c=0.6)[0]
        ends = geometry.exp_map0(v, c=0.6)[0]
        d = geometry.dist(ends[0], ends[1], c=0.6) / 2
        torch.testing.assert_close(geometry.dist(ends, point, c=0.6), torch.stack([d, d]), rtol=1e-10, atol=1e-12)


def test_temperature_is_bounded():
    tau = Temperature(0.07)
    with torch.no_grad():
        tau.log_c.fill_(5.0)
    assert tau().item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"c": 0.0}, "c must be finite and > 0, got 0.0"),
        ({"max_radius": -1.0}, "max_radius"),
        ({"temperature": 0.6}, "temperature must lie in"),
        ({"rqs_prob": 1.5}, "rqs_prob must lie in"),
        ({"rtp_prob": -0.1}, "rtp_prob must lie in"),
        ({"similarity": "dot"}, "similarity must be one of"),
        ({"rtp_targets": ("itc", "x")}, "rtp_targets must be one of"),
        ({"loss_weights": {"itx": 1.0}}, "loss_weights must be one of"),
        ({"loss_weights": {"itc": -1.0}}, "loss_weights"),
        ({"share_image_kv": True}, "share_image_kv needs"),
        ({"mix": (0.5, 0.2)}, "mix"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"init_scale": 2.0}, "init_scale"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        HyperbolicConfig(**changes)


def test_bad_calls():
    with pytest.raises(ValueError, match="mode must be one of"):
        pairwise_similarity(U, W, "dot")
    with pytest.raises(ValueError, match="one dimension"):
        pairwise_similarity(U, torch.zeros(1, 3), "cosine")
    with pytest.raises(ValueError, match="how must be one of"):
        aggregate_queries(torch.zeros(1, 1, 1), "median")
    with pytest.raises(ValueError, match=r"index must lie in \[0, 1\), got 1"):
        aggregate_queries(torch.zeros(1, 1, 1), "fixed", index=1)
    with pytest.raises(ValueError, match="z must have 8 features"):
        HyperbolicProjector(8, Curvature(1.0))(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="max_radius"):
        HyperbolicProjector(8, Curvature(1.0), max_radius=0.0)


def test_presets():
    assert HyperbolicConfig.paper() == HyperbolicConfig()
    plain = HyperbolicConfig.euclidean(temperature=0.1)
    assert (plain.similarity, plain.rqs_prob, plain.rtp_prob, plain.temperature) == ("cosine", 0.0, 0.0, 0.1)
    assert HyperbolicConfig(loss_weights={"entail": 0.2}).loss_weights["itc"] == 1.0


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ball_has_a_positive_curvature(c):
    with pytest.raises(ValueError, match="c must be positive and finite, got"):
        ball_radius(torch.ones(3), c)
