"""Recipe `icl-distill`: calibrated attention distilled into LoRA weights of a finished `icl-mini`.

    hier train icl-distill --model runs/icl-mini
    hier page icl docs/results/hyper-icl.json docs/results/hyper-icl.md \\
        --model docs/results/hyper-icl-model.json --distilled runs/icl-distill/result.json

Teacher: the model whose attention to its demonstrations is calibrated by their hyperbolic distance to the query. Student: the same
weights and LoRA, no calibration. It trains on easy-VQA training questions with random demonstrations, on the attention masses of
the middle layers; its answers are then scored on test questions beside those of the model as it was and calibrated.
"""

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from app_data.store.atomic import new_folder
from app_data.weights.llava import WEIGHTS, IclMini, Shown, load_icl_mini
from app_eval.ask.demonstration_study import read_cell
from app_eval.ask.demonstration_task import Task, easy_vqa_tasks
from app_eval.measure.answers import AnswerReader
from app_eval.show.stories.icl import OURS
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.core.schedule import Step
from app_train.recipes.blip.stage import blip_stage
from app_train.recipes.icl.lift import train_lift
from app_train.recipes.icl.settings import IclDistillConfig
from hyper_icl import (
    CalibrationPlan,
    SegmentDistillLoss,
    SegmentMap,
    SegmentMassCollector,
    base_model,
    calibrate,
    lora_config,
    middle_layers,
    segment_kl,
    use_calibrated_attention,
)

SELECTORS = ("random", OURS)


class Student(nn.Module):
    """A LoRA student and, without its LoRA, its own teacher.

    Args:
        model: A trained icl-mini.
        rank: Of LoRA.
        seed: Of LoRA.
        loss: Weights.
    """

    def __init__(self, model: IclMini, rank: int, seed: int, loss: SegmentDistillLoss) -> None:
        super().__init__()
        use_calibrated_attention(model.llava)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.peft: PeftModel = get_peft_model(model.llava, lora_config(model.llava, rank))
        self.model, self.loss = model, loss
        self.layers = middle_layers(model.llava.config.get_text_config().num_hidden_layers)

    def train(self, mode: bool = True) -> "Student":
        """Set the mode of LoRA's parts; the frozen model stays in evaluation mode, as its own teacher."""
        super().train(False)
        self.training = mode
        return self

    def batch(self, demos: Sequence[Sequence[Shown]], queries: Sequence[Shown]) -> dict[str, Tensor]:
        """Prompts with their answers as tensors, padded on the left.

        Args:
            demos: Of every query, in prompt order, the same number for each.
            queries: What is asked, with the answer.
        """
        model, rows, parts = self.model, [], []
        for row, shown in zip(demos, queries, strict=True):
            pieces = [model.start, *map(model.demo_ids, row)]
            pieces.append([*model.question_ids(shown), *model.answer_ids(shown.answer)])
            rows.append([token for piece in pieces for token in piece])
            parts.append([len(piece) for piece in pieces])
        length, pad = max(map(len, rows)), model.tokenizer.pad_token_id
        segments = SegmentMap.from_lengths([p[0] for p in parts], [p[1:-1] for p in parts], [p[-1] for p in parts])
        answer = [len(model.answer_ids(shown.answer)) for shown in queries]
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        is_answer = torch.arange(length) >= length - torch.tensor(answer).unsqueeze(-1)
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            "labels": ids.masked_fill(~is_answer, -100),
            "features": torch.stack([s.features for row, q in zip(demos, queries, strict=True) for s in (*row, q)]),
            "segment_ids": segments.ids,
            "query_start": segments.query_start,
        }

    def run(self, batch: Mapping[str, Tensor], plan: CalibrationPlan | None = None) -> tuple[dict[int, Tensor], Tensor]:
        """Attention masses of the query's rows by layer, and logits."""
        segments = self._segments(batch)
        calibration = contextlib.nullcontext() if plan is None else calibrate(self.peft, plan)
        with calibration, SegmentMassCollector(self.peft, segments, segments.query_rows(), self.layers) as found:
            mask = batch["attention_mask"]
            logits = self.peft(
                input_ids=batch["input_ids"],
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
                pixel_values=batch["features"],
                use_cache=False,
            ).logits
        return found.masses, logits

    @torch.no_grad()
    def teach(self, batch: Mapping[str, Tensor], bias: Tensor) -> dict[int, Tensor]:
        """The masses of the calibrated model."""
        with base_model(self.peft):
            return self.run(batch, CalibrationPlan(bias, self._segments(batch)))[0]

    @staticmethod
    def _segments(batch: Mapping[str, Tensor]) -> SegmentMap:
        return SegmentMap(batch["segment_ids"], batch["query_start"], int(batch["segment_ids"].max()))

    def forward(self, batch: Mapping[str, Tensor], bias: Tensor):
        """The terms of the loss on prompts with their calibration."""
        teacher, base = self.teach(batch, bias), None
        if self.loss.base_kl:
            with torch.no_grad(), base_model(self.peft):
                base = self.run(batch)[1]
        masses, logits = self.run(batch)
        return self.loss(teacher, masses, logits, batch["labels"], base)


