"""Recipe `mat`: which parts of Modality Alignment across Trees earn their keep on towers that are reachable.

    hier train mat --data emoji                       the six variants on emoji, tower Lite0 + MiniLM
    hier train mat --data cifar100-fewshot --source DIR --shots 16 --tower vit
    hier train mat --variant HETEROGENEOUS            one variant
    hier train mat --study intermediate               a question the paper leaves open
    hier train mat --study controls                   classifiers of hier-lora on the same features: a free head and TreeLDA
    hier train mat --tune                             learning rates on pictures cut out of the training set

The towers are frozen and their outputs kept in the cache, so a row takes seconds. Trained are the linear map of each
depth, one linear map of the text, the attention, the curvatures and the logit scale; a variant of the last token trains
the last map alone. Controls: zero-shot (the maps before training), the nearest picture, and the majority member of each
cut. With --seeds 3 on one core: emoji about 8 minutes, CIFAR-100 about 3 (1 shot) and 6 (16 shots).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from app_data.store.atomic import new_file, write_json
from app_data.store.sealed import is_whole, seal_folder
from app_eval.measure.cells import finished
from app_eval.measure.embed import neighbour_logits
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.errors import RunError
from app_train.core.fit import fit
from app_train.core.records import read_records
from app_train.core.run_folder import Run
from app_train.recipes.lora.classifiers import Features as Heads
from app_train.recipes.lora.classifiers import OnTree
from app_train.recipes.lora.classifiers import centred as by_style
from app_train.recipes.lora.frozen import node_scores
from app_train.recipes.lora.settings import HeadsConfig
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
from app_train.recipes.mat.fit import feature_stage
from app_train.recipes.mat.results import CONTROLS, conclude, folder_name, geometry, store, summarise, table
from app_train.recipes.mat.rows import VARIANTS, Row, chosen_rows, study_rows, trained_as
from app_train.recipes.mat.second_tree import SecondTree, second_scores, second_tree, without_tree
from app_train.recipes.mat.settings import MATConfig, MATFitConfig
from hier_losses import Taxonomy
from mat_align import VANILLA, FeatureMATModel, MATObjective

TRIALS = (3e-4, 1e-3, 3e-3)
# Controls that other rooms fit, by the name of the expert there.
FITTED = {"free head": "head", "TreeLDA": "tree_lda"}
TUNED = ("VANILLA", "PROTECT", "EUCLIDEAN")


def run(config: MATConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    with Run("mat", config, ("seeds", "variant", "study", "rows"), processes=False) as run:
        pictures = load_pictures(
            config.data, config.source, config.shots, config.size, config.cache_dir, config.tune, config.num_test
        )
        if config.limit is not None:
            pictures = _limited(pictures, config.limit)
        if config.study == "flat":
            pictures = without_tree(pictures)
        run.claim(f"{pictures.train.fingerprint}-{pictures.test.fingerprint}")
        if (known := run.result()) is not None and not config.tune:
            print(table(known))  # noqa: T201
            return known
        features = centred(compute_features(pictures, config.tower, config.cache_dir, run.check), pictures)
        shared = Shared(config, run, pictures, features, second_tree(pictures) if config.study == "cross" else None)
        return _tune(shared) if config.tune else _compare(shared)


@dataclass(frozen=True)
class Shared:
    """What all rows of a run share.

    Attributes:
        config, run: settings and run folder.
        pictures, features: of both parts.
        tree: the second tree of the study "cross".
    """

    config: MATConfig
    run: Run
    pictures: Pictures
    features: Features
    tree: SecondTree | None


def _limited(pictures: Pictures, limit: int) -> Pictures:
    parts = {}
    for name in ("train", "test"):
        part = getattr(pictures, name)
        parts[name] = part.select(np.linspace(0, len(part) - 1, min(limit, len(part))).round().astype(int))
    return replace(pictures, **parts)


def _compare(shared: Shared) -> dict:
    config, run, pictures = shared.config, shared.run, shared.pictures
    own = config.study == "controls"
    rows = {} if own else chosen_rows(study_rows(config.study, config.variant), config.rows)
    fitted = chosen_rows(FITTED, config.rows) if own else {}
    homes = {name: name for name in (*CONTROLS, *fitted)} | {name: trained_as(row) for name, row in rows.items()}
    folders = {
        name: [config.out / folder_name(home) / f"seed-{seed}" for seed in range(config.seeds)]
        for name, home in homes.items()
    }
    results: dict[str, list[dict]] = {}
    for name, places in folders.items():
        results[name] = [
            _control(shared, name, folder)
            if name in CONTROLS
            else _fitted(shared, name, folder, seed)
            if name in fitted
            else train_row(shared, rows[name], folder, seed, homes[name])
            for seed, folder in enumerate(places)
        ]
    facts = {
        "shots": _shots(shared), "tower": config.tower, "num_train": len(pictures.train), "size": config.size,
        "settings": config.fit.model_dump(),
        **summarise(results, folders, pictures.test, pictures.cuts, ("second",) if config.study == "cross" else ()),
        "data": config.data,
    }  # fmt: skip
    return conclude(run, config.study, facts)


def _shots(shared: Shared) -> int:
    """Pictures of a class; of emoji the training styles."""
    config = shared.config
    return config.shots if config.data != "emoji" else len(set(shared.pictures.train.styles))


def _facts(shared: Shared, name: str, seed: int, row: Row | None) -> dict:
    return shared.run.facts(name, seed, variant=None if row is None else row.facts())


def _control(shared: Shared, name: str, folder: Path) -> dict:
    facts = _facts(shared, name, 0, None)
    if (known := finished(folder, facts)) is not None:
        return known
    features, pictures, fit_config = shared.features, shared.pictures, shared.config.fit
    tax = pictures.test.taxonomy
    if name == "zero-shot":
        model = build_model(Row(VANILLA), features, fit_config.ridge, 0, **fit_config.head())
        logits = _logits(model, Row(VANILLA), features, node_names(tax))
    else:
        train = torch.from_numpy(pictures.train.targets)
        logits = neighbour_logits(features.neighbour_train, train, features.neighbour_test, tax)
    return store(folder, logits, pictures.test, pictures.cuts, facts)


def _fitted(shared: Shared, name: str, folder: Path, seed: int) -> dict:
    """A classifier of hier-lora on the features of the last depth: no text, no attention, no manifold."""
    facts = _facts(shared, name, seed, None)
    if (known := finished(folder, facts)) is not None:
        return known
    pictures, features, fit_config = shared.pictures, shared.features, shared.config.fit
    train, test = features.neighbour_train, features.neighbour_test
    mean = test.mean(0) if pictures.centred else train.mean(0)
    x = by_style(train, np.array(pictures.train.styles)) if pictures.centred else train - mean
    settings = HeadsConfig(
        epochs=fit_config.epochs, lr=fit_config.lr, batch_size=fit_config.batch_size, dropout=fit_config.dropout
    )
    tax = pictures.train.taxonomy
    on = OnTree(tax, Heads(x, torch.from_numpy(pictures.train.targets)), settings, settings.shrinkage)
    try:
        found = on.log_prob(FITTED[name], test - mean, seed)
    except ValueError as error:
        raise RunError(f"the row {name} cannot be fitted to these pictures ({error}): choose other --rows") from error
    return store(folder, node_scores(found, tax), pictures.test, pictures.cuts, facts)


@torch.no_grad()
def _logits(model: FeatureMATModel, row: Row, features: Features, names: Sequence[str]) -> Tensor:
    model.eval()
    text = model.encode_text(names)
    chosen = columns(features.widths, row_depths(row, features))
    return torch.cat([model.score(model.encode_image(part[:, chosen]), text) for part in features.test.split(512)])


def train_row(shared: Shared, row: Row, folder: Path, seed: int, name: str, config: MATFitConfig | None = None) -> dict:
    """Train, save and score one row; a finished row is read back instead.

    Args:
        shared: what all rows share.
        row: what is computed and trained.
        folder: of the row.
        seed: initialisation, order of the data, tree cuts.
        name: of the row.
        config: how it is trained; as the run says if None.

    Returns:
        The content of its `result.json`.
    """
    run, pictures, features, tree = shared.run, shared.pictures, shared.features, shared.tree
    config = config or shared.config.fit
    facts = _facts(shared, name, seed, row) | {"lr": config.lr}
    known = finished(folder, facts)
    # A row that another study has trained lacks the scores on the second tree: it is scored again.
    if known is not None and (tree is None or "second" in known):
        return known
    tax = pictures.train.taxonomy
    model = build_model(
        row, features, config.ridge, seed, None if tree is None else tree.text, dropout=config.dropout, **config.head()
    )

    def objective_of(taxonomy: Taxonomy, names: list[str]) -> MATObjective:
        return MATObjective(taxonomy, 1.0, config.node_weight, config.entail_weight, config.treecut_dropout, names)

    objective = objective_of(tax, node_names(tax))
    inputs = features.train[:, columns(features.widths, row_depths(row, features))]
    sides = [(objective, torch.from_numpy(pictures.train.targets))]
    if tree is not None:
        sides.append((objective_of(tree.taxonomy, tree.names), tree.train_target))
        sides = {"first": sides[:1], "second": sides[1:], "both": sides}[row.trees]
    saved = folder / "model.safetensors"
    if is_whole(folder):  # killed while scoring: the trained model is there, whole
        model.load_state_dict(load_tensors(saved), strict=False)
    else:
        objectives, targets = zip(*sides, strict=True)
        stage = feature_stage(model, objectives, inputs, targets, config, seed, shared.config.save_every)
        fit(model, [stage], folder, seed=seed, label=f"{name}, seed {seed}", stop=run.stop)
        with new_file(saved) as unfinished:
            save_tensors({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, unfinished)
        seal_folder(folder)
    model.eval()
    facts["num_trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        tokens = exact.encode_image(features.test[:, columns(features.widths, row_depths(row, features))].double())
        text, target = exact.encode_text(objective.names), torch.from_numpy(pictures.test.targets)
    facts |= geometry(exact, objective, tokens, text, target, read_records(folder / "metrics.jsonl"))
    logits = _logits(model, row, features, objective.names)
    if tree is not None:
        facts["second"] = second_scores(logits, _logits(model, row, features, tree.names), pictures.test, tree)
    result = store(folder, logits, pictures.test, pictures.cuts, facts)
    remove_checkpoints(folder)
    return result


def _tune(shared: Shared) -> dict:
    """Three rates for three rows; the one with the best mean of all scores over the rows serves every row."""
    config, trials = shared.config, {}
    for lr in TRIALS:
        tried = config.fit.model_copy(update={"lr": lr})
        trials[f"{lr:g}"] = {
            name: train_row(
                shared, Row(VARIANTS[name]), config.out / f"{name}-{lr:g}", 0, f"{name} {lr:g}", tried
            )["scores"]
            for name in TUNED
        }  # fmt: skip
    best = max(trials, key=lambda lr: np.mean([v for row in trials[lr].values() for v in row.values()]))
    facts = {"study": "tuning", "tower": config.tower, "shots": _shots(shared), "trials": trials, "chosen": best}
    content = shared.run.finish({**facts, "data": config.data})
    write_json(config.out / "result-tuning.json", content)
    print(f"chosen rate: {best}; all trials: {config.out / 'result-tuning.json'}")  # noqa: T201
    return content
