"""Pairwise distances: time and memory beside one matrix product, torch.cdist, the usual acosh form and geoopt.

    python tools/bench.py packages/hyper-geom/benchmarks/bench_pairwise.py --json OUT.json [--quick]

The unit is one matrix product of the same inputs in the same process, forward or forward and backward. Peak memory
counts what one step allocates, inputs excluded. geoopt broadcasts (n, 1, d) against (1, m, d), as its `dist` is written,
so it is compared at a size where that fits.
"""

import shutil
import warnings

import torch
from _acosh import acosh_dist
from bench import Bench, arguments, header

from hyper_geom import build_cpu_kernels, distance_info_nce, lorentz, poincare


def directions(num: int, dim: int, radius: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(num, dim, generator=generator)
    return radius * v / v.norm(dim=-1, keepdim=True)


def forward_backward(function, x, y, grad):
    def step():
        leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
        function(*leaves).backward(grad)

    return step


def compare(bench: Bench, num: int, dim: int, device: str) -> None:
    x, y = (directions(num, dim, 1.5, seed).to(device) for seed in (0, 1))
    grad = torch.rand(num, num, device=device)
    functions = {
        "pairwise_dist": lorentz.pairwise_dist,
        "pairwise_dist, precision high": lambda x, y: lorentz.pairwise_dist(x, y, precision="high"),
        "ball pairwise_dist": lambda x, y: poincare.pairwise_dist(0.4 * x, 0.4 * y),
        "torch.cdist": torch.cdist,
        "acosh form": acosh_dist,
    }
    targets = {
        "pairwise_dist": ("ratio <= 2.6", "<= 200 MiB", "ratio <= 2.4", "<= 500 MiB"),
    }
    setting = f"N=M={num}, d={dim}, unit matmul"
    unit, *spent = bench.times(lambda: x @ y.mT, *(lambda f=f: f(x, y) for f in functions.values()))
    for (name, function), time in zip(functions.items(), spent, strict=True):
        limit = targets.get(name, (None,) * 4)
        bench.add(f"{name}, forward", setting, time, unit, "ms", limit[0], device)
        peak = bench.peak(lambda f=function: f(x, y), device)
        bench.add(f"{name}, forward", setting, peak, bench.peak(lambda: x @ y.mT, device), "MiB", limit[1], device)
    steps = [forward_backward(f, x, y, grad) for f in (lambda x, y: x @ y.mT, *functions.values())]
    unit, *spent = bench.times(*steps)
    unit_peak = bench.peak(steps[0], device)
    for (name, _), step, time in zip(functions.items(), steps[1:], spent, strict=True):
        limit = targets.get(name, (None,) * 4)
        bench.add(f"{name}, forward+backward", setting, time, unit, "ms", limit[2], device)
        bench.add(f"{name}, forward+backward", setting, bench.peak(step, device), unit_peak, "MiB", limit[3], device)


def compare_compiled(bench: Bench, num: int, dim: int, device: str) -> None:
    setting = f"N=M={num}, d={dim}, inductor, unit matmul"
    names = ("pairwise_dist", "acosh form")
    targets = (("ratio <= 1.6", "ratio <= 1.5"), (None, None))
    if device == "cpu" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        for name in names:
            bench.add(f"{name}, compiled", setting + ", no C++ compiler", None, device=device)
        return
    x, y = (directions(num, dim, 1.5, seed).to(device) for seed in (0, 1))
    grad = torch.rand(num, num, device=device)
    compiled = [torch.compile(f, fullgraph=True) for f in (lambda x, y: x @ y.mT, lorentz.pairwise_dist, acosh_dist)]
    unit, *spent = bench.times(*(lambda f=f: f(x, y) for f in compiled))
    steps = [forward_backward(f, x, y, grad) for f in compiled]
    both_unit, *both = bench.times(*steps)
    for name, limit, time, both_time in zip(names, targets, spent, both, strict=True):
        bench.add(f"{name}, compiled, forward", setting, time, unit, "ms", limit[0], device)
        bench.add(f"{name}, compiled, forward+backward", setting, both_time, both_unit, "ms", limit[1], device)


def compare_geoopt(bench: Bench, num: int, dim: int) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import geoopt
    except ImportError:
        bench.add("geoopt broadcast", "geoopt is not installed", None)
        return
    x, y = (directions(num, dim, 1.5, seed) for seed in (0, 1))
    time_first = [torch.cat(((1 + (v * v).sum(-1, keepdim=True)).sqrt(), v), -1) for v in (x, y)]
    p, q = 0.4 * x, 0.4 * y
    ambient, ball = geoopt.Lorentz(), geoopt.PoincareBall()
    setting = f"N=M={num}, d={dim}"
    for name, ours, theirs, target in (
        (
            "pairwise_dist against geoopt Lorentz",
            lambda: lorentz.pairwise_dist(x, y),
            lambda: ambient.dist(time_first[0][:, None], time_first[1][None]),
            "ratio <= 1/40",
        ),
        (
            "pairwise_dist against geoopt ball",
            lambda: poincare.pairwise_dist(p, q),
            lambda: ball.dist(p[:, None], q[None]),
            "ratio <= 1/150",
        ),
    ):
        torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
        bench.add(name, setting, *bench.times(ours, theirs), "ms", target)
        bench.add(name, setting, bench.peak(ours), bench.peak(theirs), "MiB")


def compare_kernels(bench: Bench, num: int, dim: int) -> None:
    """The one-pass kernels; last, because they serve everything that follows."""
    setting = f"N=M={num}, d={dim}, unit matmul"
    names = ("pairwise_dist, kernels", "DistanceInfoNCE chunked, kernels")
    if not build_cpu_kernels():
        for name in names:
            bench.add(name, setting + ", no compiler", None)
        return
    compare_small(bench, ", kernels")
    x, y = (directions(num, dim, 1.5, seed) for seed in (0, 1))
    grad = torch.rand(num, num)

    def loss(x, y):
        return distance_info_nce(x, y, logit_scale=10.0, backend="chunked")

    unit, *spent = bench.times(lambda: x @ y.mT, lambda: lorentz.pairwise_dist(x, y), lambda: loss(x, y))
    steps = [
        forward_backward(f, x, y, g)
        for f, g in ((lambda x, y: x @ y.mT, grad), (lorentz.pairwise_dist, grad), (loss, None))
    ]
    both_unit, *both = bench.times(*steps)
    for name, targets, time, both_time in zip(
        names, (("ratio <= 1.2", "ratio <= 1.3"), (None, None)), spent, both, strict=True
    ):
        bench.add(f"{name}, forward", setting, time, unit, "ms", targets[0])
        bench.add(f"{name}, forward+backward", setting, both_time, both_unit, "ms", targets[1])


def compare_small(bench: Bench, form: str = "") -> None:
    """A call on a few points, where the number of operations counts; the target is that of the kernels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import geoopt
    except ImportError:
        bench.add("dist against geoopt", "geoopt is not installed", None)
        return
    x, y = (directions(8, 16, 1.0, seed) for seed in (0, 1))
    ambient = [torch.cat(((1 + (v * v).sum(-1, keepdim=True)).sqrt(), v), -1) for v in (x, y)]
    manifold, ball = geoopt.Lorentz(), geoopt.PoincareBall()
    p, q = 0.4 * x, 0.4 * y
    for name, ours, theirs in (
        ("dist against geoopt Lorentz", lambda: lorentz.dist(x, y), lambda: manifold.dist(*ambient)),
        ("ball dist against geoopt ball", lambda: poincare.dist(p, q), lambda: ball.dist(p, q)),
    ):
        loops = [lambda f=f: [f() for _ in range(100)] for f in (ours, theirs)]
        bench.add(name + form, "(8, 16), a call", *(10 * time for time in bench.times(*loops)), "us", "ratio <= 2")


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    bench = Bench(2 if args.quick else 5)
    header()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices[args.cuda_only :]:
        compare(bench, 128 if args.quick else 4096, 32 if args.quick else 512, device)
        compare_compiled(bench, 64 if args.quick else 2048, 32 if args.quick else 512, device)
    if "cuda" not in devices:
        bench.add("pairwise_dist, forward+backward", "N=M=4096, d=512", None, device="cuda")
    if args.cuda_only:
        bench.write(args.json)
        return
    compare_geoopt(bench, 32 if args.quick else 256, 32 if args.quick else 512)
    compare_small(bench)
    compare_kernels(bench, 64 if args.quick else 2048, 32 if args.quick else 512)
    bench.write(args.json)


if __name__ == "__main__":
    main()
