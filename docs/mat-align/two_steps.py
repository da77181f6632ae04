"""Two steps of `hier train mat-clip` on ViT-B/16 at 224 px with random weights, for each of the paper's data sets in miniature.

    python docs/mat-align/two_steps.py TREES [--data sun397 imagenet] [--options="--chunk-size 64"]

TREES holds cifar100.json, sun.json, imagenet.json and rarespecies.json, ProTeCt's trees in full: every label is encoded as in a real
run. The pictures are noise, one for each of so many classes that two batches of the published size come about. Printed are seconds
of a step, seconds of the whole command, and the peak of resident memory. Weights are random: scores mean nothing.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from app_data.sets.tree_sets import imagenet_leaves
from app_train.recipes.mat.published import DATA, published

FILES = {
    "cifar100": "cifar100.json",
    "sun397": "sun.json",
    "imagenet": "imagenet.json",
    "rare-species": "rarespecies.json",
}
# The command in a process of its own, which tells the time of each step and the peak of its memory.
PROGRAM = """
import resource, sys, time
import app_train.core.fit as loop
from app_train.cli import main

take, seconds = loop._Loop.take, []

def timed(*args):
    start = time.perf_counter()
    found = take(*args)
    seconds.append(f"{time.perf_counter() - start:.1f}")
    return found

loop._Loop.take = timed
status = main(sys.argv[1:])
print("MEASURED", ", ".join(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, sep=";")
raise SystemExit(status)
"""


def picture(path: Path, draw: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)


def miniature(data: str, root: Path, leaves: list[str]) -> None:
    """One picture to train on and one to test on of each leaf, in the form in which the data set is released."""
    draw = np.random.default_rng(0)
    if data == "rare-species":
        with (root / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "kingdom", "phylum", "class", "order", "family", "genus", "species"])
            for leaf in leaves:
                ranks = leaf.split("_", 5)
                for number in range(5):  # a fifth is tested on
                    picture(root / leaf / f"{number}.png", draw)
                    writer.writerow([f"{leaf}/{number}.png", "animalia", *ranks])
        return
    wnids = {name: wnid for wnid, name in imagenet_leaves().items()} if data == "imagenet" else {}
    lines = {"train": [], "test": []}
    for leaf in leaves:
        for part in lines:
            folder = {
                "cifar100": f"{part}/{leaf}",
                "sun397": f"{leaf[0]}/{leaf}",
                "imagenet": f"{'val' if part == 'test' else part}/{wnids.get(leaf)}",
            }[data]
            picture(root / folder / f"{part}.png", draw)
            lines[part].append(f"/{folder}/{part}.png")
    if data == "sun397":
        for part, name in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
            (root / name).write_text("\n".join(lines[part]))


def random_clip(folder: Path) -> str:
    """A folder that open_clip loads, ViT-B/16 at 224 px with the activation of OpenAI's weights."""
    name = "ViT-B-16-quickgelu"
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    folder.mkdir()
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--options", default="", help="further options of mat-clip")
    args = parser.parse_args()
    print(
        "| data | nodes | batch | seconds of a step | of the command | peak of memory, MiB |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        model = random_clip(Path(place) / "clip")
        for data in args.data:
            content = json.loads((args.trees / FILES[data]).read_text(encoding="utf-8"))
            by_id = {node["id"]: node["name"] for node in content["nodes"]}
            names = [by_id[leaf] for leaf in content["leaves"]]
            if data == "imagenet":
                names = [name for name in imagenet_leaves().values() if name in names]
            batch = published(data, 1, "maple").batch_size
            root = Path(place) / data
            root.mkdir()
            miniature(data, root, names[: 2 * batch])
            words = [
                "mat-clip",
                "--data",
                data,
                "--source",
                str(root),
                "--tree",
                str(args.trees),
                "--model",
                model,
                "--shots",
                "1",
            ]
            words += [
                "--rows",
                "HETEROGENEOUS",
                "--fit.epochs",
                "1",
                "--no-tensorboard",
                "--cache-dir",
                f"{place}/cache",
            ]
            words += ["--out", f"{place}/{data}-run", *args.options.split()]
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            seconds = time.perf_counter() - start
            _, steps, peak = done.stdout.strip().rsplit("\n", 1)[1].split(";")
            assert steps.count(",") == 1, steps
            print(f"| {data} | {len(by_id) - 1:,} | {batch} | {steps} | {seconds:.0f} | {int(peak):,} |", flush=True)


if __name__ == "__main__":
    main()
