"""Heads on features, products of experts, the choice of their settings, and what is saved."""

import copy
import itertools
import json

import pytest
import torch
from torch.nn import functional as F

from hier_lora import LinearHead, Neighbours, PoolSettings, ProductOfExperts, choose, fit_temperature, pool
from hier_losses import Taxonomy, decoding
from hier_losses.discriminant import TreeLDA
from hier_losses.functional import hxe, level_cross_entropy
from hier_losses.metrics import average_hierarchical_distance
from hier_losses.probabilities import leaf_columns


@pytest.fixture
def case(tax):
    draw = torch.Generator().manual_seed(0)
    centers = torch.randn(tax.num_leaves, 6, generator=draw) * 2
    target = tax.leaf.repeat(8)
    features = centers[tax.leaf_index[target]] + torch.randn(len(target), 6, generator=draw)
    return tax, features, target


@pytest.fixture
def product(case):
    tax, features, target = case
    head = LinearHead.from_prompts(tax, F.normalize(torch.randn(tax.num_nodes, 6), dim=1), 3.0, dropout=0.5)
    experts = {"head": head, "lda": TreeLDA(tax).fit(features, target), "near": Neighbours(tax, features, target)}
    settings = PoolSettings({"head": 0.5, "lda": 1.0, "near": 0.0}, {"head": 1.0, "lda": 3.0, "near": 2.0})
    return ProductOfExperts(experts, settings).eval()


@pytest.mark.parametrize(("over", "loss"), [("leaves", hxe), ("nodes", level_cross_entropy)])
def test_a_free_head_learns(case, over, loss):
    tax, features, target = case
    head = LinearHead(tax, 6, over, dropout=0.1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    settings = {"discount": 1.0} if over == "leaves" else {"levels": "extended"}
    for _ in range(60):
        optimizer.zero_grad()
        loss(head(features), target, tax, **settings).backward()
        optimizer.step()
    found = head.eval().log_prob(features)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(len(features)))
    assert (tax.leaf[found.argmax(1)] == target).float().mean() > 0.9


@pytest.mark.parametrize("over", ["leaves", "nodes"])
def test_prompts_are_the_floor(tax, over):
    prompts = F.normalize(torch.randn(tax.num_nodes, 6), dim=1)
    pictures = F.normalize(torch.randn(4, 6), dim=1)
    head = LinearHead.from_prompts(tax, prompts, 20.0, over)
    expected = 20 * pictures @ prompts.T
    torch.testing.assert_close(head(pictures), expected if over == "nodes" else expected[:, tax.leaf])


@pytest.mark.parametrize("over", ["leaves", "nodes"])
def test_a_head_follows_the_taxonomy(tax, over):
    head = LinearHead(tax, 3, over)
    torch.nn.init.normal_(head.weight)
    row = dict(zip(tax.leaf_names if over == "leaves" else tax.names, head.weight.detach().clone(), strict=True))
    new = Taxonomy.from_paths(
        [("animal", "cat"), ("animal", "owl"), ("rock", "dog"), ("plant", "oak", "holm"), ("plant", "fern"), ("sky",)]
    )
    head.update_taxonomy(new)
    found = dict(zip(new.leaf_names if over == "leaves" else new.names, head.weight.detach(), strict=True))
    for name in ("cat", "dog", "fern"):
        assert torch.equal(found[name], row[name]), name
    torch.testing.assert_close(found["holm"], row["oak"])  # the leaf that got a child hands its weights down
    animal = row["cat"] if over == "leaves" else row["animal"] * 0 + found["owl"]
    torch.testing.assert_close(found["owl"], animal)
    assert head.weight.requires_grad
    assert head(torch.randn(2, 3)).shape[1] == (new.num_leaves if over == "leaves" else new.num_nodes)


def test_new_classes_may_start_from_prompts(tax):
    head = LinearHead.from_prompts(tax, torch.ones(tax.num_nodes, 2), 1.0)
    update = tax.extend([("animal", "owl")])
    head.update_taxonomy(update, torch.full((update.taxonomy.num_nodes, 2), 7.0))
    owl = update.taxonomy.leaf_index[update.taxonomy.index("owl")]
    assert head.weight[owl].tolist() == [7, 7]
    assert (head.weight.sum(1) == 2).sum() == tax.num_leaves


def test_neighbours(case):
    tax, features, target = case
    near = Neighbours(tax, features[:-1], target[:-1], scale=10.0)
    query = torch.randn(5, 6)
    cosine = F.cosine_similarity(query[:, None], features[None, :-1], dim=2)
    best = torch.stack([cosine[:, target[:-1] == leaf].amax(1) for leaf in tax.leaf], 1)
    torch.testing.assert_close(near.log_prob(query), (10 * best).log_softmax(1))
    assert near.log_prob(query[:0]).shape == (0, tax.num_leaves)
    near.update_taxonomy(tax.prune([tax.index("cat")]))
    assert len(near.features) == len(features) - 1 - 8
    near.update_taxonomy(near.tax.extend([("sky",)]))
    assert near.log_prob(query)[:, near.tax.leaf_index[near.tax.index("sky")]].isneginf().all()
    with pytest.raises(ValueError, match="update must keep a leaf with pictures"):
        near.update_taxonomy(Taxonomy.from_paths([("other",)]))


