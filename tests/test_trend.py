"""Rows written by hand, and the one sentence that each of them bears."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from finetune import trend
from finetune.trend import Course

NAMES = "abcdefghij"
PER = len(NAMES)


def shuffled(epoch: int) -> dict[str, int]:
    return {name: at + 1 for at, name in enumerate(random.Random(epoch).sample(NAMES, PER))}


def step(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "step", "step": number, "epoch": number / PER, "travel": number * 1e-6, "loss": loss}


def stairs(epochs: int = 8, jump: float = 0.21) -> list[dict[str, Any]]:
    lot = random.Random(1)
    return [step(n + 1, 4 - jump * (n // PER) + lot.gauss(0, 0.004)) for n in range(epochs * PER)]


def look(at: int, split: str, values: dict[str, float], **more: Any) -> list[dict[str, Any]]:
    head = {"step": at, "epoch": at / PER, "travel": at * 1e-6, "split": split, "format": "chatml", "map": "full"}
    return [{**head, "id": name, "nll": value, "nll_tstar": value, **more} for name, value in values.items()]


def course(metrics: Iterable[Any] = (), examples: Iterable[Any] = (), **more: Any) -> Course:
    places: Callable[[int], Any] = more.pop("places", shuffled)
    return Course(list(metrics), list(examples), PER, "chatml", places, **more)


def words(name: str, made: Course) -> str:
    return next(one.words for one in trend.told(made) if one.name == name)


def test_a_staircase_is_told_as_remembering() -> None:
    assert words("staircase", course(stairs())) == (
        "Loss drops 0.207 at each epoch boundary and is flat within epochs (+0.004): only repeats help; "
        "examples are being remembered one by one."
    )


def test_without_rows_everything_is_not_resolvable_and_says_why() -> None:
    for one in trend.told(course()):
        assert not one.resolved
        assert len(one.words) > len(one.name) + len(": not resolvable, ")
        assert one.as_dict()["resolved"] is False


def fading(free: bool) -> tuple[list[Any], list[Any]]:
    """Ten epochs in which an example's loss is 0.01 for each step since it was last seen."""
    metrics, rows, seen = [], [], dict.fromkeys(NAMES, -PER)
    for epoch in range(10):
        for name, at in sorted(shuffled(epoch).items(), key=lambda one: one[1]):
            now = epoch * PER + at
            loss = 2 + 0.01 * (now - seen[name]) + random.Random(now).gauss(0, 0.001)
            metrics.append(step(now, loss))
            rows += [{"map": "free", "split": "train", "id": name, "step": (epoch + 1) * PER, "nll": loss}]
            seen[name] = now
    return metrics, [{**row, "epoch": 1.0, "format": "chatml"} for row in rows] if free else []


@pytest.mark.parametrize("free", [True, False])
def test_recency_is_read_from_the_free_map_or_from_steps_of_one_example(free: bool) -> None:
    metrics, rows = fading(free)
    found = trend.visits(course(metrics, rows))
    assert {(one.example, one.step) for one in found} == {
        (name, epoch * PER + at) for epoch in range(10) for name, at in shuffled(epoch).items()
    }
    assert words("recency", course(metrics, rows)).startswith("An example's loss rises by 1.0")


def test_a_batch_of_several_has_nobodys_loss() -> None:
    assert trend.visits(course(stairs(), places=lambda _epoch: {"a": 1, "b": 1})) == []


def bent(at: int, name: str) -> float:
    return 3 - min(at, 40) / 40 + (at - 40) * 0.001 * (at > 40) + 0.01 * NAMES.index(name)


def test_the_elbow_is_told_on_three_axes() -> None:
    looks = [row for at in range(0, 81, 10) for row in look(at, "held_out", {name: bent(at, name) for name in NAMES})]
    assert words("elbow", course(stairs(), looks)) == (
        "Held-out loss turns flat at epoch 4 (between 4 and 4; travel 4.0e-05, train loss 3.370)."
    )
    assert "there are 2 at 10" in words("elbow", course(stairs(), looks[:20]))


def test_over_confidence_compares_the_last_look_with_the_best_one() -> None:
    rows = []
    for at in range(10, 81, 10):
        sure = max(0, at - 40) / 100
        for name in NAMES:
            rows += look(at, "held_out", {name: bent(min(at, 40), name) + sure}, nll_tstar=bent(min(at, 40), name))
    found = next(one for one in trend.told(course(stairs(), rows)) if one.name == "over-confidence")
    assert "too sure of itself" in found.words
    assert found.about["since_step"] in (40, 50)
    assert "skill is lost" in words(
        "over-confidence", course(stairs(), [{**row, "nll_tstar": row["nll"]} for row in rows])
    )


@pytest.mark.parametrize(
    ("later", "said"),
    [(0.5, "hangs on the wording"), (-0.2, "matters less than it did"), (0.0, "Twins: not resolvable")],
)
def test_the_price_of_other_words_is_told_beside_the_bases(later: float, said: str) -> None:
    lot = random.Random(4)
    own = {name: 1 + lot.random() for name in NAMES}
    rows = [*look(0, "train", own), *look(0, "twin", {name: own[name] + 0.1 for name in NAMES})]
    rows += look(80, "train", own)
    rows += look(80, "twin", {name: own[name] + 0.1 + later + lot.gauss(0, 0.01) for name in NAMES})
    assert said in words("twins", course(stairs(), rows))
    assert "base was not asked" in words("twins", course(stairs(), rows[2 * PER :]))


def test_primacy_takes_two_orders() -> None:
    order = [(at, -float(at)) for at in range(10)]
    assert "two are needed" in words("primacy", course(orders=[order]))
    assert "shows first is known best" in words("primacy", course(orders=[order, order]))


def test_later_turns_are_told_apart() -> None:
    assert "there are 0" in trend.later_turns([[0.3], [0.2]]).words
    falling = [[0.5, 0.2 + 0.01 * n, 0.2] for n in range(6)]
    assert "holds less well once a talk goes on" in trend.later_turns(falling).words
    assert "they gained more" in trend.later_turns([[0.1, 0.4 + 0.01 * n] for n in range(6)]).words
    assert not trend.later_turns([[0.1, 0.4], [0.4, 0.1], [0.2, 0.2]]).resolved


def test_the_table_has_a_row_a_look_and_nothing_it_does_not_know() -> None:
    heads = [{"kind": "look", "look": "full", "step": at, "epoch": at / PER, "travel": at * 1e-6} for at in (0, 40)]
    metrics = [{**head, "split": "held_out", "format": "chatml", "nll": 2.0} for head in heads]
    metrics += [{**metrics[-1], "look": "closing", "nll": 1.0}]
    echo = look(40, "train", {"a": 1.0}, windows=[3, 9], long=True, echo_whole=None)
    first, second = trend.table(course([*stairs(4), *metrics], echo))
    assert (first["train_loss"], first["echo_whole"], first["twin_nll"]) == (None, None, None)
    assert (second["epoch"], second["held_out_nll"], second["train_loss"]) == (4.0, 2.0, pytest.approx(3.37, abs=0.01))
    assert (second["echo_words"], second["echo_long"], second["echo_whole"]) == (1, 1, 0)
