"""What the rows of a run folder say about each look: plain facts, held-out values example by example. Judges nothing.

What was not measured is None or empty, never a zero. A look carries what an earlier one measured, with its epoch; no
look sees a later one. Losses are nats per token at the best single temperature (NLL(T*)).

Beside the contract's columns it reads, where they are there: in examples.jsonl `nll_tstar` (at the best temperature of
split and format), `long` (whether a run of 50 tokens is in excess) and `windows` (8-word windows in excess, of how
many); in findings.jsonl `leak` (none, single or confirmed) of the probe leak, and of the probe drift either
`wrong_script` (true or false) of an answer, or `axis`, `id`, `score`, `base` and `cut` of a text: lower scores are
better, `cut` is a share of the base's, null until calibrated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

import numpy as np

from finetune import regroup

Row = Mapping[str, Any]
Values = Mapping[str, float]  # example id to one measure; lower is better
Found = Literal["none", "single", "confirmed"]
_HEARD = ("echo_whole", "long", "windows")  # all None: too short to be asked, or not measured


@dataclass(frozen=True)
class Setting:
    """How to read a run. `first_format`: in which echo and held-out loss are judged. `running`: more looks will come.

    `elsewhere`: an adapter without a split, so every row counts as trained.
    """

    first_format: str
    held_out_formats: tuple[str, ...] = ()
    elsewhere: bool = False
    running: bool = False


@dataclass(frozen=True)
class Count:
    """So many, of so many."""

    yes: int
    of: int


@dataclass(frozen=True)
class Echo:
    """Trained answers, a census, beside held-out ones: `whole` and `long` of the examples that are long enough.

    `windows`: shares of 8-word windows (trained, held-out), None where one was not measured. `p`: how often a random
    regrouping of trained and held-out examples makes the trained ones' longest runs as much longer, in shares of the
    answers; None where there is nothing to compare. `epoch`: the oldest measurement in it.
    """

    whole: Count
    long: Count
    held_out_whole: Count
    windows: tuple[float, float] | None
    p: float | None
    epoch: float


@dataclass(frozen=True)
class Leak:
    """Unrelated prompts that brought out training text, and whether it was seen again."""

    found: Found
    prompts: Count


@dataclass(frozen=True)
class Change:
    """One measure at a look minus at the best one, example by example; positive is worse."""

    travel: float
    differences: tuple[float, ...]


@dataclass(frozen=True)
class Course:
    """One measure since its best look, the newest last. `best`: its mean there. `name`: which format, if one is meant.

    The best look is the middle one of the three neighbours with the lowest middle, or the base where that is lower
    still: only a series needs a median against luck. `looks`: how many measured it. `cut`: the least mean change that
    counts; None where the measure is not calibrated and only reported. `epoch`: of the newest.
    """

    looks: int
    best: float
    since: tuple[Change, ...]
    epoch: float
    cut: float | None = 0.0
    name: str = ""


@dataclass(frozen=True)
class Facts:
    """All that a verdict on one look rests on.

    `gain`, `gain_accuracy`: adapter against base for each held-out example, nats per token and share of tokens,
    positive is better. `courses`: `nll`, `accuracy` (as a share of misses), `format` (the worst held-out one) and
    `drift_...`. `alone`: the only look there will ever be. `elsewhere`: as in Setting. `script`: answers in a script
    that neither data, prompt nor base shows.
    """

    step: int
    epoch: float
    travel: float
    held_out: int = 0
    nll_tstar: float | None = None
    gain: tuple[float, ...] = ()
    gain_accuracy: tuple[float, ...] = ()
    courses: Mapping[str, Course] = field(default_factory=dict)
    echo: Echo | None = None
    leak: Leak | None = None
    script: Count | None = None
    alone: bool = False
    elsewhere: bool = False


def facts(
    metrics: Iterable[Row],
    examples: Iterable[Row],
    findings: Iterable[Row],
    setting: Setting,
    only: Collection[int] | None = None,
) -> list[Facts]:
    """Of every look after the first step, in order of steps; [] before there is one. `only`: looks at these steps."""
    places = {row["step"]: row for row in metrics if row["kind"] == "look" and row["step"] > 0}
    steps = sorted(places)
    shelf = _Shelf(list(examples), list(findings), {step: places[step] for step in steps}, setting)
    alone = len(steps) == 1 and not setting.running
    return [shelf.facts(step, alone) for step in steps if only is None or step in only]


@dataclass(frozen=True)
class _Place:
    """One measurement of a series."""

    epoch: float
    travel: float
    values: Values


@dataclass(frozen=True)
class _Shelf:
    """A run's rows, and questions asked of them."""

    examples: Sequence[Row]
    findings: Sequence[Row]
    places: Mapping[int, Row]
    setting: Setting

    @cached_property
    def looked(self) -> Mapping[tuple[int, str], list[Row]]:
        """Held-out rows of looks, by step and format."""
        found: dict[tuple[int, str], list[Row]] = defaultdict(list)
        for row in self.examples:
            if row["split"] == "held_out" and row.get("map") != "free":
                found[row["step"], row["format"]].append(row)
        return found

    @cached_property
    def echoed(self) -> list[Row]:
        """Rows in which echo was measured, in time; at one step the free map's before a look's, which knows better."""
        first = self.setting.first_format
        rows = [row for row in self.examples if row["step"] > 0 and any(row.get(key) is not None for key in _HEARD)]
        fits = [row for row in rows if row.get("map") == "free" or row["format"] == first]
        return sorted(fits, key=lambda row: (row["step"], row.get("map") != "free"))

    def facts(self, step: int, alone: bool) -> Facts:
        """Of one look; nothing later is seen."""
        place, first = self.places[step], self.setting.first_format
        nll, accuracy = self.held_out(step, first, _nll), self.held_out(step, first, _misses)
        return Facts(
            step=step,
            epoch=float(place["epoch"]),
            travel=float(place["travel"]),
            held_out=len({*nll, *accuracy}),
            nll_tstar=fmean(nll.values()) if nll else None,
            gain=_paired(self.held_out(0, first, _nll), nll),
            gain_accuracy=_paired(self.held_out(0, first, _misses), accuracy),
            courses=dict(self.courses(step)),
            echo=self.echo(step),
            leak=self.leak(step),
            script=self.script(step),
            alone=alone,
            elsewhere=self.setting.elsewhere,
        )

    def held_out(self, step: int, format_: str, measure: Any) -> Values:
        """One measure of every held-out example at a step; {} where it misses for one: a mean needs them all."""
        if self.setting.elsewhere:
            return {}
        found = {row["id"]: measure(row) for row in self.looked.get((step, format_), ())}
        return {} if None in found.values() else found

    # what got worse

    def courses(self, step: int) -> Iterator[tuple[str, Course]]:
        """Every measure that was taken at or before a step."""
        first = self.setting.first_format
        for name, measure in (("nll", _nll), ("accuracy", _misses)):
            if found := self.course(step, first, measure):
                yield name, found
        formats = [(one, self.course(step, one, _nll)) for one in self.setting.held_out_formats]
        known = [_named(found, one) for one, found in formats if found]
        if known:
            yield "format", max(known, key=_newest)
        yield from self.drift(step)

    def course(self, step: int, format_: str, measure: Any) -> Course | None:
        """Held-out examples in one format."""
        taken = [(self.places[one], self.held_out(one, format_, measure)) for one in self.places if one <= step]
        series = [_Place(row["epoch"], row["travel"], values) for row, values in taken if values]
        return course(series, self.held_out(0, format_, measure))

    def drift(self, step: int) -> Iterator[tuple[str, Course]]:
        """Fixed neutral texts."""
        rows = [row for row in self.findings if row["probe"] == "drift" and row.get("axis") and row["step"] <= step]
        for axis in sorted({row["axis"] for row in rows}):
            own = [row for row in rows if row["axis"] == axis]
            base = {row["id"]: float(row["base"]) for row in own}
            series = [
                _Place(place["epoch"], place["travel"], {row["id"]: float(row["score"]) for row in some})
                for one, place in self.places.items()
                if (some := [row for row in own if row["step"] == one])
            ]
            cut = own[-1].get("cut")
            cut = None if cut is None else cut * abs(fmean(base.values()))
            if found := course(series, base, cut):
                yield f"drift_{axis}", found

    # what is known by heart

    def echo(self, step: int) -> Echo | None:
        """The newest row of every trained example, from any map; None before the first."""
        train = self.newest(step, "train")
        held_out = [] if self.setting.elsewhere else self.newest(step, "held_out")
        if not train:
            return None
        whole = _count(train, "echo_whole")
        p = _longer(train, held_out) if whole.yes else None
        shares = (_windows(train), _windows(held_out))
        return Echo(
            whole=whole,
            long=_count(train, "long"),
            held_out_whole=_count(held_out, "echo_whole"),
            windows=None if shares[0] is None or shares[1] is None else (shares[0], shares[1]),
            p=p,
            epoch=min(float(row["epoch"]) for row in train),
        )

    def newest(self, step: int, split: str) -> list[Row]:
        """One row an example: the latest. A free map's is in the format its epoch happened to wear."""
        wanted = {split, "held_out"} if self.setting.elsewhere else {split}
        return list({row["id"]: row for row in self.echoed if row["split"] in wanted and row["step"] <= step}.values())

    # what was said

    def leak(self, step: int) -> Leak | None:
        """Of this very checkpoint, or None: another one's leaks are its own."""
        rows = [row for row in self.findings if row["probe"] == "leak" and row["step"] == step and row.get("leak")]
        if not rows:
            return None
        said = [row["leak"] for row in rows]
        worst: Found = "confirmed" if "confirmed" in said else "single" if "single" in said else "none"
        return Leak(worst, Count(len(said) - said.count("none"), len(said)))

    def script(self, step: int) -> Count | None:
        """Answers of the newest step that has any, each once: a closing measurement asks again what a look asked."""
        rows = [row for row in self.findings if row.get("wrong_script") is not None and row["step"] <= step]
        newest = [row for row in rows if row["step"] == max(one["step"] for one in rows)]
        said = {(row["id"], row["prompt"]): bool(row["wrong_script"]) for row in newest}
        return Count(sum(said.values()), len(said)) if said else None


