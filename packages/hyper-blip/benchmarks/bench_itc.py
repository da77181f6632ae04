"""What the contrastive loss costs with and without Random Query Selection: bytes between ranks, counted, and peak memory.

    python tools/bench.py packages/hyper-blip/benchmarks/bench_itc.py --json OUT.json [--quick]

Bytes are counted in two gloo processes by wrapping every collective: what each rank hands to others, for each picture it
holds. Peak memory is that of one forward and backward at B=256, Q=32, d=256.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench import Bench, arguments

from hyper_blip import HyperbolicConfig, image_text_contrastive_loss

Q, D, TOKENS = 32, 256, 32
WORKER = """
import json, sys, torch, warnings
import torch.distributed as dist
warnings.simplefilter("ignore")
rank, folder, num, patches, width = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
from hyper_blip import HyperbolicConfig, image_text_contrastive_loss
from hyper_blip.gather import fetch_rows, gather_rows
count = {"bytes": 0}
gather, exchange = dist.all_gather, dist.all_to_all_single
def counted_gather(parts, x, *args, **kwargs):
    count["bytes"] += x.nbytes
    return gather(parts, x, *args, **kwargs)
def counted_exchange(out, x, receive, send, *args, **kwargs):
    rows = sum(n for r, n in enumerate(send) if r != rank)
    count["bytes"] += rows * x[:1].nbytes if x.shape[0] else 0
    return exchange(out, x, receive, send, *args, **kwargs)
dist.all_gather, dist.all_to_all_single = counted_gather, counted_exchange
def measure(function):
    count["bytes"] = 0
    function()
    return count["bytes"] / num
torch.manual_seed(rank)
image, text = torch.randn(num, 32, 256), torch.randn(num, 256)
found = {}
config = HyperbolicConfig.paper()
with torch.no_grad():
    found["max"] = measure(lambda: image_text_contrastive_loss(image, text, config, 0.07))
    found["rqs"] = measure(lambda: image_text_contrastive_loss(image[:, 0], text, config, 0.07))
    patches_ = torch.zeros(num, patches, width)
    wanted = torch.randint(2 * num, (num,))
    found["gather_patches"] = measure(lambda: gather_rows(patches_, False))
    found["fetch_patches"] = measure(lambda: fetch_rows(patches_, wanted))
    found["foreign"] = int((wanted // num != rank).sum())
open(f"{folder}/out{rank}.json", "w").write(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


def two_processes(num: int, patches: int, width: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        args = [folder, str(num), str(patches), str(width)]
        workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *args], env=env) for rank in range(2)]
        assert [worker.wait(timeout=900) for worker in workers] == [0, 0]
        return [json.loads(Path(folder, f"out{rank}.json").read_text()) for rank in range(2)]


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    bench = Bench(1)
    num, patches, width = (4, 5, 8) if args.quick else (16, 257, 1408)
    ranks = two_processes(num, patches, width)
    mean = {name: sum(rank[name] for rank in ranks) / 2 for name in ranks[0]}
    bench.add(
        "ITC gather a picture and text: RQS / all queries",
        f"Q={Q}, d={D}, fp32, 2 ranks",
        mean["rqs"],
        mean["max"],
        "bytes",
        "2048 / 33792 = 1/16.5",
    )
    image = 4 * D
    bench.add(
        "image part of it", f"Q={Q}, d={D}, fp32, 2 ranks", mean["rqs"] - image, mean["max"] - image, "bytes", "1/32"
    )
    setting = f"{patches}x{width} fp32, 2 ranks, {ranks[0]['foreign']}+{ranks[1]['foreign']} of {2 * num} rows foreign"
    bench.add(
        "ITM pictures: chosen ones / all-gather",
        setting,
        mean["fetch_patches"],
        mean["gather_patches"],
        "bytes",
        "ratio <= 2/W = 1",
    )

    batch = 32 if args.quick else 256
    text = torch.randn(batch, D, requires_grad=True)
    every = torch.randn(batch, Q, D, requires_grad=True)
    one = torch.randn(batch, D, requires_grad=True)

    def step(images: torch.Tensor, similarity: str):
        config = HyperbolicConfig(similarity=similarity)

        def run():
            images.grad = text.grad = None
            image_text_contrastive_loss(images, text, config, 0.07)[0].backward()

        return run

    for device in ("cpu", "cuda"):
        for similarity in ("cosine", "distance"):
            setting = f"B={batch}, Q={Q}, d={D}, {similarity}"
            if device == "cuda":
                bench.add("ITC peak memory: RQS / all queries", setting, None, None, "MiB", "ratio <= 1/16", device)
                continue
            step(one, similarity)()
            step(every, similarity)()
            mine, theirs = bench.peak(step(one, similarity)), bench.peak(step(every, similarity))
            bench.add("ITC peak memory: RQS / all queries", setting, mine, theirs, "MiB", "ratio <= 1/16", device)
    bench.write(args.json)


if __name__ == "__main__":
    main()
