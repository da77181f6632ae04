"""Recipe `chest`: ChestX-ray14 with CLIP, several findings a picture, coherent in a tree (Giunchiglia and Lukasiewicz, 2020).

    python apps/train chest --data CXR14

Estimated, not measured: 78,000 training radiographs, LoRA of rank 16 on both towers of ViT-B/32, 23 nodes: 6 GB of GPU memory
and half an hour for three epochs on one 24 GB GPU at 150 radiographs a second (decoding them once takes an hour of 8 cores).
"""

import json
from pathlib import Path

import torch
from pydantic import Field

from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet
from app_data.sets.chest import load_chest_xray14
from app_eval.measure.embed import node_logits
from app_eval.measure.results import write_json
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import Frozen, StageConfig, claim_folder, config_hash
from app_train.core.errors import RunError
from app_train.core.interrupt import StopFlag
from app_train.recipes.lora.loop import fit
from app_train.recipes.lora.objective import MultiLabelLoss
from app_train.recipes.lora.papers import ClipFit
from app_train.recipes.lora.rows import load_base, make_accelerator
from hier_lora import HierLoraCLIP, PromptSet, lora_config
from hier_losses import LabelGraph, Taxonomy
from hier_losses.functional import mcm
from hier_losses.metrics import node_auroc, violation_rate


class ChestFit(ClipFit):
    """Three epochs of LoRA."""

    lora: StageConfig = StageConfig(epochs=3, lr=2e-4, batch_size=64, weight_decay=0.01)
    """The LoRA layers, on the pictures."""


class ChestConfig(Frozen):
    """ChestX-ray14 (Wang et al., 2017): 14 findings under a tree of our own, several to a picture."""

    data: Path | None = None
    """Folder of the release (required)."""
    out: Path = Path("runs/chest")
    """Run folder; the same command goes on from what it holds."""
    model: str = "hf:openai/clip-vit-base-patch32"
    """Locator of the base model."""
    template: str = "a chest x-ray showing {}."
    """Prompt for each node."""
    size: int = Field(224, ge=32)
    """Height and width of the decoded pictures in pixels."""
    fit: ChestFit = ChestFit()
    loss: MultiLabelLoss = MultiLabelLoss()
    seed: int = Field(0, ge=0)
    """Seed of the order of the data and of the LoRA layers."""
    cache_dir: Path | None = None
    """Where decoded pictures are kept; the user's cache folder if not given."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


def run(config: ChestConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.data is None:
        raise RunError("--data is missing: name the folder of the release")
    accelerator = make_accelerator(config.fit)
    with StopFlag() as stop:
        parts = load_chest_xray14(config.data, Decoding(size=config.size, cache_dir=config.cache_dir))
        train, val, test = (parts[part] for part in ("train", "val", "test"))
        if not len(train) or not len(test):
            raise RunError(
                f"the lists name {len(train)} pictures to train and {len(test)} to test on: both must have some"
            )
        if accelerator.is_main_process:
            claim_folder(config.out, config, train.fingerprint)
        accelerator.wait_for_everyone()
        done = config.out / "result.json"
        if done.exists():
            return json.loads(done.read_text(encoding="utf-8"))
        model = _model(config, train).to(accelerator.device)
        before = _scores(model, test) if accelerator.is_main_process else {}
        stages = config.fit.model_copy(update={"head": config.fit.head.model_copy(update={"epochs": 0})})
        fit(
            model, train, None, config.loss, stages, config.out / "trained",
            seed=config.seed, stop=stop, accelerator=accelerator, label="chest", tensorboard=config.tensorboard,
        )  # fmt: skip
        if not accelerator.is_main_process:
            return {}
        if len(val):
            model.calibrate(node_logits(model, val, label="calibrating"), torch.from_numpy(val.targets))
        model.save_pretrained(config.out / "trained" / "adapter")
        result = {
            "format": 1, "recipe": "chest", "data": train.fingerprint, "n": len(test), "seed": config.seed,
            "config": config_hash(config), "zero_shot": before, "trained": _scores(model, test),
        }  # fmt: skip
        write_json(done, result)
        remove_checkpoints(config.out / "trained")
        print(json.dumps({k: result[k]["mean AUROC"] for k in ("zero_shot", "trained")}, indent=1))  # noqa: T201
        return result


def _model(config: ChestConfig, train: PictureSet) -> HierLoraCLIP:
    graph = LabelGraph.from_taxonomy(train.taxonomy)
    base = load_base(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        towers = config.fit.towers
        lora = lora_config(base, towers=towers, r=config.fit.rank, lora_alpha=config.fit.lora_alpha)
        prompts = PromptSet(graph, (config.template,), names=train.node_text)
        text = "cached" if towers == "vision" else "chunked"
        model = HierLoraCLIP(base, graph, lora, text, prompts=prompts, train_logit_scale=True, train_logit_bias=True)
    # Cosines of CLIP times its scale lie near 25: without an offset every label would start as certain.
    first = node_logits(model, train.select(range(min(64, len(train)))), label="first logits")
    share = float(train.targets.mean().clip(1e-3, 1 - 1e-3))
    with torch.no_grad():
        model.logit_bias.copy_(torch.logit(torch.tensor(share)) - first.mean())
    return model


def _scores(model: HierLoraCLIP, test: PictureSet) -> dict:
    """AUROC of every node after the max constraint, and how often a child outscores its parent before it."""
    tax: Taxonomy = test.taxonomy
    logits = node_logits(model, test)
    hot = torch.from_numpy(test.targets)
    area = node_auroc(mcm(logits, tax), hot, tax, average="none")
    known = {tax.names[v]: round(float(a), 6) for v, a in enumerate(area) if not torch.isnan(a)}
    mean = sum(known.values()) / len(known) if known else None
    return {"AUROC": known, "mean AUROC": mean, "violation rate": float(violation_rate(logits, tax))}
