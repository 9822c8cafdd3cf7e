"""A run as one picture: train, held-out and twin loss and echo over its looks, along epochs, travel or train loss.

Beside it the same numbers as rows of a table. It measures nothing and gives no verdict of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evidence import Count
from finetune.gathered import Look, Run, Tally
from finetune.plots import NARROW, WIDE, Curve, Panel, Picture, Strip, course

About = Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """What looks are set out along."""

    name: str
    label: str
    unit: str


ALONG = (
    Axis("epoch", "epochs", "epoch"),
    Axis("travel", "travel", "travel: sum of the learning rate over all steps"),
    Axis("train_loss", "train loss", "train loss of the epoch before, nats per token"),
)


def picture(run: Run) -> About | None:
    """Train, held-out, twins and echo, once for each axis and two widths; and the numbers as a table."""
    if not any(one.step > 0 for one in run.looks):
        return None
    tallies = {one.look.step: one for one in run.tallies}
    shown = [one for one in ALONG if one.name != "train_loss" or (_falls(run) and not run.running)]  # each costs time
    drawn = [(one, width, _course(run, one, width, tallies)) for one in shown for width in (WIDE, NARROW)]
    rows = list(_table(run, tallies))
    return {"axes": shown, "drawn": drawn, "rows": rows, "verdicts": bool(run.verdicts), "echo": bool(tallies)}


def _falls(run: Run) -> bool:
    """Whether train loss orders the looks: three or more, and clearly down."""
    losses = [one.train_loss for one in run.looks if one.train_loss is not None]
    return len(losses) > 2 and losses[-1] < losses[0]


def _course(run: Run, along: Axis, width: int, tallies: Mapping[int, Tally]) -> Picture:
    xs = {one.step: _x(one, along.name) for one in run.looks}
    at = {step: x for step, x in xs.items() if x is not None}
    panels = [_losses(run, along, at)]
    if tallies:
        panels.append(_echoes(tallies, at))
    marked = [one for one in run.looks if one.step in at and one.step > 0]
    words = run.verdicts if along.name != "train_loss" else {}
    strip = Strip([(at[one.step], one.full) for one in marked], list(_bands(marked, at, words)))
    star = at.get(run.chosen) if run.chosen is not None else None
    return course(f"{along.name}{width}", panels, along.unit, width, strip, star, along.name == "train_loss")


def _x(look: Look, along: str) -> float | None:
    value: float | None = {"epoch": look.epoch, "travel": look.travel, "train_loss": look.train_loss}[along]
    return value


def _losses(run: Run, along: Axis, at: Mapping[int, float]) -> Panel:
    base = dict(run.series("held_out", "nll_tstar")).get(0)
    held = [(step, value) for step, value in run.series("held_out", "nll_tstar") if step in at]
    curves = [
        Curve("train, each epoch", "steps", list(_epochs(run, along)), thin=True),
        Curve("trained answers", "train", _points(run.series("train", "nll_tstar"), at)),
        Curve("twins", "twin", _points(run.series("twin", "nll_tstar"), at)),
        Curve("held out, as it is", "held", _points(run.series("held_out", "nll"), at), thin=True, dashed=True),
        Curve("held out", "held", _points(held, at), list(_whiskers(run, held, at))),
    ]
    level = None if base is None else ("held out, base", base)
    return Panel("loss, nats per token", [one for one in curves if one.points], level)


def _epochs(run: Run, along: Axis) -> Iterator[tuple[float, float]]:
    if along.name != "train_loss":
        every = max(1, len(run.epochs) // 300)
        for epoch, travel, loss in run.epochs[::every]:
            yield (epoch if along.name == "epoch" else travel), loss


def _points(series: Sequence[tuple[int, float]], at: Mapping[int, float]) -> list[tuple[float, float]]:
    return [(at[step], value) for step, value in series if step in at]


def _whiskers(
    run: Run, held: Sequence[tuple[int, float]], at: Mapping[int, float]
) -> Iterator[tuple[float, float, float]]:
    """Bounds of the paired difference to the base, around the look's own figure."""
    for step, value in held:
        found = run.gain(step) if step > 0 else None
        if found is not None:
            yield at[step], value - (found.high - found.value), value + (found.value - found.low)


def _echoes(tallies: Mapping[int, Tally], at: Mapping[int, float]) -> Panel:
    some = [(at[step], one) for step, one in tallies.items() if step in at]
    kinds = (
        ("whole answers", "train", [(x, _share(one.whole)) for x, one in some], False),
        ("50 tokens or more", "twin", [(x, _share(one.long)) for x, one in some], False),
        ("8-word windows", "steps", [(x, _share(one.windows)) for x, one in some], False),
        ("8-word windows, held out", "held", [(x, _share(one.held_out_windows)) for x, one in some], True),
    )
    curves = [
        Curve(label, paint, [(x, y) for x, y in points if y is not None], dashed=dashed)
        for label, paint, points, dashed in kinds
    ]
    return Panel("echo, share of trained", [one for one in curves if one.points], share=True)


def _share(count: Count) -> float | None:
    return count.yes / count.of if count.of else None


def _bands(
    looks: Sequence[Look], at: Mapping[int, float], words: Mapping[int, str]
) -> Iterator[tuple[float, float, str]]:
    """Each verdict from its look half the way to its neighbours."""
    known = [(at[one.step], words[one.step]) for one in looks if one.step in words]
    for number, (x, word) in enumerate(known):
        before = known[number - 1][0] if number else x
        after = known[number + 1][0] if number + 1 < len(known) else x
        yield (before + x) / 2, (x + after) / 2, word


def _table(run: Run, tallies: Mapping[int, Tally]) -> Iterator[About]:
    series = {
        (split, key): dict(run.series(split, key))
        for split, key in (("train", "nll_tstar"), ("held_out", "nll_tstar"), ("held_out", "nll"),
                           ("held_out", "accuracy"), ("twin", "nll_tstar"))
    }  # fmt: skip
    for look in run.looks:
        told = {f"{split}_{key}": some.get(look.step) for (split, key), some in series.items()}
        tally = tallies.get(look.step)
        yield {**told, "look": look, "tally": tally, "gain": run.gain(look.step), "word": run.verdicts.get(look.step)}
