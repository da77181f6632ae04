"""Recipe `chest`: ChestX-ray14 with CLIP, several findings a picture, coherent in a tree (Giunchiglia and Lukasiewicz, 2020).

    hier train chest --data CXR14

Estimated, not measured: 78,000 training radiographs, LoRA of rank 16 on both towers of ViT-B/32, 23 nodes: 6 GB of GPU memory
and half an hour for three epochs on one 24 GB GPU at 150 radiographs a second (decoding them once takes an hour of 8 cores).
"""

import torch

from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet
from app_data.sets.chest import load_chest_xray14
from app_data.store.atomic import new_folder
from app_eval.measure.embed import node_logits
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.errors import RunError
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.recipes.lora.objective import Objective, stages
from app_train.recipes.lora.settings import ChestConfig
from app_train.recipes.lora.task import check_template, load_base
from hier_lora import HierLoraCLIP, PromptSet, lora_config
from hier_losses import LabelGraph, Taxonomy
from hier_losses.functional import mcm
from hier_losses.metrics import node_auroc, violation_rate


def run(config: ChestConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.data is None:
        raise RunError("--data is missing: name the folder of the release")
    check_template(config.template)
    with Run("chest", config, mixed_precision=config.fit.mixed_precision) as run:
        parts = load_chest_xray14(config.data, Decoding(size=config.size, cache_dir=config.cache_dir))
        train, val, test = (parts[part] for part in ("train", "val", "test"))
        if not len(train) or not len(test):
            raise RunError(
                f"the lists name {len(train)} pictures to train and {len(test)} to test on: both must have some"
            )
        run.claim(train.fingerprint)
        if (known := run.result()) is not None:
            return known
        model = _model(config, train).to(run.device)
        before = _scores(model, test) if run.main else {}
        fit(
            Objective(model, config.loss), stages(model, train, None, config.fit, save_every=config.save_every),
            config.out / "trained", seed=config.seed, label="chest", stop=run.stop, accelerator=run.accelerator,
            tensorboard=config.tensorboard,
        )  # fmt: skip
        if not run.main:
            return {}
        if len(val):
            model.calibrate(node_logits(model, val, label="calibrating"), torch.from_numpy(val.targets))
        with new_folder(config.out / "trained" / "adapter") as target:
            model.save_pretrained(target)
        scores = {"zero_shot": before, "trained": _scores(model, test)}
        result = run.finish({"n": len(test), "seed": config.seed, **scores})
        remove_checkpoints(config.out / "trained")
        run.seal()
        print({name: value["mean AUROC"] for name, value in scores.items()})  # noqa: T201
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
