"""Recipe `icl-mini`: a small LLaVA that reads demonstrations, trained on interleaved episodes of easy-VQA and emoji naming.

    hier train icl-mini
    hier eval icl runs/icl-mini --out docs/results/hyper-icl-model.json

Frozen EfficientNet-Lite0 and frozen SmolLM2-135M; trained are the connector and LoRA on the language model's attention. First the
connector alone maps pictures to the embeddings of their words, which costs no language model. Then episodes: 0, 2 or 4
demonstrations and a query, with a loss on every answer. So that the context is worth reading, a share of the demonstrations asks
what the query asks, and a share of the emoji episodes shows the query's emoji by another artist. Every tenth picture and half of
the emoji names never train. With `--data taxonomy` all episodes ask what an emoji is, of what kind and of what sort:

    hier train icl-mini --data taxonomy --num-episodes 800 --shots 4 --out runs/icl-taxonomy
    hier eval icl runs/icl-taxonomy --out docs/results/hyper-icl-taxonomy.json
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor

from app_data.store.atomic import new_folder
from app_data.store.sealed import is_whole, new_sealed_folder
from app_data.weights.llava import IMAGE_TOKEN, WEIGHTS, IclMini, build_llava
from app_data.weights.smollm2 import load_smollm2
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.errors import RunError
from app_train.core.fit import fit
from app_train.core.records import read_records
from app_train.core.run_folder import Run
from app_train.core.schedule import Forward, Step
from app_train.recipes.blip.stage import blip_stage
from app_train.recipes.icl.settings import IclMiniConfig
from app_train.recipes.icl.sources import Source, load_sources
from hyper_icl import lora_config


def run(config: IclMiniConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    with Run("icl-mini", config, processes=False, unused_parameters=True) as run:
        language, tokenizer = load_language()
        sources, fingerprint, answers = load_sources(config, tokenizer)
        for source in sources:
            if len(np.unique(source.items.rows)) <= max(config.shots):
                raise RunError(
                    f"shots must be smaller than the {len(np.unique(source.items.rows))} pictures of {source.items.name}, "
                    f"got {max(config.shots)}"
                )
        run.claim(fingerprint)
        if (known := run.result()) is not None:
            return _show(known, config)
        begun = time.monotonic()
        model = make_model(config, language, tokenizer, sources)
        _align(config, run, model, sources)
        _episodes(config, run, model, sources)
        losses = [r["loss"] for r in read_records(config.out / "train-2" / "metrics.jsonl")]
        tail = losses[-max(1, len(losses) // 10) :]
        facts = run.facts("model", config.seed)
        model.card = {
            **{key: facts[key] for key in ("recipe", "seed", "data", "config")},
            "steps": len(losses),
            "size": config.size,
            "rank": config.rank,
            "lora_scale": config.lora_alpha / config.rank if config.rank else 0.0,
            "eye_width": model.llava.config.vision_config.hidden_size,
            "shots": list(config.shots),
            "options": f"--num-episodes {config.num_episodes} --align.epochs {config.align.epochs}",
            "questions": config.data,
            "emoji_answers_held_out": list(answers),
        }
        with new_folder(config.out / "model") as target:
            model.save(target)
        result = run.finish(
            {
                **facts,
                "steps": len(losses),
                "loss_of_last_tenth": round(float(np.mean(tail)), 4) if tail else None,
                "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "seconds_of_last_start": round(time.monotonic() - begun),
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                >> (20 if sys.platform == "darwin" else 10),
            }
        )
        for stage in ("train-1", "train-2"):
            remove_checkpoints(config.out / stage)
        run.seal()
    return _show(result, config)


def _show(result: dict, config: IclMiniConfig) -> dict:
    kind = "taxonomy" if config.data == "taxonomy" else "model"
    print(  # noqa: T201
        f"{result['steps']} steps, loss of the last tenth {result['loss_of_last_tenth']}\n"
        f"study: hier eval icl {config.out} --out docs/results/hyper-icl-{kind}.json"
    )
    return result


def load_language() -> tuple[torch.nn.Module, object]:
    """The language model and its tokenizer."""
    return load_smollm2()


def make_model(config: IclMiniConfig, language: torch.nn.Module, tokenizer, sources: Sequence[Source]) -> IclMini:
    """The untrained model: everything frozen but the connector and, if asked for, LoRA, whose weights depend on the seed."""
    width = sources[0].items.features.shape[1]
    llava = build_llava(language, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), width, config.seed)
    llava.requires_grad_(False)
    llava.model.vision_tower.fit_statistics(torch.cat([_trained_features(s) for s in sources]))
    if config.rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            inject_adapter_in_model(lora_config(llava, config.rank, lora_alpha=config.lora_alpha), llava)
    llava.model.multi_modal_projector.requires_grad_(True)
    return IclMini(llava, tokenizer)


def _trained_features(source: Source) -> Tensor:
    return source.items.features[torch.from_numpy(np.unique(source.items.rows))]


def _set_lora(model: IclMini, trains: bool) -> None:
    for name, value in model.named_parameters():
        if ".lora_" in name:
            value.requires_grad_(trains)


def words_of_pictures(sources: Sequence[Source], model: IclMini) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the pictures of which a word is known, their words as shares, and the words' token ids.

    Known are colour and shape as far as a question asks for them, and the names of emoji. Of a word of several tokens the first
    stands for it.
    """
    found: list[tuple[Tensor, set[int]]] = []
    for source in sources:
        words = defaultdict(set)
        for row, answer, kind in zip(source.items.rows, source.items.answers, source.items.kinds, strict=True):
            if kind != "yes/no":
                words[int(row)].add(model.answer_ids(answer)[0])
        found += [(source.items.features[row], ids) for row, ids in sorted(words.items())]
    ids = sorted(set().union(*(one for _, one in found)))
    at = {token: column for column, token in enumerate(ids)}
    shares = torch.zeros(len(found), len(ids))
    for number, (_, one) in enumerate(found):
        shares[number, [at[token] for token in one]] = 1 / len(one)
    return torch.stack([features for features, _ in found]), shares, torch.tensor(ids)


