"""Several positives, masks, soft targets, weights, queues, queries and products: loops as oracle, backends, gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from hyper_geom import DistanceInfoNCE, distance_info_nce, distance_logits, info_nce, lorentz, poincare

MODELS = {"lorentz": lorentz, "poincare": poincare}
NUM, DIM, SCALE = 6, 3, 3.0


def draw(*shape, seed=0, size=0.5):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(logits, E, keep, smoothing):
    """Losses of the rows of a matrix by loops over Python numbers."""
    losses = []
    for row, weight, kept in zip(logits.tolist(), E.tolist(), keep.tolist(), strict=True):
        total, count = sum(weight), sum(kept)
        lse = math.log(sum(math.exp(v) for v, k in zip(row, kept, strict=True) if k))
        target = [
            (1 - smoothing) * w / total + (smoothing / count if k else 0) for w, k in zip(weight, kept, strict=True)
        ]
        losses.append(-sum(t * (v - lse) for t, v in zip(target, row, strict=True)))
    return torch.tensor(losses, dtype=torch.float64)


def matrix(x, y, c, model="lorentz"):
    """Distances (n m) from the elementwise function: queries by their nearest, factors by the root of squares."""
    if c.ndim == 1:
        return sum(matrix(x[k], y[k], c[k], model).square() for k in range(len(c))).sqrt()
    if x.ndim == 3:
        return MODELS[model].dist(x.unsqueeze(2), y, c=c).amin(1)
    return MODELS[model].dist(x.unsqueeze(1), y, c=c)


LABELS = torch.tensor([[1, 0, -1], [0, -1, -1], [2, 3, 5], [4, -1, -1], [3, 2, -1], [5, -1, -1]])
OPTIONS = {
    "several positives": {"labels": LABELS},
    "soft targets": {
        "targets": (draw(NUM, NUM, seed=3).abs() * (draw(NUM, NUM, seed=4) > 0) + torch.eye(NUM).double())
    },
    "mask": {"labels": LABELS, "mask": draw(NUM, NUM, seed=5) > -0.2},
    "smoothing": {"label_smoothing": 0.2, "mask": draw(NUM, NUM, seed=6) > -0.2},
    "weights": {"weights": torch.arange(NUM).double()},
    "queue": {"negatives": draw(4, DIM, seed=7), "label_smoothing": 0.1, "mask": draw(NUM, NUM, seed=6) > 0},
}


def expected(
    x, y, c, symmetric, labels=None, targets=None, mask=None, label_smoothing=0.0, weights=None, negatives=None
):
    labels = torch.arange(NUM).unsqueeze(1) if labels is None else labels
    E = torch.zeros(NUM, NUM + 1, dtype=torch.float64)
    E[torch.arange(NUM).unsqueeze(1), labels] = 1.0
    E = E[:, :NUM] if targets is None else targets
    keep = torch.ones(NUM, NUM, dtype=torch.bool) if mask is None else mask | (E > 0)
    logits = -SCALE * matrix(x, y, c)
    if negatives is None:
        rows = oracle(logits, E, keep, label_smoothing)
    else:
        more = -SCALE * matrix(x, negatives, c)
        rows = oracle(
            torch.cat([logits, more], 1), torch.cat([E, 0 * more], 1), torch.cat([keep, more <= 0], 1), label_smoothing
        )
    if symmetric:
        rows = (rows + oracle(logits.mT, E.mT, keep.mT, label_smoothing)[labels[:, 0]]) / 2
    weight = torch.ones(NUM).double() if weights is None else weights
    return rows, (rows * weight).sum() / weight.sum()


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_loops(name, symmetric, backend):
    x, y, c = draw(NUM, DIM), draw(NUM, DIM, seed=1), torch.tensor(0.7).double()
    options = OPTIONS[name]
    rows, mean = expected(x, y, c, symmetric, **options)
    call = {"c": c, "logit_scale": SCALE, "symmetric": symmetric, "backend": backend}
    call |= {"chunk_size": 4} if backend == "chunked" else {}
    torch.testing.assert_close(distance_info_nce(x, y, **call, **options), mean, rtol=1e-10, atol=1e-12)
    none = distance_info_nce(x, y, **call, **options, reduction="none")
    weights = options.get("weights", torch.ones(NUM).double())
    torch.testing.assert_close(none, rows * weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("name", [*OPTIONS, "queries", "product"])
def test_gradients(name, backend):
    x, y, c = draw(NUM, DIM), draw(NUM, DIM, seed=1), torch.tensor(0.7).double()
    if name == "queries":
        x = draw(NUM, 2, DIM)
    if name == "product":
        x, y, c = draw(2, NUM, 2, DIM), draw(2, NUM, DIM, seed=1), torch.tensor([0.4, 1.7]).double()
    leaves = [v.requires_grad_() for v in (x, y, c, torch.tensor(SCALE).double())]

    def loss(x, y, c, scale):
        options = OPTIONS.get(name, {"label_smoothing": 0.1})
        size = {"chunk_size": 4} if backend == "chunked" else {}
        return distance_info_nce(x, y, c=c, logit_scale=scale, backend=backend, **size, **options)

    assert gradcheck(loss, leaves)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(loss, leaves, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("inputs", ["points", "tangent0"])
@pytest.mark.parametrize("model", MODELS)
def test_queries_and_products(model, inputs, backend):
    x, y, c = draw(2, NUM, 4, DIM, size=0.2), draw(2, NUM, DIM, seed=1, size=0.2), torch.tensor([0.4, 1.7]).double()
    move = MODELS[model].exp_map0 if inputs == "tangent0" else lambda v, c: v
    points = [torch.stack([move(v[k], c=c[k]) for k in range(2)]) for v in (x, y)]
    by_query = torch.stack([matrix(points[0][:, :, q], points[1], c, model) for q in range(4)])
    both = {"model": model, "inputs": inputs, "c": c}
    for queries, distances in (("max", by_query.amin(0)), ("mean", by_query.mean(0))):
        got = distance_logits(x, y, logit_scale=SCALE, labels=torch.arange(NUM), queries=queries, **both)
        torch.testing.assert_close(got, -SCALE * distances, rtol=1e-9, atol=1e-9)
        size = {"chunk_size": 4} if backend == "chunked" else {}
        loss = distance_info_nce(x, y, logit_scale=SCALE, queries=queries, backend=backend, **size, **both)
        eye = torch.eye(NUM)
        want = (info_nce(-SCALE * distances, eye) + info_nce(-SCALE * distances.mT, eye)) / 2
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-9)


def test_one_positive_equals_the_plain_loss():
    x, y = draw(NUM, DIM).float(), draw(NUM, DIM, seed=1).float()
    plain = distance_info_nce(x, y, logit_scale=SCALE, backend="eager")
    for options in (
        {"targets": torch.eye(NUM)},
        {"labels": torch.arange(NUM).unsqueeze(1)},
        {"weights": torch.ones(NUM)},
    ):
        for backend in ("eager", "chunked"):
            torch.testing.assert_close(distance_info_nce(x, y, logit_scale=SCALE, backend=backend, **options), plain)
    assert DistanceInfoNCE(reduction="none")(x, y, logit_scale=SCALE, mask=torch.ones(NUM, NUM).bool()).shape == (NUM,)


def test_rows_without_a_positive_do_not_count():
    x, y = draw(NUM, DIM), draw(NUM, DIM, seed=1)
    labels = torch.tensor([-1, 2, -1, 0, 1, 1])
    kept = labels >= 0
    want = distance_info_nce(x[kept], y, logit_scale=SCALE, labels=labels[kept], symmetric=False)
    for backend in ("eager", "chunked"):
        got = distance_info_nce(x, y, logit_scale=SCALE, labels=labels, symmetric=False, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    none = distance_info_nce(x, y, logit_scale=SCALE, labels=-torch.ones_like(labels), symmetric=False)
    assert none == 0


@pytest.mark.parametrize("num", [0, 1])
def test_empty_and_single(num):
    x = draw(num, 2, DIM).requires_grad_()
    for backend in ("eager", "chunked"):
        loss = distance_info_nce(x, draw(num, DIM), logit_scale=SCALE, label_smoothing=0.1, backend=backend)
        assert loss == 0
        assert torch.autograd.grad(loss, x)[0].eq(0).all()
    assert distance_info_nce(x, draw(num, DIM), logit_scale=SCALE, reduction="none").shape == (num,)
    assert info_nce(torch.zeros(num, num), torch.eye(num)) == 0
    assert distance_logits(x, draw(num, DIM), labels=torch.arange(num)).shape == (num, num)


def test_positives_are_exact_in_fp32():
    """A pair closer than the matrix product resolves: the logit and its gradient come from the elementwise distance."""
    x = lorentz.exp_map0(2 * torch.nn.functional.normalize(draw(4, 16), dim=-1)).float()
    y = x + 1e-4
    exact = lorentz.dist(x.double(), y.double())
    logits = distance_logits(x.unsqueeze(1), y, labels=torch.arange(4)).diagonal()
    torch.testing.assert_close(-logits.double(), exact, rtol=1e-5, atol=0)
    assert ((lorentz.pairwise_dist(x, y).diagonal().double() - exact).abs() > 1e-5 * exact).any()


def test_memory_of_slabs():
    """No tensor of N x M entries is made."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(v.numel() for v in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(v))
            return out

    x, y = draw(60, DIM).requires_grad_(), draw(60, DIM)
    with Watch():
        labels = torch.stack([torch.arange(60), torch.arange(60).flip(0)], 1)
        distance_info_nce(x, y, logit_scale=SCALE, labels=labels, backend="chunked", chunk_size=5).backward()
    assert max(sizes) <= 5 * 61


