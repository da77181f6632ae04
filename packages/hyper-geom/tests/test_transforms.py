"""Every public function under every transform of PyTorch; `docs/hyper-geom/transforms.md` prints the table.

`python packages/hyper-geom/tests/test_transforms.py --write` measures the table and writes the page.
"""

import functools
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hyper_geom import (
    Curvature,
    WrappedNormal,
    busemann_logits,
    distance_info_nce,
    distance_logits,
    frechet_mean,
    hyperplane_logits,
    info_nce,
    lorentz,
)

# torch's own: the first forward-mode derivative of a process scripts its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")

PAGE = Path(__file__).resolve().parents[3] / "docs" / "hyper-geom" / "transforms.md"


def _options(x, y, *, c, backend):
    """Several positives, a mask, smoothing, weights, extra negatives, several queries, a loss for each row."""
    rows = torch.arange(x.shape[0], device=x.device)
    labels = torch.stack((rows, (rows + 1) % x.shape[0]), dim=1)
    mask = (rows.unsqueeze(1) + 2 * rows) % 3 > 0
    return distance_info_nce(
        torch.stack((x, 0.5 * x), dim=1), y, c=c, logit_scale=3.0, labels=labels, mask=mask, label_smoothing=0.1,
        weights=1.0 + rows, negatives=0.3 * y[:1], reduction="none", backend=backend,
    )  # fmt: skip


def _product(x, y, *, c, backend):
    """Soft targets in a product of two spaces."""
    rows = torch.arange(x.shape[0], device=x.device)
    targets = 1.0 / (1 + (rows.unsqueeze(1) - rows).abs())
    spaces = (torch.stack((v, 0.7 * v)) for v in (x, y))
    c = torch.as_tensor(c, dtype=x.dtype, device=x.device)
    return distance_info_nce(
        *spaces, c=torch.stack((c, 2 * c)), logit_scale=3.0, targets=targets, queries="mean", backend=backend
    )


def _logits(x, y, *, c):
    rows = torch.arange(x.shape[0], device=x.device)
    logits = distance_logits(x, y, c=c, logit_scale=3.0, labels=rows)
    return info_nce(logits, (rows.unsqueeze(1) == rows), label_smoothing=0.1, reduction="none")


