"""Compares the Triton backend with the eager one and writes the errors as JSON; run with TRITON_INTERPRET=1 or on CUDA.

As a script it takes the output path and a device. The interpreter must be chosen before the kernels are imported, hence
a process of its own.
"""

import json
import math
import sys
import warnings

import torch

from hyper_geom import _info_nce_triton, convert, lorentz
from hyper_geom.contrastive import distance_info_nce

# The interpreter takes log 0 = -inf and inf * 0 through numpy, which remarks on both.
warnings.simplefilter("ignore", RuntimeWarning)


def unit(num, dim, generator):
    v = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    return v / v.norm(dim=-1, keepdim=True)


def inputs_of(kind, model, num, num_targets, dim, c):
    """Pairs at depth 1.5 in float64, positives nearer than the rest."""
    generator = torch.Generator().manual_seed(num * 1000 + num_targets)
    x, y = math.sinh(1.5) / math.sqrt(c) * unit(num, dim, generator), unit(num_targets, dim, generator)
    y = math.sinh(1.5) / math.sqrt(c) * y
    shared = min(num, num_targets)
    y[:shared] += x[:shared]
    if kind == "tangent0":
        x, y = lorentz.log_map0(x, c=c), lorentz.log_map0(y, c=c)
        return (x, y) if model == "lorentz" else (x / 2, y / 2)
    return (x, y) if model == "lorentz" else (convert.lorentz_to_poincare(x, c=c), convert.lorentz_to_poincare(y, c=c))


def run(x, y, c, labels, device, dtype, **options):
    leaves = [v.to(device, dtype).requires_grad_() for v in (x, y)]
    leaves += [torch.tensor(v, device=device, requires_grad=True) for v in (c, 4.0)]
    loss = distance_info_nce(leaves[0], leaves[1], c=leaves[2], logit_scale=leaves[3], labels=labels, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(
    device,
    num,
    num_targets,
    dim,
    dtype=torch.float32,
    model="lorentz",
    inputs="points",
    chunk_size=None,
    c=0.7,
    programs=512,
):
    x, y = inputs_of(inputs, model, num, num_targets, dim, c)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randperm(max(num, num_targets), generator=generator)[:num].to(device) % num_targets
    options = {"model": model, "inputs": inputs, "symmetric": num == num_targets}
    # With 512 programs wanted every tile gets its own; with 1 a program runs over all tiles of its rows.
    _info_nce_triton._NUM_PROGRAMS = programs
    fused = run(x, y, c, labels, device, dtype, backend="triton", chunk_size=chunk_size, **options)
    wide = (v.to(dtype).to(torch.float64) for v in (x, y))
    exact = run(*wide, c, labels, device, torch.float64, backend="eager", **options)
    eager = run(x, y, c, labels, device, dtype, backend="eager", **options)
    assert [f.dtype for f in fused] == [e.dtype for e in eager]
    # As in test_info_nce.py: the gradient of c is a difference, compared with the size of its terms.
    floors = [1e-9, 1e-9, 1e-9, (4.0 * exact[4].abs() / (2 * c)).item(), 1e-9]
    return {
        "setting": f"{dtype} {model} {inputs} {num}x{num_targets}x{dim} chunk {chunk_size}",
        "half": dtype != torch.float32,
        "vs_eager": [relative(*pair) for pair in zip(fused, eager, floors, strict=True)],
        "vs_fp64": [relative(*pair) for pair in zip(fused, exact, floors, strict=True)],
    }


def relative(got, want, floor=1e-9):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=floor)).item()


