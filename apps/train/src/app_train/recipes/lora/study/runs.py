"""Carry out one run of the hier-lora study; each returns named outcomes on the test pictures."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from app_data.read.splits import withhold_leaves
from app_data.sets.cifar100 import take_shots
from app_eval.measure.embed import neighbour_logits, node_logits
from app_eval.measure.paths import Outcome, outcome
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import StageConfig
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.recipes.lora.classifiers import Features, OnTree, centred
from app_train.recipes.lora.frozen import node_scores
from app_train.recipes.lora.heads import TreeLoss, head_logits, head_state, set_head, start_head, train_head
from app_train.recipes.lora.objective import Objective, stages
from app_train.recipes.lora.retree import permute_parents, rewire
from app_train.recipes.lora.settings import FitConfig, HeadsConfig
from app_train.recipes.lora.study.data import Split, StudyData
from app_train.recipes.lora.study.plan import SHOTS, Trial
from app_train.recipes.lora.task import Task, build_model, cuts_for
from hier_lora import HierLoraCLIP, PromptSet
from hier_losses import Taxonomy

Outcomes = dict[str, tuple[Outcome, dict]]
# The second stage of the `towers` runs: short, because the text tower reads every prompt in every step.
LORA_STAGE = StageConfig(epochs=1, lr=2e-3, batch_size=64)
TOWERS_TEST_SHOTS = 20


@dataclass
class Bank:
    """What runs share: the base model, the data sets, and zero-shot models by taxonomy (their prompts cost seconds)."""

    base: nn.Module
    data: dict[str, StudyData]
    head: StageConfig
    run: Run

    def __post_init__(self) -> None:
        self._models: dict[str, HierLoraCLIP] = {}
        self._fresh: dict[str, dict[str, Tensor]] = {}

    def stage(self, rate: float) -> StageConfig:
        """How a head is trained, at this rate."""
        return self.head.model_copy(update={"lr": rate})

    def model(self, data: StudyData) -> HierLoraCLIP:
        """The zero-shot model over a data set's whole taxonomy, with a fresh head centred on its training pictures."""
        if data.name not in self._models:
            self._models[data.name] = self.new_model(data.taxonomy, data)
            self._fresh[data.name] = head_state(self._models[data.name])
        model = self._models[data.name]
        set_head(model, self._fresh[data.name])
        start_head(model, data.train.features)
        return model

    def new_model(self, tax: Taxonomy, data: StudyData) -> HierLoraCLIP:
        """A zero-shot model over any taxonomy, with the words that the data set gives to nodes of the same path."""
        paths = (data.taxonomy.path_of(v) for v in range(data.taxonomy.num_nodes))
        words = dict(zip(paths, data.train.pictures.node_text, strict=True))
        names = [words.get(tax.path_of(v), tax.names[v]) for v in range(tax.num_nodes)]
        prompts = PromptSet(tax, (data.template,), names=names)
        with torch.random.fork_rng(devices=[]):
            return HierLoraCLIP(copy.deepcopy(self.base), tax, text="cached", prompts=prompts, center_text=True)


def carry_out(run: Trial, bank: Bank, rate: float) -> Outcomes:
    """Do a run with a learning rate that validation chose."""
    data = bank.data[run.data]
    kinds: dict[str, Callable[[Trial, Bank, StudyData, float], Outcomes]] = {
        "fixed": _fixed, "head": _head, "update": _update, "towers": _towers, "frozen": _frozen,
    }  # fmt: skip
    return kinds[run.kind](run, bank, data, rate)


def _scored(model: HierLoraCLIP, data: StudyData, test: Split | None = None) -> Outcome:
    test = data.test if test is None else test
    logits = head_logits(model, test.features, centred=data.centred)
    return outcome(logits, test.targets, data.taxonomy, data.cuts)


def _fixed(run: Trial, bank: Bank, data: StudyData, rate: float) -> Outcomes:
    if run.row == "zero_shot":
        return {"": (_scored(bank.model(data), data), {})}
    logits = neighbour_logits(
        data.train.features, torch.from_numpy(data.train.targets), data.test.features, data.taxonomy
    )
    return {"": (outcome(logits, data.test.targets, data.taxonomy, data.cuts), {})}