def course(series: Sequence[_Place], base: Values, cut: float | None = 0.0) -> Course | None:
    """A measure's way from its best look, or from the base; None where there is nothing to compare with."""
    best = _best(series)
    reference = base if best is None else series[best].values
    after = series if best is None else series[best + 1 :]
    if best is not None and base and fmean(base.values()) < fmean(reference.values()):
        reference, after = base, series
    if not series or not reference:
        return None
    changes = tuple(Change(one.travel, _paired(one.values, reference)) for one in after or series[-1:])
    return Course(len(series), fmean(reference.values()), changes, series[-1].epoch, cut)


def _best(series: Sequence[_Place]) -> int | None:
    """Index of the middle of the three neighbours with the lowest middle; None before three."""
    means = [fmean(one.values.values()) for one in series]
    middles = [sorted(range(i, i + 3), key=means.__getitem__)[1] for i in range(len(means) - 2)]
    return min(middles, key=means.__getitem__, default=None)


def _paired(ones: Values, others: Values) -> tuple[float, ...]:
    return tuple(ones[name] - others[name] for name in ones if name in others)


def _named(found: Course, name: str) -> Course:
    return Course(found.looks, found.best, found.since, found.epoch, found.cut, name)


def _newest(found: Course) -> float:
    newest = found.since[-1].differences
    return fmean(newest) if newest else -math.inf


