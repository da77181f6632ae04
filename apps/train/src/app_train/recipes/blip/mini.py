"""Recipe `blip-mini`: a small hyperbolic BLIP-2 on emoji by two artists, tested on an artist never seen.

    hier train blip-mini                      the Lorentz row, one seed
    hier train blip-mini --seeds 3 --rows euclidean cosine lorentz poincare mix lorentz_max lorentz_whole lorentz_plain
    hier caption runs/blip-mini/seed-0/lorentz PICTURE...
    hier search runs/blip-mini/seed-0/lorentz "a red car" --images DIR
    hier page blip runs/blip-mini docs/results/hyper-blip.md

The defaults are those of the results page's study of one epoch: seven minutes a row and seed on one core. The page names the command
of its longer study. A larger model: --num-layers 6 --num-queries 16 --stage1.epochs 10 --stage2.epochs 3 (some hours).

Frozen EfficientNet-Lite0, a Q-Former that starts from MiniLM, frozen SmolLM2-135M. Random query selection and random text
pruning are crossed for the Lorentz row only: `lorentz` has both, `lorentz_max` no selection, `lorentz_whole` no pruning,
`lorentz_plain` neither.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app_data.read.labelled import Decoding
from app_data.sets.coco import load_coco_mini
from app_data.sets.emoji import load_emoji_captions
from app_data.store.sealed import is_whole, read_sealed, write_sealed
from app_data.weights.blip2 import (
    IMAGE_TOKEN,
    LANGUAGE,
    PROMPT,
    TEXT,
    caption_ids,
    language_tokenizer,
    mini_config,
    mini_model,
    mini_processor,
    text_tokenizer,
)
from app_eval.measure.captions import after_prompt
from app_eval.measure.cells import finished
from app_eval.measure.controls import caption_controls
from app_eval.measure.retrieval import answers, caption_scores, feature_maps, radii, retrieval
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import StageConfig
from app_train.core.errors import RunError
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.core.schedule import Forward, Step
from app_train.recipes.blip.features import Features, caption_of, limited
from app_train.recipes.blip.settings import ROWS, BlipMiniConfig, Temperatures
from app_train.recipes.blip.stage import blip_stage, pretraining_parts
from hyper_blip import (
    HyperBlip2ForConditionalGeneration,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    caption_batch,
    generate_captions,
)
from hyper_blip.gather import mean_of_all
from hyper_blip.losses import IGNORED

# In the recipe the floor of `start_from_pairs` goes with the linear start: OpenMoji left out, 0.02 finds 20 % of its texts and 0.1 17 %.
LINEAR_FLOOR = 0.02


def run(config: BlipMiniConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`.

    Raises:
        RunError: the test artist is one of those to train on.
    """
    if config.test_artist in config.artists:
        raise RunError(f"test_artist {config.test_artist!r} must not be one of artists {config.artists}")
    grows = ("seeds", "rows", "captioned", "coco_mini", "num_captions")
    with Run("blip-mini", config, grows, mixed_precision=config.mixed_precision, unused_parameters=True) as run:
        train, test = (
            limited(load_emoji_captions(artists, size=config.size, cache_dir=config.cache_dir), config.limit)
            for artists in (config.artists, (config.test_artist,))
        )
        run.claim(f"{train.fingerprint}-{test.fingerprint}")
        known = run.result()
        if known is None:
            features = Features(train, test, config, run)
            runs = [
                {row: _Row(config, run, row, seed, features).make() for row in config.rows}
                for seed in range(config.seeds)
            ]
            if not run.main:
                return {}
            controls = features.controls(_Row(config, run, config.rows[0], 0, features).new)
            known = run.finish({"n": len(test), "seeds": config.seeds, "controls": controls, "runs": runs})
            run.seal()
    if run.main:
        print(_table(known["runs"]))  # noqa: T201
        print(f"\npage: hier page blip {config.out} docs/results/hyper-blip.md")  # noqa: T201
    return known


def hyperbolic(
    row: str,
    seed: int = 0,
    losses: Sequence[str] = ("itc", "itm", "lm"),
    temperature: Temperatures = Temperatures(),  # noqa: B008
) -> HyperbolicConfig:
    """The hyperbolic settings of a row; "mix" ends as a distance, and starts at its temperature."""
    settings = ROWS[row]
    tau = temperature.cosine if settings["similarity"] == "cosine" else temperature.distance
    return HyperbolicConfig(**settings, temperature=tau, loss_weights=_weights(losses), seed=seed)


def _weights(losses: Sequence[str]) -> dict[str, float]:
    return {name: float(name in losses) for name in ("itc", "itm", "lm")}


