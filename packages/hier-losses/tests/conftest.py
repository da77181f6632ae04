"""Fixtures that every test file of this package shares."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hier_losses.taxonomy import Taxonomy

T11_PATHS = [
    ("a", "a1", "x"),
    ("a", "a1", "y"),
    ("a", "a2"),
    ("a", "a3"),
    ("b", "b1", "b11"),
    ("b", "b1", "b12"),
    ("c",),
]


@pytest.fixture
def t11():
    """Eleven nodes: 0 a, 1 b, 2 c; 3 a1, 4 a2, 5 a3 (under a), 6 b1 (under b); 7 x, 8 y (a1); 9 b11, 10 b12 (b1)."""
    return Taxonomy.from_paths(T11_PATHS)


def _random_tree(seed, num_nodes=None, max_depth=6):
    rng = np.random.default_rng(seed)
    num_nodes = int(rng.integers(3, 40)) if num_nodes is None else num_nodes
    parents, depth, names = [], [], []
    for node in range(num_nodes):
        up = -1 if node == 0 else int(rng.integers(-1, node))
        while up >= 0 and depth[up] >= max_depth:
            up = parents[up]
        parents.append(up)
        depth.append(1 if up < 0 else depth[up] + 1)
        names.append(f"n{node}")
    # A lone chain hangs under the last node, so that lone children and ragged leaves always occur.
    for step in range(2):
        parents.append(len(parents) - 1)
        names.append(f"lone{step}")
    return Taxonomy(names, parents)


@pytest.fixture
def random_tree():
    """Return a function of a seed that gives a ragged tree with several top nodes and lone chains."""
    return _random_tree


@pytest.fixture
def close():
    """Return a function that compares two values in float64 and fails with both printed."""

    def check(ours, reference, rtol=1e-9, atol=1e-12):
        ours = torch.as_tensor(ours, dtype=torch.float64).detach().cpu()
        reference = torch.as_tensor(reference, dtype=torch.float64).detach().cpu()
        torch.testing.assert_close(ours, reference, rtol=rtol, atol=atol, equal_nan=True)

    return check


def _tree_folder():
    for folder in Path(__file__).resolve().parents:
        if (folder / "shared" / "data" / "trees").is_dir():
            return folder / "shared" / "data" / "trees"
    return None


@pytest.fixture
def tree_file():
    """Return a function from a tree's name to its JSON file; skips where the trees are not beside the repository."""
    folder = _tree_folder()
    if folder is None:
        pytest.skip("the published trees are not on this machine")
    return lambda name: folder / f"{name}.json"


@pytest.fixture
def published_tree(tree_file):
    """Return a function from a tree's name (cifar100, sun, imagenet, rarespecies) to the content of its JSON file."""
    return lambda name: json.loads(tree_file(name).read_text())
