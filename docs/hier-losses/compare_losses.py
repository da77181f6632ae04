"""Compare the losses on a real tree: a linear head on frozen Lite0 features of emoji, tested on an artist never seen.

    python docs/hier-losses/compare_losses.py     about five minutes on two cores; writes which-loss.json and the tables of which-loss.md

Every loss gets the same head, data order, dropout, optimizer, learning rate and number of epochs; nothing is tuned for any of
them. Losses over leaves give node scores by summing leaf probabilities. Differences are paired over pictures and seeds.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from app_data.dual_encoder import load
from app_data.emoji import load_emoji
from app_eval.embed import run_batches
from app_eval.scores import TITLES, mean_over_seeds, outcome, paired_difference, per_picture, resamples
from hier_losses import Taxonomy, functional
from hier_losses.probabilities import leaf_to_node_logits
from hier_losses.treecuts import sample_cuts

HERE = Path(__file__).parent
EPOCHS, BATCH, LR, DROPOUT = 40, 128, 2e-3, 0.5


def leaf_ce(z, y, tax):
    return F.cross_entropy(z[:, tax.leaf], tax.leaf_index[y])


LOSSES = {
    "leaf CE": (leaf_ce, True),
    "HXE (alpha .1)": (lambda z, y, tax: functional.hxe(z[:, tax.leaf], y, tax), True),
    "HXE (alpha .5)": (lambda z, y, tax: functional.hxe(z[:, tax.leaf], y, tax, alpha=0.5), True),
    "soft labels (beta 10)": (lambda z, y, tax: functional.soft_label_ce(z[:, tax.leaf], y, tax), True),
    "level CE": (functional.level_cross_entropy, False),
    "TP-KL": (functional.tp_kl, False),
    "HiSCE": (functional.hisce, False),
    "TP-KL + HiSCE": (functional.hierarchy_aware_loss, False),
    "TP-KL + HiSCE + consistency": (
        lambda z, y, tax: functional.hierarchy_aware_loss(z, y, tax, consistency_weight=1.0),
        False,
    ),
    "conditional softmax": (functional.conditional_softmax_nll, False),
}
DECODERS = {"bottom_up": ("leaf", "severity", "ahd"), "joint_path": ("fpa", "ahd"), "level_argmax": ("fpa", "tice")}


def train(loss, features, target, tax: Taxonomy, seed: int, epochs: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    head = torch.nn.Linear(features.shape[1], tax.num_nodes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, epochs=epochs, steps_per_epoch=-(-len(target) // BATCH)
    )
    for _ in range(epochs):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    train_set, test_set = load_emoji(("openmoji", "noto-300", "noto-700")), load_emoji(("twemoji",))
    base = load("lite0-minilm")
    tax, cuts = train_set.taxonomy, sample_cuts(train_set.taxonomy)
    features, test = (
        run_batches(d, lambda x: base.vision(base.preprocess(x)), "features") for d in (train_set, test_set)
    )
    # Each set is centred on its own mean, which takes out what is common to all pictures of an artist.
    features, test = features - features.mean(0), test - test.mean(0)
    target = torch.from_numpy(train_set.targets)
    counts = resamples(len(test))
    found = {name: [] for name in LOSSES}
    for name, (loss, _) in LOSSES.items():
        for seed in range(args.seeds):
            head = train(loss, features, target, tax, seed, args.epochs)
            with torch.no_grad():
                logits = node_scores(name, head(test), tax)
            found[name].append(outcome(logits, test_set.targets, tax, cuts))
        print(name, flush=True)

    def pairs(name, decoder, score):
        return [per_picture(one, tax, decoder)[score] for one in found[name]]

    rows = []
    for name in LOSSES:
        row = {"loss": name}
        for decoder, scores in DECODERS.items():
            for score in scores:
                value = mean_over_seeds(pairs(name, decoder, score), counts)
                gap = paired_difference(pairs(name, decoder, score), pairs("leaf CE", decoder, score), counts)
                row[f"{score} {decoder}"] = {"value": value.as_json(), "difference": gap.as_json()}
        rows.append(row)
    settings = {
        "epochs": args.epochs,
        "batch": BATCH,
        "lr": LR,
        "dropout": DROPOUT,
        "seeds": args.seeds,
        "n": len(test),
    }
    (args.out / "which-loss.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    page = args.out / "which-loss.md"
    if page.exists():
        text = re.sub(
            r"(<!-- table -->\n).*?(<!-- /table -->)",
            lambda m: m[1] + table(rows) + "\n" + m[2],
            page.read_text(),
            flags=re.S,
        )
        page.write_text(text)


def table(rows: list[dict]) -> str:
    keys = [key for key in rows[0] if key != "loss"]
    heads = [f"{TITLES[key.split()[0]]}, `{key.split()[1]}`" for key in keys]
    lines = ["| loss | " + " | ".join(heads) + " |", "|---" * (len(keys) + 1) + "|"]
    for row in rows:
        cells = []
        for key in keys:
            (value, _, _), (gap, low, high) = row[key]["value"], row[key]["difference"]
            mark = "" if row["loss"] == "leaf CE" or np.isnan(gap) or low <= 0 <= high else f" ({gap:+.3f})"
            cells.append(f"{value:.3f}{mark}")
        lines.append(f"| {row['loss']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
