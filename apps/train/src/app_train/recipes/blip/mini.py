"""Recipe `blip-mini`: a small hyperbolic BLIP-2 on emoji by two artists, tested on an artist never seen.

    python apps/train blip-mini                      the Lorentz row, one seed
    python apps/train blip-mini --seeds 3 --rows euclidean cosine lorentz poincare mix lorentz_max lorentz_whole lorentz_plain
    python apps/eval caption runs/blip-mini/seed-0/lorentz PICTURE...
    python apps/eval search runs/blip-mini/seed-0/lorentz "a red car" --images DIR
    python apps/eval blip-page runs/blip-mini docs/results/hyper-blip.md

The defaults are those of the results page: seven minutes a row and seed on one core. A larger one: --num-layers 6
--num-queries 16 --stage1.epochs 10 --stage2.epochs 3 (some hours).

Frozen EfficientNet-Lite0, a Q-Former that starts from MiniLM, frozen SmolLM2-135M. Random query selection and random text
pruning are crossed for the Lorentz row only: `lorentz` has both, `lorentz_max` no selection, `lorentz_whole` no pruning,
`lorentz_plain` neither.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from app_data.read.labelled import Decoding
from app_data.sets.captions import CaptionSet
from app_data.sets.coco import load_coco_mini
from app_data.sets.emoji import load_emoji_captions
from app_data.store.atomic import write_json
from app_data.weights.blip2 import (
    IMAGE_TOKEN,
    LANGUAGE,
    PROMPT,
    caption_ids,
    language_tokenizer,
    mini_config,
    mini_model,
)
from app_eval.measure.retrieval import answers, caption_scores, feature_maps, radii, retrieval
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.config import Frozen, StageConfig, claim_folder, config_hash
from app_train.core.errors import Interrupted
from app_train.core.interrupt import StopFlag
from app_train.recipes.blip.loop import blip_accelerator, fit_blip
from app_train.recipes.lora.task import finished
from hyper_blip import (
    HyperBlip2ForConditionalGeneration,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    caption_batch,
    generate_captions,
)

TEST_ARTIST = "twemoji"
LossName = Literal["itc", "itm", "lm"]
RowName = Literal["euclidean", "cosine", "lorentz", "poincare", "mix", "lorentz_max", "lorentz_whole", "lorentz_plain"]
_LORENTZ = {"manifold": "lorentz", "similarity": "distance"}
ROWS: dict[str, dict] = {
    "euclidean": {"similarity": "cosine", "rqs_prob": 0.0, "rtp_prob": 0.0},
    "cosine": {"similarity": "cosine"},
    "lorentz": _LORENTZ,
    "poincare": {"manifold": "poincare", "similarity": "distance"},
    "mix": {"manifold": "lorentz", "similarity": "mix"},
    "lorentz_max": {**_LORENTZ, "rqs_prob": 0.0},
    "lorentz_whole": {**_LORENTZ, "rtp_prob": 0.0},
    "lorentz_plain": {**_LORENTZ, "rqs_prob": 0.0, "rtp_prob": 0.0},
}


class FirstStage(StageConfig):
    """Alignment, matching and description."""

    epochs: int = Field(1, ge=0)
    lr: float = Field(1e-4, gt=0)
    batch_size: int = Field(32, ge=1)
    weight_decay: float = Field(0.05, ge=0)


class SecondStage(StageConfig):
    """The queries as a prefix of the language model."""

    epochs: int = Field(1, ge=0)
    lr: float = Field(2e-4, gt=0)
    batch_size: int = Field(8, ge=1)
    weight_decay: float = Field(0.05, ge=0)


class BlipMiniConfig(Frozen):
    """A small hyperbolic BLIP-2 on emoji."""

    out: Path = Path("runs/blip-mini")
    """Run folder; the same command goes on from what it holds."""
    seeds: int = Field(1, ge=1)
    """Seeds 0 .. seeds-1, one after the other."""
    rows: tuple[RowName, ...] = ("lorentz",)
    """Rows to train."""
    artists: tuple[str, ...] = ("openmoji", "noto-300", "noto-700")
    """Artists to train on."""
    size: int = Field(128, ge=32)
    """Height and width of the pictures in pixels."""
    limit: int | None = Field(None, ge=2)
    """Use the pictures of this many leaves only, spread over the taxonomy (for trials)."""
    losses: tuple[LossName, ...] = ("itc", "itm", "lm")
    """Losses of stage 1; without "itm" nothing is re-ranked, and the contrastive loss alone is four times cheaper."""
    start: Literal["pairs", "fresh"] = "pairs"
    """Start of both stages: "pairs" ties queries to captions, then to the language model's words, by least squares; "fresh"
    leaves that to the losses."""
    stage1: FirstStage = FirstStage()
    stage2: SecondStage = SecondStage()
    num_queries: int = Field(4, ge=1)
    num_layers: int = Field(2, ge=1, le=6)
    """How many of MiniLM's layers the Q-Former takes: the first and the last ones."""
    max_tokens: int = Field(10, ge=4, le=64)
    """Tokens of a caption."""
    k_test: int = Field(16, ge=1)
    """Candidates that the matching head scores."""
    num_captions: int = Field(100, ge=0)
    """Test pictures that are captioned."""
    coco_mini: Path | None = None
    """A small COCO in one tar archive, for zero-shot scores; not run if not given."""
    save_every: int = Field(40, ge=1)
    """Steps between two checkpoints."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    cache_dir: Path | None = None
    """Where drawn pictures are kept; the user's cache folder if not given."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


