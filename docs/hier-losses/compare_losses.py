"""Compare the losses on a real tree: a linear head on frozen Lite0 features of emoji, tested on an artist never seen.

    python docs/hier-losses/compare_losses.py --work FOLDER

Writes which-loss.json and the tables of which-loss.md; about four minutes on one free core. Features and finished losses
are kept in FOLDER, so that a run that was stopped goes on where it was.

Every loss gets the same head, data order, dropout, optimizer and number of epochs. Its learning rate, and nothing else, is
chosen from three: trained on one artist, scored on another of the training artists. Losses over leaves give node scores by
summing leaf probabilities. Differences are paired over pictures and seeds.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from app_data.sets.emoji import load_emoji
from app_data.weights.dual_encoder import load
from app_eval.measure.embed import run_batches
from app_eval.measure.paths import TITLES, mean_over_seeds, paired_difference, resamples
from hier_losses import Taxonomy, functional
from hier_losses.decoding import bottom_up, joint_path, level_argmax
from hier_losses.functional import lca_height
from hier_losses.metrics import average_hierarchical_distance
from hier_losses.path_ops import extend_paths
from hier_losses.probabilities import leaf_to_node_logits

HERE = Path(__file__).parent
EPOCHS, BATCH, DROPOUT, WIDTH, SEEDS = 15, 128, 0.5, 256, 3
RATES = (5e-4, 2e-3, 8e-3)


def leaf_ce(z, y, tax):
    return F.cross_entropy(z[:, tax.leaf], tax.leaf_index[y])


LOSSES = {
    "leaf CE": (leaf_ce, True),
    "HXE (discount .1)": (lambda z, y, tax: functional.hxe(z[:, tax.leaf], y, tax), True),
    "HXE (discount .5)": (lambda z, y, tax: functional.hxe(z[:, tax.leaf], y, tax, discount=0.5), True),
    "soft labels (beta 10)": (lambda z, y, tax: functional.soft_label_ce(z[:, tax.leaf], y, tax), True),
    "level CE": (functional.level_cross_entropy, False),
    "TP-KL": (functional.tp_kl, False),
    "HiSCE": (functional.hisce, False),
    "TP-KL + HiSCE": (functional.hierarchy_aware_loss, False),
    "TP-KL + HiSCE + consistency": (
        lambda z, y, tax: functional.hierarchy_aware_loss(z, y, tax, consistency_weight=1.0),
        False,
    ),
    "level CE + consistency": (
        lambda z, y, tax: functional.hierarchy_aware_loss(
            z, y, tax, alpha=0.0, lam=0.0, ce_weight=1.0, consistency_weight=1.0
        ),
        False,
    ),
    "conditional softmax": (functional.conditional_softmax_nll, False),
}
DECODERS = {
    "bottom_up": (bottom_up, ("leaf", "severity", "ahd")),
    "joint_path": (joint_path, ("leaf", "ahd")),
    "level_argmax": (level_argmax, ("fpa", "tice")),
}
KEYS = [f"{kind} {decoder}" for decoder, (_, kinds) in DECODERS.items() for kind in kinds]


def train(loss, features, target, tax: Taxonomy, rate: float, seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    head = torch.nn.Linear(features.shape[1], tax.num_nodes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, epochs=EPOCHS, steps_per_epoch=-(-len(target) // BATCH)
    )
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(target)).split(BATCH):
            optimizer.zero_grad()
            loss(head(F.dropout(features[rows], DROPOUT)), target[rows], tax).backward()
            optimizer.step()
            schedule.step()
    return head


def node_scores(name: str, logits: torch.Tensor, tax: Taxonomy) -> torch.Tensor:
    """Scores of all nodes whose softmax over a level is what the loss trained."""
    if LOSSES[name][1]:
        return leaf_to_node_logits(logits[:, tax.leaf], tax)
    if name == "conditional softmax":
        # The product of the conditional probabilities down the path.
        return functional.ancestor_sum(functional.conditional_log_softmax(logits, tax), tax)
    return logits


def per_picture(paths, target, tax: Taxonomy) -> dict:
    """Numerator and denominator of every score for each picture; all leaves of this tree lie on the last level."""
    paths = extend_paths(paths, tax)
    wrong = paths[:, -1] != target
    distance = lca_height(paths[:, -1], target, tax)
    crossed = (tax.parent[paths[:, 1:]] != paths[:, :-1]).any(1)
    one = np.ones(len(target))
    found = {"leaf": ~wrong, "ahd": distance, "fpa": (paths == tax.paths[target]).all(1), "tice": crossed}
    pairs = {name: (value.double().numpy(), one) for name, value in found.items()}
    return {**pairs, "severity": (distance.double().numpy(), wrong.double().numpy())}


def embed(work: Path, train_set, test_set) -> tuple[torch.Tensor, torch.Tensor]:
    file = work / "features.npz"
    if not file.exists():
        base = load("lite0-minilm")
        sets = {"train": train_set, "test": test_set}
        found = {n: run_batches(d, lambda x: base.vision(base.preprocess(x)), n).numpy() for n, d in sets.items()}
        np.savez(file, **found)
    with np.load(file) as kept:
        return torch.from_numpy(kept["train"]), torch.from_numpy(kept["test"])


def reduced(train_features, test_features):
    """Both sets on the main axes of the training set, each centred on its own mean: that takes out what is common to
    all pictures of an artist. Scaled to one mean variance."""
    centred = train_features - train_features.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -WIDTH:]
    scale = (centred @ axes).std()
    return centred @ axes / scale, (test_features - test_features.mean(0)) @ axes / scale


def best_rate(name: str, x, target, held_x, held_target, tax: Taxonomy) -> float:
    """The learning rate with the least distance on one training artist after training on the other."""
    distance = {}
    for rate in RATES:
        head = train(LOSSES[name][0], x, target, tax, rate, 0)
        with torch.no_grad():
            scores = node_scores(name, head(held_x), tax)
        # The better of two decoders: joint_path favours heavy branches where one distribution gives all levels.
        decoded = (decode(scores, tax) for decode in (bottom_up, joint_path))
        distance[rate] = min(average_hierarchical_distance(p, held_target, tax).item() for p in decoded)
    return min(distance, key=distance.get)


def measure(name: str, rate: float, x, target, test_x, truth, tax: Taxonomy) -> dict:
    """For every seed, decoder and score: numerator and denominator of each picture."""
    found = {"rate": np.array(rate)}
    for seed in range(SEEDS):
        head = train(LOSSES[name][0], x, target, tax, rate, seed)
        with torch.no_grad():
            scores = node_scores(name, head(test_x), tax)
        for decoder, (decode, kinds) in DECODERS.items():
            pairs = per_picture(decode(scores, tax), truth, tax)
            found |= {f"{kind} {decoder} {seed}": np.stack(pairs[kind]) for kind in kinds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for features and finished losses")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train_set, test_set = load_emoji(("openmoji", "noto-300", "noto-700")), load_emoji(("twemoji",))
    features, test = embed(args.work, train_set, test_set)
    tax, target, truth = train_set.taxonomy, torch.from_numpy(train_set.targets), torch.from_numpy(test_set.targets)
    fit, held = (
        torch.from_numpy(np.isin(train_set.styles, names)) for names in (["noto-300", "noto-700"], ["openmoji"])
    )
    x, held_x = reduced(features[fit], features[held])
    whole, test_x = reduced(features, test)
    found = {}
    for number, name in enumerate(LOSSES):
        file = args.work / f"loss-{number}.npz"
        if not file.exists():
            rate = best_rate(name, x, target[fit], held_x, target[held], tax)
            np.savez(file, **measure(name, rate, whole, target, test_x, truth, tax))
            print(name, flush=True)
        with np.load(file) as kept:
            found[name] = dict(kept)
    counts = resamples(len(test))

    def pairs(name, key):
        return [tuple(found[name][f"{key} {seed}"]) for seed in range(SEEDS)]

    rows = []
    for name in LOSSES:
        row = {"loss": name, "learning rate": float(found[name]["rate"])}
        for key in KEYS:
            value = mean_over_seeds(pairs(name, key), counts)
            gap = paired_difference(pairs(name, key), pairs("leaf CE", key), counts)
            row[key] = {"value": value.as_json(), "difference": gap.as_json()}
        rows.append(row)
    settings = {
        "epochs": EPOCHS,
        "batch": BATCH,
        "dropout": DROPOUT,
        "dimensions": WIDTH,
        "seeds": SEEDS,
        "n": len(test),
    }
    (HERE / "which-loss.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    page = HERE / "which-loss.md"
    text = re.sub(
        r"(<!-- table -->\n).*?(<!-- /table -->)",
        lambda m: m[1] + table(rows) + "\n" + m[2],
        page.read_text(encoding="utf-8"),
        flags=re.S,
    )
    page.write_text(text, encoding="utf-8")


def table(rows: list[dict]) -> str:
    heads = [f"{TITLES[key.split()[0]]}, `{key.split()[1]}`" for key in KEYS]
    lines = ["| loss | rate | " + " | ".join(heads) + " |", "|---" * (len(KEYS) + 2) + "|"]
    for row in rows:
        cells = []
        for key in KEYS:
            (value, _, _), (gap, low, high) = row[key]["value"], row[key]["difference"]
            mark = "" if row["loss"] == "leaf CE" or np.isnan(gap) or low <= 0 <= high else f" ({gap:+.3f})"
            cells.append(f"{value:.3f}{mark}")
        lines.append(f"| {row['loss']} | {row['learning rate']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
