import pytest
import torch

from app_eval.measure.tree_scores import tree_scores
from hier_losses import Taxonomy
from hier_losses.metrics import hca, mta
from hier_losses.treecuts import sample_cuts


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_those_of_the_metrics(seed):
    tax = Taxonomy.synthetic((3, 7, 20), lone_child_rate=0.1, seed=seed)
    cuts = sample_cuts(tax, per_rate=2)
    g = torch.Generator().manual_seed(seed)
    target = tax.leaf[torch.randint(0, tax.num_leaves, (200,), generator=g)]
    logits = torch.randn(200, tax.num_nodes, generator=g)
    for node in tax.paths[target].T:
        known = node >= 0
        logits[torch.arange(200)[known], node[known]] += 1.5
    got = tree_scores(logits, target.numpy(), tax, cuts)
    assert got["hca"].mean() == pytest.approx(hca(logits, target, tax).item())
    assert got["mta"].mean() == pytest.approx(mta(logits, target, tax, cuts).item())
    best = tax.leaf[logits[:, tax.leaf].argmax(1)]
    assert got["la"].mean() == pytest.approx((best == target).double().mean().item())
    assert 0.05 < got["hca"].mean() < got["la"].mean() < 1
