"""Reads loss curves: staircase, recency, elbow, primacy, over-confidence, runs at equal train loss; each also in words.

Pure arithmetic over numbers that others measured: no file, no model. It says «not resolvable» where the numbers cannot
tell, and nothing in here is a reason to stop a run. Losses are nats per token.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, quantiles
from typing import Any, Literal

from finetune import chance
from finetune.chance import Interval

_FEWEST = 3  # boundaries, looks or examples below which nothing is said
_MOSTLY = 0.8  # rho from which only repeats help
_DRAWS = 499
_SHALLOW = 0.1  # a curve closer to a straight line has no elbow
_LOST = "not resolvable"


# staircase


@dataclass(frozen=True)
class Boundary:
    """Between epochs `epoch` and `epoch` + 1, counted from 1. `jump` J and `descent` S in nats, `rho` their ratio."""

    epoch: int
    jump: float
    descent: float
    rho: float | None


@dataclass(frozen=True)
class Staircase:
    """Every boundary, and their means. `step`: what a jump has beyond an even slope, which alone makes rho above 0."""

    boundaries: tuple[Boundary, ...]
    jump: Interval | None
    descent: Interval | None
    step: Interval | None
    rho: float | None

    @property
    def words(self) -> str:
        """What it means for the next run."""
        jump, descent, step, rho = self.jump, self.descent, self.step, self.rho
        if jump is None or descent is None or step is None or jump.n < _FEWEST:
            return f"Staircase: {_LOST}, {len(self.boundaries)} epoch boundaries were seen and {_FEWEST} are needed."
        if step.low > 0 and rho is not None and rho >= _MOSTLY:
            flat = f"flat within epochs ({descent.value:+.3f})"
            words = f"Loss drops {jump.value:.3f} at each epoch boundary and is {flat}: only repeats help"
            return f"{words}; examples are being remembered one by one."
        if step.low > 0 and rho is not None:
            inside = f"{descent.value:.3f} within each epoch"
            return f"Loss drops {jump.value:.3f} at each epoch boundary and {inside}: {rho:.0%} of it needs a repeat."
        if descent.low > 0:
            return f"Loss falls {descent.value:.3f} within each epoch and no faster at its end: no staircase."
        return f"Staircase: {_LOST}, the drop at a boundary lies between {jump.low:+.3f} and {jump.high:+.3f}."


def staircase(losses: Sequence[float], per_epoch: int, window: int | None = None) -> Staircase:
    """Step losses, in order, whole epochs only. J = last `window` of an epoch - first of the next; S = first - last.

    rho = J / (J + max(S, 0)), None where J is not above 0; of a straight line it is window / per_epoch. An epoch
    shorter than two windows has no inside: then there is no boundary to read, and `recency` is the question to ask.
    Under `shuffle: never` J also holds the difference between the rows that come last and those that come first.
    """
    width = window or max(2, per_epoch // 5)
    if per_epoch < 2 * width:
        return Staircase((), None, None, None, None)
    epochs = [losses[i : i + per_epoch] for i in range(0, len(losses) - per_epoch + 1, per_epoch)]
    found = []
    for number, (one, following) in enumerate(pairwise(epochs), 1):
        first, last, after = fmean(one[:width]), fmean(one[-width:]), fmean(following[:width])
        found.append(Boundary(number, last - after, first - last, _rho(last - after, first - last)))
    jump, descent = chance.mean([one.jump for one in found]), chance.mean([one.descent for one in found])
    even = width / (per_epoch - width)  # an even slope falls by this share of S from window to window
    step = chance.mean([one.jump - max(one.descent, 0.0) * even for one in found])
    rho = _rho(jump.value, descent.value) if jump and descent else None
    return Staircase(tuple(found), jump, descent, step, rho)


def _rho(jump: float, descent: float) -> float | None:
    return jump / (jump + max(descent, 0.0)) if jump > 0 else None


# recency


@dataclass(frozen=True)
class Visit:
    """One example's loss when it came up in training, before that step's update."""

    example: str
    step: int
    loss: float


@dataclass(frozen=True)
class Recency:
    """Rise of an example's loss for each step since it was last seen, nats; bounds over examples."""

    slope: Interval | None
    visits: int

    @property
    def words(self) -> str:
        """What it means for the next run."""
        slope = self.slope
        if slope is None or slope.n < _FEWEST:
            return f"Recency: {_LOST}, {self.visits} returns to an example are too few."
        rise = f"{100 * abs(slope.value):.4f} nats for every 100 steps since it was last seen"
        if slope.low > 0:
            return (
                f"An example's loss rises by {rise}: what is learnt of it fades, so it is the example, not the skill."
            )
        if slope.high < 0:
            return f"An example's loss falls by {rise}: the others teach it too."
        bounds = f"between {100 * slope.low:+.4f} and {100 * slope.high:+.4f} nats for every 100 steps"
        return f"Recency: {_LOST}, the change since an example was last seen is {bounds}."


