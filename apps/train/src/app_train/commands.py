"""What `hier` asks of finished models and stored results; the module is light, for `--help`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        help: one line for `--help`.
        settings: class in `app_eval.ask.settings`.
        run: `module:function`, imported only when the command runs.
        lift: whether the function is handed what trains a lift, since only `app_train` trains.
    """

    help: str
    settings: str
    run: str
    lift: bool = False

    def kind(self) -> type:
        """The settings class."""
        return getattr(import_module("app_eval.ask.settings"), self.settings)

    def function(self) -> Callable[[object], int]:
        """The function that runs settings, and gives the exit status."""
        module, _, name = self.run.partition(":")
        found = getattr(import_module(module), name)
        if not self.lift:
            return found
        from app_train.recipes.icl.lift import train_lift

        return lambda config: found(config, train_lift)


COMMANDS: dict[str, Command] = {
    "check": Command("what would spoil a result on your own pictures", "Check", "app_eval.ask.check:run"),
    "predict": Command(
        "the path of each picture through the tree, level by level, with probabilities",
        "Predict",
        "app_eval.ask.predict:run",
    ),
    "caption": Command("describe pictures with a trained blip-mini", "Caption", "app_eval.ask.describe:caption"),
    "search": Command("find the pictures of a folder that fit a text best", "Search", "app_eval.ask.describe:search"),
    "select": Command(
        "choose demonstrations for pictures from your own pool", "Select", "app_eval.ask.select:run", lift=True
    ),
    "answer": Command(
        "answer questions about pictures with demonstrations from your own pool",
        "Answer",
        "app_eval.ask.answer:run",
        lift=True,
    ),
    "eval blip": Command(
        "judge any BLIP-2: retrieval, captions, and what its radius knows", "EvalBlip", "app_eval.ask.benchmark:run"
    ),
    "eval icl": Command(
        "judge selection and calibration by a trained icl-mini",
        "EvalIcl",
        "app_eval.ask.table:run",
        lift=True,
    ),
    "eval selection": Command(
        "judge selectors without a language model",
        "EvalSelection",
        "app_eval.ask.selection:run",
        lift=True,
    ),
    "page": Command("write a results page from stored results", "Page", "app_eval.show.commands:run"),
}
