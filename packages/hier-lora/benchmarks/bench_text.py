"""Memory and time of one training step on the prompts of N nodes, for each text mode, side by side in one run.

    python packages/hier-lora/benchmarks/bench_text.py --json docs/benchmarks/hier-lora-text.json

The text tower is CLIP's architecture with random weights (memory and time do not depend on them), smaller with --quick.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import zlib
from pathlib import Path

NODES = (372, 4000, 16000)
MODES = ("live", "chunked", "sampled")
# Above this, live needs more than 40 GB at full size; it is listed as not run.
LIVE_LIMIT = 4000


def tokens_of(texts, length):
    """Stand-in for a tokenizer: one token a character group, padded to the longest."""
    import torch

    ids = [
        [1 + zlib.crc32(text[i : i + 4].encode()) % 400 for i in range(0, len(text), 4)][: length - 2] for text in texts
    ]
    longest = max(map(len, ids)) + 2
    return torch.tensor([[401, *row, 402, *[402] * (longest - 2 - len(row))] for row in ids])


def measure(mode: str, num_nodes: int, width: int, layers: int) -> dict:
    """One step in a process of its own: the growth of the peak of resident memory, and the time."""
    import torch
    from torch import nn
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from hier_lora import HierLoraCLIP, lora_config
    from hier_losses import HierarchyAwareLoss, Taxonomy

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=403, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), projection_dim=width, eos_token_id=402, bos_token_id=401, pad_token_id=402,
    )  # fmt: skip

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = CLIPTextModelWithProjection(config)
            self.logit_scale = nn.Parameter(torch.tensor(4.6))
            self.lora_targets = {"vision": "none", "text": r"text\..*\.(q_proj|v_proj)"}
            self.tower_modules, self.modules_to_save, self.locator = {"vision": [], "text": ["text."]}, [], "bench:"

        def encode_text(self, texts):
            return self.text(input_ids=tokens_of(texts, 77)).text_embeds

    tax = Taxonomy.synthetic(
        (max(2, num_nodes // 200), num_nodes // 20, num_nodes - num_nodes // 20 - max(2, num_nodes // 200))
    )
    base = Text()
    model = HierLoraCLIP(base, tax, lora_config(base, towers="text", r=16), mode).train()
    features = nn.functional.normalize(torch.randn(64, width), dim=-1)
    target = tax.leaf[torch.randint(tax.num_leaves, (64,))]
    loss = HierarchyAwareLoss(tax)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss(model.score(features, target), target).backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"mode": mode, "nodes": tax.num_nodes, "mib": round(peak / 1024), "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small tower and few nodes")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        mode, nodes, width, layers = args.one
        print(json.dumps(measure(mode, int(nodes), int(width), int(layers))))
        return
    width, layers, sizes = (64, 2, (372, 4000)) if args.quick else (512, 12, NODES)
    rows = []
    for nodes in sizes:
        for mode in MODES:
            if mode == "live" and nodes > LIVE_LIMIT:
                rows.append({"mode": mode, "nodes": nodes, "mib": None, "seconds": None})
                continue
            command = [sys.executable, __file__, "--one", mode, str(nodes), str(width), str(layers)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(rows[-1], flush=True)
    if args.json:
        content = {"width": width, "layers": layers, "batch": 64, "lora_rank": 16, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
