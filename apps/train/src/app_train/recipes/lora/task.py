"""What every recipe of this folder does for one row: build the model, train it, save the adapter, score the test pictures."""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from app_data.read.pictures import PictureSet
from app_data.store.sealed import check_sealed, is_whole
from app_eval.measure.cells import finished
from app_eval.measure.embed import embedding, node_logits, prepare, tower_features
from app_eval.measure.paths import outcome
from app_eval.measure.results import save_outcome, save_row, summarise
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.errors import RunError
from app_train.core.fit import check_finite, fit
from app_train.core.run_folder import Run
from app_train.recipes.lora.classifiers import Prompts
from app_train.recipes.lora.losses import LossConfig
from app_train.recipes.lora.objective import Objective, stages
from app_train.recipes.lora.settings import FitConfig
from hier_lora import HierLoraCLIP, LinearHead, PromptSet, load_dual_encoder, lora_config
from hier_losses import Taxonomy
from hier_losses.treecuts import TreeCuts, count_cuts, cut_at, sample_cuts

PROBE = 16  # pictures that time a step
LEAST_HELD_OUT = 20  # pictures; fewer leave a temperature to chance


@dataclass(frozen=True)
class Task:
    """What all rows of a run share.

    Attributes:
        run: the run folder and its processes.
        base: the pretrained model; every row works on a copy.
        train, test: the pictures; the test pictures are used for the final scores only.
        cuts: the tree cuts of MTA.
        template: the prompt, with `{}` for the node's text.
        features: frozen-tower features of the training pictures, (n, d); None if the base has no separate head.
        offsets: what was taken off the features of each training picture, (n, d), so that every style has the same mean;
            None if nothing was.
        centred: centre the training pictures of every style on the common mean, and the test pictures on their own mean
            when scoring (see `app_eval.measure.embed.node_logits`).
        text: text mode of the trained model; cached without LoRA on the text tower and live with it if None.
        val: pictures that calibrate the probabilities of the trained model; None leaves them uncalibrated.
        start: adapter of a finished run to train on from; None starts at the pretrained model.
    """

    run: Run
    base: nn.Module
    train: PictureSet
    test: PictureSet
    cuts: TreeCuts
    template: str
    features: Tensor | None = None
    offsets: Tensor | None = None
    centred: bool = False
    text: str | None = None
    val: PictureSet | None = None
    start: Path | None = None

    def with_features(self) -> "Task":
        """The same task with the frozen features filled in, centred style by style if the task is."""
        features = frozen_features(self, self.train, "frozen features of the training pictures")
        if features is None or not self.centred:
            return replace(self, features=features)
        offsets = style_offsets(features, self.train.styles)
        return replace(self, features=features - offsets, offsets=offsets)


def style_offsets(features: Tensor, styles: Sequence[str]) -> Tensor:
    """How far the mean of each picture's style lies from the mean of all, (n, d)."""
    mean = features.mean(0)
    offsets = torch.empty_like(features)
    for style in sorted(set(styles)):
        chosen = torch.tensor([s == style for s in styles])
        offsets[chosen] = features[chosen].mean(0) - mean
    return offsets


def cuts_for(tax: Taxonomy) -> TreeCuts:
    """25 tree cuts at five rates (ProTeCt: Wu et al., 2024), or all cuts of a tree that has no more than that."""
    num = count_cuts(tax)
    return sample_cuts(tax) if num > 25 else TreeCuts(tax, [cut_at(tax, index) for index in range(num)])


def load_base(locator: str) -> nn.Module:
    """The pretrained model behind a locator.

    Raises:
        RunError: if the locator is unknown, or its weights cannot be found or are not finite.
    """
    try:
        base = load_dual_encoder(locator)
    except (ValueError, RuntimeError) as error:
        raise RunError(f"--model {locator}: {' '.join(str(error).split())}") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"the weights of {locator} cannot be loaded: {reason}") from error
    check_finite(base, locator)
    return base


