"""Classifiers of hier-lora as controls beside the variants: the same features, and no text."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from app_data.read.pictures import PictureSet
from app_train.core.errors import RunError
from app_train.recipes.mat import variants
from app_train.recipes.mat.data import Pictures
from app_train.recipes.mat.rows import chosen_rows
from app_train.recipes.mat.settings import MATConfig, MATFitConfig
from app_train.recipes.mat.variants import FITTED, Shared
from hier_losses import Taxonomy
from hier_losses.discriminant import TreeLDA
from hier_losses.treecuts import TreeCuts

TREE = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")])


def shared(centred=False, each=6):
    draw = np.random.default_rng(0)
    means = torch.from_numpy(draw.normal(size=(4, 5))).float()

    def part(count, shift):
        leaf = np.repeat(np.arange(4), count)
        x = means[leaf] + 0.7 * torch.from_numpy(draw.normal(size=(len(leaf), 5))).float() + shift
        store, many = np.zeros((1, 8, 8, 3), np.uint8), len(leaf)
        styles = tuple(("p", "q")[i % 2] for i in range(many)) if centred else ("",) * many
        rows = np.zeros(many, np.int64)
        return x, PictureSet(
            store, rows, TREE.leaf.numpy()[leaf], styles, ("",) * many, TREE, "print", node_text=TREE.names
        )

    (x, train), (y, test) = part(each, 0.0), part(5, 3.0 if centred else 0.0)
    pictures = Pictures(train, test, TreeCuts(TREE, [TREE.leaf, [0, 1]]), "{}", centred)
    features = SimpleNamespace(neighbour_train=x, neighbour_test=y)
    run = SimpleNamespace(facts=lambda name, seed, **more: {"row": name, "seed": seed, **more})
    config = MATConfig(study="controls", fit=MATFitConfig(epochs=8, lr=0.05, batch_size=8, dropout=0.2))
    return Shared(config, run, pictures, features, None)


@pytest.mark.parametrize("centred", [False, True])
def test_tree_lda_is_that_of_hier_losses(centred, tmp_path):
    given = shared(centred)
    found = variants._fitted(given, "TreeLDA", tmp_path, 0)
    x, y = given.features.neighbour_train.double(), given.features.neighbour_test.double()
    train, test = given.pictures.train, given.pictures.test
    if centred:  # each style on its own mean, and the new one too
        for style in "pq":
            rows = torch.tensor([s == style for s in train.styles])
            x[rows] -= x[rows].mean(0)
        y -= y.mean(0)
    else:
        y, x = y - x.mean(0), x - x.mean(0)
    model = TreeLDA(TREE, shrinkage=0.4).fit(x.float(), torch.from_numpy(train.targets))
    said = TREE.leaf[model.log_prob(y.float())[:, TREE.leaf].argmax(1)].numpy()  # it knows all nodes
    assert found["scores"]["la"] == pytest.approx((said == test.targets).mean())
    assert variants._fitted(given, "TreeLDA", tmp_path, 0) == found


def test_a_free_head_depends_on_its_seed_alone(tmp_path):
    given = shared()
    scores = []
    for number, seed in enumerate((0, 0, 1)):
        variants._fitted(given, "free head", tmp_path / str(number), seed)
        scores.append((tmp_path / str(number) / "scores.safetensors").read_bytes())
    found = variants._fitted(given, "free head", tmp_path / "0", 0)
    assert scores[0] == scores[1]
    assert found["scores"]["la"] > 0.5


def test_one_picture_a_class_has_no_spread(tmp_path):
    with pytest.raises(RunError, match="the row TreeLDA cannot be fitted .* two pictures of some class"):
        variants._fitted(shared(each=1), "TreeLDA", tmp_path, 0)


def test_controls_are_chosen_by_name():
    assert list(chosen_rows(FITTED, ("TreeLDA",))) == ["TreeLDA"]
    with pytest.raises(RunError, match="no row 'x' in this study; it has 'free head', 'TreeLDA'"):
        chosen_rows(FITTED, ("x",))
