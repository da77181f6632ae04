"""Hours and memory of the ImageNet cells of `hier train mat-clip` on one card: computed, not measured.

    python docs/mat-align/cost.py TREES/imagenet.json [--tflops 60]

Operations of one step are counted on fake tensors: ViT-B/16 at 224 px, batch 2, the mean number of labels that a step encodes on
this tree, in chunks of 64. Hours are operations over the rate that a card sustains, which is an assumption: 60 TFLOP/s is a fifth
of the 312 that an A100 is sold with in bf16. Memory is that of all storages
alive at once where a step encodes every label, counted as `bench_memory.py` does, the weights included.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from app_data.sets.cifar100 import StoredTree, read_stored_tree
from app_train.recipes.mat.published import SHOTS, published
from app_train.recipes.mat.rows import VARIANTS, Row
from app_train.recipes.mat.tune import build_model
from hier_losses.treecuts import sample_cut
from mat_align import MATObjective

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "mat-align" / "benchmarks"))
from bench_memory import Storages, faked

CHUNK, TEST, TEMPLATES = 64, 50_000, 60


def labels_of_a_step(stored: StoredTree, batch: int, draws: int = 200) -> float:
    """Mean number of labels that a step encodes: those of a random cut, and of the children on two random paths."""
    objective, generator = MATObjective(stored.taxonomy), torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        cut = sample_cut(stored.taxonomy, 0.1, generator)
        target = stored.taxonomy.leaf[torch.randint(len(stored.taxonomy.leaf), (batch,), generator=generator)]
        found.append(len(objective.nodes_in_use(target, cut)))
    return float(np.mean(found))


def tera(work) -> float:
    """TFLOP of some work: 2 for each multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--tflops", type=float, default=60.0, help="what the card sustains")
    args = parser.parse_args()
    import open_clip

    stored = read_stored_tree(args.tree)
    batch = published("imagenet", 16, "maple").batch_size
    used = labels_of_a_step(stored, batch)
    texts = list(stored.node_text)
    print(
        f"{len(texts):,} nodes, of which a step encodes {used:,.0f}; batch {batch}; {args.tflops:g} TFLOP/s sustained\n"
    )
    print(
        "| base | shots | steps | TFLOP a step | training, hours | scoring, hours | a cell, hours | MiB, fp32 | MiB, bf16 |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for base in ("maple", "promptsrc"):
        clip = open_clip.create_model("ViT-B-16-quickgelu")
        model = build_model(published("imagenet", 16, base), clip, Row(VARIANTS["HETEROGENEOUS"]), chunk_size=CHUNK)
        model.tokens_of(texts)
        chosen = sorted(texts, key=lambda text: -len(model.tokens_of([text])[0]))[:1] + texts[: round(used) - 1]
        mode, storages = FakeTensorMode(), Storages()
        faked(model, mode, storages)
        with mode:
            images = torch.randn(batch, 3, 224, 224)

            def step(names: list[str], half: bool = False, model=model, images=images, base=base) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    out = model(images, names)
                    frozen = model.frozen_image(images) if base == "promptsrc" else None
                out.logits.sum().backward()
                model.zero_grad(set_to_none=True)
                del frozen

            each, mib = tera(partial(step, chosen)), []
            for half in (False, True):
                storages.peak = storages.held
                with storages:
                    step(texts, half)
                mib.append(f"{storages.peak / 2**20:,.0f}")
            with torch.no_grad():
                score = tera(lambda model=model: model.encode_image(torch.randn(64, 3, 224, 224))) * TEST / 64
                text = tera(lambda model=model: model.encode_text(texts))
        once = TEMPLATES * text if base == "promptsrc" else 0.0
        for shots in SHOTS:
            settings = published("imagenet", shots, base)
            steps = settings.epochs * -(-1000 * shots // settings.batch_size)
            hours = [(steps * each + once) / args.tflops / 3600, (score + text) / args.tflops / 3600]
            print(
                f"| {base} | {shots} | {steps:,} | {each:.1f} | {hours[0]:.1f} | {hours[1]:.2f} | {sum(hours):.1f} | {mib[0]} | {mib[1]} |"
            )


if __name__ == "__main__":
    sys.exit(main())
