"""From what a run's looks showed to one word: ok, watch, overfit, undertrained, underpowered; and which look to keep.

A total function: any facts give exactly one verdict, with its reason, what to do next, and every axis. It measures
nothing, reads no file but the thresholds, and says «unresolved» of an axis that was never measured, not «healthy».
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune import evidence, rules, signs, wording
from finetune.evidence import Facts, Row, Setting
from finetune.rules import Rules
from finetune.signs import Axis, Signs

Word = Literal["ok", "watch", "overfit", "undertrained", "underpowered"]


@dataclass(frozen=True)
class Judgement:
    """One look, judged by what was known then."""

    verdict: Word
    facts: Facts
    signs: Signs


@dataclass(frozen=True)
class Verdict:
    """What verdict.json holds: the chosen adapter, and in `run` the last look. `version`: of the thresholds."""

    version: int
    verdict: Word
    reason: str
    next: str
    epoch: float
    step: int
    axes: Mapping[str, Axis]
    run: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The keys of the contract, no others."""
        keys = ("value", "low", "high", "n", "resolved")
        axes = {name: {key: getattr(axis, key) for key in keys} for name, axis in self.axes.items()}
        return {
            "version": self.version,
            "verdict": self.verdict,
            "reason": self.reason,
            "next": self.next,
            "epoch": self.epoch,
            "step": self.step,
            "axes": axes,
            "run": dict(self.run),
        }


# one look


def judge(facts: Facts, by: Rules) -> Judgement:
    """The verdict on one look."""
    found = signs.signs(facts, by)
    return Judgement(_word(found), facts, found)


def _word(found: Signs) -> Word:
    """Evidence of overfit counts at any n; only a good verdict, or none, needs enough examples to be given."""
    harmed = bool(found.harms)
    if found.leak == "confirmed" or (found.heavy and harmed):
        return "overfit"
    if found.some or harmed or found.leak == "single":
        return "watch"
    if not found.enough or found.learned is None:
        return "underpowered"
    return "ok" if found.learned else "undertrained"


def asks_to_stop(verdict: Word, stop_at: Literal["overfit", "watch", "never"]) -> bool:
    """Whether a run with this `watch.stop_at` ends here."""
    return verdict in rules.STOPS[stop_at]


# which look


def _rank(one: Judgement) -> tuple[int, float, int]:
    """Smaller is better. A watched look that learned nothing comes after one that is merely undertrained.

    Else an adapter that a high learning rate had wrecked would be preferred to the untouched one before it.
    """
    learned = one.signs.learned is True
    place = {"ok": 0, "watch": 1 if learned else 3, "overfit": 4}.get(one.verdict, 0 if learned else 2)
    loss = one.facts.nll_tstar
    if place == 2 or loss is None or not math.isfinite(loss):  # the latest
        return place, float("inf"), -one.facts.step
    return place, loss, one.facts.step


def chosen(looks: Sequence[Judgement], kept: Collection[int] | None = None, running: bool = False) -> Judgement | None:
    """The look whose adapter is the run's: the best of those tested for leaks, else of all; None where there is none.

    `kept`: steps whose checkpoint is still there. While a run goes on, tests of its earlier looks decide nothing.
    """
    there = [one for one in looks if kept is None or one.facts.step in kept]
    tested = [] if running else [one for one in there if one.facts.leak]
    return min(tested or there, key=_rank, default=None)


def to_test(looks: Sequence[Judgement], tried: int, by: Rules, kept: Collection[int] | None = None) -> int | None:
    """The step whose checkpoint is to be tested for leaks next; None where the best one tested is the one to keep.

    `tried`: how many were tested in this closing measurement.
    """
    there = [one for one in looks if kept is None or one.facts.step in kept]
    tested = [_rank(one) for one in there if one.facts.leak]
    left = min((one for one in there if not one.facts.leak), key=_rank, default=None)
    if left is None or tried >= by.leak_tests or (tested and min(tested) <= _rank(left)):
        return None
    return left.facts.step


# a run


def judgements(
    metrics: Iterable[Row],
    examples: Iterable[Row],
    findings: Iterable[Row],
    setting: Setting,
    by: Rules | None = None,
    only: Collection[int] | None = None,
) -> list[Judgement]:
    """Every look of a run folder, in order; the last one is what may stop a run. `only`: looks at these steps."""
    thresholds = by or rules.read()
    return [judge(one, thresholds) for one in evidence.facts(metrics, examples, findings, setting, only)]


def of_run(
    metrics: Iterable[Row],
    examples: Iterable[Row],
    findings: Iterable[Row],
    setting: Setting,
    stopped_by: str,
    kept: Collection[int] | None = None,
) -> Verdict | None:
    """What verdict.json is to hold, from the rows of a run folder; None before the first look.

    `stopped_by`: what ended the run, or is yet to. `kept`: steps whose checkpoint is still there.
    """
    by = rules.read()
    looks = judgements(metrics, examples, findings, setting, by)
    return conclude(looks, by, stopped_by, chosen(looks, kept, setting.running))


def conclude(looks: Sequence[Judgement], by: Rules, stopped_by: str, best: Judgement | None) -> Verdict | None:
    """The verdict on the chosen look, in words, beside the last one's; None where nothing was looked at."""
    if best is None:
        return None
    return Verdict(
        version=by.version,
        verdict=best.verdict,
        reason=wording.reason(best.facts, best.signs, by),
        next=wording.following(best.verdict, best.facts, best.signs, by),
        epoch=best.facts.epoch,
        step=best.facts.step,
        axes=best.signs.axes,
        run={"verdict": looks[-1].verdict, "epoch": looks[-1].facts.epoch, "stopped_by": stopped_by},
    )
