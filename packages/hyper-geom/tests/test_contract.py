"""What every public function promises: precision, autocast, shapes, gradients, bad input, no side effects."""

import contextlib
import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import hyper_geom
from hyper_geom import Curvature, convert, lorentz, poincare

HALVES = (torch.bfloat16, torch.float16)


def test_compute_dtype(geometry_call):
    for dtype in (*HALVES, torch.float32, torch.float64):
        out = geometry_call(*geometry_call.tensors(dtype=dtype), c=0.7)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_one_fp64_input_is_enough(geometry_call):
    tensors = geometry_call.tensors(dtype=torch.float32)
    tensors[-1] = tensors[-1].double()
    assert geometry_call(*tensors, c=0.7).dtype == torch.float64
    if geometry_call.has_c:
        tensors[-1] = tensors[-1].float()
        assert geometry_call(*tensors, c=torch.tensor(0.7, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("half", HALVES)
def test_autocast_changes_nothing(geometry_call, half, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    tensors = [x.to(device) for x in geometry_call.tensors(batch=(2, 3), dim=16, dtype=half)]

    def run(context):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with context:
            out = geometry_call(*leaves, c=0.7)
        return out, torch.autograd.grad(out.sum(), leaves)

    expected, expected_gradients = run(contextlib.nullcontext())
    got, gradients = run(torch.autocast(device, dtype=half))
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    assert torch.equal(got, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_inputs_are_not_mutated(geometry_call):
    tensors = geometry_call.tensors()
    copies = [x.clone() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors]
    c = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    out = geometry_call(*leaves, c=c)
    torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert c.item() == 0.7
    assert out.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in tensors} or (
        geometry_call.name == "convert.from_ambient"
    )


@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,), (2, 3), (2, 1, 3)])
def test_batches_equal_a_loop(geometry_call, batch):
    tensors = geometry_call.tensors(batch=batch)
    if geometry_call.name == "cones.entailment_loss":
        out = geometry_call(*tensors, c=0.7, reduction="none")
        call = lambda *x: geometry_call(*x, c=0.7, reduction="none")  # noqa: E731
    else:
        out = geometry_call(*tensors, c=0.7)
        call = lambda *x: geometry_call(*x, c=0.7)  # noqa: E731
    assert out.shape[: len(batch)] == batch
    for index in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, len(batch)).tolist() if batch else []:
        torch.testing.assert_close(out[tuple(index)], call(*(x[tuple(index)] for x in tensors)), rtol=1e-12, atol=1e-14)


def test_leading_dimensions_broadcast(geometry_call):
    tensors = geometry_call.tensors(batch=(4,))
    if len(tensors) < 2 or geometry_call.name in ("lorentz.midpoint", "poincare.midpoint", "cones.entailment_loss"):
        pytest.skip("one vector argument")
    first = tensors[0].unsqueeze(1)
    got = geometry_call(first, *tensors[1:], c=0.7)
    assert got.shape[:2] == (4, 4)
    torch.testing.assert_close(got[2, 1], geometry_call(tensors[0][2], *(x[1] for x in tensors[1:]), c=0.7))


