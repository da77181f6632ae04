"""torch.compile(fullgraph=True), forward and backward, of similarities, losses, and whole steps of stage 1."""

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
    weights = torch.tensor([1.0, 0.0, 1.0])
    kept = image_text_matching_loss(features(3, 2)[[0, 2]], torch.tensor([1, 0]))
    torch.testing.assert_close(image_text_matching_loss(features(3, 2), torch.tensor([1, 0, 0]), weights), kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hyperbolic", "steps"),
    [
        (HyperbolicConfig.distance(rtp_mode="drop", rtp_targets=("itc", "itm")), (0, 1, 5)),
        (
            HyperbolicConfig(
                similarity="mix", manifold="lorentz", rqs_mode="per_batch", loss_weights={"entail": 0.2, "diversity": 0.1},
            ),
            (3,),
        ),
        (HyperbolicConfig.euclidean(itm_negatives="local", share_image_kv=True, fused=False), (0,)),
    ],
    ids=["pruned", "mix", "shared"],
)  # fmt: skip
def test_a_whole_step_of_stage_1_is_one_graph(stage1, batch, hyperbolic, steps):
    """Random queries, pruned captions and hard negatives included; later steps are one more graph, for any number."""
    from torch._dynamo.utils import counters

    model = stage1(hyperbolic).train()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in steps:
        found = []
        for call in (model, compiled):
            model.zero_grad()
            more = {"progress": 0.1} if hyperbolic.similarity == "mix" else {}
            out = call(*batch(5, seed=step), torch.tensor([0, 1, 2, 1, 3]), step=step, **more)
            out.loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append({"loss": out.loss.detach(), **gradients, **out.diagnostics})
        assert found[0].keys() == found[1].keys()
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


def test_rows_without_a_negative_count_for_nothing(stage1, batch):
    """All pictures show the same but one: compiled, rows that eager mode drops have weight 0."""
    model = stage1(HyperbolicConfig.euclidean()).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same = torch.zeros(4, dtype=torch.long)
    eager = model(*batch(), same, step=0)
    torch.testing.assert_close(compiled(*batch(), same, step=0).loss_itm, eager.loss_itm, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compiled_says_so(stage1, batch):
    model = stage1(HyperbolicConfig.euclidean(on_non_finite="skip")).train()
    with pytest.raises(Exception, match="looks at the loss, which a compiled step cannot"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(*batch(), step=0)
