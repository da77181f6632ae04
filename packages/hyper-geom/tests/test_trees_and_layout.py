"""Trees: the embedding, the measures against brute force, and the picture with its numbers."""

import math
import xml.etree.ElementTree as ElementTree

import networkx
import pytest
import torch

from hyper_geom import convert, embed_tree, is_entailed, lorentz, tree_fit, trees
from hyper_geom.layout import layout, to_html, to_svg


def tree(branching=3, depth=3):
    graph = networkx.balanced_tree(branching, depth)
    edges = torch.tensor(list(networkx.bfs_edges(graph, 0)))
    return edges, graph.number_of_nodes(), graph


@pytest.mark.parametrize("shape", ["balanced", "random", "path", "single"])
def test_graph_distances(shape):
    graph = {
        "balanced": networkx.balanced_tree(2, 3),
        "random": networkx.random_labeled_tree(20, seed=3),
        "path": networkx.path_graph(7),
        "single": networkx.empty_graph(1),
    }[shape]
    edges = torch.tensor(list(networkx.bfs_edges(graph, max(graph) // 2)), dtype=torch.int64).reshape(-1, 2)
    found = trees.graph_distances(edges, len(graph))
    wanted = dict(networkx.all_pairs_shortest_path_length(graph))
    for i in graph:
        for j in graph:
            assert found[i, j] == wanted[i][j]


@pytest.mark.parametrize("dim", [2, 3, 5])
@pytest.mark.parametrize("c", [0.5, 2.0])
def test_embedding_is_a_tree(dim, c):
    edges, num, _ = tree()
    generator = torch.Generator().manual_seed(0)
    layout_alone = embed_tree(edges, num, dim, c=c, edge_length=1.5 / math.sqrt(c), num_steps=0, generator=generator)
    lengths = lorentz.dist(layout_alone[edges[:, 0]], layout_alone[edges[:, 1]], c=c)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1.5 / math.sqrt(c)), rtol=1e-9, atol=0)
    generator = torch.Generator().manual_seed(0)
    better = embed_tree(edges, num, dim, c=c, edge_length=1.5 / math.sqrt(c), num_steps=100, generator=generator)
    before, after = tree_fit(layout_alone, edges, c=c), tree_fit(better, edges, c=c)
    assert after.distortion < before.distortion < 0.12
    assert after.mean_average_precision > 0.99
    assert after.parent_order == 1.0
    assert better[0].abs().max() == 0
    assert lorentz.dist0(better, c=c)[1:].min() > 0


def test_embedding_in_the_ball_and_of_one_node():
    edges, num, _ = tree(2, 2)
    x, p = (embed_tree(edges, num, num_steps=5, model=m) for m in ("lorentz", "poincare"))
    torch.testing.assert_close(convert.poincare_to_lorentz(p), x)
    assert torch.equal(embed_tree(torch.zeros(0, 2, dtype=torch.int64), 1), torch.zeros(1, 2).double())


def test_measures_against_brute_force():
    edges, num, graph = tree(2, 3)
    noise = torch.randn(num, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = lorentz.exp_map_frame(embed_tree(edges, num, 3, num_steps=0), 0.4 * noise)
    D, target = lorentz.dist(points.unsqueeze(1), points), trees.graph_distances(edges, num)
    fit = tree_fit(points, edges, min_radius=0.5)
    precisions = []
    for u in graph:
        near = sorted((v for v in graph if v != u), key=lambda v: D[u, v])
        places = [near.index(v) + 1 for v in graph[u]]
        precisions.append(sum(sum(q <= p for q in places) / p for p in places) / len(places))
    assert fit.mean_average_precision == pytest.approx(sum(precisions) / num)
    ratio = [float(D[i, j] / target[i, j]) for i in graph for j in graph if i < j]
    assert fit.worst == pytest.approx(max(ratio) / min(ratio))
    scale = sum(ratio) / sum(r * r for r in ratio)
    assert fit.distortion == pytest.approx(sum(abs(scale * r - 1) for r in ratio) / len(ratio))
    ancestors = {(a, b) for b in graph for a in networkx.ancestors(networkx.DiGraph(edges.tolist()), b)}
    held = {(a, b) for a in graph for b in graph if a != b and bool(is_entailed(points[a], points[b], min_radius=0.5))}
    assert fit.cone_precision == pytest.approx(len(held & ancestors) / len(held))
    assert fit.cone_recall == pytest.approx(len(held & ancestors) / len(ancestors))
    assert fit.parent_order == pytest.approx(
        sum(bool(lorentz.dist0(points[a]) < lorentz.dist0(points[b])) for a, b in edges.tolist()) / len(edges)
    )
    assert tree_fit(convert.lorentz_to_poincare(points), edges, model="poincare").worst == pytest.approx(fit.worst)


def test_rank_correlation():
    scipy_stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(5, (40,)).double(), torch.randn(40)
    assert trees.rank_correlation(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)


def test_errors_of_trees():
    good = torch.tensor([[0, 1], [0, 2]])
    for edges, name in (
        (good.float(), "int64"),
        (torch.tensor([[0, 1], [2, 1]]), "one parent"),
        (torch.tensor([[0, 1], [0, 3]]), "nodes in"),
        (torch.tensor([[0, 1]]), "one tree"),
        (torch.tensor([[1, 2], [2, 1]]), "cycle"),
    ):
        with pytest.raises(ValueError, match=name):
            embed_tree(edges, 3)
    for options, name in (({"dim": 1}, "dim"), ({"edge_length": 0.0}, "edge_length"), ({"model": "klein"}, "model")):
        with pytest.raises(ValueError, match=name):
            embed_tree(good, 3, **options)


@pytest.mark.parametrize("model", ["lorentz", "poincare"])
def test_layout_keeps_the_radius(model):
    edges, num, _ = tree(3, 3)
    points = embed_tree(edges, num, 8, c=0.5, edge_length=1.5, num_steps=0, generator=torch.Generator().manual_seed(0))
    x = points if model == "lorentz" else convert.lorentz_to_poincare(points, c=0.5)
    picture = layout(x, edges, c=0.5, model=model, num_steps=150)
    ball = 2 * torch.atanh(picture.points.norm(dim=-1))
    torch.testing.assert_close(ball, math.sqrt(0.5) * lorentz.dist0(points, c=0.5), rtol=1e-9, atol=1e-9)
    assert picture.radius_error < 1e-8
    assert picture.distance_rank > 0.7
    alone = layout(x, c=0.5, model=model, num_steps=150)
    assert alone.distance_rank > 0.4
    assert 0 < picture.stress < 0.5
    assert 0 < picture.neighbours <= 1


def test_a_picture_of_the_plane_is_the_plane():
    x = lorentz.exp_map0(torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    picture = layout(x)
    assert picture.stress < 1e-3
    assert picture.neighbours > 0.99
    for num in (0, 1, 2):
        assert layout(x[:num]).points.shape == (num, 2)
    assert layout(torch.tensor([[1.0], [-2.0]])).stress < 1e-6
    with pytest.raises(ValueError, match="x must"):
        layout(x[0])


def test_svg_and_html():
    edges, num, _ = tree(2, 2)
    picture = layout(embed_tree(edges, num, 3, num_steps=0), edges, num_steps=20)
    images = [None] * (num - 1) + ["data:image/png;base64,AA=="]
    names = [f"<node {i} & more>" for i in range(num)]
    svg = to_svg(picture, edges, labels=names, groups=[i % 3 for i in range(num)], thumbnails=images)
    root = ElementTree.fromstring(svg)
    kinds = [child.tag.split("}")[1] for child in root]
    assert kinds.count("circle") == num
    assert kinds.count("polyline") == len(edges)
    assert kinds.count("image") == 1
    assert root[-1][0].text == names[-1]
    page = to_html(picture, edges, title="A <tree>", labels=names)
    assert "A &lt;tree&gt;" in page
    assert f"{picture.distance_rank:.2f}" in page
    with pytest.raises(ValueError, match="labels"):
        to_svg(picture, labels=["one"])
    with pytest.raises(ValueError, match="picture"):
        to_svg(torch.zeros(3, 3))


def test_number_of_nodes_from_the_edges():
    edges = torch.tensor([[0, 1], [0, 2], [2, 3]])
    torch.testing.assert_close(embed_tree(edges), embed_tree(edges, 4))
    assert embed_tree(edges[:0]).shape == (1, 2)
