"""What `transformers.Trainer` must tell a model of stage 1: the number of the step, and when to clamp."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepCallback(TrainerCallback):
    """For `Trainer(callbacks=[StepCallback()])`: random query selection and pruning follow the trainer's step.

    Before each step the model learns its number and the fraction of training that is done, in place of the arguments `step` and
    `progress` of its forward pass; after it, curvature, scales and temperature return to their bounds. A resumed run draws
    what the uninterrupted one would have drawn.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **more: Any
    ) -> None:
        """Tell the model where training is."""
        model.at_step = (state.global_step, state.global_step / max(1, state.max_steps))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **more: Any
    ) -> None:
        """Clamp."""
        model.clamp_()


__all__ = ["StepCallback"]