# measures of a row; None where it has none


def _nll(row: Row) -> float | None:
    return _number(row.get("nll_tstar"))


def _misses(row: Row) -> float | None:
    hits, tokens = _number(row.get("hits")), _number(row.get("tokens"))
    return None if hits is None or not tokens else 1 - hits / tokens


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _count(rows: Sequence[Row], key: str) -> Count:
    """Of the examples long enough to be asked."""
    asked = [bool(row[key]) for row in rows if row.get(key) is not None]
    return Count(sum(asked), len(asked))


def _windows(rows: Sequence[Row]) -> float | None:
    pairs = [row["windows"] for row in rows if row.get("windows") is not None]
    total = sum(of for _, of in pairs)
    return sum(yes for yes, _ in pairs) / total if total else None


def _longer(train: Sequence[Row], held_out: Sequence[Row]) -> float | None:
    """Longest runs as shares of the counted tokens. Whole echoes alone would say little: two of 40 against none of 10
    come by chance 64 times in a hundred."""
    sides: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, side in enumerate((train, held_out)):
        for row in side:
            counted = round(row["tokens"] * (1 - (row.get("masked_share") or 0.0)))
            sides[number].append((min(row.get("run_max") or 0, counted), counted))
    ones, others = (np.array(sides[number], dtype=np.int64).reshape(-1, 2) for number in (0, 1))
    found = regroup.above(ones, others)
    return None if found is None else found.p
