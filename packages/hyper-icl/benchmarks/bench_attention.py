"""Cost of calibration and of the logit adapter beside plain attention, and of distillation beside full maps.

    python tools/bench.py packages/hyper-icl/benchmarks/bench_attention.py --json OUT.json [--quick]

One attention layer of a Llama shape with random weights; times are of its attention function alone, on one thread, and
ratios are against plain sdpa in the same process.
"""

import torch
from bench import Bench, arguments
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention

from hyper_icl import CalibrationPlan, LogitAdapter, SegmentMap, segment_kl, segment_log_mass
from hyper_icl._attention import _augmented, _sdpa
from hyper_icl._hooks import _CALL, Call, set_hook
from hyper_icl.demonstrations._segment_bias import SegmentBias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def layer(heads: int, kv: int, dim: int) -> LlamaAttention:
    config = LlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=kv, head_dim=dim, num_hidden_layers=1
    )
    return LlamaAttention(config, 0).to(DEVICE, DTYPE).eval()


def tensors(heads: int, kv: int, dim: int, length: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, length, dim), (1, kv, length, dim), (1, kv, length, dim))
    return tuple(torch.randn(s, generator=generator).to(DEVICE, DTYPE) for s in shapes)


def segments(length: int, demos: int, query: int) -> SegmentMap:
    each = (length - query - 1) // demos
    return SegmentMap.from_lengths([length - query - demos * each], [[each] * demos], [query]).to(DEVICE)


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    args = parser.parse_args()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    heads, kv, dim = (4, 2, 16) if args.quick else (16, 4, 64)
    lengths = [64] if args.quick else args.lengths
    bench = Bench(2 if args.quick else 3)
    module = layer(heads, kv, dim)
    scaling = module.scaling
    for length in lengths:
        q, k, v = tensors(heads, kv, dim, length)
        where = f"T {length}, {heads} heads of {dim}, {kv} kv, K 8"
        parts = segments(length, 8, 16)
        bias = torch.linspace(-1, 1, 8).unsqueeze(0)
        tables = {rows: CalibrationPlan(bias.to(DEVICE), parts, rows=rows).table() for rows in ("query", "all")}
        bound = {rows: SegmentBias(table, parts, rows == "all") for rows, table in tables.items()}

        def plain(q=q, k=k, v=v):
            return sdpa_attention_forward(module, q, k, v, None, scaling=scaling)

        def hooked(name, value, function=_sdpa, q=q, k=k, v=v):
            def step(name=name, value=value):
                before = set_hook(module, name, value)
                # What the decoder would have said: the queries are the last positions.
                _CALL.set(Call(0, k.shape[2] - q.shape[2], q.shape[2]))
                try:
                    return function(module, q, k, v, None, scaling=scaling)
                finally:
                    set_hook(module, name, before)

            return step  # noqa: B023

        adapter = LogitAdapter(1, heads, dim).to(DEVICE, DTYPE)
        steps = {
            "logit adapter, query rewrite": (hooked("adapter", adapter), "ratio <= 1.05, no T x T memory"),
            "calibration, query rows (default)": (hooked("bias", bound["query"]), None),
            "calibration, query rows, augmented": (hooked("bias", bound["query"], _augmented), "ratio <= 1.3"),
            "calibration, all rows, dense bias": (hooked("bias", bound["all"]), None),
            "calibration, all rows, augmented": (hooked("bias", bound["all"], _augmented), "ratio <= 1.3"),
        }
        base, *spent = bench.times(plain, *(step for step, _ in steps.values()))
        memory = bench.peak(plain, DEVICE)
        for (name, (step, target)), time in zip(steps.items(), spent, strict=True):
            bench.add(name, where, time, base, target=target, device=DEVICE)
            bench.add(name, where, bench.peak(step, DEVICE), memory, "MiB", device=DEVICE)
        step_q = q[:, :, -1:]
        one = SegmentBias(tables["query"], segments(length - 1, 8, 16), False)
        token = hooked("bias", one, q=step_q)
        times = bench.times(lambda: plain(q=step_q), token)  # noqa: B023
        bench.add("calibration, one generated token", where, times[1], times[0], device=DEVICE)

        rows = parts.query_rows()

        def masses(q=q, k=k, parts=parts, rows=rows):
            mass = segment_log_mass(q, k, parts, rows, scaling)
            return segment_kl({0: mass}, {0: mass})

        def full(q=q, k=k, length=length):
            keys = k.repeat_interleave(heads // kv, 1)
            hidden = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)
            log_p = (scaling * q @ keys.mT).float().masked_fill(hidden, -torch.inf).log_softmax(-1)
            return (log_p.exp() * (log_p - log_p).nan_to_num()).sum(-1).mean()

        if length <= 2048 or DEVICE == "cuda":
            ours, theirs = bench.times(masses, full)
            bench.add("distillation term against full maps", f"{where}, R 16", ours, theirs, device=DEVICE)
            bench.add(
                "distillation term against full maps",
                f"{where}, R 16",
                bench.peak(masses, DEVICE),
                bench.peak(full, DEVICE),
                "MiB",
                "extra memory <= 1 %",
                DEVICE,
            )
    if DEVICE == "cpu":
        bench.add("calibration against flash and FlexAttention", "T 8192", None, target="ratio <= 1.3", device="cuda")
    bench.write(args.json)


if __name__ == "__main__":
    main()
