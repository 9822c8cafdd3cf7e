"""Dashboards get the numbers of metrics.jsonl under lasting names, and can do a run no harm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune import loggers
from finetune.errors import UserError

STEP = {
    "kind": "step",
    "step": 4,
    "epoch": 0.5,
    "lr": 1e-7,
    "travel": 4e-7,
    "loss": 2.25,
    "grad_norm": None,
    "gib": 9.5,
}
LOOK = {
    "kind": "look", "look": "full", "step": 4, "epoch": 0.5, "travel": 4e-7, "split": "held_out", "format": "chatml",
    "nll": 2.5, "nll_tstar": 2.0, "accuracy": 0.5, "bpb": 1.0, "tokens": 9, "moved": 1.0, "distance": 0.25,
}  # fmt: skip


class Kept:
    """A dashboard that keeps what it is told, until its patience ends."""

    def __init__(self, patience: int = 99) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.patience, self.closed = patience, False

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.patience -= 1
        if self.patience < 0:
            raise ConnectionError("gone")
        self.told.append((step, dict(numbers)))

    def close(self) -> None:
        self.closed = True


def test_a_row_becomes_numbers_with_lasting_names_and_nothing_else() -> None:
    wanted = {"loss": 2.25, "lr": 1e-7, "travel": 4e-7, "gib": 9.5, "epoch": 0.5}
    assert loggers.numbers(STEP) == {f"train/{key}": value for key, value in wanted.items()}
    found = loggers.numbers(LOOK)
    assert {"held_out/chatml/nll_tstar": 2.0, "adapter/moved": 1.0, "adapter/distance": 0.25}.items() <= found.items()
    assert all(isinstance(value, float) for value in found.values())


def test_of_a_recipe_only_numbers_leave_the_machine() -> None:
    settings = {"epochs": 3, "data": {"train": "/home/me/diary"}, "watch": {"prompts": ["Is she ill?"], "budget": 0.05}}
    assert dict(loggers.shared(settings)) == {"epochs": 3.0, "watch.budget": 0.05}


def test_a_dashboard_that_fails_is_dropped_and_the_others_go_on() -> None:
    notes: list[str] = []
    good, bad = Kept(), Kept(patience=1)
    with loggers.Loggers({"good": good, "bad": bad}, notes.append) as both:
        both.rows([STEP, LOOK])
        both.rows([{**STEP, "step": 5}])
        both.rows([{**STEP, "step": 6}])
    assert [step for step, _ in good.told] == [4, 5, 6]
    assert good.told[0][1] == {**loggers.numbers(STEP), **loggers.numbers(LOOK)}
    assert [step for step, _ in bad.told] == [4]
    assert good.closed
    assert notes == ["report_to: bad is left out from here on (ConnectionError: gone)"]


def test_what_is_not_installed_is_refused_before_the_night(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        loggers.start(["no_such_dashboard"], tmp_path, {})
    (problem,) = caught.value.problems
    assert problem.key == ("report_to",)
    assert "pip install 'minisymposium[no_such_dashboard]'" in problem.remedy


def test_tensorboard_reads_back_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with loggers.start(["tensorboard"], tmp_path, {}) as one:
        one.rows([STEP, LOOK, {**STEP, "step": 5, "loss": 2.0}])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / loggers.FOLDER)).Reload()
    assert set(found.Tags()["scalars"]) == {*loggers.numbers(STEP), *loggers.numbers(LOOK)}
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(4, 2.25), (5, 2.0)]
    assert [(one.step, one.value) for one in found.Scalars("held_out/chatml/nll_tstar")] == [(4, 2.0)]
