"""The losses of a row are those of hier-losses; both stages see the same offsets."""

import pytest
import torch

from app_train.recipes.lora.losses import LOSSES, LossConfig, loss_parts
from app_train.recipes.lora.objective import Objective
from app_train.recipes.lora.task import style_offsets
from hier_lora import HierLoraCLIP
from hier_losses import Taxonomy
from hier_losses.functional import hisce, hxe, level_cross_entropy, parent_child_consistency, tp_kl


def test_losses_are_those_of_hier_losses():
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "u")])
    logits = torch.randn(5, tax.num_nodes, generator=torch.Generator().manual_seed(0))
    target = tax.leaf[torch.tensor([0, 1, 2, 3, 0])]
    weights = LossConfig(leaf=1, level=2, tp_kl=3, hisce=4, consistency=5, eps=0.2)
    parts = loss_parts(logits, target, tax, weights)
    assert float(parts["leaf"]) == pytest.approx(float(torch.nn.functional.cross_entropy(logits[:, 2:], target - 2)))
    assert float(parts["level"]) == pytest.approx(2 * float(level_cross_entropy(logits, target, tax)))
    assert float(parts["tp_kl"]) == pytest.approx(3 * float(tp_kl(logits, target, tax)))
    assert float(parts["hisce"]) == pytest.approx(4 * float(hisce(logits, target, tax, eps=0.2)))
    assert float(parts["consistency"]) == pytest.approx(5 * float(parent_child_consistency(logits, tax)))
    assert set(loss_parts(logits, target, tax, LossConfig(leaf=1))) == {"leaf"}
    leaves = float(loss_parts(logits, target, tax, LossConfig(hxe=2, discount=1))["hxe"])
    assert leaves == pytest.approx(2 * float(hxe(logits[:, tax.leaf], target, tax, discount=1.0)))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_registry_can_be_switched_on(name):
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "u")])
    logits = torch.randn(5, tax.num_nodes, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parts = loss_parts(logits, tax.leaf[torch.tensor([0, 1, 2, 3, 0])], tax, LossConfig(**{name: 1}))
    assert set(parts) == {name}
    parts[name].backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_offsets_give_every_style_the_common_mean():
    features = torch.randn(9, 4, dtype=torch.float64)
    styles = ("b", "a", "a", "b", "c", "c", "c", "a", "b")
    moved = features - style_offsets(features, styles)
    for style in "abc":
        chosen = torch.tensor([s == style for s in styles])
        torch.testing.assert_close(moved[chosen].mean(0), features.mean(0))
        shift = (features - moved)[chosen]
        torch.testing.assert_close(shift, shift[:1].expand_as(shift))


class TinyEncoder(torch.nn.Module):
    """A dual encoder whose tower averages the pixels."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(3, 5)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
        self.words = torch.randn(len(TREE.names), 5)

    def vision(self, pixels):
        return pixels.mean((-1, -2))

    def project(self, features):
        return self.projection(features)

    def encode_image(self, pixels):
        return self.project(self.vision(pixels))

    def encode_text(self, texts):
        return self.words[: len(texts)]


TREE = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z")])


def test_both_stages_see_the_same_offsets():
    """The second stage takes off the tower's output what the first stage's cached features come without."""
    torch.manual_seed(0)
    model = HierLoraCLIP(TinyEncoder(), TREE)
    objective = Objective(model, LossConfig(level=1))
    pixels, target = torch.randn(6, 3, 4, 4), TREE.leaf[torch.tensor([0, 1, 2, 0, 1, 2])]
    features = model.dual_encoder.vision(pixels)
    offsets = style_offsets(features, ("s", "s", "t", "t", "s", "t"))
    cached = objective(target, features - offsets)["level"]
    torch.testing.assert_close(objective(target, pixels, offsets)["level"], cached)
    assert not torch.allclose(objective(target, pixels)["level"], cached)
