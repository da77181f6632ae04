"""Certified selection against brute force in fp64, its goldens, bad input, and the baselines."""

import importlib.util
import math
import warnings

import pytest
import torch

from hyper_geom import lorentz
from hyper_icl import (
    AnchorBank,
    HyperbolicDemoIndex,
    MmicesSelector,
    RandomSelector,
    RicesSelector,
    TopKClipSelector,
    knn_vote,
)
from hyper_icl.demonstrations import _bounds

MUS = (-0.5, 0.0, 0.3, 0.6, 0.9, 1.0, 1.5)
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
BACKENDS = ["torch", pytest.param("faiss", marks=needs_faiss)]
POOL = torch.tensor([[0.5, 0.0], [2.0, 0.2], [1.0, 1.0], [0.0, 3.0], [1.2, -0.1]])
QUERY = torch.tensor([[1.0, 0.0]])


def index(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HyperbolicDemoIndex(*args, **kwargs)


def brute(pool, query, k, *, c=1.0, mu=0.0, keep=None):
    """Ids of the k best by fp64 score, then by id; equal items are scored once, so that they tie exactly."""
    unique, inverse = pool.double().unique(dim=0, return_inverse=True)
    rows = []
    for i, q in enumerate(query.double()):
        s = (-lorentz.tangent0_dist(unique, q, c=c) + mu * unique.norm(dim=-1))[inverse]
        if keep is not None:
            s = torch.where(keep[i], s, -torch.inf)
        rows.append(s.argsort(descending=True, stable=True)[:k])
    return torch.stack(rows)


def pool(num=3000, dim=16, seed=0, spread=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(num, dim, generator=generator), dim=-1)
    radius = offset + spread * torch.rand(num, 1, generator=generator) * 3
    return direction * radius


def test_golden_distances_and_ranks():
    d = lorentz.tangent0_dist(POOL.double(), QUERY.double(), c=1.0)
    expected = torch.tensor([0.5, 1.02771916, 1.16095664, 3.43521903, 0.232163479], dtype=torch.float64)
    # The items are stored in fp32: 0.2 and 1.2 are off by 5e-8.
    torch.testing.assert_close(d, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mu", "order"), [(0.0, "40123"), (0.3, "40123"), (0.6, "41023"), (0.9, "41203"), (1.0, "14203")]
)
def test_golden_order(backend, mu, order):
    found = index(POOL, mu=mu, backend=backend).search(QUERY, 5, order="descending")
    assert "".join(map(str, found.ids[0].tolist())) == order
    assert found.certified.all()
    last_first = index(POOL, mu=mu, backend=backend).search(QUERY, 5)
    assert "".join(map(str, last_first.ids[0].tolist())) == order[::-1]
    assert torch.equal(last_first.most_relevant_first(), found.most_relevant_first())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
def test_certified_is_brute_force(backend, mu, c):
    items, queries = pool(), pool(40, seed=1)
    found = index(items, c, mu, backend).search(queries, 8, order="descending")
    assert found.certified.all()
    assert torch.equal(found.ids, brute(items, queries, 8, c=c, mu=mu))
    assert (found.scores.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(found.depth, items.double().norm(dim=-1)[found.ids])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    items, queries = pool().to(dtype), pool(10, seed=1).to(dtype)
    found = index(items, mu=0.3).search(queries, 4, order="descending")
    assert found.certified.all()
    assert torch.equal(found.ids, brute(items, queries, 4, mu=0.3))


def test_a_thousand_queries_for_seven_mu():
    items, queries = pool(4000, 32, spread=1.5), pool(1000, 32, seed=1)
    wide = items.double()
    for mu in MUS:
        found = index(items, mu=mu).search(queries, 4, order="descending")
        assert found.certified.all()
        h = wide.norm(dim=-1)
        # The Gram matrix in fp64 is an oracle of its own; it is good to 1e-9 here, and ties are broken alike.
        p = torch.hypot(torch.ones(()).double(), wide_s(wide).norm(dim=-1))
        q = queries.double()
        inner = wide_s(q) @ wide_s(wide).mT - torch.outer(wide_s(q).square().sum(-1).add(1).sqrt(), p)
        s = -(-inner).clamp(min=1).acosh() + mu * h
        assert torch.equal(found.ids, s.topk(4, dim=-1).indices)


def wide_s(w):
    h = w.norm(dim=-1, keepdim=True)
    return h.sinh() / h * w


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_ties_and_duplicates(backend, mu):
    items = pool(60).repeat(5, 1)
    queries = torch.cat((items[:7], pool(5, seed=1)))
    found = index(items, mu=mu, backend=backend).search(queries, 7, order="descending")
    assert found.certified.all()
    assert torch.equal(found.ids, brute(items, queries, 7, mu=mu))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mu", MUS)
def test_exclude(backend, mu):
    items, queries = pool(500), pool(20, seed=1)
    groups = torch.arange(500) % 50
    nearest = brute(items, queries, 1, mu=mu)[:, 0]
    exclude = groups[nearest]
    found = index(items, mu=mu, backend=backend, groups=groups).search(queries, 6, exclude, order="descending")
    keep = groups != exclude.unsqueeze(-1)
    assert found.certified.all()
    assert torch.equal(found.ids, brute(items, queries, 6, mu=mu, keep=keep))
    assert (groups[found.ids] != exclude.unsqueeze(-1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_and_near(backend):
    """Radii at which fp32 products resolve next to nothing: searches grow, and stay right."""
    items = torch.cat((pool(400, spread=0.001), pool(400, seed=2, spread=2.0, offset=8.0)))
    queries = torch.cat((pool(6, seed=3, spread=2.0, offset=8.0), pool(6, seed=4, spread=0.001)))
    for mu in MUS:
        found = index(items, mu=mu, backend=backend).search(queries, 5, order="descending")
        assert found.certified.all()
        assert torch.equal(found.ids, brute(items, queries, 5, mu=mu))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_norms_rank_as_cosine(backend):
    items = torch.nn.functional.normalize(pool(300), dim=-1)
    queries = pool(10, seed=1)
    with pytest.warns(UserWarning, match="equivalent to TopK-CLIP"):
        found = HyperbolicDemoIndex(items, mu=0.3, backend=backend).search(queries, 5)
    assert torch.equal(found.ids, RicesSelector(items).search(queries, 5).ids)


def test_origin_and_zero_query():
    items = torch.cat((torch.zeros(1, 16), pool(50)))
    found = index(items).search(torch.zeros(1, 16), 3, order="descending")
    assert found.ids[0, 0] == 0
    torch.testing.assert_close(found.scores[0], -found.depth[0])


def test_empty_batch_and_k_equal_to_the_pool():
    assert index(POOL).search(torch.empty(0, 2), 2).ids.shape == (0, 2)
    assert sorted(index(POOL).search(QUERY, 5).ids[0].tolist()) == [0, 1, 2, 3, 4]


@needs_faiss
def test_approximate_never_passes_as_exact():
    items, queries = pool(500), pool(10, seed=1)
    found = index(items, mu=0.3, backend="faiss", faiss_factory="HNSW16").search(queries, 4)
    assert not found.certified.any()
    exact = index(items, mu=0.3).search(queries, 4)
    assert (found.scores <= exact.scores + 1e-12).all()
    flat = index(items, mu=0.3, backend="faiss", faiss_factory="IVF1,Flat").search(queries, 4)
    assert (flat.ids == exact.ids).float().mean() > 0.8
    assert not flat.certified.any()


def test_rounded_products_are_replaced_by_fp64():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert _bounds.products_are_rounded(torch.device("cpu"))
        items, queries = pool(400), pool(10, seed=1)
        assert torch.equal(
            index(items, mu=0.3).search(queries, 4, order="descending").ids, brute(items, queries, 4, mu=0.3)
        )
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("offset", [0.0, 3.0, 12.0])
def test_bounds_hold(mu, offset):
    """s+ >= s, and s' <= s <= s' + e(0), for every pair, with fp32 products."""
    items, queries = pool(500, offset=offset), pool(30, seed=1, offset=offset)
    depth = items.double().norm(dim=-1)
    exact = torch.stack([-lorentz.tangent0_dist(items.double(), q, c=0.7) + mu * depth for q in queries.double()])
    upper = _bounds.upper_scores(_bounds.upper_keys(items, depth, queries.double(), 0.7, mu), 0.7)
    assert (upper >= exact).all()
    wide = -_bounds.tilted_query(queries.double(), 0.7) @ _bounds.tilted_rows(items, 0.7, mu).mT
    lower = _bounds.lower_score(wide, 0.7)
    slack = 1e-8 * math.exp(2 * offset) + 1e-9
    assert (lower <= exact + slack).all()
    assert (exact <= lower + _bounds.gap(torch.zeros(()).double(), 0.7) + slack).all()
    distance = mu * depth - exact
    if offset < 12:
        bound = lower + _bounds.gap(distance, 0.7)
        torch.testing.assert_close(bound, exact, atol=1e-5, rtol=1e-6)
        least = _bounds.least_distance(lower + 1e-9, float((mu * depth).min()), 0.7)
        assert (least <= distance + 1e-6).all()


def test_gamma_covers_the_measured_error():
    items, queries = pool(2000, 128), pool(50, 128, seed=1)
    error = (queries @ items.mT).double() - queries.double() @ items.double().mT
    size = torch.outer(queries.double().norm(dim=-1), items.double().norm(dim=-1))
    assert (error.abs() <= _bounds.gamma(128) * size).all()


def test_diversity():
    close = torch.tensor([[1.0, 0.0], [1.001, 0.0], [0.999, 0.001], [0.6, 0.6], [0.0, -1.0]])
    plain = index(close).search(QUERY, 2, order="descending").ids[0].tolist()
    mixed = index(close).search(QUERY, 2, order="descending", diversity=0.9)
    assert set(plain) <= {0, 1, 2}
    assert mixed.ids[0, 0] == 0
    assert mixed.ids[0, 1] in (3, 4)
    torch.testing.assert_close(mixed.scores[0, 0], torch.tensor(0.0).double())
    assert torch.equal(index(close).search(QUERY, 2, order="descending", diversity=1e-12).ids[0], torch.tensor(plain))


def greedy(pool_, query, k, diversity, mu):
    score = -lorentz.tangent0_dist(pool_, query, c=1.0) + mu * pool_.norm(dim=-1)
    open_ = score.argsort(descending=True)[: 4 * k].tolist()
    chosen = [open_.pop(0)]
    while len(chosen) < k:
        value = [
            (1 - diversity) * score[i] + diversity * min(lorentz.tangent0_dist(pool_[i], pool_[j]) for j in chosen)
            for i in open_
        ]
        chosen.append(open_.pop(max(range(len(open_)), key=value.__getitem__)))
    return chosen


def test_diversity_is_greedy_marginal_relevance():
    items, queries = pool(200, 4), pool(4, 4, seed=1)
    found = index(items, mu=0.3).search(queries, 5, order="descending", diversity=0.4)
    for row, query in zip(found.ids.tolist(), queries, strict=True):
        assert row == greedy(items.double(), query.double(), 5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: HyperbolicDemoIndex(POOL, c=0.0), "c must"),
        (lambda: HyperbolicDemoIndex(POOL, c=-1.0), "c must"),
        (lambda: HyperbolicDemoIndex(POOL, backend="annoy"), "backend must"),
        (lambda: HyperbolicDemoIndex(POOL, mu=float("nan")), "mu must"),
        (lambda: HyperbolicDemoIndex(torch.empty(0, 2)), "empty pool"),
        (lambda: HyperbolicDemoIndex(torch.ones(3)), "tangent must"),
        (lambda: HyperbolicDemoIndex(torch.full((2, 2), torch.inf)), "finite"),
        (lambda: HyperbolicDemoIndex(POOL * 200), "300"),
        (lambda: HyperbolicDemoIndex(POOL, groups=torch.zeros(4, dtype=torch.int64)), "groups must"),
        (lambda: HyperbolicDemoIndex(POOL).search(QUERY, 0), "k must"),
        (lambda: HyperbolicDemoIndex(POOL).search(QUERY, 6), "k must"),
        (lambda: HyperbolicDemoIndex(POOL).search(torch.ones(1, 3), 2), "length 2"),
        (lambda: HyperbolicDemoIndex(POOL).search(QUERY * torch.nan, 2), "finite"),
        (lambda: HyperbolicDemoIndex(POOL).search(QUERY * 400, 2), "300"),
        (lambda: HyperbolicDemoIndex(POOL).search(QUERY, 2, order="up"), "order must"),
        (lambda: HyperbolicDemoIndex(POOL).search(QUERY, 2, diversity=2.0), "diversity must"),
        (lambda: HyperbolicDemoIndex(POOL).search(QUERY, 2, torch.zeros(1, dtype=torch.int64)), "exclude must"),
        (
            lambda: HyperbolicDemoIndex(POOL, groups=torch.tensor([0, 0, 0, 0, 1])).search(QUERY, 2, torch.tensor([0])),
            "exclude leaves",
        ),
        (lambda: AnchorBank(torch.empty(0, 2)), "empty bank"),
        (lambda: AnchorBank(POOL, ids=["one"]), "ids must"),
        (lambda: AnchorBank(POOL, c=-1.0), "c must"),
        (lambda: TopKClipSelector(POOL).search(QUERY, 6), "k must"),
        (lambda: TopKClipSelector(torch.empty(0, 2)), "empty pool"),
        (lambda: RandomSelector(0), "num_items must"),
        (lambda: RandomSelector(3).search(1, 4), "k must"),
        (lambda: MmicesSelector(POOL, POOL[:3]), "texts must"),
        (lambda: MmicesSelector(POOL, POOL, prefilter=2).search(QUERY, 3, text=QUERY), "prefilter"),
        (lambda: knn_vote(TopKClipSelector(POOL).search(QUERY, 2), []), "answers must"),
    ],
)
def test_bad_input(make, word, refused):
    with refused(word):
        make()


def test_warnings():
    with pytest.warns(UserWarning, match="beyond 1"):
        HyperbolicDemoIndex(POOL, mu=1.5)


@needs_faiss
def test_faiss_refuses_what_fp32_cannot_hold(refused):
    with refused("query is too deep"):
        index(POOL, backend="faiss").search(100 * QUERY, 2)
    with refused("tangent is too deep"):
        index(POOL * 50, backend="faiss")
    far = index(POOL * 50).search(100 * QUERY, 2, order="descending")
    assert far.certified.all()
    assert torch.equal(far.ids, brute(POOL * 50, 100 * QUERY, 2))


@needs_faiss
def test_faiss_warns_of_large_radii():
    with pytest.warns(UserWarning, match="> 6"):
        HyperbolicDemoIndex(3 * POOL, backend="faiss")


def test_bank_round_trip(tmp_path):
    bank = AnchorBank(POOL, c=0.7, groups=torch.arange(5), ids=list("abcde"))
    bank.save(tmp_path)
    again = AnchorBank.load(tmp_path)
    assert torch.equal(again.tangent, bank.tangent)
    assert torch.equal(again.groups, bank.groups)
    assert (again.c, again.ids) == (0.7, tuple("abcde"))
    assert torch.equal(again.index(0.3).search(QUERY, 3).ids, bank.index(0.3).search(QUERY, 3).ids)
    (tmp_path / "bank.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="complete"):
        AnchorBank.load(tmp_path)
    with pytest.raises(ValueError, match="complete"):
        AnchorBank.load(tmp_path / "nowhere")


def test_baselines():
    items, queries = pool(50), pool(6, seed=1)
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (items, queries))
    expected = (b @ a.mT).argsort(-1, descending=True)[:, :4]
    assert torch.equal(TopKClipSelector(items).search(queries, 4).ids, expected)
    assert torch.equal(RicesSelector(items).search(queries, 4).ids, expected.flip(-1))
    groups = torch.arange(50) // 5
    exclude = groups[expected[:, 0]]
    found = RicesSelector(items, groups).search(queries, 4, exclude)
    assert (groups[found.ids] != exclude.unsqueeze(-1)).all()
    assert found.certified.all()


def test_random_is_a_function_of_seed_and_query_number():
    whole = RandomSelector(30, seed=3).search(10, 4)
    assert torch.equal(RandomSelector(30, seed=3).search(torch.zeros(4, 2), 4, first=6).ids, whole.ids[6:])
    assert not torch.equal(RandomSelector(30, seed=4).search(10, 4).ids, whole.ids)
    assert all(len(set(row)) == 4 for row in whole.ids.tolist())
    groups = torch.arange(30) % 3
    found = RandomSelector(30, groups=groups).search(5, 10, torch.full((5,), 1))
    assert (groups[found.ids] != 1).all()


def test_mmices_filters_by_image_and_ranks_by_text():
    images, texts = pool(40), pool(40, 8, seed=5)
    queries, words = pool(3, seed=1), pool(3, 8, seed=6)
    kept = TopKClipSelector(images).search(queries, 10).ids
    found = MmicesSelector(images, texts, prefilter=10).search(queries, 4, text=words)
    cosine = torch.nn.functional.cosine_similarity(texts[kept], words.unsqueeze(1), dim=-1)
    assert torch.equal(found.ids, kept.gather(-1, cosine.argsort(-1, descending=True)[:, :4]))


def test_vote():
    found = TopKClipSelector(POOL).search(QUERY, 3)
    answers = ["a"] * 5
    answers[found.ids[0, 0]] = "b"
    assert knn_vote(found, answers) == ["a"]
    two = TopKClipSelector(POOL).search(QUERY, 2)
    assert knn_vote(two, answers) == ["b"]
    assert knn_vote(RicesSelector(POOL).search(QUERY, 2), answers) == ["b"]
