"""Do trees fit better in hyperbolic space? Embed them in the hyperbolic, the Euclidean and the spherical space.

    python docs/hyper-geom/does_it_pay.py --trees FOLDER [--write]

FOLDER holds the taxonomies as JSON files with `nodes` of `id` and `parent`. Writes does-it-pay.json, does-it-pay.svg and
the tables of does-it-pay.md.

All three spaces minimise the same loss, the mean of (d/(s d_tree) - 1)^2 over all pairs, by 200 steps of Adam in fp64. Each
may choose one setting of two by that loss: the length of an edge in hyperbolic space (`embed_tree`, 1 or 2), the step size
in the others (.02 or .1), which start from classical multidimensional scaling; the sphere learns its radius too.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch

from hyper_geom import embed_tree, lorentz, trees

HERE = Path(__file__).parent
SPACES, DIMS, SEEDS, NODES, STEPS = ("hyperbolic", "Euclidean", "spherical"), (2, 3, 5, 10), 5, 100, 200
MARKERS = "<!-- measured -->", "<!-- /measured -->"
T_95 = 2.776  # of Student's t with 4 degrees of freedom


def binary(depth):
    return torch.tensor([[(child - 1) // 2, child] for child in range(1, 2 ** (depth + 1) - 1)])


def wordnet_like(num, seed):
    """A node hangs under an earlier one with odds 1 + its number of children: few wide nodes, long chains beside them."""
    generator = torch.Generator().manual_seed(seed)
    weight, edges = torch.ones(num), []
    for child in range(1, num):
        parent = int(torch.multinomial(weight[:child], 1, generator=generator))
        weight[parent] += 1
        edges.append([parent, child])
    return torch.tensor(edges)


def top_of(path, num):
    """The first `num` nodes of a stored taxonomy in breadth-first order."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    children, order = {}, []
    for node in nodes:
        if node["parent"] is None:
            order.append(node["id"])
        else:
            children.setdefault(node["parent"], []).append(node["id"])
    for node in order:
        if len(order) < num:
            order += children.get(node, [])
    number = {node: i for i, node in enumerate(order[:num])}
    parent = {node["id"]: node["parent"] for node in nodes}
    return torch.tensor([[number[parent[node]], i] for node, i in number.items() if i])


def scaled_start(target, dim, generator):
    """Classical multidimensional scaling, with a twentieth of an edge of noise."""
    num = len(target)
    centre = torch.eye(num, dtype=torch.float64) - 1 / num
    values, vectors = torch.linalg.eigh(-0.5 * centre @ target.square() @ centre)
    start = vectors[:, -dim:] * values[-dim:].clamp(min=0).sqrt()
    return start + 0.05 * torch.randn(start.shape, dtype=torch.float64, generator=generator)


def sphere(tangent, radius):
    """Exponential map at a pole."""
    length = tangent.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return radius * torch.cat(((length / radius).cos(), tangent / length * (length / radius).sin()), dim=-1)


def flat_or_round(target, dim, space, rate, generator):
    """All distances after the optimisation, and the loss."""
    start = scaled_start(target, dim, generator).requires_grad_()
    log_radius = torch.tensor(math.log(target.max().item() / 2), dtype=torch.float64, requires_grad=True)
    rows, columns = torch.triu_indices(len(target), len(target), offset=1)
    optimizer = torch.optim.Adam([start, log_radius], lr=rate)

    def distance(i, j):
        if space == "Euclidean":
            return (start[i] - start[j]).norm(dim=-1)
        radius = log_radius.exp()
        x = sphere(start, radius)
        return 2 * radius * ((x[i] - x[j]).norm(dim=-1) / (2 * radius)).clamp(max=1 - 1e-12).asin()

    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / STEPS)) / 2
        loss = (distance(rows, columns) / target[rows, columns] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = torch.zeros_like(target)
        found[rows, columns] = distance(rows, columns)
        return found + found.mT


def run(edges, dim, space, seed):
    num = len(edges) + 1
    target = trees.graph_distances(edges, num).double()
    pairs = tuple(torch.triu_indices(num, num, offset=1))
    tries = []
    for setting in (1.0, 2.0) if space == "hyperbolic" else (0.02, 0.1):
        generator = torch.Generator().manual_seed(seed)
        if space == "hyperbolic":
            x = embed_tree(edges, num, dim, edge_length=setting, num_steps=STEPS, generator=generator)
            found = lorentz.dist(x.unsqueeze(1), x) / setting
        else:
            found = flat_or_round(target, dim, space, setting, generator)
        tries.append((((found[pairs] / target[pairs] - 1).square().mean()).item(), found))
    found = min(tries, key=lambda one: one[0])[1]
    return {"map": trees.reconstruction_map(found, edges), "distortion": trees.distortion(found, target)[0]}


def limits():
    """A binary tree of depth 7 laid out by `embed_tree` without optimisation, its points stored in fp64 and in fp32."""
    edges, rows = binary(7), []
    target = trees.graph_distances(edges, len(edges) + 1).double()
    for length in (1.0, 2.0, 3.0, 4.0, 5.0):
        x = embed_tree(edges, len(edges) + 1, 2, edge_length=length, num_steps=0)
        row = {"edge_length": length, "radius": lorentz.dist0(x).max().item()}
        for name, points in (("fp64", x), ("fp32", x.float())):
            found = lorentz.dist(points.unsqueeze(1), points).double()
            row[name] = {
                "map": trees.reconstruction_map(found, edges),
                "distortion": trees.distortion(found, target)[0],
            }
        rows.append(row)
    return rows


def cell(rows, key):
    values = [row[key] for row in rows]
    spread = T_95 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), spread


