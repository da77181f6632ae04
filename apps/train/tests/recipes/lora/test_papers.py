"""The recipes on the papers' data run end to end on tiny files in the released formats, with a tiny CLIP of random weights."""

import json
import sys

import pytest
from PIL import Image

from app_train.cli import main, parse
from app_train.core.errors import RunError
from app_train.recipes import RECIPES
from app_train.recipes.lora.papers import run_inaturalist, three_parts
from app_train.recipes.lora.settings import InaturalistConfig
from helpers import releases, weights
from hier_lora import HierLoraCLIP
from hier_losses import LabelGraph

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ["--size", "32", "--fit.lora.epochs", "1", "--fit.lora.batch-size", "4", "--fit.rank", "2", "--no-tensorboard"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Locator of a tiny CLIP of random weights in the real format."""
    return weights.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def release(tmp_path):
    """Write a release below the test's folder: the recipe's options."""
    return lambda name: getattr(releases, name)(tmp_path / name)


@pytest.mark.parametrize("recipe", ["cub", "aircraft", "butterfly", "inaturalist"])
def test_a_paper_recipe_runs(recipe, clip, release, tmp_path, capsys):
    """The tiny releases hold out too few pictures for a temperature, which is said."""
    data = release(recipe)
    out = tmp_path / "run"
    args = [recipe, *data, "--model", clip, "--out", str(out), "--cache-dir", str(tmp_path / "cache"), *QUICK]
    assert main(args) == 0, capsys.readouterr().err
    result = json.loads((out / "result.json").read_text())
    assert set(result["runs"][0]) == {"zero_shot", "leaf_ce", "both"}
    model = HierLoraCLIP.from_pretrained(out / "seed-0" / "both" / "adapter")
    assert model.text == ("sampled" if recipe == "inaturalist" else "chunked")
    assert model.temperature is None
    assert "not calibrated" in capsys.readouterr().out
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n and "vision" in n)
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n and "text" in n)
    found = model.predict([Image.new("RGB", (50, 40))])[0]
    assert len(found.names) == model.tax.num_levels
    assert (out / "report.html").exists()
    before = (out / "result.json").read_bytes()
    assert main(args) == 0
    assert (out / "result.json").read_bytes() == before


def test_chest_runs(release, clip, tmp_path, capsys):
    out = tmp_path / "run"
    args = [
        "chest",
        *release("chest"),
        "--model",
        clip,
        "--out",
        str(out),
        "--cache-dir",
        str(tmp_path / "cache"),
        *QUICK,
    ]
    assert main(args) == 0, capsys.readouterr().err
    result = json.loads((out / "result.json").read_text())
    assert 0 <= result["trained"]["mean AUROC"] <= 1
    assert "Edema" in result["trained"]["AUROC"]
    model = HierLoraCLIP.from_pretrained(out / "trained" / "adapter")
    assert isinstance(model.tax, LabelGraph)
    assert model.sigmoid is not None
    assert model.logit_bias is not None
    found = model.predict_labels([Image.new("RGB", (50, 40))], threshold=0.0)[0]
    p = dict(zip(found.names, found.probabilities, strict=True))
    assert p["Lung"] >= p["Edema"]
    assert main(args) == 0


def test_what_is_missing_is_named(release, tmp_path, capsys):
    for recipe in ("cub", "aircraft", "butterfly", "inaturalist", "chest", "cifar100-fewshot"):
        assert main([recipe]) == 2
        assert "is missing" in capsys.readouterr().err
    assert (
        main(["cub", *release("cub"), "--model", "hf:no/such-model", "--out", str(tmp_path / "x"), "--size", "32"]) == 2
    )
    assert "the weights of hf:no/such-model cannot be loaded" in capsys.readouterr().err
    config = InaturalistConfig(data=tmp_path, out=tmp_path / "y")
    with pytest.raises(ValueError, match="iNaturalist"):
        run_inaturalist(config)


def test_every_recipe_states_its_command():
    for name, recipe in RECIPES.items():
        kind, text = recipe.kind(), sys.modules[recipe.function().__module__].__doc__
        assert f"train {name}" in text or name == "emoji", name
        assert kind.__doc__
        assert isinstance(parse(name, kind, []), kind)


def test_parts():
    with pytest.raises(RunError, match="pictures to train and to test on, got nothing|got "):
        three_parts({"train": []})
