"""The lift, the anchor loss, and the segment map."""

import math

import pytest
import torch

from hyper_geom import lorentz, poincare
from hyper_icl import AnchorLoss, HyperbolicLift, SegmentMap, anchor_loss

PAIRS = torch.tensor([[1.0, 0.0], [1.2, -0.1], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
GROUP = torch.tensor([0, 0, 1, 1])
SAME = GROUP[:, None] == GROUP


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
def test_maps_and_depth(c):
    generator = torch.Generator().manual_seed(0)
    v = 0.3 * torch.randn(20, 5, dtype=torch.float64, generator=generator)
    x = lorentz.exp_map0(v, c=c)
    torch.testing.assert_close(lorentz.log_map0(x, c=c), v, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lorentz.dist0(x, c=c), v.norm(dim=-1), atol=1e-12, rtol=1e-12)
    p = poincare.exp_map0(v, c=c)
    torch.testing.assert_close(poincare.dist0(p, c=c), 2 * v.norm(dim=-1), atol=1e-12, rtol=1e-12)
    # Poincare exp_0(v) and Lorentz exp_o(2 v) are one point: equal distances between all pairs.
    there = lorentz.tangent0_dist(2 * v[:1], 2 * v[1:], c=c)
    torch.testing.assert_close(poincare.dist(p[:1], p[1:], c=c), there, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("c", "expected"),
    [
        (0.01, (0.00300921687, 2.997976881, 68.09903345)),
        (0.1, (36.2392582, 79.92767165, 109.0506901)),
        (1.0, (98.98268452, 112.798195, 122.0077021)),
    ],
)
def test_distance_far_out(c, expected):
    for theta, value in zip((1e-6, 1e-3, 0.1), expected, strict=True):
        u = torch.tensor([64.0, 0.0], dtype=torch.float64)
        v = 64 * torch.tensor([math.cos(theta), math.sin(theta)], dtype=torch.float64)
        assert lorentz.tangent0_dist(u, v, c=c).item() == pytest.approx(value, rel=1e-9)
        # In fp32 against the stored inputs: rounding the direction itself moves the closest pairs.
        u, v = u.float(), v.float()
        stored = lorentz.tangent0_dist(u.double(), v.double(), c=c).item()
        assert lorentz.tangent0_dist(u, v, c=c).item() == pytest.approx(stored, rel=1e-6)


@pytest.mark.parametrize("c", [0.01, 0.1, 0.7, 1.0, 4.0])
def test_distance_gradients(c):
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda u, v: lorentz.tangent0_sq_dist(u, v, c=c), (u, v))
    w = u.detach().requires_grad_()
    d = lorentz.tangent0_sq_dist(w, w.detach().clone(), c=c)
    d.sum().backward()
    assert (d == 0).all()
    assert torch.isfinite(w.grad).all()


def test_zero_tangent_has_the_others_depth():
    v = torch.tensor([[0.3, 0.4]])
    torch.testing.assert_close(lorentz.tangent0_dist(torch.zeros(1, 2), v), torch.tensor([0.5]))


def test_anchor_loss_golden():
    assert anchor_loss(PAIRS, SAME, c=1.0, tau=0.5).item() == pytest.approx(1.10910582747, abs=1e-10)
    assert AnchorLoss(1.0, 0.5)(PAIRS, SAME).item() == pytest.approx(1.10910582747, abs=1e-10)


def loops(w, positives, c, tau):
    total, n = 0.0, 0
    for i in range(len(w)):
        d = [lorentz.tangent0_dist(w[i], w[j], c=c) for j in range(len(w))]
        log_sum = torch.stack([-d[j] / tau for j in range(len(w)) if j != i]).logsumexp(0)
        own = [-d[p] / tau - log_sum for p in range(len(w)) if p != i and positives[i, p]]
        if own:
            total, n = total - sum(own) / len(own), n + 1
    return total / n


@pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
def test_anchor_loss_is_its_formula(c):
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(9, 3, dtype=torch.float64, generator=generator)
    # Item 8 has no positive, row and column 3 are asymmetric.
    positives = torch.rand(9, 9, generator=generator) < 0.4
    positives[8] = False
    torch.testing.assert_close(anchor_loss(w, positives, c, 0.3), loops(w, positives, c, 0.3))
    w.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: anchor_loss(w, positives, c, 0.3), (w,))


def test_anchor_loss_resolves_close_positives():
    """In fp32 the matrix product alone would return noise for pairs 1e-4 apart."""
    generator = torch.Generator().manual_seed(0)
    w = 3 * torch.nn.functional.normalize(torch.randn(8, 16, generator=generator, dtype=torch.float64), dim=-1)
    w = w.repeat(2, 1)
    w[8:] += 1e-4
    group = torch.arange(8).repeat(2)
    same = group[:, None] == group
    exact = anchor_loss(w, same, tau=1e-3)
    torch.testing.assert_close(anchor_loss(w.float(), same, tau=1e-3).double(), exact, rtol=2e-2, atol=1e-6)


