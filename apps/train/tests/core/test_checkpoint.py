"""Checkpoints are whole or absent."""

import os

import pytest
import torch

from app_train.core.checkpoint import Checkpoint, load_checkpoint, remove_checkpoints, save_checkpoint
from app_train.core.errors import RunError


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

    monkeypatch.setattr(os, "rename", die)
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
