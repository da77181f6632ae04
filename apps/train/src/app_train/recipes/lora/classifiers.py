"""Classifiers on the frozen features of a picture tower: closed forms, free heads, and the product of the best of them.

Controls: nearest neighbour; multinomial logistic regression and linear discriminant analysis of scikit-learn. What uses the
tree stands beside the same on a shuffled tree and on a star, where all leaves hang on one node.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from app_train.core.fit import fit
from app_train.core.schedule import Stage, Step
from app_train.recipes.lora.losses import LossConfig, loss_parts
from app_train.recipes.lora.retree import OtherEdges, permute_parents
from app_train.recipes.lora.settings import HeadsConfig
from hier_lora import LinearHead, Neighbours, PoolSettings, ProductOfExperts, choose, pool
from hier_losses import Taxonomy
from hier_losses.decoding import bottom_up
from hier_losses.discriminant import TreeLDA
from hier_losses.metrics import average_hierarchical_distance
from hier_losses.probabilities import leaf_to_node_logits

# What a product is made of: experts over its tree, those that know no tree, and the two that no tree can change.
OVER_TREE = ("head", "tree_lda")
EXPERTS = ("neighbours", "prompts")
STAR = "_star"
TREES = ("tree", "shuffled", "star")
SHRINKAGES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Features:
    """Features of pictures with their labels.

    Attributes:
        x: (n, d), each style centred on its own mean.
        target: (n,) node ids of leaves.
    """

    x: Tensor
    target: Tensor


def centred(features: Tensor, styles: np.ndarray) -> Tensor:
    """Features with the mean of each style taken off, (n, d): an artist, or a camera, moves all pictures alike."""
    moved = features.clone()
    for style in sorted(set(styles.tolist())):
        rows = torch.from_numpy(np.flatnonzero(styles == style))
        moved[rows] -= moved[rows].mean(0)
    return moved


def train_head(tax: Taxonomy, data: Features, loss: LossConfig, config: HeadsConfig, seed: int) -> LinearHead:
    """Free weights over the leaves, trained by a loss of hier-losses; the mean of `config.heads` heads of different draws.

    The mean of linear heads is a linear head: it costs nothing when it is used.
    """
    heads = [_one_head(tax, data, loss, config, seed * config.heads + number) for number in range(config.heads)]
    mean = heads[0]
    with torch.no_grad():
        mean.weight.copy_(torch.stack([head.weight for head in heads]).mean(0))
        mean.bias.copy_(torch.stack([head.bias for head in heads]).mean(0))
    return mean.eval()


def _one_head(tax: Taxonomy, data: Features, loss: LossConfig, config: HeadsConfig, seed: int) -> LinearHead:
    head = LinearHead(tax, data.x.shape[1], dropout=config.dropout)

    def forward(wrapped: nn.Module, step: Step, rows: np.ndarray):
        parts = loss_parts(leaf_to_node_logits(wrapped(data.x[rows]), tax), data.target[rows], tax, loss)
        return sum(parts.values()), {}

    fit(head, [Stage("head", config.stage(), len(data.x), forward)], seed=seed)
    return head


def logistic(tax: Taxonomy, data: Features, c: float) -> LinearHead:
    """Multinomial logistic regression with an L2 penalty of strength 1 / c (scikit-learn), as a head; unseen leaves score lowest."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left to gain at the last iteration is far below the intervals
        model.fit(data.x.numpy(), tax.leaf_index[data.target].numpy())
    head = LinearHead(tax, data.x.shape[1])
    weight, bias = (torch.from_numpy(np.asarray(v, np.float32)) for v in (model.coef_, model.intercept_))
    if len(weight) == 1:  # two classes share one row
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    with torch.no_grad():
        head.bias.fill_(-1e4)
        head.weight[torch.from_numpy(model.classes_)] = weight
        head.bias[torch.from_numpy(model.classes_)] = bias
    return head.eval()


