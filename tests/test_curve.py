"""Curves drawn by hand, with known answers."""

import math
import random
from typing import Any

import pytest

from finetune import curve
from finetune.curve import Point, Visit


def stairs(epochs: int, per_epoch: int, jump: float, descent: float, noise: float = 0.0) -> list[float]:
    """A loss that falls by `descent` over each epoch and by `jump` at its end."""
    lot = random.Random(1)
    return [
        5 - e * (jump + descent) - descent * i / per_epoch + lot.gauss(0, noise)
        for e in range(epochs)
        for i in range(per_epoch)
    ]


# staircase


def test_a_staircase_says_that_only_repeats_help() -> None:
    found = curve.staircase(stairs(6, 30, 0.21, 0.0, noise=0.01), 30)
    assert found.rho == pytest.approx(1.0, abs=0.1)
    assert found.jump is not None
    assert found.jump.value == pytest.approx(0.21, abs=0.02)
    assert found.words.startswith("Loss drops 0.2")
    assert "flat within epochs" in found.words
    assert "only repeats help" in found.words


def test_every_boundary_has_its_formula() -> None:
    found = curve.staircase([4.0, 4.0, 3.0, 3.0, 2.5, 2.5, 2.0, 2.0, 9.0], 4, window=2)
    assert len(found.boundaries) == 1
    one = found.boundaries[0]
    assert (one.epoch, one.jump, one.descent) == (1, 0.5, 1.0)
    assert one.rho == pytest.approx(0.5 / 1.5)


def test_a_loss_that_rises_within_epochs_counts_as_flat() -> None:
    found = curve.staircase(stairs(6, 30, 0.3, -0.1), 30)
    assert found.rho == 1.0


def test_a_straight_slope_is_no_staircase() -> None:
    found = curve.staircase(stairs(8, 40, 0.0, 0.5), 40)
    assert found.rho == pytest.approx(8 / 40)
    assert "no staircase" in found.words
    upward = curve.staircase(stairs(8, 40, -0.2, 0.5, noise=0.001), 40)
    assert upward.rho is None
    assert "no staircase" in upward.words


def test_noise_alone_is_not_resolvable() -> None:
    assert "not resolvable" in curve.staircase(stairs(6, 30, 0.0, 0.0, noise=0.5), 30).words


@pytest.mark.parametrize(("losses", "per_epoch"), [([], 10), ([1.0] * 15, 10), ([1.0] * 12, 3), ([1.0] * 4, 0)])
def test_too_few_boundaries_are_not_resolvable(losses: list[float], per_epoch: int) -> None:
    found = curve.staircase(losses, per_epoch)
    assert found.rho is None
    assert "not resolvable" in found.words


# recency


def visits(fading: float) -> list[Visit]:
    """Ten examples, twelve epochs in random order; loss rises by `fading` for each step since last seen."""
    lot, found, last = random.Random(2), [], dict[str, int]()
    for epoch in range(12):
        for place, name in enumerate(lot.sample("abcdefghij", 10)):
            step = epoch * 10 + place
            gap = step - last.get(name, step - 10)
            found.append(Visit(name, step, 3 - 0.1 * epoch + 0.2 * (name == "a") + fading * gap + lot.gauss(0, 0.005)))
            last[name] = step
    return found


def test_loss_that_grows_with_absence_is_found() -> None:
    found = curve.recency(visits(0.01))
    assert found.slope is not None
    assert found.slope.low < 0.01 < found.slope.high
    assert found.slope.low > 0.008
    assert "1.0" in found.words
    assert "not the skill" in found.words


def test_loss_that_falls_in_absence_is_taught_by_others() -> None:
    assert "the others teach it" in curve.recency(visits(-0.01)).words


def test_no_effect_of_absence_is_not_resolvable() -> None:
    assert "not resolvable" in curve.recency(visits(0.0)).words
    assert curve.recency([]).slope is None
    assert "not resolvable" in curve.recency([Visit("a", 1, 2.0), Visit("a", 2, 1.0)]).words


def test_a_fixed_order_has_no_recency() -> None:
    assert curve.recency([Visit(str(i % 5), i, 1.0) for i in range(50)]).slope is None


# elbow


XS = [float(x) for x in range(11)]


def bent(at: float, scale: float) -> list[float]:
    return [scale * (3 - min(x, at) / at - 0.01 * x) for x in XS]


def test_the_elbow_of_a_bent_line_is_its_bend() -> None:
    found = curve.elbow(XS, [bent(3, scale) for scale in (0.9, 1.0, 1.1, 1.2)])
    assert (found.at, found.low, found.high) == (3.0, 3.0, 3.0)
    assert found.words == "The curve turns flat at 3 (between 3 and 3)."


def test_the_elbow_of_an_exponential_is_kneedles() -> None:
    """1 - e^(-x/s), normalised, is furthest above the diagonal where its slope is 1."""
    xs = [i / 100 for i in range(1001)]
    curves = [[math.exp(-x) for x in xs]]
    assert curve.elbow(xs, curves).at == pytest.approx(math.log(10 / (1 - math.exp(-10))), abs=0.01)


def test_examples_that_disagree_leave_the_elbow_open() -> None:
    found = curve.elbow(XS, [bent(1, 1), bent(7, 1)])
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low > 5
    assert "not resolvable" in found.words


