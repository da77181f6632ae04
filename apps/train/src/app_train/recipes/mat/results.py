"""What the recipes `mat` and `mat-mini` keep of a row: its scores, its geometry, and the summary over seeds."""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from app_data.read.pictures import PictureSet
from app_data.store.atomic import new_file, write_json
from app_data.store.sealed import write_sealed
from app_eval.measure.cells import differences, means
from app_eval.measure.tree_scores import SCORES, TITLES, tree_scores
from app_train.core.run_folder import Run
from hier_losses.metrics import mta_majority_baseline
from hier_losses.treecuts import TreeCuts
from mat_align import FeatureMATModel, MATModel, MATObjective, fraction_met

CONTROLS = ("zero-shot", "nearest picture")
_KEPT = ("num_trained", "curvatures", "met", "c_mid_between", "final_losses", "attention")


def folder_name(name: str) -> str:
    """A row's name as that of a folder."""
    return "".join(ch if ch.isalnum() else "-" for ch in name).strip("-")


def store(folder: Path, logits: Tensor, test: PictureSet, cuts: TreeCuts, facts: dict) -> dict:
    """Score the logits of all nodes and write `scores.safetensors` and `result.json`; returns the latter's content."""
    found = tree_scores(logits, test.targets, test.taxonomy, cuts)
    with new_file(folder / "scores.safetensors") as temporary:
        save_file(found, temporary)
    result = {**facts, "scores": {s: float(v.mean()) for s, v in found.items()}}
    return write_sealed(folder / "result.json", result, beside=True)


@torch.no_grad()
def geometry(
    model: FeatureMATModel | MATModel,
    objective: MATObjective,
    tokens: Tensor,
    text: Tensor,
    target: Tensor,
    records: list[dict],
) -> dict:
    """What the attention looks at, curvatures over the steps, and the share of cone constraints met.

    Args:
        model: the trained model in fp64: on nearly parallel unit features the rounding of their norms in fp32 would
            decide whether a cone is met.
        objective: the objective it was trained with.
        tokens: layer tokens of the test pictures in fp64.
        text: text features of all nodes in fp64.
        target: true leaves of the test pictures.
        records: what the training logged.
    """
    last = records[-max(1, len(records) // 10) :]
    parts = ("leaf", "cut", "node", "visual", "textual", "cross")
    facts = {"final_losses": {p: float(np.mean([line[p] for line in last])) for p in parts}}
    if model.head.attention is not None:
        path = objective.taxonomy.paths[target]
        asked = model.head.attention.weights(tokens, text).gather(
            1, path.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[1])
        )
        facts["attention"] = asked[path >= 0].mean(0).tolist()
    if model.variant.curvature == "none":
        return facts
    curves = [[line[c] for c in ("c_img", "c_txt", "c_mid")] for line in records]
    inside = [min(a, b) * (1 - 1e-6) <= m <= max(a, b) * (1 + 1e-6) for a, b, m in curves]
    picked = np.linspace(0, len(records) - 1, min(25, len(records))).round().astype(int)
    facts["curvatures"] = [[records[i]["step"], *(round(c, 6) for c in curves[i])] for i in picked]
    facts["c_mid_between"] = float(np.mean(inside))
    found, length = objective.path_features(model, tokens, text, target)
    shares = fraction_met(found, length, *model.head.curvatures(found, length), model.head.min_radius)
    facts["met"] = dict(zip(("visual", "textual", "cross"), shares, strict=True))
    return facts


def summarise(
    results: dict[str, list[dict]],
    folders: dict[str, list[Path]],
    test: PictureSet,
    cuts: TreeCuts,
    more: tuple[str, ...] = (),
) -> dict:
    """The part of a result that is the same for every recipe: baseline of the cuts, and all rows over the seeds.

    Args:
        results: content of the `result.json` of each row and seed.
        folders: where they and the picture-wise scores are.
        test: the test pictures.
        cuts: the cuts of mean tree-cut accuracy.
        more: further facts of a row to keep.
    """
    scores = {name: [load_file(folder / "scores.safetensors") for folder in places] for name, places in folders.items()}
    return {
        "num_test": len(test),
        "num_nodes": test.taxonomy.num_nodes,
        "mta_majority": float(mta_majority_baseline(torch.from_numpy(test.targets), cuts)),
        "rows": {name: _row(results[name], scores[name], scores, more) for name in folders},
    }


def _row(results: list[dict], own: list[dict], every: dict[str, list[dict]], more: tuple[str, ...]) -> dict:
    first_names = [name for name in every if name not in CONTROLS][:1]
    baseline = "PROTECT" if "PROTECT" in every else first_names[0]
    summary = {
        "scores": {s: v.as_json() for s, v in means(own, SCORES).items()},
        "deviation": {s: float(np.std([x[s].mean() for x in own], ddof=1)) if len(own) > 1 else None for s in SCORES},
        "baseline": baseline,
        "against baseline": {s: v.as_json() for s, v in differences(own, every[baseline], SCORES).items()},
        "against zero-shot": {s: v.as_json() for s, v in differences(own, every["zero-shot"], SCORES).items()},
    }
    for other in ("EUCLIDEAN", "SHARED"):
        if other in every:
            summary[f"against {other}"] = {s: v.as_json() for s, v in differences(own, every[other], SCORES).items()}
    return summary | {name: [r[name] for r in results] for name in (*_KEPT, *more) if name in results[0]}


def conclude(run: Run, study: str, facts: dict) -> dict:
    """Write the result under its own name and that of the study, seal the run, and print the table."""
    content = run.finish({"study": study, "fingerprint": run.data, "seeds": run.config.seeds, **facts})
    path = run.out / f"result-{study}.json"
    write_json(path, content)
    run.seal()
    print(f"{table(content)}\n\nresult: {path}")  # noqa: T201
    return content


def table(content: dict) -> str:
    """The scores of all rows for the terminal."""
    width = max(map(len, content["rows"])) + 2
    lines = [f"{'':<{width}}" + "".join(f"{TITLES[s]:>22}" for s in SCORES)]
    for name, row in content["rows"].items():
        cells = [f"{v:.3f} [{low:.3f}, {high:.3f}]".rjust(22) for v, low, high in (row["scores"][s] for s in SCORES)]
        lines.append(f"{name:<{width}}" + "".join(cells))
    lines.append(f"\nMTA of the majority member of every cut: {content['mta_majority']:.3f}")
    return "\n".join(lines)
