"""What was gained in one prompt format against another over the same held-out answers: transfer, spread, the worst one.

Bits for each UTF-8 byte of the answers' words. What ends an answer is left out: it is one token in one format and eight
in the next, and a base that never met a mark gains most from learning it. Arithmetic over numbers that others measured;
figures of nothing are None.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Any, Protocol

from finetune import chance
from finetune.chance import Interval

BIT = math.log(2)  # nats
_SAME_WORDS = 0.02  # share of the bytes by which formats may cut answers differently
_WHOLE = ("trained", "held_out", "near")  # groups of named formats


@dataclass(frozen=True)
class Cell:
    """One example's answers in one format. `nats`: of their words. `end`: of what ends the last answer, nats."""

    nats: float
    tokens: int
    hits: int
    size: int
    end: float | None = None


Sheet = Mapping[str, Mapping[str, Cell]]  # by format and example


class Measured(Protocol):
    """A format and what it is to the run: see lineup.Gauge."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def family(self) -> str: ...


@dataclass(frozen=True)
class Standing:
    """One format. `tuned`, `base`: bits per byte over `n` examples of `bytes` in all; `gain`: base - tuned, `tau`: as a
    share of trained.

    `p_worse`: how often luck would make it so much worse than the base, all formats together; `surest`: the most that
    can be said of the gain with all of them in mind, at least and at most. `end`: mean chance of what ends the last
    answer, where it ends (tuned, base). `accuracy`: share of the words' tokens that are hit (tuned, base).
    """

    format: str
    group: str
    family: str
    n: int
    bytes: int
    tuned: float
    base: float
    gain: Interval | None
    surest: Interval | None
    tau: Interval | None
    p_worse: float | None
    below: bool
    end: tuple[float, float] | None
    accuracy: tuple[float, float]


@dataclass(frozen=True)
class Reach:
    """Transfer of a family, or of one format of a group without families. `formats`: how many are in it."""

    name: str
    formats: int
    tau: Interval


@dataclass(frozen=True)
class Headline:
    """Transfer of a group: median and least over its families or formats, and which was least."""

    group: str
    reaches: tuple[Reach, ...]
    median: float
    least: Reach


@dataclass(frozen=True)
class Spread:
    """How far formats lie apart, bits per byte: the whole range and from the 10th to the 90th percentile."""

    formats: int
    tuned: float
    base: float
    tuned_80: float | None
    base_80: float | None

    @property
    def excess(self) -> float:
        """Above nothing: the adapter depends more on the format than the base does."""
        return self.tuned - self.base

    @property
    def excess_80(self) -> float | None:
        return None if self.tuned_80 is None or self.base_80 is None else self.tuned_80 - self.base_80


@dataclass(frozen=True)
class Transfer:
    """All formats, worst first. `reference`: mean gain in trained formats; unless `resolvable` there is no tau at all.

    `headlines` by group, `spreads` of `named` and `sampled` formats; a group that was not measured is not there.
    """

    standings: tuple[Standing, ...]
    reference: Interval | None
    resolvable: bool
    headlines: Mapping[str, Headline]
    spreads: Mapping[str, Spread]

    @property
    def worst(self) -> Standing | None:
        """The format with the least gain over the base."""
        known = [one for one in self.standings if one.gain]
        return min(known, key=lambda one: one.base - one.tuned, default=None)

    @property
    def below(self) -> tuple[Standing, ...]:
        """Formats in which the adapter is surely worse than the base."""
        return tuple(one for one in self.standings if one.below)


def transfer(
    tuned: Sheet, base: Sheet, gauges: Iterable[Measured], luck: float = 0.05, standard_errors: float = 2.0
) -> Transfer:
    """Of what was read with the adapter on and off. A format counts with the examples that both sheets have of it."""
    shelf = {one.name: (one, _both(tuned.get(one.name, {}), base.get(one.name, {}))) for one in gauges}
    known = {name: pair for name, pair in shelf.items() if pair[1]}
    gains = {name: _gains(pairs) for name, (_, pairs) in known.items()}
    trained = _mean_of([gains[name] for name, (one, _) in known.items() if one.group == "trained"])
    reference, error = chance.mean([*trained.values()]), chance.standard_error([*trained.values()])
    resolvable = reference is not None and error is not None and reference.value > standard_errors * error
    divisor = trained if resolvable else {}
    worse = _p_worse(gains)
    level = 1 - luck / max(len(worse), 1)
    standings = [
        _standing(one, pairs, gains[name], (divisor, level, worse.get(name), luck))
        for name, (one, pairs) in known.items()
    ]
    standings.sort(key=lambda one: (one.base - one.tuned, one.format))
    kinds = {name: one for name, (one, _) in known.items()}
    return Transfer(tuple(standings), reference, resolvable, _headlines(kinds, gains, divisor), _spreads(standings))


_Pairs = Mapping[str, tuple[Cell, Cell]]
_Gains = Mapping[str, float]


def _both(tuned: Mapping[str, Cell], base: Mapping[str, Cell]) -> dict[str, tuple[Cell, Cell]]:
    return {name: (cell, base[name]) for name, cell in tuned.items() if name in base and cell.size > 0}


def _gains(pairs: _Pairs) -> dict[str, float]:
    """Bits for each byte of a mean answer, so that the plain mean over examples is the gain over all bytes."""
    size = fmean(cell.size for cell, _ in pairs.values())
    return {name: (plain.nats - cell.nats) / BIT / size for name, (cell, plain) in pairs.items()}


def _mean_of(some: Sequence[_Gains]) -> dict[str, float]:
    """Each example's mean over formats; only examples that all of them have."""
    common = set.intersection(*(set(one) for one in some)) if some else set()
    return {name: fmean(one[name] for one in some) for name in some[0] if name in common} if some else {}


