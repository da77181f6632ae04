"""Recipe `blip-mini`: a small hyperbolic BLIP-2 on emoji by two artists, tested on an artist never seen.

    hier train blip-mini                      the Lorentz row, one seed
    hier train blip-mini --seeds 3 --rows euclidean cosine lorentz poincare mix lorentz_max lorentz_whole lorentz_plain
    hier caption runs/blip-mini/seed-0/lorentz PICTURE...
    hier search runs/blip-mini/seed-0/lorentz "a red car" --images DIR
    hier page blip runs/blip-mini docs/results/hyper-blip.md

The defaults are those of the results page: seven minutes a row and seed on one core. A larger one: --num-layers 6
--num-queries 16 --stage1.epochs 10 --stage2.epochs 3 (some hours).

Frozen EfficientNet-Lite0, a Q-Former that starts from MiniLM, frozen SmolLM2-135M. Random query selection and random text
pruning are crossed for the Lorentz row only: `lorentz` has both, `lorentz_max` no selection, `lorentz_whole` no pruning,
`lorentz_plain` neither.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app_data.read.labelled import Decoding
from app_data.sets.captions import CaptionSet
from app_data.sets.coco import load_coco_mini
from app_data.sets.emoji import load_emoji_captions
from app_data.store.sealed import is_whole, write_sealed
from app_data.weights.blip2 import (
    IMAGE_TOKEN,
    LANGUAGE,
    PROMPT,
    caption_ids,
    language_tokenizer,
    mini_config,
    mini_model,
    mini_processor,
    text_tokenizer,
)
from app_eval.measure.retrieval import answers, caption_scores, feature_maps, radii, retrieval
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import StageConfig
from app_train.core.fit import fit
from app_train.core.run_folder import Run, finished
from app_train.core.schedule import Forward, Step
from app_train.recipes.blip.settings import ROWS, BlipMiniConfig
from app_train.recipes.blip.stage import blip_stage, pretraining_parts
from hyper_blip import (
    HyperBlip2ForConditionalGeneration,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    caption_batch,
    generate_captions,
)

TEST_ARTIST = "twemoji"


def run(config: BlipMiniConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    grows = ("seeds", "rows", "coco_mini", "num_captions")
    with Run("blip-mini", config, grows, mixed_precision=config.mixed_precision, unused_parameters=True) as run:
        train = _limited(
            load_emoji_captions(config.artists, size=config.size, cache_dir=config.cache_dir), config.limit
        )
        test = _limited(load_emoji_captions((TEST_ARTIST,), size=config.size, cache_dir=config.cache_dir), config.limit)
        run.claim(f"{train.fingerprint}-{test.fingerprint}")
        known = run.result()
        if known is None:
            features = _Features(train, test, run)
            runs = [
                {row: _Row(config, run, row, seed, features).make() for row in config.rows}
                for seed in range(config.seeds)
            ]
            if not run.main:
                return {}
            known = run.finish({"n": len(test), "seeds": config.seeds, "runs": runs})
            run.seal()
    if run.main:
        print(_table(known["runs"]))  # noqa: T201
        print(f"\npage: hier page blip {config.out} docs/results/hyper-blip.md")  # noqa: T201
    return known


def hyperbolic(row: str, seed: int = 0, losses: Sequence[str] = ("itc", "itm", "lm")) -> HyperbolicConfig:
    """The hyperbolic settings of a row."""
    weights = {name: float(name in losses) for name in ("itc", "itm", "lm")}
    return HyperbolicConfig(**ROWS[row], loss_weights=weights, seed=seed)


def _limited(data: CaptionSet, limit: int | None) -> CaptionSet:
    if limit is None:
        return data
    leaves = data.taxonomy.leaf.numpy()
    kept = leaves[np.linspace(0, len(leaves) - 1, min(limit, len(leaves))).round().astype(int)]
    return data.select(np.isin(data.targets, kept))


class _Features:
    """Both sets with their frozen features, computed once for all rows and seeds; half precision halves their memory."""

    def __init__(self, train: CaptionSet, test: CaptionSet, run: Run) -> None:
        self.train, self.test, self._run = train, test, run
        self._found: dict[str, Tensor] = {}

    def maps(self, name: str, model: nn.Module) -> Tensor:
        """Feature maps of the set `name`, "train" or "test"."""
        if name not in self._found:
            data = getattr(self, name)
            model.to(self._run.device)
            self._found[name] = feature_maps(model, data.batch(range(len(data)))).half()
        return self._found[name]


def _caption_of(data: CaptionSet, row: int, seed: int, epoch: int) -> str:
    """One of a picture's captions, by chance: a pure function of the arguments."""
    captions = data.captions[row]
    return captions[int(np.random.default_rng([seed, epoch, row]).integers(len(captions)))]


