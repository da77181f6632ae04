"""Label sets other than one tree, for the recipe `mat`: no tree at all, and a second tree whose classes cut across the first."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
        names: key of each node's text: a class has that of the first tree.
        text: features of the superclasses' texts by key.
        target: (n,) node of each test picture.
        train_target: (n,) node of each training picture.
    """

    taxonomy: Taxonomy
    cuts: TreeCuts
    names: list[str]
    text: dict[str, Tensor]
    target: Tensor
    train_target: Tensor


def second_tree(pictures: Pictures) -> SecondTree:
    """The superclasses for the pictures of CIFAR-100.

    Raises:
        RunError: the pictures have other classes.
    """
    tax, other = pictures.train.taxonomy, cifar100().taxonomy
    by_name = {tax.names[leaf]: leaf for leaf in tax.leaf.tolist()}
    own = {other.names[leaf]: leaf for leaf in other.leaf.tolist()}
    if by_name.keys() != own.keys():
        raise RunError("the study 'cross' needs CIFAR-100: run it with --data cifar100-fewshot")
    names, prompts = [], {}
    for node, name in enumerate(other.names):
        if other.leaf_index[node] >= 0:
            names.append(str(by_name[name]))
        else:
            names.append(f"superclass {node}")
            prompts[names[-1]] = pictures.template.format(name.replace("_", " "))
    with torch.no_grad():
        base = Lite0MiniLM()
        first = base.encode_text([pictures.template.format(text) for text in pictures.train.node_text])
        encoded = F.normalize(base.encode_text(list(prompts.values())) - first.mean(0), dim=-1)
    move = np.array([own.get(name, -1) for name in tax.names])
    return SecondTree(
        other,
        cuts_for(other),
        names,
        dict(zip(prompts, encoded, strict=True)),
        torch.from_numpy(move[pictures.test.targets]),
        torch.from_numpy(move[pictures.train.targets]),
    )


def second_scores(first: Tensor, second: Tensor, pictures: Pictures, tree: SecondTree) -> dict[str, float]:
    """Scores on the second tree, and how both label sets hold together.

    Args:
        first: logits of the first tree's nodes (n, N).
        second: logits of the second tree's nodes.
        pictures: the test pictures with their first targets.
        tree: the second tree.

    Returns:
        HCA and MTA on the second tree; over the edges of both trees the share whose child outscores its parent; over the
        nodes of each tree the mean AUROC.
    """
    scores = {k: float(v.mean()) for k, v in tree_scores(second, tree.target.numpy(), tree.taxonomy, tree.cuts).items()}
    sides = (
        (first, torch.from_numpy(pictures.test.targets), pictures.test.taxonomy),
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
