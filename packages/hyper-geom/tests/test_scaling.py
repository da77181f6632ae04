"""Similarity: f(t x; c/t^2) is f(x; c) times the right power of t."""

import pytest
import torch

from hyper_geom import convert as conv
from hyper_geom import entailment_loss, lorentz, poincare

# How each function scales when all lengths scale by t: distances, points and tangent vectors by t.
POWERS = {
    "dist": 1,
    "dist0": 1,
    "sq_dist": 2,
    "pairwise_dist": 1,
    "midpoint": 1,
    "log_map": 1,
    "exp_map": 1,
    "log_map0": 1,
    "exp_map0": 1,
    "parallel_transport": 1,
    "parallel_transport0": 1,
    "parallel_transport0_back": 1,
    "tangent0_dist": 1,
    "tangent0_sq_dist": 2,
    "half_aperture": 0,
    "exterior_angle": 0,
    "pairwise_exterior_angle": 0,
    "norm": 1,
    "inner": 2,
}
NUM_VECTORS = {
    "dist0": 1,
    "midpoint": 1,
    "log_map0": 1,
    "exp_map0": 1,
    "half_aperture": 1,
    "inner": 3,
    "parallel_transport": 3,
}


@pytest.mark.parametrize("model", [lorentz, poincare])
@pytest.mark.parametrize("name", POWERS)
@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_similarity(points, model, name, scale):
    c = 0.7
    vectors = [points.at(1.0, points.unit(4, 3), c) for _ in range(NUM_VECTORS.get(name, 2))]
    if model is poincare:
        vectors[:2] = [conv.lorentz_to_poincare(x, c=c) for x in vectors[:2]]
    function = getattr(model, name)
    expected = function(*vectors, c=c) * scale ** POWERS[name]
    got = function(*(scale * x for x in vectors), c=c / scale**2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_similarity_of_the_loss(points):
    x, y = points.at(1.0, points.unit(4, 3), 0.7), points.at(2.0, points.unit(4, 3), 0.7)
    torch.testing.assert_close(entailment_loss(2 * x, 2 * y, c=0.7 / 4), entailment_loss(x, y, c=0.7))


@pytest.mark.parametrize("model", [lorentz, poincare])
def test_rotation_and_swap(points, model):
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=points.generator))
    x, y = 0.6 * points.unit(5, 4), 0.3 * points.unit(5, 4)
    torch.testing.assert_close(model.dist(x @ rotation, y @ rotation), model.dist(x, y))
    torch.testing.assert_close(model.exterior_angle(x @ rotation, y @ rotation), model.exterior_angle(x, y))
    torch.testing.assert_close(model.dist(y, x), model.dist(x, y))
    torch.testing.assert_close(model.midpoint(x @ rotation), model.midpoint(x) @ rotation)
