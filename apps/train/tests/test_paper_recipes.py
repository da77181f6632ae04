"""The recipes on the papers' data run end to end on tiny files in the released formats, with a tiny CLIP of random weights."""

import json

import numpy as np
import pytest
from PIL import Image

from app_train.cli import RECIPES, main, parse
from app_train.core.errors import RunError
from app_train.recipes.lora.papers import InaturalistConfig, run_inaturalist
from hier_lora import HierLoraCLIP
from hier_losses import LabelGraph

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ["--size", "32", "--fit.lora.epochs", "1", "--fit.lora.batch-size", "4", "--fit.rank", "2", "--no-tensorboard"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Locator of a tiny CLIP of random weights in the real format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *[f"{c}</w>" for c in letters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = vocabulary.index("<|endoftext|>")
    text = {**size, "vocab_size": len(vocabulary), "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    picture = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(picture, tokenizer).save_pretrained(folder)
    return f"hf:{folder}"


def draw(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 30, (40, 36, 3))
    Image.fromarray((noise + value % 220).astype(np.uint8)).save(path)


@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "cub"
    root.mkdir()
    names = [f"{i + 1:03d}.Bird_{i}" for i in range(6)]
    (root / "classes.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    images = [f"{n}/{j}.jpg" for n in names for j in range(4)]
    for i, image in enumerate(images):
        draw(root / "images" / image, 9 * i)
    (root / "images.txt").write_text("".join(f"{i} {image}\n" for i, image in enumerate(images, 1)))
    (root / "image_class_labels.txt").write_text("".join(f"{i + 1} {i // 4 + 1}\n" for i in range(24)))
    (root / "train_test_split.txt").write_text("".join(f"{i + 1} {int(i % 4 != 0)}\n" for i in range(24)))
    rows = "".join(f"order {i // 4},family {i // 2},Bird {i}\n" for i in range(6))
    (root / "tree.csv").write_text("order,family,species\n" + rows)
    return ["--data", str(root), "--hierarchy", str(root / "tree.csv")]


@pytest.fixture
def aircraft(tmp_path):
    root = tmp_path / "aircraft"
    (root / "images").mkdir(parents=True)
    for p, part in enumerate(("train", "val", "test")):
        for level in ("manufacturer", "family", "variant"):
            names = {"manufacturer": "maker {0}", "family": "family {1}", "variant": "variant {2}"}[level]
            lines = [f"{p}{i:03d} {names.format(i % 6 // 3, i % 6 // 2, i % 6)}\n" for i in range(6)]
            (root / f"images_{level}_{part}.txt").write_text("".join(lines).replace("family 1\n", "family 1\n"))
        for i in range(6):
            draw(root / "images" / f"{p}{i:03d}.jpg", 20 * i + p)
    # Two variants a family, families inside one manufacturer.
    for part in ("train", "val", "test"):
        path = root / f"images_manufacturer_{part}.txt"
        lines = [line.split()[0] for line in path.read_text().splitlines()]
        path.write_text("".join(f"{image} maker {int(i >= 4)}\n" for i, image in enumerate(lines)))
    return ["--data", str(root)]


@pytest.fixture
def butterfly(tmp_path):
    root = tmp_path / "butterfly"
    root.mkdir()
    for p, part in enumerate(("train", "val", "test")):
        lines = []
        for i in range(8):
            draw(root / "images_small" / f"{i}.kind" / f"{part}.jpg", 20 * i + p)
            species, genus, subfamily, family = i + 1, i // 2 + 1 if i < 6 else i - 2, i // 3 + 1, i // 6 + 1
            genus = {0: 1, 1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 6: 5, 7: 5}[i]
            subfamily = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3}[genus]
            family = {1: 1, 2: 1, 3: 2}[subfamily]
            lines.append(f"{i}.kind/{part}.jpg {species} {genus} {subfamily} {family}\n")
        (root / f"Butterfly200_{part}_release.txt").write_text("".join(lines))
    return ["--data", str(root)]


@pytest.fixture
def inaturalist(tmp_path):
    root = tmp_path / "inat"
    for i in range(6):
        name = f"{i:05d}_Animalia_Chordata_Class{i // 4}_Order{i // 3}_Family{i // 2}_Genus{i}_epithet{i}"
        for part, count in (("train_mini", 3), ("val", 1)):
            for j in range(count):
                draw(root / part / name / f"{j}.jpg", 20 * i + j)
    return ["--data", str(root)]


@pytest.fixture
def chest(tmp_path):
    root = tmp_path / "cxr"
    root.mkdir()
    findings = ["Edema|Hernia", "No Finding", "Nodule", "Effusion"]
    # Patients 22 and 34 fall into the validation part.
    names = [f"{i:08d}_000.png" for i in range(20, 44)]
    rows = "".join(f"{n},{findings[i % 4]}\n" for i, n in enumerate(names))
    (root / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels\n" + rows)
    (root / "train_val_list.txt").write_text("\n".join(names[:16]))
    (root / "test_list.txt").write_text("\n".join(names[16:]))
    for i, n in enumerate(names):
        draw(root / "images" / n, 50 * (i % 4) + i)
    return ["--data", str(root)]


@pytest.mark.parametrize("recipe", ["cub", "aircraft", "butterfly", "inaturalist"])
def test_a_paper_recipe_runs(recipe, clip, tmp_path, request, capsys):
    data = request.getfixturevalue(recipe)
    out = tmp_path / "run"
    args = [recipe, *data, "--model", clip, "--out", str(out), "--cache-dir", str(tmp_path / "cache"), *QUICK]
    assert main(args) == 0, capsys.readouterr().err
    result = json.loads((out / "result.json").read_text())
    assert set(result["runs"][0]) == {"zero_shot", "leaf_ce", "both"}
    model = HierLoraCLIP.from_pretrained(out / "seed-0" / "both" / "adapter")
    assert model.text == ("sampled" if recipe == "inaturalist" else "chunked")
    assert (model.temperature is not None) == (recipe in ("aircraft", "butterfly")), (
        "calibrated where pictures are left"
    )
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n and "vision" in n)
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n and "text" in n)
    found = model.predict([Image.new("RGB", (50, 40))])[0]
    assert len(found.names) == model.tax.num_levels
    assert (out / "report.html").exists()
    before = (out / "result.json").read_bytes()
    assert main(args) == 0
    assert (out / "result.json").read_bytes() == before


def test_chest_runs(chest, clip, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["chest", *chest, "--model", clip, "--out", str(out), "--cache-dir", str(tmp_path / "cache"), *QUICK]
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


def test_what_is_missing_is_named(cub, clip, tmp_path, capsys):
    for recipe in ("cub", "aircraft", "butterfly", "inaturalist", "chest", "cifar100-fewshot"):
        assert main([recipe]) == 2
        assert "is missing" in capsys.readouterr().err
    assert main(["cub", *cub, "--model", "hf:no/such-model", "--out", str(tmp_path / "x"), "--size", "32"]) == 2
    assert "the weights of hf:no/such-model cannot be loaded" in capsys.readouterr().err
    config = InaturalistConfig(data=tmp_path, out=tmp_path / "y")
    with pytest.raises(ValueError, match="iNaturalist"):
        run_inaturalist(config)


def test_every_recipe_states_its_command():
    for name, recipe in RECIPES.items():
        kind, run = recipe.load()
        text = __import__("sys").modules[run.__module__].__doc__
        assert f"python apps/train {name}" in text or name == "emoji", name
        assert kind.__doc__
        assert isinstance(parse(name, kind, []), kind)


def test_parts():
    from app_train.recipes.lora.papers import three_parts

    with pytest.raises(RunError, match="pictures to train and to test on, got nothing|got "):
        three_parts({"train": []})
