"""Hyperplane and Busemann logits, the Frechet mean, entropy and KL, and the soft clip."""

import math

import pytest
import torch

from hyper_geom import (
    BusemannHead,
    HyperplaneHead,
    WrappedNormal,
    busemann_logits,
    convert,
    frechet_mean,
    hyperplane_logits,
    lorentz,
    poincare,
)

MODELS = {"lorentz": lorentz, "poincare": poincare}


def draw(*shape, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("c", [0.4, 1.7])
def test_hyperplanes_are_at_the_distance_of_their_points(c):
    """The logit over |w| is the least distance to points of the hyperplane, found by search."""
    x, weight, offset = lorentz.exp_map0(draw(5, 2), c=c), draw(3, 2, seed=1), draw(3, seed=2)
    got = hyperplane_logits(x, weight, offset, c=c) / weight.norm(dim=1)
    normal = weight / weight.norm(dim=1, keepdim=True)
    foot = lorentz.exp_map0(offset.unsqueeze(1) * normal, c=c)
    across = torch.stack((-normal[:, 1], normal[:, 0]), 1)  # orthogonal to the ray: transported it stays so
    steps = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    for j in range(3):
        line = lorentz.exp_map_frame(foot[j], steps.unsqueeze(1) * across[j], c=c)
        for i in range(5):
            assert lorentz.dist(x[i], line, c=c).min().item() == pytest.approx(abs(got[i, j].item()), abs=1e-6)
    assert hyperplane_logits(foot, weight, offset, c=c).diagonal().abs().max() < 1e-12
    far = lorentz.exp_map0(9 * normal, c=c)
    assert (hyperplane_logits(far, weight, offset, c=c).diagonal() > 0).all()


@pytest.mark.parametrize("c", [0.4, 1.7])
def test_busemann_is_the_limit_of_distances(c):
    x, e = lorentz.exp_map0(draw(5, 3), c=c), draw(2, 3, seed=1)
    e = e / e.norm(dim=1, keepdim=True)
    t = 14.0
    limit = t - lorentz.dist(x.unsqueeze(1), lorentz.exp_map0(t * e, c=c), c=c)
    torch.testing.assert_close(busemann_logits(x, e, c=c), limit, rtol=0, atol=1e-6)
    p = convert.lorentz_to_poincare(x, c=c)
    k = math.sqrt(c)
    ball = -(((e - k * p.unsqueeze(1)).square().sum(-1)) / (1 - c * p.square().sum(-1, keepdim=True))).log() / k
    torch.testing.assert_close(busemann_logits(p, e, c=c, model="poincare"), ball, rtol=1e-9, atol=1e-11)


def test_logits_in_both_models_with_c_for_each_row():
    c = torch.tensor([0.4, 1.0, 1.7]).double()
    x, weight, offset = lorentz.exp_map0(draw(3, 4), c=c), draw(2, 4, seed=1), draw(2, seed=2)
    p = convert.lorentz_to_poincare(x, c=c)
    for call in (
        lambda x, c, model: hyperplane_logits(x, weight, offset, c=c, model=model),
        lambda x, c, model: busemann_logits(x, weight, c=c, model=model),
    ):
        rows = torch.stack([call(x[i], c[i], "lorentz") for i in range(3)])
        torch.testing.assert_close(call(x, c, "lorentz"), rows, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(call(p, c, "poincare"), rows, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("model", MODELS)
def test_heads(model):
    x = (0.3 * draw(8, 5)).float()
    for head in (
        HyperplaneHead(5, 3, model=model),
        BusemannHead(torch.eye(5)[:3], scale=4.0, learnable=True, model=model),
    ):
        loss = torch.nn.functional.cross_entropy(head(x, c=0.7), torch.arange(8) % 3)
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in head.parameters())
        assert head(x[:0]).shape == (0, 3)
        assert head(torch.zeros(1, 5)).isfinite().all()
        leaf = torch.zeros(2, 5, requires_grad=True)
        head(leaf).sum().backward()
        assert leaf.grad.isfinite().all()
    assert not list(BusemannHead(torch.eye(3)).parameters())[1:]
    args = [v.requires_grad_() for v in (0.3 * draw(2, 3), draw(2, 3, seed=1), draw(2, seed=2))]
    assert torch.autograd.gradcheck(lambda *a: hyperplane_logits(*a, c=0.7, model=model), args)
    assert torch.autograd.gradcheck(lambda x, e: busemann_logits(x, e, c=0.7, model=model), args[:2])


def test_errors_of_heads():
    x = torch.zeros(2, 3)
    for call, name in (
        (lambda: hyperplane_logits(x, torch.ones(2, 2), torch.ones(2)), "weight"),
        (lambda: hyperplane_logits(x, torch.ones(2, 3), torch.ones(3)), "offset"),
        (lambda: busemann_logits(x, torch.ones(3)), "prototypes"),
        (lambda: HyperplaneHead(0, 2), "dim"),
        (lambda: HyperplaneHead(2, 2, model="klein"), "model"),
        (lambda: BusemannHead(torch.ones(2)), "prototypes"),
        (lambda: BusemannHead(torch.eye(2), scale=-1.0), "scale"),
        (lambda: frechet_mean(torch.ones(2, 3), num_steps=0), "num_steps"),
        (lambda: frechet_mean(torch.ones(2, 3), model="klein"), "model"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize("model", MODELS)
def test_frechet_mean_is_the_minimum(model):
    geometry, c = MODELS[model], 0.7
    x, w = geometry.exp_map0(draw(3, 6, 4, size=1.0 if model == "lorentz" else 0.5), c=c), draw(3, 6, seed=1).abs()

    def cost(m):
        return (w * geometry.sq_dist(m.unsqueeze(-2), x, c=c)).sum(-1)

    mean = frechet_mean(x, w, c=c, model=model)
    for seed in range(20):
        assert (cost(geometry.exp_map(mean, 1e-3 * draw(3, 4, seed=seed), c=c)) >= cost(mean)).all()
    leaf = mean.clone().requires_grad_()
    assert torch.autograd.grad(cost(leaf).sum(), leaf)[0].abs().max() < 1e-9
    # Two points: the middle. One weight alone: its point. Far from the midpoint in general.
    middle = geometry.geodesic(x[:, 0], x[:, 1], 0.5, c=c)
    torch.testing.assert_close(frechet_mean(x[:, :2], c=c, model=model), middle, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        frechet_mean(x, torch.eye(6)[2].double(), c=c, model=model), x[:, 2], rtol=1e-9, atol=1e-10
    )
    assert geometry.dist(mean, geometry.midpoint(x, w, c=c), c=c).max() > 1e-2


def test_frechet_mean_has_implicit_gradients():
    leaves = [v.requires_grad_() for v in (draw(2, 5, 3), draw(2, 5, seed=1).abs(), torch.tensor(0.7).double())]
    assert torch.autograd.gradcheck(lambda x, w, c: frechet_mean(x, w, c=c), leaves)
    assert frechet_mean(torch.zeros(0, 4, 3)).shape == (0, 3)
    assert torch.equal(frechet_mean(torch.rand(4, 3), torch.zeros(4)), torch.zeros(3))
    far = lorentz.exp_map0(5 * torch.nn.functional.normalize(draw(8, 16), dim=-1)).float()
    assert lorentz.dist(frechet_mean(far).double(), frechet_mean(far.double())) < 1e-4


@pytest.mark.parametrize("dim", [2, 3, 16])
def test_entropy(dim):
    torch.manual_seed(0)
    law = WrappedNormal(draw(2, dim, size=0.2), 0.8, c=0.7)
    sampled = -law.log_prob(law.rsample((40_000,))).mean(0)
    torch.testing.assert_close(law.entropy(), sampled, rtol=0, atol=0.05)
    slow = WrappedNormal(law.loc, scale_tril=0.8 * torch.eye(dim).double(), c=0.7)
    torch.testing.assert_close(slow.entropy(40_000), law.entropy(), rtol=0, atol=0.05)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: WrappedNormal(law.loc, s.expand(dim), c=0.7).entropy(), scale)


def test_entropy_in_one_and_flat_dimensions():
    """One dimension has no volume term; small scales are flat."""
    normal = torch.distributions.Normal(0.0, 0.3).entropy()
    torch.testing.assert_close(WrappedNormal(torch.zeros(1), 0.3, c=2.0).entropy(), normal)
    flat = WrappedNormal(torch.zeros(3).double(), 1e-4, c=1.0).entropy()
    assert flat.item() == pytest.approx(3 * torch.distributions.Normal(0.0, 1e-4).entropy().item(), abs=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_kl(model):
    torch.manual_seed(0)
    loc = draw(2, 3, size=0.1)
    p = WrappedNormal(loc, torch.tensor([0.5, 0.7, 0.9]).double(), c=0.7, model=model)
    q = WrappedNormal(loc, torch.tensor([0.8, 0.6, 1.0]).double(), c=0.7, model=model)
    exact = torch.distributions.kl_divergence(p, q)
    samples = p.rsample((100_000,))
    torch.testing.assert_close(exact, (p.log_prob(samples) - q.log_prob(samples)).mean(0), rtol=0, atol=0.01)
    full = WrappedNormal(loc, scale_tril=torch.diag_embed(p.scale), c=0.7, model=model)
    torch.testing.assert_close(full.kl(q), exact)
    torch.testing.assert_close(p.kl(p), torch.zeros(2).double(), rtol=0, atol=1e-12)
    moved = WrappedNormal(loc + 0.1, q.scale, c=0.7, model=model)
    assert (p.kl(moved) > exact - 0.02).all()
    for other in (WrappedNormal(loc, 1.0, c=0.8, model=model), WrappedNormal(loc[:, :2], 1.0, c=0.7, model=model)):
        with pytest.raises(ValueError, match="same"):
            p.kl(other)


@pytest.mark.parametrize("model", MODELS)
def test_soft_clip(model):
    geometry, c = MODELS[model], 0.7
    v = 10.0 ** torch.linspace(-6, 8, 40, dtype=torch.float64).unsqueeze(1) * draw(1, 3)
    clipped = geometry.soft_clip_tangent0(v, 4.0, c=c)
    depth = math.sqrt(c) * geometry.dist0(geometry.exp_map0(clipped, c=c), c=c)
    assert (depth <= 4.0 + 1e-9).all()
    assert depth[-1] > 3.999
    torch.testing.assert_close(clipped[:10], v[:10], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.nn.functional.normalize(clipped), torch.nn.functional.normalize(v), rtol=1e-9, atol=0
    )
    # At three times the limit the length still has a gradient; the hard clip has none.
    leaf = (12 / math.sqrt(c) * torch.tensor([1.0, 0, 0]).double()).requires_grad_()
    slopes = [
        torch.autograd.grad(f(leaf, 4.0, c=c)[0], leaf)[0][0]
        for f in (geometry.soft_clip_tangent0, geometry.clip_tangent0)
    ]
    assert slopes[0] > 1e-4
    assert slopes[1].abs() < 1e-12
    assert geometry.soft_clip_tangent0(torch.full((3,), 1e30), 4.0).isfinite().all()


def test_second_derivatives_of_the_mean(points):
    """In reverse over reverse, where Newton steps without a graph would hide how the mean itself moves."""
    x = points.at(1.0, points.unit(4, 3), 0.7).requires_grad_()
    weights = torch.tensor([0.3, 1.0, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w, c: frechet_mean(x, w, c=c), (x, weights, c))
