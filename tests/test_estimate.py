"""Numbers known before the night."""

import math

import pytest
import torch
from transformers import get_scheduler

from finetune.estimate import (
    Cost,
    Length,
    lr_factor,
    must_improve,
    none_seen,
    paired_change,
    plan_looks,
    steps_per_epoch,
    travel,
)

SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "one_cycle", "cyclical"]


def curve(schedule: str, length: Length) -> list[float]:
    return [lr_factor(schedule, step, length) for step in range(length.total)]


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule: str) -> None:
    length = Length(10, 100, warmup=7)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=7, num_training_steps=100)
    for mine in curve(schedule, length):
        assert mine == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_one_cycle_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=100, cycle_momentum=False)
    for mine in curve("one_cycle", Length(10, 100)):
        assert mine == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        if theirs.last_epoch < 99:
            theirs.step()


def test_cyclical_is_one_cycle_an_epoch() -> None:
    values = curve("cyclical", Length(10, 30))
    assert values[:10] == values[10:20] == values[20:]
    assert max(values) > 0.9 > 0.2 > min(values)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_exceeds_the_learning_rate(schedule: str) -> None:
    values = curve(schedule, Length(7, 70, warmup=5 if schedule in ("constant_with_warmup", "linear", "cosine") else 0))
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    assert travel(2e-5, schedule, Length(7, 70)) <= 70 * 2e-5 * (1 + 1e-9)


def test_travel_of_the_two_minisymposium_runs() -> None:
    steps = steps_per_epoch(30, 1)
    assert travel(1e-6, "constant", Length(steps, steps * 100)) == pytest.approx(3e-3)
    assert travel(1e-7, "constant", Length(steps, steps * 600)) == pytest.approx(1.8e-3)


def test_the_last_epoch_is_always_looked_at() -> None:
    for epochs in (1, 2, 7, 100, 600):
        for budget in (0.001, 0.05, 1.0):
            looks = plan_looks(epochs, "auto", budget, Cost(100.0, 5.0, 40.0))
            assert looks.full[-1] == epochs
            assert not set(looks.light) & set(looks.full)
            assert all(0 < epoch <= epochs for epoch in (*looks.light, *looks.full))


@pytest.mark.parametrize("epochs", [20, 100, 600])
def test_planned_looks_keep_the_budget(epochs: int) -> None:
    cost = Cost(100.0, 5.0, 40.0)
    looks = plan_looks(epochs, "auto", 0.05, cost)
    spent = len(looks.light) * cost.light + len(looks.full) * cost.full
    assert spent <= max(0.05 * epochs * cost.epoch, cost.full) + 1e-9


def test_looks_every_so_many_epochs() -> None:
    assert plan_looks(10, 4, 0.05, Cost(1.0, 1.0, 1.0)).full == (4, 8, 10)
    assert plan_looks(8, 4, 0.05, Cost(1.0, 1.0, 1.0)).full == (4, 8)
    assert plan_looks(1, 1, 0.05, Cost(1.0, 1.0, 1.0)).full == (1,)


def test_travel_is_summed_exactly() -> None:
    assert math.isclose(travel(1e-7, "constant", Length(1, 600)), 6e-5, rel_tol=1e-12)


def test_what_so_few_can_show_is_exact() -> None:
    assert none_seen(10) == pytest.approx(0.2589, abs=1e-4)  # Clopper-Pearson, 0 of 10, one-sided 95 %
    assert paired_change(1) is None
    assert paired_change(10) == pytest.approx(1.8331 / math.sqrt(10), rel=1e-3)
    assert paired_change(101) == pytest.approx(1.6602 / math.sqrt(101), rel=1e-3)
    assert [must_improve(n) for n in (4, 5, 10, 20)] == [None, 5, 9, 15]