@pytest.mark.parametrize("curves", [[], [[1.0] * 11], [[11 - x for x in XS]], [list(XS)]])
def test_a_curve_that_does_not_turn_has_no_elbow(curves: list[list[float]]) -> None:
    found = curve.elbow(XS, curves)
    assert found.at is None
    assert "not resolvable" in found.words


def test_one_example_gives_an_elbow_without_bounds() -> None:
    found = curve.elbow(XS, [bent(3, 1)])
    assert (found.at, found.low) == (3.0, None)
    assert "not resolvable" in found.words


# primacy


def order(seed: int, slope: float) -> list[tuple[int, float]]:
    lot = random.Random(seed)
    return [(place, slope * place + lot.gauss(0, 5)) for place in range(30)]


def test_primacy_is_found_over_two_shuffles() -> None:
    found = curve.primacy([order(1, -1.0), order(2, -1.0)])
    assert found.rho is not None
    assert found.rho < -0.7
    assert found.p == pytest.approx(0.002)
    assert "shows first is known best" in found.words


def test_one_shuffle_cannot_show_primacy() -> None:
    found = curve.primacy([order(1, -1.0)])
    assert (found.rho, found.p) == (None, None)
    assert "not resolvable" in found.words


def test_no_primacy_is_not_resolvable() -> None:
    assert "not resolvable" in curve.primacy([order(1, 0.0), order(2, 0.0)]).words
    assert curve.primacy([[(0, 1.0), (1, 1.0)]] * 2).rho is None


# over-confidence

WOBBLE = (-0.02, 0.01, 0.02, -0.01, 0.0, 0.015, -0.015, 0.0)


def rises(by: float) -> list[float]:
    return [by + one for one in WOBBLE]


@pytest.mark.parametrize(
    ("nll", "at_best", "kind"),
    [
        (0.3, 0.0, "over-confident"),
        (0.3, 0.2, "lost skill"),
        (-0.1, -0.1, "steady"),
        (0.02, 0.002, "not resolvable"),
        (0.001, 0.0, "not resolvable"),
    ],
)
def test_over_confidence_is_told_from_lost_skill(nll: float, at_best: float, kind: str) -> None:
    found = curve.confidence(rises(nll), rises(at_best))
    assert found.kind == kind
    assert found.words


def test_one_example_shows_no_over_confidence() -> None:
    assert curve.confidence([0.3], [0.0]).kind == "not resolvable"


# axes


def rows() -> list[dict[str, Any]]:
    steps = [{"kind": "step", "step": s, "epoch": s / 2, "loss": 3.0 - s / 10} for s in range(1, 9)]
    looks = [
        {"kind": "look", "step": s, "epoch": s / 2, "travel": s * 1e-3, "split": split, "nll": 2 - s / 8}
        for s in (0, 4, 8)
        for split in ("held_out", "train")
    ]
    return steps + [{**row, "format": "chatml"} for row in looks]


def test_a_look_is_placed_by_epoch_travel_and_train_loss() -> None:
    where = ("held_out", "chatml")
    assert curve.points(rows(), "epoch", "nll", where) == [Point(0, 2.0), Point(2, 1.5), Point(4, 1.0)]
    assert [one.x for one in curve.points(rows(), "travel", "nll", where)] == [0, 4e-3, 8e-3]
    loss = curve.points(rows(), "train_loss", "nll", where)
    assert [one.x for one in loss] == [pytest.approx(2.65), pytest.approx(2.25)]
    assert curve.points(rows(), "epoch", "nll_tstar", where) == []


def test_runs_are_compared_where_their_train_loss_is_equal() -> None:
    fast = [Point(3, 3.0), Point(1, 2.0)]
    slow = [Point(3, 3.1), Point(2.5, 2.85), Point(1.5, 2.35)]
    found = curve.at_equal_loss(fast, slow, levels=4)
    assert [level for level, _, _ in found.levels] == [3.0, 2.5, 2.0, 1.5]
    assert all(second - first == pytest.approx(0.1) for _, first, second in found.levels)
    assert "first run is 0.100 lower throughout" in found.words


def test_runs_that_cross_or_never_meet_are_not_resolvable() -> None:
    fast = [Point(3, 3.0), Point(1, 2.0)]
    assert "cross" in curve.at_equal_loss(fast, [Point(3, 2.5), Point(1, 2.5)]).words
    assert "no range" in curve.at_equal_loss(fast, [Point(0.9, 2.5), Point(0.5, 2.5)]).words
    assert curve.at_equal_loss(fast, []).levels == ()


# suites


def test_map_at_3_counts_the_first_three() -> None:
    ranked = [["a", "b", "c"], ["b", "a", "c"], ["b", "c", "a"], ["b", "c", "d", "a"]]
    assert curve.map_at_3(ranked, ["a"] * 4) == pytest.approx((1 + 1 / 2 + 1 / 3) / 4)


def test_an_option_given_twice_counts_once() -> None:
    assert curve.map_at_3([["b", "b", "b", "a"]], ["a"]) == 0.5


def test_nothing_asked_is_not_zero() -> None:
    assert curve.map_at_3([], []) is None
