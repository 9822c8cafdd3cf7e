"""The closing measurement: every probe on the chosen adapter, leaks on up to three, the verdict written anew.

Rows of an earlier closing look at the same adapter are replaced, never doubled. It trains nothing; a run that is being
written is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from finetune import bench, dial, ear, heard, reciters, rules, runs, shades, siblings, subject, trend, verdict
from finetune.bench import Bench, Row, Rows, Say
from finetune.dial import Sweep
from finetune.errors import refuse
from finetune.heard import Reading
from finetune.keeping import Keeper
from finetune.passage import Passage, Split
from finetune.shades import View
from finetune.subject import Subject
from finetune.trend import Trend
from finetune.verdict import Judgement, Verdict

_OTHERS = ("echo", "leak")  # what decides between adapters; the rest is measured of the one that is kept


@dataclass(frozen=True)
class Exam:
    """What is known after a closing measurement. `rows`: all of the folder; `seconds`: of what was measured now."""

    subject: Subject
    bench: Bench
    verdict: Verdict
    rows: Rows
    trends: tuple[Trend, ...]
    seconds: float


def examine(found: Subject, probes: Sequence[str], say: Say) -> Exam:
    """Measure; write rows, verdict and, where another look turned out better, the adapter. Errors: UserError."""
    with found.run.lock():
        say(f"Loading {found.opened.base.name} ({found.opened.recipe.quantization}).")
        began = time.monotonic()
        session = _Session(Bench(found, found.wear(), say), bench.read(found.run))
        subject.begin(found)
        best = session.measure(probes)
        return _written(session, best, time.monotonic() - began)


@dataclass
class _Session:
    """What was there, and what is new. `measured`: probes by step."""

    bench: Bench
    old: Rows
    new: Rows = field(default_factory=Rows)
    measured: dict[int, set[str]] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        return self.bench.subject

    @property
    def rows(self) -> Rows:
        """As the files will be."""
        return self.old.without(self.is_replaced).plus(self.new)

    def is_replaced(self, row: Row) -> bool:
        """A row of an earlier closing look that was measured again."""
        probes = self.measured.get(row["step"]) if row.get("look") else None
        return bool(probes) and bench.is_closing(row, row["step"], probes or ())

    def ask(self, step: int, probes: Sequence[str]) -> None:
        """What was not yet asked of an adapter in this session."""
        left = [one for one in probes if one not in self.measured.get(step, ())]
        self.new = self.new.plus(self.bench.measure(step, left))
        self.measured.setdefault(step, set()).update(left)

    def measure(self, probes: Sequence[str]) -> Judgement:
        """All probes on the adapter that is kept; which one that is, leaks may change. Returns its judgement."""
        self.ask(self.subject.step, probes)
        if "leak" in probes and not self.subject.elsewhere and not self.subject.unfinished:
            self._try_others([one for one in _OTHERS if one in probes])
            best = verdict.chosen(self.looks(), self._known())
            if best is not None and best.facts.step != self.subject.step:
                self._install(best)
                self.ask(best.facts.step, probes)
        return next(one for one in self.looks() if one.facts.step == self.subject.step)

    def looks(self) -> list[Judgement]:
        """Every look, by all that is known now."""
        rows = self.rows
        return verdict.judgements(rows.metrics, rows.examples, rows.findings, self.subject.setting)

    def _known(self) -> set[int]:
        """Steps whose adapter is there and whose echo was measured: no adapter is preferred for want of a look."""
        return {one.facts.step for one in self.looks() if one.facts.echo} & set(self.subject.adapters)

    def _try_others(self, probes: Sequence[str]) -> None:
        """Other adapters, while one may be better than the best that was tested, within the limit of tests."""
        by = rules.read()
        while (step := verdict.to_test(self.looks(), self._tested(), by, self._known())) is not None:
            self.ask(step, probes)

    def _tested(self) -> int:
        return len({row["step"] for row in self.rows.findings if row["probe"] == "leak" and row.get("leak")})

    def _install(self, best: Judgement) -> None:
        """Put another look's adapter into `adapter/`."""
        step, found = best.facts.step, self.subject
        self.bench.say(f"The adapter of epoch {best.facts.epoch:g} is better, now that leaks were looked for.")
        found.run.install_adapter(found.adapters[step])
        reason = f"{best.verdict}, the best of {self._tested()} tested for leaks"
        chosen = {"step": step, "epoch": best.facts.epoch, "travel": best.facts.travel, "reason": reason}
        found.run.record(chosen=chosen)
        self.bench.subject = subject.of(str(found.run.path))