def _table():
    spec = importlib.util.spec_from_file_location("hyper_geom_calls", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = {call.name: call for call in module._calls()}
    for backend in ("eager", "chunked"):

        def loss(x, y, *, c, backend=backend):
            return distance_info_nce(x, y, c=c, logit_scale=3.0, backend=backend)

        calls[f"distance_info_nce {backend}"] = module.Call(f"distance_info_nce {backend}", loss, "mm", ())

    def add(name, function, kinds):
        calls[name] = module.Call(name, function, kinds, ())

    for backend in ("eager", "chunked"):
        add(f"distance_info_nce options, {backend}", functools.partial(_options, backend=backend), "mm")
        add(f"distance_info_nce product, {backend}", functools.partial(_product, backend=backend), "mm")
    add("distance_logits, info_nce", _logits, "mm")
    for model in ("lorentz", "poincare"):
        add(f"hyperplane_logits {model}", functools.partial(hyperplane_logits, model=model), "vvs")
        add(f"busemann_logits {model}", functools.partial(busemann_logits, model=model), "vv")
        add(f"frechet_mean {model}", functools.partial(frechet_mean, model=model, num_steps=6), "mw")

    def law(x, scale, c):
        return WrappedNormal(x, scale, c=c, validate_args=False)

    add("WrappedNormal.log_prob", lambda x, y, *, c: law(x, 0.7, c).log_prob(y), "vv")
    add("WrappedNormal.entropy", lambda x, s, *, c: law(x, s.unsqueeze(-1), c).entropy(), "vs")
    add("WrappedNormal.kl", lambda x, s, t, *, c: law(x, s.unsqueeze(-1), c).kl(law(x, t.unsqueeze(-1), c)), "vss")
    return calls


CALLS = _table()
C = 0.7


class Case:
    """One function as f(*tensors, c), its arguments at any batch size, and its plain gradients."""

    def __init__(self, name):
        self.call = CALLS[name]
        self.loss = "info_nce" in name

    def __call__(self, *args):
        return self.call(*args[:-1], c=args[-1])

    def tensors(self, num=2, dtype=torch.float64):
        if self.loss:
            return (
                [x[0, :num] for x in self.call.tensors(batch=(1,), dtype=dtype)] if num <= 4 else self._rows(num, dtype)
            )
        return self.call.tensors(batch=(num,), dtype=dtype)

    def _rows(self, num, dtype):
        return [torch.cat([x[0], 0.9 * x[0].flip(0)])[:num] for x in self.call.tensors(batch=(1,), dtype=dtype)]

    def args(self, num=2, dtype=torch.float64):
        return (*self.tensors(num, dtype), torch.tensor(C, dtype=dtype))

    @property
    def argnums(self):
        return tuple(range(len(self.call.kinds) + self.call.has_c))

    def gradients(self, function, args):
        leaves = [a.detach().clone().requires_grad_() for a in args]
        out = function(*leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        return (out.detach(), *(torch.zeros_like(a) if g is None else g for a, g in zip(args, grads, strict=True)))


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tolerance(dtype):
    return {torch.float64: 1e-8, torch.float32: 2e-4}.get(dtype, 2e-4)


def check_grad(case, dtype):
    args = case.args(dtype=dtype)
    expected = case.gradients(case, args)[1:]
    got = torch.func.grad(lambda *a: case(*a).square().sum(), argnums=case.argnums)(*args)
    for a, b in zip(got, expected, strict=False):
        assert a.dtype == dtype
        close(a, b, 2e-2 if dtype == torch.bfloat16 else tolerance(dtype))


def check_vmap(case, dtype):
    args = case.args(dtype=dtype)
    batches = [torch.stack([x, 0.9 * x]) for x in args]
    got = torch.func.vmap(case)(*batches)
    expected = torch.stack([case(*(x[i] for x in batches)) for i in range(2)])
    close(got, expected, tolerance(dtype))


def check_jvp(case, dtype):
    args = case.args(dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(a.shape, generator=generator, dtype=torch.float64).to(dtype) for a in args)
    out, got = torch.func.jvp(case, args, tangents)
    # Forward mode against reverse mode: <w, J t> = <J^T w, t>.
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    leaves = [a.detach().clone().requires_grad_() for a in args]
    grads = torch.autograd.grad((case(*leaves) * weight).sum(), leaves, allow_unused=True)
    expected = sum((g.double() * t.double()).sum() for g, t in zip(grads, tangents, strict=True) if g is not None)
    close((weight * got).sum().double(), expected, 3e-2 if dtype == torch.bfloat16 else 10 * tolerance(dtype))


def check_jacrev(case, dtype):
    args = case.args(dtype=dtype)
    back, forth = (j(case, argnums=case.argnums)(*args) for j in (torch.func.jacrev, torch.func.jacfwd))
    for a, b in zip(back, forth, strict=True):
        # Reverse mode answers in the dtype of the argument, forward mode in that of the result.
        close(a.to(b.dtype), b, 2e-2 if dtype == torch.bfloat16 else 5 * tolerance(dtype))


def check_hessian(case, dtype):
    args = case.args(dtype=dtype)

    def square(*a):
        return case(*a).square().sum()

    hessian = torch.func.hessian(square)(*args)
    assert hessian.isfinite().all()
    if dtype == torch.float64:
        step = 1e-5 * torch.ones_like(args[0])
        gradient = torch.func.grad(square)
        by_hand = (gradient(args[0] + step, *args[1:]) - gradient(args[0] - step, *args[1:])) / 2e-5
        close(hessian.sum(dim=tuple(range(args[0].ndim, 2 * args[0].ndim))), by_hand, 1e-4)


def check_trace(case, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the checks of shapes are traced as passed
        traced = torch.jit.trace(lambda *a: case(*a), case.args(3, dtype), check_trace=False)
    for num in (3, 5):
        args = case.args(num, dtype)
        for a, b in zip(case.gradients(traced, args), case.gradients(case, args), strict=True):
            close(a, b, 2e-2 if dtype == torch.bfloat16 else max(1e-6, tolerance(dtype)))  # jit keeps 0.7 in float32


def check_meta(case, dtype):
    leaves = [x.to("meta").requires_grad_() for x in case.tensors(dtype=dtype)]
    out = case.call(*leaves, c=C)
    assert out.device.type == "meta"
    assert out.shape == case.call(*case.tensors(dtype=dtype), c=C).shape
    torch.autograd.grad(out.sum(), leaves, allow_unused=True)


def check_fake(case, dtype):
    args = case.args(dtype=dtype)
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(a).requires_grad_() for a in args]
        out = case(*leaves)
        torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert out.shape == case(*args).shape


def _compiled(case, dtype, dynamic):
    torch._dynamo.reset()
    function = torch.compile(case, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num in (2, 3, 5):
        args = case.args(num, dtype)
        for a, b in zip(case.gradients(function, args), case.gradients(case, args), strict=True):
            close(a, b, 2e-2 if dtype == torch.bfloat16 else tolerance(dtype))


def check_compile_sizes(case, dtype):
    _compiled(case, dtype, None)


def check_compile_dynamic(case, dtype):
    _compiled(case, dtype, True)


class _Module(torch.nn.Module):
    def __init__(self, case, dtype):
        super().__init__()
        self.case, self.c = case, torch.nn.Parameter(torch.tensor(C, dtype=dtype))

    def forward(self, *tensors):
        return self.case(*tensors, self.c)


# Laws at one location have one divergence in every curvature; the other only drops the time component.
_WITHOUT_C = ("convert.from_ambient", "WrappedNormal.kl")


def _exported(case, dtype, strict):
    module, tensors = _Module(case, dtype), case.tensors(4, dtype)
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"tensors": tuple({0: rows} for _ in tensors)}
    program = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes, strict=strict).module()
    for num in (4, 6):
        tensors = case.tensors(num, dtype)
        for a, b in zip(case.gradients(program, tensors), case.gradients(module, tensors), strict=True):
            close(a, b, 2e-2 if dtype == torch.bfloat16 else tolerance(dtype))
    if case.call.has_c and case.call.name not in _WITHOUT_C:  # trainable
        (a,) = torch.autograd.grad(program(*tensors).sum(), list(program.parameters()))
        (b,) = torch.autograd.grad(module(*tensors).sum(), list(module.parameters()))
        close(a, b, 2e-2 if dtype == torch.bfloat16 else tolerance(dtype))


def check_export(case, dtype):
    _exported(case, dtype, False)


def check_export_strict(case, dtype):
    _exported(case, dtype, True)


LIGHT = ("grad", "vmap", "jvp", "jacrev", "hessian", "trace", "meta", "fake")
GRAPHS = ("compile_sizes", "compile_dynamic", "export", "export_strict")
TITLES = {
    "grad": "`grad`", "vmap": "`vmap`", "jvp": "`jvp`", "jacrev": "`jacrev`, `jacfwd`", "hessian": "`hessian`",
    "trace": "`jit.trace`", "meta": "`meta`", "fake": "FakeTensor", "compile_sizes": "`compile`, sizes",
    "compile_dynamic": "`compile`, dynamic", "export": "`export`", "export_strict": "`export` strict",
}  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def check(name, transform, dtype):
    globals()[f"check_{transform}"](Case(name), dtype)


@pytest.mark.parametrize("transform", LIGHT)
@pytest.mark.parametrize("name", CALLS)
def test_light_transforms(name, transform):
    check(name, transform, torch.float64)
    if transform in ("grad", "vmap", "meta"):
        for dtype in (torch.float32, torch.bfloat16):
            check(name, transform, dtype)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CALLS)
