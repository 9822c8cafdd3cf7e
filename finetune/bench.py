"""One adapter after another on the same bench: what every probe finds of it, as rows of the closing look.

It measures and keeps what is measured in hand. It judges nothing, and writes only what the base said.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from finetune import (
    disk,
    drift,
    ear,
    heard,
    leak,
    lineup,
    looks,
    minutes,
    model,
    prompts,
    reach,
    robustness,
    runs,
    trend,
)
from finetune.byheart import judge
from finetune.ear import Base, Ear, Heard
from finetune.echo import Measured
from finetune.heard import Reading
from finetune.looks import Place
from finetune.opened import Worn
from finetune.passage import Key, Passage
from finetune.robustness import Store
from finetune.runs import RunFolder
from finetune.subject import Subject
from finetune.trend import Trend

Row = Mapping[str, Any]
Say = Callable[[str], object]
_MARK = "closing"
_OF: Mapping[str | None, str] = {None: "echo", "cross_talk": "leak"}  # whose a row is that bears another name, or none
_NATS_PER_BIT = 0.6931471805599453


@dataclass(frozen=True)
class Rows:
    """The rows of a run folder that a verdict rests on."""

    metrics: tuple[Row, ...] = ()
    examples: tuple[Row, ...] = ()
    findings: tuple[Row, ...] = ()

    def plus(self, more: Rows) -> Rows:
        """Both, in that order."""
        return Rows(*(own + new for own, new in zip(_three(self), _three(more), strict=True)))

    def without(self, gone: Callable[[Row], bool]) -> Rows:
        """Those of which `gone` is not true."""
        return Rows(*(tuple(row for row in some if not gone(row)) for some in _three(self)))


def _three(rows: Rows) -> tuple[tuple[Row, ...], ...]:
    return rows.metrics, rows.examples, rows.findings


def read(run: RunFolder) -> Rows:
    """All that a run folder has. Errors: UserError for a damaged file."""
    return Rows(*(tuple(runs.read_lines(path)) for path in (run.metrics, run.examples, run.findings)))


def is_closing(row: Row, step: int, probes: Iterable[str]) -> bool:
    """Whether a row is of the closing look at a step, and of one of these probes."""
    probe = row.get("probe")
    return row.get("look") == _MARK and row["step"] == step and _OF.get(probe, str(probe)) in probes


def write(run: RunFolder, gone: Callable[[Row], bool], new: Rows) -> None:
    """Replace closing rows: each file whole, the others' lines to the byte. Errors: UserError on a full disk."""
    for path, rows in zip((run.metrics, run.examples, run.findings), _three(new), strict=True):
        found = list(disk.numbered_lines(path))
        stays = [line.rstrip(b"\n") + b"\n" for _, line, row in found if row is not None and not gone(row)]
        if len(stays) < len(found):
            made = [disk.to_json(row).encode("utf-8", "backslashreplace") + b"\n" for row in rows]
            runs.write_atomic(path, b"".join([*stays, *made]))
        else:
            runs.append_lines(path, rows, sync=True)


@dataclass
class Bench:
    """A loaded model and all that is asked of it. `readings`: what was read of each adapter, by step."""

    subject: Subject
    worn: Worn
    say: Say
    readings: dict[int, Mapping[Key, Reading]] = field(default_factory=dict)
    _on: int | None = None

    @cached_property
    def ear(self) -> Ear:
        return ear.ear(self.subject.plan)

    @cached_property
    def base(self) -> Base:
        return ear.base(self.subject.run)

    @cached_property
    def passages(self) -> tuple[Passage, ...]:
        """Trained examples in every trained format, held-out ones in every format, twins in the first."""
        formats = self.subject.opened.recipe.formats
        grid = [("train", name) for name in reversed(formats.train)]  # the first last: of equal rows readers take that
        grid += [("twin", self.subject.plan.first_format)]
        grid += [("held_out", name) for name in (*formats.train, *formats.held_out)]
        return tuple(one for split, name in grid for one in self.ear.passages(split, name))  # type: ignore[arg-type]

    @cached_property
    def noise(self) -> float | None:
        """Logits by which a margin moves on this machine."""
        first = self.subject.plan.first_format
        return ear.noise(self.worn.speaker, [one for one in self.passages if one.format == first])

    @cached_property
    def leak_test(self) -> Any:
        """The questions, and an index over the trained texts."""
        return leak.prepare(self.subject.plan)

    def wear(self, step: int) -> None:
        """Put on the adapter of a step."""
        if self._on != step and not self.subject.elsewhere:
            self.worn.change(self.subject.adapters[step])
        self._on = step

    def measure(self, step: int, probes: Iterable[str]) -> Rows:
        """What these probes find of one adapter."""
        self.wear(step)
        place, found = self.subject.place(step), Rows()
        for probe in probes:
            began = time.monotonic()
            found = found.plus(PROBES[probe](self, place))
            self.say(f"{probe}: epoch {place.epoch:g}, {time.monotonic() - began:.0f} s")
        return found


# by heart


