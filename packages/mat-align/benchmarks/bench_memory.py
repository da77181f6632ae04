"""Peak memory of a training step by number of labels: counted on fake tensors, and measured where that fits.

    python tools/bench.py packages/mat-align/benchmarks/bench_memory.py --json OUT.json [--quick]

A random open_clip ViT-B-16 with MaPLe and the whole method, batch 2 (the published one for ImageNet), every label encoded
in every step. A fake tensor has a size and no memory, so a step of 10,000 labels can be counted on any machine: the peak
is that of all storages alive at once, the frozen weights included. Real memory is that of torch's CPU allocator.
"""

import copy
import itertools
import weakref

import open_clip
import torch
from bench import MIB, Bench, arguments, header
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mat_align import HETEROGENEOUS, MaPLePrompts, MATModel


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def built(name: str) -> MATModel:
    torch.manual_seed(0)
    clip = open_clip.create_model(name)
    return MATModel(clip, MaPLePrompts(clip), HETEROGENEOUS)


def prepared(model: MATModel, names: list[str], length: int | None) -> int:
    """Tokenise outside of fake tensors, which hold no words; at this length, or that of the longest prompt, which is told."""
    with torch.no_grad():
        rows = model.backbone.text.tokenize([model.prompts.prompt(name) for name in names])
    ends = (model.backbone.text.end(rows) + 1).tolist()
    model._ids.update((name, row[:end].tolist()) for name, row, end in zip(names, rows, ends, strict=True))
    if length is not None:
        model._ids[names[0]] = rows[0, :length].tolist()
    return length or max(ends)


def step(model: MATModel, names: list[str], images: torch.Tensor, half: bool):
    """Encode, score and differentiate; the entailment of paths adds nothing that grows with the labels."""

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(images, names)
        out.logits.logsumexp(1).sum().backward()
        model.zero_grad(set_to_none=True)

    return run


def faked(model: MATModel, mode: FakeTensorMode, storages: Storages) -> None:
    """Give every weight a size and no memory."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    fake = mode.from_tensor(value)
                    held[name] = nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
                    storages.add(held[name].untyped_storage())


def counted(model: MATModel, names: list[str], batch: int, half: bool) -> float:
    """MiB of the weights and of the step at its peak."""
    model, mode, storages = copy.deepcopy(model), FakeTensorMode(), Storages()
    faked(model, mode, storages)
    with mode:
        run = step(model, names, torch.randn(batch, 3, *model.clip.visual.image_size), half)
        with storages:
            run()
    return storages.peak / MIB


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    bench = Bench(1)
    header()
    name, sizes = ("ViT-S-32-alt", (5, 20)) if args.quick else ("ViT-B-16", (100, 1367, 10_000))
    model = built(name)
    weights = sum(p.nbytes for p in model.parameters()) / MIB
    words = "great white shark", "electric ray", "toy poodle", "fire truck", "sleeping bag", "honey comb"
    names = [f"{words[i % len(words)]} {i}" for i in range(max(sizes))]
    for num, length in itertools.product(sizes, (None, 77)):
        tokens = prepared(model, names, length)
        for chunk, half in ((None, False), (64, False), (64, True)):
            model.chunk_size = chunk
            setting = f"{name}, {num:,} labels of {tokens} tokens, batch 2, "
            setting += ("whole" if chunk is None else f"chunks of {chunk}") + (", bf16" if half else "")
            real, target = None, {1367: "<= 8192 MiB", 10_000: "<= 16384 MiB"}.get(num) if chunk else None
            if num == sizes[0]:
                images = torch.randn(2, 3, *model.clip.visual.image_size)
                real = weights + bench.peak(step(model, names[:num], images, half))
            bench.add(
                "peak of a step, counted against real",
                setting,
                counted(model, names[:num], 2, half),
                real,
                "MiB",
                target,
            )
    bench.write(args.json)


if __name__ == "__main__":
    main()