def test_changing_sizes(name):
    check(name, "compile_sizes", torch.float32)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("transform", GRAPHS[1:])
@pytest.mark.parametrize(
    "name",
    ["lorentz.pairwise_dist", "lorentz.tangent0_dist", "poincare.midpoint", "distance_info_nce eager",
     "distance_info_nce chunked", "WrappedNormal.log_prob", "cones.entailment_loss"],
)  # fmt: skip
def test_graphs(name, transform):
    check(name, transform, torch.float32)


def test_curvature_under_transforms():
    x = lorentz.exp_map0(torch.randn(4, 3, dtype=torch.float64))
    for curvature in (Curvature(0.7).double(), Curvature(0.7, learnable=False).double()):
        state = {k: v for k, v in curvature.state_dict().items() if k == "log_c"}

        def distance(x, state, curvature=curvature):
            return lorentz.dist0(x, c=torch.func.functional_call(curvature, state, ()))

        torch.testing.assert_close(torch.func.vmap(distance, in_dims=(0, None))(x, state), distance(x, state))
        step = torch.tensor([1e-6], dtype=torch.float64)
        _, got = torch.func.jvp(lambda log_c: distance(x, {"log_c": log_c}), (state["log_c"],), (step / 1e-6,))
        moved = [distance(x, {"log_c": state["log_c"] + s}) for s in (step, -step)]
        torch.testing.assert_close(got, (moved[0] - moved[1]) / 2e-6, rtol=1e-7, atol=1e-9)
    # The rule of the bounds holds for torch.func too: what pulls back inside passes, what pushes out does not.
    curvature = Curvature(1.0)
    for sign, passes in ((1.0, True), (-1.0, False)):
        grad = torch.func.grad(lambda p, sign=sign: sign * torch.func.functional_call(curvature, {"log_c": p}, ()))(
            torch.tensor([5.0])
        )
        assert bool(grad.ne(0)) is passes