def run(config: IclDistillConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    with Run("icl-distill", config, ("model",), processes=False, unused_parameters=True) as run:
        model = load_model(config)
        test, training = load_tasks(config, model)
        weights = next(p for p in (config.model / WEIGHTS, config.model / "model" / WEIGHTS) if p.is_file())
        run.claim(hashlib.sha256(weights.read_bytes()).hexdigest()[:16])
        if (known := run.result()) is not None:
            return known
        begun = time.monotonic()
        student = Student(model, config.rank, config.seed, SegmentDistillLoss(config.kl, config.ce, config.base_kl))
        _fit(config, run, student, training)
        with new_folder(config.out / "adapter") as target:
            student.peft.save_pretrained(target)
        options = config.model_dump(
            mode="json", include={"strength", "shots", "num_questions", "rank", "kl", "ce", "base_kl"}
        )
        steps = config.fit.epochs * max(1, config.num_questions // config.fit.batch_size)
        content = {
            **run.facts("student", config.seed),
            "model": model.card,
            "options": {**options, "steps": steps, "batch_size": config.fit.batch_size, "lr": config.fit.lr},
            "layers": student.layers,
            "masses": _masses(config, run, student, test),
            "num_queries": len(test.query),
            "cells": _cells(config, run, student, test),
        }
        result = run.finish({**content, "seconds_of_last_start": round(time.monotonic() - begun)})
        remove_checkpoints(config.out / "train")
        run.seal()
    print(f"divergence of attention masses from the calibrated model: {result['masses']}")  # noqa: T201
    return result


def load_model(config: IclDistillConfig) -> IclMini:
    """The model that is calibrated."""
    return load_icl_mini(config.model)


def load_tasks(config: IclDistillConfig, model: IclMini) -> tuple[Task, Task]:
    """Test questions and training questions with one pool."""
    numbers = (config.num_pool, config.num_queries)
    return easy_vqa_tasks(model.card["size"], config.cache_dir, *numbers, train_lift, num_training=config.num_questions)


def _prompts(task: Task, rows: Sequence[int], found) -> tuple[list[list[Shown]], list[Shown]]:
    return [[task.pool[j] for j in found.ids[i].tolist()] for i in rows], [task.query[i] for i in rows]


def _fit(config: IclDistillConfig, run: Run, student: Student, task: Task) -> None:
    chosen, biases = [], []
    for epoch in range(config.fit.epochs):
        chosen.append(task.choose("random", config.shots, 1000 * (config.seed + 1) + epoch))
        biases.append(task.bias("lorentz", chosen[-1], config.seed, config.strength))

    def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
        batch = student.batch(*_prompts(task, rows.tolist(), chosen[step.epoch]))
        batch = {name: value.to(run.device) for name, value in batch.items()}
        terms = wrapped(batch, biases[step.epoch][torch.from_numpy(rows)].to(run.device))
        return terms.total, {"kl": terms.kl, "ce": terms.ce, "base_kl": terms.base_kl}

    # LoRA has no biases or norms to be spared from decay.
    stage = blip_stage(
        student, "distil", config.fit, len(task.query), forward, config.seed, config.save_every, frozenset()
    )
    fit(
        student, [stage], config.out / "train", seed=config.seed, label="distil", stop=run.stop,
        accelerator=run.accelerator, tensorboard=config.tensorboard,
    )  # fmt: skip


def _masses(config: IclDistillConfig, run: Run, student: Student, task: Task) -> dict[str, float]:
    """Mean divergence of attention masses from the calibrated model, of the model as it was and of the student."""
    found = task.choose("random", config.shots, 0)
    bias = task.bias("lorentz", found, 0, config.strength)
    num, sums = min(config.num_masses, len(task.query)), {"model": 0.0, "student": 0.0}
    for start in range(0, num, 8):
        rows = range(start, min(start + 8, num))
        batch = student.batch(*_prompts(task, rows, found))
        with torch.no_grad():
            teacher = student.teach(batch, bias[rows.start : rows.stop])
            sums["student"] += len(rows) * float(segment_kl(teacher, student.run(batch)[0]))
            with base_model(student.peft):
                sums["model"] += len(rows) * float(segment_kl(teacher, student.run(batch)[0]))
        run.check()
    return {**{name: round(value / num, 6) for name, value in sums.items()}, "n": num}


def _cells(config: IclDistillConfig, run: Run, student: Student, task: Task) -> list[dict]:
    """Right answers by selector and seed: of the model, of the model calibrated, of the student."""
    reader, cells = AnswerReader(student.model, task.answers), []
    for selector in SELECTORS:
        for seed in range(config.eval_seeds):
            found = task.choose(selector, config.shots, seed)
            bias = task.bias("lorentz", found, seed, config.strength)
            with base_model(student.peft):
                right = read_cell(reader, task, found, {"model": None, "calibrated": bias}, keep=lambda _: run.check())
            right |= read_cell(reader, task, found, {"distilled": None}, keep=lambda _: run.check())
            cells.append({"selector": selector, "seed": seed, "right": right})
    return cells
