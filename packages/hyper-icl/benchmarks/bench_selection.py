"""Certified top-8 beside FAISS flat search and a full sort, in one process.

    python tools/bench.py packages/hyper-icl/benchmarks/bench_selection.py --json OUT.json [--quick] [--num 443757]

The pool is the size of VQAv2's training set by default, 512 wide. The peers answer an easier question: the 128 largest
inner products (FAISS IndexFlatIP), and a sort of all cosines (RICES as it is usually written). Ours returns the exact
top 8 of -d + mu h with a proof, by torch's matmul and through FAISS. Exactness is checked against fp64 on the first queries.
"""

import torch
from bench import Bench, arguments

from hyper_icl import HyperbolicDemoIndex, RicesSelector
from hyper_icl.demonstrations._bounds import exact_scores


def pool(num: int, dim: int, seed: int) -> torch.Tensor:
    """Directions around 1,000 centres, radii from 0.5 to 4."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(7))
    x = centres[torch.randint(1000, (num,), generator=generator)]
    x += 0.7 * torch.randn(num, dim, generator=generator)
    return torch.nn.functional.normalize(x, dim=-1) * (0.5 + 3.5 * torch.rand(num, 1, generator=generator))


def check(items: torch.Tensor, query: torch.Tensor, index: HyperbolicDemoIndex) -> None:
    """The certified ids of some queries are those of a search of everything in fp64."""
    found = index.search(query, 8, order="descending")
    assert found.certified.all()
    for q, ids in zip(query.double(), found.ids, strict=True):
        parts = [exact_scores(q[None], part[None], index.c, index.mu)[0] for part in items.split(1 << 15)]
        assert torch.equal(torch.cat(parts).topk(8).indices, ids)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--num", type=int, default=443_757)
    parser.add_argument("--dim", type=int, default=512)
    args = parser.parse_args()
    num, dim = (5000, 32) if args.quick else (args.num, args.dim)
    torch.set_num_threads(1)
    bench = Bench(1 if args.quick else 2)
    items, queries = pool(num, dim, 0), pool(64, dim, 1)
    setting = f"N {num:,}, d {dim}, one thread"
    rices, unit = RicesSelector(items), torch.nn.functional.normalize(items, dim=-1)
    indexes = {mu: HyperbolicDemoIndex(items, mu=mu, backend="torch") for mu in (0.3,)}
    try:
        import faiss

        faiss.omp_set_num_threads(1)
        flat = faiss.IndexFlatIP(dim)
        flat.add(unit.numpy())
        through_faiss = HyperbolicDemoIndex(items, mu=0.3, backend="faiss")
        by_default = HyperbolicDemoIndex(items, mu=0.3)
    except ImportError:
        flat = None
    for mu, index in indexes.items():
        check(items, queries[:2], index)
        for batch in (1, 8, 64):
            query = queries[:batch]

            def ours(query=query, index=index):
                return index.search(query, 8)

            def sort(query=query):
                return (query @ unit.mT).argsort(dim=-1, descending=True)[:, :8]

            def topk(query=query):
                return rices.search(query, 8)

            def faiss_flat(query=query):
                return flat.search(query.numpy(), 128)

            def ours_faiss(query=query):
                return through_faiss.search(query, 8)

            def ours_by_default(query=query):
                return by_default.search(query, 8)

            # The default takes faiss for one query, torch for more: a row of its own only where it differs from torch.
            with_faiss = [] if flat is None else [faiss_flat, ours_faiss, *([ours_by_default] if batch == 1 else [])]
            steps = [ours, topk, *with_faiss, *([sort] if batch <= 8 else [])]
            spent = dict(zip(steps, bench.times(*steps), strict=True))
            where = f"{setting}, B {batch}, mu {mu}"
            mean = float(ours().num_candidates.double().mean())
            peer = spent.get(faiss_flat)
            bench.add("top-8 certified against faiss FlatIP k 128", where, spent[ours], peer, target="ratio <= 1.3")
            bench.add(
                "top-8 certified, backend faiss, against faiss FlatIP k 128", where, spent.get(ours_faiss), peer,
                target="ratio <= 1.3",
            )  # fmt: skip
            if ours_by_default in spent:
                bench.add(
                    "top-8 certified, by default, against faiss FlatIP k 128", where, spent[ours_by_default], peer,
                    target="ratio <= 1.3",
                )  # fmt: skip
            bench.add("top-8 certified against torch cosine topk", where, spent[ours], spent[topk])
            if sort in spent:
                bench.add("top-8 certified against full argsort (RICES)", where, spent[ours], spent[sort])
            bench.add("candidates scored in fp64", where, mean, unit="")
    bench.write(args.json)


if __name__ == "__main__":
    main()