def results():
    """{name: {transform: None or the error's first line}} over all dtypes."""
    found = {}
    for name in CALLS:
        for transform in (*LIGHT, *GRAPHS):
            for dtype in DTYPES if transform in LIGHT else (torch.float32,):
                try:
                    check(name, transform, dtype)
                    error = None
                except Exception as caught:
                    error = f"{dtype}: {type(caught).__name__} {str(caught).strip().splitlines()[0][:100]}"
                    break
            found.setdefault(name, {})[transform] = error
    return found


def page(found):
    """The page as text."""
    columns = (*LIGHT, *GRAPHS)
    lines = [
        "# hyper-geom under PyTorch's transforms", "",
        "Each cell is one check of values and gradients against plain eager code: `torch.func` in fp64, fp32 and bf16,",
        "graphs in fp32 with batches of several sizes through one function. `export` is run with a dynamic batch, and the",
        "exported module is differentiated. Written by", "", "```",
        "python packages/hyper-geom/tests/test_transforms.py --write", "```", "",
        "| function | " + " | ".join(TITLES[t] for t in columns) + " |", "|---|" + "---|" * len(columns),
    ]  # fmt: skip
    for name, row in found.items():
        lines.append(f"| `{name}` | " + " | ".join("yes" if row[t] is None else "no" for t in columns) + " |")
    failures = [(n, t, e) for n, row in found.items() for t, e in row.items() if e is not None]
    passed = len(found) * len(columns) - len(failures)
    lines += ["", f"{passed} of {len(found) * len(columns)} cells hold."]
    lines += [f"- `{n}`, {TITLES[t]}: {e}" for n, t, e in failures]
    lines += [
        "", "## Not in the table", "",
        "- `is_entailed` has no gradient. `poincare.check_point`, `gromov_delta` and `gromov_product` answer after reading",
        "  values, which no graph can hold.",
        "- ONNX: the exporter needs `onnxscript`, which was not there to be tried. It starts from the exported programs above.",
        "  PyTorch's older exporter (`dynamo=False`) wrote 38 of the 70 functions with a dynamic batch, with the right values in",
        "  ONNX's reference runtime; it has no rule for `asinh`, `atanh`, `sinh`, `cosh`, `hypot` and `mT`, which the others need.",
        "- `embed_tree`, `layout` and `tree_fit` search. With the compiled CPU kernels in use (`build_cpu_kernels`) everything but",
        "  plain eager calls keeps the form that the table is of.",
        "- `WrappedNormal.entropy` with unequal scales and `kl` between two locations draw samples: under `vmap` they need",
        "  `randomness=\"different\"`, and no check of values can hold them.",
        "- The Triton backend of the loss has no forward mode and no vmap; take `backend=\"chunked\"` or `\"eager\"` there.",
        "", "## How", "",
        "A function with a backward written by hand keeps that backward for first derivatives in reverse. Forward mode, vmap and",
        "derivatives of a gradient go through the same function written as differentiable operations, so they hold the N x M",
        "matrices that the hand-written backward avoids. Exported and traced graphs hold those operations too.", "",
    ]  # fmt: skip
    return "\n".join(lines)


@pytest.mark.skipif(not PAGE.exists(), reason="the page is not beside the tests")
def test_page_lists_every_function():
    text = PAGE.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(CALLS)
    assert all(TITLES[t] in text for t in (*LIGHT, *GRAPHS))
    assert not any("| no |" in row for row in rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    text = page(results())
    if "--write" in sys.argv:
        PAGE.write_text(text)
    print(text)
