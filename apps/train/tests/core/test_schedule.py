"""The steps of a run are a pure function of the settings and the seed."""

import numpy as np
import pytest

from app_train.core.config import StageConfig
from app_train.core.schedule import Stage, draw_of, steps, warm_cosine

HEAD = StageConfig(epochs=3, lr=1e-2, batch_size=4)
LORA = StageConfig(epochs=2, lr=1e-3, batch_size=3, warmup=0.5)


def stages(num=10, **more):
    return [Stage(name, settings, num, None, **more) for name, settings in (("head", HEAD), ("lora", LORA))]


def test_the_schedule_covers_every_item_once_an_epoch():
    taken = [step for _, step in steps(stages(), seed=0)]
    assert [s.number for s in taken] == list(range(1, sum(stage.num_steps for stage in stages()) + 1))
    for stage, epochs in (("head", 3), ("lora", 2)):
        for epoch in range(epochs):
            rows = np.concatenate([s.rows for s in taken if (s.stage, s.epoch) == (stage, epoch)])
            assert sorted(rows) == list(range(10))
    assert [s.number for s in taken if s.index == 0] == [1, 10]
    assert [s.number for s in taken if s.index == s.total - 1] == [9, 17]
    assert [s.number for s in taken if s.last_of_epoch] == [3, 6, 9, 13, 17]


def test_the_schedule_is_a_function_of_the_seed():
    same = [np.concatenate([s.rows for _, s in steps(stages(), seed)]) for seed in (0, 0, 1)]
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_whole_batches_leave_the_rest_out():
    taken = [step for _, step in steps(stages(whole_batches=True), seed=0)]
    assert {len(s.rows) for s in taken if s.stage == "head"} == {4}
    assert {len(s.rows) for s in taken if s.stage == "lora"} == {3}
    assert len([s for s in taken if s.stage == "head"]) == 6
    few = [step for _, step in steps([Stage("head", HEAD, 3, None, whole_batches=True)], seed=0)]
    assert [len(s.rows) for s in few] == [3, 3, 3]


def test_learning_rates_warm_up_and_fall():
    rates = [warm_cosine(LORA, index, 8) for index in range(8)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_draws_differ_between_steps_processes_and_seeds():
    draws = {draw_of(seed, number, process) for seed in (0, 1) for number in (1, 2) for process in (0, 1)}
    assert len(draws) == 8