def test_pool_is_the_weighted_sum(product, case):
    tax, features, _ = case
    found = product.expert_log_probs(features)
    expected = 0.5 * found["head"] + found["lda"][:, tax.leaf] / 3
    torch.testing.assert_close(product.log_prob(features), expected.log_softmax(1))
    # One tensor for each expert: another backbone's features may stand behind each.
    torch.testing.assert_close(product(dict.fromkeys(product.experts, features)), product(features))
    assert product.log_prob(features[:0]).shape == (0, tax.num_leaves)


def test_an_expert_of_no_weight_may_rule_leaves_out(tax):
    ruled = torch.full((1, 5), -torch.inf)
    ruled[0, 0] = 0
    settings = PoolSettings({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0})
    assert pool({"a": torch.zeros(1, 5), "b": ruled}, tax, settings).isfinite().all()


@pytest.mark.parametrize("by", ["leaf", "ahd"])
def test_the_choice_is_the_best_of_the_grid_or_near(tax, by):
    draw = torch.Generator().manual_seed(3)
    target = tax.leaf[torch.randint(tax.num_leaves, (300,), generator=draw)]
    truth = F.one_hot(tax.leaf_index[target], tax.num_leaves)
    experts = {
        "good": (truth * 2 + 5 * torch.randn(300, 5, generator=draw)).log_softmax(1),
        "other": 30 * (truth + 2.5 * torch.randn(300, 5, generator=draw)).log_softmax(1),
        "noise": torch.randn(300, 5, generator=draw).log_softmax(1),
    }

    def score(settings):
        scores = pool(experts, tax, settings)
        paths = getattr(decoding, settings.decoder)(scores, tax)
        if by == "ahd":
            return -float(average_hierarchical_distance(paths, target, tax))
        return float((paths.gather(1, (paths >= 0).sum(1, keepdim=True) - 1).squeeze(1) == target).double().mean())

    found = choose(experts, target, tax, by)
    assert score(found) == pytest.approx(found.leaf if by == "leaf" else -found.ahd, abs=1e-6)
    singles = [score(PoolSettings({n: float(n == one) for n in experts}, found.temperatures)) for one in experts]
    assert score(found) > max(singles)
    grid = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    everything = [
        score(PoolSettings(dict(zip(experts, weights, strict=True)), found.temperatures))
        for weights in itertools.product(grid, repeat=3)
        if any(weights)
    ]
    assert score(found) >= max(everything) - 0.02
    for name, t in found.temperatures.items():
        assert t == fit_temperature(experts[name], tax.leaf_index[target])


def test_crm_is_chosen_where_it_helps():
    # Two close leaves share the mass that a far one beats alone.
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z")])
    rows = torch.tensor([[0.3, 0.3, 0.4], [0.32, 0.28, 0.4], [0.28, 0.32, 0.4], [0.1, 0.1, 0.8]]).log()
    target = tax.indices(["x", "x", "y", "z"])
    found = choose({"one": rows.repeat(5, 1)}, target.repeat(5), tax, "ahd")
    assert found.decoder == "crm"
    assert choose({"one": rows.repeat(5, 1)}, target.repeat(5), tax, "ahd").ahd < 1
    assert found == choose({"one": rows.repeat(5, 1)}, target.repeat(5), tax, "ahd")


def noisy(target):
    """Targets of which some are wrong: where all are right no temperature is the best."""
    return torch.where(torch.arange(len(target)) % 10 == 1, target.flip(0), target)


def test_choose_predict_calibrate(product, case):
    tax, features, target = case
    found = product.choose(features, noisy(target), "ahd")
    assert found is product.settings
    assert found.leaf > 0.8
    paths = product.predict(features)
    chosen = getattr(decoding, found.decoder)(product.log_prob(features), tax)
    assert [p.nodes for p in paths] == [tuple(v for v in row if v >= 0) for row in chosen.tolist()]
    assert product.calibrate(features, noisy(target))
    assert product.temperature.shape == (2,)
    assert [p.nodes for p in product.predict(features)] == [p.nodes for p in paths]
    assert product.predict(features[:1], "threshold", tau=0.9)[0].decoder == "threshold"
    assert product.predict(features[:0]) == []


def test_the_product_follows_the_taxonomy(product, case):
    tax, features, target = case
    product.calibrate(features, noisy(target))
    update = product.update_taxonomy(tax.extend([("animal", "bird", "owl")]))
    new = update.taxonomy
    assert product.temperature.shape == (3,)
    assert {expert.tax for expert in product.experts.values()} == {new}
    owl = new.index("owl")
    assert all(owl not in p.nodes for p in product.predict(features))
    fresh = torch.full((3, 6), 9.0) + torch.randn(3, 6) / 10
    product.experts["lda"].partial_fit(fresh, torch.full((3,), owl))
    product.settings = PoolSettings({"head": 0.0, "lda": 1.0, "near": 0.0}, product.settings.temperatures)
    assert all(p.names[-1] == "owl" for p in product.predict(fresh))


