"""Classes come, go and move without retraining; what stays keeps its features."""

import pytest
import torch

from hier_lora import HierLoraCLIP, PromptSet, lora_config, match_taxonomies
from hier_losses import HierarchyAwareLoss, LabelGraph, Taxonomy

OLD = [("animal", "cat"), ("animal", "dog"), ("plant", "oak"), ("plant", "fern"), ("rock",)]


def make(tiny, towers="vision", **kwargs):
    text = "cached" if towers == "vision" else "live"
    torch.manual_seed(0)
    model = HierLoraCLIP(tiny, Taxonomy.from_paths(OLD), lora_config(tiny, towers=towers, r=2), text, **kwargs)
    train(model, model.tax)
    return model


def train(model, tax, steps=2):
    model.train()
    loss = HierarchyAwareLoss(tax)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(pixels), tax.leaf[:3]).backward()
        optimizer.step()
    model.eval()


def features(model):
    with torch.no_grad():
        return model.node_features if model.text == "cached" else model.encode_nodes()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("towers", ["vision", "both"])
def test_old_nodes_keep_their_features(tiny, towers, center, pixels):
    model = make(tiny, towers, center_text=center)
    old_tax, before, old_logits = model.tax, features(model).clone(), model(pixels).detach()
    update = model.update_taxonomy(old_tax.extend([("animal", "owl"), ("fungus", "morel")]))
    after, logits = features(model), model(pixels).detach()
    kept = update.new_to_old >= 0
    if towers == "vision":
        assert torch.equal(after[kept], before[update.new_to_old[kept]])
        # A product of another width may round otherwise.
        torch.testing.assert_close(logits[:, kept], old_logits[:, update.new_to_old[kept]], atol=1e-5, rtol=1e-6)
    else:
        torch.testing.assert_close(after[kept], before[update.new_to_old[kept]], atol=1e-6, rtol=0)
    assert logits.shape == (4, old_tax.num_nodes + 3)
    # A new node's feature is what a model with these words and this centre would compute.
    raw = model._embed([model.tax.index("owl")])
    torch.testing.assert_close(
        after[model.tax.index("owl")], model._centred(raw, model.text_center)[0], atol=1e-6, rtol=0
    )


def test_removed_and_moved(tiny):
    model = make(tiny)
    before = {n: f.clone() for n, f in zip(model.tax.names, model.node_features, strict=True)}
    new = Taxonomy.from_paths([("animal", "dog"), ("animal", "fern"), ("plant", "oak"), ("plant", "moss"), ("rock",)])
    update = model.update_taxonomy(new)
    assert model.tax == new
    assert model.tax.names[update.old_to_new[Taxonomy.from_paths(OLD).index("fern")]] == "fern"
    for name in ("animal", "dog", "fern", "oak", "plant", "rock"):
        assert torch.equal(model.node_features[new.index(name)], before[name])
    assert not torch.equal(model.node_features[new.index("moss")], before["fern"])
    assert int((update.old_to_new < 0).sum()) == 1


def test_prune_and_extend_return_the_model(tiny, pixels):
    model = make(tiny)
    old, before = model.tax, model(pixels)
    model.update_taxonomy(old.prune([old.index("fern")]))
    model.update_taxonomy(model.tax.extend([("plant", "fern")]))
    assert model.tax == old
    torch.testing.assert_close(model(pixels), before)


def test_path_prompts_follow_a_move(tiny):
    tax = Taxonomy.from_paths(OLD)
    model = HierLoraCLIP(tiny, tax, prompts=PromptSet(tax, style="path"))
    before = {n: f.clone() for n, f in zip(tax.names, model.node_features, strict=True)}
    new = Taxonomy.from_paths([("animal", "cat"), ("animal", "dog"), ("animal", "fern"), ("plant", "oak"), ("rock",)])
    model.update_taxonomy(new)
    assert model.prompts.words[new.index("fern")] == "fern, animal"
    assert not torch.equal(model.node_features[new.index("fern")], before["fern"])
    assert torch.equal(model.node_features[new.index("dog")], before["dog"])


