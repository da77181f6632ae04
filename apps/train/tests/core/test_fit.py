"""One loop for every recipe: it resumes bit for bit, accumulates exactly, stops before damage, and says what stood still."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from app_train.core.config import StageConfig
from app_train.core.errors import Interrupted, NonFiniteGradient, RunError
from app_train.core.fit import fit
from app_train.core.interrupt import StopFlag
from app_train.core.schedule import Stage

NUM = 10
X = torch.randn(NUM, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.dropout, self.second = nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1)

    def forward(self, x):
        return self.second(self.dropout(self.first(x)))


def forward(wrapped, step, rows):
    loss = (wrapped(X[rows]) - Y[rows]).square().mean()
    return loss, {"twice": 2 * loss}


def plan(**more):
    more = {"save_every": 2, **more}
    return [
        Stage("head", StageConfig(epochs=2, lr=1e-2, batch_size=4), NUM, forward, trains=lambda n: "first" not in n, **more),
        Stage("all", StageConfig(epochs=2, lr=1e-2, batch_size=3), NUM, forward, **more),
    ]  # fmt: skip


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_only_what_a_stage_trains_changes():
    model = Model()
    before = weights(model)
    fit(model, plan()[:1], seed=0)
    after = weights(model)
    assert torch.equal(before["first.weight"], after["first.weight"])
    assert not torch.equal(before["second.weight"], after["second.weight"])
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_that_is_stopped_at_any_step_ends_in_the_same_numbers(tmp_path):
    whole = Model()
    fit(whole, plan(), tmp_path / "whole", seed=0)
    total = len(lines(tmp_path / "whole"))
    assert total == 14
    for at in range(1, total):
        folder, model, seen = tmp_path / f"at-{at}", Model(), Counter()
        with StopFlag() as stop:

            def after(stop=stop, seen=seen, at=at):
                seen["steps"] += 1
                if seen["steps"] == at:
                    stop.exit_status = 143

            with pytest.raises(Interrupted):
                fit(model, plan(after_step=after), folder, seed=0, stop=stop)
        again = Model()
        fit(again, plan(), folder, seed=0)
        assert same(weights(whole), weights(again)), at
        assert lines(folder) == lines(tmp_path / "whole"), at


def test_a_kill_between_two_checkpoints_goes_back_to_the_last_one(tmp_path):
    whole, seen = Model(), Counter()
    fit(whole, plan(), tmp_path / "whole", seed=0)

    def die():
        seen["steps"] += 1
        if seen["steps"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Model(), plan(after_step=die, save_every=4), tmp_path / "killed", seed=0)
    again = Model()
    fit(again, plan(), tmp_path / "killed", seed=0)
    assert same(weights(whole), weights(again))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


QUICK = StageConfig(epochs=2, lr=1e-2, batch_size=4)


def test_micro_batches_add_up_to_the_batch():
    def plain(wrapped, step, rows):
        out = wrapped.second(wrapped.first(X[rows].double()))
        return (out - Y[rows].double()).square().mean(), {}

    results = []
    for pieces in (1, 3):
        model = Model().double()
        fit(model, [Stage("s", QUICK, NUM, plain, micro_batches=pieces)], seed=0)
        results.append(weights(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-12)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    def bad(wrapped, step, rows):
        return forward(wrapped, step, rows)[0] * (float("nan") if step.number == 3 else 1), {}

    model, seen = Model(), []
    stage = Stage(
        "s", StageConfig(epochs=2, lr=1e-2, batch_size=4), NUM, bad, after_step=lambda: seen.append(weights(model))
    )
    with pytest.raises(NonFiniteGradient, match="step 3"):
        fit(model, [stage], seed=0)
    assert len(seen) == 2
    assert same(seen[-1], weights(model))


@pytest.mark.parametrize("save_every", [3, 100])
def test_weights_that_an_optimizer_spoilt_are_not_kept(tmp_path, save_every):
    """The gradient is finite, the step is not: the checkpoint before it stays the newest."""
    model = Model()

    def spoil(made):
        step = made.step

        def spoilt(closure=None):
            step(closure)
            seen.append(1)
            if len(seen) in (3, 6):
                with torch.no_grad():
                    model.second.bias.fill_(torch.nan)

        made.step = spoilt
        return made

    seen = []
    settings = StageConfig(epochs=2, lr=1e-2, batch_size=4)
    stage = Stage(
        "s", settings, NUM, forward, save_every=save_every,
        optimizer=lambda chosen: spoil(torch.optim.SGD(chosen.values(), lr=1e-2)),
    )  # fmt: skip
    with pytest.raises(NonFiniteGradient, match="step [34]"):
        fit(model, [stage], tmp_path, seed=0)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_last_step_that_spoils_the_weights_is_said():
    model = Model()

    def spoil():
        with torch.no_grad():
            model.second.bias.fill_(torch.nan)

    stage = Stage("s", StageConfig(epochs=1, lr=1e-2, batch_size=NUM), NUM, forward, after_step=spoil)
    with pytest.raises(NonFiniteGradient, match=r"second.bias is not finite after step 1"):
        fit(model, [stage], seed=0)


def test_a_loss_that_refuses_is_one_sentence():
    """It tells of the weights where they are what is wrong, and of the batch where they are not."""

    def refuses(model, step, rows):
        loss, values = forward(model, step, rows)
        if step.number == 2:
            raise ValueError("the loss must be finite, got nan")
        return loss, values

    stage = Stage("s", StageConfig(epochs=1, lr=1e-2, batch_size=4), NUM, refuses)
    with pytest.raises(RunError, match=r"the loss must be finite, got nan \(step 2, stage s, items \["):
        fit(Model(), [stage], seed=0)
    spoilt = Model()

    def spoil():
        with torch.no_grad():
            spoilt.second.bias.fill_(torch.nan)

    with pytest.raises(NonFiniteGradient, match=r"second.bias is not finite after step 2"):
        fit(spoilt, [replace(stage, after_step=spoil)], seed=0)


def test_a_checkpoint_with_one_changed_byte_is_refused(tmp_path):
    """safetensors and torch.load read it without a word."""
    stop = StopFlag()
    stop.exit_status = 143
    with pytest.raises(Interrupted):
        fit(Model(), plan(), tmp_path, seed=0, stop=stop)
    (newest,) = tmp_path.glob("checkpoint-*")
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        if content:
            changed = bytearray(content)
            changed[len(content) * 3 // 4] ^= 1
            file.write_bytes(changed)
            with pytest.raises(RunError, match=f"checkpoint {newest} is damaged .*; delete that folder"):
                fit(Model(), plan(), tmp_path, seed=0)
            file.write_bytes(content)
    fit(Model(), plan(), tmp_path, seed=0)


def test_weights_that_are_not_finite_are_refused_before_anything_is_scored():
    model = Model()
    with torch.no_grad():
        model.first.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"first\.weight"):
        fit(model, plan(), seed=0)


def test_a_loss_that_stands_still_is_said(tmp_path, capsys):
    stage = Stage("s", StageConfig(epochs=8, lr=1e3, batch_size=4), NUM, forward)
    fit(Model(), [stage], tmp_path / "wild", seed=0, label="wild")
    assert "did not fall" in capsys.readouterr().err
    calm = Stage("s", StageConfig(epochs=8, lr=1e-2, batch_size=4), NUM, forward)
    fit(Model(), [calm], tmp_path / "good", seed=0, label="good")
    assert capsys.readouterr().err == ""


class Mean:
    """A running mean of the weights, as PromptSRC keeps one."""

    def __init__(self, model):
        self.model, self.sums, self.index = model, {}, 0

    def add(self, step):
        for name, value in self.model.named_parameters():
            self.sums[name] = self.sums.get(name, 0) + value.detach().clone()

    def tensors(self):
        return self.sums

    def restore(self, tensors, index):
        self.sums, self.index = dict(tensors), index


@pytest.mark.parametrize("stop_at", [3, 9])
def test_a_keeper_comes_back_with_the_checkpoint(tmp_path, stop_at):
    def one(model, keeper, **more):
        settings = StageConfig(epochs=3, lr=1e-2, batch_size=4)
        return [
            Stage("s", settings, NUM, forward, keeper=keeper, after_epoch=keeper.add, save_every=1, **more),
        ]

    whole = Model()
    kept = Mean(whole)
    fit(whole, one(whole, kept), tmp_path / "whole", seed=0)
    model, seen = Model(), Counter()
    first = Mean(model)
    with StopFlag() as stop:

        def after():
            seen["steps"] += 1
            if seen["steps"] == stop_at:
                stop.exit_status = 143

        with pytest.raises(Interrupted):
            fit(model, one(model, first, after_step=after), tmp_path / "run", seed=0, stop=stop)
    model = Model()
    again = Mean(model)
    fit(model, one(model, again), tmp_path / "run", seed=0)
    assert again.index == stop_at
    assert same(kept.sums, again.sums)


def test_order_and_rate_can_be_given():
    seen, rates = [], []

    def watch(wrapped, step, rows):
        seen.append(rows.tolist())
        return forward(wrapped, step, rows)

    model = Model()
    stage = Stage(
        "s", StageConfig(epochs=1, lr=0.5, batch_size=5), NUM, watch, order=lambda epoch: np.arange(NUM)[::-1].copy(),
        rate=lambda step: rates.append(step.index) or 0.1, optimizer=lambda p: torch.optim.SGD(p.values(), lr=0.5),
    )  # fmt: skip
    fit(model, [stage], seed=0)
    assert seen == [[9, 8, 7, 6, 5], [4, 3, 2, 1, 0]]
    assert rates == [0, 1]