def test_save_and_load(product, case, tmp_path):
    tax, features, target = case
    product.choose(features, target)
    product.calibrate(features, noisy(target))
    product.save_pretrained(tmp_path / "p")
    assert {p.suffix for p in (tmp_path / "p").iterdir()} == {".json", ".safetensors"}
    again = ProductOfExperts.from_pretrained(tmp_path / "p")
    assert again.settings == product.settings
    assert again.tax == tax
    assert torch.equal(again.log_prob(features), product.log_prob(features))
    assert again.predict(features) == product.predict(features)
    given = TreeLDA(tax, star=True, v=[0.5], covariance=torch.eye(6)).fit(features, target)
    ProductOfExperts({"only": given}).save_pretrained(tmp_path / "one")
    one = ProductOfExperts.from_pretrained(tmp_path / "one").experts["only"]
    assert torch.equal(one.log_prob(features), given.log_prob(features))
    (tmp_path / "p" / "experts.safetensors").unlink()
    with pytest.raises(ValueError, match="folder must hold complete saved experts"):
        ProductOfExperts.from_pretrained(tmp_path / "p")
    found = json.loads((tmp_path / "one" / "experts.json").read_text())
    found["experts"]["only"]["kind"] = "other"
    (tmp_path / "one" / "experts.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="unknown kind of expert 'other'"):
        ProductOfExperts.from_pretrained(tmp_path / "one")


def test_fit_temperature_leaves_ruled_out_pictures_aside():
    scores = torch.tensor([[2.0, 0.0, -torch.inf], [0.0, 1.0, -torch.inf], [1.0, 0.0, -torch.inf]])
    truth = torch.tensor([0, 1, 1])
    expected = fit_temperature(scores[:, :2], truth)
    assert fit_temperature(torch.cat([scores, scores[:1]]), torch.tensor([0, 1, 1, 2])) == pytest.approx(expected)
    assert fit_temperature(scores, torch.tensor([2, 2, 2])) == 1


def test_errors(product, case):
    tax, features, target = case
    ok = {"a": torch.zeros(2, 5)}
    lone = PoolSettings({"a": 0.0}, {"a": 1.0})
    other = TreeLDA(Taxonomy.from_paths([("q",)]))

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tax = tax

    odd = ProductOfExperts({"odd": Odd()})
    for call, message in (
        (lambda: LinearHead(tax, 3, "levels"), "over must be one of"),
        (lambda: LinearHead(tax, 0), "dim must be at least 1, got 0"),
        (lambda: LinearHead(tax, 3, dropout=1.0), "dropout must lie in"),
        (lambda: LinearHead.from_prompts(tax, torch.zeros(2, 3), 1.0), "node_features must cover 7 nodes, got 2"),
        (lambda: LinearHead(tax, 3).update_taxonomy(Taxonomy.from_paths([("q",)]).extend([("r",)])), "update must start from the 7"),
        (lambda: Neighbours(tax, features, target[:2]), "target must hold a node id for each picture"),
        (lambda: Neighbours(tax, features[:1], torch.tensor([0])), "target must hold leaves"),
        (lambda: Neighbours(tax, features, target, 0.0), "scale must be above 0"),
        (lambda: pool(ok, tax, lone), "weights must hold one above 0"),
        (lambda: pool({}, tax, lone), r"log_probs must hold every expert, \['a'\] are missing"),
        (lambda: choose(ok, target[:2], tax, "f1"), "by must be one of"),
        (lambda: choose({}, target[:2], tax), "must not be empty, got 0 experts, 2 pictures"),
        (lambda: choose(ok, target[:0], tax), "must not be empty"),
        (lambda: choose(ok, target[:2], tax, weights=(-1.0, 1.0)), "weights must hold numbers of at least 0"),
        (lambda: choose(ok, torch.tensor([0, 0]), tax), "target must hold leaves"),
        (lambda: ProductOfExperts({}), "experts must hold at least one"),
        (lambda: ProductOfExperts({"a": LinearHead(tax, 3), "b": other}), "experts must share one taxonomy"),
        (lambda: ProductOfExperts({"b": other}, lone), r"settings must be for \['b'\], got \['a'\]"),
        (lambda: odd.save_pretrained("nowhere"), "experts must be of kinds that can be saved, got Odd for 'odd'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.compile
def test_compile(product, case):
    _, features, _ = case
    compiled = torch.compile(product.log_prob, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), product.log_prob(features))


def test_copies_stand_alone(product, case):
    _, features, _ = case
    other = copy.deepcopy(product)
    other.experts["head"].update_taxonomy(product.tax.extend([("sky",)]))
    assert product.log_prob(features).shape[1] == 5
    assert leaf_columns(product.experts["lda"].log_prob(features), product.tax).shape[1] == 5
