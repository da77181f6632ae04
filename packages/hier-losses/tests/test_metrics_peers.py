"""Metrics against installed peers: hiclass (hierarchical precision, recall, F) and hiereval (full path, consistency)."""

import warnings

import numpy as np
import pytest
import torch

from hier_losses import metrics as M
from hier_losses.decoding import bottom_up, level_argmax
from hier_losses.path_ops import extend_paths
from hier_losses.taxonomy import Taxonomy


@pytest.fixture
def hiclass():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("hiclass.metrics")


@pytest.fixture
def hiereval():
    return pytest.importorskip("hiereval")


@pytest.fixture(params=[0, 1, 2, "equal"])
def case(request, random_tree):
    tax = Taxonomy.synthetic((3, 8, 20), seed=1) if request.param == "equal" else random_tree(request.param)
    generator = torch.Generator().manual_seed(7)
    target = tax.leaf[torch.randint(tax.num_leaves, (80,), generator=generator)]
    logits = torch.randn(80, tax.num_nodes, dtype=torch.float64, generator=generator)
    path = tax.paths[target]
    logits.scatter_add_(1, path.clamp(min=0), 2.0 * (path >= 0).double())
    return tax, logits, target


def text(paths):
    return np.array([[str(v) if v >= 0 else "" for v in row] for row in paths.tolist()], dtype=object)


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("decode", [bottom_up, level_argmax])
def test_hiclass(case, decode, average, hiclass):
    tax, logits, target = case
    pred = decode(logits, tax)
    ours = M.hierarchical_prf(pred, target, tax, average)
    true, guess = text(tax.paths[target]), text(pred)
    with warnings.catch_warnings():
        # It warns of every sample without a hit, whose F-score it takes as 0, as we do.
        warnings.simplefilter("ignore")
        peer = [f(true, guess, average=average) for f in (hiclass.precision, hiclass.recall, hiclass.f1)]
    assert [value.item() for value in ours.values()] == pytest.approx(peer, rel=1e-12)
    assert 0.1 < peer[0] < 1


@pytest.mark.parametrize("decode", [bottom_up, level_argmax])
def test_hiereval(case, decode, hiereval):
    tax, logits, target = case
    pred = extend_paths(decode(logits, tax), tax)
    true = extend_paths(tax.paths[target], tax).tolist()
    assert M.full_path_accuracy(pred, target, tax).item() == pytest.approx(
        hiereval.full_path_accuracy(true, pred.tolist()), rel=1e-12
    )
    known = hiereval.Taxonomy.from_paths(extend_paths(tax.paths[tax.leaf], tax).tolist())
    rate = hiereval.inconsistency_rate(pred.tolist(), known)
    assert M.tice(pred, tax).item() == pytest.approx(rate, rel=1e-12)
    assert (rate == 0) == (decode is bottom_up)