def _written(session: _Session, best: Judgement, seconds: float) -> Exam:
    found, table = session.subject, session.bench
    said = verdict.conclude(session.looks(), rules.read(), _stopped_by(found), best)
    assert said is not None  # there is a best look
    trends = tuple(_trends(session, said.step))
    told = [_finding(one, table, said.step) for one in trends]
    session.measured.setdefault(said.step, set()).add("curve")
    session.new = session.new.plus(Rows(findings=tuple(told)))
    rows = session.rows
    bench.write(found.run, session.is_replaced, session.new)
    runs.write_json(found.run.verdict, _document(found, said, table))
    if not found.elsewhere:
        found.run.record(closing={"seconds": seconds, "step": said.step, "probes": sorted(session.measured[said.step])})
    return Exam(found, table, said, rows, trends, seconds)


def _stopped_by(found: Subject) -> str:
    """What ended the run, as it said itself."""
    if found.elsewhere:
        return "elsewhere"
    known: Mapping[str, Any] = runs.read_json(found.run.verdict) if found.run.verdict.is_file() else {}
    told = known.get("run", {}).get("stopped_by") or found.opened.facts.get("stopped_by")
    return str(told or ("nothing yet" if found.unfinished else "epochs"))


def _document(found: Subject, said: Verdict, table: Bench) -> dict[str, Any]:
    """What verdict.json holds, of an adapter from elsewhere without a run's history."""
    if found.elsewhere:
        return said.to_json()
    keeper = Keeper(found.run, found.setting)
    keeper.judge()
    document: dict[str, Any] = keeper.document(said.run["stopped_by"], {said.step}, table.ear.quote)
    return document


def _trends(session: _Session, step: int) -> list[Trend]:
    """How it learned; nothing of an adapter without a history."""
    if session.subject.elsewhere:
        return []
    course = siblings.course(session.subject.opened, session.rows)
    return [*trend.told(course), bench.later_turns(session.bench, step)]


def _finding(one: Trend, table: Bench, step: int) -> Row:
    place = table.subject.place(step)
    where = {"look": place.kind, "step": step, "epoch": place.epoch, "travel": place.travel}
    head = {"probe": "curve", "suite": "curve", "version": 1, **where, "id": one.name, "prompt": None, "answer": None}
    return {**head, "score": None, "why": one.words, "source": "metrics.jsonl, examples.jsonl", "about": one.as_dict()}


# how much of it


def dialled(found: Subject, say: Say) -> tuple[Sweep, Path | None]:
    """Every kept adapter at every scale, and where the best was written, if it is another. Errors: UserError."""
    with found.run.lock():
        say(f"Loading {found.opened.base.name} ({found.opened.recipe.quantization}).")
        table = Bench(found, found.wear(), say)
        subject.begin(found)
        swept = dial.sweep(table)
        return swept, dial.write(table, swept)


# one example


def example(found: Subject, name: str, say: Say) -> View:
    """One example by the chosen adapter and by the base: from what the run keeps, else read now. Errors: UserError."""
    listens, step = ear.ear(found.plan), found.step
    sides: Mapping[Split, Sequence[str]] = {"train": found.plan.split.train, "held_out": found.plan.split.held_out}
    split: Split | None = next((side for side, names in sides.items() if name in names), None)
    if split is None:
        near = get_close_matches(name, found.plan.conversations, 1, 0.5)
        remedy = f"Did you mean {near[0]}?" if near else f"There is {', '.join([*found.plan.conversations][:8])}, ..."
        raise refuse(f"{name} is not an example of {found.run.path}.", remedy)
    passage = listens.passage(split, name, found.plan.first_format)
    own, base = (_kept(found, at, passage) for at in (step, 0))
    if own is None or base is None:
        say(f"Loading {found.opened.base.name} ({found.opened.recipe.quantization}).")
        worn = found.wear()
        own, base = (heard.read(worn.speaker, [passage], off)[passage.key] for off in (False, True))
    place = reciters.near(str(found.plan.conversations[name].origin))
    return shades.view(listens, passage, (own, base), found.place(step).epoch, place)


def _kept(found: Subject, step: int, passage: Passage) -> Reading | None:
    """What a full look or an earlier closing one wrote down."""
    path = found.run.tokens_at(step)
    if found.elsewhere or not path.is_file():
        return None
    reading = heard.load(path).get(passage.key)
    return reading if reading is not None and len(reading.hits) == sum(passage.read) else None