def _frozen(run: Trial, bank: Bank, data: StudyData, rate: float) -> Outcomes:
    """A classifier on frozen features from so many pictures of each class, over the tree, a wrong one, or none."""
    tax, tree = data.taxonomy, run.options["tree"]
    train = data.train.select(take_shots(data.train.pictures, run.options["shots"], run.seed)[0])
    styles = np.array(train.pictures.styles) if data.centred else np.zeros(len(train.targets))
    known = Features(centred(train.features, styles), torch.from_numpy(train.targets))
    edges, facts = None, {"pictures": len(train.targets)}
    if tree not in ("tree", "star"):
        edges = permute_parents(tax, run.seed) if tree == "shuffled" else rewire(tax, int(tree) / 100, run.seed)
        facts["edges changed"] = edges.changed
    config = HeadsConfig()
    fitted = OnTree(tax, known, config, config.shrinkage, edges, star=tree == "star")
    new = data.test.features - (data.test if data.centred else train).features.mean(0)
    scores = node_scores(fitted.log_prob(run.options["expert"], new, run.seed), tax)
    return {"": (outcome(scores, data.test.targets, tax, data.cuts), facts)}


def _head(run: Trial, bank: Bank, data: StudyData, rate: float) -> Outcomes:
    options = run.options
    if "leaves" in options:
        data = _fewer_leaves(data, options["leaves"])
        model = bank.new_model(data.taxonomy, data)
        start_head(model, data.train.features)
    else:
        model = bank.model(data)
    train, facts, edges, consistency = data.train, {}, None, None
    if "share" in options:
        edges = rewire(data.taxonomy, options["share"], run.seed)
        facts["edges changed"] = edges.changed
    if options.get("permuted"):
        consistency = permute_parents(data.taxonomy, run.seed)
        facts["edges changed"] = consistency.changed
    if "tail" in options:
        rows, counts = _long_tail(train, options["tail"], run.seed)
        train, facts["pictures per leaf"] = train.select(rows), counts
    loss = TreeLoss(run.loss, data.taxonomy, edges, consistency)
    train_head(model, train.features, train.targets, loss, bank.stage(rate), run.seed)
    if "leaves" in options:
        facts["tree"] = data.taxonomy.to_json()
    return {"": (_scored(model, data), facts)}


def _fewer_leaves(data: StudyData, num: int) -> StudyData:
    """The data set with so many leaves, spread over the tree; the others leave the taxonomy."""
    tax = data.taxonomy
    leaves = tax.leaf.numpy()
    kept = set(leaves[np.linspace(0, len(leaves) - 1, num).round().astype(int)].tolist())
    needed = {u for leaf in kept for u in tax.paths[leaf].tolist() if u >= 0}
    update = tax.prune([v for v in range(tax.num_nodes) if v not in needed])
    parts = [
        _moved(part, np.isin(part.targets, list(kept)), update.old_to_new, update.taxonomy, data)
        for part in (data.train, data.test)
    ]
    return replace(data, train=parts[0], test=parts[1], cuts=cuts_for(update.taxonomy))


def _moved(part: Split, mask: np.ndarray, old_to_new: Tensor, tax: Taxonomy, data: StudyData) -> Split:
    chosen = part.select(np.flatnonzero(mask))
    words = [""] * tax.num_nodes
    for old, new in enumerate(old_to_new.tolist()):
        if new >= 0:
            words[new] = data.train.pictures.node_text[old]
    targets = old_to_new[torch.from_numpy(chosen.targets)].numpy()
    pictures = replace(chosen.pictures, targets=targets, taxonomy=tax, node_text=tuple(words))
    return Split(pictures, chosen.features)


