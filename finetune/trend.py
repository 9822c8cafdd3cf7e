"""What a run's rows say of how it learned: over epochs, travel and train loss, each as one sentence and its numbers.

It joins rows to the arithmetic of `curve`, and adds what needs examples side by side. It reads no file and judges
nothing; a sentence that the rows do not bear is «not resolvable», with why. Losses are nats per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from finetune import chance, curve
from finetune.chance import Interval
from finetune.curve import Visit

Row = Mapping[str, Any]
Places = Mapping[str, int]  # example to its place in an epoch's steps, from 1
_LOST = "not resolvable"
_FEWEST = 3  # examples below which nothing is said


@dataclass(frozen=True)
class Trend:
    """One sentence. `about`: the numbers it rests on."""

    name: str
    words: str
    about: Mapping[str, Any]

    @property
    def resolved(self) -> bool:
        """Whether the rows bear it."""
        return _LOST not in self.words

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"name": self.name, "resolved": self.resolved, "words": self.words, **self.about}


@dataclass(frozen=True)
class Course:
    """A run as its rows tell it. `places`: of an epoch counted from 0; None for an example that comes more than once.

    `orders`: for each run that differs in its seed alone, this one included, (first-epoch place, final excess bits) of
    every trained example.
    """

    metrics: Sequence[Row]
    examples: Sequence[Row]
    per_epoch: int
    format: str
    places: Callable[[int], Places | None]
    orders: Sequence[Sequence[tuple[int, float]]] = ()


def told(course: Course) -> list[Trend]:
    """Every trend, in the order in which they are read."""
    tellers = (_staircase, _recency, _elbow, _confidence, _twins, _primacy)
    return [teller(course) for teller in tellers]


# training


def _staircase(course: Course) -> Trend:
    losses = [float(row["loss"]) for row in _steps(course)]
    found = curve.staircase(losses, course.per_epoch)
    about = {key: _bounds(getattr(found, key)) for key in ("jump", "descent", "step")}
    return Trend("staircase", found.words, {**about, "rho": found.rho, "boundaries": len(found.boundaries)})


def _recency(course: Course) -> Trend:
    found = curve.recency(visits(course))
    return Trend("recency", found.words, {"slope": _bounds(found.slope), "visits": found.visits})


def visits(course: Course) -> list[Visit]:
    """Every example's loss each time it came up: from the free map, else from the steps if a batch is one example."""
    free = [row for row in course.examples if row.get("map") == "free" and row["split"] == "train"]
    free = [row for row in free if row["step"] > 0 and row.get("nll") is not None]
    if free:
        return list(_free_visits(course, free))
    found, steps = [], _steps(course)
    for row in steps:
        epoch, place = divmod(int(row["step"]) - 1, course.per_epoch)
        there = course.places(epoch) or {}
        if len(there) != course.per_epoch:  # several to a batch: its loss is nobody's
            return []
        by_place = {at: name for name, at in there.items()}
        found.append(Visit(by_place[place + 1], int(row["step"]), float(row["loss"])))
    return found


