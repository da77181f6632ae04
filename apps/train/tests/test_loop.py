"""The schedule is a pure function; checkpoints are whole or absent; settings are checked; a bad gradient stops the run."""

import json
import os

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from app_train.core.checkpoint import Checkpoint, load_checkpoint, remove_checkpoints, save_checkpoint
from app_train.core.config import FitConfig, HeadStageConfig, LossConfig, StageConfig, claim_folder, config_hash
from app_train.core.errors import RunError
from app_train.core.records import Records, read_records
from app_train.recipes.lora.loop import num_steps, schedule
from app_train.recipes.lora.objective import Objective, loss_parts
from app_train.recipes.lora.rows import style_offsets
from hier_lora import HierLoraCLIP
from hier_losses import Taxonomy
from hier_losses.functional import hisce, level_cross_entropy, parent_child_consistency, tp_kl

CONFIG = FitConfig(
    head=HeadStageConfig(epochs=3, lr=1e-2, batch_size=4), lora=StageConfig(epochs=2, lr=1e-3, batch_size=3, warmup=0.5)
)


def test_the_schedule_covers_every_picture_once_an_epoch():
    steps = list(schedule(CONFIG, 10, seed=0))
    assert [s.number for s in steps] == list(range(1, num_steps(CONFIG, 10) + 1))
    for stage, epochs in (("head", 3), ("lora", 2)):
        for epoch in range(epochs):
            rows = np.concatenate([s.rows for s in steps if (s.stage, s.epoch) == (stage, epoch)])
            assert sorted(rows) == list(range(10))
    assert [s.number for s in steps if s.first_of_stage] == [1, 10]
    assert [s.number for s in steps if s.last_of_stage] == [9, 17]


def test_the_schedule_is_a_function_of_the_seed():
    same = [np.concatenate([s.rows for s in schedule(CONFIG, 10, seed)]) for seed in (0, 0, 1)]
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_learning_rates_warm_up_and_fall():
    rates = [s.lr for s in schedule(CONFIG, 10, 0) if s.stage == "lora"]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1e-3)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def state(position=3):
    parameter = torch.nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return Checkpoint({"w": parameter.detach()}, optimizer.state_dict(), position)


def test_checkpoints_come_back_bit_for_bit(tmp_path):
    saved = state()
    save_checkpoint(tmp_path, saved)
    found = load_checkpoint(tmp_path)
    assert found.position == 3
    assert torch.equal(found.weights["w"], saved.weights["w"])
    assert torch.equal(found.optimizer["state"][0]["exp_avg_sq"], saved.optimizer["state"][0]["exp_avg_sq"])


def test_only_complete_checkpoints_count_and_two_are_kept(tmp_path):
    for position in (1, 2, 3):
        save_checkpoint(tmp_path, state(position))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000002", "checkpoint-00000003"]
    (tmp_path / "checkpoint-00000003" / "COMPLETE").unlink()
    assert load_checkpoint(tmp_path).position == 2
    remove_checkpoints(tmp_path)
    assert load_checkpoint(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_dies_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1))

    def die(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, state(2))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path).position == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "position.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    folder = save_checkpoint(tmp_path, state())
    (folder / name).write_bytes((folder / name).read_bytes()[:7])
    with pytest.raises(RunError, match=str(folder)):
        load_checkpoint(tmp_path)


