"""InfoNCE on distances: peak memory of the chunked loss beside the eager one, and the CUDA kernels beside matmuls.

    python tools/bench.py packages/hyper-geom/benchmarks/bench_info_nce.py --json OUT.json [--quick]

CPU rows are one forward and backward with learnable c and logit_scale; memory counts what the step allocates, the
gradients of x and y included. The chunked loss grows with N, the eager one with N^2.

CUDA rows set forward and backward beside two and four matrix products of the same inputs: without the score matrix in
memory the symmetric loss needs four (score, score again, and one for each gradient), so twice two at equal efficiency
is the floor for one rounding of the inputs.
"""

import torch
from bench import MIB, Bench, arguments, header

from hyper_geom import distance_info_nce


def inputs(num: int, dim: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = [1.5 * torch.randn(num, dim, generator=generator) / dim**0.5 for _ in range(2)]
    return [v.to(device, dtype).requires_grad_() for v in pair]


def step(x: torch.Tensor, y: torch.Tensor, backend: str, kind: str = "points"):
    def run():
        x.grad = y.grad = None
        c, scale = (torch.tensor(value, device=x.device, requires_grad=True) for value in (1.0, 14.0))
        distance_info_nce(x, y, c=c, logit_scale=scale, backend=backend, inputs=kind).backward()

    return run


def cpu_rows(bench: Bench, quick: bool) -> None:
    dim = 32 if quick else 128
    sizes = (64, 128, 256) if quick else (2048, 8192, 32768)
    for index, num in enumerate(sizes):
        x, y = inputs(num, dim)
        mine = bench.peak(step(x, y, "chunked"))
        theirs = bench.peak(step(x, y, "eager")) if index < 2 else None
        setting = f"N={num}, d={dim}; one score matrix {num * num * 4 / MIB:.0f} MiB"
        bench.add("chunked against eager, peak", setting, mine, theirs, "MiB", "grows with N")
    x, y = inputs(sizes[0], dim)
    setting = f"N={sizes[0]}, d={dim}"
    bench.add("chunked against eager, time", setting, *bench.times(step(x, y, "chunked"), step(x, y, "eager")), "ms")


def cuda_rows(bench: Bench, quick: bool) -> None:
    num, dim = (512, 64) if quick else (16384, 512)
    settings = (
        ("fp32", torch.float32, "highest", "points"),
        ("TF32", torch.float32, "high", "points"),
        ("bf16", torch.bfloat16, "highest", "points"),
        ("bf16 tangent0", torch.bfloat16, "highest", "tangent0"),
    )
    for name, dtype, precision, kind in settings:
        setting = f"N=M={num}, d={dim}, {name}"
        target = "ratio <= 1.5"
        if not torch.cuda.is_available():
            bench.add("triton against 2 matmuls, time", setting, None, None, "ms", target, "cuda")
            bench.add("triton against 4 matmuls, time", setting, None, None, "ms", None, "cuda")
            bench.add("triton against N x M floats, peak", setting, None, None, "MiB", "ratio <= 0.1", "cuda")
            continue
        torch.set_float32_matmul_precision(precision)
        x, y = inputs(num, dim, "cuda", dtype)
        a, b = x.detach(), y.detach()

        def products(count, a=a, b=b):
            for _ in range(count):
                a @ b.mT

        mine, two, four = bench.times(step(x, y, "triton", kind), lambda: products(2), lambda: products(4))
        bench.add("triton against 2 matmuls, time", setting, mine, two, "ms", target, "cuda")
        bench.add("triton against 4 matmuls, time", setting, mine, four, "ms", None, "cuda")
        x.grad = y.grad = None
        peak = bench.peak(step(x, y, "triton", kind), "cuda") - (x.nbytes + y.nbytes) / MIB
        bench.add(
            "triton against N x M floats, peak", setting, peak, num * num * 4 / MIB, "MiB", "ratio <= 0.1", "cuda"
        )
    torch.set_float32_matmul_precision("highest")


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    bench = Bench(2 if args.quick else 5)
    header()
    if not args.cuda_only:
        cpu_rows(bench, args.quick)
    cuda_rows(bench, args.quick)
    bench.write(args.json)


if __name__ == "__main__":
    main()