def lda(tax: Taxonomy, data: Features, shrinkage: float) -> TreeLDA:
    """Linear discriminant analysis with a shrunk covariance: class means as they are, which nothing shrinks."""
    return TreeLDA(tax, shrinkage=shrinkage, star=True, plug_in=True, v=[1e6]).fit(data.x, data.target)


def nearest_mean(tax: Taxonomy, data: Features) -> TreeLDA:
    """The class with the nearest mean of its pictures."""
    eye = torch.eye(data.x.shape[1])
    return TreeLDA(tax, star=True, plug_in=True, v=[1e6], covariance=eye).fit(data.x, data.target)


@dataclass(frozen=True)
class Prompts:
    """The expert that knows the words alone.

    Attributes:
        head: the prompts of the leaves as a head on embedded pictures.
        embed: from centred features to unit embeddings in the space of the words.
    """

    head: LinearHead
    embed: Callable[[Tensor], Tensor]


@dataclass
class OnTree:
    """The experts over one tree: the true one, or another one over the same nodes.

    Attributes:
        tax: the true taxonomy.
        data: what they are fitted to.
        config: settings.
        shrinkage: of the covariance within classes.
        edges: the other tree; None for the true one.
        star: no tree at all: means shrunk to one mean, the cross-entropy of the leaves.
        prompts: the words, if the towers share a space.
    """

    tax: Taxonomy
    data: Features
    config: HeadsConfig
    shrinkage: float
    edges: OtherEdges | None = None
    star: bool = False
    prompts: Prompts | None = None
    _fitted: dict[tuple[str, int], nn.Module] = field(default_factory=dict)

    def expert(self, name: str, seed: int = 0) -> nn.Module:
        """An expert by name, fitted when it is first asked for; only heads have a seed."""
        key = (name, seed if name == "head" else 0)
        if key not in self._fitted:
            tax, data, config = self.tax, self.data, self.config
            if self.edges is not None:
                tax, data = self.edges.taxonomy, Features(data.x, self.edges.position[data.target])
            make = {
                "head": lambda: train_head(tax, data, LossConfig(leaf=1) if self.star else config.loss(), config, seed),
                "tree_lda": lambda: TreeLDA(tax, shrinkage=self.shrinkage, star=self.star).fit(data.x, data.target),
                "neighbours": lambda: Neighbours(tax, data.x, data.target),
                "prompts": lambda: self.prompts.head,
                "logistic": lambda: logistic(tax, data, config.c),
                "lda": lambda: lda(tax, data, self.shrinkage),
                "mean": lambda: nearest_mean(tax, data),
            }
            self._fitted[key] = make[name]()
        return self._fitted[key]

    def log_prob(self, name: str, x: Tensor, seed: int = 0) -> Tensor:
        """Log-probabilities of the leaves, in the order of the true taxonomy, (n, K)."""
        expert = self.expert(name, seed)
        with torch.no_grad():
            if name == "prompts":
                return expert.log_prob(self.prompts.embed(x))
            found = expert.log_prob(x).float()
        if found.shape[1] != self.tax.num_leaves:
            found = found[:, (self.tax if self.edges is None else self.edges.taxonomy).leaf]
        if self.edges is None:
            return found
        moved = torch.empty_like(found)
        moved[:, self.tax.leaf_index[self.edges.order[self.edges.taxonomy.leaf]]] = found
        return moved


