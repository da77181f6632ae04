"""Text-queried logits: the Gram form beside the (B, n, d) features it avoids, time and peak memory.

    python tools/bench.py packages/mat-align/benchmarks/bench_logits.py --json OUT.json [--quick]

Peak memory counts what one step allocates, inputs excluded. Both forms run in the same process and take turns.
"""

import math

import torch
from bench import Bench, arguments, header

from mat_align import TextQueriedAttention


def compare(bench: Bench, batch: int, num: int, dim: int, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, 3, dim, generator=g).to(device)
    text = torch.randn(num, dim, generator=g).to(device)
    attention = TextQueriedAttention(dim).to(device)
    grad = torch.rand(batch, num, generator=g).to(device)

    def forward(form):
        with torch.no_grad():
            attention.logits(tokens, text, math.log(100), form)

    def both(form):
        leaves = tokens.detach().requires_grad_(), text.detach().requires_grad_()
        attention.logits(*leaves, math.log(100), form).backward(grad)
        attention.zero_grad()

    setting = f"B={batch}, n={num}, d={dim}, M=3"
    limit = "ratio <= .5" if device == "cuda" else "ratio <= .2"
    for name, step in (("forward", forward), ("forward+backward", both)):
        ours, peer = bench.times(lambda s=step: s("gram"), lambda s=step: s("naive"))
        bench.add(f"gram against naive, {name}", setting, ours, peer, "ms", limit, device)
        ours, peer = bench.peak(lambda s=step: s("gram"), device), bench.peak(lambda s=step: s("naive"), device)
        bench.add(f"gram against naive, {name}", setting, ours, peer, "MiB", "ratio <= .05", device)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    bench = Bench(1 if args.quick else 2)
    header()
    size = (4, 100, 32) if args.quick else (64, 10_000, 512)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices[args.cuda_only :]:
        compare(bench, *size, device)
    if not torch.cuda.is_available():
        bench.add("gram against naive, forward+backward", "B=64, n=10000, d=512, M=3", None, device="cuda")
    bench.write(args.json)


if __name__ == "__main__":
    main()