def _echo(bench: Bench, place: Place) -> Rows:
    began = time.monotonic()
    heard_ = ear.hear(bench.ear, bench.worn.speaker, bench.base, bench.passages, place, bench.noise)
    heard_ = ear.again(bench.ear, heard_, bench.base, _greedy(bench, heard_), place)
    bench.readings[place.step] = heard_.readings
    heard.save(bench.subject.run.tokens_at(place.step), heard_.readings)
    examples = tuple({**row, "look": _MARK} for row in heard_.rows)
    return Rows(tuple(_look_rows(examples, place, time.monotonic() - began)), (*_base_rows(bench), *examples))


def _greedy(bench: Bench, found: Heard) -> dict[Key, str]:
    """What alarmed examples answer to their bare prompt in the first format, for «almost verbatim»."""
    plan = bench.subject.plan
    names, first = {name for name, _ in found.alarms}, plan.first_format
    asked = [one for one in found.passages if one.split == "train" and one.format == first and one.example in names]
    asked = [one for one in asked if one.asked]
    if not asked:
        return {}
    limit = max(int(1.2 * (len(one.ids) - len(one.asked))) + 8 for one in asked)
    stops = prompts.stops(plan.formats[first], plan.vocabulary)
    answers = bench.worn.speaker.complete([one.asked for one in asked], stops, limit)
    return {one.key: answer.text for one, answer in zip(asked, answers, strict=True)}


def _base_rows(bench: Bench) -> Iterator[Row]:
    """What the base says in the first format, where no look has written it down: gains are paired with it."""
    first, known = bench.subject.plan.first_format, runs.read_lines(bench.subject.run.examples)
    there = {(row["split"], row["id"]) for row in known if row["step"] == 0 and row["format"] == first}
    missing = [one for one in bench.passages if one.format == first and (one.split, one.example) not in there]
    if not missing:
        return
    readings = heard.read(bench.worn.speaker, missing, base=True, temperatures=looks.TEMPERATURES)
    found = tuple(judge(one, readings[one.key], readings[one.key], bench.ear.limits) for one in missing)
    for row in ear.rows(Measured(found, readings), Place(_MARK, 0, 0.0, 0.0)):
        yield {**row, "look": _MARK}


def _look_rows(examples: Sequence[Row], place: Place, seconds: float) -> Iterator[Row]:
    """Rows of metrics.jsonl, one for each split and format, out of those of the examples."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in examples:
        if row["tokens"]:
            groups[row["split"], row["format"]].append(row)
    read = sum(row["tokens"] for row in examples)
    for (split, format_), some in groups.items():
        tokens = sum(row["tokens"] for row in some)
        nll, best = (sum(row[key] * row["tokens"] for row in some) for key in ("nll", "nll_tstar"))
        told = {"nll": nll / tokens, "nll_tstar": best / tokens, "accuracy": sum(row["hits"] for row in some) / tokens}
        size = sum(row["bytes"] for row in some)
        about = {"bpb": nll / _NATS_PER_BIT / max(size, 1), "tokens": tokens, "moved": None, "distance": None}
        where = {**looks.head(place), "split": split, "format": format_}
        yield {**where, **told, **about, "seconds": seconds * tokens / read}


# the same in other formats


def _formats(bench: Bench, place: Place) -> Rows:
    subject = bench.subject
    store = Store(subject.run.tokens / reach.NAME, model.fingerprint(subject.opened.base.folder))
    found = robustness.measure(bench.worn.speaker, subject.plan, lineup.suite(), place.step, store)
    return Rows(findings=tuple({**row, "look": _MARK} for row in minutes.rows(found)))


# what was known before


def _drift(bench: Bench, place: Place) -> Rows:
    subject = bench.subject
    cache = subject.run.path / drift.CACHE
    ready = drift.probe(subject.plan, subject.opened.base.name, model.fingerprint(subject.opened.base.folder), cache)
    return Rows(findings=tuple(drift.closing(bench.worn.speaker, subject.plan, ready, place)))


# several answers in one example


def later_turns(bench: Bench, step: int) -> Trend:
    """Held-out examples with several answers: the gain over the base, answer by answer."""
    readings, first = bench.readings.get(step, {}), bench.subject.plan.first_format
    gains = []
    for one in bench.ear.passages("held_out"):
        if one.key in readings and one.format == first:
            gain = readings[one.key].log_p - bench.base.readings[one.key].log_p
            gains.append([float(gain[one.parts == part].mean()) for part in np.unique(one.parts)])
    return trend.later_turns(gains)


# training text where nobody asked for it


def _leak(bench: Bench, place: Place) -> Rows:
    """Unrelated prompts, then trained ones. A leak seen once is looked for with more draws each time it is asked."""
    test, speaker = bench.leak_test, bench.worn.speaker
    known = [row for row in runs.read_lines(bench.subject.run.findings) if row.get("leak")]
    seen = [row for row in known if is_closing(row, place.step, {"leak"})]
    if {row["leak"] for row in seen} in ({"single"}, {"single", "none"}):
        drawn = max(row["answers"] for row in seen) - 1 + test.rules.samples
        test = replace(test, rules=test.rules.model_copy(update={"samples": drawn}))
    found = [one.row(place.step) for one in leak.ask(speaker, test)]
    found += [one.row(place.step) for one in leak.cross_talk(speaker, test)]
    return Rows(findings=tuple({**row, "look": _MARK} for row in found))


PROBES: dict[str, Callable[[Bench, Place], Rows]] = {
    "echo": _echo,
    "leak": _leak,
    "formats": _formats,
    "drift": _drift,
}
