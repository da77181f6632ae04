"""A training step with one encoding of each picture beside one encoding per internal node; layer tokens beside plain CLIP.

    python tools/bench.py packages/mat-align/benchmarks/bench_model.py --json OUT.json [--tree TREE.json] [--quick]

A random open_clip ViT-B-16 and the CIFAR-100 tree of ProTeCt if it is given, else a drawn tree of a like shape. The peer
encodes pictures and labels again for the cut and for every internal node on a path, as the released code does.
"""

import open_clip
import torch
from bench import Bench, arguments, header
from torch.nn import functional as F

from hier_losses import Taxonomy
from hier_losses.treecuts import sample_cut
from mat_align import EUCLIDEAN, LayerTokens, MaPLePrompts, MATModel, MATObjective


def per_node_loop(
    model: MATModel, tax: Taxonomy, images: torch.Tensor, target: torch.Tensor, generator
) -> torch.Tensor:
    cut = sample_cut(tax, 0.1, generator)
    z = model(images, [tax.names[v] for v in cut.nodes.tolist()]).logits
    loss, by_node = F.cross_entropy(z, cut.member[target]), {}
    for b, leaf in enumerate(target.tolist()):
        chain = [v for v in tax.paths[leaf].tolist() if v >= 0]
        for parent, child in zip([-1, *chain], chain, strict=False):
            by_node.setdefault(parent, []).append((b, child))
    for parent, rows in by_node.items():
        first, size = int(tax.group_start[parent + 1]), int(tax.group_size[parent + 1])
        z = model(images[[b for b, _ in rows]], tax.names[first : first + size]).logits
        loss = loss + 0.5 * F.cross_entropy(z, torch.tensor([child - first for _, child in rows])) / len(by_node)
    return loss


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tree", help="JSON node list")
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model; ViT-B-16 is the published one")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(0)  # steps of minutes: one run each, in turns
    header()
    name, batch = ("ViT-S-32-alt", 1) if args.quick else (args.model, args.batch)
    tax = Taxonomy.from_json(args.tree) if args.tree else Taxonomy.synthetic((2, 6, 14, 40, 100), seed=0)
    clip = open_clip.create_model(name).eval()
    model = MATModel(clip, MaPLePrompts(clip), EUCLIDEAN)
    images = torch.randn(batch, 3, *clip.visual.image_size)
    target = tax.leaf[torch.randperm(tax.num_leaves)[:batch]]
    objective = MATObjective(tax)
    encodings = {"ours": 0, "peer": 0}
    running = "ours"
    clip.visual.conv1.register_forward_hook(
        lambda module, inputs, out: encodings.__setitem__(running, encodings[running] + len(out))
    )

    def ours():
        nonlocal running
        running = "ours"
        objective(model, images, target, torch.Generator().manual_seed(0)).total.backward()

    def peer():
        nonlocal running
        running = "peer"
        per_node_loop(model, tax, images, target, torch.Generator().manual_seed(0)).backward()

    setting = f"{name}, batch {batch}, {tax.num_nodes} nodes"
    times = bench.times(ours, peer)
    bench.add("picture encodings a step", setting, *encodings.values(), "", f"ours = {batch}")
    bench.add("step, one pass against per-node loop", setting, *times, "ms", "ratio <= .4")
    tokens = LayerTokens(clip.visual)
    bench.repeats = 3
    with torch.no_grad():
        times = bench.times(lambda: tokens(images), lambda: clip.encode_image(images))
    bench.add("layer tokens against CLIP features", f"{name}, batch {batch}", *times, "ms", "ratio <= 1.05")
    bench.write(args.json)


if __name__ == "__main__":
    main()
