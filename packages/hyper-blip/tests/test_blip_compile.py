"""torch.compile(fullgraph=True), forward and backward, of similarities and losses."""

import pytest
import torch

from hyper_blip import (
    HyperbolicConfig,
    entailment_loss,
    image_text_contrastive_loss,
    image_text_matching_loss,
    pairwise_similarity,
    query_diversity_penalty,
    text_generation_loss,
)

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def check(function, *inputs):
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = call(*leaves)
        floating = [x for x in leaves if x.requires_grad]
        results.append((out, *torch.autograd.grad(out.sum(), floating, allow_unused=True, materialize_grads=True)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def features(*shape):
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("mode", ["cosine", "distance", "inner", "angle"])
def test_similarities_and_contrastive_loss(mode):
    image, text, c = features(3, 2, 4), features(3, 4), torch.tensor(0.7)
    check(lambda i, t, c: pairwise_similarity(i, t, mode, c), image, text, c)
    config, keys = HyperbolicConfig(similarity=mode), torch.tensor([0, 1, 0])
    check(lambda i, t, c: image_text_contrastive_loss(i, t, config, 0.1, keys, c=c)[0], image, text, c)


def test_other_losses():
    check(lambda a, b: entailment_loss(a, b), features(3, 4), features(3, 4) + 1)
    check(query_diversity_penalty, features(2, 3, 4))
    check(image_text_matching_loss, features(3, 2), torch.tensor([1, 0, 0]))
    check(text_generation_loss, features(2, 3, 5), torch.tensor([[0, 1, -100], [0, 2, 3]]))