def test_a_new_namesake_leaves_the_old_words_alone(tiny):
    model = make(tiny)
    model.update_taxonomy(model.tax.extend([("rock", "oak")]), {("rock", "oak"): "petrified_oak"})
    assert model.prompts.words[model.tax.index(("rock", "oak"))] == "petrified oak"
    model = make(type(tiny)())
    model.update_taxonomy(model.tax.extend([("rock", "oak")]))
    words = model.prompts.words
    assert words[model.tax.index(("plant", "oak"))] == "oak"
    assert words[model.tax.index(("rock", "oak"))] == "oak, rock"
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("center", [False, True])
def test_a_loaded_model_knows_its_new_tree(tiny, tmp_path, pixels, center):
    model = make(tiny, center_text=center)
    model.update_taxonomy(model.tax.extend([("animal", "owl")]), {"owl": "night bird"})
    model.save_pretrained(tmp_path)
    loaded = HierLoraCLIP.from_pretrained(tmp_path)
    assert loaded.tax == model.tax
    assert torch.equal(loaded(pixels), model(pixels))
    before = loaded.node_features.clone()
    loaded.update_taxonomy(loaded.tax.extend([("animal", "elk")]))
    assert torch.equal(loaded.node_features[: loaded.tax.index("elk")], before[: loaded.tax.index("elk")])
    assert loaded.prompts.words[loaded.tax.index("owl")] == "night bird"


def test_training_goes_on_with_new_classes(tiny, tmp_path, pixels):
    make(tiny, "both").save_pretrained(tmp_path)
    assert not HierLoraCLIP.from_pretrained(tmp_path)(pixels).requires_grad
    model = HierLoraCLIP.from_pretrained(tmp_path, trainable=True)
    model.update_taxonomy(model.tax.extend([("animal", "owl")]))
    owl = torch.full((4,), model.tax.index("owl"))
    before = model(pixels).softmax(-1)[:, owl[0]].mean()
    loss = HierarchyAwareLoss(model.tax)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss(model(pixels), owl).backward()
        optimizer.step()
    model.eval()
    assert model(pixels).softmax(-1)[:, owl[0]].mean() > before


def test_levels_keep_their_temperatures(tiny):
    model = make(tiny)
    target = model.tax.leaf.repeat(40)
    scores = torch.randn(len(target), model.tax.num_nodes, generator=torch.Generator().manual_seed(0))
    assert model.calibrate(scores + torch.nn.functional.one_hot(target, model.tax.num_nodes), target)
    two = model.temperature.clone()
    model.update_taxonomy(model.tax.extend([("rock", "granite", "pink")]))
    assert torch.equal(model.temperature, torch.stack([two[0], two[1], two[1]]))
    model.predict([torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()])


def test_matching():
    old = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")])
    new = Taxonomy.from_paths([("a", "x"), ("c", "y"), ("c", "x"), ("b", "z"), ("b", "w")])
    found = match_taxonomies(old, new)
    paths = {new.path_of(v): (old.path_of(u) if u >= 0 else None) for v, u in enumerate(found.new_to_old.tolist())}
    assert paths == {
        ("a",): ("a",), ("b",): ("b",), ("c",): None, ("a", "x"): ("a", "x"), ("b", "z"): ("b", "z"),
        ("c", "y"): ("a", "y"), ("c", "x"): ("b", "x"), ("b", "w"): None,
    }  # fmt: skip
    for u, v in enumerate(found.old_to_new.tolist()):
        assert v < 0 or found.new_to_old[v] == u
    # Two nodes of one name on a side: which one moved cannot be told.
    twice = Taxonomy.from_paths([("c", "x"), ("d", "x")])
    assert (match_taxonomies(old, twice).new_to_old < 0).all()
    graph = LabelGraph.from_edges([("a", "x"), ("b", "x")])
    assert match_taxonomies(graph, LabelGraph.from_edges([("b", "x"), ("b", "y")])).new_to_old.tolist() == [2, 1, -1]
    with pytest.raises(ValueError, match="of the kind of old, LabelGraph, got Taxonomy"):
        match_taxonomies(graph, new)


def test_an_update_of_another_tree_is_refused(tiny):
    model = make(tiny)
    other = Taxonomy.from_paths([("a",), ("b",)])
    with pytest.raises(ValueError, match="update must start from the 7 nodes of the model, got 2"):
        model.update_taxonomy(other.extend([("c",)]))
    with pytest.raises(ValueError, match="no node is named 'unicorn'"):
        model.update_taxonomy(model.tax.extend([("animal", "owl")]), {"unicorn": "x"})