@dataclass
class Classifiers:
    """All classifiers on one set of features, with the held-out pictures that choose among them.

    Attributes:
        tax: the taxonomy.
        train: the pictures to fit.
        folds: pairs of pictures to fit and to judge, none of which is a test picture.
        config: settings.
        prompts: the words, if the towers share a space.
    """

    tax: Taxonomy
    train: Features
    folds: list[tuple[Features, Features]]
    config: HeadsConfig
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        self._made_on: dict[tuple[str, int], OnTree] = {}
        self._shrinkage: dict[str, float] = {}

    @cached_property
    def _shuffled(self) -> OtherEdges:
        return permute_parents(self.tax, 0)

    def experts(self, tree: str) -> tuple[str, ...]:
        """What a product over a tree is made of; held-out pictures decide how far it follows the tree."""
        without = () if tree == "star" else tuple(name + STAR for name in OVER_TREE)
        return (*OVER_TREE, *without, *(EXPERTS if self.prompts is not None else EXPERTS[:-1]))

    def _on(self, tree: str, name: str, fold: int = -1) -> tuple[OnTree, str]:
        """The experts over the tree that an expert's name stands for, and its name among them."""
        star = name.endswith(STAR)
        return self.on("star" if star else tree, fold), name.removesuffix(STAR)

    @property
    def judged(self) -> Tensor:
        """Node ids of the pictures that the folds hold out."""
        return torch.cat([judge.target for _, judge in self.folds])

    def on(self, tree: str, fold: int = -1) -> OnTree:
        """The experts over one of `TREES`, fitted to the training pictures (-1) or to those of a fold."""
        if (tree, fold) not in self._made_on:
            self._made_on[tree, fold] = self._made(tree, fold, self.shrinkage(tree))
        return self._made_on[tree, fold]

    def _made(self, tree: str, fold: int, shrinkage: float) -> OnTree:
        data = self.train if fold < 0 else self.folds[fold][0]
        edges = self._shuffled if tree == "shuffled" else None
        return OnTree(self.tax, data, self.config, shrinkage, edges, tree == "star", self.prompts)

    def shrinkage(self, tree: str) -> float:
        """The shrinkage with the least AHD of TreeLDA on held-out pictures, each tree its own; that of the settings without any."""
        if not self.folds:
            return self.config.shrinkage
        if tree not in self._shrinkage:
            scores = {}
            for value in SHRINKAGES:
                parts = [
                    self._made(tree, number, value).log_prob("tree_lda", judge.x)
                    for number, (_, judge) in enumerate(self.folds)
                ]
                scores[value] = best_leaf_ahd(torch.cat(parts), self.judged, self.tax)
            self._shrinkage[tree] = min(scores, key=scores.get)
        return self._shrinkage[tree]

    def held_out(self, tree: str, seed: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Log-probabilities of experts on the pictures that the folds hold out."""
        found = {}
        for name in names:
            fitted = [self._on(tree, name, fold) for fold in range(len(self.folds))]
            parts = [on.log_prob(one, judge.x, seed) for (on, one), (_, judge) in zip(fitted, self.folds, strict=True)]
            found[name] = torch.cat(parts)
        return found

    def chosen(self, tree: str, seed: int, names: Sequence[str] | None = None) -> PoolSettings:
        """Weights, temperatures and decoder of the product, chosen by AHD on the pictures that the folds hold out."""
        names = names or self.experts(tree)
        if not self.folds:
            return PoolSettings(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))
        return choose(self.held_out(tree, seed, names), self.judged, self.tax, "ahd")

    def log_prob(self, tree: str, settings: PoolSettings, x: Tensor, seed: int) -> Tensor:
        """Log-probabilities of the product over one of the trees."""
        parts = {}
        for name in settings.weights:
            on, one = self._on(tree, name)
            parts[name] = on.log_prob(one, x, seed)
        return pool(parts, self.tax, settings)

    def product(self, settings: PoolSettings, seed: int) -> ProductOfExperts:
        """The product over the true tree, to be saved: without the experts that have no weight."""
        used = [name for name, weight in settings.weights.items() if weight]
        kept = PoolSettings(
            {name: settings.weights[name] for name in used}, {name: settings.temperatures[name] for name in used},
            settings.decoder, settings.temperature, settings.leaf, settings.ahd,
        )  # fmt: skip
        fitted = {name: self._on("tree", name) for name in used}
        return ProductOfExperts({name: on.expert(one, seed) for name, (on, one) in fitted.items()}, kept)


def best_leaf_ahd(log_prob: Tensor, target: Tensor, tax: Taxonomy) -> float:
    """Average hierarchical distance of the best leaf."""
    scores = leaf_to_node_logits(log_prob.clamp(min=-1e4), tax)
    return float(average_hierarchical_distance(bottom_up(scores, tax), target, tax))