@dataclass(frozen=True)
class _Row:
    """One row with one seed: both stages, then everything the results page shows of it."""

    config: BlipMiniConfig
    run: Run
    name: str
    seed: int
    features: Features

    @property
    def folder(self) -> Path:
        return self.run.out / f"seed-{self.seed}" / self.name

    def make(self) -> dict:
        """The content of its `result.json`, which is read back if it is finished; empty on all processes but the first."""
        facts = self.run.facts(self.name, self.seed, settings=ROWS[self.name])
        known = finished(self.folder, facts)
        captioned = self.config.stage2.epochs > 0 and self.name in self.config.captioned
        told = (self.folder / "stage2").exists() and ("captions" in (known or {}) or not self.config.num_captions)
        if known is not None and (told or not captioned):
            return known
        begun = time.monotonic()
        first = self._first()
        second = self._second(first) if captioned else None
        if not self.run.main:
            return {}
        first.to(self.run.device)
        seconds = round(time.monotonic() - begun)
        result = {"format": 1, **facts, "seconds": seconds, **self._scores(first, second)}
        result = write_sealed(self.folder / "result.json", result, beside=True)
        for stage in ("train-1", "train-2"):
            remove_checkpoints(self.folder / stage)
        return result

    def new(self) -> HyperBlip2ForPretraining:
        """The model before its first stage."""
        config = self.config
        made = mini_config(
            hyperbolic(self.name, self.seed, config.losses, config.temperature), config.num_queries, config.num_layers,
            width=config.width, pool=config.pool, text_locator=TEXT if config.text == "minilm" else "",
        )  # fmt: skip
        made.max_tokens = config.max_tokens
        return mini_model(made, self.seed)

    def _first(self) -> HyperBlip2ForPretraining:
        config, seed, device, done = self.config, self.seed, self.run.device, self.folder / "stage1"
        if is_whole(done):
            return HyperBlip2ForPretraining.from_pretrained(done)
        model = self.new()
        full = model.config.hyperbolic
        train, views = self.features.train, self.features.views(model)
        model.to(device)
        if config.start != "fresh":
            captions = [caption_of(train, i, seed, 0) for i in range(len(train))]
            linear = {"floor": LINEAR_FLOOR, "linear": True} if config.start == "linear" else {}
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # dropout is part of the start
                model.start_from_pairs(views[0].float(), *caption_ids(captions, config.max_tokens), **linear)
            self._score_start(model)
        leaves = torch.from_numpy(train.targets)
        weights = {"stage 1": _weights(config.losses), "matching": _weights(config.losses)}
        if config.match.epochs:
            weights["stage 1"] = _weights(("itc",))

        def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
            model.config.hyperbolic = replace(full, loss_weights=weights[step.stage.rpartition(": ")[2]])
            captions = [caption_of(train, int(i), seed, step.epoch) for i in rows]
            ids, mask = (x.to(device) for x in caption_ids(captions, config.max_tokens))
            maps = self.features.batch(views, rows, seed, step.epoch)
            out = wrapped(
                maps.to(device).float(), ids, mask, image_ids=leaves[rows].to(device), step=step.number,
                progress=1.0 if step.stage.endswith("matching") else step.share,
            )  # fmt: skip
            return out.loss, {**pretraining_parts(out), **out.diagnostics}

        self._fit({"stage 1": config.stage1, "matching": config.match}, model, forward, len(train), 1)
        model.config.hyperbolic = full
        return self._saved(model, done, text_tokenizer())

    def _score_start(self, model: HyperBlip2ForPretraining) -> None:
        """Keep what the least-squares start answers before its first step: the control of the training."""
        path = self.folder / "start.json"
        if not self.run.main:
            return
        test, maps = self.features.test, self.features.maps("test", model).float()
        found = retrieval(model, test, maps, first_only=True, k_test=0, max_tokens=self.config.max_tokens)
        write_sealed(path, {name: found[name] for name in ("itc", "levels", "cosine") if name in found})
        model.train()

    def _second(self, first: HyperBlip2ForPretraining) -> HyperBlip2ForConditionalGeneration:
        config, seed, device, done = self.config, self.seed, self.run.device, self.folder / "stage2"
        if is_whole(done):
            return HyperBlip2ForConditionalGeneration.from_pretrained(done)
        tokenizer = language_tokenizer()
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = HyperBlip2ForConditionalGeneration.from_pretraining(
                first.cpu(), image_token_id=image_token, language_locator=LANGUAGE
            )
        train, views = self.features.train, self.features.views(model)
        model.to(device)

        def texts(rows: Sequence[int] | np.ndarray, epoch: int) -> dict[str, Tensor]:
            said = [after_prompt(caption_of(train, int(i), seed, epoch), PROMPT) for i in rows]
            return caption_batch(
                said, tokenizer, num_queries=model.num_queries, image_token_id=image_token, prompt=PROMPT,
                max_tokens=config.max_tokens,
            )  # fmt: skip

        if config.start != "fresh":
            model.start_from_captions(views[0].float(), texts(range(len(train)), 0)["labels"])

        def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
            batch = {k: v.to(device) for k, v in texts(rows, step.epoch).items()}
            maps = self.features.batch(views, rows, seed, step.epoch)
            # A mean over words, of which processes have unequally many.
            return mean_of_all(wrapped(maps.to(device).float(), **batch).loss, (batch["labels"] != IGNORED).sum()), {}

        self._fit({"stage 2": config.stage2}, model, forward, len(train), 2)
        return self._saved(model, done, tokenizer)

    def _fit(
        self, stages: Mapping[str, StageConfig], model: nn.Module, forward: Forward, num: int, number: int
    ) -> None:
        run, config, label = self.run, self.config, f"{self.name}, seed {self.seed}: "
        made = [
            blip_stage(
                model, label + name, settings, num, forward, self.seed, config.save_every, tau_lr=config.temperature.lr,
                pictures=config.stage2.pictures if name == "stage 2" else None,
            )
            for name, settings in stages.items()
            if settings.epochs or name != "matching"
        ]  # fmt: skip
        fit(
            model, made, self.folder / f"train-{number}", seed=self.seed, label=f"{label}stage {number}", stop=run.stop,
            accelerator=run.accelerator, tensorboard=self.config.tensorboard,
        )  # fmt: skip

    def _saved(self, model: nn.Module, folder: Path, tokenizer: Any) -> nn.Module:
        records = folder.with_name(folder.name.replace("stage", "train-")) / "metrics.jsonl"
        start = self.folder / "start.json"
        with self.run.new_folder(folder, [records, *([start] if start.exists() else [])]) as target:
            if target is not None:
                model.save_pretrained(target)
                mini_processor(tokenizer, self.config.size).save_pretrained(target)
        return model.eval()

    def _scores(self, first: HyperBlip2ForPretraining, second: HyperBlip2ForConditionalGeneration | None) -> dict:
        """Everything the results page shows."""
        config, run = self.config, self.run
        settings = {"k_test": config.k_test if "itm" in config.losses else 0, "max_tokens": config.max_tokens}
        test, maps = self.features.test, self.features.maps("test", first).float()
        ranks = retrieval(first, test, maps, first_only=True, **settings)
        run.check()
        scores: dict[str, Any] = {}
        if config.radius:
            scores["radius"] = radii(first, test, maps, ranks, max_tokens=config.max_tokens)
        del ranks["hits"], ranks["max_softmax"]
        scores["retrieval"] = ranks
        if (self.folder / "start.json").exists():
            scores["start"] = read_sealed(self.folder / "start.json")
        run.check()
        if config.coco_mini is not None:
            coco = load_coco_mini(config.coco_mini, Decoding(size=config.size, cache_dir=config.cache_dir))
            pixels = feature_maps(first, coco.batch(range(len(coco))))
            zero = retrieval(first, coco, pixels, first_only=False, **settings)
            scores["coco_mini"] = {k: zero[k] for k in ("n_images", "n_texts", "itc", "itm") if k in zero}
            run.check()
        if second is not None and config.num_captions:
            rows = np.linspace(0, len(test) - 1, min(config.num_captions, len(test))).round().astype(int).tolist()
            said = generate_captions(
                second, maps[rows], language_tokenizer(), prompt=PROMPT, num_beams=3, min_new_tokens=2,
                max_new_tokens=config.max_tokens,
            )  # fmt: skip
            captions = [f"{PROMPT} {text}" for text in said]
            controls = caption_controls(
                self.features.train, self.features.maps("train", second), maps[rows], captions, PROMPT
            )
            found = caption_scores(test, captions, rows, prompt=PROMPT, controls=controls)
            scores["captions"] = {"n": len(rows), **found}
            scores["samples"] = [
                {"id": str(test.ids[i]), "caption": c, "reference": test.captions[i][0]}
                for i, c in list(zip(rows, captions, strict=True))[:12]
            ]
        return scores


def _table(runs: list[dict]) -> str:
    lines = [f"{'row':<16}{'TR@1':>8}{'TR@5':>8}{'IR@1':>8}{'IR@5':>8}{'group TR@1':>12}{'CIDEr':>8}   (seed 0)"]
    for row, found in runs[0].items():
        itm, group = answers(found["retrieval"]), found["retrieval"]["levels"]["group"]
        cider = found.get("captions", {}).get("cider")
        cells = [itm["txt_r1"], itm["txt_r5"], itm["img_r1"], itm["img_r5"]]
        lines.append(
            f"{row:<16}" + "".join(f"{c:8.1f}" for c in cells) + f"{group['txt_r1']:12.1f}"
            + ("     not run" if cider is None else f"{cider:8.3f}")
        )  # fmt: skip
    return "\n".join(lines)
