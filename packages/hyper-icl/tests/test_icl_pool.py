"""Pools that change and live in files, exact cosines with ties, selectors that weigh company, vectors for other stores."""

import importlib.util
import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hyper_geom import lorentz
from hyper_icl import (
    AnchorBank,
    BalancedSelector,
    DppSelector,
    HyperbolicDemoIndex,
    MmicesSelector,
    MmrSelector,
    RicesSelector,
    TopKClipSelector,
    inner_product_query,
    inner_product_vectors,
    vote_k,
)
from hyper_icl.demonstrations import selection as module

HAS_FAISS = importlib.util.find_spec("faiss") is not None
BACKENDS = ["torch", pytest.param("faiss", marks=pytest.mark.skipif(not HAS_FAISS, reason="faiss is not installed"))]


def draw(num, dim=8, seed=0):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def same_search(one, two, queries):
    a, b = one.search(queries, 5), two.search(queries, 5)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-12, rtol=0)
    assert a.certified.all()
    assert b.certified.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_and_remove_are_a_new_index(backend):
    items, more, queries = draw(60), draw(20, seed=1), draw(7, seed=2)
    groups = torch.arange(80) // 4
    index = HyperbolicDemoIndex(items, mu=0.3, backend=backend, groups=groups[:60])
    index.add(more, groups[60:])
    whole = torch.cat((items, more))
    same_search(index, HyperbolicDemoIndex(whole, mu=0.3, backend=backend, groups=groups), queries)
    gone = torch.tensor([0, 5, 79])
    index.remove(gone)
    kept = torch.tensor([i for i in range(80) if i not in gone.tolist()])
    fresh = HyperbolicDemoIndex(whole[kept], mu=0.3, backend=backend, groups=groups[kept])
    same_search(index, fresh, queries)
    exclude = torch.full((7,), 3)
    assert (groups[kept][index.search(queries, 5, exclude).ids] != 3).all()
    assert len(index) == 77


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_is_saved_and_opened(tmp_path, backend):
    items, queries = draw(60), draw(7, seed=2)
    index = HyperbolicDemoIndex(items, c=0.7, mu=0.3, backend=backend, groups=torch.arange(60))
    index.save(tmp_path)
    again = HyperbolicDemoIndex.load(tmp_path)
    same_search(index, again, queries)
    assert (again.c, again.mu, again.backend) == (0.7, 0.3, backend)
    assert torch.equal(again.groups, index.groups)
    assert torch.equal(AnchorBank.load(tmp_path).tangent, items)
    AnchorBank(items).save(tmp_path / "bank")
    with pytest.raises(ValueError, match="got a bank"):
        HyperbolicDemoIndex.load(tmp_path / "bank")


def test_a_bank_is_built_in_parts(tmp_path):
    items = draw(1000, 12)
    groups, ids = torch.arange(1000) // 3, [f"n{i}" for i in range(1000)]
    bank = AnchorBank.build(tmp_path, items.split(77), 0.7, groups, ids)
    assert torch.equal(bank.tangent, items)
    assert torch.equal(bank.groups, groups)
    assert bank.ids == tuple(ids)
    torch.testing.assert_close(bank.depth, items.norm(dim=-1))
    # Any reader of safetensors reads it.
    assert torch.equal(load_file(tmp_path / "bank.safetensors")["tangent"], items)
    queries = draw(4, 12, seed=3)
    same_search(bank.index(0.3), HyperbolicDemoIndex(items, 0.7, 0.3, groups=groups), queries)
    # A folder's own rows and new ones, written to the same folder.
    more = draw(10, 12, seed=4)
    grown = AnchorBank.build(tmp_path, itertools.chain(bank.tangent.split(100), [more]), 0.7)
    assert torch.equal(grown.tangent, torch.cat((items, more)))
    assert grown.ids[-1] == "1009"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank.safetensors"]
    wide = AnchorBank.build(tmp_path / "wide", [items.double()])
    assert wide.tangent.dtype == torch.float64