def recency(visits: Iterable[Visit]) -> Recency:
    """Loss against steps since last seen, both from their mean over examples at the same count of visits.

    One slope over all, its error by example: an example's returns are not independent of each other.
    """
    seen: dict[str, list[Visit]] = defaultdict(list)
    for visit in sorted(visits, key=lambda one: one.step):
        seen[visit.example].append(visit)
    rounds: dict[int, list[tuple[str, float, float]]] = defaultdict(list)
    for example, own in seen.items():
        for number, (before, now) in enumerate(pairwise(own)):
            rounds[number].append((example, float(now.step - before.step), now.loss))
    products: dict[str, list[float]] = {example: [0.0, 0.0] for example in seen}
    for one in rounds.values():
        gap, loss = fmean(row[1] for row in one), fmean(row[2] for row in one)
        for example, own_gap, own_loss in one:
            products[example][0] += (own_gap - gap) * (own_loss - loss)
            products[example][1] += (own_gap - gap) ** 2
    return Recency(_ratio(list(products.values())), sum(map(len, rounds.values())))


def _ratio(pairs: Sequence[Sequence[float]]) -> Interval | None:
    """sum(a) / sum(b) over pairs, with bounds from each pair's pull on it."""
    below = sum(pair[1] for pair in pairs)
    if below <= 0:
        return None
    whole = sum(pair[0] for pair in pairs) / below
    return chance.mean([whole + (a - whole * b) * len(pairs) / below for a, b in pairs])


# elbow


@dataclass(frozen=True)
class Elbow:
    """Where a falling curve turns flat, on its own axis; bounds (5 % and 95 %) over resampled examples."""

    at: float | None
    low: float | None
    high: float | None
    span: float

    @property
    def words(self) -> str:
        """Where it is, or why that cannot be said."""
        if self.at is None:
            return f"Elbow: {_LOST}, the curve does not turn."
        if self.low is None or self.high is None:
            return f"Elbow: {_LOST}, near {self.at:g} but not in every resampling of the examples."
        if self.high - self.low > self.span / 2:
            return f"Elbow: {_LOST}, anywhere between {self.low:g} and {self.high:g}."
        return f"The curve turns flat at {self.at:g} (between {self.low:g} and {self.high:g})."


def elbow(xs: Sequence[float], curves: Sequence[Sequence[float]]) -> Elbow:
    """Of the mean of `curves` (examples x looks) over rising `xs`, by Kneedle's distance [Satopää et al. 2011].

    Plain: the package `kneed` would bring scipy for an argmax. Bounds only for two or more examples, and only where at
    least 95 % of the resampled means have an elbow.
    """
    span = xs[-1] - xs[0] if xs else 0.0
    at = _knee(xs, _average(curves)) if curves else None
    if at is None or len(curves) < 2:
        return Elbow(at, None, None, span)
    lot = random.Random(0)
    drawn = [_knee(xs, _average(lot.choices(curves, k=len(curves)))) for _ in range(_DRAWS)]
    knees = [knee for knee in drawn if knee is not None]
    if len(knees) < chance.LEVEL * _DRAWS:
        return Elbow(at, None, None, span)
    cuts = quantiles(knees, n=20)
    return Elbow(at, cuts[0], cuts[-1], span)