def shown(rows, key):
    mean, spread = cell(rows, key)
    return f"{mean:.2f}" + (f" +- {spread:.2f}" if spread >= 0.005 else "")


def tables(record):
    names = list(dict.fromkeys(row["tree"] for row in record["rows"]))

    def of(tree, dim, space):
        return [r for r in record["rows"] if (r["tree"], r["dim"], r["space"]) == (tree, dim, space)]

    head = ["tree", *(f"mAP, {s}" for s in SPACES), *(f"distortion, {s}" for s in SPACES)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        cells = [shown(of(name, 2, s), key) for key in ("map", "distortion") for s in SPACES]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    limit = [
        "| edge length | largest k dist0 | mAP, fp64 | mAP, fp32 | distortion, fp64 | distortion, fp32 |",
        "|---" * 6 + "|",
    ]
    for row in record["limits"]:
        cells = [f"{row[d][key]:.3f}" for key in ("map", "distortion") for d in ("fp64", "fp32")]
        limit.append(f"| {row['edge_length']:g} | {row['radius']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines), "\n".join(limit)


def plot(record):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["tree"] for row in record["rows"]))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(axes, ("map", "distortion"), ("reconstruction mAP", "distortion"), strict=True):
        for space, colour in zip(SPACES, ("C0", "C1", "C2"), strict=True):
            for name in names:
                means = [
                    statistics.mean(
                        [r[key] for r in record["rows"] if (r["tree"], r["dim"], r["space"]) == (name, dim, space)]
                    )
                    for dim in DIMS
                ]
                axis.plot(DIMS, means, color=colour, alpha=0.7, marker=".", label=space if name == names[0] else None)
        axis.set(xlabel="dimension", title=f"{title}, one line a tree", xticks=DIMS)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(HERE / "does-it-pay.svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=Path, required=True, help="folder of taxonomies")
    parser.add_argument("--write", action="store_true", help="write the page's table, figure and JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    stored = {path.stem: top_of(path, NODES) for path in sorted(args.trees.glob("*.json"))}
    named = {"binary, depth 5": binary(5), "WordNet-like": None, **stored}
    rows = []
    for name, edges in named.items():
        for seed in range(SEEDS):
            tree = wordnet_like(NODES, seed) if edges is None else edges
            rows += [
                {
                    "tree": name,
                    "nodes": len(tree) + 1,
                    "dim": dim,
                    "space": space,
                    "seed": seed,
                    **run(tree, dim, space, seed),
                }
                for dim in DIMS
                for space in SPACES
            ]
        print(name, [shown([r for r in rows if r["tree"] == name and r["dim"] == 2 and r["space"] == s], "map") for s in SPACES],
              f"{time.process_time() - start:.0f} s", flush=True)  # fmt: skip
    record = {"rows": rows, "limits": limits(), "cpu_seconds": round(time.process_time() - start)}
    if args.write:
        (HERE / "does-it-pay.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot(record)
        page = HERE / "does-it-pay.md"
        text = page.read_text(encoding="utf-8")
        for table in tables(record):
            before, _, rest = text.partition(MARKERS[0] + "\n|")
            text = f"{before}<!-- filled -->\n{table}\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}"
        page.write_text(text.replace("<!-- filled -->", MARKERS[0]), encoding="utf-8")
    print(*tables(record), sep="\n\n")


if __name__ == "__main__":
    main()
