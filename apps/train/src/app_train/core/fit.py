"""The training loop of every recipe: resumable after any step with bit-identical numbers on CPU, on one process or many."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from app_data.store.progress import Progress
from app_train.core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from app_train.core.errors import Interrupted, NonFiniteGradient, RunError
from app_train.core.interrupt import StopFlag
from app_train.core.records import Records, read_records
from app_train.core.schedule import Rows, Stage, Step, draw_of, steps, warm_cosine

_KEPT = "kept."


def fit(
    model: nn.Module,
    stages: Sequence[Stage],
    folder: Path | None = None,
    *,
    seed: int,
    label: str = "",
    stop: StopFlag | None = None,
    accelerator: Accelerator | None = None,
    tensorboard: bool = False,
) -> None:
    """Train a model in place; go on from the newest checkpoint below `folder` if there is one.

    Args:
        model: what the stages call; its parameters that require gradients are trained.
        stages: one after the other, each with an optimizer of its own.
        folder: receives checkpoints and `metrics.jsonl`; nothing is written and nothing resumed if None.
        seed: fixes order and dropout.
        label: shown with the progress; "" shows none.
        stop: read after every step; a signal to one process stops all of them after the same step.
        accelerator: device, precision and processes; the model's own device and one process if None.
        tensorboard: also write TensorBoard events.

    Raises:
        Interrupted: after a signal; the state is saved.
        NonFiniteGradient: before the optimizer step that would have spoilt the weights, or before spoilt ones are kept.
        RunError: a weight is not finite before training, or a batch is smaller than the number of processes.
    """
    processes = 1 if accelerator is None else accelerator.num_processes
    for stage in stages:
        if stage.whole_batches and stage.num_steps and stage.batch_size < processes:
            raise RunError(f"a batch of {stage.batch_size} items is too small for {processes} processes")
    check_finite(model, label or "the model")
    # Taken once: later on, the stages switch gradients off and on.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    known = None if folder is None else load_checkpoint(folder)
    position = 0 if known is None else known.position
    if known is not None:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(known.weights[name])
        _restore_keeper(stages, known)
    main = accelerator is None or accelerator.is_main_process
    before = "" if known is None else known.records
    records = Records(folder, position, before, tensorboard=tensorboard) if folder is not None and main else None
    total = sum(stage.num_steps for stage in stages)
    loop = _Loop(model, trained, accelerator, seed)
    model.train()
    try:
        with Progress(total, label if main else "", position) as shown:
            for stage, step in steps(stages, seed, position):
                state = known.optimizer if known is not None and step.number == position + 1 and step.index else None
                if loop.stage is not stage:
                    loop.begin(stage, state)
                values, status = loop.take(step, stop)
                if records is not None:
                    records.add(step.number, **values)
                shown.step()
                last = step.index == step.total - 1
                saves = folder is not None and (status or last or step.number % stage.save_every == 0)
                if saves or last:
                    loop.check(step)
                if saves:
                    if records is not None:
                        records.sync()
                        save_checkpoint(folder, loop.checkpoint(step.number, records.digest))
                    if accelerator is not None:
                        accelerator.wait_for_everyone()
                if status:
                    raise Interrupted(status)
    finally:
        if records is not None:
            records.close()
        for parameter in trained.values():
            parameter.requires_grad_(True)
    model.eval()
    if records is not None:
        _say_if_it_stood_still(records.path, stages, label)


def _restore_keeper(stages: Sequence[Stage], known: Checkpoint) -> None:
    before = 0
    for stage in stages:
        if stage.keeper is not None and before < known.position <= before + stage.num_steps:
            kept = {n.removeprefix(_KEPT): v for n, v in known.weights.items() if n.startswith(_KEPT)}
            stage.keeper.restore(kept, known.position - before)
        before += stage.num_steps


class _Loop:
    """The state of one training: the stage at work, its optimizer, and the wrapped model."""

    def __init__(
        self, model: nn.Module, trained: dict[str, nn.Parameter], accelerator: Accelerator | None, seed: int
    ) -> None:
        self.model, self.trained, self.accelerator, self.seed = model, trained, accelerator, seed
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world = 1 if accelerator is None else accelerator.num_processes
        self.stage: Stage | None = None

    def begin(self, stage: Stage, state: dict | None) -> None:
        """Open what a stage trains, and make its optimizer; `state` comes from a checkpoint within the stage."""
        self.stage = stage
        self.chosen = {n: p for n, p in self.trained.items() if stage.trains is None or stage.trains(n)}
        for name, parameter in self.trained.items():
            parameter.requires_grad_(name in self.chosen)
        made = stage.optimizer(self.chosen) if stage.optimizer else adamw(self.chosen, stage)
        self.peaks = [group["lr"] for group in made.param_groups]
        if state is not None:
            made.load_state_dict(state)
        self.plain, self.wrapped, self.optimizer = made, self.model, made
        if self.accelerator is not None:
            self.accelerator.free_memory()
            self.wrapped, self.optimizer = self.accelerator.prepare(self.model, made)

    def take(self, step: Step, stop: StopFlag | None) -> tuple[dict, int]:
        """One optimizer step.

        Returns:
            The numbers to record, those of the whole batch, and the exit status that a signal asks for on any process.
        """
        stage, accelerator = self.stage, self.accelerator
        share = stage.rate(step) if stage.rate else warm_cosine(stage.settings, step.index, step.total)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        torch.manual_seed(stage.draw(step) if stage.draw else draw_of(self.seed, step.number, self.rank))
        size = len(step.rows) // self.world * self.world if stage.whole_batches else len(step.rows)
        mine = step.rows[:size][self.rank :: self.world]
        weight = len(mine) * self.world / size
        if not len(mine):  # fewer items than processes: take part in the collectives, count for nothing
            mine = step.rows[:1]
        sums: dict[str, Tensor] = {}
        pieces = np.array_split(mine, min(stage.micro_batches, len(mine)))
        for number, rows in enumerate(pieces):
            part = len(rows) / len(mine)
            with self._synced(number == len(pieces) - 1):
                with self._precision():
                    loss, values = self._forward(step, rows)
                scaled = loss * (weight * part) if weight * part != 1 else loss
                scaled.backward() if accelerator is None else accelerator.backward(scaled)
            for name, value in {"loss": loss, **values}.items():
                value = torch.as_tensor(value).detach().float().cpu() * (weight * part)
                sums[name] = sums.get(name, 0) + value
        norm = self._norm()
        if not torch.isfinite(norm) and (accelerator is None or accelerator.mixed_precision != "fp16"):
            raise NonFiniteGradient(
                f"the gradient norm is {float(norm)} in step {step.number} (stage {step.stage}, epoch {step.epoch}, items "
                f"{sorted(step.rows.tolist())[:8]}...); the last checkpoint is intact: lower the learning rate or look at these items"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if stage.after_step is not None:
            stage.after_step()
        if stage.after_epoch is not None and step.last_of_epoch:
            stage.after_epoch(step)
        found, status = self._together(sums, 0 if stop is None else stop.exit_status or 0)
        first = {"stage": step.stage, "epoch": step.epoch, "lr": self.peaks[0] * share}
        return {**first, "loss": found.pop("loss"), "grad_norm": float(norm), **found}, status

    def _forward(self, step: Step, rows: Rows) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        try:
            return self.stage.forward(self.wrapped, step, rows)
        except ValueError as error:
            self.check(step)  # a loss that refuses what spoilt weights gave it: they are what is wrong
            raise RunError(
                f"{error} (step {step.number}, stage {step.stage}, items {sorted(rows.tolist())[:8]}...)"
            ) from error

    def check(self, step: Step) -> None:
        """Refuse weights that are no numbers, before they are kept."""
        for name, value in self.chosen.items():
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteGradient(
                    f"the weight {name} is not finite after step {step.number} (stage {step.stage}, epoch {step.epoch}); the last "
                    "checkpoint is intact: lower the learning rate"
                )

    def checkpoint(self, number: int, records: str = "") -> Checkpoint:
        """What the run needs to go on after step `number`."""
        keeper = self.stage.keeper
        kept = {} if keeper is None else {f"{_KEPT}{n}": v for n, v in keeper.tensors().items()}
        return Checkpoint({**self.trained, **kept}, self.plain.state_dict(), number, records)

    def _norm(self) -> Tensor:
        parameters, limit = list(self.chosen.values()), self.stage.clip_grad
        if limit is None:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip = torch.nn.utils.clip_grad_norm_ if self.accelerator is None else self.accelerator.clip_grad_norm_
        return torch.as_tensor(clip(parameters, limit))

    def _synced(self, last: bool):
        return nullcontext() if self.accelerator is None or last else self.accelerator.no_sync(self.wrapped)

    def _precision(self):
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()

    def _together(self, sums: dict[str, Tensor], asked: int) -> tuple[dict[str, float], int]:
        """Means over the whole batch, and the largest exit status that any process was asked for."""
        if self.world == 1:
            return {name: float(value) for name, value in sums.items()}, asked
        names = sorted(sums)
        mine = torch.tensor([*(float(sums[name]) for name in names), float(asked)], dtype=torch.float64)
        table = self.accelerator.gather(mine.to(self.accelerator.device).unsqueeze(0)).cpu()
        means = table[:, :-1].mean(0).tolist()
        return dict(zip(names, means, strict=True)), int(table[:, -1].max())


def adamw(parameters: Mapping[str, nn.Parameter], stage: Stage) -> Optimizer:
    """AdamW with one rate and one weight decay for all."""
    settings = stage.settings
    return torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def check_finite(model: nn.Module, what: str) -> None:
    """Refuse a model with weights that are no numbers, before anything is scored or trained.

    Raises:
        RunError: it names the first such weight.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
            raise RunError(f"{what}: the weight {name} holds values that are not finite; take other weights")


def _say_if_it_stood_still(path: Path, stages: Sequence[Stage], label: str) -> None:
    # Only the first stage: the others start where it ended, and what they tune may be flat already.
    first = next((stage.name for stage in stages if stage.num_steps), "")
    losses = [line["loss"] for line in read_records(path) if line["stage"] == first]
    tail = losses[-max(1, len(losses) // 10) :]
    if len(losses) >= 10 and not np.mean(tail) < losses[0]:
        print(  # noqa: T201
            f"warning: {label}: the loss of stage {first} did not fall ({losses[0]:.4g} in its first step, "
            f"{np.mean(tail):.4g} in its last ones): try a lower learning rate",
            file=sys.stderr,
        )
