"""Label sets other than one tree, for the recipe `mat`: no tree at all, and a second tree whose classes cut across the first."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app_data.read.pictures import PictureSet
from app_data.weights.dual_encoder import Lite0MiniLM
from app_eval.measure.tree_scores import tree_scores
from app_train.core.errors import RunError
from app_train.recipes.lora.task import cuts_for
from app_train.recipes.mat.data import Pictures
from hier_losses import Taxonomy
from hier_losses.builders import cifar100
from hier_losses.metrics import node_auroc, violation_rate
from hier_losses.treecuts import TreeCuts


def without_tree(pictures: Pictures) -> Pictures:
    """The same pictures under their leaves alone: every label is a top node, paths have one node, the only cut is all."""
    tax = pictures.train.taxonomy
    flat = Taxonomy.from_paths([(" > ".join(tax.path_of(leaf)),) for leaf in tax.leaf.tolist()])
    text = tuple(pictures.train.node_text[leaf] for leaf in tax.leaf.tolist())
    index = tax.leaf_index.numpy()
    train, test = (
        replace(
            part, taxonomy=flat, targets=index[part.targets], node_text=text, fingerprint=f"{part.fingerprint}-flat"
        )
        for part in (pictures.train, pictures.test)
    )
    return replace(pictures, train=train, test=test, cuts=cuts_for(flat))


@dataclass(frozen=True)
class SecondTree:
    """CIFAR-100's 20 superclasses beside the WordNet tree: each picture has a path in both, which share its leaf.

    Attributes:
        taxonomy: superclasses and classes.
        cuts: drawn cuts.
        names: of each node for `encode_text`: a class has that of the first tree.
        target: (n,) node of each test picture.
        train_target: (n,) node of each training picture.
        text: features of the superclasses' texts by name, where texts are features.
    """

    taxonomy: Taxonomy
    cuts: TreeCuts
    names: list[str]
    target: Tensor
    train_target: Tensor
    text: dict[str, Tensor] = field(default_factory=dict)


def superclasses(train: PictureSet, test: PictureSet, names: Sequence[str]) -> SecondTree:
    """The superclasses for the pictures of CIFAR-100; the name of a superclass is its text.

    Args:
        train: training pictures under the first tree.
        test: test pictures under it.
        names: name of each node of the first tree.

    Raises:
        RunError: the pictures have other classes.
    """
    tax, other = train.taxonomy, cifar100().taxonomy
    by_name = {tax.names[leaf]: leaf for leaf in tax.leaf.tolist()}
    own = {other.names[leaf]: leaf for leaf in other.leaf.tolist()}
    if by_name.keys() != own.keys():
        raise RunError("the study 'cross' needs the classes of CIFAR-100, and all of them")
    found = [
        names[by_name[name]] if other.leaf_index[node] >= 0 else name.replace("_", " ")
        for node, name in enumerate(other.names)
    ]
    move = np.array([own.get(name, -1) for name in tax.names])
    targets = (torch.from_numpy(move[part.targets]) for part in (test, train))
    return SecondTree(other, cuts_for(other), found, *targets)


def second_tree(pictures: Pictures) -> SecondTree:
    """The superclasses with features of their texts, under names that no node of the first tree has.

    Raises:
        RunError: the pictures have other classes.
    """
    numbers = [str(node) for node in range(pictures.train.taxonomy.num_nodes)]
    tree = superclasses(pictures.train, pictures.test, numbers)
    prompts, names = {}, list(tree.names)
    for node, name in enumerate(tree.names):
        if tree.taxonomy.leaf_index[node] < 0:
            names[node] = f"superclass {node}"
            prompts[names[node]] = pictures.template.format(name)
    with torch.no_grad():
        base = Lite0MiniLM()
        first = base.encode_text([pictures.template.format(text) for text in pictures.train.node_text])
        encoded = F.normalize(base.encode_text(list(prompts.values())) - first.mean(0), dim=-1)
    return replace(tree, names=names, text=dict(zip(prompts, encoded, strict=True)))


def second_scores(first: Tensor, second: Tensor, test: PictureSet, tree: SecondTree) -> dict[str, float]:
    """Scores on the second tree, and how both label sets hold together.

    Args:
        first: logits of the first tree's nodes (n, N).
        second: logits of the second tree's nodes.
        test: the test pictures with their first targets.
        tree: the second tree.

    Returns:
        HCA and MTA on the second tree; over the edges of both trees the share whose child outscores its parent; over the
        nodes of each tree the mean AUROC.
    """
    scores = {k: float(v.mean()) for k, v in tree_scores(second, tree.target.numpy(), tree.taxonomy, tree.cuts).items()}
    sides = (
        (first, torch.from_numpy(test.targets), test.taxonomy),
        (second, tree.target, tree.taxonomy),
    )
    edges = [len(tax.edge_parent) for _, _, tax in sides]
    rates = [violation_rate(z, tax).item() for z, _, tax in sides]
    areas = [node_auroc(z, _multi_hot(target, tax), tax).item() for z, target, tax in sides]
    return {
        "second hca": scores["hca"],
        "second mta": scores["mta"],
        "violation": float(np.average(rates, weights=edges)),
        "auroc": areas[0],
        "second auroc": areas[1],
    }


def _multi_hot(target: Tensor, tax: Taxonomy) -> Tensor:
    path = tax.paths[target]
    hot = torch.zeros(len(target), tax.num_nodes)
    rows = torch.arange(len(target))[:, None].expand_as(path)
    hot[rows[path >= 0], path[path >= 0]] = 1
    return hot
