"""Recipe `mat`: which parts of Modality Alignment across Trees earn their keep on towers that are reachable.

    python apps/train mat --data emoji                       the six variants on emoji, tower Lite0 + MiniLM
    python apps/train mat --data cifar100-fewshot --source DIR --shots 16 --tower vit
    python apps/train mat --variant HETEROGENEOUS            one variant
    python apps/train mat --study intermediate               a question the paper leaves open
    python apps/train mat --tune                             learning rates on pictures cut out of the training set

The towers are frozen and their outputs kept in the cache, so a row takes seconds. Trained are the linear map of each
depth, one linear map of the text, the attention, the curvatures and the logit scale; a variant of the last token trains
the last map alone. Controls: zero-shot (the maps before training), the nearest picture, and the majority member of each
cut. With --seeds 3 on one core: emoji about 8 minutes, CIFAR-100 about 3 (1 shot) and 6 (16 shots).
"""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from app_data.store.atomic import write_json
from app_eval.measure.embed import neighbour_logits
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import Frozen, claim_folder, config_hash
from app_train.core.errors import Interrupted, RunError
from app_train.core.interrupt import StopFlag
from app_train.core.records import read_records
from app_train.recipes.lora.task import finished
from app_train.recipes.mat.data import (
    Features,
    Pictures,
    build_model,
    centred,
    columns,
    compute_features,
    load_pictures,
    node_names,
    row_depths,
)
from app_train.recipes.mat.fit import MATFitConfig, fit_row
from app_train.recipes.mat.results import CONTROLS, folder_name, geometry, store, summarise, table
from app_train.recipes.mat.rows import VARIANTS, Row, Study, VariantName, study_rows, trained_as
from app_train.recipes.mat.second_tree import SecondTree, second_scores, second_tree, without_tree
from hier_losses import Taxonomy
from mat_align import VANILLA, FeatureMATModel, MATObjective

TRIALS = (3e-4, 1e-3, 3e-3)
TUNED = ("VANILLA", "PROTECT", "EUCLIDEAN")


class MATConfig(Frozen):
    """Train and score variants of Modality Alignment across Trees on cached features."""

    out: Path = Path("runs/mat")
    """Run folder; the same command goes on from what it holds."""
    data: Literal["emoji", "cifar100-fewshot"] = "emoji"
    source: Path | None = None
    """Folder with cifar100_fewshot.tar.gz and trees/cifar100.json."""
    shots: int = Field(16, ge=1, le=16)
    """Training pictures of each class (CIFAR-100)."""
    num_test: int = Field(20, ge=1)
    """Test pictures of each class (CIFAR-100), chosen by a hash of their names."""
    tower: Literal["lite0", "vit"] = "lite0"
    variant: tuple[VariantName, ...] = tuple(VARIANTS)
    """Variants to train."""
    study: Study = "main"
    """Which rows: the variants, or those of an open question."""
    rows: tuple[str, ...] | None = None
    """Only these rows of the study, by name; the first of them is what the others are compared with."""
    seeds: int = Field(1, ge=1)
    """Seeds 0 .. seeds-1: initialisation, order of the data, tree cuts."""
    fit: MATFitConfig = MATFitConfig()
    size: int = Field(128, ge=32)
    """Height and width of the pictures in pixels."""
    limit: int | None = Field(None, ge=2)
    """Use so many training and test pictures only (for trials)."""
    tune: bool = False
    """Compare learning rates on pictures cut out of the training set instead; never touches the test set."""
    cache_dir: Path | None = None
    """Where pictures and features are kept; the user's cache folder if not given."""


