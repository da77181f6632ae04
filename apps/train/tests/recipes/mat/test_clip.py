"""The recipes of Modality Alignment across Trees: published configurations on a small random CLIP, and the cached recipe."""

import json
import math

import open_clip
import pytest
import torch

from app_train.core.errors import Interrupted, RunError
from app_train.core.run_folder import Run
from app_train.recipes.mat import clip as mat_clip
from app_train.recipes.mat import variants as mat
from app_train.recipes.mat.published import PUBLISHED, published
from app_train.recipes.mat.rows import VARIANTS, depths, study_rows, trained_as
from app_train.recipes.mat.settings import MATClipConfig
from helpers.releases import few_shot
from helpers.stops import terminated_in_step

PATHS = (("animal", "cat"), ("animal", "dog"), ("plant_1", "oak_tree"))


@pytest.fixture(scope="module")
def small():
    """A random CLIP with as many blocks as the published prompts need."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"layers": 9, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 32}
        return open_clip.model.CLIP(12, vision, {"width": 8, "heads": 2, "layers": 9}).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_shot(tmp_path_factory.mktemp("mat"), PATHS, train=2, test=2)


def run_config(data, tmp_path, **changes):
    return MATClipConfig(
        images=data / "images",
        tree=data / "trees" / "cifar100.json",
        out=tmp_path / "run",
        cache_dir=data / "cache",
        **changes,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_configuration_trains_and_scores(name, small, data, tmp_path, monkeypatch):
    monkeypatch.setattr(mat_clip, "load_clip", lambda settings, weights: small)
    config = run_config(data, tmp_path, published=name, epochs=1)
    result = mat_clip.run(config)
    assert set(result["scores"]) == {"la", "hca", "mta"}
    assert result["n"] == 6
    assert all(0 <= value <= 1 for value in result["scores"].values())
    assert (config.out / "model" / "mat_align.safetensors").exists()
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    settings = PUBLISHED[name]()
    # The configured curvatures are there at the first step.
    assert lines[0]["c_img"] == pytest.approx(settings.c_img)
    assert lines[0]["c_txt"] == pytest.approx(settings.c_txt)
    assert math.isfinite(lines[-1]["total"])
    assert (lines[0]["regularizer"] > 0) is (settings.method == "promptsrc")


def test_published_table():
    assert len(PUBLISHED) == 16
    assert PUBLISHED["cifar100-1-maple"]().model_dump(include={"lr", "curv_init", "c_img", "c_txt", "scale"}) == {
        "lr": 0.02, "curv_init": 0.5, "c_img": 0.5, "c_txt": 0.5, "scale": 10,
    }  # fmt: skip
    rare = published("rare", 16, "promptsrc")
    assert (rare.model, rare.pretrained, rare.epochs, rare.batch_size, rare.seed) == (
        "hf-hub:imageomics/bioclip", None, 10, 8, 2,
    )  # fmt: skip
    sun = published("sun", 1, "promptsrc")
    assert (sun.model, sun.pretrained, sun.epochs, sun.lr, sun.c_txt, sun.scale, sun.seed) == (
        "ViT-B-16-quickgelu", "openai", 200, 0.01, 0.025, 10, 1,
    )  # fmt: skip
    assert published("imagenet", 16, "maple").batch_size == 2
    for config in (PUBLISHED[name]() for name in PUBLISHED):
        assert config.curv_init / 10 < min(config.c_img, config.c_txt)
        assert max(config.c_img, config.c_txt) < 10 * config.curv_init
    with pytest.raises(ValueError, match="must be one of"):
        published("cifar100", 4, "maple")


def test_schedule_and_order():
    settings = published("cifar100", 16, "maple")
    rates = [mat_clip.learning_rate(settings, epoch, 99, False) for epoch in range(200)]
    assert rates[0] == 1e-3
    # The cosine is stepped once an epoch, from the end of the first epoch after the warm-up on.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    for rate in rates[settings.warmup_epochs :]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()
    ten = settings.model_copy(update={"epochs": 10})
    mean = sum(mat_clip.learning_rate(ten, epoch, 0) for epoch in range(1, 10)) / 9
    assert mean == pytest.approx(0.01 * 5.4755 / 9, rel=1e-4)
    swings = [mat_clip.learning_rate(settings, 0, step, True) for step in range(802)]
    assert swings[0] == 1e-3
    assert swings[201] == pytest.approx(0)
    assert swings[1] == swings[401] == swings[801] == pytest.approx(0.01)
    orders = [mat_clip.epoch_order(settings, 10, epoch).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    again = [mat_clip.epoch_order(settings, 10, epoch, True).tolist() for epoch in (0, 1)]
    assert again[0] == again[1] == orders[0]


@pytest.mark.parametrize("method", ["maple", "promptsrc"])
def test_a_stopped_run_goes_on_bit_for_bit(method, small, data, tmp_path):
    settings = published("cifar100", 16, method).model_copy(update={"epochs": 2, "batch_size": 2, "warmup_epochs": 0})
    stored = mat_clip.read_stored_tree(data / "trees" / "cifar100.json")
    train = mat_clip.load_folder(data / "images", stored.taxonomy, size=32, cache_dir=data / "cache")["train"]

    def trained(name):
        model = mat_clip.build_model(settings, small, "HETEROGENEOUS")
        with Run("mat-clip", run_config(data, tmp_path, tensorboard=False), processes=False) as run:
            mat_clip.train_prompts(model, settings, train, stored, run, tmp_path / name)
        return model.trained_state()

    whole = trained("whole")
    # In the second of two epochs: PromptSRC's average has taken up the first.
    with terminated_in_step(5), pytest.raises(Interrupted):
        trained("parted")
    parted = trained("parted")
    for name, value in whole.items():
        assert torch.equal(value, parted[name]), name
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("parted", "whole")]
    assert logs[0] == logs[1]
    assert logs[0].count("\n") == 6


def test_released_run(small, data, tmp_path, monkeypatch):
    monkeypatch.setattr(mat_clip, "load_clip", lambda settings, weights: small)
    result = mat_clip.run(run_config(data, tmp_path, epochs=1, released=True))
    assert "released" in result["variant"]


def test_prompts_too_deep_are_refused_before_decoding(data, tmp_path, monkeypatch):
    vision = {"layers": 4, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 32}
    shallow = open_clip.model.CLIP(12, vision, {"width": 8, "heads": 2, "layers": 4}).eval()
    monkeypatch.setattr(mat_clip, "load_clip", lambda settings, weights: shallow)
    monkeypatch.setattr(mat_clip, "load_folder", lambda *args, **kwargs: pytest.fail("pictures were decoded"))
    with pytest.raises(ValueError, match=r"depth_text must lie in 1\.\.4, got 9"):
        mat_clip.run(run_config(data, tmp_path, published="cifar100-16-promptsrc"))


def test_user_errors(data, tmp_path):
    with pytest.raises(RunError, match="--images and --tree"):
        mat_clip.run(MATClipConfig())
    with pytest.raises(RunError, match="cannot be loaded"):
        mat_clip.load_clip(published("cifar100", 1, "maple"), data / "no-such-file.pt")


def test_rows_of_the_studies():
    assert list(study_rows("main", tuple(VARIANTS))) == list(VARIANTS)
    assert len(study_rows("radius", ())) == 6
    assert study_rows("defects", ())["released: padding"].variant.padding == "released"
    assert {row.variant.intermediate for row in study_rows("intermediate", ()).values()} >= {"chord", "exact-forward"}
    assert depths("rule", 12) == (4, 7, 11)
    assert [depths(name, 5)[-1] for name in ("rule", "last two", "every", "first three")] == [4] * 4
    assert depths("shallower tower", 7) == (1, 2, 4)
    assert {row.variant.feature for row in study_rows("layers", ()).values()} == {"tokens", "mean", "last"}


def test_a_row_of_several_studies_is_trained_under_one_name():
    def home(study, name):
        return trained_as(study_rows(study, ())[name])

    assert home("radius", "HETEROGENEOUS, unit radius") == "HETEROGENEOUS"
    assert home("intermediate", "c_mid: chord") == home("defects", "all fixed") == "HETEROGENEOUS"
    assert home("layers", "tokens: rule") == "EUCLIDEAN"
    assert home("layers", "tokens: last only") == "PROTECT"
    assert home("cross", "HETEROGENEOUS, first tree") == "HETEROGENEOUS"
    for study in ("radius", "intermediate", "layers", "defects", "cross"):
        rows = study_rows(study, ())
        assert len({trained_as(row) for row in rows.values()}) == len(rows)


def test_rows_can_be_chosen():
    rows = study_rows("layers", ())
    assert list(mat._chosen(rows, None)) == list(rows)
    assert list(mat._chosen(rows, ("tokens: every", "tokens: rule"))) == ["tokens: every", "tokens: rule"]
    with pytest.raises(RunError, match="no row 'x' in this study"):
        mat._chosen(rows, ("x",))
