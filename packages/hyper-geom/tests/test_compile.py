"""torch.compile(fullgraph=True), forward and backward, for every public function."""

import pytest
import torch

from hyper_geom import Curvature, lorentz

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def test_fullgraph_forward_and_backward(geometry_call):
    tensors = geometry_call.tensors(dtype=torch.float32)
    c = torch.tensor([0.7])

    def run(function):
        leaves = [x.clone().requires_grad_() for x in (*tensors, c)]
        out = function(*leaves)
        used = leaves if geometry_call.has_c else leaves[:-1]
        return out, torch.autograd.grad(out.sum(), used, allow_unused=geometry_call.name == "convert.from_ambient")

    def eager(*leaves):
        return geometry_call(*leaves[:-1], c=leaves[-1])

    expected, expected_gradients = run(eager)
    got, gradients = run(torch.compile(eager, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b)


def test_float_curvature_and_autocast():
    x, y = torch.rand(4, 3).bfloat16(), torch.rand(4, 3).bfloat16()
    compiled = torch.compile(lambda x, y, c: lorentz.pairwise_dist(x, y, c=c), fullgraph=True, backend="aot_eager")
    for c in (0.7, 1.3):
        torch.testing.assert_close(compiled(x, y, c), lorentz.pairwise_dist(x, y, c=c))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compiled(x, y, 0.7)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, lorentz.pairwise_dist(x, y, c=0.7))


def test_curvature_module():
    curvature = Curvature(0.7)
    x, y = torch.rand(4, 3), torch.rand(4, 3)
    compiled = torch.compile(lambda x, y: lorentz.dist(x, y, c=curvature()).sum(), fullgraph=True, backend="aot_eager")
    compiled(x, y).backward()
    got, curvature.log_c.grad = curvature.log_c.grad, None
    lorentz.dist(x, y, c=curvature()).sum().backward()
    torch.testing.assert_close(got, curvature.log_c.grad)
