"""InfoNCE on distances: golden numbers, a loop oracle, agreement of backends and inputs, labels, bad input."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from hyper_geom import _info_nce_chunked, convert, lorentz, poincare
from hyper_geom.contrastive import DistanceInfoNCE, distance_info_nce

MODELS = {"lorentz": lorentz, "poincare": poincare}
X = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def loop_oracle(x, y, c, logit_scale, labels, symmetric):
    """The loss of Lorentz points with loops over Python numbers, from the ambient inner product."""
    k = math.sqrt(c)

    def distance(a, b):
        inner = math.sqrt(1 / c + sum(v * v for v in a)) * math.sqrt(1 / c + sum(v * v for v in b))
        inner -= sum(v * w for v, w in zip(a, b, strict=True))
        return math.acosh(max(1.0, c * inner)) / k

    logits = [[-logit_scale * distance(a, b) for b in y.tolist()] for a in x.tolist()]
    rows = [math.log(sum(map(math.exp, row))) - row[j] for row, j in zip(logits, labels, strict=True)]
    if not symmetric:
        return sum(rows) / len(rows)
    columns = [math.log(sum(math.exp(row[j]) for row in logits)) - logits[i][j] for i, j in enumerate(labels)]
    return (sum(rows) / len(rows) + sum(columns) / len(columns)) / 2


def batch(points, num, num_targets, dim=8, radius=1.5, c=0.7):
    """Lorentz points around one radius; each y starts from a mix of x, so that positives are nearer."""
    x = points.at(radius, points.unit(num, dim), c)
    y = points.at(radius, points.unit(num_targets, dim), c)
    y[: min(num, num_targets)] += x[: min(num, num_targets)]
    return x, y


def loss_and_gradients(x, y, c=0.7, logit_scale=4.0, **options):
    """The loss and its gradients for x, y, c and logit_scale."""
    leaves = [v.clone().requires_grad_() for v in (x, y, torch.tensor(c).to(x), torch.tensor(logit_scale).to(x))]
    loss = distance_info_nce(leaves[0], leaves[1], c=leaves[2], logit_scale=leaves[3], **options)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def assert_agree(result, reference, c=0.7, logit_scale=4.0, gradient_tolerance=1e-5):
    (loss, gradients), (expected, expected_gradients) = result, reference
    assert abs(loss - expected) <= 1e-6 * max(1.0, abs(expected))
    sizes = [g.norm() for g in expected_gradients]
    # dL/dc = (<x,g_x> + <y,g_y> - logit_scale dL/dlogit_scale) / 2c cancels near the origin: compare with its last term.
    sizes[2] = max(sizes[2], logit_scale * sizes[3] / (2 * c))
    for got, want, size in zip(gradients, expected_gradients, sizes, strict=True):
        assert (got - want).norm() <= gradient_tolerance * size


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(backend, dtype):
    x, y = X.to(dtype).requires_grad_(), Y.to(dtype).requires_grad_()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-7
    rows = distance_info_nce(x, y, logit_scale=1.0, symmetric=False, backend=backend)
    columns = distance_info_nce(y, x, logit_scale=1.0, symmetric=False, backend=backend)
    both = distance_info_nce(x, y, logit_scale=1.0, backend=backend)
    assert rows.item() == pytest.approx(1.1237529318, abs=tolerance)
    assert columns.item() == pytest.approx(1.0812090340, abs=tolerance)
    assert both.item() == pytest.approx(1.1024809829, abs=tolerance)
    assert both.dtype == dtype
    # x_2 = y_1: a negative at distance 0.
    assert all(g.isfinite().all() for g in torch.autograd.grad(both, (x, y)))


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("c", [0.1, 1.0, 4.0])
def test_equals_loops(points, backend, symmetric, c):
    x, y = batch(points, 7, 7 if symmetric else 9, c=c)
    labels = torch.randperm(len(y), generator=points.generator)[:7]
    loss = distance_info_nce(x, y, c=c, logit_scale=3.0, labels=labels, symmetric=symmetric, backend=backend)
    assert loss.item() == pytest.approx(loop_oracle(x, y, c, 3.0, labels.tolist(), symmetric), rel=1e-12)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("inputs", ["points", "tangent0"])
@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck(points, model, inputs, backend, symmetric):
    num, num_targets = (5, 5) if symmetric else (5, 7)
    x, y = (0.4 * points.unit(n, 3).requires_grad_() for n in (num, num_targets))
    labels = torch.randperm(num_targets, generator=points.generator)[:num]
    c, logit_scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 3.0))
    options = {"labels": labels, "symmetric": symmetric, "model": model, "inputs": inputs, "backend": backend}
    if backend == "chunked":
        options["chunk_size"] = 2

    def loss(x, y, c, logit_scale):
        return distance_info_nce(x, y, c=c, logit_scale=logit_scale, **options)

    assert gradcheck(loss, (x.detach().requires_grad_(), y.detach().requires_grad_(), c, logit_scale))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chunk_size", [None, 1, 13, 64, 65, 1000])
def test_chunked_equals_eager_fp32(points, model, chunk_size):
    """Chunks of one row, chunks with a tail, and one chunk for everything."""
    x, y = (v.float() for v in batch(points, 65, 65))
    if model == "poincare":
        x, y = convert.lorentz_to_poincare(x, c=0.7), convert.lorentz_to_poincare(y, c=0.7)
    labels = torch.randperm(65, generator=points.generator)
    options = {"model": model, "labels": labels}
    reference = loss_and_gradients(x, y, backend="eager", **options)
    assert_agree(loss_and_gradients(x, y, backend="chunked", chunk_size=chunk_size, **options), reference)


@pytest.mark.parametrize("inputs", ["points", "tangent0"])
def test_positives_in_blocks_equal_eager(points, monkeypatch, inputs):
    """Blocks of seven rows with a tail, and of one row where a vector alone is larger than a block."""
    x, y = (v.float() for v in batch(points, 25, 25))
    labels = torch.randperm(25, generator=points.generator)
    reference = loss_and_gradients(x, y, backend="eager", labels=labels, inputs=inputs)
    for size in (7 * 8, 1):
        monkeypatch.setattr(_info_nce_chunked, "_BLOCK", size)
        assert_agree(loss_and_gradients(x, y, backend="chunked", labels=labels, inputs=inputs), reference)


def test_chunked_equals_eager_without_columns(points):
    x, y = (v.float() for v in batch(points, 50, 33))
    labels = torch.randint(33, (50,), generator=points.generator)
    options = {"labels": labels, "symmetric": False}
    reference = loss_and_gradients(x, y, backend="eager", **options)
    assert_agree(loss_and_gradients(x, y, backend="chunked", chunk_size=8, **options), reference)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_fp32_against_fp64(points, backend):
    x, y = (v.float() for v in batch(points, 40, 40, dim=256, radius=3.0))
    reference = loss_and_gradients(x.double(), y.double(), backend="eager")
    loss, gradients = loss_and_gradients(x, y, backend=backend)
    assert_agree((loss.double(), [g.double() for g in gradients]), reference)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_inputs_agree(points, model, backend):
    """Points made by exp_map0 give the loss of their tangent vectors, with gradients through the map."""
    v = [(3.0 if model == "lorentz" else 1.5) * points.unit(30, 16) for _ in range(2)]
    results = []
    for inputs in ("points", "tangent0"):
        leaves = [u.float().requires_grad_() for u in v] + [torch.tensor(s, requires_grad=True) for s in (0.7, 4.0)]
        *pair, c, logit_scale = leaves
        if inputs == "points":
            pair = [MODELS[model].exp_map0(u, c=c) for u in pair]
        loss = distance_info_nce(*pair, c=c, logit_scale=logit_scale, model=model, inputs=inputs, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, leaves)))
    assert_agree(*results, gradient_tolerance=3e-5)  # that of c is a difference of larger terms


def test_models_agree(points):
    x, y = batch(points, 9, 9)
    balls = [convert.lorentz_to_poincare(v, c=0.7) for v in (x, y)]
    for backend in ("eager", "chunked"):
        lorentz_loss = distance_info_nce(x, y, c=0.7, logit_scale=2.0, backend=backend)
        ball_loss = distance_info_nce(*balls, c=0.7, logit_scale=2.0, model="poincare", backend=backend)
        torch.testing.assert_close(ball_loss, lorentz_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("inputs", ["points", "tangent0"])
@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_close_positives_keep_their_distance(points, model, inputs, backend):
    """Positives 1e-4 apart at r = 3 weigh as in fp64; from the matrix product they would be noise."""
    x = 1.5 * points.unit(8, 64)
    if inputs == "tangent0":
        x = (2 if model == "lorentz" else 1) * x
    else:
        x = lorentz.exp_map0(2 * x)
        x = x if model == "lorentz" else convert.lorentz_to_poincare(x)
    y = (x + 1e-4 * points.unit(8, 64)).float()
    x = x.float()
    options = {"c": 1.0, "logit_scale": 1.0, "model": model, "inputs": inputs}
    loss, gradients = loss_and_gradients(x, y, backend=backend, **options)
    reference = loss_and_gradients(x.double(), y.double(), backend="eager", **options)
    assert_agree((loss.double(), [g.double() for g in gradients]), reference, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", ["points", "tangent0"])
def test_half_inputs_compute_in_fp32(points, dtype, inputs):
    x, y = ((0.5 * points.unit(12, 16)).to(dtype) for _ in range(2))
    half, gradients = loss_and_gradients(x, y, inputs=inputs)
    full = loss_and_gradients(x.float(), y.float(), c=torch.tensor(0.7, dtype=dtype).item(), inputs=inputs)
    assert half.dtype == torch.float32
    assert abs(half - full[0]) < 1e-6
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(gradients[0].float(), full[1][0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_autocast_changes_nothing(points, dtype, backend):
    x, y = (v.float() for v in batch(points, 20, 20))
    expected = loss_and_gradients(x, y, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        inside = loss_and_gradients(x, y, backend=backend)
    assert torch.equal(inside[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(inside[1], expected[1], strict=True))


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("inputs", ["points", "tangent0"])
def test_far_inputs_stay_finite(points, backend, inputs):
    size = 20.0 if inputs == "tangent0" else math.sinh(20.0)
    x, y = (size * points.unit(6, 4).float() for _ in range(2))
    loss, gradients = loss_and_gradients(x, y, c=1.0, inputs=inputs, backend=backend)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    beyond = distance_info_nce(1e3 * x, 1e3 * y, logit_scale=1.0, inputs="tangent0", backend=backend)
    assert beyond.isfinite()


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_empty_and_single(backend):
    x, y = (torch.zeros(0, 3, requires_grad=True) for _ in range(2))
    loss = distance_info_nce(x, y, logit_scale=1.0, backend=backend)
    assert loss.item() == 0.0
    assert all(g.shape == (0, 3) for g in torch.autograd.grad(loss, (x, y)))

    loss, gradients = loss_and_gradients(torch.ones(1, 3), torch.zeros(1, 3), backend=backend)
    assert loss.item() == 0.0
    assert all((g == 0).all() for g in gradients)


def test_row_without_negatives_in_its_column(points):
    """One row, many columns: every column but the positive's is empty of positives; no NaN from -inf - -inf."""
    x, y = (v.float() for v in batch(points, 1, 5))
    options = {"symmetric": False, "labels": torch.tensor([2])}
    reference = loss_and_gradients(x, y, backend="eager", **options)
    assert_agree(loss_and_gradients(x, y, backend="chunked", **options), reference)