def run(config: MATConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    with StopFlag() as stop:

        def check() -> None:
            if stop.exit_status is not None:
                raise Interrupted(stop.exit_status)

        pictures = load_pictures(
            config.data, config.source, config.shots, config.size, config.cache_dir, config.tune, config.num_test
        )
        if config.limit is not None:
            pictures = _limited(pictures, config.limit)
        if config.study == "flat":
            pictures = without_tree(pictures)
        data = f"{pictures.train.fingerprint}-{pictures.test.fingerprint}"
        claim_folder(config.out, config, data, ignored=("seeds", "variant", "study", "rows"))
        features = centred(compute_features(pictures, config.tower, config.cache_dir, check), pictures)
        if config.tune:
            return _tune(config, pictures, features, data, stop)
        return _compare(config, pictures, features, data, stop)


def _limited(pictures: Pictures, limit: int) -> Pictures:
    parts = {}
    for name in ("train", "test"):
        part = getattr(pictures, name)
        parts[name] = part.select(np.linspace(0, len(part) - 1, min(limit, len(part))).round().astype(int))
    return replace(pictures, **parts)


def _chosen(rows: dict[str, Row], names: tuple[str, ...] | None) -> dict[str, Row]:
    if names is None:
        return rows
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise RunError(f"--rows: no row {unknown[0]!r} in this study; it has {', '.join(map(repr, rows))}")
    return {name: rows[name] for name in names}


def _compare(config: MATConfig, pictures: Pictures, features: Features, data: str, stop: StopFlag) -> dict:
    rows = _chosen(study_rows(config.study, config.variant), config.rows)
    tree = second_tree(pictures) if config.study == "cross" else None
    homes = {name: name for name in CONTROLS} | {name: trained_as(row) for name, row in rows.items()}
    folders = {
        name: [config.out / folder_name(home) / f"seed-{seed}" for seed in range(config.seeds)]
        for name, home in homes.items()
    }
    results: dict[str, list[dict]] = {}
    for name, places in folders.items():
        results[name] = []
        for seed, folder in enumerate(places):
            if name in CONTROLS:
                results[name].append(_control(config, pictures, features, data, name, folder))
            else:
                results[name].append(
                    train_row(config, rows[name], pictures, features, data, folder, seed, stop, homes[name], tree)
                )
    content = {
        "format": 1,
        "recipe": "mat",
        "study": config.study,
        "data": config.data,
        "shots": config.shots if config.data != "emoji" else len(set(pictures.train.styles)),
        "tower": config.tower,
        "fingerprint": data,
        "num_train": len(pictures.train),
        "seeds": config.seeds,
        "size": config.size,
        "settings": config.fit.model_dump(),
        **summarise(results, folders, pictures.test, pictures.cuts, ("second",) if config.study == "cross" else ()),
    }
    write_json(config.out / f"result-{config.study}.json", content)
    print(table(content))  # noqa: T201
    print(f"\nresult: {config.out / f'result-{config.study}.json'}")  # noqa: T201
    return content


def _facts(config: MATConfig, name: str, row: Row | None, data: str) -> dict:
    hashed = config_hash(config.fit, tower=config.tower, row=None if row is None else row.facts(), size=config.size)
    return {"recipe": "mat", "row": name, "data": data, "config": hashed}


def _control(config: MATConfig, pictures: Pictures, features: Features, data: str, name: str, folder: Path) -> dict:
    facts = _facts(config, name, None, data)
    known = finished(folder, facts)
    if known is not None:
        return known
    tax = pictures.test.taxonomy
    if name == "zero-shot":
        model = build_model(Row(VANILLA), features, config.fit.ridge, 0, **config.fit.head())
        logits = _logits(model, Row(VANILLA), features, node_names(tax))
    else:
        train = torch.from_numpy(pictures.train.targets)
        logits = neighbour_logits(features.neighbour_train, train, features.neighbour_test, tax)
    return store(folder, logits, pictures.test, pictures.cuts, facts)


@torch.no_grad()
def _logits(model: FeatureMATModel, row: Row, features: Features, names: Sequence[str]) -> Tensor:
    model.eval()
    text = model.encode_text(names)
    chosen = columns(features.widths, row_depths(row, features))
    return torch.cat([model.score(model.encode_image(part[:, chosen]), text) for part in features.test.split(512)])


def train_row(
    config: MATConfig,
    row: Row,
    pictures: Pictures,
    features: Features,
    data: str,
    folder: Path,
    seed: int,
    stop: StopFlag,
    name: str,
    tree: SecondTree | None = None,
) -> dict:
    """Train, save and score one row; a finished row is read back instead.

    Returns:
        The content of its `result.json`.
    """
    facts = _facts(config, name, row, data) | {"seed": seed}
    known = finished(folder, facts)
    # A row that another study has trained lacks the scores on the second tree: it is scored again.
    if known is not None and (tree is None or "second" in known):
        return known
    tax = pictures.train.taxonomy
    fit = config.fit
    model = build_model(
        row, features, fit.ridge, seed, None if tree is None else tree.text, dropout=fit.dropout, **fit.head()
    )

    def objective_of(taxonomy: Taxonomy, names: list[str]) -> MATObjective:
        return MATObjective(taxonomy, 1.0, fit.node_weight, fit.entail_weight, fit.treecut_dropout, names)

    objective = objective_of(tax, node_names(tax))
    inputs = features.train[:, columns(features.widths, row_depths(row, features))]
    sides = [(objective, torch.from_numpy(pictures.train.targets))]
    if tree is not None:
        sides.append((objective_of(tree.taxonomy, tree.names), tree.train_target))
        sides = {"first": sides[:1], "second": sides[1:], "both": sides}[row.trees]
    saved = folder / "model.safetensors"
    if saved.exists():  # killed while scoring: the trained model is there, whole
        model.load_state_dict(load_tensors(saved), strict=False)
    else:
        objectives, targets = zip(*sides, strict=True)
        fit_row(model, objectives, inputs, targets, fit, folder, seed=seed, stop=stop, label=f"{name}, seed {seed}")
        unfinished = saved.with_suffix(".unfinished")
        save_tensors({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, unfinished)
        os.replace(unfinished, saved)
    model.eval()
    facts["num_trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        tokens = exact.encode_image(features.test[:, columns(features.widths, row_depths(row, features))].double())
        text, target = exact.encode_text(objective.names), torch.from_numpy(pictures.test.targets)
    facts |= geometry(exact, objective, tokens, text, target, read_records(folder / "metrics.jsonl"))
    logits = _logits(model, row, features, objective.names)
    if tree is not None:
        facts["second"] = second_scores(logits, _logits(model, row, features, tree.names), pictures, tree)
    result = store(folder, logits, pictures.test, pictures.cuts, facts)
    remove_checkpoints(folder)
    return result


def _tune(config: MATConfig, pictures: Pictures, features: Features, data: str, stop: StopFlag) -> dict:
    """Three rates for three rows; the one with the best mean of all scores over the rows serves every row."""
    trials = {}
    for lr in TRIALS:
        tried = config.model_copy(update={"fit": config.fit.model_copy(update={"lr": lr})})
        trials[f"{lr:g}"] = {
            name: train_row(
                tried,
                Row(VARIANTS[name]),
                pictures,
                features,
                data,
                config.out / f"{name}-{lr:g}",
                0,
                stop,
                f"{name} {lr:g}",
            )["scores"]
            for name in TUNED
        }
    best = max(trials, key=lambda lr: np.mean([v for row in trials[lr].values() for v in row.values()]))
    content = {
        "format": 1,
        "recipe": "mat",
        "study": "tuning",
        "data": config.data,
        "tower": config.tower,
        "shots": config.shots if config.data != "emoji" else len(set(pictures.train.styles)),
        "trials": trials,
        "chosen": best,
    }
    write_json(config.out / "result-tuning.json", content)
    print(json.dumps(content, indent=1))  # noqa: T201
    return content
