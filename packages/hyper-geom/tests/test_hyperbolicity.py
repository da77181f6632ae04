"""Gromov products and deltas against a loop over all quadruples and against known spaces."""

import itertools
import math

import networkx
import pytest
import torch

from hyper_geom import hyperbolicity
from hyper_geom.hyperbolicity import gromov_delta, gromov_product


def graph_distances(graph):
    return torch.from_numpy(networkx.floyd_warshall_numpy(graph))


def random_metric(num_points, seed, dtype=torch.float64):
    points = torch.randn(num_points, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").to(dtype)


def brute_delta(D, base=None):
    best = 0.0
    for quadruple in itertools.combinations(range(len(D)), 4):
        if base is not None and base not in quadruple:
            continue
        x, y, z, w = quadruple
        sums = sorted(float(value) for value in (D[x, y] + D[z, w], D[x, z] + D[y, w], D[x, w] + D[y, z]))
        best = max(best, (sums[2] - sums[1]) / 2)
    return best


@pytest.mark.parametrize("num_points", [4, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_exact_and_fixed_base_equal_the_loop_over_quadruples(num_points, seed):
    D = random_metric(num_points, seed)
    assert gromov_delta(D, "exact").delta.item() == pytest.approx(brute_delta(D), abs=1e-12)
    for base in range(num_points):
        got = gromov_delta(D, "fixed_base", base=base).delta.item()
        assert got == pytest.approx(brute_delta(D, base), abs=1e-12)
        assert got <= brute_delta(D) + 1e-12 <= 2 * got + 2e-12


def test_product_equals_its_definition():
    D = random_metric(6, 0)
    for base in (0, 3):
        product = gromov_product(D, base)
        for x, y in itertools.product(range(6), range(6)):
            assert product[x, y].item() == pytest.approx((D[x, base] + D[y, base] - D[x, y]).item() / 2)


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_has_delta_zero(seed):
    tree = networkx.random_labeled_tree(24, seed=seed)
    for i, (left, right) in enumerate(tree.edges):
        tree.edges[left, right]["weight"] = 1.0 + 0.25 * (i % 5)
    for method in ("exact", "fixed_base", "sampled"):
        delta, diameter, relative = gromov_delta(graph_distances(tree), method)
        assert delta.item() == 0
        assert relative.item() == 0
        assert diameter.item() > 0


@pytest.mark.parametrize(("length", "expected"), [(4, 1.0), (5, 0.5), (6, 1.0), (8, 2.0)])
def test_cycles(length, expected):
    delta, diameter, relative = gromov_delta(graph_distances(networkx.cycle_graph(length)), "exact")
    assert delta.item() == expected
    assert diameter.item() == length // 2
    assert relative.item() == 2 * expected / (length // 2)


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(("radius", "expected"), [(1.0, 0.4866259934), (5.0, 0.6930563910), (16.0, math.log(2.0))])
def test_square_in_the_hyperbolic_plane(radius, expected, c):
    # Corners at distance R / k from the centre: cosh(k d) = cosh^2 R between neighbours, d = 2 R / k across.
    k = math.sqrt(c)
    side, across = math.acosh(math.cosh(radius) ** 2) / k, 2 * radius / k
    D = torch.tensor(
        [[0, side, across, side], [side, 0, side, across], [across, side, 0, side], [side, across, side, 0]],
        dtype=torch.float64,
    )
    assert gromov_delta(D, "exact").delta.item() == pytest.approx(expected / k, abs=1e-9)


def test_chunks_do_not_change_the_result(monkeypatch):
    D = random_metric(11, 5)
    whole = {method: gromov_delta(D, method) for method in ("exact", "fixed_base")}
    for chunk_bytes in (1, 8 * 11 * 3, 8 * 121 * 4):  # less than a row, a part of a row, a few rows
        monkeypatch.setattr(hyperbolicity, "_CHUNK_BYTES", chunk_bytes)
        for method, expected in whole.items():
            assert gromov_delta(D, method) == expected
    monkeypatch.setattr(hyperbolicity, "_CHUNK_BYTES", 16 * 8 * 7)
    assert gromov_delta(D, "sampled", 2000).delta <= whole["exact"].delta


def test_temporaries_stay_below_the_chunk(monkeypatch):
    monkeypatch.setattr(hyperbolicity, "_CHUNK_BYTES", 2**16)
    sizes = []
    minimum = torch.minimum
    monkeypatch.setattr(torch, "minimum", lambda a, b: sizes.append((minimum(a, b)).nbytes) or minimum(a, b))
    D = random_metric(60, 0)
    gromov_delta(D, "fixed_base")
    assert max(sizes) <= 2**16 < 8 * 60**3


def test_sampling_bounds_from_below_and_finds_the_value():
    D = random_metric(12, 3)
    exact = gromov_delta(D, "exact").delta
    few = gromov_delta(D, "sampled", 10, torch.Generator().manual_seed(0)).delta
    many = gromov_delta(D, "sampled", 200_000, torch.Generator().manual_seed(0)).delta
    assert few <= exact
    assert many.item() == pytest.approx(exact.item(), abs=1e-12)
    again = gromov_delta(D, "sampled", 10, torch.Generator().manual_seed(0)).delta
    assert again == few


@pytest.mark.parametrize("method", ["exact", "fixed_base", "sampled"])
@pytest.mark.parametrize("num_points", [0, 1, 2, 3])
def test_small_spaces_have_delta_zero(method, num_points):
    delta, diameter, relative = gromov_delta(random_metric(num_points, 0), method, 50)
    assert delta.item() == pytest.approx(0, abs=1e-12)
    assert relative.item() == pytest.approx(0, abs=1e-12)
    assert (diameter.item() > 0) == (num_points > 1)


def test_equal_points_have_relative_zero():
    assert [value.item() for value in gromov_delta(torch.zeros(5, 5))] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_inputs(dtype):
    D = random_metric(8, 0, dtype).requires_grad_()
    kept = D.detach().clone()
    result = gromov_delta(D, "exact")
    assert result.delta.dtype == torch.float32
    assert not result.delta.requires_grad
    assert torch.equal(D.detach(), kept)
    assert result.delta.item() == pytest.approx(brute_delta(kept.double()), rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "fixed_base", "sampled"])
def test_nan_propagates(method):
    D = random_metric(6, 0)
    D[1, 2] = D[2, 1] = math.nan
    result = gromov_delta(D, method, 5000)
    assert all(math.isnan(value) for value in result)


def test_the_diagonal_counts_as_zero_and_the_input_stays():
    D = random_metric(6, 0)
    rounded = D + 0.01 * torch.eye(6)
    kept = rounded.clone()
    assert torch.equal(gromov_product(rounded, 2), gromov_product(D, 2))
    assert gromov_delta(rounded) == gromov_delta(D)
    assert torch.equal(rounded, kept)


def test_bad_input():
    D = random_metric(5, 0)
    with pytest.raises(ValueError, match="symmetric"):
        gromov_delta(D + torch.triu(torch.ones(5, 5), 1))
    with pytest.raises(ValueError, match="symmetric"):
        gromov_product(D + torch.triu(torch.ones(5, 5), 1))
    with pytest.raises(ValueError, match="square"):
        gromov_delta(D[:4])
    with pytest.raises(ValueError, match="square"):
        gromov_product(D[None])
    with pytest.raises(TypeError, match="floating"):
        gromov_delta(D.long())
    with pytest.raises(ValueError, match="method"):
        gromov_delta(D, "brute")
    with pytest.raises(ValueError, match="num_samples"):
        gromov_delta(D, "sampled", 0)
    with pytest.raises(TypeError, match="num_samples"):
        gromov_delta(D, "sampled", 1.5)
    for base in (-1, 5):
        with pytest.raises(ValueError, match="base"):
            gromov_product(D, base)
        with pytest.raises(ValueError, match="base"):
            gromov_delta(D, "fixed_base", base=base)
    with pytest.raises(TypeError, match="base"):
        gromov_product(D, 0.0)
