"""Facts of a look against the thresholds: every axis with its bounds, and what each one is a sign of. No verdict yet.

An axis that was not measured is unresolved, never healthy; one that is resolved may still straddle zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from finetune import chance
from finetune.chance import Interval
from finetune.evidence import Change, Count, Course, Echo, Facts, Found
from finetune.rules import Rules


@dataclass(frozen=True)
class Axis:
    """One axis of a verdict. Bounds only where it is sampled: the training set is a census.

    `resolved`: measured, and enough of it to be judged. `approximate`: too skewed for its bounds to hold 95 %. `epoch`:
    of the measurement, where that is not the look's own.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    resolved: bool = False
    approximate: bool = False
    epoch: float | None = None


@dataclass(frozen=True)
class Signs:
    """What the axes say. `learned` is None where it was not measured; `harms` names the axes that got worse."""

    axes: Mapping[str, Axis]
    learned: bool | None
    heavy: bool
    some: bool
    harms: tuple[str, ...]
    leak: Found | None
    enough: bool


def signs(facts: Facts, rules: Rules) -> Signs:
    """Total: any facts give every axis, and every sign."""
    axes = {**_learned(facts), **_recites(facts.echo), **_leak(facts), **_harm(facts, rules)}
    return Signs(
        axes=axes,
        learned=_has_learned(axes),
        heavy=facts.echo is not None and not facts.elsewhere and _heavy(facts.echo, rules),
        some=facts.echo is not None and _some(facts.echo, rules),
        harms=tuple(_harms(facts, rules)),
        leak=facts.leak.found if facts.leak else None,
        enough=min(facts.held_out, facts.echo.whole.of if facts.echo else 0) >= rules.enough,
    )


# learned


def _learned(facts: Facts) -> dict[str, Axis]:
    gains = {"learned": facts.gain, "learned_accuracy": facts.gain_accuracy}
    return {name: _sampled(chance.mean([] if facts.elsewhere else one)) for name, one in gains.items()}


def _has_learned(axes: Mapping[str, Axis]) -> bool | None:
    both = [axes["learned"], axes["learned_accuracy"]]
    known = [one.low > 0 for one in both if one.resolved and one.low is not None]
    return any(known) if known else None


# recites


def _recites(echo: Echo | None) -> dict[str, Axis]:
    names = ("recites", "recites_50", "recites_8", "recites_held_out")
    if echo is None:
        return {name: Axis() for name in names}
    above = None if echo.windows is None else echo.windows[0] - echo.windows[1]
    windows = Axis(above, n=echo.whole.of, resolved=above is not None, epoch=echo.epoch)
    held_out = _sampled(chance.rate(echo.held_out_whole.yes, echo.held_out_whole.of))
    found = (_counted(echo.whole, echo.epoch), _counted(echo.long, echo.epoch), windows, held_out)
    return dict(zip(names, found, strict=True))


def _heavy(echo: Echo, rules: Rules) -> bool:
    many = echo.whole.yes >= max(rules.heavy_examples, rules.heavy_share * echo.whole.of)
    return many and echo.p is not None and echo.p <= rules.chance


def _some(echo: Echo, rules: Rules) -> bool:
    above = echo.windows is not None and echo.windows[0] - echo.windows[1] >= rules.windows - 1e-12
    return echo.whole.yes > 0 or echo.long.yes > 0 or above


# leaks


def _leak(facts: Facts) -> dict[str, Axis]:
    said = {"leak": facts.leak.prompts if facts.leak else None, "script": facts.script}
    return {name: _sampled(chance.rate(one.yes, one.of) if one else None) for name, one in said.items()}


# harmed


def _harm(facts: Facts, rules: Rules) -> dict[str, Axis]:
    axes = {"harmed": Axis(), "harmed_accuracy": Axis(), "harmed_format": Axis()}
    if facts.elsewhere:
        return axes
    return axes | {_named(name): _axis(course, facts, rules) for name, course in facts.courses.items()}


def _named(course: str) -> str:
    return {"nll": "harmed"}.get(course, course if course.startswith("drift_") else f"harmed_{course}")


def _axis(course: Course, facts: Facts, rules: Rules) -> Axis:
    found = chance.mean(course.since[-1].differences) if course.since else None
    carried = course.epoch if course.epoch != facts.epoch else None
    axis = _sampled(found, carried)
    enough = course.looks >= rules.looks or facts.alone
    return axis if enough else Axis(axis.value, axis.low, axis.high, axis.n, False, axis.approximate, carried)


def _harms(facts: Facts, rules: Rules) -> Iterator[str]:
    for name, course in {} if facts.elsewhere else facts.courses.items():
        if _axis(course, facts, rules).resolved and _worse(course, name == "accuracy", facts, rules):
            yield _named(name)
    if facts.script and facts.script.yes > 0:
        yield "script"


def _worse(course: Course, accuracy: bool, facts: Facts, rules: Rules) -> bool:
    """Now, and already some way back: a single bad look is luck. An adapter's only look has no way back."""
    least = rules.accuracy if accuracy else rules.relative * abs(course.best)
    now = course.since[-1]
    if not _clearly(now, course, least, rules):
        return False
    back = [one for one in course.since[:-1] if now.travel - one.travel >= rules.apart * facts.travel]
    return facts.alone or any(_clearly(one, course, least, rules) for one in back)


def _clearly(change: Change, course: Course, least: float, rules: Rules) -> bool:
    found, error = chance.mean(change.differences), chance.standard_error(change.differences)
    if found is None or error is None or course.cut is None:
        return False
    return found.value > max(rules.standard_errors * error, least) and (course.cut <= 0 or found.low > course.cut)


# axes


def _sampled(found: Interval | None, epoch: float | None = None) -> Axis:
    if found is None:
        return Axis(epoch=epoch)
    return Axis(found.value, found.low, found.high, found.n, True, found.approximate, epoch)


def _counted(count: Count, epoch: float) -> Axis:
    if count.of <= 0:
        return Axis(epoch=epoch)
    return Axis(count.yes / count.of, n=count.of, resolved=True, epoch=epoch)
