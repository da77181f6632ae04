"""Memory of building and searching a pool in a file, and the recall of vectors in a store without certificates.

    python tools/bench.py packages/hyper-icl/benchmarks/bench_pool.py --json OUT.json [--quick] [--num 1000000] [--dim 768]

Peak memory is that of a process of its own, less what it held before it began; the file's pages count once they are read.
Recall compares the store's k, 2k, 4k, ... best products (fp32, numpy or FAISS), rescored, with the certified top 8.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench import Bench, arguments

from hyper_icl import AnchorBank, HyperbolicDemoIndex, HyperbolicLift, inner_product_query, inner_product_vectors


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(folder: str, num: int, dim: int) -> dict[str, float]:
    """Lift random features part by part into a file, open it, index it, and search it."""
    torch.set_num_threads(1)
    lift, generator = HyperbolicLift(dim, dim), torch.Generator().manual_seed(0)
    with torch.no_grad():
        lift(torch.randn(8, dim))
        before = peak_mib()
        sizes = [min(8192, num - i) for i in range(0, num, 8192)]
        bank = AnchorBank.build(folder, (lift(torch.randn(n, dim, generator=generator)) for n in sizes))
        built = peak_mib()
        index = bank.index(0.3, backend="torch")
        indexed = peak_mib()
        index.search(lift(torch.randn(4, dim, generator=generator)), 8)
    return {"before": before, "built": built, "indexed": indexed, "searched": peak_mib()}


def recall(bench: Bench, num: int, dim: int) -> None:
    """Share of the certified top 8 among the store's best M products."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, dim, generator=generator)

    def draw(n: int) -> torch.Tensor:
        x = centres[torch.randint(200, (n,), generator=generator)] + 0.7 * torch.randn(n, dim, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1) * (0.5 + 3.5 * torch.rand(n, 1, generator=generator))

    pool, queries = draw(num), draw(200)
    for mu in (0.0, 0.3, 1.0):
        index = HyperbolicDemoIndex(pool, mu=mu, backend="torch")
        exact = index.search(queries, 8)
        products = inner_product_query(queries) @ inner_product_vectors(pool, mu=mu).mT
        for m in (8, 16, 32, 64):
            found = index.rescore(queries, products.topk(m).indices, 8)
            hits = (found.ids.unsqueeze(-1) == exact.ids.unsqueeze(-2)).any(-1).double().mean()
            bench.add(
                "recall of the top 8 by a store's products", f"N {num:,}, d {dim}, mu {mu}, M {m}", float(hits), unit=""
            )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    # The process that is measured; not for people.
    parser.add_argument("--build", help=argparse.SUPPRESS)
    args = parser.parse_args()
    num, dim = (20_000, 64) if args.quick else (args.num, args.dim)
    if args.build:
        print(json.dumps(build(args.build, args.num, args.dim)))
        return
    bench = Bench(1)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            sys.modules[Bench.__module__].__file__,
            __file__,
            "--build",
            folder,
            "--num",
            str(num),
            "--dim",
            str(dim),
        ]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        size = (Path(folder) / "bank.safetensors").stat().st_size / 2**20
    for step in ("built", "indexed", "searched"):
        bench.add(
            f"peak memory, pool {step}",
            f"N {num:,}, d {dim}",
            found[step] - found["before"],
            size,
            "MiB",
            "ratio <= 1.2",
        )
    recall(bench, 2000 if args.quick else 50_000, 32 if args.quick else 128)
    bench.write(args.json)


if __name__ == "__main__":
    main()