def _free_visits(course: Course, free: Sequence[Row]) -> Iterator[Visit]:
    """At their own steps; where an epoch's rows all bear its last one, where the epoch's order put them."""
    epochs: dict[int, list[Row]] = defaultdict(list)
    for row in free:
        epochs[(int(row["step"]) - 1) // course.per_epoch].append(row)
    for epoch, rows in epochs.items():
        own = len({row["step"] for row in rows}) > 1
        there = {} if own else course.places(epoch) or {}
        for row in rows:
            if own:
                yield Visit(row["id"], int(row["step"]), float(row["nll"]))
            elif row["id"] in there:
                yield Visit(row["id"], epoch * course.per_epoch + there[row["id"]], float(row["nll"]))


def _steps(course: Course) -> list[Row]:
    return sorted((row for row in course.metrics if row["kind"] == "step"), key=lambda row: int(row["step"]))


# held out


def _elbow(course: Course) -> Trend:
    looks = _looks(course, "held_out", "nll")
    names = sorted(set.intersection(*(set(one) for one in looks.values()))) if looks else []
    if len(looks) < 3 or len(names) < _FEWEST:
        why = f"it takes 3 looks at {_FEWEST} held-out examples, and there are {len(looks)} at {len(names)}."
        return Trend("elbow", f"Elbow: {_LOST}, {why}", {"at": None})
    epochs = {int(row["step"]): float(row["epoch"]) for row in course.examples if row["split"] == "held_out"}
    found = curve.elbow([epochs[step] for step in looks], [[looks[step][name] for step in looks] for name in names])
    about = {"at": found.at, "low": found.low, "high": found.high, "axis": "epoch"}
    if _LOST in found.words:
        return Trend("elbow", found.words, about)
    step = min(looks, key=lambda one: abs(epochs[one] - (found.at or 0.0)))
    travel, loss = place(course, step)
    about |= {"travel": travel, "train_loss": loss}
    along = f"travel {travel:.1e}" + (f", train loss {loss:.3f}" if loss is not None else "")
    words = f"Held-out loss turns flat at epoch {found.at:g} (between {found.low:g} and {found.high:g}; {along})."
    return Trend("elbow", words, about)


def place(course: Course, step: int) -> tuple[float, float | None]:
    """Travel at a look, and the mean train loss of the epoch before it; None at the base."""
    travel = next(float(row["travel"]) for row in course.examples if row["step"] == step)
    losses = [float(row["loss"]) for row in _steps(course) if step - course.per_epoch < row["step"] <= step]
    return travel, fmean(losses) if losses else None


def _confidence(course: Course) -> Trend:
    """The last look against the best one: the middle of the three neighbours with the lowest middle."""
    plain, best = (_looks(course, "held_out", key) for key in ("nll", "nll_tstar"))
    steps = [step for step in plain if step in best and step > 0]
    if len(steps) < 4:
        why = f"it takes 4 looks at the loss of held-out examples, and there are {len(steps)}."
        return Trend("over-confidence", f"Over-confidence: {_LOST}, {why}", {})
    means = [fmean(plain[step].values()) for step in steps]
    low = min(range(1, len(means) - 1), key=lambda i: median(means[i - 1 : i + 2]))
    at = sorted(range(low - 1, low + 2), key=means.__getitem__)[1]
    changes = [_paired(kind[steps[-1]], kind[steps[at]]) for kind in (plain, best)]
    found = curve.confidence(*(list(one.values()) for one in changes))
    about = {"nll": _bounds(found.nll), "nll_tstar": _bounds(found.nll_tstar), "kind": found.kind}
    return Trend("over-confidence", found.words, {**about, "since_step": steps[at], "step": steps[-1]})


# the same question in other words


def _twins(course: Course) -> Trend:
    """Loss of an answer after its twin's question minus after its own, now beside the base's."""
    twins, own = (_looks(course, split, "nll", closing=True) for split in ("twin", "train"))
    steps = [step for step in twins if step in own and step > 0]
    if not steps:
        return Trend("twins", f"Twins: {_LOST}, no look has read any after training began.", {})
    now = _paired(twins[steps[-1]], own[steps[-1]])
    before = _paired(twins.get(0, {}), own.get(0, {}))
    gap, change = chance.mean(list(now.values())), chance.mean(list(_paired(now, before).values()))
    about = {"gap": _bounds(gap), "change": _bounds(change), "step": steps[-1]}
    return Trend("twins", _twin_words(gap, change, len(now)), about)


def _twin_words(gap: Interval | None, change: Interval | None, count: int) -> str:
    if gap is None or change is None or count < _FEWEST:
        why = "the base was not asked" if count >= _FEWEST else f"{count} twins cannot be told from luck"
        return f"Twins: {_LOST}, {why}."
    bounds = f"{change.value:+.3f} nats per token since the base (between {change.low:+.3f} and {change.high:+.3f})"
    asked = f"Asked in other words, {count} trained answers cost {gap.value:+.3f} more than asked in their own"
    if change.low > 0:
        return f"{asked}, {bounds}: part of what was learnt hangs on the wording."
    if change.high < 0:
        return f"{asked}, {bounds}: the wording matters less than it did."
    return f"Twins: {_LOST}, the price of other words changed by {bounds}."


# first and last


def _primacy(course: Course) -> Trend:
    found = curve.primacy(course.orders)
    return Trend("primacy", found.words, {"rho": found.rho, "p": found.p, "shuffles": found.shuffles})


# several answers in one example


def later_turns(gains: Iterable[Sequence[float]]) -> Trend:
    """Of every held-out example with several answers, the gain over the base of each answer, nats per token."""
    both = [(one[0], fmean(one[1:])) for one in gains if len(one) > 1]
    later, gap = chance.mean([b for _, b in both]), chance.mean([b - a for a, b in both])
    about = {"gain": _bounds(later), "against_first": _bounds(gap), "examples": len(both)}
    if later is None or gap is None or len(both) < _FEWEST:
        why = f"it takes {_FEWEST} held-out examples with several answers, and there are {len(both)}."
        return Trend("later turns", f"Later turns: {_LOST}, {why}", about)
    said = f"Later answers of {len(both)} held-out talks gained {later.value:+.3f} nats per token"
    bounds = f"{gap.value:+.3f} against the first ones (between {gap.low:+.3f} and {gap.high:+.3f})"
    if gap.high < 0:
        return Trend("later turns", f"{said}, {bounds}: what is learnt holds less well once a talk goes on.", about)
    if gap.low > 0:
        return Trend("later turns", f"{said}, {bounds}: they gained more.", about)
    return Trend("later turns", f"Later turns: {_LOST}; {said[0].lower()}{said[1:]}, {bounds}.", about)


# look by look


def table(course: Course) -> list[dict[str, Any]]:
    """A row for each look of the run: epoch, travel, train loss, and what was measured there; None where it was not."""
    looked = {int(row["step"]): row for row in course.metrics if row["kind"] == "look" and row["look"] != "closing"}
    found = []
    for step, at in sorted(looked.items()):
        about: dict[str, Any] = {"step": step, "epoch": at["epoch"], "travel": at["travel"]}
        losses = [row["loss"] for row in _steps(course) if step - course.per_epoch < row["step"] <= step]
        about["train_loss"] = fmean(losses) if losses else None
        for split in ("held_out", "twin"):
            row = _measured(course, split, step)
            about |= {f"{split}_{key}": row.get(key) for key in ("nll", "nll_tstar", "accuracy")}
        found.append(about | _echoes(course, step))
    return found


def _measured(course: Course, split: str, step: int) -> Row:
    rows = [row for row in course.metrics if row["kind"] == "look" and row["step"] == step]
    return next((row for row in rows if (row["split"], row["format"]) == (split, course.format)), {})


def _echoes(course: Course, step: int) -> dict[str, int | None]:
    """Trained examples that echo at a look, of those it read; None where it read none."""
    rows = [row for row in course.examples if row["step"] == step and row["split"] == "train"]
    rows = [row for row in rows if row.get("map") != "free" and row["format"] == course.format]
    rows = [*{row["id"]: row for row in rows}.values()]  # a closing look reads what a look has read
    told = {"words": lambda row: (row.get("windows") or [0])[0] > 0, "long": _long, "whole": _whole}
    return {f"echo_{name}": sum(map(test, rows)) if rows else None for name, test in told.items()}


def _long(row: Row) -> bool:
    return bool(row.get("long"))


def _whole(row: Row) -> bool:
    return bool(row.get("echo_whole"))


# rows


def _looks(course: Course, split: str, key: str, closing: bool = False) -> dict[int, dict[str, float]]:
    """One measure of every example of a split, by look, in the first format; looks that left some out are none."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for row in course.examples:
        fits = row["split"] == split and row["format"] == course.format and row.get("map") != "free"
        if fits and row.get(key) is not None and (closing or row["step"] == 0 or row.get("look") != "closing"):
            found[int(row["step"])][row["id"]] = float(row[key])
    most = max(map(len, found.values()), default=0)
    return {step: found[step] for step in sorted(found) if len(found[step]) == most}


def _paired(ones: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    return {name: ones[name] - others[name] for name in ones if name in others}


def _bounds(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