def _long_tail(train: Split, ratio: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Training rows whose number per leaf falls geometrically from all to all / ratio, over leaves in random order."""
    leaves = np.unique(train.targets)
    order = np.random.default_rng([seed, 3]).permutation(len(leaves))
    most = np.bincount(train.targets).max()
    counts = np.maximum(1, np.round(most * ratio ** (-np.arange(len(leaves)) / (len(leaves) - 1)))).astype(int)
    rows = []
    for count, which in zip(counts, order, strict=True):
        mine = np.flatnonzero(train.targets == leaves[which])
        rows += np.random.default_rng([seed, 4, int(which)]).permutation(mine)[:count].tolist()
    per_leaf = np.zeros(len(leaves), int)
    per_leaf[order] = counts
    return np.array(sorted(rows)), per_leaf.tolist()


def hidden_nodes(tax: Taxonomy, unit: str, share: float, seed: int) -> list[int]:
    """Leaves, or parents of leaves with all below them, to hide: so many percent, never the last child of a parent."""
    if unit == "leaf":
        return withhold_leaves(tax, share, seed).tolist()
    draw = np.random.default_rng([seed, 5])
    leaf, size = tax.leaf_index.numpy() >= 0, tax.group_size.numpy()
    start, parent = tax.group_start.numpy(), tax.parent.numpy()
    low = [v for v in range(tax.num_nodes) if size[v + 1] and leaf[start[v + 1] : start[v + 1] + size[v + 1]].all()]
    left = {v: int(size[v]) for v in range(tax.num_nodes + 1)}
    chosen: list[int] = []
    for node in draw.permutation(low).tolist():
        if len(chosen) == round(share * len(low)):
            break
        if left[parent[node] + 1] > 1:
            chosen.append(node)
            left[parent[node] + 1] -= 1
    return chosen


def _update(run: Trial, bank: Bank, data: StudyData, rate: float) -> Outcomes:
    """Train without some classes, add them to the taxonomy untrained, then show a few pictures of each class."""
    full = data.taxonomy
    hidden = hidden_nodes(full, run.options["unit"], run.options["share"], run.seed)
    smaller = full.prune(hidden)
    known = smaller.old_to_new[torch.from_numpy(data.train.targets)].numpy() >= 0
    part = _moved(data.train, known, smaller.old_to_new, smaller.taxonomy, data)
    model = bank.new_model(smaller.taxonomy, data)
    start_head(model, part.features)
    train_head(model, part.features, part.targets, TreeLoss(run.loss, smaller.taxonomy), bank.stage(rate), run.seed)
    before = model.node_features.clone()
    words = {full.path_of(v): data.train.pictures.node_text[v] for v in range(full.num_nodes)}
    update = model.update_taxonomy(full, {p: w for p, w in words.items() if smaller.old_to_new[full.index(p)] < 0})
    kept = update.old_to_new >= 0
    drift = float((model.node_features[update.old_to_new[kept]] - before[kept]).abs().max())
    new = [v for v in full.leaf.tolist() if smaller.old_to_new[v] < 0]
    facts = {"new leaves": new, "largest change of an old text feature": drift, "shots": 0}
    found = {"shots-0": (_scored(model, data), facts)}
    state = head_state(model)
    for shots in SHOTS[data.name]:
        set_head(model, state)
        rows, _ = take_shots(data.train.pictures, shots, run.seed)
        few = data.train.select(rows)
        # A third of the steps and of the rate: the head is near its place already.
        short = bank.stage(rate / 3).model_copy(update={"epochs": max(1, bank.head.epochs // 3)})
        train_head(model, few.features, few.targets, TreeLoss(run.loss, full), short, run.seed)
        found[f"shots-{shots}"] = (_scored(model, data), {**facts, "shots": shots})
    return found


def _towers(run: Trial, bank: Bank, data: StudyData, rate: float) -> Outcomes:
    """Head first, then LoRA on one tower or both; scored on a part of the test pictures."""
    rows, _ = take_shots(data.test.pictures, TOWERS_TEST_SHOTS, seed=0)
    test = data.test.pictures.select(rows)
    towers = run.options["towers"]
    config = _towers_config(bank.stage(rate), towers)
    text = "cached" if towers in ("head", "vision") else "live"
    task = Task(
        bank.run,
        bank.base,
        data.train.pictures,
        test,
        data.cuts,
        data.template,
        features=data.train.features,
        text=text,
    )
    model, folder = build_model(task, config, run.seed), Path(run.options["folder"])
    fit(
        Objective(model, run.loss).to(bank.run.device),
        stages(model, task.train, task.features, config, save_every=bank.run.config.save_every), folder,
        seed=run.seed, label=run.folder, stop=bank.run.stop, accelerator=bank.run.accelerator,
    )  # fmt: skip
    logits = node_logits(model, test, centred=data.centred, check=bank.run.check)
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    facts = {"LoRA weights": 0 if towers == "head" else trained}
    remove_checkpoints(folder)
    return {"": (outcome(logits, test.targets, data.taxonomy, data.cuts), facts)}


def _towers_config(head: StageConfig, towers: str) -> FitConfig:
    stage = LORA_STAGE.model_copy(update={"epochs": 0}) if towers == "head" else LORA_STAGE
    return FitConfig(head=head, lora=stage, towers="vision" if towers == "head" else towers)
