"""How prompts are tuned: published settings, schedule, models of the rows, going on; and the rows of the studies."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch

from app_data.read.folder import find_pictures, load_found
from app_data.read.labelled import Decoding
from app_data.sets.cifar100 import read_stored_tree
from app_train.core.errors import Interrupted, RunError
from app_train.core.run_folder import Run
from app_train.recipes.mat import tune
from app_train.recipes.mat.published import DATA, SHOTS, published, published_scores
from app_train.recipes.mat.rows import VARIANTS, Row, chosen_rows, depths, study_rows, trained_as
from app_train.recipes.mat.settings import MATClipConfig
from helpers.releases import few_shot
from helpers.stops import terminated_in_step
from mat_align import EUCLIDEAN, PROTECT

ROOT = Path(__file__).parents[5]

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


def test_published_table():
    assert published("cifar100", 1, "maple").model_dump(include={"lr", "curv_init", "c_img", "c_txt", "scale"}) == {
        "lr": 0.02, "curv_init": 0.5, "c_img": 0.5, "c_txt": 0.5, "scale": 10,
    }  # fmt: skip
    rare = published("rare-species", 16, "promptsrc")
    assert (rare.model, rare.pretrained, rare.epochs, rare.batch_size, rare.seed) == (
        "hf-hub:imageomics/bioclip", None, 10, 8, 2,
    )  # fmt: skip
    sun = published("sun397", 1, "promptsrc")
    assert (sun.model, sun.pretrained, sun.epochs, sun.lr, sun.c_txt, sun.scale, sun.seed) == (
        "ViT-B-16-quickgelu", "openai", 200, 0.01, 0.025, 10, 1,
    )  # fmt: skip
    assert published("imagenet", 16, "maple").batch_size == 2
    for config in (published(*cell) for cell in itertools.product(DATA, SHOTS, ("maple", "promptsrc"))):
        assert config.curv_init / 10 < min(config.c_img, config.c_txt)
        assert max(config.c_img, config.c_txt) < 10 * config.curv_init
    with pytest.raises(ValueError, match="must be of"):
        published("cifar100", 3, "maple")


@pytest.mark.parametrize(("shots", "tuned_for"), [(2, 1), (4, 16), (8, 16)])
@pytest.mark.parametrize("method", ["maple", "promptsrc"])
@pytest.mark.parametrize("data", DATA)
def test_shots_between_take_published_settings(data, method, shots, tuned_for):
    assert published(data, shots, method) == published(data, tuned_for, method).model_copy(update={"shots": shots})


def test_published_scores_are_those_of_the_results_page():
    stored = json.loads((ROOT / "docs" / "results" / "mat-align-published.json").read_text(encoding="utf-8"))
    rows = {"plain": "VANILLA", "+ProTeCt": "PROTECT", "+MAT": "HETEROGENEOUS"}
    for known in stored["rows"]:
        base, row = known["method"].lower().split()[0], rows[known["method"].split()[1]]
        for data, values in zip(DATA, known["values"], strict=True):
            assert published_scores(data, known["shots"], base, row) == dict(
                zip(("la", "hca", "mta"), values, strict=True)
            )
    (title,) = (name for name in stored if name.startswith("HCA"))
    for row, values in stored[title].items():
        for data, value in zip(("cifar100", "sun397", "rare-species"), values, strict=True):
            assert published_scores(data, 16, "maple", row)["hca"] == value
    assert (
        published_scores("imagenet", 16, "maple", "SHARED") == published_scores("cifar100", 4, "maple", "PROTECT") == {}
    )


def test_schedule_and_order():
    settings = published("cifar100", 16, "maple")
    rates = [tune.learning_rate(settings, epoch, 99, False) for epoch in range(200)]
    assert rates[0] == 1e-3
    # The cosine is stepped once an epoch, from the end of the first epoch after the warm-up on.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    for rate in rates[settings.warmup_epochs :]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()
    ten = settings.model_copy(update={"epochs": 10})
    mean = sum(tune.learning_rate(ten, epoch, 0) for epoch in range(1, 10)) / 9
    assert mean == pytest.approx(0.01 * 5.4755 / 9, rel=1e-4)
    swings = [tune.learning_rate(settings, 0, step, True) for step in range(802)]
    assert swings[0] == 1e-3
    assert swings[201] == pytest.approx(0)
    assert swings[1] == swings[401] == swings[801] == pytest.approx(0.01)
    orders = [tune.epoch_order(settings, 10, epoch).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    again = [tune.epoch_order(settings, 10, epoch, True).tolist() for epoch in (0, 1)]
    assert again[0] == again[1] == orders[0]


@pytest.mark.parametrize("method", ["maple", "promptsrc"])
def test_a_stopped_run_goes_on_bit_for_bit(method, small, data, tmp_path):
    settings = published("cifar100", 16, method).model_copy(update={"epochs": 2, "batch_size": 2, "warmup_epochs": 0})
    stored = read_stored_tree(data / "trees" / "cifar100.json")
    decoding = Decoding(size=32, cache_dir=data / "cache")
    train = load_found(find_pictures(data / "images", stored.taxonomy), decoding)["train"]

    def trained(name):
        model = tune.build_model(settings, small, Row(VARIANTS["HETEROGENEOUS"]))
        with Run("mat-clip", MATClipConfig(out=tmp_path / "run", tensorboard=False), processes=False) as run:
            tune.train_prompts(model, settings, train, stored, run, tmp_path / name)
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


def test_weights_that_cannot_be_loaded(data):
    with pytest.raises(RunError, match="cannot be loaded"):
        tune.load_clip(published("cifar100", 1, "maple"), data / "no-such-file.pt")


@pytest.mark.parametrize(("row", "layers"), [(Row(EUCLIDEAN), (2, 5)), (Row(replace(EUCLIDEAN, mix="learned")), None)])
def test_promptsrc_needs_the_last_block(small, row, layers):
    with pytest.raises(ValueError, match="layers must end with the last block"):
        tune.build_model(published("cifar100", 1, "promptsrc"), small, row, layers)


def test_layers_of_a_row(small):
    settings = published("cifar100", 1, "maple")
    chosen = {
        "rule": ((3, 5, 8), (2, 7)), "every": (tuple(range(9)),) * 2, "last two": ((7, 8),) * 2,
        "shallower tower": ((2, 3, 5),) * 2,
    }  # fmt: skip
    for layers, (alone, asked) in chosen.items():
        row = Row(EUCLIDEAN, layers=layers)
        assert tune.build_model(settings, small, row).layers.layers == alone
        assert tune.build_model(settings, small, row, (2, 7)).layers.layers == asked
    assert tune.build_model(settings, small, Row(PROTECT), (2, 7)).layers.layers == (8,)


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
    assert list(chosen_rows(rows, None)) == list(rows)
    assert list(chosen_rows(rows, ("tokens: every", "tokens: rule"))) == ["tokens: every", "tokens: rule"]
    with pytest.raises(RunError, match="no row 'x' in this study"):
        chosen_rows(rows, ("x",))