def test_chunked_holds_no_score_matrix(points):
    """Neither what is saved for backward nor any result of an operation has n * m entries."""
    x, y = (v.float().requires_grad_() for v in batch(points, 300, 300, dim=4))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        distance_info_nce(x, y, logit_scale=2.0, backend="chunked", chunk_size=10).backward()
    assert largest == 10 * 300


def test_auto_takes_chunks_only_for_large_matrices(points, monkeypatch):
    calls = []
    original = _info_nce_chunked.lse
    monkeypatch.setattr(_info_nce_chunked, "lse", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    x, y = (v.float() for v in batch(points, 16, 16))
    distance_info_nce(x, y, logit_scale=1.0)
    assert not calls
    distance_info_nce(x, y, logit_scale=1.0, chunk_size=4)
    monkeypatch.setattr(_info_nce_chunked, "SLAB_BYTES", 16 * 16 * 4 - 1)
    distance_info_nce(x, y, logit_scale=1.0)
    assert len(calls) == 2


def test_inputs_are_unmutated(points):
    x, y = batch(points, 6, 6)
    before = x.clone(), y.clone()
    for backend in ("eager", "chunked"):
        loss_and_gradients(x, y, backend=backend)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_module_equals_function(points):
    x, y = batch(points, 6, 6)
    module = DistanceInfoNCE(symmetric=False, model="lorentz", inputs="tangent0", backend="chunked", chunk_size=4)
    expected = distance_info_nce(x, y, c=0.7, logit_scale=3.0, symmetric=False, inputs="tangent0")
    torch.testing.assert_close(module(x, y, c=0.7, logit_scale=3.0), expected, rtol=1e-12, atol=0)
    assert not list(module.parameters())
    assert "chunk_size=4" in repr(module)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "klein"},
        {"inputs": "tangent"},
        {"backend": "cuda"},
        {"backend": "triton"},
        {"chunk_size": 0},
        {"c": 0.0},
        {"c": -1.0},
        {"c": math.inf},
        {"c": torch.ones(2)},
        {"logit_scale": 0.0},
        {"logit_scale": math.nan},
        {"logit_scale": torch.ones(2)},
        {"labels": torch.zeros(3)},
        {"labels": torch.tensor([0, 1, 2], dtype=torch.int32)},
        {"labels": torch.tensor([0, 1])},
        {"labels": torch.tensor([0, 1, 3])},
        {"labels": torch.tensor([0, -1, 2])},
        {"labels": torch.tensor([0, 1, 1])},
        {"y": torch.zeros(4, 2)},
        {"y": torch.zeros(3, 5)},
        {"y": torch.zeros(3)},
        {"x": torch.zeros(2, 3, 2)},
        {"x": torch.zeros(4, 2), "symmetric": False},
        {"y": torch.zeros(3, 2, device="meta")},
    ],
    ids=str,
)
def test_bad_values(options):
    arguments = {"x": torch.zeros(3, 2), "y": torch.zeros(3, 2), "logit_scale": 1.0} | options
    with pytest.raises(ValueError, match=r"must|needs|need|range|expected|dimension"):
        distance_info_nce(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize(
    "options", [{"x": torch.zeros(3, 2, dtype=torch.int64)}, {"y": [[0.0, 0.0]]}, {"logit_scale": "1"}]
)
def test_bad_types(options):
    arguments = {"x": torch.zeros(3, 2), "y": torch.zeros(3, 2), "logit_scale": 1.0} | options
    with pytest.raises(TypeError):
        distance_info_nce(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize("option", ["model", "inputs", "backend"])
def test_bad_module_options(option):
    with pytest.raises(ValueError, match=option):
        DistanceInfoNCE(**{option: "none"})


def test_chunk_size_without_effect_warns():
    with pytest.warns(UserWarning, match="chunk_size"):
        distance_info_nce(X, Y, logit_scale=1.0, backend="eager", chunk_size=8)


def test_nan_propagates(points):
    x, y = (v.float() for v in batch(points, 5, 5))
    x[2, 0] = math.nan
    for backend in ("eager", "chunked"):
        assert distance_info_nce(x, y, logit_scale=1.0, backend=backend).isnan()


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_second_derivative(points, backend):
    x, y = batch(points, 4, 4)
    x.requires_grad_()
    loss = distance_info_nce(x, y, logit_scale=1.0, backend=backend)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (again,) = torch.autograd.grad(distance_info_nce(x, y, logit_scale=1.0, backend=backend), x)
    torch.testing.assert_close(g, again, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda x: distance_info_nce(x, y, logit_scale=1.0, backend=backend), (x,))


@pytest.mark.compile
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("inputs", ["points", "tangent0"])
@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_fullgraph(points, model, inputs, backend):
    x, y = (0.8 * points.unit(7, 4).float() for _ in range(2))
    options = {"model": model, "inputs": inputs, "backend": backend}
    if backend == "chunked":
        options["chunk_size"] = 3

    def run(x, y, c, logit_scale, labels):
        return distance_info_nce(x, y, c=c, logit_scale=logit_scale, labels=labels, **options)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [v.clone().requires_grad_() for v in (x, y, torch.tensor(0.7), torch.tensor(4.0))]
        loss = function(*leaves, torch.arange(7).flip(0))
        results.append((loss.detach(), torch.autograd.grad(loss, leaves)))
    assert_agree(results[1], results[0])
