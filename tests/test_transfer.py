"""Transfer, spread and worst format, from tables whose answers are known; and the bounds they lean on."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from finetune import chance, transfer
from finetune.transfer import Cell, Transfer

# --- bounds


def test_p_above_is_the_level_whose_lower_bound_touches_nothing() -> None:
    lot = random.Random(1)
    for _ in range(200):
        values = [lot.expovariate(1) * lot.choice((1, -1, 1)) + lot.gauss(0.2, 1) for _ in range(lot.randint(3, 20))]
        p = chance.p_above(values)
        assert p is not None
        if 1e-4 < p < 0.5:
            found = chance.mean(values, 1 - p)
            assert found is not None
            assert found.low == pytest.approx(0, abs=1e-6)


def test_p_above_of_values_that_do_not_vary() -> None:
    assert [chance.p_above([value] * 5) for value in (1.0, 0.0, -1.0)] == [0.0, 1.0, 1.0]
    assert chance.p_above([1.0]) is None
    assert chance.p_above([0.1, 0.3, 0.2]) == pytest.approx(1 - (chance.p_above([-0.1, -0.3, -0.2]) or 0))


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    assert chance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert chance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert chance.holm([]) == []


# --- formats

BITS = 8 * math.log(2)  # nats of one bit per byte of an answer of 8 bytes


@dataclass(frozen=True)
class Gauge:
    name: str
    group: str
    family: str


GAUGES = [
    Gauge("chatml", "trained", "special-token"),
    Gauge("alpaca", "trained", "hash"),
    Gauge("zephyr", "held_out", "pipe-tag"),
    Gauge("phi-3", "held_out", "pipe-tag"),
    Gauge("xml", "held_out", "markup"),
    Gauge("llama-3", "near", "special-token"),
    Gauge("sampled:0", "sampled", "sampled"),
    Gauge("sampled:1", "sampled", "sampled"),
]
# bits per byte gained in each format; the base always needs 5
GAIN = {
    "chatml": 2.0,
    "alpaca": 1.0,
    "zephyr": 1.5,
    "phi-3": 1.2,
    "xml": -0.3,
    "llama-3": 1.5,
    "sampled:0": 0.75,
    "sampled:1": 1.5,
}


def sheets(gains: Mapping[str, float], noise: Sequence[float] = (-0.1, 0.0, 0.1) * 4, **more: Any) -> tuple[Any, Any]:
    """Answers of 8 bytes; what an example has more than the mean it has in every format."""
    base = {name: {f"e{i}": Cell(5 * BITS, 4, 1, 8, **more) for i in range(len(noise))} for name in gains}
    tuned = {
        name: {f"e{i}": Cell((5 - gain - own) * BITS, 4, 3, 8, **more) for i, own in enumerate(noise)}
        for name, gain in gains.items()
    }
    return tuned, base


def found(gains: Mapping[str, float] = GAIN, **more: Any) -> Transfer:
    return transfer.transfer(*sheets(gains, **more), GAUGES)


def test_transfer_is_the_gain_as_a_share_of_the_mean_gain_in_trained_formats() -> None:
    one = found()
    by_name = {row.format: row for row in one.standings}
    assert one.resolvable
    assert one.reference is not None
    assert one.reference.value == pytest.approx(1.5)
    for name, gain in GAIN.items():
        row = by_name[name]
        assert (row.base, row.tuned, row.n) == (pytest.approx(5), pytest.approx(5 - gain), 12)
        assert row.tau is not None
        assert row.tau.value == pytest.approx(gain / 1.5)
        assert row.tau.low <= row.tau.value <= row.tau.high
        assert row.accuracy == (0.75, 0.25)
    assert [row.format for row in one.standings][:2] == ["xml", "sampled:0"]  # worst first


def test_the_headline_is_over_families_of_strangers_alone() -> None:
    one = found().headlines
    assert one["held_out"].median == pytest.approx((1.35 / 1.5 - 0.3 / 1.5) / 2)
    assert (one["held_out"].least.name, one["held_out"].least.tau.value) == ("markup", pytest.approx(-0.2))
    assert {(row.name, row.formats) for row in one["held_out"].reaches} == {("pipe-tag", 2), ("markup", 1)}
    assert [row.name for row in one["near"].reaches] == ["special-token"]
    assert one["sampled"].median == pytest.approx(0.75)
    assert one["sampled"].least.name == "sampled:0"
    assert "slip" not in one  # nothing measured


def test_without_a_gain_in_trained_formats_there_is_no_transfer() -> None:
    noise = [-3.0, 3.0, -2.5, 2.5, -1.0, 1.1]
    one = transfer.transfer(*sheets({**GAIN, "chatml": 0.1, "alpaca": 0.1}, noise), GAUGES)
    assert not one.resolvable
    assert one.headlines == {}
    assert all(row.tau is None for row in one.standings)
    assert all(row.gain is not None for row in one.standings)


def test_below_the_base_takes_more_than_one_bad_format_in_many() -> None:
    one = found()
    assert [row.format for row in one.below] == ["xml"]
    assert one.worst is not None
    assert one.worst.format == "xml"
    assert one.worst.surest is not None
    assert one.worst.gain is not None
    assert one.worst.surest.high < 0  # for sure, even with eight formats in mind
    assert one.worst.surest.high > one.worst.gain.high
    # by luck alone, one in twenty formats would be below: Holm lets none be
    lot = random.Random(0)
    names = [f"f{i}" for i in range(60)]
    base = {name: {f"e{i}": Cell(5 * BITS, 4, 1, 8) for i in range(12)} for name in names}
    tuned = {name: {k: replace(c, nats=c.nats + lot.gauss(0, 1)) for k, c in base[name].items()} for name in names}
    alone = [p for p in (chance.p_above([tuned[n][k].nats - base[n][k].nats for k in tuned[n]]) for n in names) if p]
    assert min(alone) < 0.05
    assert transfer.transfer(tuned, base, [Gauge(name, "sampled", "sampled") for name in names]).below == ()


def test_spread_is_the_range_over_formats_tuned_beside_base() -> None:
    tuned, base = sheets(GAIN)
    base["xml"] = {k: replace(c, nats=7 * BITS) for k, c in base["xml"].items()}
    one = transfer.transfer(tuned, base, GAUGES)
    named = one.spreads["named"]
    assert (named.formats, named.tuned, named.base) == (6, pytest.approx(2.3), pytest.approx(2.0))
    assert named.excess == pytest.approx(0.3)
    assert named.excess_80 is not None
    assert one.spreads["sampled"].tuned == pytest.approx(0.75)
    assert one.spreads["sampled"].tuned_80 is None  # of two formats


def test_a_format_that_indents_answers_is_no_part_of_the_spread() -> None:
    tuned, base = sheets(GAIN)
    for side in (tuned, base):
        side["xml"] = {k: replace(c, nats=9 * BITS, size=12) for k, c in side["xml"].items()}
    assert transfer.transfer(tuned, base, GAUGES).spreads["named"].formats == 5


def test_formats_that_met_few_examples_are_compared_on_those_alone() -> None:
    """As at looks, where the many rotate."""
    tuned, base = sheets(GAIN)
    easy = {k: replace(c, nats=c.nats - BITS) for k, c in tuned["chatml"].items() if k in ("e0", "e1", "e2")}
    tuned["chatml"].update(easy)
    tuned["sampled:0"] = {k: tuned["sampled:0"][k] for k in ("e0", "e1", "e2")}
    one = transfer.transfer(tuned, base, GAUGES)
    row = next(row for row in one.standings if row.format == "sampled:0")
    assert (row.n, row.tau and row.tau.value) == (3, pytest.approx(0.75 / 2.0))
    assert one.spreads.get("sampled") is None


def test_sizes_weigh_as_bytes_do() -> None:
    gauges = [Gauge("a", "trained", "x")]
    tuned = {"a": {"long": Cell(10 * BITS, 9, 1, 80), "short": Cell(BITS, 9, 1, 8)}}
    base = {"a": {"long": Cell(30 * BITS, 9, 1, 80), "short": Cell(2 * BITS, 9, 1, 8), "lost": Cell(1.0, 1, 1, 8)}}
    (row,) = transfer.transfer(tuned, base, gauges).standings
    assert (row.tuned, row.base) == (pytest.approx(1.0), pytest.approx(32 / 11))
    assert row.gain is not None
    assert row.gain.value == pytest.approx(row.base - row.tuned)


def test_the_chance_of_the_end_is_a_mean_of_chances() -> None:
    tuned, base = sheets({"chatml": 1.0}, end=math.log(2))
    tuned["chatml"]["e0"] = replace(tuned["chatml"]["e0"], end=0.0)
    (row,) = transfer.transfer(tuned, base, GAUGES).standings
    assert row.end == (pytest.approx((1 + 11 * 0.5) / 12), pytest.approx(0.5))
    assert found().standings[0].end is None


def test_nothing_measured_is_nothing() -> None:
    one = transfer.transfer({}, {}, GAUGES)
    assert (one.standings, one.reference, one.resolvable, one.headlines, one.spreads) == ((), None, False, {}, {})
    assert one.worst is None


def test_a_sheet_is_read_from_the_rows_of_a_look() -> None:
    row = {"epoch": 1.0, "step": 5, "id": "a", "split": "held_out", "format": "chatml", "nll": 2.0, "tokens": 10}
    rows = [
        {**row, "bytes": 30, "hits": 4, "map": "full", "end_nll": 5.0},
        {**row, "bytes": 30, "hits": 4, "map": "full", "end_nll": 3.0, "id": "b"},
        {**row, "bytes": 30, "map": "full", "step": 0, "end_nll": 1.0},
        {**row, "bytes": 30, "map": "full", "split": "train"},
        {**row, "bytes": 30, "map": "free", "nll": 9.0},
    ]
    assert transfer.sheet(rows, 5) == {"chatml": {"a": Cell(15.0, 10, 4, 30), "b": Cell(17.0, 10, 4, 30)}}
    rows[2] = {**rows[2], "end_nll": None}  # not in every row, were it of the other look: then in none
    assert {k: cell.nats for k, cell in transfer.sheet(rows, 5)["chatml"].items()} == {"a": 20.0, "b": 20.0}