def test_a_failed_build_leaves_the_old_file(tmp_path):
    items = draw(10)
    AnchorBank.build(tmp_path, [items], ids=list("abcdefghij"))
    for parts, word in (
        ([items, items[:, :3]], "length 8"),
        ([items * torch.nan], "finite"),
        ([], "empty"),
        ([items[:0]], "empty"),
    ):
        with pytest.raises(ValueError, match=word):
            AnchorBank.build(tmp_path, parts)
    with pytest.raises(ValueError, match="ids must"):
        AnchorBank.build(tmp_path, [items], ids=["one"])
    again = AnchorBank.load(tmp_path)
    assert torch.equal(again.tangent, items)
    assert again.ids == tuple("abcdefghij")


def test_banks_of_the_first_format_are_read(tmp_path):
    facts = {"format": "1", "c": "0.5", "ids": json.dumps(["a", "b"])}
    save_file({"tangent": draw(2)}, tmp_path / "bank.safetensors", metadata=facts)
    bank = AnchorBank.load(tmp_path)
    assert (bank.c, bank.ids) == (0.5, ("a", "b"))
    torch.testing.assert_close(bank.depth, draw(2).norm(dim=-1))


def test_a_bank_grows_and_shrinks():
    bank = AnchorBank(draw(4), groups=torch.arange(4), ids=list("abcd"))
    more = bank.add(draw(2, seed=1), torch.tensor([7, 8]), ["e", "f"]).remove(["b", "e"])
    assert more.ids == tuple("acdf")
    assert more.groups.tolist() == [0, 2, 3, 8]
    assert torch.equal(more.tangent, torch.cat((draw(4)[[0, 2, 3]], draw(2, seed=1)[1:])))
    for call, word in (
        (lambda: bank.add(draw(1), torch.tensor([1]), ["a"]), "new names"),
        (lambda: bank.add(draw(1), None, ["z"]), "exactly where"),
        (lambda: bank.remove(["q"]), "in the bank"),
        (lambda: bank.remove(list("abcd")), "empty bank"),
        (lambda: HyperbolicDemoIndex(draw(3)).remove(torch.tensor([3])), "rows 0..2"),
        (lambda: HyperbolicDemoIndex(draw(3)).remove(torch.arange(3)), "at least one"),
        (lambda: HyperbolicDemoIndex(draw(3)).add(draw(1), torch.tensor([1])), "exactly where"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


def brute_cosine(pool, queries, k, keep=None):
    """numpy in fp64; scores are rounded so that equal items tie, and ties go to the smaller row."""
    a, b = (x.double().numpy() for x in (pool, queries))
    cosine = b @ a.T / np.linalg.norm(b, axis=1)[:, None] / np.maximum(np.linalg.norm(a, axis=1), 1e-300)
    if keep is not None:
        cosine = np.where(keep.numpy(), cosine, -np.inf)
    order = [
        sorted(range(len(pool)), key=lambda i, row=row: (-round(row[i], 12) if np.isfinite(row[i]) else 9, i))
        for row in cosine
    ]
    return torch.tensor([row[:k] for row in order])


@pytest.mark.parametrize("kind", [TopKClipSelector, RicesSelector])
def test_cosines_are_exact_and_ties_go_to_the_smaller_row(kind):
    """A pool that holds every item five times, once scaled: what left 84 of 200 places to chance."""
    pool = draw(60, 16).repeat(5, 1)
    pool[120:180] *= 2.0
    queries = torch.cat((pool[:20], draw(20, 16, seed=1)))
    found = kind(pool).search(queries, 7)
    assert found.certified.all()
    assert torch.equal(found.most_relevant_first(), brute_cosine(pool, queries, 7))
    groups = torch.arange(300) % 60
    exclude = groups[found.most_relevant_first()[:, 0]]
    other = kind(pool, groups).search(queries, 7, exclude)
    keep = groups != exclude.unsqueeze(-1)
    assert torch.equal(other.most_relevant_first(), brute_cosine(pool, queries, 7, keep))


def test_cosines_that_fp32_cannot_tell_apart():
    base = torch.nn.functional.normalize(draw(1, 64), dim=-1)
    pool = (base + 1e-5 * draw(500, 64, seed=1)) * (1 + torch.rand(500, 1, generator=torch.Generator().manual_seed(2)))
    found = TopKClipSelector(pool).search(base, 8)
    assert found.certified.all()
    assert int(found.num_candidates) > 32
    a = torch.nn.functional.normalize(pool.double(), dim=-1) @ torch.nn.functional.normalize(base.double(), dim=-1)[0]
    assert torch.equal(found.ids[0], a.argsort(descending=True)[:8])
    zero = torch.cat((torch.zeros(1, 64), pool))
    assert TopKClipSelector(zero).search(base, 501).ids[0, -1] == 0
    assert TopKClipSelector(pool).search(base[:0], 3).ids.shape == (0, 3)


def test_mmices_ties():
    images, texts = draw(40).repeat(3, 1), draw(40, 6, seed=1).repeat(3, 1)
    found = MmicesSelector(images, texts, prefilter=30).search(images[:2], 6, text=texts[:2])
    assert found.certified.all()
    assert found.ids[0, :3].tolist() == [0, 40, 80]
    assert found.ids[1, :3].tolist() == [1, 41, 81]


@pytest.fixture
def company():
    pool, queries = draw(30, 6), draw(3, 6, seed=1)
    unit = torch.nn.functional.normalize(pool.double(), dim=-1)
    return pool, queries, unit @ unit.mT, torch.nn.functional.normalize(queries.double(), dim=-1) @ unit.mT


@pytest.mark.parametrize("diversity", [0.0, 0.4, 1.0])
def test_mmr_is_its_greedy_rule(company, diversity):
    pool, queries, between, near = company
    found = MmrSelector(pool, diversity, prefilter=12, order="descending").search(queries, 5)
    for b in range(3):
        open_ = near[b].argsort(descending=True)[:12].tolist()
        chosen = [open_.pop(0)]
        while len(chosen) < 5:
            value = [(1 - diversity) * near[b, i] - diversity * max(between[i, j] for j in chosen) for i in open_]
            chosen.append(open_.pop(max(range(len(open_)), key=value.__getitem__)))
        assert found.ids[b].tolist() == chosen


@pytest.mark.parametrize("relevance", [0.5, 5.0])
def test_dpp_is_the_greedy_determinant(company, relevance):
    """Every step against determinants of all extensions."""
    pool, queries, between, near = company
    found = DppSelector(pool, relevance, prefilter=12, order="descending").search(queries, 5)
    for b in range(3):
        open_, chosen = near[b].argsort(descending=True)[:12].tolist(), []
        while len(chosen) < 5:

            def value(i, chosen=chosen, b=b):
                rows = torch.tensor([*chosen, i])
                return float(torch.logdet(between[rows][:, rows])) + relevance * float(near[b, rows].sum())

            best = max(open_, key=value)
            chosen.append(best)
            open_.remove(best)
        assert found.ids[b].tolist() == chosen


def test_dpp_leaves_copies_to_the_end():
    pool = torch.cat((draw(4, 6), draw(4, 6)))
    found = DppSelector(pool, 1.0, order="descending").search(draw(2, 6, seed=1), 8)
    assert all(len({i % 4 for i in row[:4]}) == 4 for row in found.ids.tolist())
    assert all(sorted(row) == list(range(8)) for row in found.ids.tolist())


def test_balanced_takes_labels_in_turn(company):
    pool, queries, _, near = company
    labels = [f"l{i % 3}" for i in range(30)]
    found = BalancedSelector(pool, labels, prefilter=30, order="descending").search(queries, 7)
    for b in range(3):
        ranked = near[b].argsort(descending=True).tolist()
        turn = {i: sum(labels[j] == labels[i] for j in ranked[:place]) for place, i in enumerate(ranked)}
        assert found.ids[b].tolist() == sorted(ranked, key=turn.__getitem__)[:7]
    groups = torch.arange(30) // 10
    assert (
        BalancedSelector(pool, labels, groups).search(queries, 7, torch.tensor([0, 1, 2])).ids // 10
        != torch.arange(3)[:, None]
    ).all()


def test_vote_k_is_its_rule():
    pool = draw(40, 5)
    unit = torch.nn.functional.normalize(pool.double(), dim=-1)
    cosine = (unit @ unit.mT).fill_diagonal_(-2)
    near = [set(row.argsort(descending=True)[:6].tolist()) for row in cosine]
    chosen = []
    for _ in range(5):
        rest = [u for u in range(40) if u not in chosen]
        score = {u: sum(10.0 ** -len(near[v] & set(chosen)) for v in rest if u in near[v]) for u in rest}
        chosen.append(max(rest, key=lambda u, score=score: (round(score[u], 12), -u)))
    assert vote_k(pool, 5, neighbors=6).tolist() == chosen


def test_order_can_be_turned():
    found = TopKClipSelector(draw(10)).search(draw(2, seed=1), 3)
    turned = found.reordered("ascending")
    assert torch.equal(turned.ids, found.ids.flip(-1))
    assert torch.equal(turned.scores, found.scores.flip(-1))
    assert torch.equal(turned.most_relevant_first(), found.ids)
    assert turned.reordered("ascending") is turned
    near = MmrSelector(draw(10), 0.3).search(draw(2, seed=1), 3)
    assert torch.equal(near.most_relevant_first()[:, 0], found.ids[:, 0])


@pytest.mark.parametrize("mu", [-0.5, 0.0, 0.3, 1.0])
def test_vectors_for_other_stores(mu):
    """numpy's inner products stand for the store: minus the log of the product is the score less a small gap."""
    pool, queries = draw(300, 6), draw(5, 6, seed=1)
    products = inner_product_query(queries, 0.7).numpy() @ inner_product_vectors(pool, 0.7, mu).numpy().T
    k = math.sqrt(0.7)
    for b, query in enumerate(queries.double()):
        distance = lorentz.tangent0_dist(pool.double(), query, c=0.7)
        score = -distance + mu * pool.double().norm(dim=-1)
        found = -np.log(-2 * 0.7 * products[b]) / k
        gap = np.log1p(np.exp(-2 * k * distance.numpy())) / k
        np.testing.assert_allclose(found + gap, score.numpy(), atol=1e-4)
    index = HyperbolicDemoIndex(pool, 0.7, mu)
    exact = index.search(queries, 4)
    candidates = torch.from_numpy(np.argsort(-products, axis=1)[:, :40].copy())
    again = index.rescore(queries, candidates, 4)
    assert not again.certified.any()
    assert torch.equal(again.ids, exact.ids)
    torch.testing.assert_close(again.scores, exact.scores)
    with pytest.raises(ValueError, match="candidates must"):
        index.rescore(queries, candidates, 41)
    with pytest.raises(ValueError, match="shallow enough"):
        inner_product_query(200 * queries)


@pytest.mark.skipif(not HAS_FAISS, reason="faiss is not installed")
def test_auto_takes_faiss_for_one_query_of_a_large_pool(monkeypatch):
    items, queries = draw(200) / 2, draw(6, seed=1) / 2
    index = HyperbolicDemoIndex(items, mu=0.3)
    index.search(queries[:1], 3)
    assert index._index is None
    monkeypatch.setattr(module, "_FAISS_NUMBERS", 1)
    index.search(queries, 3)
    assert index._index is None
    by_torch = HyperbolicDemoIndex(items, mu=0.3, backend="torch")
    for query in queries.split(1):
        same_search(index, by_torch, query)
    assert index._index is not None
    assert by_torch._index is None
    deep = HyperbolicDemoIndex(items * 8, mu=0.3)
    deep.search(queries[:1], 3)
    assert deep._index is None


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MmrSelector(draw(4), 1.5), "diversity must"),
        (lambda: DppSelector(draw(4), 0.0), "relevance must"),
        (lambda: BalancedSelector(draw(4), ["a"]), "labels must"),
        (lambda: MmrSelector(draw(4), prefilter=2).search(draw(1), 3), "prefilter"),
        (lambda: MmrSelector(draw(4), order="up"), "order must"),
        (lambda: vote_k(draw(4), 5, 2), "num must"),
        (lambda: vote_k(draw(4), 2, 4), "neighbors"),
        (lambda: TopKClipSelector(draw(4)).search(draw(1), 2).reordered("up"), "order must"),
        (lambda: HyperbolicDemoIndex(draw(4), depth=torch.ones(3).double()), "depth must"),
    ],
)
def test_bad_input(make, word, refused):
    with refused(word):
        make()