def run(config: BlipMiniConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    accelerator = blip_accelerator(config.mixed_precision)
    with StopFlag() as stop:
        train = _limited(
            load_emoji_captions(config.artists, size=config.size, cache_dir=config.cache_dir), config.limit
        )
        test = _limited(load_emoji_captions((TEST_ARTIST,), size=config.size, cache_dir=config.cache_dir), config.limit)
        data = f"{train.fingerprint}-{test.fingerprint}"
        if accelerator.is_main_process:
            claim_folder(config.out, config, data, ignored=("seeds", "rows", "coco_mini", "num_captions"))
        accelerator.wait_for_everyone()
        features = _Features(train, test, accelerator)
        runs = []
        for seed in range(config.seeds):
            runs.append({row: _row(config, row, seed, features, data, stop, accelerator) for row in config.rows})
        if not accelerator.is_main_process:
            return {}
    result = {"format": 1, "recipe": "blip-mini", "data": data, "n": len(test), "seeds": config.seeds, "runs": runs}
    write_json(config.out / "result.json", result)
    print(_table(runs))  # noqa: T201
    print(f"\npage: python apps/eval blip-page {config.out} docs/results/hyper-blip.md")  # noqa: T201
    return result


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

    def __init__(self, train: CaptionSet, test: CaptionSet, accelerator: Accelerator) -> None:
        self.train, self.test = train, test
        self._accelerator = accelerator
        self._found: dict[str, Tensor] = {}

    def maps(self, name: str, model: nn.Module) -> Tensor:
        """Feature maps of the set `name`, "train" or "test"."""
        if name not in self._found:
            data = getattr(self, name)
            model.to(self._accelerator.device)
            self._found[name] = feature_maps(model, data.batch(range(len(data)))).half()
        return self._found[name]


def _row(
    config: BlipMiniConfig,
    row: str,
    seed: int,
    features: _Features,
    data: str,
    stop: StopFlag,
    accelerator: Accelerator,
) -> dict:
    folder = config.out / f"seed-{seed}" / row
    settings = config.model_dump(
        mode="json", exclude={"out", "seeds", "rows", "cache_dir", "tensorboard", "save_every"}
    )
    facts = {"recipe": "blip-mini", "row": row, "seed": seed, "data": data}
    facts["config"] = config_hash(config.stage1, row=ROWS[row], **{k: v for k, v in settings.items() if k != "stage1"})
    known = finished(folder, facts)
    if known is not None:
        return known
    label = f"{row}, seed {seed}"
    begun = time.monotonic()
    first = _first_stage(config, row, seed, features, folder, f"{label}: stage 1", stop, accelerator)
    second = None
    if config.stage2.epochs:
        second = _second_stage(config, seed, first, features, folder, f"{label}: stage 2", stop, accelerator)
    if not accelerator.is_main_process:
        return {}
    first.to(accelerator.device)
    result = {
        "format": 1,
        **facts,
        "seconds": round(time.monotonic() - begun),
        **_score(config, first, second, features, stop),
    }
    write_json(folder / "result.json", result)
    for stage in ("train-1", "train-2"):
        remove_checkpoints(folder / stage)
    return result


def _caption_of(data: CaptionSet, row: int, seed: int, epoch: int) -> str:
    """One of a picture's captions, by chance: a pure function of the arguments."""
    captions = data.captions[row]
    return captions[int(np.random.default_rng([seed, epoch, row]).integers(len(captions)))]


def _first_stage(
    config: BlipMiniConfig,
    row: str,
    seed: int,
    features: _Features,
    folder: Path,
    label: str,
    stop: StopFlag,
    accelerator,
) -> HyperBlip2ForPretraining:
    done = folder / "stage1"
    if (done / "hyper_blip.json").exists():
        return HyperBlip2ForPretraining.from_pretrained(done)
    made = mini_config(hyperbolic(row, seed, config.losses), config.num_queries, config.num_layers)
    model = mini_model(made, seed)
    train, maps = features.train, features.maps("train", model)
    model.to(accelerator.device)
    if config.start == "pairs":
        captions = [_caption_of(train, i, seed, 0) for i in range(len(train))]
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # dropout is part of the start
            model.start_from_pairs(maps.float(), *caption_ids(captions, config.max_tokens))
    leaves = torch.from_numpy(train.targets)

    def forward(wrapped: nn.Module, rows: np.ndarray, epoch: int, number: int, share: float):
        captions = [_caption_of(train, int(i), seed, epoch) for i in rows]
        device = accelerator.device
        ids, mask = (x.to(device) for x in caption_ids(captions, config.max_tokens))
        out = wrapped(
            maps[rows].to(device).float(), ids, mask, image_ids=leaves[rows].to(device), step=number, progress=share
        )
        parts = {f"loss/{n}": getattr(out, f"loss_{n}").detach() for n in ("itc", "itm", "lm")}
        return out.loss, {**parts, **out.diagnostics}

    _fit(config, config.stage1, model, forward, len(train), folder / "train-1", seed, label, stop, accelerator)
    _save(model, done, accelerator)
    return model.eval()


def _second_stage(
    config: BlipMiniConfig,
    seed: int,
    first: HyperBlip2ForPretraining,
    features: _Features,
    folder: Path,
    label: str,
    stop,
    accelerator,
) -> HyperBlip2ForConditionalGeneration:
    done = folder / "stage2"
    if (done / "hyper_blip.json").exists():
        return HyperBlip2ForConditionalGeneration.from_pretrained(done)
    tokenizer = language_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HyperBlip2ForConditionalGeneration.from_pretraining(
            first.cpu(), image_token_id=image_token, language_locator=LANGUAGE
        )
    train, maps = features.train, features.maps("train", model)
    model.to(accelerator.device)

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

    def forward(wrapped: nn.Module, rows: np.ndarray, epoch: int, number: int, share: float):
        batch = {k: v.to(accelerator.device) for k, v in texts(rows, epoch).items()}
        return wrapped(maps[rows].to(accelerator.device).float(), **batch).loss, {}

    _fit(config, config.stage2, model, forward, len(train), folder / "train-2", seed, label, stop, accelerator)
    _save(model, done, accelerator)
    return model.eval()


def _fit(config, stage, model, forward, num, folder, seed, label, stop, accelerator) -> None:
    fit_blip(
        model, forward, num, stage, folder, seed=seed, stop=stop, accelerator=accelerator, label=label,
        save_every=config.save_every, tensorboard=config.tensorboard,
    )  # fmt: skip


def _save(model: nn.Module, folder: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
    accelerator.wait_for_everyone()


def _score(
    config: BlipMiniConfig,
    first: HyperBlip2ForPretraining,
    second: HyperBlip2ForConditionalGeneration | None,
    features: _Features,
    stop: StopFlag,
) -> dict:
    """Everything the results page shows of one row."""
    settings = {"k_test": config.k_test if "itm" in config.losses else 0, "max_tokens": config.max_tokens}
    test, maps = features.test, features.maps("test", first).float()
    found = retrieval(first, test, maps, first_only=True, **settings)
    _check(stop)
    scores = {"radius": radii(first, test, maps, found, max_tokens=config.max_tokens)}
    del found["hits"], found["max_softmax"]
    scores["retrieval"] = found
    _check(stop)
    if config.coco_mini is not None:
        coco = load_coco_mini(config.coco_mini, Decoding(size=config.size, cache_dir=config.cache_dir))
        zero = retrieval(first, coco, feature_maps(first, coco.batch(range(len(coco)))), first_only=False, **settings)
        scores["coco_mini"] = {k: zero[k] for k in ("n_images", "n_texts", "itc", "itm") if k in zero}
        _check(stop)
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


def _check(stop: StopFlag) -> None:
    if stop.exit_status is not None:
        raise Interrupted(stop.exit_status)


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


__all__ = ["ROWS", "BlipMiniConfig", "hyperbolic", "run"]
