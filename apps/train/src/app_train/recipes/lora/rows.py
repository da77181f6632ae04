"""What every recipe does for one row: build the model, train it, save the adapter, score the test pictures."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from app_data.read.pictures import PictureSet
from app_eval.measure.embed import node_logits, prepare, run_batches
from app_eval.measure.paths import outcome
from app_eval.measure.results import save_row
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import FitConfig, LossConfig
from app_train.core.errors import Interrupted, RunError
from app_train.core.interrupt import StopFlag
from app_train.recipes.lora.loop import fit
from hier_lora import HierLoraCLIP, PromptSet, load_dual_encoder, lora_config
from hier_losses import Taxonomy
from hier_losses.treecuts import TreeCuts, count_cuts, cut_at, sample_cuts


@dataclass(frozen=True)
class Bench:
    """What all rows of a run share.

    Attributes:
        base: the pretrained model; every row works on a copy.
        train, test: the pictures; the test pictures are used for the final scores only.
        features: frozen-tower features of the training pictures, (n, d); None if the base has no separate head.
        offsets: what was taken off the features of each training picture, (n, d), so that every style has the same mean;
            None if nothing was.
        cuts: the tree cuts of MTA.
        template: the prompt, with `{}` for the node's text.
        stop: the signal flag.
        accelerator: device, precision, processes.
        tensorboard: also write TensorBoard events.
        centred: centre the training pictures of every style on the common mean, and the test pictures on their own mean
            when scoring (see `app_eval.measure.embed.node_logits`).
        text: text mode of the trained model; cached without LoRA on the text tower and live with it if None.
        val: pictures that calibrate the probabilities of the trained model; None leaves them uncalibrated.
    """

    base: nn.Module
    train: PictureSet
    test: PictureSet
    features: Tensor | None
    cuts: TreeCuts
    template: str
    stop: StopFlag
    accelerator: Accelerator
    tensorboard: bool = False
    centred: bool = False
    text: str | None = None
    val: PictureSet | None = None
    offsets: Tensor | None = None

    def with_features(self, features: Tensor | None) -> "Bench":
        """The same bench with the frozen features filled in, centred style by style if the bench is."""
        if features is None or not self.centred:
            return replace(self, features=features)
        offsets = style_offsets(features, self.train.styles)
        return replace(self, features=features - offsets, offsets=offsets)

    def check(self) -> None:
        """Leave if a signal has come: nothing is lost outside training."""
        if self.stop.exit_status is not None:
            raise Interrupted(self.stop.exit_status)


def style_offsets(features: Tensor, styles: Sequence[str]) -> Tensor:
    """How far the mean of each picture's style lies from the mean of all, (n, d)."""
    mean = features.mean(0)
    offsets = torch.empty_like(features)
    for style in sorted(set(styles)):
        chosen = torch.tensor([s == style for s in styles])
        offsets[chosen] = features[chosen].mean(0) - mean
    return offsets


def make_accelerator(config: FitConfig) -> Accelerator:
    """Device, precision and processes; without a GPU, several processes of `torchrun` talk through gloo."""
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision)


def cuts_for(tax: Taxonomy) -> TreeCuts:
    """25 tree cuts at five rates (ProTeCt: Wu et al., 2024), or all cuts of a tree that has no more than that."""
    num = count_cuts(tax)
    return sample_cuts(tax) if num > 25 else TreeCuts(tax, [cut_at(tax, index) for index in range(num)])