def _average(curves: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(curves) for column in zip(*curves, strict=True)]


def _knee(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The x furthest below the line from the first to the last point, both axes as shares of their range."""
    if len(xs) < _FEWEST or max(ys) == min(ys) or ys[0] <= ys[-1] or xs[-1] <= xs[0]:
        return None
    across = [(x - xs[0]) / (xs[-1] - xs[0]) for x in xs]
    fallen = [(ys[0] - y) / (ys[0] - min(ys)) for y in ys]
    below = [y - x for x, y in zip(across, fallen, strict=True)]
    best = max(range(len(xs)), key=below.__getitem__)
    return xs[best] if below[best] > _SHALLOW else None


# primacy


@dataclass(frozen=True)
class Primacy:
    """Mean rank correlation of first-epoch position with final excess bits; negative: early rows are known better."""

    rho: float | None
    p: float | None
    shuffles: int

    @property
    def words(self) -> str:
        """Whether it matters what comes first."""
        if self.rho is None or self.p is None:
            return (
                f"Primacy: {_LOST}, {self.shuffles} order was trained and two are needed: one cannot be told from luck."
            )
        if self.p > 1 - chance.LEVEL:
            return f"Primacy: {_LOST}, rank correlation {self.rho:+.2f} over {self.shuffles} orders (p {self.p:.2f})."
        which = "first" if self.rho < 0 else "last"
        return f"What the first epoch shows {which} is known best: rank correlation {self.rho:+.2f}, p {self.p:.3f}."


def primacy(runs: Sequence[Sequence[tuple[int, float]]]) -> Primacy:
    """(first-epoch position, final excess bits) of every example, for runs that differ in their shuffle.

    With one order an example's place cannot be told from the example. p is two-sided, positions permuted in each run.
    """
    ranked = [(chance.ranks([at for at, _ in one]), chance.ranks([bits for _, bits in one])) for one in runs]
    rho = _mean_correlation(ranked)
    if rho is None or len(runs) < 2:
        return Primacy(None, None, len(runs))
    lot, further = random.Random(0), 0
    for _ in range(_DRAWS):
        drawn = _mean_correlation([(lot.sample(places, len(places)), bits) for places, bits in ranked])
        further += drawn is not None and abs(drawn) >= abs(rho) - 1e-12
    return Primacy(rho, (1 + further) / (1 + _DRAWS), len(runs))


def _mean_correlation(ranked: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    found = [chance.correlation(places, bits) for places, bits in ranked]
    known = [one for one in found if one is not None]
    return fmean(known) if known and len(known) == len(found) else None


# over-confidence


@dataclass(frozen=True)
class Confidence:
    """Change since an earlier look over the same examples: of the loss, and of the loss at its best temperature."""

    nll: Interval | None
    nll_tstar: Interval | None
    kind: Literal["over-confident", "lost skill", "steady", "not resolvable"]

    @property
    def words(self) -> str:
        """Too sure of itself, or worse."""
        if self.nll is None or self.nll_tstar is None:
            return f"Over-confidence: {_LOST}, it takes the loss of two or more examples at two looks."
        rise = f"Loss rose {self.nll.value:.3f} nats per token"
        at_best = f"at the best temperature {self.nll_tstar.value:+.3f}, at most {self.nll_tstar.high:+.3f}"
        if self.kind == "over-confident":
            return f"{rise} ({at_best}): too sure of itself, no skill is lost. A higher temperature mends it."
        if self.kind == "lost skill":
            return f"{rise}, and {self.nll_tstar.value:.3f} at the best temperature: skill is lost."
        if self.kind == "steady":
            return f"Loss did not rise ({self.nll.value:+.3f}, at most {self.nll.high:+.3f})."
        return f"Over-confidence: {_LOST}, loss {self.nll.value:+.3f}, {at_best}."


def confidence(nll: Sequence[float], nll_tstar: Sequence[float]) -> Confidence:
    """Differences now - then, example by example. Flat at T* means: surely less than half of the rise."""
    plain, at_best = chance.mean(nll), chance.mean(nll_tstar)
    if plain is None or at_best is None:
        return Confidence(plain, at_best, "not resolvable")
    if at_best.low > 0 and plain.low > 0:
        return Confidence(plain, at_best, "lost skill")
    if plain.low > 0:
        return Confidence(plain, at_best, "over-confident" if at_best.high < plain.value / 2 else "not resolvable")
    return Confidence(plain, at_best, "steady" if plain.value <= 0 else "not resolvable")


# axes


Along = Literal["epoch", "travel", "train_loss"]


@dataclass(frozen=True)
class Point:
    """One look: a place on the axis, and what was measured there."""

    x: float
    y: float


def points(rows: Sequence[Mapping[str, Any]], along: Along, measure: str, where: tuple[str, str]) -> list[Point]:
    """A measure of metrics.jsonl in order of steps; `where`: split and format.

    Train loss is the mean over the epoch before a look; the base has none, and is left out.
    """
    wanted = [row for row in rows if row["kind"] == "look" and (row["split"], row["format"]) == where]
    steps = [row for row in rows if row["kind"] == "step"]
    found = []
    for row in sorted(wanted, key=lambda row: row["step"]):
        x = _train_loss(steps, row) if along == "train_loss" else row[along]
        if x is not None and row.get(measure) is not None:
            found.append(Point(float(x), float(row[measure])))
    return found


def _train_loss(steps: Sequence[Mapping[str, Any]], look: Mapping[str, Any]) -> float | None:
    begin = look["epoch"] - 1 + 1e-9
    losses = [one["loss"] for one in steps if one["step"] <= look["step"] and one["epoch"] > begin]
    return fmean(losses) if losses else None


@dataclass(frozen=True)
class Compared:
    """Two runs where their train losses are equal: (train loss, first run, second run)."""

    levels: tuple[tuple[float, float, float], ...]

    @property
    def words(self) -> str:
        """Which one is lower, and whether everywhere."""
        if not self.levels:
            return f"At equal train loss: {_LOST}, the two runs share no range of train loss."
        gaps = [second - first for _, first, second in self.levels]
        span = f"train loss {self.levels[0][0]:.3f} to {self.levels[-1][0]:.3f}"
        if min(gaps) > 0 or max(gaps) < 0:
            which = "first" if gaps[0] > 0 else "second"
            return f"At equal train loss the {which} run is {abs(fmean(gaps)):.3f} lower throughout ({span})."
        return f"At equal train loss: {_LOST}, the two runs cross ({span})."


def at_equal_loss(first: Sequence[Point], second: Sequence[Point], levels: int = 5) -> Compared:
    """Points along train loss, in order of steps. Each run is read where it first comes down to a level."""
    if len(first) < 2 or len(second) < 2:
        return Compared(())
    high = min(first[0].x, second[0].x)
    low = max(min(one.x for one in first), min(one.x for one in second))
    if low >= high or levels < 2:
        return Compared(())
    wanted = [high + (low - high) * i / (levels - 1) for i in range(levels)]
    read = [(level, _first_at(first, level), _first_at(second, level)) for level in wanted]
    return Compared(tuple((level, a, b) for level, a, b in read if a is not None and b is not None))


def _first_at(course: Sequence[Point], level: float) -> float | None:
    for before, after in pairwise(course):
        if before.x >= level >= after.x and before.x > after.x:
            return before.y + (after.y - before.y) * (before.x - level) / (before.x - after.x)
    return None


# suites


def map_at_3(ranked: Sequence[Sequence[str]], right: Sequence[str]) -> float | None:
    """Mean of 1 / rank of the right option among the first three, 0 below; None, not zero, without questions."""
    if not right:
        return None
    places = [list(dict.fromkeys(options))[:3] for options in ranked]
    return fmean(
        1 / (1 + top.index(answer)) if answer in top else 0.0 for top, answer in zip(places, right, strict=True)
    )