def test_curvature_is_a_scale():
    """d_c(u, v) = d_1(k u, k v)/k: with a learned scale c changes the temperature only."""
    a = anchor_loss(PAIRS, SAME, c=4.0, tau=0.25)
    torch.testing.assert_close(a, anchor_loss(2 * PAIRS, SAME, c=1.0, tau=0.5))


def test_lift():
    lift = HyperbolicLift(6, 4, c=0.5, max_radius=2.0)
    features = torch.randn(10, 6)
    w = lift(features)
    v = lift.log_alpha.exp() * features @ lift.weight.mT
    size = v.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(w, v * 2 * (0.5**0.5 * size / 2).tanh() / (0.5**0.5 * size))
    assert float(0.5**0.5 * lift(1e4 * features).detach().norm(dim=-1).max()) == pytest.approx(2.0)
    assert lift(torch.zeros(2, 6)).abs().max() == 0
    assert lift.log_alpha.exp().item() == pytest.approx(0.5)
    x = torch.zeros(2, 6, requires_grad=True)
    lift(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0
    assert lift(features.bfloat16()).dtype == torch.float32
    assert lift(features.double()).dtype == torch.float64


def test_lift_learns_to_vary_depth():
    torch.manual_seed(0)
    group = torch.arange(24) // 4
    features = torch.nn.functional.normalize(torch.randn(6, 8)[group] + 0.5 * torch.randn(24, 8), dim=-1)
    lift, loss = HyperbolicLift(8, 8), AnchorLoss(tau=0.3)
    optimizer = torch.optim.Adam(lift.parameters(), 0.05)
    first = None
    for _ in range(150):
        value = loss(lift(features), group[:, None] == group)
        first = value.item() if first is None else first
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() < 0.6 * first
    depth = lift(features).norm(dim=-1)
    assert depth.std() > 0.02 * depth.mean()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: anchor_loss(PAIRS, SAME, tau=0.0), "tau must"),
        (lambda: anchor_loss(PAIRS, SAME, c=-1.0), "c must"),
        (lambda: anchor_loss(PAIRS, torch.eye(4, dtype=torch.bool)), "positive other than itself"),
        (lambda: anchor_loss(PAIRS, SAME[:3]), "positives must"),
        (lambda: anchor_loss(PAIRS * torch.nan, SAME), "finite"),
        (lambda: HyperbolicLift(0, 2), "in_dim must"),
        (lambda: HyperbolicLift(2, 2, c=0.0), "c must"),
        (lambda: HyperbolicLift(2, 2, max_radius=-1.0), "max_radius must"),
        (lambda: HyperbolicLift(2, 2)(torch.ones(1, 3)), "width 2"),
        (lambda: SegmentMap.from_lengths([1], [[2]], [0]), "query must"),
        (lambda: SegmentMap.from_lengths([1, 1], [[2]], [1, 1]), "one entry a prompt"),
        (
            lambda: SegmentMap.batch([SegmentMap.from_lengths([1], [[2]], [1])], torch.tensor([[1, 1, 0, 1, 1]])),
            "in one block",
        ),
        (lambda: SegmentMap(torch.tensor([[0, 1, 0]]), torch.tensor([1]), 1), "ids must"),
        (lambda: SegmentMap(torch.tensor([[0, 0, 2]]), torch.tensor([2]), 1), "ids must"),
        (
            lambda: SegmentMap.from_prefixes([torch.tensor([1, 2]), torch.tensor([1, 2])], torch.tensor([1, 2, 3])),
            "grow",
        ),
        (lambda: SegmentMap.from_prefixes([torch.tensor([1, 2])], torch.tensor([1, 2])), "go on after"),
    ],
)
def test_bad_input(make, word, refused):
    with refused(word):
        make()


def test_segments_from_prefixes():
    full = torch.tensor([1, 10, 11, 12, 20, 21, 30, 31, 32])
    prefixes = [torch.tensor([1, 10, 11, 12]), torch.tensor([1, 10, 11, 12, 20, 21])]
    made = SegmentMap.from_prefixes(prefixes, full, head=1)
    assert made.ids.tolist() == [[-1, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert made.query_start.tolist() == [6]
    # The last token of the first prefix merged with what follows it: it goes to the second demonstration.
    merged = [torch.tensor([1, 10, 11, 99]), prefixes[1]]
    assert SegmentMap.from_prefixes(merged, full, head=1).ids.tolist() == [[-1, 0, 0, 1, 1, 1, 2, 2, 2]]


def test_segments_pad_and_batch():
    one = SegmentMap.from_lengths([1], [[2, 1]], [2])
    two = SegmentMap.from_lengths([1], [[1, 1]], [1])
    both = SegmentMap.batch([one, two])
    assert both.ids.tolist() == [[-1, 0, 0, 1, 2, 2], [-1, -1, -1, 0, 1, 2]]
    assert both.query_start.tolist() == [4, 5]
    assert torch.equal(both.ids, SegmentMap.from_lengths([1, 1], [[2, 1], [1, 1]], [2, 1]).ids)
    assert both.query_rows().tolist() == [[5], [5]]
    assert one.query_rows().tolist() == [[4, 5]]
    assert one.left_padded(2).query_rows(1).tolist() == [[7]]
    with pytest.raises(ValueError, match="shortest query"):
        both.query_rows(2)