def build_model(bench: Bench, config: FitConfig | None, seed: int) -> HierLoraCLIP:
    """The zero-shot model, with LoRA layers if `config` is given; the centre of the pictures is that of the training pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = copy.deepcopy(bench.base).cpu()
        if bench.features is not None:
            base.center_images(bench.features)
        lora = None
        if config is not None:
            lora = lora_config(base, towers=config.towers, r=config.rank, lora_alpha=config.lora_alpha)
        prompts = PromptSet(bench.train.taxonomy, templates=(bench.template,), names=bench.train.node_text or None)
        text = "cached" if config is None or config.towers == "vision" else "live"
        if config is not None and bench.text is not None:
            text = bench.text
        model = HierLoraCLIP(
            base,
            bench.train.taxonomy,
            lora,
            text,
            prompts=prompts,
            train_logit_scale=config is not None,
            center_text=bench.features is not None,
        )
    return model.to(bench.accelerator.device, memory_format=torch.channels_last)


def load_base(locator: str) -> nn.Module:
    """The pretrained model behind a locator.

    Raises:
        RunError: if the locator is unknown, or its weights cannot be found.
    """
    try:
        return load_dual_encoder(locator)
    except ValueError as error:
        raise RunError(str(error)) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"the weights of {locator} cannot be loaded: {reason}") from error


def has_head(base: nn.Module) -> bool:
    """Whether the model has an image head apart from its tower, which the first stage can train on cached features."""
    return all(hasattr(base, name) for name in ("vision", "project", "center_images"))


def frozen_features(bench: Bench, data: PictureSet, label: str) -> Tensor | None:
    """Features of the frozen picture tower, before the projection, (n, d); None for a model without a separate head."""
    if not has_head(bench.base):
        return None
    device = bench.accelerator.device
    base = bench.base.to(device, memory_format=torch.channels_last).eval()
    return run_batches(data, lambda x: base.vision(prepare(base, x).to(device)), label, bench.check)


def train_row(
    bench: Bench, name: str, loss: LossConfig, config: FitConfig, folder: Path, seed: int, facts: dict
) -> dict:
    """Train, save and score one row; a finished row is read back instead.

    Returns:
        The content of its `result.json`.
    """
    known = finished(folder, facts)
    if known is not None:
        return known
    if (folder / "adapter").exists():  # killed while scoring: the trained model is there, whole
        model = HierLoraCLIP.from_pretrained(folder / "adapter", copy.deepcopy(bench.base).cpu())
        model.to(bench.accelerator.device, memory_format=torch.channels_last)
    else:
        model = _train(bench, name, loss, config, folder, seed)
    result = {}
    if bench.accelerator.is_main_process:
        result = score_row(bench, model, folder, seed=seed, facts=facts)
        remove_checkpoints(folder)
    bench.accelerator.wait_for_everyone()
    return result


def _train(bench: Bench, name: str, loss: LossConfig, config: FitConfig, folder: Path, seed: int) -> HierLoraCLIP:
    if bench.features is None:
        config = config.model_copy(update={"head": config.head.model_copy(update={"epochs": 0})})
    model = build_model(bench, config, seed)
    fit(
        model, bench.train, bench.features, loss, config, folder, offsets=bench.offsets,
        seed=seed, stop=bench.stop, accelerator=bench.accelerator, label=f"{name}, seed {seed}", tensorboard=bench.tensorboard,
    )  # fmt: skip
    if bench.accelerator.is_main_process:
        if bench.val is not None and len(bench.val):
            held_out = node_logits(model, bench.val, centred=bench.centred, label="calibrating", check=bench.check)
            model.calibrate(held_out, torch.from_numpy(bench.val.targets))
        unfinished = folder / "adapter.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        os.replace(unfinished, folder / "adapter")
    bench.accelerator.wait_for_everyone()
    return model


def score_row(bench: Bench, model: HierLoraCLIP, folder: Path, *, seed: int, facts: dict) -> dict:
    """Score a model on the test pictures and store the result."""
    logits = node_logits(model, bench.test, centred=bench.centred, label="scoring the test pictures", check=bench.check)
    found = outcome(logits, bench.test.targets, bench.test.taxonomy, bench.cuts)
    return save_row(folder, found, bench.test.taxonomy, bench.cuts, seed=seed, **facts)


def finished(folder: Path, facts: dict) -> dict | None:
    """The stored result of a finished row; None if it is not finished.

    Raises:
        RunError: if the file is damaged or belongs to other settings.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged; delete it to score this row again") from error
    different = sorted(k for k, v in facts.items() if result.get(k) != v)
    if different:
        raise RunError(
            f"{path} belongs to another run ({', '.join(different)} differ); choose another folder with --out"
        )
    return result
