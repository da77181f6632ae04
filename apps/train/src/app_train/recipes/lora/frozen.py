"""The rows on frozen features: controls, free heads, TreeLDA and their product, each on the tree and on its twins."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from app_data.store.atomic import new_folder
from app_data.store.sealed import read_sealed
from app_eval.ask.frozen import FrozenClassifier
from app_eval.measure.cells import finished
from app_eval.measure.results import load_outcome, paired
from app_train.core.errors import RunError
from app_train.recipes.lora.classifiers import TREES, Classifiers
from app_train.recipes.lora.compare import Line
from app_train.recipes.lora.task import Task, store_row
from hier_lora import PoolSettings
from hier_losses import Taxonomy
from hier_losses.probabilities import leaf_to_node_logits

HEADLINE = "product"
CONTROLS = ("neighbour", "logistic", "lda")
ON = {"tree": "", "shuffled": ", shuffled tree", "star": ", no tree"}


@dataclass(frozen=True)
class Loaded:
    """What the rows compute with.

    Attributes:
        classifiers: fitted when they are asked for.
        mean: of the features of the training pictures.
        together: features of the test pictures, centred on their own mean where the task is.
        alone: the same centred on the mean of the training pictures; None where that is the same.
    """

    classifiers: Classifiers
    mean: Tensor
    together: Tensor
    alone: Tensor | None = None


@dataclass
class FrozenRows:
    """The rows of a task; nothing is loaded or fitted before a row that is not finished asks for it.

    Attributes:
        task: what all rows of the run share.
        load: computes the features.
        model, size: locator of the base model and size of the pictures, for the product that `hier predict` loads.
    """

    task: Task
    load: Callable[[], Loaded]
    model: str
    size: int

    @cached_property
    def loaded(self) -> Loaded:
        """Features and classifiers."""
        return self.load()

    def lines(self) -> list[Line]:
        """Controls, then heads, TreeLDA and products, each on every tree."""
        lines = [
            self._line("neighbour", "nearest neighbour", "neighbours", "tree"),
            self._line("logistic", "logistic regression", "logistic", "tree"),
            self._line("lda", "linear discriminant analysis (LDA)", "lda", "star"),
        ]
        for name, title in (("head", "free head + HXE"), ("tree_lda", "TreeLDA")):
            for tree in TREES:
                label = "free head + leaf CE" if (name, tree) == ("head", "star") else title + ON[tree]
                lines.append(self._line(named(name, tree), label, name, tree))
        for tree in TREES:
            make = partial(self._product, tree)
            lines.append(Line(named(HEADLINE, tree), f"product of experts{ON[tree]}", make, everywhere=False))
        return lines

    def _line(self, name: str, title: str, expert: str, tree: str) -> Line:
        return Line(name, title, partial(self._make, name, expert, tree), everywhere=False)

    def _make(self, name: str, expert: str, tree: str, folder: Path, seed: int) -> dict:
        facts = self.task.run.facts(name, seed)
        if (known := finished(folder, facts)) is not None:
            return known
        try:
            on = self.loaded.classifiers.on(tree)
            return self._store(lambda x: on.log_prob(expert, x, seed), folder, facts)
        except ValueError as error:
            raise RunError(f"the row {name} cannot be fitted: {error}") from error

    def _product(self, tree: str, folder: Path, seed: int) -> dict:
        facts = self.task.run.facts(named(HEADLINE, tree), seed)
        if (known := finished(folder, facts)) is not None:
            return known
        classifiers = self.loaded.classifiers
        settings = classifiers.chosen(tree, seed)
        if tree == "tree":
            self._keep(settings, seed, folder / "model")
        return self._store(
            lambda x: classifiers.log_prob(tree, settings, x, seed), folder, facts,
            chosen=settings.decoder, product=vars(settings),
        )  # fmt: skip

    def _keep(self, settings: PoolSettings, seed: int, folder: Path) -> None:
        product = self.loaded.classifiers.product(settings, seed)
        base = self.task.base.to(self.task.run.device)
        with new_folder(folder) as target:
            FrozenClassifier(base, self.model, self.size, self.loaded.mean, product).save(target)

    def _store(self, log_prob: Callable[[Tensor], Tensor], folder: Path, facts: dict, **more: object) -> dict:
        together, alone = self.loaded.together, self.loaded.alone
        tax = self.task.test.taxonomy
        single = None if alone is None else node_scores(log_prob(alone), tax)
        return store_row(self.task, node_scores(log_prob(together), tax), folder, facts, single=single, **more)


def node_scores(log_prob: Tensor, tax: Taxonomy) -> Tensor:
    """Scores of all nodes from log-probabilities of the leaves; a leaf that is ruled out is hopeless, not -inf."""
    return leaf_to_node_logits(log_prob.clamp(min=-1e4), tax)


def named(name: str, tree: str) -> str:
    """Name of a row on one of the trees."""
    return name if tree == "tree" else f"{name}_{tree}"


def headline(task: Task) -> dict:
    """The product against every control: [difference, low, high], 95 % paired bootstrap over the test pictures, seed 0."""
    folder, tax = task.run.out / "seed-0", task.test.taxonomy
    ours = load_outcome(folder / HEADLINE)
    against = {name: paired(ours, load_outcome(folder / name), tax) for name in CONTROLS}
    scores = read_sealed(folder / HEADLINE / "result.json")["scores"]["chosen"]
    return {"row": HEADLINE, "leaf": scores["leaf"][0], "ahd": scores["ahd"][0], "against": against}