def edge_cases(device):
    """Results that are right or wrong rather than near."""
    found = {}
    one = torch.ones(1, 3, device=device, requires_grad=True)
    loss = distance_info_nce(one, torch.zeros(1, 3, device=device), logit_scale=1.0, backend="triton")
    found["single"] = [loss.item(), torch.autograd.grad(loss, one)[0].abs().sum().item()]
    empty = torch.zeros(0, 3, device=device)
    found["empty"] = distance_info_nce(empty, empty, logit_scale=1.0, backend="triton").item()
    x = torch.ones(4, 3, device=device)
    x[1] = math.nan
    found["nan"] = math.isnan(
        distance_info_nce(x, torch.ones(4, 3, device=device), logit_scale=1.0, backend="triton").item()
    )
    golden = (
        torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=device),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device),
    )
    found["golden"] = distance_info_nce(*golden, logit_scale=1.0, backend="triton").item()
    leaf = torch.eye(4, device=device, requires_grad=True)
    loss = distance_info_nce(leaf, 2 * torch.eye(4, device=device), logit_scale=1.0, backend="triton")
    (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
    try:
        torch.autograd.grad(g.sum(), leaf)
        found["second_derivative"] = "none raised"
    except RuntimeError as error:
        found["second_derivative"] = type(error).__name__
    try:
        distance_info_nce(leaf.double(), leaf.double(), logit_scale=1.0, backend="triton")
        found["fp64"] = "none raised"
    except ValueError as error:
        found["fp64"] = str(error)
    return found


def compiled(device):
    """Error of the compiled graph against the plain call, and of the same under autocast."""

    def function(x, y):
        return distance_info_nce(x, y, logit_scale=2.0, backend="triton")

    x, y = inputs_of("points", "lorentz", 20, 20, 8, 1.0)
    results = []
    graph = torch.compile(function, fullgraph=True, backend="aot_eager")
    for run_one, enabled in ((function, False), (graph, False), (function, True)):
        leaves = [v.to(device, torch.float32).requires_grad_() for v in (x, y)]
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=enabled):
            loss = run_one(*leaves)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
    return [max(relative(a, b) for a, b in zip(results[0], other, strict=True)) for other in results[1:]]


def main(path, device):
    assert device == "cuda" or _info_nce_triton.RUNS_ON_CPU
    cases = [
        # One tile, several tiles with a tail on every side, d below and above one depth step, n != m, slabs with a tail.
        errors(device, 16, 16, 4),
        errors(device, 150, 150, 40),
        errors(device, 150, 150, 40, chunk_size=37, programs=1),
        errors(device, 130, 70, 33),
        errors(device, 70, 200, 33, chunk_size=64, programs=4),
        errors(device, 1, 5, 3),
        errors(device, 90, 90, 16, model="poincare"),
        errors(device, 90, 90, 16, inputs="tangent0"),
        errors(device, 90, 90, 16, model="poincare", inputs="tangent0", chunk_size=50),
        errors(device, 90, 90, 16, c=0.1),
        errors(device, 90, 90, 16, c=4.0),
        errors(device, 90, 90, 40, dtype=torch.float16),
        errors(device, 90, 90, 40, dtype=torch.bfloat16),
        errors(device, 90, 90, 40, dtype=torch.bfloat16, inputs="tangent0", chunk_size=37),
        errors(device, 70, 130, 40, dtype=torch.bfloat16, model="poincare"),
    ]
    checks = torch.library.opcheck
    sides = [v.to(device) for v in (torch.eye(4), torch.ones(4), torch.ones(4).sinh(), torch.ones(4).sinh())]
    scale, labels = torch.tensor(1.0, device=device), torch.arange(4, device=device)
    tests = ("test_schema", "test_faketensor")
    sample = (*sides, *[side.clone() for side in sides], scale, labels, True, 3)
    report = checks(_info_nce_triton._lse, sample, test_utils=tests)
    rows = torch.zeros(4, device=device)
    report |= {f"grad_{k}": v for k, v in checks(
        _info_nce_triton._lse_grad,
        (*sample[:-2], rows, rows.clone(), rows.clone() + 1, rows.clone() + 1, True, 3),
        test_utils=tests,
    ).items()}  # fmt: skip
    with open(path, "w") as file:
        json.dump({"cases": cases, "edges": edge_cases(device), "compiled": compiled(device), "opcheck": report}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
