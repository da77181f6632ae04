"""Figures of a report: names with a dollar sign or in Chinese are text, and of many top nodes those with the most errors are shown."""

import base64

import numpy as np
import pytest
import torch

from app_eval.measure.paths import outcome
from app_eval.show.figures import TOP, mistake_bars, top_confusion, training_curves
from hier_losses import Taxonomy
from hier_losses.treecuts import sample_cuts


def drawn(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def case(tops, wrong=()):
    """Two pictures a leaf; those under the named top nodes are taken for a leaf of the first top node."""
    tax = Taxonomy.from_paths([(top, f"{top} {leaf}") for top in tops for leaf in "ab"])
    target = np.repeat(tax.leaf.numpy(), 2)
    answer = target.copy()
    for top in wrong:
        answer[[tax.names[tax.paths[t][0]] == top for t in target]] = target[0]
    logits = torch.nn.functional.one_hot(torch.from_numpy(answer), tax.num_nodes).float()
    return tax, outcome(logits, target, tax, sample_cuts(tax, rates=(0.5,), per_rate=2))


@pytest.mark.parametrize("name", ["$5 to $10", "a $ b", "\u52d5\u7269", "<b> & \u732b"])
def test_names_are_text(name):
    tax, found = case([name, "plain"])
    records = [{"stage": name, "step": i, "loss": 1.0 / i} for i in range(1, 30)]
    expected = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for uri in (top_confusion({name: found}, tax), mistake_bars({name: found}, tax), training_curves({name: records})):
        assert expected in drawn(uri)


def test_of_many_top_nodes_those_with_the_most_errors_are_shown():
    tops = [f"top{i:03}x" for i in range(200)]
    wrong = tops[7::10]
    tax, found = case(tops, wrong)
    text = drawn(top_confusion({"a row": found}, tax))
    assert f"the {TOP} of 200 top nodes with the most errors" in text
    assert all(name in text for name in wrong)
    assert sum(name in text for name in tops) == TOP
    few_tax, few = case(tops[:TOP])
    text = drawn(top_confusion({"a row": few}, few_tax))
    assert "most errors" not in text
    assert all(name in text for name in tops[:TOP])