def check_template(template: str) -> str:
    """The prompt, if it has one place for the name of a node.

    Raises:
        RunError: if it has not.
    """
    if template.count("{}") != 1 or template.replace("{}", "").count("{"):
        raise RunError(f"--template must hold {{}} once, where the name of a node goes, got {template!r}")
    return template


def has_head(base: nn.Module) -> bool:
    """Whether the model has an image head apart from its tower, which the first stage can train on cached features."""
    return all(hasattr(base, name) for name in ("vision", "project", "center_images"))


def frozen_features(task: Task, data: PictureSet, label: str) -> Tensor | None:
    """Features of the frozen picture tower, before the projection, (n, d); None for a model without a separate head."""
    if not has_head(task.base):
        return None
    base = task.base.to(task.run.device, memory_format=torch.channels_last)
    return tower_features(base, data, label, task.run.config.cache_dir, task.run.check)


def build_model(task: Task, config: FitConfig | None, seed: int) -> HierLoraCLIP:
    """The zero-shot model, with LoRA layers if `config` is given; the centre of the pictures is that of the training pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = copy.deepcopy(task.base).cpu()
        if task.features is not None:
            base.center_images(task.features)
        lora = None
        if config is not None:
            lora = lora_config(base, towers=config.towers, r=config.rank, lora_alpha=config.lora_alpha)
        prompts = PromptSet(task.train.taxonomy, templates=(task.template,), names=task.train.node_text or None)
        text = "cached" if config is None or config.towers == "vision" else "live"
        if config is not None and task.text is not None:
            text = task.text
        model = HierLoraCLIP(
            base,
            task.train.taxonomy,
            lora,
            text,
            prompts=prompts,
            train_logit_scale=config is not None,
            center_text=task.features is not None,
            picture_size=task.train.store.shape[1],
        )
    return model.to(task.run.device, memory_format=torch.channels_last)


def warm_model(task: Task) -> HierLoraCLIP:
    """The model of `task.start`, brought to the taxonomy of the training pictures; new classes start at their words.

    Raises:
        RunError: the adapter cannot be read, or belongs to another base model.
    """
    tax = task.train.taxonomy
    base = copy.deepcopy(task.base).cpu()
    check_sealed(task.start)
    try:
        locator = json.loads((task.start / "hier_lora.json").read_text(encoding="utf-8"))["locator"]
        if locator != base.locator:
            raise RunError(f"--from-run {task.start} adapts {locator}: give --model {locator}")
        model = HierLoraCLIP.from_pretrained(task.start, base, trainable=True)
        words = dict(zip(map(tax.path_of, range(tax.num_nodes)), task.train.node_text, strict=False))
        model.update_taxonomy(tax, words)
    except (ValueError, KeyError, OSError) as error:
        raise RunError(f"--from-run {task.start} cannot be used: {error}") from error
    model.temperature, model.picture_size = None, task.train.store.shape[1]
    return model.to(task.run.device, memory_format=torch.channels_last)


def prompts_of(task: Task) -> Prompts:
    """The prompts of the task as an expert on frozen features."""
    base, tax = copy.deepcopy(task.base).cpu(), task.train.taxonomy
    prompts = PromptSet(tax, templates=(task.template,), names=task.train.node_text or None)
    model = HierLoraCLIP(base, tax, prompts=prompts, center_text=has_head(base))
    head = LinearHead.from_prompts(tax, model.node_features.detach(), float(base.logit_scale.detach().exp()))
    return Prompts(head.eval(), embedding(base))


def zero_shot_row(task: Task, folder: Path, seed: int, facts: dict) -> dict:
    """Score the model as it is; a finished row is read back instead."""
    return finished(folder, facts) or score_row(task, build_model(task, None, seed), folder, facts)


def train_row(task: Task, name: str, loss: LossConfig, config: FitConfig, folder: Path, seed: int, facts: dict) -> dict:
    """Train, save and score one row; a finished row is read back instead.

    Returns:
        The content of its `result.json`; empty on all processes but the first.
    """
    if (known := finished(folder, facts)) is not None:
        return known
    if is_whole(folder / "adapter"):  # killed while scoring: the trained model is there, whole
        model = HierLoraCLIP.from_pretrained(folder / "adapter", copy.deepcopy(task.base).cpu())
        model.to(task.run.device, memory_format=torch.channels_last)
    else:
        model = _train(task, f"{name}, seed {seed}", loss, config, folder, seed)
    result = {}
    if task.run.main:
        result = score_row(task, model, folder, facts)
        remove_checkpoints(folder)
    task.run.wait()
    return result


def _train(task: Task, label: str, loss: LossConfig, config: FitConfig, folder: Path, seed: int) -> HierLoraCLIP:
    model, run = build_model(task, config, seed) if task.start is None else warm_model(task), task.run
    plan = stages(
        model, task.train, task.features, config, offsets=task.offsets, seed=seed, save_every=run.config.save_every
    )
    fit(
        Objective(model, loss).to(run.device), plan, folder,
        seed=seed, label=label, stop=run.stop, accelerator=run.accelerator, tensorboard=run.config.tensorboard,
    )  # fmt: skip
    with run.new_folder(folder / "adapter", [folder / "metrics.jsonl"]) as target:
        if target is not None:
            done = False
            if task.val is not None and len(task.val) >= LEAST_HELD_OUT:
                held_out = node_logits(model, task.val, centred=task.centred, label="calibrating", check=run.check)
                done = model.calibrate(held_out, torch.from_numpy(task.val.targets))
            if task.val is not None and not done:
                print(f"{label}: not calibrated, {len(task.val)} held-out pictures say too little")  # noqa: T201
            model.save_pretrained(target)
    return model


def say_time(task: Task, config: FitConfig) -> None:
    """Print how long the LoRA stage will take, from one step on a few pictures."""
    few = min(PROBE, config.lora.batch_size, len(task.train))
    count = -(-len(task.train) // config.lora.batch_size) * config.lora.epochs
    if not task.run.main or not count:
        return
    model = build_model(task, config, 0).train()
    pixels = prepare(model.dual_encoder, task.train.batch(range(few))).to(task.run.device)
    start = time.perf_counter()
    model(pixels, torch.from_numpy(task.train.targets[:few]).to(task.run.device)).logsumexp(1).sum().backward()
    if pixels.is_cuda:
        torch.cuda.synchronize()
    each = (time.perf_counter() - start) / few / task.run.accelerator.num_processes
    minutes = each * len(task.train) * config.lora.epochs / 60
    print(f"LoRA: {count} steps, about {max(1, round(minutes))} minutes, scoring not counted")  # noqa: T201


def score_row(task: Task, model: HierLoraCLIP, folder: Path, facts: dict) -> dict:
    """Score a model on the test pictures and store the result."""
    logits = node_logits(
        model, task.test, centred=task.centred, label="scoring the test pictures", check=task.run.check
    )
    return store_row(task, logits, folder, facts)


def store_row(
    task: Task,
    logits: Tensor,
    folder: Path,
    facts: dict,
    *,
    single: Tensor | None = None,
    chosen: str | None = None,
    **more: object,
) -> dict:
    """Score the logits of the test pictures, (n, N), and store the result.

    Args:
        task: test pictures and tree cuts.
        logits: of the test pictures, centred on their own mean where the task is.
        folder: of the row.
        facts: what identifies the row.
        single: the same without knowing the other test pictures: centred on the training mean.
        chosen: a decoder that was chosen for this row.
        more: further facts to keep.
    """
    tax = task.test.taxonomy
    if single is not None:
        alone = outcome(single, task.test.targets, tax, task.cuts, chosen)
        save_outcome(folder / "single", alone)
        more["single"] = summarise(alone, tax)
    scored = outcome(logits, task.test.targets, tax, task.cuts, chosen)
    return save_row(folder, scored, tax, task.cuts, **facts, **more)