def _align(config: IclMiniConfig, run: Run, model: IclMini, sources: Sequence[Source]) -> None:
    done = config.out / "aligned"
    if not is_whole(done):
        features, shares, ids = words_of_pictures(sources, model)

        def forward(wrapped: IclMini, step: Step, rows: np.ndarray):
            device = run.device
            return wrapped(features[rows].to(device), words=shares[rows].to(device), word_ids=ids.to(device)), {}

        _set_lora(model, False)
        _fit(config, run, config.align, model, forward, len(features), 1, "connector")
        _set_lora(model, True)
        with new_sealed_folder(done, [config.out / "train-1" / "metrics.jsonl"]) as target:
            model.save(target)
    # Read back also after training it here: a run that was stopped in between has seen the same numbers.
    model.llava.load_state_dict(load_file(done / WEIGHTS), strict=False)


def _episodes(config: IclMiniConfig, run: Run, model: IclMini, sources: Sequence[Source]) -> None:
    def forward(wrapped: IclMini, step: Step, rows: np.ndarray):
        # One K for a batch, so that little is padded.
        num_demos = int(np.random.default_rng([config.seed, 1, step.number]).choice(config.shots))
        episodes = []
        for row in rows.tolist():
            draw = np.random.default_rng([config.seed, 2, step.epoch, row])
            source = sources[-1] if len(sources) > 1 and draw.random() < config.emoji_share else sources[0]
            episodes.append(source.episode(num_demos, config.related, draw))
        batch = {name: value.to(run.device) for name, value in model.episode_batch(episodes).items()}
        return wrapped(**batch), {"num_demos": float(num_demos)}

    _fit(config, run, config.episodes, model, forward, config.num_episodes, 2, "episodes")


def _fit(config, run: Run, settings, model: IclMini, forward: Forward, num: int, number: int, label: str) -> None:
    stage = blip_stage(model, label, settings, num, forward, config.seed, config.save_every)
    fit(
        model, [stage], config.out / f"train-{number}", seed=config.seed, label=label, stop=run.stop,
        accelerator=run.accelerator, tensorboard=config.tensorboard,
    )  # fmt: skip