@dataclass(frozen=True)
class _Row:
    """One row with one seed: both stages, then everything the results page shows of it."""

    config: BlipMiniConfig
    run: Run
    name: str
    seed: int
    features: _Features

    @property
    def folder(self) -> Path:
        return self.run.out / f"seed-{self.seed}" / self.name

    def make(self) -> dict:
        """The content of its `result.json`, which is read back if it is finished; empty on all processes but the first."""
        facts = self.run.facts(self.name, self.seed, settings=ROWS[self.name])
        known = finished(self.folder, facts)
        if known is not None:
            return known
        begun = time.monotonic()
        first = self._first()
        second = self._second(first) if self.config.stage2.epochs else None
        if not self.run.main:
            return {}
        first.to(self.run.device)
        seconds = round(time.monotonic() - begun)
        result = {"format": 1, **facts, "seconds": seconds, **self._scores(first, second)}
        result = write_sealed(self.folder / "result.json", result, beside=True)
        for stage in ("train-1", "train-2"):
            remove_checkpoints(self.folder / stage)
        return result

    def _first(self) -> HyperBlip2ForPretraining:
        config, seed, device, done = self.config, self.seed, self.run.device, self.folder / "stage1"
        if is_whole(done):
            return HyperBlip2ForPretraining.from_pretrained(done)
        made = mini_config(hyperbolic(self.name, seed, config.losses), config.num_queries, config.num_layers)
        made.max_tokens = config.max_tokens
        model = mini_model(made, seed)
        train, maps = self.features.train, self.features.maps("train", model)
        model.to(device)
        if config.start == "pairs":
            captions = [_caption_of(train, i, seed, 0) for i in range(len(train))]
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # dropout is part of the start
                model.start_from_pairs(maps.float(), *caption_ids(captions, config.max_tokens))
        leaves = torch.from_numpy(train.targets)

        def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
            captions = [_caption_of(train, int(i), seed, step.epoch) for i in rows]
            ids, mask = (x.to(device) for x in caption_ids(captions, config.max_tokens))
            out = wrapped(
                maps[rows].to(device).float(), ids, mask, image_ids=leaves[rows].to(device), step=step.number,
                progress=step.share,
            )  # fmt: skip
            return out.loss, {**pretraining_parts(out), **out.diagnostics}

        self._fit(config.stage1, model, forward, len(train), 1)
        return self._saved(model, done, text_tokenizer())

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
        train, maps = self.features.train, self.features.maps("train", model)
        model.to(device)

        def texts(rows: Sequence[int] | np.ndarray, epoch: int) -> dict[str, Tensor]:
            return caption_batch(
                [_caption_of(train, int(i), seed, epoch).removeprefix(f"{PROMPT} ") for i in rows],
                tokenizer,
                num_queries=model.num_queries,
                image_token_id=image_token,
                prompt=PROMPT,
                max_tokens=config.max_tokens,
            )

        if config.start == "pairs":
            model.start_from_captions(maps.float(), texts(range(len(train)), 0)["labels"])

        def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
            batch = {k: v.to(device) for k, v in texts(rows, step.epoch).items()}
            return wrapped(maps[rows].to(device).float(), **batch).loss, {}

        self._fit(config.stage2, model, forward, len(train), 2)
        return self._saved(model, done, tokenizer)

    def _fit(self, settings: StageConfig, model: nn.Module, forward: Forward, num: int, number: int) -> None:
        run, label = self.run, f"{self.name}, seed {self.seed}: stage {number}"
        stage = blip_stage(model, label, settings, num, forward, self.seed, self.config.save_every)
        fit(
            model, [stage], self.folder / f"train-{number}", seed=self.seed, label=label, stop=run.stop,
            accelerator=run.accelerator, tensorboard=self.config.tensorboard,
        )  # fmt: skip

    def _saved(self, model: nn.Module, folder: Path, tokenizer: Any) -> nn.Module:
        records = folder.with_name(folder.name.replace("stage", "train-")) / "metrics.jsonl"
        with self.run.new_folder(folder, [records]) as target:
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
        scores = {"radius": radii(first, test, maps, ranks, max_tokens=config.max_tokens)}
        del ranks["hits"], ranks["max_softmax"]
        scores["retrieval"] = ranks
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
            scores["captions"] = {"n": len(rows), **caption_scores(test, captions, rows)}
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