def test_errors():
    x, y = draw(NUM, DIM), draw(NUM, DIM, seed=1)

    def call(**options):
        return distance_info_nce(x, y, logit_scale=1.0, **options)

    for options, name in (
        ({"targets": torch.ones(NUM, 2)}, "targets"),
        ({"mask": torch.ones(NUM, NUM)}, "mask"),
        ({"weights": torch.ones(3)}, "weights"),
        ({"negatives": torch.ones(3, 2)}, "negatives"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"reduction": "sum"}, "reduction"),
        ({"queries": "min"}, "queries"),
        ({"labels": torch.full((NUM, 2), NUM)}, "labels"),
        ({"labels": -torch.ones(NUM, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(NUM, 0, dtype=torch.int64)}, "labels"),
    ):
        with pytest.raises(ValueError, match=name):
            call(**options)
    with pytest.raises(ValueError, match="x must"):
        distance_info_nce(draw(NUM, 2, 2, DIM), y, logit_scale=1.0)
    with pytest.raises(ValueError, match="dimension"):
        distance_info_nce(draw(3, NUM, DIM), draw(2, NUM, DIM), c=torch.ones(2), logit_scale=1.0)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["several positives", "queue"])
def test_fullgraph(name):
    def loss(x, y):
        return distance_info_nce(x, y, c=0.7, logit_scale=SCALE, **OPTIONS[name])

    x, y = draw(NUM, DIM).requires_grad_(), draw(NUM, DIM, seed=1)
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y), loss(x, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (got, want)))