def _tau(gains: _Gains, trained: _Gains) -> Interval | None:
    """Ratio of two means over the same examples, with bounds from each example's pull on it."""
    pairs = [(gains[name], trained[name]) for name in gains if name in trained]
    below = fmean(pair[1] for pair in pairs) if pairs else 0.0
    if below <= 0:
        return None
    ratio = fmean(pair[0] for pair in pairs) / below
    return chance.mean([ratio + (gain - ratio * of) / below for gain, of in pairs])


def _p_worse(gains: Mapping[str, _Gains]) -> dict[str, float]:
    """Holm-adjusted, of every format with two examples or more."""
    ps = {name: chance.p_above([-gain for gain in some.values()]) for name, some in gains.items()}
    known = {name: p for name, p in ps.items() if p is not None}
    return dict(zip(known, chance.holm([*known.values()]), strict=True))


def _standing(one: Measured, pairs: _Pairs, gains: _Gains, rest: tuple[_Gains, float, float | None, float]) -> Standing:
    trained, level, p, luck = rest
    cells, plain = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    return Standing(
        format=one.name,
        group=one.group,
        family=one.family,
        n=len(pairs),
        bytes=sum(cell.size for cell in cells),
        tuned=_bpb(cells),
        base=_bpb(plain),
        gain=chance.mean([*gains.values()]),
        surest=chance.mean([*gains.values()], level),
        tau=_tau(gains, trained),
        p_worse=p,
        below=p is not None and p <= luck,
        end=_ends(cells, plain),
        accuracy=(_accuracy(cells), _accuracy(plain)),
    )


def _bpb(cells: Sequence[Cell]) -> float:
    return sum(cell.nats for cell in cells) / BIT / sum(cell.size for cell in cells)


def _accuracy(cells: Sequence[Cell]) -> float:
    return sum(cell.hits for cell in cells) / max(sum(cell.tokens for cell in cells), 1)


def _ends(tuned: Sequence[Cell], base: Sequence[Cell]) -> tuple[float, float] | None:
    sides = [[math.exp(-cell.end) for cell in side if cell.end is not None] for side in (tuned, base)]
    return (fmean(sides[0]), fmean(sides[1])) if all(sides) else None


def _headlines(kinds: Mapping[str, Measured], gains: Mapping[str, _Gains], trained: _Gains) -> dict[str, Headline]:
    """Strangers and near ones by family, all others format by format."""
    units: dict[tuple[str, str], list[_Gains]] = defaultdict(list)
    for name, one in kinds.items():
        if one.group != "trained":
            units[one.group, one.family if one.group in _WHOLE else name].append(gains[name])
    groups: dict[str, list[Reach]] = defaultdict(list)
    for (group, name), some in units.items():
        if (tau := _tau(_mean_of(some), trained)) is not None:
            groups[group].append(Reach(name, len(some), tau))
    return {group: _headline(group, reaches) for group, reaches in groups.items()}


def _headline(group: str, reaches: list[Reach]) -> Headline:
    ordered = sorted(reaches, key=lambda one: one.tau.value)
    return Headline(group, tuple(ordered), median(one.tau.value for one in ordered), ordered[0])


def _spreads(standings: Sequence[Standing]) -> dict[str, Spread]:
    """Of formats that met every example with the same words: others were asked of other answers, or indent them."""
    most = max((one.n for one in standings), default=0)
    sizes = [one.bytes for one in standings if one.n == most]
    usual = median(sizes) if sizes else 0
    whole = [one for one in standings if one.n == most and abs(one.bytes - usual) <= _SAME_WORDS * usual]
    sides = {"named": _WHOLE, "sampled": ("sampled",)}
    some = {name: [one for one in whole if one.group in groups] for name, groups in sides.items()}
    return {name: _spread(found) for name, found in some.items() if len(found) > 1}


def _spread(some: Sequence[Standing]) -> Spread:
    ranges = []
    for values in ([one.tuned for one in some], [one.base for one in some]):
        tenths = quantiles(values, n=10, method="inclusive")
        ranges.append((max(values) - min(values), tenths[-1] - tenths[0] if len(values) > 2 else None))
    (tuned, tuned_80), (base, base_80) = ranges
    return Spread(len(some), tuned, base, tuned_80, base_80)


def sheet(rows: Iterable[Mapping[str, Any]], step: int) -> dict[str, dict[str, Cell]]:
    """Held-out rows of a look in examples.jsonl, by format and example; hits and tokens are those of the rows.

    `end_nll`, nats of what ends the answers, is taken out of the loss where every held-out row has it, those of other
    steps included; else every mark stays in, for the sheets of two looks are compared.
    """
    own = [row for row in rows if row["split"] == "held_out" and row.get("map") != "free"]
    measured = [row for row in own if row.get("nll") is not None and row.get("tokens") and row.get("bytes")]
    told = all(row.get("end_nll") is not None for row in measured)
    found: dict[str, dict[str, Cell]] = defaultdict(dict)
    for row in (one for one in measured if one["step"] == step):
        nats = float(row["nll"]) * int(row["tokens"]) - (float(row["end_nll"]) if told else 0.0)
        found[row["format"]][row["id"]] = Cell(nats, int(row["tokens"]), int(row.get("hits") or 0), int(row["bytes"]))
    return dict(found)