def test_gradcheck(geometry_call):
    c = 3.0
    tensors = [x.requires_grad_() for x in geometry_call.tensors(batch=(2,), scale=0.3 / math.sqrt(c), seed=3)]
    inputs = list(tensors)
    if geometry_call.has_c:
        inputs.append(torch.tensor([c], dtype=torch.float64, requires_grad=True))

    def function(*args):
        return geometry_call(*args[:-1], c=args[-1]) if geometry_call.has_c else geometry_call(*args)

    assert torch.autograd.gradcheck(function, inputs, eps=1e-7, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", ["origin", "tiny", "same", "large"])
def test_gradients_are_finite_at_the_edges(geometry_call, dtype, place):
    tensors = geometry_call.tensors(dtype=dtype)
    if place == "same":
        vectors = {kind: x for kind, x in zip(geometry_call.kinds, tensors, strict=True)}
        tensors = [vectors[kind].clone() for kind in geometry_call.kinds]
    else:
        factor = {"origin": 0.0, "tiny": 1e-25, "large": 1e4}[place]
        tensors = [x * factor if kind in "vm" else x for kind, x in zip(geometry_call.kinds, tensors, strict=True)]
    c = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    leaves = [x.requires_grad_() for x in tensors]
    out = geometry_call(*leaves, c=c)
    assert out.isfinite().all()
    gradients = torch.autograd.grad(out.sum(), [*leaves, c], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_curvature_forms_agree(geometry_call):
    if not geometry_call.has_c:
        pytest.skip("takes two curvatures")
    tensors = geometry_call.tensors()
    expected = geometry_call(*tensors, c=0.7)
    for c in (torch.tensor(0.7).double(), torch.tensor([0.7]).double(), torch.tensor([[0.7]]).double()):
        torch.testing.assert_close(geometry_call(*tensors, c=c), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(geometry_call(*tensors, c=1), geometry_call(*tensors), rtol=0, atol=0)


BAD_CURVATURES = [
    (0.0, ValueError),
    (-1.0, ValueError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    (torch.ones(7), ValueError),
    (torch.tensor(-0.5), ValueError),
    (Curvature(1.0), TypeError),
    (np.float32(-1), ValueError),
    (torch.ones(0), ValueError),
    (torch.tensor(1), TypeError),
    (True, TypeError),
]


def test_bad_curvature(geometry_call):
    tensors = geometry_call.tensors()
    if geometry_call.has_c:
        for c, error in BAD_CURVATURES:
            with pytest.raises(error, match="c must"):
                geometry_call(*tensors, c=c)
        with pytest.raises(TypeError):
            geometry_call(*tensors, c="1")


@pytest.mark.parametrize(("c", "error"), BAD_CURVATURES)
def test_bad_curvatures_of_a_rescaling(c, error):
    rescale = inspect.unwrap(convert.rescale_curvature)  # without the test run's check of annotations
    with pytest.raises(error, match="c_from"):
        rescale(torch.ones(3), c, 1.0)
    with pytest.raises(error, match="c_to"):
        rescale(torch.ones(3), 1.0, c)


def test_bad_vectors(geometry_call):
    tensors = geometry_call.tensors()
    vectors = [i for i, kind in enumerate(geometry_call.kinds) if kind in "vm"]
    for i in vectors:

        def swapped(value, i=i):
            return [value if j == i else x for j, x in enumerate(tensors)]

        for dtype in (torch.long, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match="dtype"):
                geometry_call(*swapped(tensors[i].to(dtype)))
        with pytest.raises(TypeError):
            geometry_call(*swapped(tensors[i].tolist()))
        with pytest.raises(ValueError, match="dimension"):
            geometry_call(*swapped(torch.tensor(1.0)))
        with pytest.raises(ValueError, match="last dimension"):
            geometry_call(*swapped(tensors[i][..., :0]))
        if geometry_call.has_c:
            with pytest.raises(ValueError, match="one device"):
                geometry_call(*swapped(tensors[i].to("meta")), c=torch.tensor(0.7))
        if len(vectors) > 1:
            with pytest.raises(ValueError, match="last dimension"):
                geometry_call(*swapped(tensors[i][..., :2]))
            with pytest.raises(ValueError, match="leading dimensions"):
                geometry_call(*swapped(torch.cat((tensors[i], tensors[i][:1]))))


@pytest.mark.parametrize("model", [lorentz, poincare])
def test_bad_numbers(model):
    x = torch.rand(4, 3) / 3
    for radius in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_radius"):
            model.clip_tangent0(x, radius)
    with pytest.raises(ValueError, match="precision"):
        model.pairwise_dist(x, x, precision="low")
    with pytest.raises(ValueError, match="weights"):
        model.midpoint(x, torch.ones(3))
    with pytest.raises(ValueError, match="2 dimension"):
        model.midpoint(x[0])
    with pytest.raises(TypeError, match="weights"):
        model.midpoint(x, torch.ones(4, dtype=torch.long))
    with pytest.raises(ValueError, match="max_radius"):
        poincare.project(x, -1.0)
    with pytest.raises(ValueError, match="one space component"):
        convert.from_ambient(x[:, :1])
    for args, kwargs in (((x,), {}), ((x, x, 0.7), {}), ((x, x), {"x": x}), ((x, x), {"d": 1.0}), ((), {"y": x})):
        with pytest.raises(TypeError):
            model.dist(*args, **kwargs)
    torch.testing.assert_close(model.dist(y=x, x=x[0], c=0.7), model.dist(x[0], x, c=0.7))


def test_models_share_names_and_signatures():
    only_lorentz = {"time", "inner_ambient", "pairwise_inner"}
    only_poincare = {"mobius_add", "mobius_scalar_mul", "gyration", "conformal_factor", "project", "check_point"}
    assert set(lorentz.__all__) - only_lorentz == set(poincare.__all__) - only_poincare
    for name in set(lorentz.__all__) & set(poincare.__all__):
        ours, theirs = (inspect.signature(getattr(m, name)).parameters.values() for m in (lorentz, poincare))
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]
    for name in hyper_geom.__all__:
        assert hasattr(hyper_geom, name)


def test_import_is_silent_and_leaves_optional_packages_out():
    code = (
        "import sys, torch; of_torch = set(sys.modules)\n"
        "import hyper_geom; new = set(sys.modules) - of_torch\n"
        "assert not {'geoopt', 'matplotlib', 'networkx', 'scipy'} & new, 'eager import'\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""
