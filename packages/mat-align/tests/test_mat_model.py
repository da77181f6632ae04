"""Models, variants, the objective, saving."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hier_losses.treecuts import sample_cut
from mat_align import (
    EUCLIDEAN,
    HETEROGENEOUS,
    PROTECT,
    SEPARATE,
    SHARED,
    VANILLA,
    FeatureMATModel,
    LayerTokens,
    MaPLePrompts,
    MATHead,
    MATModel,
    MATObjective,
    PromptSRCPrompts,
    PromptSRCRegularizer,
    StageTokens,
    Variant,
    released,
)
from mat_align.intermediate import exact_intermediate_curvature, intermediate_curvature, search_radii
from mat_align.visual_tree import TextQueriedAttention

ALL = (VANILLA, PROTECT, EUCLIDEAN, SHARED, SEPARATE, HETEROGENEOUS)
TARGET = torch.tensor([6, 3, 5])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def features(tax, dim=8, seed=0):
    g = seeded(seed)
    text = {name: F.normalize(torch.randn(dim, generator=g), dim=0) for name in tax.names}
    tokens = StageTokens((4, 6), dim)
    with torch.no_grad():
        for p in tokens.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return tokens, text


@pytest.mark.parametrize("variant", ALL, ids=lambda v: v.name)
def test_curvatures_of_variants(variant):
    head = MATHead(8, variant, c_img=0.05, c_txt=0.1, c_mid=0.2)
    names = sorted(name for name, _ in head.named_parameters() if "log_c" in name)
    expected = {
        "none": [],
        "one": ["c_img.log_c"],
        "two": ["c_img.log_c", "c_txt.log_c"],
        "three": ["c_img.log_c", "c_third.log_c", "c_txt.log_c"],
    }[variant.curvature]
    assert names == expected
    if variant.curvature == "none":
        with pytest.raises(ValueError, match="no curvature"):
            head.c_mid()
        return
    if variant.curvature == "one":
        assert head.c_txt is head.c_img
        assert head.c_mid() == head.c_img()
    if variant.curvature == "three":
        assert head.c_mid().item() == pytest.approx(0.2)
    if variant.curvature == "two":
        radii = search_radii(0.7, 1.0, 0.05, 0.1)
        assert head.c_mid(0.7, 1.0).item() == pytest.approx(intermediate_curvature(0.05, 0.1, *radii).item(), rel=1e-6)
    fixed = MATHead(8, replace(variant, learnable=False))
    assert not [name for name, _ in fixed.named_parameters() if "log_c" in name]
    assert not fixed.c_mid().requires_grad


@pytest.mark.parametrize(
    "method", ["arithmetic", "harmonic", "geometric", "released", "exact-forward", "exact-reverse"]
)
def test_controls_reach_the_head(method):
    head = MATHead(8, replace(HETEROGENEOUS, intermediate=method), c_img=0.05, c_txt=0.1)
    value = head.c_mid(1.0, 1.0)
    value.backward()
    assert 0.04 < value.item() < 0.11
    assert head.c_img.log_c.grad is not None
    if method.startswith("exact"):
        expected = exact_intermediate_curvature(0.05, 0.1, 8, 8**-0.5, method.removeprefix("exact-"))
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_curvatures_stay_within_a_factor_of_ten():
    head = MATHead(8, HETEROGENEOUS, curv_init=0.05, c_img=0.1, radius="feature")
    with torch.no_grad():
        head.c_img.log_c.fill_(9.0)
        head.alpha_img.fill_(2.0)
    head.clamp_()
    assert head.c_img().item() == pytest.approx(0.5)
    assert head.alpha_img.item() == 0
    assert MATHead(16, SHARED, radius="feature").alpha_txt.exp().item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"c_img must lie in .* = \(0\.005, 0\.5\), got 0\.6"):
        MATHead(8, HETEROGENEOUS, curv_init=0.05, c_img=0.6)
    for name in ("scale", "min_radius", "curv_init", "kappa"):
        with pytest.raises(ValueError, match=f"^{name} must"):
            MATHead(8, HETEROGENEOUS, **{name: -1.0})
    with pytest.raises(ValueError, match="radius"):
        MATHead(8, HETEROGENEOUS, radius="x")


def test_released_variant():
    variant = released(HETEROGENEOUS)
    assert (variant.pass_through, variant.intermediate, variant.padding) == ("released",) * 3
    assert variant.skip_single_child is False
    assert variant.drop_digits is True
    assert variant.curvature == "two"
    with pytest.raises(ValueError, match="feature"):
        Variant("x", feature="first")
    with pytest.raises(ValueError, match="intermediate"):
        replace(HETEROGENEOUS, intermediate="x")


@pytest.mark.parametrize("variant", ALL, ids=lambda v: v.name)
def test_outputs_of_a_clip_model(clip, images, tax, variant):
    model = MATModel(copy.deepcopy(clip), MaPLePrompts(clip, depth=2), variant)
    out = model(images, tax.names)
    num = 1 if variant.feature == "last" else 3
    assert out.tokens.shape == (3, num, 24)
    assert out.text.shape == (8, 24)
    assert out.logits.shape == (3, 8)
    if variant.feature == "last":
        expected = model.logit_scale.exp() * F.normalize(out.tokens[:, 0], dim=-1) @ F.normalize(out.text, dim=-1).mT
        torch.testing.assert_close(out.logits, expected)
    mean = MATModel(copy.deepcopy(clip), None, replace(variant, feature="mean"))
    tokens = mean.encode_image(images)
    expected = F.cosine_similarity(tokens.mean(1)[:, None], mean.encode_text(["cat"])[None], dim=-1)
    torch.testing.assert_close(mean.score(tokens, mean.encode_text(["cat"])), mean.logit_scale.exp() * expected)


def test_frozen_weights_stay(clip, images, tax):
    model = MATModel(copy.deepcopy(clip), MaPLePrompts(clip, depth=3), HETEROGENEOUS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("clip.") for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = MATObjective(tax)(model, images, TARGET, seeded())
    losses.total.backward()
    for name, p in model.named_parameters():
        if name in trained:
            assert (p.grad is not None and p.grad.abs().sum() > 0) or name.endswith("key.bias"), name
    optimizer.step()
    for name, value in model.state_dict().items():
        stays = name.startswith("clip.") or name.endswith("_extra_state")  # the bounds of a curvature
        assert torch.equal(value, before[name]) is stays or name.endswith("key.bias"), name


def by_loops(model, tax, images, target, cut, entail):
    """Every term with an encoding of its own, in float64."""
    terms, by_node = {}, {}
    z = model(images, [tax.names[v] for v in cut.nodes.tolist()]).logits
    terms["cut"] = F.cross_entropy(z, cut.member[target]).item()
    for b, leaf in enumerate(target.tolist()):
        chain = [v for v in tax.paths[leaf].tolist() if v >= 0]
        for parent, child in zip([-1, *chain], chain, strict=False):
            children = [v for v in range(tax.num_nodes) if tax.parent[v] == parent]
            if len(children) < 2:
                continue
            z = model(images[b : b + 1], [tax.names[v] for v in children]).logits
            by_node.setdefault(parent, []).append(F.cross_entropy(z, torch.tensor([children.index(child)])).item())
    terms["node"] = sum(sum(x) / len(x) for x in by_node.values()) / len(by_node)
    if not entail:
        return terms
    img, txt = [], []
    for b, leaf in enumerate(target.tolist()):
        names = [tax.names[v] for v in tax.paths[leaf].tolist() if v >= 0]
        text = model.encode_text(names)
        img.append(F.normalize(model.head.attention.attended(model.encode_image(images[b : b + 1]), text)[0], dim=-1))
        txt.append(F.normalize(text, dim=-1))
    norms = [torch.cat(x).mean(0).norm().item() for x in (img, txt)]
    c_img, c_txt = model.c_img().item(), model.c_txt().item()
    c_mid = model.c_mid(*norms).item()
    from hyper_geom import entailment_violation, lorentz

    def excess(parent, child, c):
        return entailment_violation(lorentz.exp_map0(parent, c=c), lorentz.exp_map0(child, c=c), c=c).item()

    visual = [excess(v[i], v[i + 1], c_img) for v in img for i in range(len(v) - 1)]
    textual = [excess(t[i], t[i + 1], c_txt) for t in txt for i in range(len(t) - 1)]
    cross = [excess(t[i], v[i], c_mid) for v, t in zip(img, txt, strict=True) for i in range(len(v))]
    for name, values in (("visual", visual), ("textual", textual), ("cross", cross)):
        terms[name] = sum(values) / len(values)
    return terms


@pytest.mark.parametrize("variant", ALL, ids=lambda v: v.name)
def test_objective_against_loops(clip, tax, images, variant):
    model = MATModel(copy.deepcopy(clip), MaPLePrompts(clip, depth=2), variant, c_img=0.05, c_txt=0.1).double()
    objective = MATObjective(tax, 1.3, 0.7, 0.2, treecut_dropout=0.4)
    got = objective(model, images.double(), TARGET, seeded(3))
    with torch.no_grad():
        if variant.loss == "leaf":
            leaves = [tax.names[v] for v in tax.leaf.tolist()]
            z = model(images.double(), leaves).logits
            expected = F.cross_entropy(z, tax.leaf_index[TARGET]).item()
            assert got.leaf.item() == pytest.approx(expected, abs=1e-10)
            assert got.total.item() == pytest.approx(1.3 * expected, abs=1e-10)
            assert got.cut.item() == got.node.item() == got.visual.item() == 0
            return
        cut = sample_cut(tax, 0.4, seeded(3))
        terms = by_loops(model, tax, images.double(), TARGET, cut, variant.curvature != "none")
    for name, value in terms.items():
        assert getattr(got, name).item() == pytest.approx(value, abs=1e-6), name
    expected = 1.3 * terms["cut"] + 0.7 * terms["node"]
    expected += 0.2 * sum(terms.get(name, 0.0) for name in ("visual", "textual", "cross"))
    assert got.total.item() == pytest.approx(expected, abs=1e-6)
    assert math.isnan(got.c_mid.item()) is (variant.curvature == "none")
    if variant.curvature == "two":
        assert 0.05 < got.c_mid.item() < 0.1


def test_one_pass_in_float32_equals_the_per_node_loop(clip, tax, images):
    model = MATModel(copy.deepcopy(clip), PromptSRCPrompts(clip, depth_text=3, depth_vision=3), HETEROGENEOUS)
    got = MATObjective(tax)(model, images, TARGET, seeded(1))
    with torch.no_grad():
        terms = by_loops(model, tax, images, TARGET, sample_cut(tax, 0.1, seeded(1)), True)
    for name, value in terms.items():
        # Features of neighbouring nodes are nearly parallel here, which magnifies the rounding of their angles.
        bound = 1e-5 if name in ("cut", "node") else 2e-4
        assert getattr(got, name).item() == pytest.approx(value, abs=bound), name


def test_one_image_encoding_per_picture(clip, tax, images):
    model = MATModel(copy.deepcopy(clip), MaPLePrompts(clip), HETEROGENEOUS)
    seen = []
    model.clip.visual.conv1.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    MATObjective(tax)(model, images, TARGET, seeded())
    assert seen == [3]


def test_single_child_nodes(clip, tax, images):
    counted = replace(EUCLIDEAN, skip_single_child=False)
    torch.manual_seed(0)
    model = MATModel(copy.deepcopy(clip), None, EUCLIDEAN)
    other = MATModel(copy.deepcopy(clip), None, counted)
    other.head.load_state_dict(model.head.state_dict())
    kept = MATObjective(tax)(model, images, TARGET, seeded()).node
    all_nodes = MATObjective(tax)(other, images, TARGET, seeded()).node
    # Visited: root, animal, cat, and plant with its one child.
    assert all_nodes.item() == pytest.approx(kept.item() * 3 / 4)


def test_regularizer_in_the_objective(clip, tax, images):
    model = MATModel(copy.deepcopy(clip), PromptSRCPrompts(clip, depth_text=2, depth_vision=2), HETEROGENEOUS)
    plain = MATObjective(tax)(model, images, TARGET, seeded(2))
    got = MATObjective(tax, regularizer=PromptSRCRegularizer())(model, images, TARGET, seeded(2))
    names = [tax.names[v] for v in sample_cut(tax, 0.1, seeded(2)).nodes.tolist()]
    out = model(images, names)
    frozen_text, frozen_image = model.frozen_text(names), clip.encode_image(images)
    frozen = 1 / 0.07 * F.normalize(frozen_image, dim=-1) @ frozen_text.mT
    expected = PromptSRCRegularizer()(out.text, frozen_text, out.tokens[:, -1], frozen_image, out.logits, frozen)
    torch.testing.assert_close(got.regularizer, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.total, plain.total + got.regularizer, atol=1e-5, rtol=1e-5)
    twice = MATObjective(tax, 2.0, regularizer=PromptSRCRegularizer())(model, images, TARGET, seeded(2))
    torch.testing.assert_close(twice.total, got.total + got.cut + got.regularizer, atol=1e-5, rtol=1e-5)
    assert not model.frozen_text(names).requires_grad


@pytest.mark.parametrize("variant", ALL, ids=lambda v: v.name)
@pytest.mark.parametrize("radius", ["unit", "feature"])
def test_feature_model(tax, variant, radius):
    tokens, text = features(tax)
    model = FeatureMATModel(tokens, text, variant, radius=radius)
    x = torch.randn(3, 10, generator=seeded(5))
    losses = MATObjective(tax)(model, x, TARGET, seeded())
    losses.total.backward()
    for name, p in model.named_parameters():
        reached = p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.abs().sum() > 0)
        assert reached is p.requires_grad or name.endswith(("key.bias", "alpha_txt", "alpha_img")), name
    assert model.tokens.maps[0].weight.requires_grad is (variant.feature == "tokens")
    assert MATObjective(tax)(model, x[:1], TARGET[:1], seeded()).total.isfinite()
    assert MATObjective(tax)(model, x[:0], TARGET[:0], seeded()).total.item() == 0
    for names in ([], ["unicorn"]):
        with pytest.raises(ValueError, match="names"):
            model.encode_text(names)
    with pytest.raises(ValueError, match="dropout"):
        FeatureMATModel(tokens, text, variant, dropout=1.0)
    dropped = FeatureMATModel(tokens, text, variant, radius=radius, dropout=0.5)
    assert not torch.equal(dropped.encode_image(x), dropped.encode_image(x))
    assert torch.equal(dropped.eval().encode_image(x), model.encode_image(x))
    with pytest.raises(ValueError, match="text must hold features of width 8"):
        FeatureMATModel(tokens, {"cat": torch.zeros(3)})


def test_feature_model_learns(tax):
    tokens, text = features(tax)
    torch.manual_seed(0)
    model = FeatureMATModel(tokens, text, HETEROGENEOUS)
    x, target = torch.randn(20, 10, generator=seeded(6)), tax.leaf[torch.arange(20) % 5]
    objective, optimizer, g = MATObjective(tax), torch.optim.Adam(model.parameters(), lr=2e-2), seeded()
    first = objective(model, x, target, g).total.item()
    for _ in range(60):
        optimizer.zero_grad()
        objective(model, x, target, g).total.backward()
        optimizer.step()
        model.head.clamp_()
    assert objective(model, x, target, g).total.item() < 0.6 * first


def test_objective_refuses(clip, tax, images):
    model = MATModel(copy.deepcopy(clip), None)
    for call, match in (
        (lambda: MATObjective(tax, treecut_dropout=1.0), "treecut_dropout"),
        (lambda: MATObjective(tax, treecut_dropout=-0.1), "treecut_dropout"),
        (lambda: MATObjective(tax, node_weight=-1.0), "node_weight"),
        (lambda: MATObjective(tax, names=["a"]), "names must hold 8"),
        (lambda: MATObjective(tax)(model, images, torch.tensor([6, 3, 9])), "target must lie"),
        (
            lambda: MATObjective(tax)(model, images, torch.tensor([6, 3, 2])),
            "target must be a leaf, got internal node 2",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("variant", [*ALL, replace(SHARED, learnable=False), replace(EUCLIDEAN, mix="learned")])
@pytest.mark.parametrize("kind", ["maple", "promptsrc", "none"])
def test_save_and_load_are_bit_identical(clip, images, tax, tmp_path, variant, kind):
    learners = {
        "maple": lambda: MaPLePrompts(clip, depth=2),
        "promptsrc": lambda: PromptSRCPrompts(clip, depth_text=2, depth_vision=3),
        "none": lambda: None,
    }
    model = MATModel(copy.deepcopy(clip), learners[kind](), variant, radius="feature", c_img=0.04)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "saved")
    loaded = MATModel.from_pretrained(tmp_path / "saved", copy.deepcopy(clip))
    assert loaded.variant == variant
    for a, b in zip(model(images, tax.names)[:3], loaded(images, tax.names)[:3], strict=True):
        assert torch.equal(a, b)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    size = (tmp_path / "saved" / "mat_align.safetensors").stat().st_size
    assert size < 40_000


def test_folders_from_before_digits_were_kept(clip, tmp_path):
    MATModel(copy.deepcopy(clip), None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mat_align.json").read_text())
    del config["variant"]["drop_digits"]
    (tmp_path / "mat_align.json").write_text(json.dumps(config))
    assert MATModel.from_pretrained(tmp_path, clip).variant.drop_digits


def test_the_frozen_model_stays_in_evaluation_mode(clip):
    model = MATModel(copy.deepcopy(clip).train(), MaPLePrompts(clip, depth=2))
    for mode in (True, False):
        model.train(mode)
        assert model.training is model.head.training is mode
        assert not any(part.training for part in model.clip.modules())


def test_layers_without_the_last_block(clip, tax, images):
    model = MATModel(copy.deepcopy(clip), None, EUCLIDEAN, layers=(1, 2))
    assert MATObjective(tax)(model, images, TARGET, seeded()).total.isfinite()
    with pytest.raises(ValueError, match="end with the last block, unmixed"):
        MATObjective(tax, regularizer=PromptSRCRegularizer())(model, images, TARGET)
    mixed = MATModel(copy.deepcopy(clip), None, replace(EUCLIDEAN, mix="learned"))
    with pytest.raises(ValueError, match="end with the last block, unmixed"):
        MATObjective(tax, regularizer=PromptSRCRegularizer())(mixed, images, TARGET)
    with pytest.raises(ValueError, match=r"feature='last', got \(1, 2\)"):
        MATModel(copy.deepcopy(clip), None, PROTECT, layers=(1, 2))


def test_load_refuses(clip, tmp_path):
    MATModel(copy.deepcopy(clip), None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mat_align.json").read_text())
    (tmp_path / "mat_align.json").write_text(json.dumps({**config, "format": 9}))
    with pytest.raises(ValueError, match="format 1, got 9"):
        MATModel.from_pretrained(tmp_path, clip)
    config["variant"]["curvature"] = "three"
    (tmp_path / "mat_align.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must hold"):
        MATModel.from_pretrained(tmp_path, clip)


def test_other_towers_are_refused(clip, make_clip):
    broken = make_clip()
    broken.visual = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="class token"):
        MATModel(broken, None)
    assert isinstance(MATModel(copy.deepcopy(clip), None).layers, LayerTokens)
    assert isinstance(MATHead(8, EUCLIDEAN).attention, TextQueriedAttention)
    with pytest.raises(ValueError, match="n = 0"):
        MATHead(8, VANILLA).logits(torch.zeros(2, 1, 8), torch.zeros(0, 8), 0.0)


def test_features_in_a_learned_mix(tax):
    g, dim = seeded(), 8
    text = {name: F.normalize(torch.randn(dim, generator=g), dim=0) for name in tax.names}
    tokens = StageTokens((2, 3, 4, 5, 6, 7), dim)
    model = FeatureMATModel(tokens, text, replace(EUCLIDEAN, mix="learned"))
    images = torch.randn(5, 27, generator=g)
    share = torch.full((3, 6), 0.02)
    share[[0, 1, 2], [2, 3, 5]] = 0.9  # the depth rule for six stages
    torch.testing.assert_close(model.encode_image(images), share @ tokens(images))
    model(images, tax.names).logits.logsumexp(1).sum().backward()
    assert bool(model.mix_logits.grad.abs().min() > 0)
    fixed = FeatureMATModel(tokens, text, EUCLIDEAN)
    assert fixed.mix_logits is None
    with pytest.raises(ValueError, match="more than the last token"):
        FeatureMATModel(tokens, text, replace(PROTECT, mix="learned"))


def stepped(model, tax, images, half=False, **options):
    """Losses and gradients of one call."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = MATObjective(tax, **options)(model, images, TARGET, seeded(2))
    model.zero_grad()
    losses.total.backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["maple", "promptsrc"])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing(clip, tax, images, method, chunk_size):
    learner = MaPLePrompts(clip) if method == "maple" else PromptSRCPrompts(clip, depth_text=2, depth_vision=2)
    torch.manual_seed(0)
    whole = MATModel(copy.deepcopy(clip), learner, HETEROGENEOUS).double()
    parts = copy.deepcopy(whole)
    parts.chunk_size = chunk_size
    calls = []
    parts.clip.transformer.resblocks[0].register_forward_hook(lambda m, args, out: calls.append(len(out)))
    source = {"regularizer": PromptSRCRegularizer()} if method == "promptsrc" else {}
    (losses, expected), (got, gradients) = (stepped(m, tax, images.double(), **source) for m in (whole, parts))
    torch.testing.assert_close(torch.stack(list(got)), torch.stack(list(losses)), rtol=1e-10, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-8, atol=1e-11, msg=name)
    if chunk_size < 8 and method == "maple":
        assert max(calls) <= chunk_size
        assert len(calls) == 2 * -(-8 // chunk_size)  # each chunk again in the backward
    with torch.no_grad():
        torch.testing.assert_close(parts.encode_text(["cat", "dog"]), whole.encode_text(["cat", "dog"]))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        MATModel(copy.deepcopy(clip), None, chunk_size=0)


def test_half_precision_towers(clip, tax, images):
    model = MATModel(copy.deepcopy(clip), MaPLePrompts(clip), HETEROGENEOUS, chunk_size=3)
    losses, expected = stepped(model, tax, images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, tax.names)
    half, gradients = stepped(model, tax, images, half=True)
    assert out.tokens.dtype == out.text.dtype == out.logits.dtype == torch.float32
    # The towers did run in half precision, the head did not: it scores the same tokens as outside.
    assert not torch.equal(out.text, model(images, tax.names).text)
    assert torch.equal(out.logits, model.score(out.tokens, out.text))
    torch.testing.assert_close(half.total, losses.total, rtol=2e-2, atol=0)
    for name, value in expected.items():
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - value).norm() <= 0.3 * value.norm() + 1e-4, name


def test_padding_of_a_causal_tower_is_left_out(clip):
    model, seen = MATModel(copy.deepcopy(clip), None), []
    model.clip.transformer.resblocks[0].register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    got = model.encode_text(["cat", "a dog in the snow"])
    assert seen == [len(["a", "photo", "of", "a", "a", "dog", "in", "the", "snow", "."]) + 2]
    import open_clip

    expected = clip.encode_text(open_clip.tokenize(["a photo of a cat.", "a photo of a a dog in the snow."]))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_gradients_of_parts_add_up(clip, tax, images):
    """Two calls of one picture each, halved, are one call of two where the loss is a mean over pictures."""
    model = MATModel(copy.deepcopy(clip), MaPLePrompts(clip), VANILLA).double()
    objective, grads = MATObjective(tax), []
    for size in (2, 1):
        model.zero_grad()
        for part, target in zip(images[:2].double().split(size), TARGET[:2].split(size), strict=True):
            (objective(model, part, target).total * size / 2).backward()
        grads.append([p.grad.clone() for p in model.prompts.parameters()])
    for whole, summed in zip(*grads, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-12)
