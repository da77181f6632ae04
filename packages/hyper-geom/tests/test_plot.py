"""Pictures: what is drawn lies where the geometry says, and wrong input is refused."""

import math
import sys

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)

from hyper_geom import convert, lorentz, plot, poincare  # noqa: E402


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    figure.canvas.draw()
    plt.close(figure)


def sample(num_points, seed, c=1.0, radius=2.0):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(num_points, 2, generator=generator, dtype=torch.float64) * radius / math.sqrt(c)
    return lorentz.exp_map0(v, c=c)


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
def test_disk_has_radius_one_over_sqrt_c(ax, c):
    assert plot.disk(c=c, ax=ax, edgecolor="red") is ax
    (circle,) = ax.patches
    assert circle.radius == pytest.approx(c**-0.5)
    assert ax.get_aspect() == 1.0
    assert ax.get_xlim()[1] > c**-0.5


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
def test_points_lie_at_their_ball_coordinates(ax, c):
    x = sample(7, 0, c)
    expected = convert.lorentz_to_poincare(x, c=c)
    for given, model in ((x, "lorentz"), (expected, "poincare"), (x.float().requires_grad_(), "lorentz")):
        drawn = plot.points(given, c=c, model=model, ax=ax, color="C1")
        assert torch.from_numpy(drawn.get_offsets().data).allclose(expected, atol=1e-6)


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
def test_geodesics_are_as_long_as_the_distance(ax, c):
    x, y = sample(5, 1, c), sample(5, 2, c)
    lines = plot.geodesic(x, y, c=c, ax=ax)
    assert len(lines.get_segments()) == 5
    for line, start, end in zip(lines.get_segments(), x, y, strict=True):
        corners = torch.from_numpy(line)
        assert corners[0].allclose(convert.lorentz_to_poincare(start, c=c), atol=1e-9)
        assert corners[-1].allclose(convert.lorentz_to_poincare(end, c=c), atol=1e-9)
        length = poincare.dist(corners[:-1], corners[1:], c=c).sum()
        assert length.item() == pytest.approx(lorentz.dist(start, end, c=c).item(), rel=1e-9)


def test_geodesics_broadcast(ax):
    assert len(plot.geodesic(torch.zeros(2), sample(4, 0), ax=ax).get_segments()) == 4
    assert len(plot.geodesic(torch.zeros(0, 2), torch.zeros(2), ax=ax).get_segments()) == 0


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("min_radius", [0.1, 0.6])
def test_a_point_is_in_the_polygon_iff_it_is_in_the_cone(ax, c, min_radius):
    apexes, targets = sample(6, 3, c, 1.0), sample(200, 4, c)
    # One apex so near the origin that its aperture is pi/2.
    apexes = torch.cat((apexes, torch.tensor([[-1e-3, 5e-3]], dtype=torch.float64)))
    polygons = plot.cone(apexes, c=c, min_radius=min_radius, ax=ax).get_paths()
    at = convert.lorentz_to_poincare(targets, c=c)
    for apex, polygon in zip(apexes, polygons, strict=True):
        angle = lorentz.exterior_angle(apex, targets, c=c)
        aperture = lorentz.half_aperture(apex, c=c, min_radius=min_radius)
        clear = (angle - aperture).abs() > 1e-3  # a polygon's edge is a chord
        drawn = torch.from_numpy(polygon.contains_points(at.numpy()))
        assert torch.equal(drawn[clear], (angle <= aperture)[clear])
        assert clear.any()


def test_the_cone_of_the_origin_is_the_disk(ax):
    (polygon,) = plot.cone(torch.zeros(2), ax=ax).get_paths()
    assert polygon.contains_points([(0.0, 0.0), (0.99, 0.0), (0.0, -0.99)]).all()
    assert not polygon.contains_point((0.8, 0.8))


def test_style_overrides_defaults(ax):
    assert plot.points(torch.zeros(1, 2), ax=ax, s=99).get_sizes().tolist() == [99]
    assert plot.geodesic(torch.zeros(2), torch.ones(2), ax=ax, linewidths=3).get_linewidths() == [3]
    assert plot.cone(torch.ones(2), ax=ax, alpha=0.7).get_alpha() == 0.7


def test_points_are_coloured_by_value(ax):
    drawn = plot.points(torch.zeros(2, 3, 2), values=torch.arange(6.0).reshape(2, 3), ax=ax, cmap="viridis")
    assert drawn.get_array().tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="values"):
        plot.points(torch.zeros(4, 2), values=torch.zeros(3), ax=ax)


def test_the_current_axes_are_the_default(ax):
    plt.sca(ax)
    assert plot.disk() is ax
    assert plot.points(torch.zeros(1, 2)).axes is ax
    assert plot.geodesic(torch.zeros(2), torch.ones(2)).axes is ax
    assert plot.cone(torch.ones(2)).axes is ax


def test_bad_input(ax):
    for three in (torch.zeros(5, 3), torch.zeros(())):
        with pytest.raises(ValueError, match="two coordinates"):
            plot.points(three, ax=ax)
        with pytest.raises(ValueError, match="two coordinates"):
            plot.cone(three, ax=ax)
    with pytest.raises(ValueError, match="two coordinates"):
        plot.geodesic(torch.zeros(5, 3), torch.zeros(5, 3), ax=ax)
    with pytest.raises(ValueError, match="broadcast"):
        plot.geodesic(torch.zeros(5, 2), torch.zeros(4, 2), ax=ax)
    with pytest.raises(TypeError, match="floating"):
        plot.points(torch.zeros(1, 2, dtype=torch.int64), ax=ax)
    for draw in (plot.points, plot.cone):
        with pytest.raises(ValueError, match="model"):
            draw(torch.zeros(1, 2), model="klein", ax=ax)
        with pytest.raises(ValueError, match="c must"):
            draw(torch.zeros(1, 2), c=-1.0, ax=ax)
    with pytest.raises(ValueError, match="c must"):
        plot.disk(c=0.0, ax=ax)
    with pytest.raises(ValueError, match="min_radius"):
        plot.cone(torch.zeros(1, 2), min_radius=0.0, ax=ax)


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in (
        plot.disk,
        lambda: plot.points(torch.zeros(1, 2)),
        lambda: plot.geodesic(torch.zeros(2), torch.ones(2)),
        lambda: plot.cone(torch.zeros(2)),
    ):
        with pytest.raises(ImportError, match=r"hyper-geom\[plot\]"):
            draw()