def test_records_drop_what_comes_after_the_checkpoint(tmp_path):
    records = Records(tmp_path, 0)
    for step in range(1, 6):
        records.add(step, loss=float(step))
    records.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    records = Records(tmp_path, 3)
    records.add(4, loss=40.0)
    records.close()
    assert [(line["step"], line["loss"]) for line in read_records(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_losses_are_those_of_hier_losses():
    tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z"), ("b", "u")])
    logits = torch.randn(5, tax.num_nodes, generator=torch.Generator().manual_seed(0))
    target = tax.leaf[torch.tensor([0, 1, 2, 3, 0])]
    weights = LossConfig(leaf=1, level=2, tp_kl=3, hisce=4, consistency=5, eps=0.2)
    parts = loss_parts(logits, target, tax, weights)
    assert float(parts["leaf"]) == pytest.approx(float(torch.nn.functional.cross_entropy(logits[:, 2:], target - 2)))
    assert float(parts["level"]) == pytest.approx(2 * float(level_cross_entropy(logits, target, tax)))
    assert float(parts["tp_kl"]) == pytest.approx(3 * float(tp_kl(logits, target, tax)))
    assert float(parts["hisce"]) == pytest.approx(4 * float(hisce(logits, target, tax, eps=0.2)))
    assert float(parts["consistency"]) == pytest.approx(5 * float(parent_child_consistency(logits, tax)))
    assert set(loss_parts(logits, target, tax, LossConfig(leaf=1))) == {"leaf"}


def test_settings_are_frozen_and_checked():
    with pytest.raises(ValidationError):
        StageConfig(epochs=-1, lr=1e-3)
    with pytest.raises(ValidationError):
        FitConfig(rnak=4)
    with pytest.raises(ValidationError):
        CONFIG.rank = 3
    assert config_hash(CONFIG) != config_hash(CONFIG.model_copy(update={"rank": 8}))
    assert config_hash(CONFIG) == config_hash(FitConfig(**json.loads(CONFIG.model_dump_json())))


def test_a_folder_belongs_to_one_run(tmp_path):
    folder = tmp_path / "run"
    claim_folder(folder, CONFIG, "data-1")
    written = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    assert written["config"]["head"]["epochs"] == 3
    assert "torch" in written["versions"]
    claim_folder(folder, CONFIG, "data-1")
    with pytest.raises(RunError, match="the data"):
        claim_folder(folder, CONFIG, "data-2")
    other = CONFIG.model_copy(update={"rank": 8})
    with pytest.raises(RunError, match="rank"):
        claim_folder(folder, other, "data-1")
    claim_folder(folder, other, "data-1", ignored=("rank",))
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="not empty"):
        claim_folder(strange, CONFIG, "data-1")


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    from accelerate import Accelerator

    from app_train.core.errors import NonFiniteGradient
    from app_train.core.interrupt import StopFlag
    from app_train.recipes.lora.loop import fit

    class Model(torch.nn.Module):
        """The parts of a HierLoraCLIP that the loop touches; features of 1e30 overflow the logits."""

        def __init__(self):
            super().__init__()
            self.tax = Taxonomy.from_paths([("a",), ("b",)])
            self.weight = torch.nn.Parameter(torch.ones(2, 2))

        @property
        def dual_encoder(self):
            return self

        def project(self, features):
            return features @ self.weight

        def score(self, unit, target=None):
            return unit * float("nan")

    class Data:
        targets = np.array([0, 1, 0, 1])

        def __len__(self):
            return 4

    model = Model()
    with StopFlag() as stop, pytest.raises(NonFiniteGradient, match="step 1"):
        fit(
            model, Data(), torch.ones(4, 2), LossConfig(leaf=1), CONFIG, tmp_path,
            seed=0, stop=stop, accelerator=Accelerator(cpu=True), label="x",
        )  # fmt: skip
    assert torch.equal(model.weight.detach(), torch.ones(2, 2))


def test_offsets_give_every_style_the_common_mean():
    features = torch.randn(9, 4, dtype=torch.float64)
    styles = ("b", "a", "a", "b", "c", "c", "c", "a", "b")
    moved = features - style_offsets(features, styles)
    for style in "abc":
        chosen = torch.tensor([s == style for s in styles])
        torch.testing.assert_close(moved[chosen].mean(0), features.mean(0))
        shift = (features - moved)[chosen]
        torch.testing.assert_close(shift, shift[:1].expand_as(shift))


class TinyEncoder(torch.nn.Module):
    """A dual encoder whose tower averages the pixels."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(3, 5)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
        self.words = torch.randn(len(TREE.names), 5)

    def vision(self, pixels):
        return pixels.mean((-1, -2))

    def project(self, features):
        return self.projection(features)

    def encode_image(self, pixels):
        return self.project(self.vision(pixels))

    def encode_text(self, texts):
        return self.words[: len(texts)]


TREE = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b", "z")])


def test_both_stages_see_the_same_offsets():
    """The second stage takes off the tower's output what the first stage's cached features come without."""
    torch.manual_seed(0)
    model = HierLoraCLIP(TinyEncoder(), TREE)
    objective = Objective(model, LossConfig(level=1))
    pixels, target = torch.randn(6, 3, 4, 4), TREE.leaf[torch.tensor([0, 1, 2, 0, 1, 2])]
    features = model.dual_encoder.vision(pixels)
    offsets = style_offsets(features, ("s", "s", "t", "t", "s", "t"))
    cached = objective(target, features - offsets)["level"]
    torch.testing.assert_close(objective(target, pixels, offsets)["level"], cached)
    assert not torch.allclose(objective(target, pixels)["level"], cached)
